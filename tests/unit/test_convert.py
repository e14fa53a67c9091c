"""Conversion: any source gives the same shards however it is done, and mistakes leave nothing."""

import argparse
import csv
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mosaicbert.data import convert, convert_jobs, convert_pieces, sources
from mosaicbert.data.convert_samples import check_tokenization
from mosaicbert.data.mds import Shard, ensure_raw, read_index
from mosaicbert.data.tokenizers import load_tokenizer
from mosaicbert.errors import ConfigError, DataError

DOCUMENTS = [f"Document {i}: " + "some words é " * (i % 7) for i in range(200)]


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    return convert.main(
        parser.parse_args([str(word) for word in ("--quiet", "--num_workers", 1, *words)])
    )


def read(folder: Path) -> list[dict[str, Any]]:
    found = []
    for info in read_index(folder / "index.json"):
        shard = Shard(ensure_raw(folder, info), info)
        found += [shard[i] for i in range(len(shard))]
        shard.close()
    return found


def texts(folder: Path) -> list[str]:
    return [sample["text"] for sample in read(folder)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def json_lines(documents: Sequence[str]) -> bytes:
    return "".join(json.dumps({"url": "u", "text": text}) + "\n" for text in documents).encode()


def write_c4(folder: Path, num_files: int = 5) -> Path:
    """A data set in C4's layout: 5 training files of 40 documents, 20 for validation."""
    (folder / "en").mkdir(parents=True)
    for i in range(num_files):
        part = DOCUMENTS[i * 40 : i * 40 + 40]
        name = f"c4-train.{i:05d}-of-{num_files:05d}.json.gz"
        (folder / "en" / name).write_bytes(gzip.compress(json_lines(part)))
    held_out = [f"held out {i}" for i in range(20)]
    name = "c4-validation.00000-of-00001.json.gz"
    (folder / "en" / name).write_bytes(gzip.compress(json_lines(held_out)))
    return folder


# --- sources -------------------------------------------------------------------------------------


def write_source(path: Path) -> Path:
    kind = path.name.split(".", 1)[1]
    if kind == "parquet":
        pq.write_table(pa.table({"text": DOCUMENTS, "n": range(200)}), path, row_group_size=50)
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            writer.writerows([("n", "text"), *enumerate(DOCUMENTS)])
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in DOCUMENTS], indent=1))
    elif kind.startswith("txt"):
        path.write_bytes(("\n".join(DOCUMENTS) + "\n\n").encode())
    else:
        path.write_bytes(json_lines(DOCUMENTS))
    if kind.endswith(".gz"):
        half = path.stat().st_size // 2  # two members, as concatenated files have
        data = path.read_bytes()
        path.write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]))
    if kind.endswith((".zst", ".zstd")):
        path.write_bytes(zstandard.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    "kind",
    ["jsonl", "json", "json.gz", "jsonl.zst", "ndjson", "txt", "txt.gz", "csv", "tsv", "parquet"],
)
def test_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    source = write_source(tmp_path / f"own.{kind}")
    run("--dataset", source, "--out_root", tmp_path / "out")
    assert texts(tmp_path / "out/train") == DOCUMENTS
    assert {path.name for path in (tmp_path / "out/train").iterdir()} == {
        "convert.json",
        "index.json",
        "shard.00000.00000.mds",
    }


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_large_file_is_cut_between_lines(tmp_path: Path, kind: str) -> None:
    source = write_source(tmp_path / f"own.{kind}")
    run("--dataset", source, "--out_root", tmp_path / "out", "--size_limit", 2000)
    shards = read_index(tmp_path / "out/train/index.json")
    assert len({shard.raw_basename.split(".")[1] for shard in shards}) > 5
    assert texts(tmp_path / "out/train") == DOCUMENTS


def test_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_bytes("\ufeffone\r\nline\r\n\r\n \r\ntwo\nthree".encode())
    run("--dataset", tmp_path / "own.txt", "--out_root", tmp_path / "a", "--paragraphs")
    assert texts(tmp_path / "a/train") == ["one\nline", "two\nthree"]
    run("--dataset", tmp_path / "own.txt", "--out_root", tmp_path / "b")
    assert texts(tmp_path / "b/train") == ["one", "line", "two", "three"]


def test_another_text_column(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"content": "a"}\n')
    with pytest.raises(DataError, match=r'line 1: no column "contents".*Did you mean "content"'):
        run("--dataset", tmp_path, "--out_root", tmp_path / "o", "--text_column", "contents")
    run("--dataset", tmp_path, "--out_root", tmp_path / "o", "--text_column", "content")
    assert texts(tmp_path / "o/train") == ["a"]


def test_c4_names_pick_the_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(convert.SPLITS, "train_small", ("train", 50))
    monkeypatch.setitem(convert.SPLITS, "val_small", ("validation", 7))
    source = write_c4(tmp_path / "c4")
    splits = ["train", "train_small", "val", "val_small"]
    run(
        "--dataset",
        source,
        "--data_subset",
        "en",
        "--out_root",
        tmp_path / "o",
        "--splits",
        *splits,
    )
    assert texts(tmp_path / "o/train") == DOCUMENTS
    assert texts(tmp_path / "o/train_small") == DOCUMENTS[:50]
    assert len(texts(tmp_path / "o/val")) == 20
    assert texts(tmp_path / "o/val_small") == [f"held out {i}" for i in range(7)]


@pytest.mark.parametrize("name", ["c4", "sample"])
def test_a_folder_may_have_the_name_of_a_known_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_c4(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    run("--dataset", f"./{name}", "--out_root", "o", "--splits", "train")
    assert texts(tmp_path / "o/train") == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("c4-train.00000-of-01024.json.gz", "train"),
        ("c4-validation.00000-of-00008.json.gz", "validation"),
        ("val/part-0.jsonl", "validation"),
        ("dev.tsv", "validation"),
        ("train/val.txt", "validation"),
        ("training_data/eval-1.txt", "validation"),
        ("my_test.csv", "test"),
        ("trainer.txt", None),
        ("values.txt", None),
    ],
)
def test_names_of_splits(name: str, split: str | None) -> None:
    assert sources.split_named_in(Path(name)) == split


def test_sample_and_default_splits(tmp_path: Path) -> None:
    run("--dataset", "sample", "--out_root", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "val"]
    assert len(texts(tmp_path / "train")) > 1000


def test_val_fraction_parts_the_documents_by_their_text(tmp_path: Path) -> None:
    source = tmp_path / "own.txt"
    source.write_text("\n".join(DOCUMENTS * 2))
    run("--dataset", source, "--out_root", tmp_path / "o", "--val_fraction", 0.2)
    train, val = texts(tmp_path / "o/train"), texts(tmp_path / "o/val")
    assert sorted(train + val) == sorted(DOCUMENTS * 2)
    assert not set(train) & set(val)
    assert 40 <= len(val) <= 120


class _FakeHub:
    """As much of the `datasets` library as is used: parts of rows, streamed."""

    def __init__(self, parts: list[list[str]]) -> None:
        self.parts = parts
        self.num_shards = len(parts)

    def shard(self, num_shards: int, index: int) -> "_FakeHub":
        assert num_shards == self.num_shards
        return _FakeHub([self.parts[index]])

    def __iter__(self) -> Any:
        for part in self.parts:
            for text in part:
                if text == "break":
                    raise ConnectionError("reset by peer")
                yield {"text": text, "url": ""}


def test_hub_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    parts = [["a", "b"], ["c"]]

    def load_dataset(path: str, name: str | None, split: str, streaming: bool) -> _FakeHub:
        asked.append((path, name, split, streaming))
        return _FakeHub(parts)

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    sources.hub_dataset.cache_clear()
    run("--dataset", "c4", "--out_root", tmp_path / "o", "--splits", "val")
    assert asked == [("allenai/c4", "en", "validation", True)]
    assert texts(tmp_path / "o/val") == ["a", "b", "c"]
    parts[1].append("break")
    with pytest.raises(DataError, match=r"part 1 of 2.*after 1 rows.*reset by peer"):
        run(
            "--dataset",
            "me/own",
            "--out_root",
            tmp_path / "p",
            "--splits",
            "val",
            "--num_workers",
            1,
        )
    sources.hub_dataset.cache_clear()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'mosaicbert\[hub\]'"):
        run("--dataset", "c4", "--out_root", tmp_path / "q")
    assert not (tmp_path / "q").exists()


# --- token ids -----------------------------------------------------------------------------------


def test_tokenize_stores_bare_ids(tmp_path: Path) -> None:
    source = tmp_path / "own.txt"
    source.write_text("\n".join([*DOCUMENTS, "\u200b"]))  # the last has no token
    words = ["--tokenize", "--tokenizer", "bert-base-uncased"]
    run("--dataset", source, "--out_root", tmp_path / "o", *words)
    found = read(tmp_path / "o/train")
    tokenizer = load_tokenizer("bert-base-uncased")
    assert len(found) == len(DOCUMENTS)
    for sample, text in zip(found, DOCUMENTS, strict=True):
        assert sample["input_ids"].dtype == np.uint16
        assert sample["input_ids"].tolist() == tokenizer.encode(text, add_special_tokens=False)
    check_tokenization(tmp_path / "o/train", tokenizer)
    note = tmp_path / "o/train/tokenization.json"
    changed = json.loads(note.read_text()) | {"vocabulary_sha256": "0", "tokenizer": "other"}
    note.write_text(json.dumps(changed))
    with pytest.raises(DataError, match='tokenised with "other"'):
        check_tokenization(tmp_path / "o/train", tokenizer)


@pytest.mark.parametrize("extra", [[], ["--no_wrap"], ["--eos_text", "[SEP]", "--bos_text", "x"]])
def test_concat_tokens_as_the_original(tmp_path: Path, extra: list[str]) -> None:
    source = tmp_path / "own.txt"
    source.write_text("\n".join(DOCUMENTS))
    words = ["--concat_tokens", 16, "--tokenizer", "bert-base-uncased", *extra]
    run("--dataset", source, "--out_root", tmp_path / "o", *words)
    found = [np.frombuffer(s["tokens"], np.int64).tolist() for s in read(tmp_path / "o/train")]
    tokenizer = load_tokenizer("bert-base-uncased")
    sep = tokenizer.encode("[SEP]", add_special_tokens=False)
    x = tokenizer.encode("x", add_special_tokens=False)
    expected: list[list[int]] = []
    buffer: list[int] = []
    for text in DOCUMENTS:
        ids = tokenizer.encode(text)
        buffer += x + ids + sep if "--eos_text" in extra else ids
        while len(buffer) >= 16:
            expected.append(buffer[:16])
            buffer = [] if "--no_wrap" in extra else buffer[16:]
    assert found == expected


# --- the same whatever way -----------------------------------------------------------------------


def test_workers_shares_and_one_process_give_the_same_files(tmp_path: Path) -> None:
    source = write_c4(tmp_path / "c4")
    words = [
        "--dataset",
        source,
        "--data_subset",
        "en",
        "--size_limit",
        1500,
        "--splits",
        "train",
        "val",
    ]
    run(*words, "--out_root", tmp_path / "one")
    run(*words, "--out_root", tmp_path / "two", "--num_workers", 2)
    for share in ("1/3", "0/3"):
        run(*words, "--out_root", tmp_path / "shares", "--shard", share)
    with pytest.raises(DataError, match="pieces are not done yet"):
        run("--merge", "--out_root", tmp_path / "shares")
    assert not list((tmp_path / "shares").rglob("index.json"))
    run(*words, "--out_root", tmp_path / "shares", "--shard", "2/3")
    run("--merge", "--out_root", tmp_path / "shares")
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "shares")
    assert texts(tmp_path / "one/train") == DOCUMENTS


def test_shares_made_apart_are_merged_from_one_folder(tmp_path: Path) -> None:
    source = write_c4(tmp_path / "c4")
    words = ["--dataset", source, "--size_limit", 1500, "--splits", "train"]
    for i in range(2):
        run(*words, "--out_root", tmp_path / f"machine{i}", "--shard", f"{i}/2")
        subprocess.run(["cp", "-r", f"{tmp_path}/machine{i}/.", tmp_path / "all"], check=True)
    run("--merge", "--out_root", tmp_path / "all")
    assert texts(tmp_path / "all/train") == DOCUMENTS


def test_shares_that_do_not_fit_together_are_not_merged(tmp_path: Path) -> None:
    words = ["--dataset", write_c4(tmp_path / "c4"), "--size_limit", 1500, "--splits", "train"]
    for i in range(2):
        run(*words, "--out_root", tmp_path / "o", "--shard", f"{i}/2")
    record = tmp_path / "o/train/parts/00001.json"
    good = record.read_text()
    changed = json.loads(good)
    changed["key"][0] += 1
    record.write_text(json.dumps(changed))
    with pytest.raises(DataError, match="cut from different sources"):
        run("--merge", "--out_root", tmp_path / "o")
    record.write_text(good)
    shard = tmp_path / "o/train/shard.00001.00000.mds"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"shard\.00001\.00000\.mds is missing or cut short"):
        run("--merge", "--out_root", tmp_path / "o")
    assert not (tmp_path / "o/train/index.json").exists()
    shard.write_bytes(content)
    run("--merge", "--out_root", tmp_path / "o")
    assert texts(tmp_path / "o/train") == DOCUMENTS


# --- going on ------------------------------------------------------------------------------------


def test_going_on_makes_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_c4(tmp_path / "c4")
    words = ["--dataset", source, "--size_limit", 1500, "--splits", "train"]
    run(*words, "--out_root", tmp_path / "whole")
    made: list[int] = []
    real = convert_pieces.convert_piece

    def counted(folder: Path, request: Any, piece: Any, report: Any) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(piece.index)
        real(folder, request, piece, report)

    monkeypatch.setattr("mosaicbert.data.convert_engines.convert_piece", counted)
    with pytest.raises(KeyboardInterrupt):
        run(*words, "--out_root", tmp_path / "o")
    assert not (tmp_path / "o/train/index.json").exists()
    (tmp_path / "o/train/shard.00000.00000.mds").write_bytes(b"cut short")
    (tmp_path / "o/train/.shard.00004.00000.mds.abc.tmp").write_bytes(b"left behind")
    made.clear()
    made.append(-1)
    with pytest.raises(KeyboardInterrupt):
        run(*words, "--out_root", tmp_path / "o")
    assert made == [-1, 0]  # piece 1 is still there
    monkeypatch.undo()
    run(*words, "--out_root", tmp_path / "o")
    assert files(tmp_path / "o") == files(tmp_path / "whole")
    run(*words, "--out_root", tmp_path / "o")  # nothing left to do
    assert files(tmp_path / "o") == files(tmp_path / "whole")


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "own.txt")
    run("--dataset", source, "--out_root", tmp_path / "o")
    before = files(tmp_path / "o")
    with pytest.raises(ConfigError, match="compression was None, now 'zstd'"):
        run("--dataset", source, "--out_root", tmp_path / "o", "--compression", "zstd")
    assert files(tmp_path / "o") == before
    (tmp_path / "p/train").mkdir(parents=True)
    (tmp_path / "p/train/shard.00000.mds").write_bytes(b"somebody's")
    with pytest.raises(ConfigError, match="is not empty"):
        run("--dataset", source, "--out_root", tmp_path / "p")
    assert files(tmp_path / "p") == {"train/shard.00000.mds": b"somebody's"}


def test_a_changed_source_is_converted_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_c4(tmp_path / "c4")
    bad = source / "en/c4-train.00003-of-00005.json.gz"
    good = bad.read_bytes()
    bad.write_bytes(gzip.compress(json_lines(["fine"]) + b"{not json\n"))
    words = ["--dataset", source, "--splits", "train", "--size_limit", 1500]
    with pytest.raises(DataError, match=r"c4-train.00003-of-00005.json.gz, line 2: not JSON"):
        run(*words, "--out_root", tmp_path / "o")
    bad.write_bytes(good)
    done = source / "en/c4-train.00000-of-00005.json.gz"
    done.write_bytes(gzip.compress(json_lines(["another"])))
    run(*words, "--out_root", tmp_path / "o")
    assert texts(tmp_path / "o/train") == ["another", *DOCUMENTS[40:]]


def test_a_complete_set_that_lost_a_shard_is_told(tmp_path: Path) -> None:
    source = write_source(tmp_path / "own.txt")
    run("--dataset", source, "--out_root", tmp_path / "o")
    (tmp_path / "o/train/shard.00000.00000.mds").unlink()
    with pytest.raises(DataError, match=r"shard.00000.00000.mds is missing"):
        run("--dataset", source, "--out_root", tmp_path / "o")


def test_two_conversions_to_one_folder(tmp_path: Path) -> None:
    source = write_source(tmp_path / "own.txt")
    (tmp_path / "o/train").mkdir(parents=True)
    with (
        convert_jobs.locked(tmp_path / "o/train"),
        pytest.raises(DataError, match="Another process is converting"),
    ):
        run("--dataset", source, "--out_root", tmp_path / "o")
    run("--dataset", source, "--out_root", tmp_path / "o")
    assert texts(tmp_path / "o/train") == DOCUMENTS


def _start(words: list[object]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "mosaicbert", "convert", "--quiet", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(Path(convert.__file__).parents[2])}
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _names(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("num_workers", "times"),
    [
        (2, 2),
        pytest.param(1, 20, marks=pytest.mark.slow),
        pytest.param(2, 20, marks=pytest.mark.slow),
    ],
)
def test_kill_9_at_random_moments(tmp_path: Path, num_workers: int, times: int) -> None:
    """Killed again and again, at last it is as if it had never been."""
    source = write_c4(tmp_path / "c4")
    for path in (source / "en").iterdir():  # enough work to be killed in the middle of
        documents = gzip.decompress(path.read_bytes())
        path.write_bytes(gzip.compress(documents * 100, 1))
    words: list[object] = ["--dataset", source, "--splits", "train", "val", "--size_limit", 100_000]
    run(*words, "--out_root", tmp_path / "whole")
    words += ["--out_root", tmp_path / "o", "--num_workers", num_workers]
    moments, killed = random.Random(num_workers), 0
    while killed < times:
        before = _names(tmp_path / "o")
        process = _start(words)
        while _names(tmp_path / "o") == before and process.poll() is None:
            time.sleep(0.005)  # it is still starting
        time.sleep(moments.uniform(0.0, 0.3))
        process.kill()  # the parent alone: its workers must end by themselves
        if process.wait() == 0:  # it was faster: once more from the start
            assert files(tmp_path / "o") == files(tmp_path / "whole")
            shutil.rmtree(tmp_path / "o")
            continue
        killed += 1
        for index in (tmp_path / "o").glob("*/index.json"):
            for info in read_index(index):
                ensure_raw(index.parent, info)
    assert _start(words).wait() == 0
    assert files(tmp_path / "o") == files(tmp_path / "whole")


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("own.txt", b"", "there is no document in it"),
        ("own.txt", b"\n \n", "there is no document in it"),
        ("own.jsonl", b"", "there is no document in it"),
        ("own.txt", b"fine\nna\xefve\n", r"own.txt, line 2: not UTF-8: byte 0xef at position 3"),
        ("own.jsonl", b'{"text": "a"}\n{"text": \n', r"own.jsonl, line 2: not JSON"),
        ("own.jsonl", b'{"text": "a"}\n["a"]\n', r"own.jsonl, line 2: a JSON str"),
        ("own.jsonl", b'{"text": null}\n', r'line 1: "text" is no text but null'),
        ("own.jsonl", b'{"text": "\\ud800"}\n', r"line 1: .* half a character"),
        ("own.json", b'[{"text": "a"},\n{"text" "b"}]', r"own.json, line 2: not JSON"),
        ("own.json.gz", gzip.compress(json_lines(DOCUMENTS))[:-20], "own.json.gz .* cut short"),
        ("own.json.gz", b"no gzip", "own.json.gz .* not gz data"),
        ("own.json.zst", zstandard.compress(json_lines(DOCUMENTS))[:-9], "zst .* cut short"),
        ("own.csv", b"a,b\n1,2\n", r'no column "text"'),
        ("own.parquet", b"PAR1", "own.parquet"),
        ("own.xml", b"<a/>", "holds no file of text"),
    ],
)
def test_bad_files_are_named_and_nothing_stays(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        run("--dataset", tmp_path / "in", "--out_root", tmp_path / "o")
    assert files(tmp_path / "o") == {}


def test_lines_are_counted_from_the_start_of_the_file(tmp_path: Path) -> None:
    lines = json_lines(DOCUMENTS).splitlines(keepends=True)
    lines[150] = b"{\n"
    (tmp_path / "own.jsonl").write_bytes(b"".join(lines))
    words = [
        "--dataset",
        tmp_path / "own.jsonl",
        "--out_root",
        tmp_path / "o",
        "--size_limit",
        2000,
    ]
    with pytest.raises(DataError, match="line 151: not JSON"):
        run(*words, "--num_workers", 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "./nowhere"], "no such file or folder"),
        (["--dataset", "nowhere.txt"], "no such file or folder"),
        (["--dataset", "{in}", "--splits", "val"], 'no file for the split "val".*--val_fraction'),
        (["--dataset", "{in}", "--splits", "../up"], "no name of a folder"),
        (["--dataset", "{in}", "--splits", "train", "train"], "named twice"),
        (["--dataset", "{in}", "--data_subset", "fr"], "fr does not exist"),
        (["--dataset", "{in}", "--compression", "zip"], "zip"),
        (["--dataset", "{in}", "--val_fraction", "1"], "not between 0 and 1"),
        (["--dataset", "{in}", "--concat_tokens", "8"], "need a --tokenizer"),
        (["--dataset", "{in}", "--tokenizer", "bert-base-uncased"], "name one of them"),
        (["--dataset", "{in}", "--tokenize", "--tokenizer", "./nowhere"], "nowhere"),
        (["--dataset", "{in}", "--no_wrap"], "are for --concat_tokens"),
        (["--dataset", "{in}", "--shard", "2/2"], "I from 0 to N-1"),
        (["--dataset", "{in}", "--num_workers", "0"], "num_workers"),
        (["--dataset", "{in}", "--size_limit", "0"], "size_limit"),
        (["--merge"], "no share"),
        ([], "--dataset is missing"),
    ],
)
def test_impossible_requests(tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/own.txt").write_text("text")
    words = [word.replace("{in}", str(tmp_path / "in")) for word in words]
    with pytest.raises((ConfigError, DataError), match=message):
        run(*words, "--out_root", tmp_path / "o")
    assert files(tmp_path) == {"in/own.txt": b"text"}


def test_a_full_disk_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_c4(tmp_path / "c4")
    words = ["--dataset", source, "--splits", "train", "--size_limit", 1500]
    run(*words, "--out_root", tmp_path / "whole")
    real = Path.replace
    left = 6

    def replace(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(DataError, match="No space left on device"):
            run(*words, "--out_root", tmp_path / "o")
    assert not list((tmp_path / "o/train").glob(".*"))
    run(*words, "--out_root", tmp_path / "o")
    assert files(tmp_path / "o") == files(tmp_path / "whole")
