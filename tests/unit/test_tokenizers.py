"""Tokenizers by name; truncation that never sees the rest of a text gives identical ids."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mosaicbert.data import tokenizers
from mosaicbert.data.sample import corpus_files
from mosaicbert.data.tokenizers import (
    encode_chunks,
    encode_truncated,
    load_tokenizer,
    special_affixes,
)
from mosaicbert.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "c4-like" / "en"
BERT = load_tokenizer("bert-base-uncased")


def whole_then_cut(texts: list[str], max_seq_len: int) -> list[list[int]]:
    encoded = BERT(texts, truncation=True, max_length=max_seq_len)
    return encoded["input_ids"]  # type: ignore[no-any-return]


def sample_texts(path: Path, most: int) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line, _ in zip(lines, range(most), strict=False)]


def byte_level() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    "name", ["bert-base-uncased", "google-bert/bert-base-uncased", "prajjwal1/bert-tiny"]
)
def test_bundled_names_need_no_hub(name: str) -> None:
    assert load_tokenizer(name).vocab_size == 30522


def test_unknown_name_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_reach(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(tokenizers.HfApi, "model_info", out_of_reach)
    with pytest.raises(DataError, match=r"bert-base-uncasedd.*no route.*bundled name"):
        load_tokenizer("bert-base-uncasedd")


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="save_pretrained"):
        load_tokenizer(str(tmp_path))


def test_special_affixes() -> None:
    assert special_affixes(BERT) == ([101], [102])
    assert special_affixes(byte_level()) == ([], [])


@pytest.mark.parametrize("max_seq_len", [8, 128, 512])
def test_identical_ids_over_the_sample(max_seq_len: int) -> None:
    texts = sample_texts(corpus_files("validation")[0], 200)
    assert texts
    found = [ids.tolist() for ids in encode_truncated(BERT, texts, max_seq_len)]
    assert found == whole_then_cut(texts, max_seq_len)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the larger corpus is not here")
def test_identical_ids_over_a_corpus() -> None:
    texts = sample_texts(SHARED / "c4-validation.00000-of-00001.json.gz", 1000)
    found = [ids.tolist() for ids in encode_truncated(BERT, texts, 128)]
    assert found == whole_then_cut(texts, 128)


odd_texts = st.lists(
    st.text(
        st.one_of(
            st.sampled_from(" \t\n\r\u00a0\u2003\u0085\x1c\x00\u0301\u4e2d.,'-[]#"),
            st.sampled_from("abcdeéßΣσς"),
            st.characters(codec="utf-8"),
        ),
        max_size=80,
    )
    | st.lists(st.sampled_from(["[SEP]", "[MASK]", "word", "İstanbul", "ΌΣΟΣ", " ", "  "])).map(
        " ".join
    ),
    min_size=1,
    max_size=5,
)


@given(texts=odd_texts, max_seq_len=st.integers(3, 12))
def test_identical_ids_on_odd_texts(texts: list[str], max_seq_len: int) -> None:
    found = [ids.tolist() for ids in encode_truncated(BERT, texts, max_seq_len)]
    assert found == whole_then_cut(texts, max_seq_len)


@given(texts=odd_texts, max_seq_len=st.integers(1, 8))
def test_identical_ids_with_a_byte_level_tokenizer(texts: list[str], max_seq_len: int) -> None:
    tokenizer = byte_level()
    found = [ids.tolist() for ids in encode_truncated(tokenizer, texts, max_seq_len)]
    assert found == [tokenizer.backend_tokenizer.encode(text).ids[:max_seq_len] for text in texts]


def test_the_rest_of_a_long_text_is_never_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = tokenizers._encode

    def watch(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
        seen.extend(len(text) for text in texts)
        return encode(tokenizer, texts)

    monkeypatch.setattr(tokenizers, "_encode", watch)
    encode_truncated(BERT, ["a common sentence of plain words " * 10_000], 128)
    assert sum(seen) < 1000
    encode_truncated(BERT, ["extraordinarily " * 10_000], 128)  # 16 characters a token
    assert sum(seen) < 7000


def test_tokenizer_that_joins_words_sees_whole_texts() -> None:
    backend = Tokenizer(models.BPE({" ": 0, "a": 1, "a a": 2, " a": 3}, [(" ", "a"), ("a", " a")]))
    joins = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "a a a a a a a a a a a a a a"
    found = encode_truncated(joins, [text], 1)
    assert found[0].tolist() == backend.encode(text).ids[:1]


@given(
    words=st.lists(st.sampled_from(["alpha", "of", "extraordinarily", "x"])),
    limit=st.integers(3, 9),
)
def test_chunks_hold_all_of_a_text(words: list[str], limit: int) -> None:
    text = " ".join(words)
    (chunks,) = encode_chunks(BERT, [text], limit)
    assert all(len(chunk) == limit for chunk in chunks[:-1])
    assert all(chunk[0] == 101 and chunk[-1] == 102 for chunk in chunks)
    joined = np.concatenate([chunk[1:-1] for chunk in chunks]).tolist()
    assert joined == BERT(text, add_special_tokens=False)["input_ids"]
    assert len(chunks) == 1 or len(chunks[-1]) > 2


def test_no_room_for_tokens() -> None:
    with pytest.raises(DataError, match="no room"):
        encode_truncated(BERT, ["a"], 2)
