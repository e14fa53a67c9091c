"""Labels as a file gives them, and as a model needs them."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mosaicbert.config.jobs import OwnDataConfig
from mosaicbert.errors import ConfigError, DataError, did_you_mean

Kind = Literal["classification", "regression", "multilabel"]
Encoded = NDArray[np.int64] | NDArray[np.float32]
_YES_NO = {"1": 1.0, "true": 1.0, "0": 0.0, "false": 0.0}


@dataclass(frozen=True, slots=True)
class LabelCells:
    """One file's labels, before they have a meaning."""

    path: str | Path
    columns: list[str]
    values: list[Any]
    """A value a row, or a tuple of them where there are several columns."""

    def where(self, column: int = 0) -> str:
        """File and column, as errors name them."""
        return f'{self.path}, column "{self.columns[column]}"'


def kind_of(config: OwnDataConfig, num_labels: int | None, cells: LabelCells) -> Kind:
    """What the labels of training data are.

    Raises:
        ConfigError: `data.task` says something else than `data.label`.
    """
    if config.task is not None:
        assert config.task != "token_classification", "read by data.tokens"
        if config.task != "multilabel" and not isinstance(config.label, str):
            raise ConfigError(
                f"data.label names {len(config.label)} columns, which is multi-label data, but "
                f"data.task is {config.task}."
            )
        return config.task
    if isinstance(cells.values[0], list | tuple):
        return "multilabel"
    return "regression" if num_labels == 1 else "classification"


def learn_names(cells: LabelCells, kind: Kind) -> tuple[str, ...] | None:
    """The classes there are, sorted (numbers as numbers): the same in every run.

    Raises:
        DataError: they are too few to learn from, or no classes.
    """
    if kind == "regression":
        return None
    if isinstance(cells.values[0], tuple):
        return tuple(cells.columns)
    of_rows = _names_of_rows(cells) if kind == "multilabel" else [[n] for n in _class_names(cells)]
    first_row = {name: row for row, names in reversed(list(enumerate(of_rows))) for name in names}
    counts = Counter(name for names in of_rows for name in names)
    where = cells.where()
    if len(counts) < 2 and kind == "classification":
        raise DataError(f'{where}: every label is "{next(iter(counts))}". Two classes are needed.')
    if not counts:
        raise DataError(f"{where}: no row has a label.")
    if kind == "classification" and all(map(_is_number, counts)) and not all(map(_is_int, counts)):
        decimal = next(name for name in counts if not _is_int(name))
        raise DataError(
            f"{where}: labels such as {decimal} ({rows_text([first_row[decimal]])}) are "
            "measurements, not classes. Set data.task: regression (and no model.num_labels, or 1); "
            f'or, if they are classes, give them names, such as "class {decimal}".'
        )
    single = sorted(name for name, count in counts.items() if count == 1)
    if single:
        raise DataError(
            f'{where}: "{single[0]}" has one example ({rows_text([first_row[single[0]]])})'
            + (f", and so have {len(single) - 1} more of {len(counts)}" if single[1:] else "")
            + ". A class needs two or more: add examples, or leave the row out."
        )
    if all(map(_is_int, counts)):
        return tuple(sorted(counts, key=lambda name: (int(name), name)))
    return tuple(sorted(counts))


def encode_labels(cells: LabelCells, kind: Kind, names: tuple[str, ...] | None) -> Encoded:
    """Labels as numbers, in the form of `Examples.labels`.

    Raises:
        DataError: a label is not among `names`, or is no label of this kind.
    """
    if kind == "regression":
        return _numbers(cells)
    assert names is not None
    if kind == "multilabel" and isinstance(cells.values[0], tuple):
        return _switches(cells)
    of_rows = _names_of_rows(cells) if kind == "multilabel" else [[n] for n in _class_names(cells)]
    _check_known(cells, of_rows, names)
    if kind == "multilabel":
        return np.array([[name in row for name in names] for row in of_rows], np.float32)
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[row[0]] for row in of_rows], np.int64)


def _class_names(cells: LabelCells) -> list[str]:
    """One class name a row. The same class reads alike from every format: 1, "1", 1.0 and "1.0"."""
    names = [_name_of(value) for value in cells.values]
    where = cells.where()
    several = [i for i, value in enumerate(cells.values) if isinstance(value, list | tuple | dict)]
    if several:
        raise DataError(
            f"{where}: {rows_text(several)} hold several labels. Set data.task: multilabel."
        )
    empty = [i for i, name in enumerate(names) if not name]
    if empty:
        raise DataError(f"{where}: {rows_text(empty)} have no label.")
    return names


def _name_of(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    name = str(value).strip()
    return name.partition(".")[0] if re.fullmatch(r"-?\d+\.0+", name) else name


def _names_of_rows(cells: LabelCells) -> list[list[str]]:
    """Several names a row: a list (JSONL, parquet), or text with `|` between the names."""
    rows = []
    for index, value in enumerate(cells.values):
        if isinstance(value, str | None):
            value = [name for name in (value or "").split("|") if name.strip()]
        if not isinstance(value, list) or not all(isinstance(n, str | int) for n in value):
            raise DataError(
                f"{cells.where()}, {rows_text([index])}: {value!r} is no list of labels. "
                'Write ["a", "b"], or a|b in text, or give each label a column.'
            )
        rows.append(list(dict.fromkeys(_name_of(name) for name in value)))
    return rows


def _switches(cells: LabelCells) -> NDArray[np.float32]:
    """Multi-label data with one column a label: 0 or 1 (or false, true) in each."""
    labels = np.zeros((len(cells.values), len(cells.columns)), np.float32)
    for i, row in enumerate(cells.values):
        for j, value in enumerate(row):
            switch = _YES_NO.get(_name_of(value).lower())
            if switch is None:
                raise DataError(
                    f"{cells.where(j)}, {rows_text([i])}: {value!r} is neither 0 nor 1."
                )
            labels[i, j] = switch
    return labels


def _numbers(cells: LabelCells) -> NDArray[np.float32]:
    bad = [i for i, value in enumerate(cells.values) if not _is_number(value)]
    if bad:
        raise DataError(
            f"{cells.where()}: {rows_text(bad)} hold no finite number (such as "
            f"{cells.values[bad[0]]!r}), which regression needs."
        )
    return np.array([float(value) for value in cells.values], np.float32)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _is_int(name: str) -> bool:
    return re.fullmatch(r"-?\d+", name, re.ASCII) is not None


def _check_known(cells: LabelCells, of_rows: list[list[str]], names: tuple[str, ...]) -> None:
    unseen = [i for i, row in enumerate(of_rows) if not set(row) <= set(names)]
    if unseen:
        name = next(name for name in of_rows[unseen[0]] if name not in names)
        shown = ", ".join(f'"{known}"' for known in names[:20])
        raise DataError(
            f'{cells.where()}: "{name}" ({rows_text(unseen)}) is not among the '
            f"labels of the training data.{did_you_mean(name, names)} Those are: {shown}."
        )


def rows_text(indices: Sequence[int]) -> str:
    """`row 3`, or `rows 1, 2, 3, 4, 5 and 12 more`; rows count from 1."""
    shown = ", ".join(str(index + 1) for index in indices[:5])
    more = f" and {len(indices) - 5} more" if len(indices) > 5 else ""
    return f"row{'s' if len(indices) > 1 else ''} {shown}{more}"
