"""Words with tags: read from both forms, labelled on first tokens, never cut short."""

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from mosaicbert.batch import IGNORE_INDEX
from mosaicbert.config.jobs import OwnDataConfig
from mosaicbert.data.classification import build_classification_loader
from mosaicbert.data.tokenizers import load_tokenizer
from mosaicbert.data.tokens import TokenExamples, read_token_examples, tokenize_words
from mosaicbert.errors import ConfigError, DataError

CONLL = """-DOCSTART- -X- O

EU NNP B-ORG
rejects VBZ O
German JJ B-MISC

Peter NNP B-PER
Blackburn NNP I-PER
"""
NAMES = ("O", "B-MISC", "B-ORG", "B-PER", "I-PER")
WORDS = [["EU", "rejects", "German"], ["Peter", "Blackburn"]]
TAGS = [["B-ORG", "O", "B-MISC"], ["B-PER", "I-PER"]]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer("bert-base-uncased")


def read(path: Path, **keys: Any) -> tuple[TokenExamples, TokenExamples]:
    keys.setdefault("validation", str(path))
    return read_token_examples(
        OwnDataConfig(train=str(path), task="token_classification", **keys),
    )


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_both_forms_are_the_same(tmp_path: Path) -> None:
    conll = tmp_path / "a.conll"
    conll.write_text(CONLL)
    rows = [{"tokens": w, "tags": t} for w, t in zip(WORDS, TAGS, strict=True)]
    own = [{"w": w, "t": t} for w, t in zip(WORDS, TAGS, strict=True)]
    for train, validation in (
        read(conll),
        read(write_jsonl(tmp_path / "a.jsonl", rows)),
        read(write_jsonl(tmp_path / "b.jsonl", own), text="w", label="t"),
    ):
        assert train.words == validation.words == WORDS
        assert train.label_names == validation.label_names == NAMES
        assert [tags.tolist() for tags in train.tags] == [[2, 0, 1], [3, 4]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.conll", "EU B-ORG\nalone\n", ["line 2", "1 columns where 2"]),
        ("a.conll", "alone\n", ["line 1", "two or more"]),
        ("a.txt", "EU X B-ORG\nx O\n", ["line 2", "2 columns where 3"]),
        ("a.conll", "\n\n", ["no sentences"]),
        ("a.conll", "EU O\nx O\n", ['every tag is "O"']),
        ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', ["row 1", "2 words and 1 tags"]),
        ("a.jsonl", '{"tokens": [], "tags": []}', ["row 1", "0 words"]),
        ("a.jsonl", '{"tokens": ["a", ""], "tags": ["O", "O"]}', ["row 1", "word 2"]),
        ("a.jsonl", '{"tokens": "a b", "tags": ["O"]}', ["row 1", "no list"]),
        ("a.jsonl", '{"token": ["a"], "tags": ["O"]}', ['Did you mean "token"?']),
        ("a.jsonl", '{"tokens": ["\\ud83d"], "tags": ["O"]}', ["row 1", "half a character"]),
    ],
)
def test_faults_are_named(tmp_path: Path, name: str, content: str, words: list[str]) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read(path)
    for word in words:
        assert word in str(caught.value)


def test_unseen_tags_and_other_numbers_of_labels(tmp_path: Path) -> None:
    train, validation = tmp_path / "a.conll", tmp_path / "b.conll"
    train.write_text(CONLL)
    validation.write_text("a O\n\nb B-ORG\nc B-LOC\n")
    with pytest.raises(DataError, match=r'b.conll, line 3: the tag "B-LOC".*O, B-MISC'):
        read(train, validation=str(validation))
    config = OwnDataConfig(train=str(train), validation=str(train))
    with pytest.raises(ConfigError, match="has 5 tags"):
        read_token_examples(config, num_labels=3)


def test_a_share_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("".join(f"w{i} {'O' if i % 2 else 'B-X'}\n\n" for i in range(20)))
    train, validation = read(path, validation=None, validation_fraction=0.25)
    assert (len(train), len(validation)) == (15, 5)
    assert sorted(w for part in (train, validation) for (w,) in part.words) == sorted(
        f"w{i}" for i in range(20)
    )
    with pytest.raises(DataError, match="leaves 0"):
        read(path, validation=None, validation_fraction=0.01)


def examples(words: list[list[str]]) -> TokenExamples:
    """Word i of a sentence has tag i."""
    tags = [np.arange(len(sentence)) for sentence in words]
    return TokenExamples(words, tags, tuple(f"T{i}" for i in range(max(map(len, words)))))


@pytest.mark.parametrize("max_seq_len", [4, 5, 9, 64])
def test_first_tokens_carry_each_tag_once_however_long_the_sentence(max_seq_len: int) -> None:
    sentence = ["unbelievable", "Blackburn", "a", "transformational", "tokenizations"] * 3
    ids, labels = tokenize_words(examples([sentence, ["ok"]]), tokenizer(), max_seq_len)
    assert max(map(len, ids)) <= max_seq_len
    assert [len(x) for x in ids] == [len(x) for x in labels]
    found = [int(tag) for sample in labels for tag in sample if tag != IGNORE_INDEX]
    assert found == [*range(len(sentence)), 0]
    assert all(sample[0] == sample[-1] == IGNORE_INDEX for sample in labels)  # [CLS], [SEP]
    for sample, own in zip(ids, labels, strict=True):
        starts = [tokenizer().convert_ids_to_tokens(int(i)) for i in sample[own != IGNORE_INDEX]]
        assert not any(token.startswith("##") for token in starts)


def test_words_without_tokens_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _, labels = tokenize_words(examples([["a", "\u200b", "b"]]), tokenizer(), 16)
    assert labels[0].tolist() == [IGNORE_INDEX, 0, 2, IGNORE_INDEX]
    assert "1 of 3 words" in caplog.text


def test_batches_have_a_label_a_position() -> None:
    loader = build_classification_loader(
        examples([["Peter", "Blackburn"], ["hello"]]),
        tokenizer(),
        max_seq_len=16,
        batch_size=2,
        microbatch_samples=2,
        packed=True,
        grid=False,
        shuffle=False,
        drop_last=False,
        seed=0,
    )
    (step,) = loader.steps(0)
    (batch,) = step.microbatches
    assert batch.labels.shape == batch.input_ids.shape
    assert batch.num_targets == 3
    assert batch.labels[batch.labels != IGNORE_INDEX].tolist() == [0, 1, 0]
