"""The index of an MDS data set, version 2: what shards there are and what is known of each."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosaicbert.data.compression import parse_compression
from mosaicbert.data.mds_encodings import find_encoding
from mosaicbert.data.mds_files import write_whole
from mosaicbert.errors import ConfigError, DataError

INDEX = "index.json"
MAX_SHARD_BYTES = (1 << 32) - 1
"""Offsets have 32 bits."""


@dataclass(frozen=True)
class ShardInfo:
    """What the index says of one shard. `zip_*` are None, 0 and empty without compression."""

    samples: int
    column_names: tuple[str, ...]
    column_encodings: tuple[str, ...]
    column_sizes: tuple[int | None, ...]
    compression: str | None
    raw_basename: str
    raw_bytes: int
    raw_hashes: Mapping[str, str]
    zip_basename: str | None
    zip_bytes: int
    zip_hashes: Mapping[str, str]
    size_limit: int | None

    def to_json(self) -> dict[str, Any]:
        """The shard's entry in `index.json`."""
        zip_data = _file_json(self.zip_basename, self.zip_bytes, self.zip_hashes)
        return {
            "column_encodings": list(self.column_encodings),
            "column_names": list(self.column_names),
            "column_sizes": list(self.column_sizes),
            "compression": self.compression,
            "format": "mds",
            "hashes": list(self.raw_hashes),
            "raw_data": _file_json(self.raw_basename, self.raw_bytes, self.raw_hashes),
            "samples": self.samples,
            "size_limit": self.size_limit,
            "version": 2,
            "zip_data": zip_data,
        }


def _file_json(name: str | None, size: int, hashes: Mapping[str, str]) -> dict[str, Any] | None:
    return None if name is None else {"basename": name, "bytes": size, "hashes": dict(hashes)}


def read_index(path: Path) -> list[ShardInfo]:
    """The shards that an `index.json` names, in order.

    Raises:
        DataError: the file is missing, or no index of MDS version 2; names the fault.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}). A data set is a folder with an {INDEX}: "
            "check the path and the split, or make one with `mosaicbert convert`."
        ) from error
    return parse_index(text, str(path))


def parse_index(text: str | bytes, where: str) -> list[ShardInfo]:
    """The same from the file's text; `where` names it in errors.

    Raises:
        DataError: the text is no index of MDS version 2, or a shard's file lies outside the folder.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON ({error}). Copy or convert it anew.") from error
    try:
        fields = _fields(content, {"shards": list, "version": int})
        if fields["version"] != 2:
            raise ValueError(f"version {fields['version']} of MDS; only version 2 is read")
        if not fields["shards"]:
            raise ValueError("it names no shards")
        shards = []
        for number, entry in enumerate(fields["shards"]):
            try:
                shards.append(parse_shard(entry))
            except ValueError as error:
                raise ValueError(f"shard {number}: {error}") from error
        names = [shard.raw_basename for shard in shards]
        if len(set(names)) < len(names):
            raise ValueError("it names a shard twice")
    except ValueError as error:
        raise DataError(
            f"{where} is no valid MDS index: {error}. Copy or convert it anew."
        ) from error
    return shards


def write_index(folder: Path, shards: Sequence[ShardInfo]) -> None:
    """Write `index.json`, whole or not at all."""
    content = {"shards": [shard.to_json() for shard in shards], "version": 2}
    with write_whole(folder / INDEX) as file:
        file.write(json.dumps(content, sort_keys=True).encode())


_SHARD_FIELDS: dict[str, Any] = {
    "column_encodings": list,
    "column_names": list,
    "column_sizes": list,
    "compression": str | None,
    "format": str,
    "hashes": list,
    "raw_data": dict,
    "samples": int,
    "size_limit": int | None,
    "version": int,
    "zip_data": dict | None,
}


def _fields(value: Any, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """`value` if it is an object of exactly these fields; ValueError names what is not."""
    if not isinstance(value, dict) or set(value) != set(kinds):
        there = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"expected the fields {sorted(kinds)}, found {there}")
    for key, kind in kinds.items():
        if not isinstance(value[key], kind) or isinstance(value[key], bool):
            raise ValueError(f'"{key}" is {value[key]!r}')
        if isinstance(value[key], int) and value[key] < 0:
            raise ValueError(f'"{key}" is negative')
    return value


def parse_shard(entry: Any) -> ShardInfo:
    """One entry of an index; ValueError says what is wrong with it."""
    fields = _fields(entry, _SHARD_FIELDS)
    if fields["format"] != "mds" or fields["version"] != 2:
        raise ValueError(f"format {fields['format']} {fields['version']} is not read, only mds 2")
    names, encodings = fields["column_names"], fields["column_encodings"]
    sizes = fields["column_sizes"]
    if not names or any(not isinstance(name, str) for name in [*names, *encodings]):
        raise ValueError(f"columns {names} of the encodings {encodings}")
    if names != sorted(set(names)) or not len(names) == len(encodings) == len(sizes):
        raise ValueError(f"columns {names}, encodings {encodings} and sizes {sizes} do not match")
    if sizes != [_size_of(encoding) for encoding in encodings]:
        raise ValueError(f"column sizes {sizes} are not those of {encodings}")
    raw_name, raw_bytes, raw_hashes = _file_fields(fields["raw_data"])
    if raw_bytes > MAX_SHARD_BYTES or raw_bytes < 4 * (fields["samples"] + 2):
        raise ValueError(f"{fields['samples']} samples in {raw_bytes} bytes cannot be")
    zip_name, zip_bytes = None, 0
    zip_hashes: dict[str, str] = {}
    if (fields["compression"] is None) != (fields["zip_data"] is None):
        raise ValueError('"compression" and "zip_data" do not match')
    if fields["compression"] is not None:
        try:
            parse_compression(fields["compression"])
        except ConfigError as error:
            raise ValueError(str(error)) from error
        zip_name, zip_bytes, zip_hashes = _file_fields(fields["zip_data"])
    return ShardInfo(
        samples=fields["samples"],
        column_names=tuple(names),
        column_encodings=tuple(encodings),
        column_sizes=tuple(sizes),
        compression=fields["compression"],
        raw_basename=raw_name,
        raw_bytes=raw_bytes,
        raw_hashes=raw_hashes,
        zip_basename=zip_name,
        zip_bytes=zip_bytes,
        zip_hashes=zip_hashes,
        size_limit=fields["size_limit"],
    )


def _size_of(encoding: str) -> int | None:
    try:
        return find_encoding(encoding).size
    except DataError as error:
        raise ValueError(str(error)) from error


def _file_fields(entry: Any) -> tuple[str, int, dict[str, str]]:
    fields = _fields(entry, {"basename": str, "bytes": int, "hashes": dict})
    name, hashes = fields["basename"], fields["hashes"]
    if name in ("", ".", "..", INDEX) or any(c in name for c in "/\\\0"):
        raise ValueError(f"file name {name!r}: shards must lie in the folder of the index")
    if any(not isinstance(value, str) for value in hashes.values()):
        raise ValueError(f"hashes {hashes}")
    return name, fields["bytes"], hashes
