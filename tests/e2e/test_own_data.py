"""The guide to own data, command by command; and mistakes in own data, through the command line."""

import csv
import json
import logging
import random
import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from mosaicbert import cli
from mosaicbert.config.sections import ModelConfig
from mosaicbert.data.tokenizers import load_tokenizer
from mosaicbert.models.build import build_model

GUIDE = Path(__file__).parents[2] / "docs/your-own-data.md"
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [match.groups() for match in BLOCK.finditer(GUIDE.read_text())]
SHOWN = {name: text for _, name, text in BLOCKS if name}
GOOD, BAD = ("lovely", "fast", "sturdy"), ("broken", "slow", "ugly")


@pytest.fixture(autouse=True)
def _fresh_logging():
    """Its handler holds the stderr of one test."""
    yield
    log = logging.getLogger("mosaicbert")
    log.handlers.clear()
    log.propagate = True


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The files that the guide takes for granted, beginning as it shows them."""
    home = tmp_path_factory.mktemp("own")
    rng = random.Random(0)
    reviews = list(csv.reader(SHOWN["reviews.csv"].splitlines()))
    new = reviews[:1]
    for i in range(3, 240):
        happy = rng.random() < 0.5
        words = rng.sample(GOOD if happy else BAD, 2)
        row = [
            i,
            f"a {words[0]} lamp",
            f"It was {words[1]}, of {i}.",
            *(("happy", 5), ("angry", 1))[not happy],
        ]
        (reviews if i < 160 else new).append(row)
    for name, rows in (("reviews.csv", reviews), ("new.csv", new)):
        with (home / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    sentences = [SHOWN["names.conll"]]
    for _ in range(60):
        name, kind = rng.choice([("Anna", "PER"), ("Peter Miller", "PER"), ("New York", "LOC")])
        tags = [f"{'I' if i else 'B'}-{kind}" for i in range(len(name.split()))]
        tagged = zip(["we", "saw", *name.split(), "."], ["O", "O", *tags, "O"], strict=True)
        sentences.append("".join(f"{word} {tag}\n" for word, tag in tagged))
    (home / "names.conll").write_text("\n".join(sentences))
    (home / "sentences.txt").write_text("We saw Peter Miller.\nNew York is far.\n")
    (home / "masked.txt").write_text("a [MASK] lamp\n")
    tokenizer = load_tokenizer("bert-base-uncased")
    torch.manual_seed(0)
    shape = ModelConfig(pretrained_model_name="prajjwal1/bert-tiny")
    model = build_model(shape, "mlm", max_seq_len=64, vocab_size=len(tokenizer))
    model.save_pretrained(home / "pretrained")
    tokenizer.save_pretrained(home / "pretrained")
    (home / "reviews.yaml").write_text(SHOWN["reviews.yaml"])
    return home


def mosaicbert(command):
    words = shlex.split(command)
    assert words[0] == "mosaicbert"
    return cli.main(words[1:])


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_the_guide(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    for language, _, text in BLOCKS:
        if language == "bash":
            for line in text.splitlines():
                assert mosaicbert(line) == 0, capsys.readouterr().err
        elif language == "python":
            exec(text, {})
    said = capsys.readouterr().out
    assert "3 folds: mean and standard deviation" in said
    assert {"happy", "angry"} & set(said.splitlines())  # of the block in Python

    config = json.loads((home / "checkpoints/reviews/best/config.json").read_text())
    assert config["id2label"] == {"0": "angry", "1": "happy"}
    run = home / "runs/reviews"
    assert (run / "confusion.png").read_bytes().startswith(b"\x89PNG")
    counts = list(csv.reader((run / "confusion.csv").read_text().splitlines()))
    assert [row[0] for row in counts] == ["true \\ predicted", "angry", "happy"]
    wrong = int(counts[1][2]) + int(counts[2][1])
    assert len(jsonl(run / "errors.jsonl")) == wrong
    assert sum(int(n) for row in counts[1:] for n in row[1:]) == 32  # a fifth of 160

    new, out = table(home / "new.csv"), table(home / "out.csv")
    assert [row["id"] for row in out] == [row["id"] for row in new]
    hits = sum(a["label"] == b["label"] for a, b in zip(new, out, strict=True))
    assert hits > 0.8 * len(new)
    header, _ = next(text for lang, name, text in BLOCKS if lang == "csv" and not name).splitlines()
    assert list(out[0]) == header.split(",")

    assert len(pq.read_table(home / "vectors.parquet").column("embedding")[0]) == 128
    assert len(jsonl(home / "filled.jsonl")[0]["tokens"][0]) == 5
    assert set(table(home / "stars.csv")[0]) == {"value"}
    tags = jsonl(home / "tags.jsonl")
    assert tags[1]["tokens"] == ["New", "York", "is", "far", "."]
    rows = jsonl(home / "runs/names/metrics.jsonl")
    assert max(row.get("metrics/eval/entity_f1", 0) for row in rows) > 0.9


def test_the_guide_names_every_score():
    from mosaicbert.train import metrics

    known = {*metrics.SCORES, *metrics.REGRESSION_SCORES, *metrics.ENTITY_SCORES}
    assert known <= set(re.findall(r"\w+", GUIDE.read_text()))


HEADER = "id,title,body,label,stars\n"
ROWS = "".join(f"{i},a lamp,no {i},{'xy'[i % 2]},{i}\n" for i in range(12))
CLASSIFY = "mosaicbert classify {home}/reviews.yaml data.train=a.csv"


@pytest.mark.parametrize(
    ("files", "command", "said"),
    [
        ({}, f"{CLASSIFY} data.text=[title,bdy]", 'no column "bdy". Did you mean "body"? Columns:'),
        ({}, f"{CLASSIFY} data.label=kind", '"id", "title", "body", "label", "stars"'),
        (
            {"b.csv": HEADER + "1,a,b,z,1\n"},
            f"{CLASSIFY} data.validation=b.csv",
            'b.csv, column "label": "z" (row 1) is not among the labels of the training data',
        ),
        ({"a.csv": HEADER + ROWS + "4,, ,x,1\n"}, CLASSIFY, "the text is empty in row 13"),
        ({}, f"{CLASSIFY} data.task=regression", "1, 2, 3, 4, 5 and 7 more hold no finite number"),
        ({"a.csv": HEADER + ROWS + "4,a,b,z,1\n"}, CLASSIFY, '"z" has one example (row 13)'),
        (
            {"a.csv": (HEADER + ROWS).encode() + b"4,caf\xe9,b,x,1\n"},
            CLASSIFY,
            "a.csv, line 14: byte 0xe9",
        ),
        ({}, f"{CLASSIFY} data.task=regresion", 'Did you mean "regression"?'),
        ({}, f"{CLASSIFY} data.txt=body", "unknown key"),
        ({}, f"{CLASSIFY} metrics=[acuracy]", 'Did you mean "accuracy"?'),
        ({}, f"{CLASSIFY} best_metric=mcc", "best_metric: mcc is not measured"),
        ({}, f"{CLASSIFY} save_folder=null", "keep: best needs a save_folder"),
        ({}, f"{CLASSIFY} keep=last best_metric=loss", "best_metric is used by"),
        ({}, f"{CLASSIFY} data.folds=7", "the smallest has 6"),
        ({}, f"{CLASSIFY} data.folds=2 data.validation=a.csv", "data.validation (a.csv) would not"),
        ({}, f"{CLASSIFY} data.folds=2 save_folder=x", "must have {run_name} in it"),
        (
            {},
            f"{CLASSIFY} data.label=stars data.task=regression class_weights=balanced",
            "class_weights: balanced is for classification",
        ),
        ({}, f"{CLASSIFY} data.train=b.csv", 'b.csv does not exist. Did you mean "a.csv"?'),
        (
            {"a.conll": "a B-X\nb O\n", "b.conll": "a B-Y\n"},
            'mosaicbert classify {home}/reviews.yaml data.train=a.conll '
            "data.validation=b.conll data.task=token_classification",
            'b.conll, line 1: the tag "B-Y" is not among those of the training data',
        ),
        (
            {},
            "mosaicbert predict {home}/pretrained --input a.csv --output o.csv --text body",
            "has no head for classification, but one for mlm",
        ),
        (
            {},
            "mosaicbert predict {home}/pretrained --input a.csv --output o.csv",
            'a.csv, line 2: there is no column "text". Columns: "id", "title"',
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_any_training(
    home, tmp_path, monkeypatch, capsys, files, command, said
):
    monkeypatch.chdir(tmp_path)
    yaml = (home / "reviews.yaml").read_text().replace("load_path: pretrained", "")
    for name, content in ({"a.csv": HEADER + ROWS, "reviews.yaml": yaml} | files).items():
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(tmp_path.rglob("*"))
    assert mosaicbert(command.format(home="." if "classify" in command else home)) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert "Traceback" not in told.err
    assert told.out == ""
    assert sorted(tmp_path.rglob("*")) == before
