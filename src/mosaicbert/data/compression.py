"""Compressed files: the names MDS has for them, whole blocks, and streams that notice a cut end."""

import bz2
import gzip
import importlib
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import zstandard

from mosaicbert.errors import ConfigError, DataError

DEFAULT_LEVELS = {"zstd": 3, "gz": 9, "bz2": 9, "br": 11, "snappy": 0}
"""Compression names, and the level each has where none is given. Snappy has no levels."""
_HIGHEST_LEVELS = {"zstd": 22, "gz": 9, "bz2": 9, "br": 11, "snappy": 0}
_MODULES = {"br": ("brotli", "Brotli"), "snappy": ("snappy", "python-snappy")}
_CHUNK_BYTES = 1 << 18


def parse_compression(text: str) -> tuple[str, int]:
    """Name and level of `zstd`, `zstd:7`, `gz`, `bz2`, `br` or `snappy`.

    Raises:
        ConfigError: another name, or a level that the compression does not have.
    """
    name, colon, level = text.partition(":")
    if name not in DEFAULT_LEVELS or (colon and not level.isdecimal()):
        raise ConfigError(
            f'compression: "{text}" is unknown. Write one of {", ".join(DEFAULT_LEVELS)}, with a '
            "level if you like, such as zstd:7."
        )
    number = int(level) if colon else DEFAULT_LEVELS[name]
    if number > _HIGHEST_LEVELS[name]:
        raise ConfigError(f'compression: "{text}": the highest level is {_HIGHEST_LEVELS[name]}.')
    return name, number


def compress(text: str, data: bytes) -> bytes:
    """`data`, compressed as `text` (`zstd:7`) says. The same bytes for the same input, always."""
    name, level = parse_compression(text)
    if name == "zstd":
        return zstandard.ZstdCompressor(level=level).compress(data)
    if name == "gz":
        return gzip.compress(data, level, mtime=0)
    if name == "bz2":
        return bz2.compress(data, level)
    module = _optional_module(name)
    packed = module.compress(data, quality=level) if name == "br" else module.compress(data)
    return bytes(packed)


def decompress(text: str, file: BinaryIO, size: int) -> bytes:
    """The `size` bytes that `file` holds in compressed form; never makes more than that.

    Raises:
        ValueError: the file is damaged, cut short, or holds another number of bytes.
    """
    name, _ = parse_compression(text)
    if name in _MODULES:
        module = _optional_module(name)
        try:
            data = bytes(module.decompress(file.read()))
        except Exception as error:  # each of the two modules has its own kind
            raise ValueError(f"not {name} data: {error}") from error
    else:
        parts, total = [], 0
        for part in decompressed(name, file):
            parts.append(part)
            total += len(part)
            if total > size:
                raise ValueError(f"it holds more than {size} bytes")
        data = b"".join(parts)
    if len(data) != size:
        raise ValueError(f"it holds {len(data)} bytes, not {size}")
    return data


def decompressed(name: str, file: BinaryIO) -> Iterator[bytes]:
    """The content of a `zstd`, `gz` or `bz2` file in pieces, several members or frames included.

    Raises:
        ValueError: the file is damaged or cut short.
    """
    decoder, complete = _new_decoder(name), True
    try:
        while chunk := file.read(_CHUNK_BYTES):
            while chunk:
                part = decoder.decompress(chunk)
                if part:
                    yield part
                complete = decoder.eof
                chunk = decoder.unused_data if complete else b""
                if complete:
                    decoder = _new_decoder(name)
                    if name == "gz":  # zero padding after the last member, as gzip allows
                        chunk = chunk.lstrip(b"\0")
    except (zlib.error, zstandard.ZstdError, OSError, EOFError) as error:
        raise ValueError(f"not {name} data: {error}") from error
    if not complete:
        raise ValueError(f"the {name} data is cut short")


def _new_decoder(name: str) -> Any:
    if name == "zstd":
        return zstandard.ZstdDecompressor().decompressobj()
    return zlib.decompressobj(wbits=31) if name == "gz" else bz2.BZ2Decompressor()


def _optional_module(name: str) -> Any:
    module, package = _MODULES[name]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f'The compression "{name}" needs the package {package}: pip install {package}.'
        ) from error
