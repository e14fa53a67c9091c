"""Own data: labels learned from the files, and every fault named before training."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicbert.config.jobs import OwnDataConfig
from mosaicbert.data.examples import (
    Examples,
    class_weights,
    folds,
    read_examples,
    sample_examples,
    split_examples,
)
from mosaicbert.errors import ConfigError, DataError

ANIMALS = [("a cat", "cat"), ("a dog", "dog"), ("the cat", "cat"), ("the dog", "dog")]


def write_csv(path: Path, rows: list[tuple[Any, ...]], header: str = "text,label") -> str:
    path.write_text(header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return str(path)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(train: str, num_labels: int | None = None, **keys: Any) -> tuple[Examples, Examples]:
    keys.setdefault("validation", train)
    return read_examples(OwnDataConfig(train=train, **keys), num_labels=num_labels)


def fails(error: type[Exception], *words: str, **keys: Any) -> None:
    with pytest.raises(error) as caught:
        read(**keys)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_names_are_learned_sorted(tmp_path: Path) -> None:
    train, validation = read(write_csv(tmp_path / "a.csv", ANIMALS[::-1]))
    assert train.label_names == ("cat", "dog")
    assert train.labels.tolist() == [1, 0, 1, 0]
    assert train.labels.dtype == np.int64
    assert train.texts == ["the dog", "the cat", "a dog", "a cat"]
    assert (train.kind, train.num_labels, train.pairs) == ("classification", 2, None)
    assert validation.label_names == train.label_names


def test_numbers_sort_as_numbers_and_read_alike_from_every_format(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv", [("x", 10), ("y", 9), ("z", "10.0"), ("w", 9)])
    validation = write_jsonl(
        tmp_path / "b.jsonl", [{"text": "v", "label": 9.0}, {"text": "u", "label": 10}]
    )
    first, second = read(train, validation=validation)
    assert first.label_names == ("9", "10")
    assert first.labels.tolist() == [1, 0, 1, 0]
    assert second.labels.tolist() == [0, 1]


def test_two_text_columns(tmp_path: Path) -> None:
    rows = [("a", "b", 0), ("c", "d", 1), ("e", "f", 0), ("g", "h", 1)]
    train, _ = read(write_csv(tmp_path / "a.csv", rows, "t,body,y"), text=["t", "body"], label="y")
    assert (train.texts, train.pairs) == (["a", "c", "e", "g"], ["b", "d", "f", "h"])
    fails(
        ConfigError, "one or two", train=str(tmp_path / "a.csv"), text=["t", "body", "y"], label="y"
    )


def test_regression(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [("x", 1), ("y", 2.5), ("z", "3e0")])
    for keys in ({"num_labels": 1}, {"task": "regression"}):
        train, _ = read(path, **keys)
        assert (train.kind, train.num_labels, train.label_names) == ("regression", 1, None)
        assert train.labels.tolist() == [1.0, 2.5, 3.0]
        assert train.labels.dtype == np.float32
    fails(DataError, "2.5", "row 2", "regression", train=path)
    named = 'if they are classes, give them names, such as "class 2.5"'
    fails(DataError, named, train=path, task="classification")


@pytest.mark.parametrize("value", ["bad", "", "nan", "inf", '"2,5"'])
def test_regression_label_that_is_text(tmp_path: Path, value: str) -> None:
    path = write_csv(tmp_path / "a.csv", [("x", 1), ("y", value), ("z", value)])
    fails(DataError, "rows 2, 3", '"label"', "a.csv", train=path, num_labels=1)


def test_multilabel_from_columns_lists_and_bars(tmp_path: Path) -> None:
    wanted = [[1, 0], [0, 1], [1, 1], [0, 0]]
    columns = write_csv(
        tmp_path / "a.csv", [("r", 1, 0), ("s", 0, 1), ("t", "True", 1), ("u", 0, 0)], "text,a,b"
    )
    lists = [{"text": "x", "label": names} for names in (["a"], ["b"], ["b", "a"], [])]
    bars = write_csv(tmp_path / "b.csv", [("r", "a"), ("s", "b"), ("t", "a|b"), ("u", "")])
    for train, _ in (
        read(columns, label=["a", "b"]),
        read(write_jsonl(tmp_path / "a.jsonl", lists)),
        read(bars, task="multilabel"),
    ):
        assert (train.kind, train.label_names, train.num_labels) == ("multilabel", ("a", "b"), 2)
        assert train.labels.tolist() == wanted
        assert train.labels.dtype == np.float32
    path = write_csv(tmp_path / "c.csv", [("r", 1, 0), ("s", 0, 2)], "text,a,b")
    fails(DataError, '"b"', "row 2", "'2'", train=path, label=["a", "b"])
    fails(ConfigError, "multi-label", train=path, label=["a", "b"], task="regression")


def test_unseen_label_in_validation(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv", ANIMALS)
    validation = write_csv(tmp_path / "b.csv", [("q", "cat"), ("r", "dogs"), ("s", "dogs")])
    words = ("b.csv", '"dogs"', "rows 2, 3", 'Did you mean "dog"?', '"cat", "dog"')
    fails(DataError, *words, train=train, validation=validation)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*ANIMALS, (" ", "cat")], ["empty", "row 5", '"text"']),
        ([*ANIMALS, ("x", "")], ["row 5", "no label"]),
        ([*ANIMALS, ("x", "cow")], ['"cow"', "one example", "row 5"]),
        ([("x", "cat"), ("y", "cat")], ['every label is "cat"']),
        ([("x", f"id{i}") for i in range(9)], ["one example", "8 more of 9"]),
    ],
)
def test_faulty_rows(tmp_path: Path, rows: list[tuple[str, str]], words: list[str]) -> None:
    fails(DataError, "a.csv", *words, train=write_csv(tmp_path / "a.csv", rows))


def test_faulty_values_of_typed_files(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": 3, "label": 0}, {"text": "x", "label": 1}])
    fails(DataError, "row 1", "int", train=path)
    path = write_jsonl(tmp_path / "b.jsonl", [{"text": None, "label": 0}])
    fails(DataError, "row 1", "empty", train=path)
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": "x", "label": ["a"]}])
    fails(DataError, "multilabel", train=path, task="classification")


def test_many_rows_are_counted(tmp_path: Path) -> None:
    rows = [("x", "a"), ("y", "a"), *[("", "a")] * 12]
    words = ("rows 3, 4, 5, 6, 7 and 7 more",)
    fails(DataError, *words, train=write_csv(tmp_path / "a.csv", rows))


def test_missing_column(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ANIMALS)
    fails(DataError, '"category"', '"text", "label"', train=path, label="category")


def test_num_labels_of_the_model_must_agree(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ANIMALS)
    assert read(path, num_labels=2)[0].num_labels == 2
    fails(ConfigError, "model.num_labels is 3", "cat, dog", train=path, num_labels=3)


def test_the_bundled_sample() -> None:
    train, validation = read_examples(OwnDataConfig(train="sample"))
    assert train.label_names == ("abstract", "address", "agency", "book")
    assert len(train) > len(validation) > 50
    assert sample_examples("train").texts == train.texts
    assert sample_examples("validation").texts == validation.texts
    with pytest.raises(ConfigError, match='no split "test"'):
        sample_examples("test")


def test_a_share_is_held_out_where_there_is_no_validation(tmp_path: Path) -> None:
    rows = [(f"text {i}", "cat" if i % 4 else "dog") for i in range(200)]
    config = OwnDataConfig(train=write_csv(tmp_path / "a.csv", rows), validation_fraction=0.1)
    train, validation = read_examples(config, seed=1)
    assert (len(train), len(validation)) == (180, 20)
    assert np.bincount(validation.labels.astype(int)).tolist() == [15, 5]
    again = read_examples(config, seed=1)
    assert again[1].texts == validation.texts
    assert read_examples(config, seed=2)[1].texts != validation.texts
    for fraction in (0.0, 1.0):
        config.validation_fraction = fraction
        with pytest.raises(ConfigError, match="between 0 and 1"):
            read_examples(config)
    config.validation_fraction = 0.001
    with pytest.raises(DataError, match="gives 1 to validate"):
        read_examples(config)


def test_validation_texts_seen_in_training_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        read(write_csv(tmp_path / "a.csv", ANIMALS))
    assert "4 of 4 validation texts" in caplog.text


def examples(labels: list[int], kind: Any = "classification") -> Examples:
    dtype = np.int64 if kind == "classification" else np.float32
    names = tuple("abc") if kind == "classification" else None
    texts = [f"text {i}" for i in range(len(labels))]
    return Examples(texts, None, np.array(labels, dtype), names, kind)


@given(
    st.lists(st.integers(0, 2), min_size=20, max_size=60).filter(
        lambda labels: min(np.bincount(labels, minlength=3)) >= 4
    ),
    st.floats(0.2, 0.8),
    st.integers(0, 9),
    st.sampled_from(["classification", "regression"]),
)
def test_a_split_loses_and_doubles_nothing(
    labels: list[int], fraction: float, seed: int, kind: str
) -> None:
    whole = examples(labels, kind)
    train, validation = split_examples(whole, fraction, seed)
    assert sorted(train.texts + validation.texts) == sorted(whole.texts)
    for part in (train, validation):
        rows = [int(text.split()[1]) for text in part.texts]
        assert rows == sorted(rows)
        assert part.labels.tolist() == whole.labels[rows].tolist()


def test_folds_validate_each_example_once() -> None:
    whole = examples([0, 1, 2] * 10)
    seen: list[str] = []
    for train, validation in folds(whole, 5, seed=3):
        assert len(train) == 24
        assert np.bincount(validation.labels.astype(int)).tolist() == [2, 2, 2]
        seen += validation.texts
    assert sorted(seen) == sorted(whole.texts)
    with pytest.raises(DataError, match="the smallest has 10"):
        list(folds(whole, 11, seed=3))


def test_class_weights_balance() -> None:
    weights = class_weights(examples([0, 0, 0, 1, 1, 2]))
    assert np.allclose(weights * [3, 2, 1], 2.0)


def test_texts_from_anywhere() -> None:
    made = Examples.from_texts(["a", "b", "c", "d"], np.array([3, 1, 3, 1]))
    assert (made.labels.tolist(), made.label_names) == ([1, 0, 1, 0], ("1", "3"))
    made = Examples.from_texts([("a", "b"), ("c", "d")], ["yes", "yes"], names=["no", "yes"])
    assert (made.texts, made.pairs) == (["a", "c"], ["b", "d"])
    assert (made.labels.tolist(), made.label_names) == ([1, 1], ("no", "yes"))
    made = Examples.from_texts(["a", "b"], [0.5, 2.0])
    assert (made.kind, made.labels.tolist(), made.label_names) == ("regression", [0.5, 2.0], None)
    made = Examples.from_texts(["a", "b"], [["x"], []], names=["x", "y"])
    assert (made.kind, made.labels.tolist()) == ("multilabel", [[1, 0], [0, 0]])


@pytest.mark.parametrize(
    ("texts", "labels", "said"),
    [
        (["a", "b"], ["x"], "2 texts (0 of them pairs) and 1 labels"),
        ([], [], "one at least"),
        (["a", ("b", "c")], ["x", "y"], "1 of them pairs"),
        (["a", " "], ["x", "y"], "the text is empty in row 2"),
        (["a", "\ud83d"], ["x", "y"], "half a character ('\\ud83d') in row 2"),
        (["a", "b"], ["x", "z"], '"z" (row 2) is not among'),
    ],
)
def test_texts_from_anywhere_are_checked(texts: Any, labels: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        Examples.from_texts(texts, labels, names=["x", "y"])
    assert said in str(caught.value)
