"""Predictions: each row's is that of the model alone on it, in order, from every format."""

import json
import logging
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mosaicbert.config.sections import ModelConfig
from mosaicbert.data.tokenizers import load_tokenizer
from mosaicbert.errors import ConfigError, DataError
from mosaicbert.models.build import build_model
from mosaicbert.predict import batches, files
from mosaicbert.predict.predictor import load_predictor

TEXTS = [
    "One.",
    "A somewhat longer text, with several words in it.",
    "Two words",
    "The longest of them all: " + "again and " * 30,
    "the [MASK] sat on the [MASK].",
    "x",
    "A dog is [MASK].",
]
PROBLEMS = {
    "classes": ("classification", 3, "single_label_classification"),
    "labels": ("classification", 3, "multi_label_classification"),
    "number": ("classification", 1, "regression"),
    "tags": ("token-classification", 3, None),
    "mlm": ("mlm", None, None),
}
ARCHITECTURES = ("mosaic_bert", "hf_bert")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes checkpoints, as a run writes them, and remembers them."""
    home = tmp_path_factory.mktemp("models")

    def make(architecture, problem):
        path = home / f"{architecture}-{problem}"
        if not path.exists():
            torch.manual_seed(1)
            tokenizer = load_tokenizer("bert-base-uncased")
            tokenizer.model_max_length = 48
            task, num_labels, problem_type = PROBLEMS[problem]
            model = build_model(
                ModelConfig(name=architecture, pretrained_model_name="prajjwal1/bert-tiny"),
                task,
                num_labels=num_labels,
                problem_type=problem_type,
                max_seq_len=48,
                vocab_size=len(tokenizer),
            )
            with torch.no_grad():  # far from the even odds of a new head
                for parameter in model.parameters():
                    parameter.mul_(3)
            if num_labels == 3:
                model.config.id2label = {0: "red", 1: "green", 2: "blue"}
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        return path

    return make


def alone(predictor, *text):
    """The model's own forward on one text."""
    inputs = predictor.tokenizer(
        *text, return_tensors="pt", truncation=True, max_length=predictor.max_seq_len
    )
    with torch.no_grad():
        return predictor.model(**inputs), inputs


def write_jsonl(path, **columns):
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def predict(model, tmp_path, monkeypatch=None, suffix=".jsonl", **keys):
    if monkeypatch:
        monkeypatch.setattr(files, "ROWS_AT_ONCE", 3)
        monkeypatch.setitem(batches.TOKENS_AT_ONCE, "cpu", 100)
    out = tmp_path / f"out{suffix}"
    assert files.predict_file(model, tmp_path / "in.jsonl", out, **keys) == len(TEXTS)
    return read_jsonl(out) if suffix == ".jsonl" else out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pairs", [False, True])
def test_classes(folder, tmp_path, monkeypatch, architecture, pairs):
    write_jsonl(tmp_path / "in.jsonl", text=TEXTS, other=TEXTS[::-1], id=range(len(TEXTS)))
    model = folder(architecture, "classes")
    text = ["text", "other"] if pairs else ["text"]
    rows = predict(model, tmp_path, monkeypatch, text=text, keep=["id"])
    predictor = load_predictor(model)
    assert predictor.max_seq_len == 48
    for i, row in enumerate(rows):
        output, _ = alone(predictor, *(TEXTS[i], TEXTS[::-1][i]) if pairs else (TEXTS[i],))
        p = output.logits[0].softmax(-1)
        names = ["red", "green", "blue"]
        assert list(row) == ["id", "label", "probability", *(f"probability_{n}" for n in names)]
        assert (row["id"], row["label"]) == (i, names[int(p.argmax())])
        assert row["probability"] == pytest.approx(float(p.max()), abs=2e-5)
        assert [row[f"probability_{n}"] for n in names] == pytest.approx(p.tolist(), abs=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_several_labels_and_numbers(folder, tmp_path, monkeypatch, architecture):
    write_jsonl(tmp_path / "in.jsonl", text=TEXTS)
    model = folder(architecture, "labels")
    predictor = load_predictor(model)
    for text, row in zip(TEXTS, predict(model, tmp_path, monkeypatch), strict=True):
        p = alone(predictor, text)[0].logits[0].sigmoid().tolist()
        names = ["red", "green", "blue"]
        assert row["labels"] == [n for n, x in zip(names, p, strict=True) if x > 0.5]
        assert [row[f"probability_{n}"] for n in names] == pytest.approx(p, abs=2e-5)
    model = folder(architecture, "number")
    predictor = load_predictor(model)
    for text, row in zip(TEXTS, predict(model, tmp_path, monkeypatch), strict=True):
        value = alone(predictor, text)[0].logits.item()
        assert row == {"value": pytest.approx(value, abs=2e-5)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tags(folder, tmp_path, monkeypatch, architecture):
    """Texts are cut into words, lists of words are taken as they are, long ones go on."""
    model = folder(architecture, "tags")
    words = [["Unbelievable", "dog"], *TEXTS[1:]]
    write_jsonl(tmp_path / "in.jsonl", text=words)
    rows = predict(model, tmp_path, monkeypatch)
    assert rows[0]["tokens"] == words[0]
    assert rows[2]["tokens"] == ["Two", "words"]
    assert rows[1]["tokens"][-3:] == ["in", "it", "."]
    assert len(rows[3]["tags"]) == len(rows[3]["tokens"]) == 66  # more than fit 48 tokens
    assert set(rows[3]["tags"]) <= {"red", "green", "blue"}
    predictor = load_predictor(model)
    inputs = predictor.tokenizer([words[0]], is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        p = predictor.model(**inputs).logits[0].softmax(-1)
    first = [inputs.word_ids(0).index(word) for word in (0, 1)]
    names = predictor.labels()
    assert rows[0]["tags"] == [names[i] for i in p[first].argmax(-1)]
    assert rows[0]["probabilities"] == pytest.approx(p[first].max(-1).values.tolist(), abs=2e-5)


def test_tags_of_text_are_those_of_its_words(folder):
    """Also where only the normalizer parts them, as it does Chinese characters."""
    predictor = load_predictor(folder("hf_bert", "tags"))
    words = [
        ["我", "在", "北", "京", "，", "as", "Zoë", ",", "Zoe\u0308", "한국어", "x\u200by", "🎉ok"],
        ["\u200b"],
        ["un" * 60, "."],
        ["end"] * 100,
    ]
    texts = ["我在北京，as Zoë, Zoe\u0308 한국어 x\u200by 🎉ok", "\u200b", "un" * 60 + "."]
    predictor.tokenizer(texts, truncation=True, max_length=8)
    assert predictor.columns([*texts, "end " * 100]) == predictor.columns(words)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embeddings(folder, tmp_path, monkeypatch, architecture):
    write_jsonl(tmp_path / "in.jsonl", text=TEXTS)
    model = folder(architecture, "mlm")
    out = predict(model, tmp_path, monkeypatch, suffix=".parquet", task="embedding")
    found = pq.read_table(out).column("embedding").to_pylist()
    predictor = load_predictor(model, "embedding")
    for text, embedding in zip(TEXTS, found, strict=True):
        states = alone(predictor, text)[0].last_hidden_state[0]
        np.testing.assert_allclose(embedding, states.mean(0), atol=5e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_masks_are_filled(folder, tmp_path, monkeypatch, architecture):
    texts = [text if "[MASK]" in text else text + " [MASK]" for text in TEXTS[:3]] + TEXTS[4:5]
    texts += ["too long " * 50 + "[MASK]", "a [MASK]", "[MASK] b"]
    write_jsonl(tmp_path / "in.jsonl", text=texts)
    model = folder(architecture, "mlm")
    rows = predict(model, tmp_path, monkeypatch, task="mlm")
    predictor = load_predictor(model, "mlm")
    for text, row in zip(texts, rows, strict=True):
        output, inputs = alone(predictor, text)
        masked = output.logits[inputs["input_ids"] == predictor.tokenizer.mask_token_id]
        top = masked.softmax(-1).topk(5)
        tokens = [predictor.tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in top.indices]
        assert row["tokens"] == tokens
        for ours, theirs in zip(row["probabilities"], top.values.tolist(), strict=True):
            assert ours == pytest.approx(theirs, abs=2e-5)
    assert rows[4]["tokens"] == []
    assert rows[5]["filled"] == f"a {rows[5]['tokens'][0][0]}"


def test_formats_agree(folder, tmp_path):
    model = folder("mosaic_bert", "classes")
    source = write_jsonl(tmp_path / "in.jsonl", text=TEXTS)
    (tmp_path / "in.txt").write_text("".join(text + "\n" for text in TEXTS))
    want = predict(model, tmp_path)
    files.predict_file(model, tmp_path / "in.txt", tmp_path / "b.parquet")
    assert pq.read_table(tmp_path / "b.parquet").to_pylist() == want
    files.predict_file(model, source, tmp_path / "b.csv")
    lines = (tmp_path / "b.csv").read_text().splitlines()
    assert lines[0] == ",".join(want[0])
    assert lines[1:] == [",".join(map(str, row.values())) for row in want]


def test_parts_are_written_before_more_is_read(folder, tmp_path, monkeypatch):
    """What is in memory does not grow with the file."""
    happened = []

    def endless(source, columns, num_rows):
        for number in range(4):
            happened.append(f"read {number}")
            yield {"text": ["a text"] * 2}

    @contextmanager
    def open_table(path):
        yield lambda table: happened.append(f"wrote {len(table['label'])}")

    monkeypatch.setattr(files, "iter_table", endless)
    monkeypatch.setattr(files, "open_table", open_table)
    model = folder("mosaic_bert", "classes")
    assert files.predict_file(model, "in.csv", tmp_path / "out.csv") == 8
    assert happened == [word for n in range(4) for word in (f"read {n}", "wrote 2")]


def test_processes_give_what_one_gives_in_order(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROWS_AT_ONCE", 3)
    model = folder("mosaic_bert", "classes")
    rows = [{"text": TEXTS[i % len(TEXTS)], "n": i} for i in range(20)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for count in (1, 2):
        out = tmp_path / f"{count}.jsonl"
        assert files.predict_file(model, source, out, keep=["n"], num_workers=count) == 20
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    assert [json.loads(line)["n"] for line in out.read_text().splitlines()] == list(range(20))

    rows[7]["text"] = rows[16]["text"] = ""
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r'row 8, column "text": empty\. Mend'):
        files.predict_file(model, source, tmp_path / "bad.jsonl", num_workers=2)
    assert not (tmp_path / "bad.jsonl").exists()


def test_bad_rows_are_named_or_skipped(folder, tmp_path, monkeypatch, caplog):
    model = folder("mosaic_bert", "classes")
    write_jsonl(tmp_path / "in.jsonl", text=[*TEXTS[:2], None, *TEXTS[3:5], "  ", 7])
    with pytest.raises(DataError) as caught:
        predict(model, tmp_path, monkeypatch)
    assert 'row 3, column "text": empty' in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    monkeypatch.setattr(logging.getLogger("mosaicbert"), "propagate", True)
    rows = predict(model, tmp_path, monkeypatch, skip_bad_rows=True)
    assert [i for i, row in enumerate(rows) if row["label"] is None] == [2, 5, 6]
    told = " ".join(record.getMessage() for record in caplog.records)
    for words in ("row 3", "row 6", 'row 7, column "text": no text but int (7)'):
        assert words in told
    write_jsonl(tmp_path / "in.jsonl", text=TEXTS)
    assert predict(model, tmp_path, monkeypatch)[3:5] == rows[3:5]


@pytest.mark.parametrize("text", [["text"], ["text", "other"]])
def test_half_a_character_is_a_bad_row(folder, tmp_path, text):
    texts = [*TEXTS[:2], "cut \ud83d", *TEXTS[3:]]
    write_jsonl(tmp_path / "in.jsonl", text=texts, other=TEXTS)
    model = folder("hf_bert", "classes")
    with pytest.raises(DataError, match=r'row 3, column "text": half a character \(.\\ud83d.\)'):
        predict(model, tmp_path, text=text)
    rows = predict(model, tmp_path, text=text, skip_bad_rows=True, keep=["text"])
    assert [row["text"] for row in rows] == texts
    assert [i for i, row in enumerate(rows) if row["label"] is None] == [2]
    for suffix in (".csv", ".parquet"):
        with pytest.raises(DataError, match=r"half a character \('\\ud83d'\).*Write \.jsonl"):
            predict(model, tmp_path, suffix=suffix, skip_bad_rows=True, keep=["text"])
    model = folder("hf_bert", "tags")
    write_jsonl(tmp_path / "in.jsonl", text=[["a", "\ud83d"]] * 7)
    with pytest.raises(DataError, match='row 1, column "text": half a character'):
        predict(model, tmp_path)


def test_mistakes(folder, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", text=TEXTS, label=TEXTS)
    model, out = folder("mosaic_bert", "classes"), tmp_path / "out.csv"

    def fails(error, match, *, source=source, out=out, model=model, **keys):
        with pytest.raises(error, match=match):
            files.predict_file(model, source, out, **keys)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "in.jsonl"]

    (tmp_path / "empty.txt").touch()
    fails(DataError, 'no column "body".* Columns: "text", "label"', text=["body"])
    fails(DataError, "no lines", source=tmp_path / "empty.txt")
    fails(DataError, "does not exist", source=tmp_path / "gone.csv")
    fails(ConfigError, "--text and --keep name columns", source=tmp_path / "empty.txt", keep=["a"])
    fails(ConfigError, "one column, or two", text=["a", "b", "c"])
    fails(ConfigError, r"must end in one of \.jsonl", out=tmp_path / "out.xls")
    fails(ConfigError, "s3://b/out.csv is not on this machine", out="s3://b/out.csv")
    fails(ConfigError, "is the input", out=source)
    fails(ConfigError, "a column of that name already", keep=["label"])
    fails(ConfigError, "8 tokens are the least", max_seq_len=0)
    fails(ConfigError, "no head for mlm, but one for classification", task="mlm")
    fails(
        ConfigError,
        "no head for classification, but one for mlm",
        model=folder("mosaic_bert", "mlm"),
    )
    fails(
        ConfigError, "one column of --text", model=folder("hf_bert", "tags"), text=["text", "label"]
    )
