"""Every command of the README and the documentation is one that there is, with flags and keys
that there are. `tests/e2e/test_docs.py` runs those that need no large data."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from mosaicbert.cli import COMMANDS, parse
from mosaicbert.config import load_config
from mosaicbert.config.command import SCHEMAS, job_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {"main.py": "pretrain", "glue.py": "glue", "sequence_classification.py": "classify"}
PLACEHOLDERS = {"CONFIG", "CONFIG.yaml"}


def commands_of(text):
    """The words of each `mosaicbert` command (or its scripts) in the bash blocks of a page."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\||\$\(|\)\"", line):
                words = shlex.split(part.replace('eval "', ""), comments=True)
                if words[:1] == ["python"] and words[1:2] and words[1] in SCRIPTS:
                    words = ["mosaicbert", SCRIPTS[words[1]], *words[2:]]
                if words[:1] == ["mosaicbert"]:
                    yield words[1:]


ALL = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)}"[:70])
    for page in PAGES
    for words in commands_of(page.read_text())
]


def test_there_are_commands():
    assert len(ALL) > 40
    assert {param.values[0][0] for param in ALL} >= set(COMMANDS) - {"tokenizer"}


@pytest.mark.parametrize("words", ALL)
def test_a_documented_command_is_understood(words):
    assert words[0] in COMMANDS
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[words[0]].module).add_arguments(parser)
    options = parse(parser, words[1:])
    config = getattr(options, "config", None)
    if config is None or config in PLACEHOLDERS or words[0] == "launch":
        return
    if not (ROOT / config).exists():
        pytest.skip(f"{config} is made on its page")
    load_config(SCHEMAS[job_of(str(ROOT / config))], ROOT / config, options.overrides)


PROSE = re.compile(r"`mosaicbert ([a-z]+)([^`\n]*)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_flags_named_in_prose_exist(page):
    for name, rest in PROSE.findall(page.read_text()):
        assert name in COMMANDS, name
        parser = argparse.ArgumentParser()
        importlib.import_module(COMMANDS[name].module).add_arguments(parser)
        known = {flag for action in parser._actions for flag in action.option_strings}
        flags = set(re.findall(r"(?<!\S)--[\w-]+", rest))
        assert flags <= known, f"{page.name}: mosaicbert {name}{rest}"


def test_yamls_named_in_the_pages_exist():
    for page in PAGES:
        for name in re.findall(r"`?(yamls/[\w./-]+\.yaml)", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_every_page_is_in_the_sites_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in menu, page.name
