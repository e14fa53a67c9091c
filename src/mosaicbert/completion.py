"""`mosaicbert completion SHELL`: a script that completes commands, flags, keys and files.

The words are those of the parsers and schemas at the time the script is printed; nothing of
this package runs while somebody types.
"""

import argparse
import importlib
from collections.abc import Iterator, Mapping
from typing import get_args

from pydantic import BaseModel

from mosaicbert.config.jobs import ClassifyConfig, GlueConfig, PretrainConfig

SHELLS = ("bash", "zsh", "fish")
KEYS: dict[str, type[BaseModel]] = {
    "pretrain": PretrainConfig,
    "classify": ClassifyConfig,
    "glue": GlueConfig,
    "bench": PretrainConfig,
    "plan": PretrainConfig,
    "launch": PretrainConfig,
    "config": PretrainConfig,
}
"""Whose `key=value` words a command takes."""

BASH = """\
# mosaicbert: completion for bash{zsh}. Put this line into your shell's start file:
#   eval "$(mosaicbert completion {shell})"
{init}_mosaicbert() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" line="${{COMP_LINE:0:COMP_POINT}}"
    word="${{line##*[[:space:]]}}"
    local words=""
    if [ "$COMP_CWORD" -le 1 ]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    [ "${{#COMPREPLY[@]}}" -eq 0 ] && COMPREPLY=($(compgen -f -- "${{word##*=}}"))
    case "${{COMPREPLY[0]:-}}" in *=) compopt -o nospace 2>/dev/null ;; esac
}}
complete -o filenames -F _mosaicbert mosaicbert
"""


def words_of(commands: Mapping[str, str]) -> dict[str, list[str]]:
    """The flags, choices and keys of each command; `commands`: name -> module."""
    found = {}
    for name, module in commands.items():
        parser = argparse.ArgumentParser(prog=name)
        importlib.import_module(module).add_arguments(parser)
        words = [flag for action in parser._actions for flag in action.option_strings]
        for action in parser._actions:
            if not action.option_strings:
                words += [str(choice) for choice in action.choices or ()]
        keys = [f"{key}=" for key in keys_of(KEYS[name])] if name in KEYS else []
        found[name] = [word for word in words if word.startswith("--") or word[0] != "-"] + keys
    return found


def keys_of(schema: type[BaseModel], prefix: str = "", depth: int = 4) -> Iterator[str]:
    """The dotted keys of a schema, sections and their keys alike."""
    for name, field in schema.model_fields.items():
        key = prefix + (field.alias or name)
        yield key
        for inner in sections(field.annotation):
            if depth > 1:
                yield from keys_of(inner, f"{key}.", depth - 1)


def sections(annotation: object) -> Iterator[type[BaseModel]]:
    """The schemas inside `X`, `X | None`; not those of mappings, whose keys are the user's."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif getattr(annotation, "__origin__", None) not in (dict, list):
        for part in get_args(annotation):
            yield from sections(part)


def script(shell: str, words: Mapping[str, list[str]]) -> str:
    """The script for a shell; `words` of each command."""
    if shell == "fish":
        lines = ["# mosaicbert completion fish | source", "complete -c mosaicbert -e"]
        names = " ".join(words)
        lines.append(f"complete -c mosaicbert -n __fish_use_subcommand -f -a '{names}'")
        for name, own in words.items():
            condition = f"__fish_seen_subcommand_from {name}"
            lines.append(f"complete -c mosaicbert -n '{condition}' -a '{' '.join(own)}'")
        return "\n".join(lines) + "\n"
    cases = "\n".join(
        f'            {name}) words="{" ".join(own)}" ;;' for name, own in words.items()
    )
    init = "autoload -Uz bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return BASH.format(
        shell=shell, zsh=" (in zsh)" * (shell == "zsh"), init=init, commands=" ".join(words),
        cases=cases,
    )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("shell", choices=SHELLS, help="the shell to print a script for")


def main(args: argparse.Namespace) -> int:
    """Print the script."""
    from mosaicbert.cli import COMMANDS

    modules = {name: command.module for name, command in COMMANDS.items()}
    print(script(args.shell, words_of(modules)), end="")
    return 0
