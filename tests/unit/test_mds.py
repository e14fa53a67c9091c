"""MDS shards: what is written is read, and what is wrong with a file is an error naming it."""

import json
import os
import stat
import tempfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mosaicbert.data import mds, mds_files
from mosaicbert.data.mds import (
    MDSWriter,
    Shard,
    ShardInfo,
    ensure_raw,
    parse_index,
    read_index,
    verify,
)
from mosaicbert.data.mds_encodings import find_encoding
from mosaicbert.errors import ConfigError, DataError

TEXTS = ["", "a", "naïve 😀", "x" * 500, *(f"document {i}" for i in range(40))]


def write(folder: Path, texts: list[str] = TEXTS, **settings: Any) -> list[ShardInfo]:
    with MDSWriter(folder, {"text": "str"}, **settings) as writer:
        for text in texts:
            writer.write({"text": text})
    return read_index(folder / "index.json")


def read(folder: Path) -> list[dict[str, Any]]:
    found = []
    for info in read_index(folder / "index.json"):
        shard = Shard(ensure_raw(folder, info), info)
        found += [shard[i] for i in range(len(shard))]
        shard.close()
    return found


# --- round trips ---------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(), min_size=1), size_limit=st.integers(1, 2000))
def test_any_text_comes_back(texts: list[str], size_limit: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        shards = write(Path(name), texts, size_limit=size_limit)
        assert [sample["text"] for sample in read(Path(name))] == texts
        assert all(s.raw_bytes <= size_limit or s.samples == 1 for s in shards)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["uint8", "int16", "uint32", "float16", "float64"]))
def test_any_array_comes_back(data: st.DataObject, kind: str) -> None:
    array = data.draw(arrays(kind, array_shapes(max_dims=4, max_side=5)))
    shape = ",".join(map(str, array.shape))
    for name in ("ndarray", f"ndarray:{kind}", f"ndarray:{kind}:{shape}"):
        encoding = find_encoding(name)
        again = encoding.decode(encoding.encode(array))
        assert again.dtype == array.dtype
        np.testing.assert_array_equal(again, array)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("int", -(2**63)),
        ("str_int", 10**40),
        ("str_float", 0.1),
        ("str_decimal", Decimal("1.10")),
        ("json", {"a": [1, None, "é"]}),
        ("bytes", b"\x00\xff"),
        ("uint64", 2**64 - 1),
        ("float32", 0.5),
    ],
)
def test_values_come_back(name: str, value: Any) -> None:
    encoding = find_encoding(name)
    data = encoding.encode(value)
    assert encoding.decode(data) == value
    assert encoding.size in (None, len(data))


@pytest.mark.parametrize("compression", ["zstd", "zstd:7", "gz", "gz:1", "bz2"])
def test_compressed_shards_are_written_alone_and_read(tmp_path: Path, compression: str) -> None:
    shards = write(tmp_path, compression=compression, size_limit=1000)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"index.json", *(shard.zip_basename for shard in shards)}
    assert [sample["text"] for sample in read(tmp_path)] == TEXTS
    ensure_raw(tmp_path, shards[0], keep_zip=False)
    assert (
        tmp_path / str(shards[0].zip_basename)
    ).exists()  # the raw file was there: nothing to do
    (tmp_path / shards[0].raw_basename).unlink()
    ensure_raw(tmp_path, shards[0], keep_zip=False)
    assert not (tmp_path / str(shards[0].zip_basename)).exists()


def test_the_same_samples_give_the_same_files(tmp_path: Path) -> None:
    for compression in (None, "zstd", "gz"):
        for name in "ab":
            write(tmp_path / name, compression=compression, size_limit=1000)
        for path in (tmp_path / "a").iterdir():
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_raw_bytes_of_one_of_several_columns(tmp_path: Path) -> None:
    columns = {"text": "str", "number": "int", "more": "bytes"}
    with MDSWriter(tmp_path, columns) as writer:
        writer.write({"text": "é", "number": 7, "more": b"m"})
    info = read_index(tmp_path / "index.json")[0]
    shard = Shard(tmp_path / info.raw_basename, info)
    assert shard.raw(0, "text") == "é".encode()
    assert shard.raw(0, "more") == b"m"
    assert shard[0] == {"text": "é", "number": 7, "more": b"m"}
    for wrong in (1, -1):
        with pytest.raises(IndexError):
            shard.raw(wrong, "text")
    with pytest.raises(KeyError):
        shard.raw(0, "txt")


# --- the writer ----------------------------------------------------------------------------------


def test_an_exception_leaves_no_index(tmp_path: Path) -> None:
    def write_and_fail() -> None:
        with MDSWriter(tmp_path, {"text": "str"}, size_limit=100) as writer:
            for _ in range(100):
                writer.write({"text": "some text"})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    assert not (tmp_path / "index.json").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("sample", "what"),
    [
        ({"text": 1}, 'column "text": expected str'),
        ({}, "has the columns"),
        ({"text": "a", "b": 1}, "has the columns"),
        ({"text": "\ud800"}, "surrogates"),
    ],
)
def test_samples_of_another_form_are_refused(
    tmp_path: Path, sample: dict[str, Any], what: str
) -> None:
    writer = MDSWriter(tmp_path, {"text": "str"})
    with pytest.raises(DataError, match=what):
        writer.write(sample)


def test_nothing_written_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no samples"), MDSWriter(tmp_path, {"text": "str"}):
        pass


def test_unknown_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="zstd"):
        MDSWriter(tmp_path, {"text": "str"}, compression="lzma")
    with pytest.raises(ConfigError, match="highest level"):
        MDSWriter(tmp_path, {"text": "str"}, compression="gz:10")
    with pytest.raises(DataError, match="xxh64"):
        MDSWriter(tmp_path, {"text": "str"}, hashes=["xxh65"])
    with pytest.raises(DataError, match='Did you mean "str"'):
        MDSWriter(tmp_path, {"text": "strr"})
    with pytest.raises(DataError, match="runs the code"):
        MDSWriter(tmp_path, {"a": "pkl"}).write({"a": 1})


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DataError, match="No space left on device") as caught:
        write(tmp_path)
    assert "shard.00000.mds" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# --- damage --------------------------------------------------------------------------------------


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncate, _flip, _empty, Path.unlink])
@pytest.mark.parametrize("compression", [None, "zstd", "gz", "bz2"])
def test_damaged_files_are_named(
    tmp_path: Path, damage: Callable[[Path], None], compression: str | None
) -> None:
    shards = write(tmp_path, size_limit=1000, compression=compression)
    name = shards[1].zip_basename or shards[1].raw_basename
    damage(tmp_path / name)
    ensure_raw(tmp_path, shards[0])
    with pytest.raises(DataError, match=r"shard\.00001\.mds.*(anew)"):
        ensure_raw(tmp_path, shards[1])


@pytest.mark.parametrize("compression", ["zstd", "gz", "bz2"])
def test_compressed_files_of_other_content_are_refused(tmp_path: Path, compression: str) -> None:
    """Without hashes of the zip file, its content still has to be what the index says."""
    write(tmp_path / "other", ["x" * 10_000])
    shards = write(tmp_path, compression=compression, hashes=())
    packed = tmp_path / str(shards[0].zip_basename)
    good = packed.read_bytes()
    for bad in (
        good[:-9],
        good[: len(good) // 2] + good[len(good) // 2 + 1 :],
        good + good,
        b"mds",
    ):
        packed.write_bytes(bad)
        info = ShardInfo(**{**vars(shards[0]), "zip_bytes": len(bad)})
        with pytest.raises(DataError, match=r"shard\.00000\.mds"):
            ensure_raw(tmp_path, info)
        assert not (tmp_path / info.raw_basename).exists()


def test_every_byte_of_a_compressed_file_counts(tmp_path: Path) -> None:
    """Also those, such as gzip's time, that change nothing of what is in it."""
    info = write(tmp_path, compression="gz")[0]
    packed = tmp_path / str(info.zip_basename)
    data = bytearray(packed.read_bytes())
    data[4] ^= 1
    packed.write_bytes(data)
    with pytest.raises(DataError, match=r"shard\.00000\.mds\.gz is damaged: its sha1"):
        ensure_raw(tmp_path, info)


def test_another_text_in_a_sound_file_leaves_no_shard(tmp_path: Path) -> None:
    """As long as ours, and the index has its hashes by mistake: the raw ones tell."""
    info = write(tmp_path, ["ours"], compression="zstd")[0]
    other = write(tmp_path / "other", ["else"], compression="zstd")[0]
    (tmp_path / "other" / str(other.zip_basename)).replace(tmp_path / str(info.zip_basename))
    mixed = {"zip_bytes": other.zip_bytes, "zip_hashes": other.zip_hashes}
    with pytest.raises(DataError, match="its content has another hash"):
        ensure_raw(tmp_path, ShardInfo(**{**vars(info), **mixed}))
    assert not (tmp_path / info.raw_basename).exists()


def test_a_file_is_checked_again_only_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = write(tmp_path)[0]
    calls = []
    real = mds_files.verify
    monkeypatch.setattr(mds_files, "verify", lambda *args: (calls.append(1), real(*args)))
    for _ in range(3):
        ensure_raw(tmp_path, info)
    assert len(calls) == 1
    os.utime(tmp_path / info.raw_basename, ns=(1, 1))
    ensure_raw(tmp_path, info)
    assert len(calls) == 2


def test_verify_checks_every_hash(tmp_path: Path) -> None:
    info = write(tmp_path, hashes=["md5", "sha1", "xxh64", "xxh3_128"])[0]
    path = tmp_path / info.raw_basename
    verify(path, info.raw_bytes, info.raw_hashes)
    for name in info.raw_hashes:
        with pytest.raises(DataError, match=name):
            verify(path, info.raw_bytes, {**info.raw_hashes, name: "0"})
    with pytest.raises(DataError, match="unknown"):
        verify(path, info.raw_bytes, {"crc7": "0"})


def _with_u32(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + value.to_bytes(4, "little") + data[at + 4 :]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_shard_without_hashes_never_does_worse_than_a_data_error(data: st.DataObject) -> None:
    """Random bytes changed, and offsets or sizes set to anything, up to 2^32 - 1."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with MDSWriter(folder, {"a": "ndarray", "text": "str"}, hashes=()) as writer:
            for text in TEXTS[:6]:
                writer.write({"a": np.arange(len(text) + 1), "text": text})
        info = read_index(folder / "index.json")[0]
        path = folder / info.raw_basename
        content = path.read_bytes()
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(content) - 4))
            value = data.draw(st.one_of(st.integers(0, 2**32 - 1), st.integers(0, 600)))
            content = _with_u32(content, at, value)
        path.write_bytes(content)
        try:
            shard = Shard(path, info)
        except DataError:
            return
        for i in range(len(shard)):
            try:
                shard[i]
                shard.raw(i, "text")
            except DataError as error:
                if path.name not in str(error):
                    pytest.fail(f"the error names no shard: {error}")
        shard.close()


def test_a_huge_length_is_refused(tmp_path: Path) -> None:
    info = write(tmp_path, ["abc"], hashes=())[0]
    path = tmp_path / info.raw_basename
    begin = int.from_bytes(path.read_bytes()[4:8], "little")
    path.write_bytes(_with_u32(path.read_bytes(), begin, 1 << 31))
    shard = Shard(path, info)
    for get in (lambda: shard[0], lambda: shard.raw(0, "text")):
        with pytest.raises(DataError, match="sample 0 has not the length"):
            get()


def test_bytes_that_are_no_value_name_sample_and_column(tmp_path: Path) -> None:
    info = write(tmp_path, ["abc"], hashes=())[0]
    path = tmp_path / info.raw_basename
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match='column "text" of sample 0'):
        Shard(path, info)[0]


def test_refused_columns_leave_the_others_readable(tmp_path: Path) -> None:
    with MDSWriter(tmp_path, {"a": "bytes", "text": "str"}, hashes=()) as writer:
        writer.write({"a": b"cos\nsystem\n(S'false'\ntR.", "text": "t"})
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(b'["bytes"', b'["pkl"'))
    # The header is two bytes shorter now: mend offsets and size as a hostile writer would.
    shard_path = tmp_path / "shard.00000.mds"
    data = shard_path.read_bytes()
    for at in (4, 8):
        data = _with_u32(data, at, int.from_bytes(data[at : at + 4], "little") - 2)
    shard_path.write_bytes(data)
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"][0]["raw_data"]["bytes"] -= 2
    info = parse_index(json.dumps(index), "index.json")[0]
    shard = Shard(shard_path, info)
    assert shard.raw(0, "text") == b"t"
    with pytest.raises(DataError, match="runs the code"):
        shard[0]


# --- the index -----------------------------------------------------------------------------------


def _set(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change(index: Any) -> None:
        for key in keys[:-1]:
            index = index[key]
        index[keys[-1]] = value

    return change


SHARD = ("shards", 0)


@pytest.mark.parametrize(
    "change",
    [
        _set("version", value=1),
        _set("shards", value=[]),
        _set("shards", value={}),
        _set("more", value=1),
        _set(*SHARD, "more", value=1),
        _set(*SHARD, "format", value="json"),
        _set(*SHARD, "version", value=3),
        _set(*SHARD, "samples", value=-1),
        _set(*SHARD, "samples", value=True),
        _set(*SHARD, "samples", value=2**31),
        _set(*SHARD, "samples", value=1.5),
        _set(*SHARD, "raw_data", value=None),
        _set(*SHARD, "raw_data", "bytes", value=2**40),
        _set(*SHARD, "raw_data", "basename", value="../shard.mds"),
        _set(*SHARD, "raw_data", "basename", value="/etc/passwd"),
        _set(*SHARD, "raw_data", "basename", value=".."),
        _set(*SHARD, "raw_data", "basename", value="a\\b"),
        _set(*SHARD, "raw_data", "basename", value="index.json"),
        _set(*SHARD, "raw_data", "basename", value=""),
        _set(*SHARD, "raw_data", "hashes", value={"sha1": 1}),
        _set(*SHARD, "raw_data", value={"basename": "a"}),
        _set(*SHARD, "compression", value="zstd"),
        _set(*SHARD, "zip_data", value={"basename": "a", "bytes": 1, "hashes": {}}),
        _set(*SHARD, "column_names", value=["a", "b"]),
        _set(*SHARD, "column_names", value=[]),
        _set(*SHARD, "column_names", value=[1]),
        _set(*SHARD, "column_encodings", value=["strr"]),
        _set(*SHARD, "column_encodings", value=["ndarray:complex"]),
        _set(*SHARD, "column_sizes", value=[8]),
        _set("shards", 1, "raw_data", "basename", value="shard.00000.mds"),
    ],
)
def test_a_wrong_index_is_named(tmp_path: Path, change: Callable[[Any], None]) -> None:
    write(tmp_path, size_limit=1000)
    index = json.loads((tmp_path / "index.json").read_text())
    change(index)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=str(tmp_path / "index.json")):
        read_index(tmp_path / "index.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"shards": 1}', "[" * 100_000, "\ud800"])
def test_text_that_is_no_index(text: str) -> None:
    with pytest.raises(DataError, match="here"):
        parse_index(text.encode("utf-8", "surrogatepass"), "here")


def test_a_missing_index_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mosaicbert convert"):
        read_index(tmp_path / "index.json")


def test_headers_must_be_those_of_the_index(tmp_path: Path) -> None:
    info = write(tmp_path, ["abc"], hashes=())[0]
    path = tmp_path / info.raw_basename
    for change in ({"samples": 2}, {"column_names": ("txt",)}):
        with pytest.raises(DataError, match=r"shard\.00000\.mds"):
            Shard(path, ShardInfo(**{**vars(info), **change}))


# --- read-only folders ---------------------------------------------------------------------------


def test_a_read_only_folder_is_read_through_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = write(tmp_path / "data", compression="zstd")[0]
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(cache))
    monkeypatch.setattr(mds.os, "access", lambda *_: False)  # root may write anywhere
    raw = ensure_raw(tmp_path / "data", info)
    assert cache in raw.parents
    assert {path.name for path in (tmp_path / "data").iterdir()} == {
        "index.json",
        str(info.zip_basename),
    }
    assert stat.S_IMODE((cache / f"mosaicbert-{os.getuid()}").stat().st_mode) == 0o700
    assert ensure_raw(tmp_path / "data", info) == raw
    _flip(raw)
    with pytest.raises(DataError, match="damaged"):
        ensure_raw(tmp_path / "data", info)
