"""Each key of the original's YAMLs has its row on the page for those who come from there."""

import re
from pathlib import Path

import pytest
import yaml

from mosaicbert.launch.clusters import CLOUD_KEYS, COMPUTE_KEYS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/from-the-original.md").read_text()
ORIGINAL = ROOT / "tests/golden/original"
OWN_NAMES = {"streams", "tasks"}
"""Sections whose keys are names of the user's own, or of tasks."""


def part_of(heading):
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def named_in(text):
    """Every word in backquotes of the tables' cells, and the parts of dotted ones."""
    return {part for words in re.findall(r"`([^`]+)`", text) for part in re.split(r"[. ]", words)}


def keys_of(content):
    for key, value in content.items():
        yield key
        if isinstance(value, dict):
            children = value.values() if key in OWN_NAMES else [value]
            for child in children:
                yield from keys_of(child or {})


@pytest.mark.parametrize(
    ("heading", "file"),
    [
        ("Pre-training YAML", "pretrain.yaml"),
        ("Sequence-classification YAML", "sequence_classification.yaml"),
        ("GLUE YAML", "glue.yaml"),
    ],
)
def test_every_key_of_the_originals_yamls_has_a_row(heading, file):
    rows = named_in(part_of("Pre-training YAML")) | named_in(part_of(heading))
    keys = set(keys_of(yaml.safe_load((ORIGINAL / file).read_text())))
    assert keys - rows - {"rows_a_step", "max_sequence_length"} == set()


def test_every_key_of_a_cloud_run_has_a_row():
    assert named_in(part_of("Cloud-run YAML")) >= (CLOUD_KEYS | COMPUTE_KEYS)
