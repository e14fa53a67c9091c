"""Files written whole or not at all, and files checked by their hashes."""

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from mosaicbert.errors import DataError

TEMPORARY_SUFFIX = ".tmp"
REMEDY = "Copy or convert this shard anew."
_XXHASHES: dict[str, Callable[[], Any]] = {
    "xxh32": xxhash.xxh32,
    "xxh64": xxhash.xxh64,
    "xxh128": xxhash.xxh128,
    "xxh3_64": xxhash.xxh3_64,
    "xxh3_128": xxhash.xxh3_128,
}


@contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write `path` with, which appears under its name only if all goes well.

    Raises:
        DataError: the disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror or error}). Free space or choose another "
            "folder."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()  # gone already, unless something went wrong


def new_hash(name: str) -> Any:
    """A hasher of that name: one of xxhash's or of hashlib's.

    Raises:
        DataError: there is none.
    """
    if name in _XXHASHES:
        return _XXHASHES[name]()
    if name in hashlib.algorithms_available and not name.startswith("shake"):
        return hashlib.new(name, usedforsecurity=False)
    known = [*_XXHASHES, *sorted(hashlib.algorithms_guaranteed)]
    raise DataError(f'hash "{name}" is unknown. Known are {", ".join(known)}.')


def verify(path: Path, size: int, hashes: Mapping[str, str]) -> None:
    """Check a shard's file against the size and all the hashes that the index has for it.

    Raises:
        DataError: the file is missing or unreadable, or differs; names it and what to do.
    """
    hashers = {name: new_hash(name) for name in hashes}
    total = 0
    try:
        with path.open("rb", buffering=0) as file:
            if (found := os.fstat(file.fileno()).st_size) != size:
                raise DataError(f"Shard {path} has {found} bytes, the index says {size}. {REMEDY}")
            while chunk := file.read(1 << 20):
                total += len(chunk)
                for hasher in hashers.values():
                    hasher.update(chunk)
    except OSError as error:
        raise DataError(f"Shard {path} cannot be read ({error.strerror}). {REMEDY}") from error
    for name, hasher in hashers.items():
        if (found := hasher.hexdigest()) != hashes[name]:
            raise DataError(
                f"Shard {path} is damaged: its {name} is {found}, the index says {hashes[name]}. "
                f"{REMEDY}"
            )


_verified: dict[str, tuple[int, int, int]] = {}


def verify_once(path: Path, size: int, hashes: Mapping[str, str]) -> None:
    """`verify`, but once in this process for the file as it is now."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"Shard {path} cannot be read ({error.strerror}). {REMEDY}") from error
    state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if _verified.get(str(path)) != state or stat.st_size != size:
        verify(path, size, hashes)
        _verified[str(path)] = state
