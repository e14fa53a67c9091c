"""Labelled texts of the user's own: one text or a pair, with a class, a number or several labels.

Everything that can be wrong with such data is said before any training, with file and rows. Rows
count from 1, without the header.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import KFold, StratifiedKFold, train_test_split

from mosaicbert.config.jobs import OwnDataConfig
from mosaicbert.data.labels import (
    Encoded,
    Kind,
    LabelCells,
    encode_labels,
    kind_of,
    learn_names,
    rows_text,
)
from mosaicbert.data.sample import classification_file
from mosaicbert.data.tables import half_character, read_table
from mosaicbert.data.tokens import TokenExamples
from mosaicbert.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Labelled = TypeVar("Labelled", "Examples", TokenExamples)


@dataclass(frozen=True, slots=True)
class Examples:
    """Texts with their labels, in the order of their file.

    `labels`: `(n,)` int64 for classification, `(n,)` float32 for regression, `(n, num_labels)`
    float32 of 0 and 1 for multi-label. `label_names[i]` is the name of class i; None for
    regression.
    """

    texts: list[str]
    pairs: list[str] | None  # the second texts
    labels: Encoded
    label_names: tuple[str, ...] | None
    kind: Kind

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str] | Sequence[tuple[str, str]],
        labels: Sequence[Any],
        kind: Kind | None = None,
        names: Sequence[str] | None = None,
    ) -> "Examples":
        """From texts (or pairs of texts) and their labels, wherever they come from.

        Args:
            labels: a name or number each; floats make it a regression, lists multi-label data.
            kind: where the labels do not tell.
            names: the classes, in order. Default: those that the labels have, sorted.

        Raises:
            DataError: a text is empty, or the labels are of no use.
        """
        pairs = [text for text in texts if not isinstance(text, str)]
        if len(texts) != len(labels) or not texts or len(pairs) not in (0, len(texts)):
            raise DataError(
                f"{len(texts)} texts ({len(pairs)} of them pairs) and {len(labels)} labels: give "
                "as many of both, one at least, and all texts single or all of them pairs."
            )
        columns = list(zip(*pairs, strict=True)) if pairs else [texts]
        for column in columns:
            _check_texts("The data", "text", list(column))
        values = [v.item() if isinstance(v, np.generic) else v for v in labels]
        if kind is None:
            is_list, is_float = isinstance(values[0], list), isinstance(values[0], float)
            kind = "multilabel" if is_list else "regression" if is_float else "classification"
        cells = LabelCells("The data", ["label"], values)
        known = learn_names(cells, kind) if names is None else tuple(names)
        first, *second = map(list, columns)
        return cls(
            first, second[0] if second else None, encode_labels(cells, kind, known), known, kind
        )

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
        part = _read_part(validation_path, config)
        validation = part.encode(train.kind, train.label_names)
    _warn_of_leaks(train, validation)
    return train, validation


def read_training(config: OwnDataConfig, *, num_labels: int | None = None) -> Examples:
    """The whole training file. Raises what `read_examples` does."""
    path = classification_file("train") if config.train == "sample" else config.train
    part = _read_part(path, config)
    kind = kind_of(config, num_labels, part.labels)
    names = learn_names(part.labels, kind)
    if num_labels is not None and num_labels != (1 if names is None else len(names)):
        raise ConfigError(
            f"model.num_labels is {num_labels}, but {path} has {len(names or ' ')} "
            f"({', '.join(names or (kind,))}). Leave the key out: the number is learned."
        )
    return part.encode(kind, names)


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


@dataclass(frozen=True, slots=True)
class _Part:
    """One file's columns, before labels have a meaning."""

    texts: list[str]
    pairs: list[str] | None
    labels: LabelCells

    def encode(self, kind: Kind, names: tuple[str, ...] | None) -> Examples:
        return Examples(
            self.texts, self.pairs, encode_labels(self.labels, kind, names), names, kind
        )


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
    labels = table[label_columns[0]]
    if several:
        labels = list(zip(*(table[column] for column in label_columns), strict=True))
    return _Part(
        table[text_columns[0]],
        table[text_columns[1]] if len(text_columns) == 2 else None,
        LabelCells(path, label_columns, labels),
    )


def _check_texts(path: str | Path, column: str, values: list[Any]) -> None:
    foreign = [i for i, value in enumerate(values) if not isinstance(value, str | None)]
    if foreign:
        kind = type(values[foreign[0]]).__name__
        raise DataError(
            f'{path}, column "{column}": {rows_text(foreign)} hold no text but {kind} '
            f"({values[foreign[0]]!r})."
        )
    empty = [i for i, value in enumerate(values) if value is None or not value.strip()]
    if empty:
        raise DataError(
            f'{path}, column "{column}": the text is empty in {rows_text(empty)}. Fill it in, or '
            "leave these rows out."
        )

    halves = [i for i, value in enumerate(values) if half_character(value)]
    if halves:
        raise DataError(
            f'{path}, column "{column}": half a character ({half_character(values[halves[0]])}) in '
            f"{rows_text(halves)}, as of a text that was cut. Mend it, or leave these rows out."
        )


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
