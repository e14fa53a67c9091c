"""MDS as the reference library writes and reads it.

`tests/golden/mds` was written by the reference library (PyPI: streaming-community 0.14.2) from the
bundled sample, by running this file as a script (arguments: names of sets; none: all). Where the
library is installed, it also reads what this package writes.
"""

import gzip
import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mosaicbert.data.mds import MDSWriter, Shard, ensure_raw, read_index
from mosaicbert.data.sample import corpus_files

GOLDEN = Path(__file__).parent / "mds"
TYPES = {
    "array": "ndarray",
    "array_f32": "ndarray:float32",
    "array_fixed": "ndarray:uint16:2,3",
    "blob": "bytes",
    "decimal": "str_decimal",
    "digits": "str_int",
    "double": "float64",
    "float_digits": "str_float",
    "half": "float16",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "i8": "int8",
    "label": "int",
    "meta": "json",
    "single": "float32",
    "text": "str",
    "u16": "uint16",
    "u32": "uint32",
    "u64": "uint64",
    "u8": "uint8",
}
SETS: dict[str, dict[str, Any]] = {
    "text": {"columns": {"text": "str"}, "hashes": ["sha1", "xxh64"], "size_limit": 1 << 15},
    "zstd": {"columns": {"text": "str"}, "hashes": ["sha1"], "compression": "zstd:7"},
    "gz": {"columns": {"text": "str"}, "hashes": ["xxh64"], "compression": "gz"},
    "bz2": {"columns": {"text": "str"}, "hashes": [], "compression": "bz2"},
    "br": {"columns": {"text": "str"}, "hashes": ["sha1"], "compression": "br:5"},
    "snappy": {"columns": {"text": "str"}, "hashes": ["xxh64"], "compression": "snappy"},
    "tokens": {"columns": {"tokens": "bytes"}, "hashes": ["sha1"], "size_limit": 1 << 14},
    "typed": {"columns": TYPES, "hashes": ["sha256", "xxh3_64"], "size_limit": 1 << 13},
}


def samples(name: str) -> Iterator[dict[str, Any]]:
    """What each golden set holds."""
    with gzip.open(corpus_files("validation")[0], "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file][:60]
    if name in ("br", "snappy"):
        texts = texts[:10]
    if name == "tokens":
        for i in range(40):
            yield {"tokens": np.arange(i, i + 128, dtype=np.int64).tobytes()}
    elif name == "typed":
        for i, text in enumerate(texts):
            yield {
                "array": np.arange(i + 1, dtype=np.int64).reshape(1, -1)[:, : 1 + i % 400],
                "array_f32": np.linspace(0, i, 3, dtype=np.float32),
                "array_fixed": np.full((2, 3), i, np.uint16),
                "blob": bytes([i, 0, 255]),
                "decimal": Decimal(f"{i}.10"),
                "digits": -(10**30) * i,
                "double": i / 7,
                "float_digits": i / 3,
                "half": np.float16(i / 4),
                "i16": np.int16(-i * 100),
                "i32": np.int32(-i * 10**6),
                "i64": np.int64(-i * 10**15),
                "i8": np.int8(-i),
                "label": -i,
                "meta": {"i": i, "words": text.split()[:3]},
                "single": np.float32(i / 3),
                "text": text[:100],
                "u16": np.uint16(i * 1000),
                "u32": np.uint32(i * 10**7),
                "u64": np.uint64(i * 10**17),
                "u8": np.uint8(i),
            }
    else:
        yield from ({"text": text} for text in texts)


def skip_without_module(name: str) -> None:
    """The modules of two compressions are no dependency of this package."""
    if name in ("br", "snappy"):
        pytest.importorskip({"br": "brotli"}.get(name, name))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    return bool(a == b)


@pytest.mark.parametrize("name", SETS)
def test_reads_what_the_reference_library_wrote(name: str, tmp_path: Path) -> None:
    skip_without_module(name)
    expected = list(samples(name))
    found = []
    for info in read_index(GOLDEN / name / "index.json"):
        shard = Shard(ensure_raw(GOLDEN / name, info, raw_folder=tmp_path), info)
        found += [shard[i] for i in range(len(shard))]
        for i, sample in enumerate(found[-len(shard) :]):
            if "text" in sample:
                assert shard.raw(i, "text").decode() == sample["text"]
        shard.close()
    assert len(found) == len(expected)
    for a, b in zip(expected, found, strict=True):
        assert list(b) == sorted(a)
        assert all(same(a[key], b[key]) for key in a), (a, b)


@pytest.mark.parametrize("name", SETS)
def test_writes_the_same_bytes_as_the_reference_library(name: str, tmp_path: Path) -> None:
    skip_without_module(name)
    settings = dict(SETS[name])
    with MDSWriter(tmp_path, settings.pop("columns"), **settings) as writer:
        for sample in samples(name):
            writer.write(sample)
    golden = sorted(path.name for path in (GOLDEN / name).iterdir())
    assert golden == sorted(path.name for path in tmp_path.iterdir())
    for file in golden:
        ours, theirs = (tmp_path / file).read_bytes(), (GOLDEN / name / file).read_bytes()
        if name in (
            "zstd",
            "gz",
            "bz2",
            "br",
            "snappy",
        ):  # compressors differ between versions, raw shards do not
            if file == "index.json":
                assert _raw_parts(ours) == _raw_parts(theirs)
        else:
            assert ours == theirs, file


def _raw_parts(index: bytes) -> list[Any]:
    return [{**shard, "zip_data": None} for shard in json.loads(index)["shards"]]


@pytest.mark.filterwarnings("default")  # the library's own
@pytest.mark.parametrize("name", SETS)
def test_the_reference_library_reads_what_we_write(name: str, tmp_path: Path) -> None:
    streaming = pytest.importorskip("streaming")
    skip_without_module(name)
    settings = dict(SETS[name])
    with MDSWriter(tmp_path, settings.pop("columns"), **settings) as writer:
        for sample in samples(name):
            writer.write(sample)
    dataset = streaming.LocalDataset(str(tmp_path)) if not settings.get("compression") else None
    if dataset is None:
        dataset = streaming.StreamingDataset(local=str(tmp_path), batch_size=1)
    expected = list(samples(name))
    assert len(dataset) == len(expected)
    for i, sample in enumerate(expected):
        assert all(same(sample[key], dataset[i][key]) for key in sample)


if __name__ == "__main__":
    reference = importlib.import_module("streaming")
    for set_name in sys.argv[1:] or SETS:
        given = SETS[set_name]
        shutil.rmtree(GOLDEN / set_name, ignore_errors=True)
        with reference.MDSWriter(out=str(GOLDEN / set_name), **given) as reference_writer:
            for one in samples(set_name):
                reference_writer.write(one)
