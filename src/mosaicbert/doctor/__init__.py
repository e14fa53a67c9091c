"""`mosaicbert doctor [CONFIG]`: is this machine fit for a run, and what to do where it is not.

Each check is a function that looks at one thing and gives `Check`s; none writes anything, and none
waits for long. With a YAML, its data, stores, folders and model are looked at too.
"""

import argparse
import json
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict

from pydantic import BaseModel
from rich.console import Console
from rich.text import Text

from mosaicbert.config import load_config
from mosaicbert.config.command import SCHEMAS, job_of
from mosaicbert.doctor import job, machine
from mosaicbert.doctor.check import Check

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}


def examine(config: BaseModel | None = None) -> list[Check]:
    """All checks, in the order they are printed."""
    looks: tuple[Callable[[], Iterator[Check]], ...] = (
        machine.check_packages,
        machine.check_gpus,
        machine.check_compiler,
        machine.check_threads,
        machine.check_memory,
        machine.check_shared_memory,
        machine.check_limits,
        machine.check_hub,
    )
    found = [check for look in looks for check in look()]
    found += job.check_attention(config)
    found += job.check_folders(config)
    if config is not None:
        found += job.check_data(config)
        found += job.check_files(config)
        found += job.check_stores(config)
        found += job.check_tokenizer(config)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("config", nargs="?", help="YAML file of a run, to look at its needs too")
    parser.add_argument("overrides", nargs="*", help="key=value words that win over the file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Print what was found; exit code 1 when something will stop a run."""
    config = None
    if args.config is not None:
        config = load_config(SCHEMAS[job_of(args.config)], args.config, args.overrides)
    found = examine(config)
    if args.json:
        print(json.dumps({"checks": [asdict(check) for check in found]}, indent=1))
    else:
        _print(found, Console(highlight=False))
    return 1 if any(check.state == "problem" for check in found) else 0


def _print(found: list[Check], console: Console) -> None:
    for check in found:
        line = f"{check.state:<8} {check.name:<12} {check.text}"
        text = textwrap.wrap(line, 80, subsequent_indent=" " * 22, break_on_hyphens=False)
        if check.remedy and check.state != "ok":
            text += textwrap.wrap(
                f"{'':<22}-> {check.remedy}", 80, subsequent_indent=" " * 25, break_on_hyphens=False
            )
        shown = Text("\n".join(text))
        shown.stylize(STYLES[check.state], 0, 8)
        console.print(shown, soft_wrap=True)
    counts = {s: sum(check.state == s for check in found) for s in ("problem", "warning")}
    words = [f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items()]
    console.print(", ".join(words), soft_wrap=True)
