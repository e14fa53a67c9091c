"""Who may import whom: the arrows of docs/design.md."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src/mosaicbert"
BASE = {"errors", "batch", "duration", "config", "executors", "redaction", "retrying"}
JOBS = {"run", "pretraining", "finetuning"}
ALLOWED = {
    "errors": set(),
    "batch": set(),
    "duration": {"errors"},
    "slurm": set(),
    "redaction": set(),
    "retrying": set(),
    "executors": {"errors"},
    "config": {"errors", "duration", "config", "cli", "redaction"},
    "data": BASE | {"data"},
    "models": BASE | {"models"},
    "train": BASE | {"train", "slurm"},
    "launch": BASE | {"launch", "slurm"},
    "report": BASE | {"train", "report"},
    "plan": BASE
    | {"run", "pretraining", "finetuning", "glue_suite", "data", "models", "train", "plan"},
    "doctor": BASE | {"data", "models", "train"},
    "completion": BASE | {"cli"},
    "watch": BASE | {"train", "report"},
    "run": BASE | {"models", "train", "report"},
    "pretraining": BASE | {"run", "data", "models", "train", "launch"},
    "finetuning": BASE | {"run", "data", "models", "train", "launch", "cli", "predict"},
    "predict": BASE | {"run", "data", "models", "train", "predict"},
    "bench": BASE | {"run", "data", "models", "train", "pretraining"},
    "glue_suite": BASE | {"run", "finetuning", "data", "models", "glue_suite", "train", "report"},
    "cli": BASE,
}


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "mosaicbert":
                names = [f"mosaicbert.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "mosaicbert" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_what_it_may(room):
    folder = PACKAGE / room
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]
    files = [path for path in files if path.exists()]
    found = {other for path in files for other in imported_rooms(path)}
    assert found <= ALLOWED[room] | {room}
