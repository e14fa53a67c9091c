"""The `mosaicbert` command: a table of commands, each imported only when it is asked for.

Exit codes: 0 done; 1 a run failed (`plan`, `doctor`: would fail); 2 a mistake in the configuration,
the data, a checkpoint or the command line, told in one paragraph; 130 and 143 stopped by SIGINT or
SIGTERM.
"""

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mosaicbert.errors import MosaicBertError, did_you_mean
from mosaicbert.redaction import redact_text

OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""Faults of disks and rights: nobody needs a traceback to mend them."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command: what it is for, and the module whose `add_arguments` and `main` do it."""

    help: str
    module: str


COMMANDS = {
    "convert": Command("text to MDS shards", "mosaicbert.data.convert"),
    "tokenizer": Command("a vocabulary from text", "mosaicbert.data.tokenizer_training"),
    "inspect": Command("check shards and look at samples", "mosaicbert.data.inspect"),
    "pretrain": Command("masked-language-model pre-training from a YAML", "mosaicbert.pretraining"),
    "classify": Command("fine-tuning on one task from a YAML", "mosaicbert.finetuning"),
    "glue": Command("fine-tuning on all of GLUE from a YAML", "mosaicbert.glue_suite.jobs"),
    "plan": Command("memory, time and cost of a run before it runs", "mosaicbert.plan"),
    "doctor": Command("is this machine fit for a run, and what to mend", "mosaicbert.doctor"),
    "bench": Command("how fast a YAML's training step is here", "mosaicbert.bench"),
    "report": Command("one page about a run, or several compared", "mosaicbert.report"),
    "watch": Command("follow a run from another terminal", "mosaicbert.watch"),
    "predict": Command("what a model says of each row of a file", "mosaicbert.predict.files"),
    "export": Command("a checkpoint to Hugging Face or ONNX", "mosaicbert.models.export"),
    "launch": Command("a cluster file from a YAML", "mosaicbert.launch.clusters"),
    "config": Command("show or check a YAML", "mosaicbert.config.command"),
    "completion": Command("a completion script for your shell", "mosaicbert.completion"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"mosaicbert {version('mosaicbert')}")
        except PackageNotFoundError:
            print("mosaicbert, of unknown version: it is not installed but runs from its sources")
        return 0
    name = words[0]
    if name not in COMMANDS:
        near = did_you_mean(name, COMMANDS) or f" There are: {', '.join(COMMANDS)}."
        print(f'mosaicbert: there is no command "{name}".{near}', file=sys.stderr)
        return 2
    return run_command(name, words[1:])


def run_command(name: str, words: Sequence[str]) -> int:
    """Run a command by name, turning errors for people into a message and an exit code."""
    command = COMMANDS[name]

    def run() -> int:
        module = importlib.import_module(command.module)
        parser = argparse.ArgumentParser(
            prog=f"mosaicbert {name}", description=command.help.capitalize() + "."
        )
        module.add_arguments(parser)
        return int(module.main(parse(parser, words)))

    return guarded(run)


def guarded(run: Callable[[], int]) -> int:
    """Call `run`; an error for people becomes its message on stderr and its exit code."""
    try:
        return run()
    except MosaicBertError as error:
        print(f"mosaicbert: {redact_text(str(error))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader (such as `head`) has gone; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"mosaicbert: {redact_text(f'{where}{error.strerror}')}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mosaicbert: stopped.", file=sys.stderr)
        return 130


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse, taking `key=value` words wherever they stand when the command has `overrides`."""
    for action in parser._actions:
        if action.dest == "overrides":
            action.required = False  # or argparse would list it among what is missing
    options, rest = parser.parse_known_args(list(words))
    if rest:
        stray = [word for word in rest if word.startswith("-") or "=" not in word]
        if stray or not hasattr(options, "overrides"):
            known = [flag for action in parser._actions for flag in action.option_strings]
            word = (stray or rest)[0]
            parser.error(f'unknown argument "{word}".{did_you_mean(word, known)}')
        options.overrides = [*options.overrides, *rest]
    return options


def _usage() -> str:
    lines = [
        "usage: mosaicbert COMMAND [ARGUMENTS]",
        "",
        "Pre-training and fine-tuning of BERT encoders.",
        "",
        "commands:",
        *(f"  {name:<10} {command.help}" for name, command in COMMANDS.items()),
        "",
        'Try "mosaicbert COMMAND --help". NO_COLOR=1 switches colours off.',
        "Exit codes: 0 done, 1 a run failed (plan, doctor: would fail), 2 a mistake in",
        "what was asked for, 130 and 143 stopped by Ctrl-C or SIGTERM.",
    ]
    return "\n".join(lines)
