"""The texts of a GLUE task: from a folder, the bundled miniature set, or the hub."""

import importlib
import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from mosaicbert.data.examples import Examples
from mosaicbert.data.labels import Kind
from mosaicbert.data.sample import glue_dir
from mosaicbert.data.tables import Table, read_table
from mosaicbert.errors import DataError, did_you_mean
from mosaicbert.glue_suite.tasks import GlueTask

logger = logging.getLogger(__name__)

HUB_DATASET = "nyu-mll/glue"


def load_task(task: GlueTask, data_dir: str | None, split: str) -> Examples:
    """One split of a task: `train`, or one of `task.validation_splits`.

    `data_dir` holds `<task>/<split>.parquet`, `.tsv` or `.tsv.gz` with the hub's column names (or
    the hub's own numbered parquet files); `sample` is the miniature set of the package; None is
    the hub.

    Raises:
        DataError: the folder, file or column is missing, a label is none of the task's, or the
            hub cannot be reached.
    """
    columns = [*task.text_columns, "label"]
    if data_dir is None:
        where = f"{HUB_DATASET}, {task.name}/{split}"
        table = _from_hub(task, split, columns)
    else:
        root = glue_dir() if data_dir == "sample" else Path(data_dir)
        files = _files(root, task.name, split)
        where = str(files[0])
        parts = [read_table(file, columns) for file in files]
        table = {name: [value for part in parts for value in part[name]] for name in columns}
    for name in task.text_columns:
        _check_texts(where, name, table[name])
    pairs = table[task.text_columns[1]] if len(task.text_columns) == 2 else None
    labels = _labels(where, task, table["label"])
    names = task.label_names if task.num_labels > 1 else None
    kind: Kind = "classification" if names else "regression"
    return Examples(table[task.text_columns[0]], pairs, labels, names, kind)


def _files(root: Path, task: str, split: str) -> list[Path]:
    folder = root / task
    if not folder.is_dir():
        there = sorted(f.name for f in root.iterdir() if f.is_dir()) if root.is_dir() else []
        raise DataError(
            f"data_dir: {folder} is no folder.{did_you_mean(task, there)} GLUE data lie in "
            f"<data_dir>/<task>/<split>.parquet or .tsv. Folders in {root}: "
            f"{', '.join(there) or 'none'}."
        )
    for suffix in (".parquet", ".tsv", ".tsv.gz"):
        if (folder / f"{split}{suffix}").is_file():
            return [folder / f"{split}{suffix}"]
    numbered = sorted(folder.glob(f"{split}-*-of-*.parquet"))
    if not numbered:
        there = sorted(f.name for f in folder.iterdir())
        raise DataError(
            f"data_dir: {folder} has neither {split}.parquet nor {split}.tsv. Files there: "
            f"{', '.join(there) or 'none'}."
        )
    total = re.search(r"-of-(\d+)\.parquet$", numbered[0].name)
    if total is not None and int(total[1]) != len(numbered):
        raise DataError(
            f"data_dir: {folder} has {len(numbered)} of {int(total[1])} files of {split}. Copy the "
            "missing ones."
        )
    return numbered


def _from_hub(task: GlueTask, split: str, columns: list[str]) -> Table:
    offline = "HF_HUB_OFFLINE is set. " if os.environ.get("HF_HUB_OFFLINE") else ""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            "GLUE from the hub needs the package `datasets`: pip install 'mosaicbert[hub]'. Or set "
            "data_dir to a folder that has the tasks, or to `sample`."
        ) from error
    logger.info("Reading %s, %s/%s from the hub or its cache.", HUB_DATASET, task.name, split)
    try:
        dataset = datasets.load_dataset(HUB_DATASET, task.name, split=split)
        return {name: list(dataset[name]) for name in columns}
    except Exception as error:  # the library and its HTTP client have no common error
        raise DataError(
            f"{HUB_DATASET}, {task.name}/{split} cannot be read from the hub. {offline}Set "
            f"data_dir to a folder that has the tasks. {type(error).__name__}: {error}"
        ) from error


def _check_texts(where: str, column: str, values: list[Any]) -> None:
    """Empty texts pass (QQP has some), other things than text do not."""
    for row, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise DataError(f'{where}, column "{column}", row {row}: {value!r} is no text.')


def _labels(where: str, task: GlueTask, values: list[Any]) -> np.ndarray[Any, Any]:
    labels = np.empty(len(values), np.float32)
    for row, value in enumerate(values):
        try:
            labels[row] = float(value)
        except (TypeError, ValueError):
            labels[row] = np.nan
    if task.num_labels == 1:
        wrong, allowed = ~np.isfinite(labels), "a number"
    else:
        wrong = ~np.isin(labels, np.arange(task.num_labels))
        allowed = f"an integer from 0 to {task.num_labels - 1}"
    if wrong.any():
        row = int(np.argmax(wrong))
        unlabelled = " The hub's test splits have no labels." if values[row] == -1 else ""
        raise DataError(
            f"{where}, row {row + 1}: the label {values[row]!r} is not {allowed}.{unlabelled}"
        )
    return labels if task.num_labels == 1 else labels.astype(np.int64)
