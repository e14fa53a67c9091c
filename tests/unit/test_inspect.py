"""`mosaicbert inspect`: counts what is there, and names every shard that is not whole."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from mosaicbert.data import convert, inspect
from mosaicbert.data.mds import MDSWriter, read_index
from mosaicbert.errors import DataError

TEXTS = [f"text number {i} " + "and so on " * i for i in range(50)]


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    return inspect.main(parser.parse_args([str(word) for word in words]))


def run_json(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    assert run(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split, compression in (("train", "zstd"), ("val", None)):
        folder = tmp_path / "data" / split
        with MDSWriter(folder, {"text": "str"}, compression=compression, size_limit=2000) as writer:
            for text in TEXTS:
                writer.write({"text": text})
    return tmp_path / "data"


def test_counts(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = run_json(capsys, data)
    assert train["compression"] == "zstd"
    assert not list((data / "train").glob("*.mds"))  # nothing is left behind
    for report in (train, val):
        assert report["faults"] == []
        assert report["samples"] == 50
        assert report["total_length"] == sum(map(len, TEXTS))
        assert report["quantiles"]["shortest"] == min(map(len, TEXTS))
        assert report["quantiles"]["50%"] == sorted(map(len, TEXTS))[24]
        assert report["quantiles"]["longest"] == max(map(len, TEXTS))
        assert sum(count for _, _, count in report["histogram"]) == 50
        for low, high, count in report["histogram"]:
            assert count == sum(low <= len(text) < high for text in TEXTS)
        assert [sample["text"] for sample in report["first_samples"]] == TEXTS[:3]
        assert report["samples_per_second"] > 0


def test_the_originals_flags(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--local_path", tmp_path / "copy", "--remote_path", data.as_uri(), "--split", "val"]
    (report,) = run_json(capsys, *words, "--tokenizer", "bert-base-uncased")
    assert report["folder"] == str(tmp_path / "copy/val")
    assert {p.name for p in (tmp_path / "copy/val").iterdir()} == {
        p.name for p in (data / "val").iterdir()
    }
    example = report["masked_examples"][2]
    assert example["text"].startswith("[CLS] text number 2")
    assert example["to predict"].split(" of ")[1].startswith("11:")
    assert report["tokens"]["tokens a text"] > 3
    run(data, "--tokenizer", "bert-base-uncased", "--num_samples", 1)
    out = capsys.readouterr().out
    assert "50 samples" in out
    assert "example 0, input: [CLS]" in out


def test_masks_are_shown(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [data, "--split", "val", "--tokenizer", "bert-base-uncased", "--mlm_probability", 1.0]
    example = run_json(capsys, *words)[0]["masked_examples"][0]
    assert "[MASK]" in example["input"]
    assert example["to predict"].startswith("3 of 5: text -> ")


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_damaged_shard_is_named(
    data: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [s.zip_basename or s.raw_basename for s in read_index(data / split / "index.json")]
    assert len(names) > 4
    (data / split / names[0]).unlink()
    for name, cut in ((names[2], slice(0, -1)), (names[3], slice(0, 0))):
        path = data / split / name
        path.write_bytes(path.read_bytes()[cut])
    path = data / split / names[4]
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError) as caught:
        run(data)
    for number, name in enumerate(names):
        assert (name in str(caught.value)) == (number in (0, 2, 3, 4))
    assert "4 faults" in capsys.readouterr().out


def test_no_data_set(tmp_path: Path) -> None:
    for words in ([tmp_path], [tmp_path / "nowhere"], [tmp_path, "--split", "val"]):
        with pytest.raises(DataError, match="mosaicbert convert"):
            run(*words)
    with pytest.raises(DataError, match="Name one folder"):
        run()


def test_an_index_that_is_not_one_is_refused(data: Path) -> None:
    (data / "val/index.json").write_text("{}")
    with pytest.raises(DataError, match=r"val/index\.json is no valid MDS index"):
        run(data, "--split", "val")


@pytest.mark.parametrize(
    ("form", "column"), [(["--tokenize"], "input_ids"), (["--concat_tokens", "16"], "tokens")]
)
def test_token_ids(
    tmp_path: Path, form: list[str], column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.txt").write_text("\n".join(TEXTS))
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    words = ["--dataset", str(tmp_path / "own.txt"), "--out_root", str(tmp_path / "o"), "--quiet"]
    convert.main(parser.parse_args([*words, *form, "--tokenizer", "bert-base-uncased"]))
    capsys.readouterr()
    (report,) = run_json(capsys, tmp_path / "o")
    assert list(report["columns"]) == [column]
    assert report["unit"] == "tokens"
    assert report["tokenizer"] == "bert-base-uncased"
    assert report["masked_examples"][0]["text"].startswith("[CLS] text number 0")
    if column == "tokens":
        assert report["quantiles"]["shortest"] == report["quantiles"]["longest"] == 16


def test_other_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MDSWriter(tmp_path, {"a": "int", "b": "bytes"}) as writer:
        writer.write({"a": 1, "b": b"x"})
    (report,) = run_json(capsys, tmp_path)
    assert report["quantiles"] == {}
    assert report["first_samples"] == [{"a": 1, "b": "b'x'"}]
    run(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_picture(data: Path, tmp_path: Path) -> None:
    run(data, "--picture", tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="--picture"):
        run(data, "--picture", tmp_path / "lengths.xyz")
