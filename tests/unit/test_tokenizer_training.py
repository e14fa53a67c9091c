"""Training a WordPiece vocabulary: what comes out, and what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicbert.cli import main
from mosaicbert.data.tokenizer_training import (
    SPECIAL_TOKENS,
    Settings,
    save_tokenizer,
    tokens_per_word,
    train_tokenizer,
)
from mosaicbert.data.tokenizers import encode_truncated, load_tokenizer, special_affixes
from mosaicbert.errors import ConfigError, DataError

TEXTS = ["Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich."] * 5 + [
    "Der Deich ist quer über Sylt gebaut; Viktor jagt."
] * 5


def train(**values):
    return train_tokenizer(TEXTS, Settings(vocab_size=120, **values))


def pieces(tokenizer, text):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t") / "new" / "tokenizer"
    save_tokenizer(train(extra_tokens=["[DOC]"]), folder)
    return folder


def test_special_tokens_come_first_in_berts_order(folder):
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert tuple(lines[:5]) == SPECIAL_TOKENS
    assert lines[5] == "[DOC]"
    tokenizer = load_tokenizer(str(folder))
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))] == lines
    assert tokenizer.pad_token_id == 0
    assert tokenizer.mask_token == "[MASK]"


def test_the_folder_does_what_a_tokenizer_name_must(folder):
    tokenizer = load_tokenizer(str(folder))
    assert special_affixes(tokenizer) == ([2], [3])
    both = tokenizer("viktor jagt", "der deich")
    assert set(both["token_type_ids"]) == {0, 1}
    (ids,) = encode_truncated(tokenizer, TEXTS[:1], 8)
    whole = tokenizer(TEXTS[0])["input_ids"]
    assert ids.tolist() == [*whole[:7], 3]
    assert pieces(tokenizer, "a [DOC] b").count("[DOC]") == 1


def test_same_texts_make_the_same_tokenizer(folder, tmp_path):
    save_tokenizer(train(extra_tokens=["[DOC]"]), tmp_path / "again")
    for name in ("tokenizer.json", "vocab.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "zwolf"),
        ({"lowercase": False}, "Zwölf"),
        ({"lowercase": False, "strip_accents": True}, "Zwolf"),
        ({"strip_accents": False}, "zwölf"),
    ],
)
def test_normalisation(values, expected):
    tokenizer = train(**values)
    joined = "".join(piece.removeprefix("##") for piece in pieces(tokenizer, "Zwölf"))
    assert joined == expected


def test_unicode_forms_come_first():
    text = "\N{LATIN SMALL LIGATURE FI}nden"
    tokenizer = train_tokenizer([text] * 3, Settings(vocab_size=60, unicode_form="nfkc"))
    assert pieces(tokenizer, text) == ["finden"]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text("abcde ", min_size=1), min_size=1).filter(lambda t: "".join(t).strip()))
def test_what_was_seen_is_never_unknown(texts):
    tokenizer = train_tokenizer(texts, Settings(vocab_size=40, min_frequency=1))
    assert tokens_per_word(tokenizer, texts)[1] == 0


def test_mistakes_are_told():
    with pytest.raises(ConfigError, match="no room beside the 5 special"):
        train_tokenizer(TEXTS, Settings(vocab_size=5))
    with pytest.raises(ConfigError, match=r"\[CLS\] is there already"):
        train_tokenizer(TEXTS, Settings(extra_tokens=["[CLS]"]))
    with pytest.raises(DataError, match="Raise --vocab_size 20"):
        train_tokenizer(TEXTS, Settings(vocab_size=20))
    with pytest.raises(DataError, match="not a word"):
        train_tokenizer(["  ", ""], Settings(vocab_size=20))
    with pytest.raises(ConfigError, match="choose one of nfc"):
        train_tokenizer(TEXTS, Settings(unicode_form="nfx"))


@pytest.mark.parametrize(
    "words", ["--max_documents -1", "--min_frequency -1", "--alphabet_size -1", "--max_documents 0"]
)
def test_numbers_that_cannot_be(tmp_path, capsys, words):
    command = ["tokenizer", "train", "--input", "sample", "--out", str(tmp_path / "t")]
    assert main([*command, *words.split()]) == 2
    assert f"mosaicbert: {words} " in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_the_command(tmp_path, capsys):
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS), "utf-8")
    words = ["tokenizer", "train", "--input", str(source), "--out", str(tmp_path / "tok")]
    assert main([*words, "--vocab_size", "120"]) == 2
    assert "There are: body. Choose one with --text_column." in capsys.readouterr().err
    assert not (tmp_path / "tok").exists()
    words += ["--text_column", "body"]
    assert main([*words, "--vocab_size", "5000"]) == 0
    output = capsys.readouterr()
    assert "1.00 a word and 0.000% unknown in the first 10 documents" in output.out
    assert "no more than" in output.err
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl", "tok"]
