"""GLUE data from a folder, the miniature set, and (stood in for) the hub."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mosaicbert.data.sample import glue_dir
from mosaicbert.errors import DataError
from mosaicbert.glue_suite.data import load_task
from mosaicbert.glue_suite.tasks import TASKS

REAL = Path(__file__).parents[3] / "shared" / "data" / "glue"
RTE = TASKS["rte"]


def write_rte(folder: Path, name: str = "train.parquet", label: Any = 1) -> Path:
    rows = {"sentence1": ["a", ""], "sentence2": ["c", "d"], "label": [0, label], "idx": [0, 1]}
    (folder / "rte").mkdir(exist_ok=True)
    pq.write_table(pa.table(rows), folder / "rte" / name)
    return folder


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("data_dir", ["sample", str(REAL)])
def test_all_splits_of_all_tasks(name: str, data_dir: str) -> None:
    task = TASKS[name]
    if not (glue_dir() if data_dir == "sample" else REAL).joinpath(name).is_dir():
        pytest.skip(f"{data_dir} has no {name} here")
    for split in ("train", *task.validation_splits):
        examples = load_task(task, data_dir, split)
        assert len(examples) >= 40
        assert (examples.pairs is None) == (len(task.text_columns) == 1)
        assert len(examples.labels) == len(examples)
        assert examples.num_labels == task.num_labels
        if name == "stsb":
            assert examples.kind == "regression"
            assert examples.labels.dtype.name == "float32"
            assert 0 <= examples.labels.min() < examples.labels.max() <= 5
        else:
            assert set(examples.labels.tolist()) == set(range(task.num_labels))
            assert examples.label_names == task.label_names


def test_the_hubs_numbered_files(tmp_path: Path) -> None:
    for i in range(2):
        write_rte(tmp_path, f"train-0000{i}-of-00002.parquet")
    examples = load_task(RTE, str(tmp_path), "train")
    assert examples.texts == ["a", "", "a", ""]
    assert examples.labels.tolist() == [0, 1, 0, 1]
    (tmp_path / "rte" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="1 of 2 files"):
        load_task(RTE, str(tmp_path), "train")


@pytest.mark.parametrize("label", [2, -1, 7])
def test_labels_out_of_range(tmp_path: Path, label: int) -> None:
    write_rte(tmp_path, label=label)
    with pytest.raises(DataError, match=rf"row 2: the label {label} is not an integer from 0 to 1"):
        load_task(RTE, str(tmp_path), "train")


def test_labels_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "stsb").mkdir()
    file = tmp_path / "stsb" / "train.tsv"
    file.write_text('sentence1\tsentence2\tlabel\n"a\tb\t2.5\n')
    examples = load_task(TASKS["stsb"], str(tmp_path), "train")
    assert (examples.texts, examples.labels.tolist()) == (['"a'], [2.5])
    file.write_text("sentence1\tsentence2\tlabel\na\tb\thigh\n")
    with pytest.raises(DataError, match="'high' is not a number"):
        load_task(TASKS["stsb"], str(tmp_path), "train")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    write_rte(tmp_path)
    with pytest.raises(DataError, match=r"mrpc is no folder.*Folders in .*: rte"):
        load_task(TASKS["mrpc"], str(tmp_path), "train")
    with pytest.raises(DataError, match=r"neither validation.parquet nor.*train.parquet"):
        load_task(RTE, str(tmp_path), "validation")
    with pytest.raises(DataError, match=r"Folders in .*: none"):
        load_task(RTE, str(tmp_path / "none"), "train")
    (tmp_path / "rte").rename(tmp_path / "qnli")
    with pytest.raises(DataError, match='no column "question"'):
        load_task(TASKS["qnli"], str(tmp_path), "train")


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(DataError, match=r"pip install 'mosaicbert\[hub\]'"):
        load_task(RTE, None, "train")
    fake = ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", fake)
    asked = []

    def load_dataset(path: str, name: str, split: str) -> dict[str, list[Any]]:
        asked.append((path, name, split))
        return {"sentence1": ["a"], "sentence2": ["b"], "label": [1], "idx": [0]}

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    assert load_task(RTE, None, "validation").labels.tolist() == [1]
    assert asked == [("nyu-mll/glue", "rte", "validation")]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    fake.load_dataset = fail  # type: ignore[attr-defined]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"HF_HUB_OFFLINE is set.*ConnectionError: no route"):
        load_task(RTE, None, "train")
