"""MDS, the shard format of streaming data sets, version 2: reader and writer.

A data set is a folder with `index.json` and shards. A raw shard, little-endian throughout:

    u32 number of samples | u32 offset[n + 1], from the start of the file | JSON of the columns |
    samples: the u32 sizes of the columns of varying size, then every column's bytes

with the columns in the order of their names. A compressed shard is such a file, compressed.
"""

import hashlib
import json
import logging
import mmap
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from mosaicbert.data.compression import compress, decompress, parse_compression
from mosaicbert.data.mds_encodings import find_encoding
from mosaicbert.data.mds_files import REMEDY, new_hash, verify, verify_once, write_whole
from mosaicbert.data.mds_index import (
    INDEX,
    MAX_SHARD_BYTES,
    ShardInfo,
    parse_index,
    read_index,
    write_index,
)
from mosaicbert.errors import DataError

__all__ = [
    "INDEX",
    "MDSWriter",
    "Shard",
    "ShardInfo",
    "ensure_raw",
    "parse_index",
    "read_index",
    "verify",
    "write_index",
]

log = logging.getLogger(__name__)

_U32 = struct.Struct("<I")
_U32_PAIR = struct.Struct("<II")


class Shard:
    """One raw shard, mapped into memory, read-only. `len(shard)` samples, `shard[i]` decoded.

    The file is taken to be the one that `verify` checked; what a damaged or hostile file can do is
    raise DataError, for every offset and length is checked before it is used.

    Args:
        path: the raw shard.
        info: its entry in the index.

    Raises:
        DataError: the file is missing, or its header is not what the index says.
    """

    def __init__(self, path: Path, info: ShardInfo) -> None:
        self.path = path
        self.info = info
        self._columns = {name: at for at, name in enumerate(info.column_names)}
        self._num_sizes = info.column_sizes.count(None)
        self._is_single = info.column_sizes == (None,)
        self._decoders = [find_encoding(name).decode for name in info.column_encodings]
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != info.raw_bytes:
                    raise self._damaged(f"it has not the {info.raw_bytes} bytes of the index")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"Shard {path} cannot be read ({error.strerror}). {REMEDY}") from error
        try:
            self._check_header()
        except DataError:
            self._map.close()
            raise

    def _check_header(self) -> None:
        num_samples = _U32.unpack_from(self._map)[0]
        if num_samples != self.info.samples:
            raise self._damaged(f"it has {num_samples} samples, the index says {self.info.samples}")
        columns_start = 4 * (num_samples + 2)  # the index was checked to allow this many
        offsets = np.frombuffer(self._map[4:columns_start], "<u4")
        if offsets[0] < columns_start or offsets[-1] != len(self._map):
            raise self._damaged("its offsets do not span the file")
        if np.any(offsets[1:] < offsets[:-1]):
            raise self._damaged("its offsets go backwards")
        try:
            columns = json.loads(self._map[columns_start : int(offsets[0])])
            same = all(
                tuple(columns[f"column_{what}"]) == getattr(self.info, f"column_{what}")
                for what in ("names", "encodings", "sizes")
            )
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self._damaged("its header is no description of columns") from error
        if not same:
            raise self._damaged("its columns are not those of the index")

    def _damaged(self, what: str) -> DataError:
        return DataError(f"Shard {self.path} is damaged: {what}. {REMEDY}")

    def __len__(self) -> int:
        return self.info.samples

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Sample `i`, decoded: a value for each column.

        Raises:
            IndexError: there is no such sample.
            DataError: it is damaged, or has a column that is not read (see `mds_encodings`).
        """
        values = {}
        for name, (begin, end), decode in zip(
            self._columns, self._spans(i), self._decoders, strict=True
        ):
            try:
                values[name] = decode(self._map[begin:end])
            except (ValueError, RecursionError) as error:
                raise self._damaged(f'column "{name}" of sample {i}: {error}') from error
        return values

    def raw(self, i: int, column: str) -> bytes:
        """The bytes of one column of sample `i`, not decoded: the UTF-8 of a `str`.

        Raises:
            IndexError: there is no such sample.
            KeyError: there is no such column.
            DataError: the sample is damaged.
        """
        at = self._columns[column]
        if not self._is_single:
            begin, end = self._spans(i)[at]
            return self._map[begin:end]
        if not 0 <= i < self.info.samples:
            raise IndexError(f"sample {i} of {self.info.samples}")
        begin, end = _U32_PAIR.unpack_from(self._map, 4 + 4 * i)
        if end - begin < 4 or _U32.unpack_from(self._map, begin)[0] != end - begin - 4:
            raise self._damaged(f"sample {i} has not the length it says")
        return self._map[begin + 4 : end]

    def _spans(self, i: int) -> list[tuple[int, int]]:
        """Where in the file each column of sample `i` lies."""
        if not 0 <= i < self.info.samples:
            raise IndexError(f"sample {i} of {self.info.samples}")
        begin, end = _U32_PAIR.unpack_from(self._map, 4 + 4 * i)
        at = begin + 4 * self._num_sizes
        if at > end:
            raise self._damaged(f"sample {i} is shorter than its header")
        varying = iter(struct.unpack_from(f"<{self._num_sizes}I", self._map, begin))
        spans = []
        for fixed in self.info.column_sizes:
            size = next(varying) if fixed is None else fixed
            spans.append((at, at + size))
            at += size
        if at != end:
            raise self._damaged(f"sample {i} has not the length it says")
        return spans

    def close(self) -> None:
        """Let go of the file."""
        self._map.close()


def ensure_raw(
    folder: Path, info: ShardInfo, keep_zip: bool = True, raw_folder: Path | None = None
) -> Path:
    """The path of a shard's raw file, checked, and decompressed where only the zip file is there.

    Each file is checked once in this process as long as it does not change. Raw files go to
    `raw_folder`, or into `folder`, or, where that cannot be written to, to a cache of this user's
    in the system's temporary folder.

    Raises:
        DataError: neither file is there, or the one that is differs from what the index says.
    """
    raw = folder / info.raw_basename
    if not raw.exists() and info.zip_basename is not None:
        packed = folder / info.zip_basename
        if not packed.exists():
            raise DataError(f"Shard {raw} is missing, and so is {packed.name}. {REMEDY}")
        if raw_folder is not None:
            raw = raw_folder / info.raw_basename
        elif not os.access(folder, os.W_OK):
            raw = _cache_folder(folder) / info.raw_basename
        if not raw.exists():
            _decompress_shard(packed, raw, info)
        if not keep_zip and raw.parent == folder:
            packed.unlink(missing_ok=True)
    verify_once(raw, info.raw_bytes, info.raw_hashes)
    return raw


def _decompress_shard(packed: Path, raw: Path, info: ShardInfo) -> None:
    assert info.compression is not None
    verify_once(packed, info.zip_bytes, info.zip_hashes)
    try:
        with packed.open("rb") as file:
            data = decompress(info.compression, file, info.raw_bytes)
    except (OSError, ValueError) as error:
        raise DataError(f"Shard {packed} is damaged: {error}. {REMEDY}") from error
    if _hashes(data, tuple(info.raw_hashes)) != info.raw_hashes:
        raise DataError(f"Shard {packed} is damaged: its content has another hash. {REMEDY}")
    with write_whole(raw) as file:
        file.write(data)


def _cache_folder(folder: Path) -> Path:
    """Where the raw shards of a read-only `folder` go: the same for all processes of this user."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    root = Path(tempfile.gettempdir()) / f"mosaicbert-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid() or root.is_symlink():
        raise DataError(f"{root} belongs to another user. Set TMPDIR to a folder of your own.")
    if not (root / name).exists():
        log.warning("%s is read-only: its shards are decompressed to %s", folder, root / name)
    (root / name).mkdir(exist_ok=True)
    return root / name


def _hashes(data: bytes, names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        hasher = new_hash(name)
        hasher.update(data)
        found[name] = hasher.hexdigest()
    return found


class MDSWriter:
    """Writes samples to shards, and `index.json` last; a context manager.

    Every file appears under its name only when it is whole. Leaving the context by an exception
    writes no index. The same samples and settings give the same bytes.

    Args:
        out: folder, made if need be.
        columns: name -> encoding, such as `{"text": "str"}`.
        compression: such as `zstd`, `zstd:7`, `gz`; None writes raw shards.
        hashes: what the index has of each file.
        size_limit: most bytes of a raw shard, unless a single sample is larger.
        prefix: shards are named `{prefix}.00000.mds` and so on.
        with_index: False leaves `index.json` to the caller, who gets the shards from `finish`.

    Raises:
        ConfigError: unknown compression.
        DataError: unknown encoding or hash; the folder cannot be written to.
    """

    def __init__(
        self,
        out: Path,
        columns: Mapping[str, str],
        *,
        compression: str | None = None,
        hashes: Sequence[str] = ("sha1", "xxh64"),
        size_limit: int = 1 << 26,
        prefix: str = "shard",
        with_index: bool = True,
    ) -> None:
        if compression is not None:
            parse_compression(compression)
        self._hashes = tuple(sorted(set(hashes)))
        _hashes(b"", self._hashes)
        self._folder, self._prefix, self._with_index = out, prefix, with_index
        self._compression, self._size_limit = compression, size_limit
        self._names = sorted(columns)
        self._encodings = [find_encoding(columns[name]) for name in self._names]
        self._columns: dict[str, Any] = {
            "column_encodings": [columns[name] for name in self._names],
            "column_names": self._names,
            "column_sizes": [encoding.size for encoding in self._encodings],
        }
        config = {
            **self._columns,
            "compression": compression,
            "format": "mds",
            "hashes": list(self._hashes),
            "size_limit": size_limit,
            "version": 2,
        }
        self._header = json.dumps(config, sort_keys=True).encode()
        self._samples: list[bytes] = []
        self._bytes = 0
        self._shards: list[ShardInfo] = []
        self._make_folder()

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{self._folder} cannot be made ({error.strerror}). Choose another folder."
            ) from error

    def write(self, sample: Mapping[str, Any]) -> None:
        """Add one sample: a value for each column and nothing else.

        Raises:
            DataError: columns are missing or unknown, or a value is of another kind.
        """
        if sample.keys() != set(self._names):
            raise DataError(f"sample has the columns {sorted(sample)}, not {self._names}")
        sizes, bodies = [], []
        for name, encoding in zip(self._names, self._encodings, strict=True):
            try:
                body = encoding.encode(sample[name])
            except (TypeError, ValueError) as error:
                raise DataError(f'column "{name}": {error}') from error
            if encoding.size is None:
                sizes.append(_U32.pack(len(body)))
            bodies.append(body)
        data = b"".join(sizes + bodies)
        overhead = 4 + 4 + len(self._header)
        if self._samples and self._bytes + len(data) + 4 > self._size_limit:
            self._flush()
        if overhead + 4 + len(data) > MAX_SHARD_BYTES:
            raise DataError(f"a sample of {len(data)} bytes is too large for an MDS shard (4 GiB)")
        if not self._samples:
            self._bytes = overhead
        self._samples.append(data)
        self._bytes += len(data) + 4

    def _flush(self) -> None:
        """Write the shard that the samples so far make."""
        num_samples = len(self._samples)
        offsets = np.zeros(num_samples + 1, np.int64)
        np.cumsum([len(sample) for sample in self._samples], out=offsets[1:])
        offsets += 4 * (num_samples + 2) + len(self._header)
        head = [_U32.pack(num_samples), offsets.astype("<u4").tobytes(), self._header]
        data = b"".join(head + self._samples)
        self._samples = []
        name = f"{self._prefix}.{len(self._shards):05d}.mds"
        zip_name, zip_bytes = None, 0
        zip_hashes: dict[str, str] = {}
        raw_hashes, raw_bytes = _hashes(data, self._hashes), len(data)
        if self._compression is not None:
            data = compress(self._compression, data)
            zip_name = f"{name}.{self._compression.split(':')[0]}"
            zip_bytes, zip_hashes = len(data), _hashes(data, self._hashes)
        with write_whole(self._folder / (zip_name or name)) as file:
            file.write(data)
        self._shards.append(
            ShardInfo(
                samples=num_samples,
                column_names=tuple(self._names),
                column_encodings=tuple(self._columns["column_encodings"]),
                column_sizes=tuple(self._columns["column_sizes"]),
                compression=self._compression,
                raw_basename=name,
                raw_bytes=raw_bytes,
                raw_hashes=raw_hashes,
                zip_basename=zip_name,
                zip_bytes=zip_bytes,
                zip_hashes=zip_hashes,
                size_limit=self._size_limit,
            )
        )

    def finish(self) -> list[ShardInfo]:
        """Write what is left, and the index; returns the shards.

        Raises:
            DataError: nothing was written to the set (with an index), or the disk is full.
        """
        if self._samples:
            self._flush()
        if self._with_index:
            if not self._shards:
                raise DataError(f"{self._folder}: no samples were written, so there is no data set")
            write_index(self._folder, self._shards)
        return self._shards

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.finish()
