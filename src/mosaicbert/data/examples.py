"""Labelled texts of the user's own: one text or a pair, with a class, a number or several labels.

Everything that can be wrong with such data is said before any training, with file and rows. Rows
count from 1, without the header.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import KFold, StratifiedKFold, train_test_split

from mosaicbert.config.jobs import OwnDataConfig
from mosaicbert.data.sample import classification_file
from mosaicbert.data.tables import read_table
from mosaicbert.data.tokens import TokenExamples
from mosaicbert.errors import ConfigError, DataError, did_you_mean

logger = logging.getLogger(__name__)

Kind = Literal["classification", "regression", "multilabel"]
Labelled = TypeVar("Labelled", "Examples", TokenExamples)
_YES_NO = {"1": 1.0, "true": 1.0, "0": 0.0, "false": 0.0}


@dataclass(frozen=True, slots=True)
class Examples:
    """Texts with their labels, in the order of their file.

    `labels`: `(n,)` int64 for classification, `(n,)` float32 for regression, `(n, num_labels)`
    float32 of 0 and 1 for multi-label. `label_names[i]` is the name of class i; None for
    regression.
    """

    texts: list[str]
    pairs: list[str] | None  # the second texts
    labels: NDArray[np.int64] | NDArray[np.float32]
    label_names: tuple[str, ...] | None
    kind: Kind

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def num_labels(self) -> int:
        """Outputs that a model needs: the classes or labels, or 1 for regression."""
        return 1 if self.label_names is None else len(self.label_names)

    def take(self, rows: Sequence[int] | NDArray[np.integer]) -> "Examples":
        """Some of the examples, in the order of `rows`."""
        pairs = None if self.pairs is None else [self.pairs[row] for row in rows]
        texts = [self.texts[row] for row in rows]
        return Examples(texts, pairs, self.labels[rows], self.label_names, self.kind)


def read_examples(
    config: OwnDataConfig, *, num_labels: int | None = None, seed: int = 17
) -> tuple[Examples, Examples]:
    """Training and validation examples of `data`; classes are learned from the training file.

    `num_labels` is `model.num_labels`: 1 asks for regression, another number is compared with
    what the data have. Without a validation file a share of the training data is held out, by
    class in equal parts.

    Raises:
        DataError: what is wrong with a file, and in which rows.
        ConfigError: the keys of `data` do not fit one another, or the data.
    """
    train = read_training(config, num_labels=num_labels)
    validation_path: str | Path | None = config.validation
    if config.train == "sample":
        validation_path = config.validation or classification_file("validation")
    if validation_path is None:
        train, validation = split_examples(train, config.validation_fraction, seed)
    else:
        validation = _encode(_read_part(validation_path, config), train.kind, train.label_names)
    _warn_of_leaks(train, validation)
    return train, validation


def read_training(config: OwnDataConfig, *, num_labels: int | None = None) -> Examples:
    """The whole training file. Raises what `read_examples` does."""
    path = classification_file("train") if config.train == "sample" else config.train
    part = _read_part(path, config)
    kind = _kind_of(config, num_labels, part)
    names = _learn_names(part, config, kind)
    if num_labels is not None and num_labels != (1 if names is None else len(names)):
        raise ConfigError(
            f"model.num_labels is {num_labels}, but {path} has {len(names or ' ')} "
            f"({', '.join(names or (kind,))}). Leave the key out: the number is learned."
        )
    return _encode(part, kind, names)


def sample_examples(split: str) -> Examples:
    """The bundled task (which kind of source is a passage from?), `train` or `validation`."""
    classification_file(split)  # names the splits there are
    train, validation = read_examples(OwnDataConfig(train="sample"))
    return train if split == "train" else validation


def split_examples(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Hold out a share of the examples, each class in the same share; orders are kept.

    Raises:
        ConfigError: `fraction` is not between 0 and 1.
        DataError: too few examples for a split that has every class on both sides.
    """
    if not 0 < fraction < 1:
        raise ConfigError(
            f"data.validation_fraction is {fraction:g}: it must lie between 0 and 1. Or name a "
            "validation file."
        )
    total, by_class = len(examples), examples.kind == "classification"
    held_out = math.ceil(total * fraction)
    fewest = examples.num_labels if by_class else 1
    if min(held_out, total - held_out) < fewest:
        raise DataError(
            f"data.validation_fraction {fraction:g} of {total} examples gives {held_out} to "
            f"validate and {total - held_out} to train on; {fewest} of each are the least "
            "(one a class). Use another fraction, more data, or name a validation file."
        )
    train_rows, validation_rows = train_test_split(
        np.arange(total),
        test_size=held_out,
        random_state=seed,
        stratify=examples.labels if by_class else None,
    )
    return examples.take(np.sort(train_rows)), examples.take(np.sort(validation_rows))


def folds(examples: Labelled, num_folds: int, seed: int) -> Iterator[tuple[Labelled, Labelled]]:
    """`num_folds` pairs (train, validation); each example is validated on exactly once.

    Raises:
        DataError: a class has fewer examples than there are folds.
    """
    classes = examples.labels if examples.kind == "classification" else None
    counts = [len(examples)] if classes is None else np.bincount(classes.astype(np.int64))
    if min(counts) < num_folds or num_folds < 2:
        raise DataError(
            f"{num_folds} folds of {len(examples)} examples cannot be: at least 2 folds, and as "
            f"many examples in every class; the smallest has {min(counts)}."
        )
    kind = KFold if classes is None else StratifiedKFold
    splitter = kind(num_folds, shuffle=True, random_state=seed)
    for train_rows, validation_rows in splitter.split(np.arange(len(examples)), classes):
        yield examples.take(train_rows), examples.take(validation_rows)


def class_weights(examples: Examples) -> NDArray[np.float32]:
    """Weights `(num_labels,)` that make classes count alike: `n / (num_labels * count)`."""
    assert examples.kind == "classification"
    counts = np.bincount(examples.labels.astype(np.int64), minlength=examples.num_labels)
    return (len(examples) / (examples.num_labels * counts.clip(min=1))).astype(np.float32)


# --- reading one file ----------------------------------------------------------------------------


@dataclass(slots=True)
class _Part:
    """One file's columns, before labels have a meaning."""

    path: str | Path
    texts: list[str]
    pairs: list[str] | None
    columns: list[str]  # of the labels
    labels: list[Any]  # a value a row, or a tuple of them where there are several columns


def _read_part(path: str | Path, config: OwnDataConfig) -> _Part:
    text_columns = [config.text] if isinstance(config.text, str) else config.text
    several = not isinstance(config.label, str)
    label_columns = [config.label] if isinstance(config.label, str) else config.label
    if len(text_columns) not in (1, 2) or not label_columns:
        raise ConfigError(
            f"data.text: {config.text}, data.label: {config.label}. Name one or two columns of "
            "text and at least one of labels."
        )
    wanted = list(dict.fromkeys([*text_columns, *label_columns]))
    table = read_table(path, wanted)
    for name in text_columns:
        _check_texts(path, name, table[name])
    return _Part(
        path,
        table[text_columns[0]],
        table[text_columns[1]] if len(text_columns) == 2 else None,
        label_columns,
        list(zip(*(table[c] for c in label_columns), strict=True))
        if several
        else table[label_columns[0]],
    )


def _check_texts(path: str | Path, column: str, values: list[Any]) -> None:
    foreign = [i for i, value in enumerate(values) if not isinstance(value, str | None)]
    if foreign:
        kind = type(values[foreign[0]]).__name__
        raise DataError(
            f'{path}, column "{column}": {_rows(foreign)} hold no text but {kind} '
            f"({values[foreign[0]]!r})."
        )
    empty = [i for i, value in enumerate(values) if value is None or not value.strip()]
    if empty:
        raise DataError(
            f'{path}, column "{column}": the text is empty in {_rows(empty)}. Fill it in, or '
            "leave these rows out."
        )


def _rows(indices: Sequence[int]) -> str:
    """`row 3`, or `rows 1, 2, 3, 4, 5 and 12 more`; rows count from 1."""
    shown = ", ".join(str(index + 1) for index in indices[:5])
    more = f" and {len(indices) - 5} more" if len(indices) > 5 else ""
    return f"row{'s' if len(indices) > 1 else ''} {shown}{more}"


def _warn_of_leaks(train: Examples, validation: Examples) -> None:
    seen = set(zip(train.texts, train.pairs or train.texts, strict=True))
    both = zip(validation.texts, validation.pairs or validation.texts, strict=True)
    leaked = sum(texts in seen for texts in both)
    if leaked:
        logger.warning(
            "%d of %d validation texts are also training texts: scores will be too good.",
            leaked,
            len(validation),
        )


# --- labels --------------------------------------------------------------------------------------


def _kind_of(config: OwnDataConfig, num_labels: int | None, part: _Part) -> Kind:
    if config.task is not None:
        assert config.task != "token_classification", "read by data.tokens"
        if config.task != "multilabel" and not isinstance(config.label, str):
            raise ConfigError(
                f"data.label names {len(config.label)} columns, which is multi-label data, but "
                f"data.task is {config.task}."
            )
        return config.task
    if isinstance(part.labels[0], list | tuple):
        return "multilabel"
    return "regression" if num_labels == 1 else "classification"


def _learn_names(part: _Part, config: OwnDataConfig, kind: Kind) -> tuple[str, ...] | None:
    """The classes there are, sorted (numbers as numbers): the same in every run."""
    if kind == "regression":
        return None
    if not isinstance(config.label, str):
        return tuple(config.label)
    of_rows = _names_of_rows(part) if kind == "multilabel" else [[n] for n in _class_names(part)]
    first_row = {name: row for row, names in reversed(list(enumerate(of_rows))) for name in names}
    counts = Counter(name for names in of_rows for name in names)
    where = f'{part.path}, column "{part.columns[0]}"'
    if len(counts) < 2 and kind == "classification":
        raise DataError(f'{where}: every label is "{next(iter(counts))}". Two classes are needed.')
    if not counts:
        raise DataError(f"{where}: no row has a label.")
    if kind == "classification" and all(map(_is_number, counts)) and not all(map(_is_int, counts)):
        decimal = next(name for name in counts if not _is_int(name))
        raise DataError(
            f"{where}: labels such as {decimal} ({_rows([first_row[decimal]])}) are measurements, "
            "not classes. Set data.task: regression (and no model.num_labels, or 1)."
        )
    single = sorted(name for name, count in counts.items() if count == 1)
    if single:
        raise DataError(
            f'{where}: "{single[0]}" has one example ({_rows([first_row[single[0]]])})'
            + (f", and so have {len(single) - 1} more of {len(counts)}" if single[1:] else "")
            + ". A class needs two or more: add examples, or leave the row out."
        )
    if all(map(_is_int, counts)):
        return tuple(sorted(counts, key=lambda name: (int(name), name)))
    return tuple(sorted(counts))


def _encode(part: _Part, kind: Kind, names: tuple[str, ...] | None) -> Examples:
    """Labels as numbers; names that training did not have are errors."""
    labels: NDArray[np.int64] | NDArray[np.float32]
    if kind == "regression":
        labels = _numbers(part)
    elif names is not None and kind == "classification":
        of_rows = [[name] for name in _class_names(part)]
        _check_known(part, of_rows, names)
        index = {name: i for i, name in enumerate(names)}
        labels = np.array([index[row[0]] for row in of_rows], np.int64)
    elif names is not None and isinstance(part.labels[0], tuple):
        labels = _switches(part)
    else:
        assert names is not None
        of_rows = _names_of_rows(part)
        _check_known(part, of_rows, names)
        labels = np.array([[name in row for name in names] for row in of_rows], np.float32)
    return Examples(part.texts, part.pairs, labels, names, kind)


def _class_names(part: _Part) -> list[str]:
    """One class name a row. The same class reads alike from every format: 1, "1", 1.0 and "1.0"."""
    names = [_name_of(value) for value in part.labels]
    where = f'{part.path}, column "{part.columns[0]}"'
    several = [i for i, value in enumerate(part.labels) if isinstance(value, list | tuple | dict)]
    if several:
        raise DataError(
            f"{where}: {_rows(several)} hold several labels. Set data.task: multilabel."
        )
    empty = [i for i, name in enumerate(names) if not name]
    if empty:
        raise DataError(f"{where}: {_rows(empty)} have no label.")
    return names


def _name_of(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    name = str(value).strip()
    return name.partition(".")[0] if re.fullmatch(r"-?\d+\.0+", name) else name


def _names_of_rows(part: _Part) -> list[list[str]]:
    """Several names a row: a list (JSONL, parquet), or text with `|` between the names."""
    rows = []
    for index, value in enumerate(part.labels):
        if isinstance(value, str | None):
            value = [name for name in (value or "").split("|") if name.strip()]
        if not isinstance(value, list) or not all(isinstance(n, str | int) for n in value):
            raise DataError(
                f'{part.path}, column "{part.columns[0]}", {_rows([index])}: {value!r} is no list '
                'of labels. Write ["a", "b"], or a|b in text, or give each label a column.'
            )
        rows.append(list(dict.fromkeys(_name_of(name) for name in value)))
    return rows


def _switches(part: _Part) -> NDArray[np.float32]:
    """Multi-label data with one column a label: 0 or 1 (or false, true) in each."""
    labels = np.zeros((len(part.labels), len(part.columns)), np.float32)
    for i, row in enumerate(part.labels):
        for j, value in enumerate(row):
            switch = _YES_NO.get(_name_of(value).lower())
            if switch is None:
                raise DataError(
                    f'{part.path}, column "{part.columns[j]}", {_rows([i])}: {value!r} is neither '
                    "0 nor 1."
                )
            labels[i, j] = switch
    return labels


def _numbers(part: _Part) -> NDArray[np.float32]:
    bad = [i for i, value in enumerate(part.labels) if not _is_number(value)]
    if bad:
        raise DataError(
            f'{part.path}, column "{part.columns[0]}": {_rows(bad)} hold no finite number (such as '
            f"{part.labels[bad[0]]!r}), which regression needs."
        )
    return np.array([float(value) for value in part.labels], np.float32)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _is_int(name: str) -> bool:
    return re.fullmatch(r"-?\d+", name, re.ASCII) is not None


def _check_known(part: _Part, of_rows: list[list[str]], names: tuple[str, ...]) -> None:
    unseen = [i for i, row in enumerate(of_rows) if not set(row) <= set(names)]
    if unseen:
        name = next(name for name in of_rows[unseen[0]] if name not in names)
        shown = ", ".join(f'"{known}"' for known in names[:20])
        raise DataError(
            f'{part.path}, column "{part.columns[0]}": "{name}" ({_rows(unseen)}) is not among the '
            f"labels of the training data.{did_you_mean(name, names)} Those are: {shown}."
        )
