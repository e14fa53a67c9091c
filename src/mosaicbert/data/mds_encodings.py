"""Column encodings of MDS: how one value of a sample becomes bytes, and back.

`bytes str int json`, the fixed-size scalars `uint8 .. float64`, the digits `str_int str_float
str_decimal`, and `ndarray[:dtype[:shape]]`. Pickles are refused, for reading one runs code; so
are images, for which a text model has no use.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache, partial
from typing import Any, NoReturn

import numpy as np

from mosaicbert.errors import DataError, did_you_mean

_DTYPE_CODES = {
    "uint8": 8,
    "int8": 9,
    "uint16": 16,
    "int16": 17,
    "float16": 18,
    "uint32": 32,
    "int32": 33,
    "float32": 34,
    "uint64": 64,
    "int64": 65,
    "float64": 66,
}
_DTYPES_BY_CODE = {code: dtype for dtype, code in _DTYPE_CODES.items()}
_DIMENSION_DTYPES = ("<u1", "<u2", "<u4", "<u8")
_MAX_DIMENSIONS = 63
_REFUSED = {
    "pkl": "it holds pickles, and reading a pickle runs the code in it",
    "jpeg": "it holds images",
    "png": "it holds images",
    "pil": "it holds images",
}


@dataclass(frozen=True)
class Encoding:
    """One column encoding.

    `size` is the number of bytes of every value, or None where it varies. `encode` raises TypeError
    or ValueError for a value of another kind, `decode` ValueError for bytes that are none.
    """

    size: int | None
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


@lru_cache(maxsize=256)
def find_encoding(name: str) -> Encoding:
    """The encoding of that name, such as `str` or `ndarray:uint16`.

    The refused ones are found too, so that the other columns of a set stay readable; their `encode`
    and `decode` raise DataError.

    Raises:
        DataError: there is no such encoding.
    """
    kind, _, rest = name.partition(":")
    if kind in _REFUSED:
        refuse = partial(_refuse, name)
        return Encoding(None, refuse, refuse)
    if kind == "ndarray":
        return _ndarray_encoding(name, rest)
    if name in _DTYPE_CODES:
        return _scalar_encoding(name)
    if name in _SIMPLE:
        return _SIMPLE[name]
    known = [*_SIMPLE, *_DTYPE_CODES, "ndarray"]
    raise DataError(
        f'MDS column encoding "{name}" is unknown.{did_you_mean(name, known)} '
        f"Known are {', '.join(known)}."
    )


def _refuse(name: str, _: object) -> NoReturn:
    reason = _REFUSED[name.split(":")[0]]
    raise DataError(
        f'MDS columns of the encoding "{name}" are neither read nor written: {reason}. '
        "Write the data set without this column."
    )


def _instance_of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _digits(kind: type) -> Encoding:
    def decode(data: bytes) -> Any:
        try:
            return kind(data.decode("ascii"))
        except InvalidOperation as error:
            raise ValueError(f"{data[:40]!r} is no number") from error

    return Encoding(None, lambda value: str(_instance_of(kind, value)).encode("ascii"), decode)


def _encode_int(value: int) -> bytes:
    try:
        return int(_instance_of(int, value)).to_bytes(8, "little", signed=True)
    except OverflowError as error:
        raise ValueError(f"{value} does not fit into 64 bits") from error


_SIMPLE = {
    "bytes": Encoding(None, lambda value: bytes(_instance_of(bytes, value)), lambda data: data),
    "str": Encoding(
        None,
        lambda value: _instance_of(str, value).encode("utf-8"),
        lambda data: data.decode("utf-8"),
    ),
    "int": Encoding(8, _encode_int, lambda data: int.from_bytes(data, "little", signed=True)),
    "json": Encoding(None, lambda value: json.dumps(value).encode("utf-8"), json.loads),
    "str_int": _digits(int),
    "str_float": _digits(float),
    "str_decimal": _digits(Decimal),
}


def _little_endian(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def _scalar_encoding(name: str) -> Encoding:
    dtype = _little_endian(name)
    return Encoding(
        dtype.itemsize,
        lambda value: np.array(value, dtype).tobytes(),
        lambda data: np.frombuffer(data, dtype)[0],
    )


def _ndarray_encoding(name: str, rest: str) -> Encoding:
    """`ndarray`, `ndarray:dtype` or `ndarray:dtype:2,3`: what the name fixes is not stored.

    Stored: the dtype's code (1 byte), then `number of axes << 2 | width of a dimension` (1 byte)
    and the dimensions, then the values in C order.
    """
    dtype, _, axes = rest.partition(":")
    try:
        shape = tuple(int(axis) for axis in axes.split(",")) if axes else None
        if (dtype and dtype not in _DTYPE_CODES) or (shape and min(shape) < 1):
            raise ValueError(name)
    except ValueError as error:
        raise DataError(
            f'MDS column encoding "{name}" is malformed: write ndarray, ndarray:DTYPE or '
            f"ndarray:DTYPE:2,3 with DTYPE one of {', '.join(_DTYPE_CODES)}."
        ) from error
    fixed = dtype and shape
    return Encoding(
        math.prod(shape) * np.dtype(dtype).itemsize if fixed and shape else None,
        partial(_encode_array, dtype or None, shape),
        partial(_decode_array, dtype or None, shape),
    )


def _encode_array(dtype: str | None, shape: tuple[int, ...] | None, value: Any) -> bytes:
    array = np.asarray(_instance_of(np.ndarray, value))
    if array.dtype.name not in _DTYPE_CODES or (dtype and array.dtype.name != dtype):
        raise TypeError(f"expected an array of {dtype or 'numbers'}, got {array.dtype.name}")
    if shape and array.shape != shape:
        raise ValueError(f"expected an array of shape {shape}, got {array.shape}")
    if not 1 <= array.ndim <= _MAX_DIMENSIONS or array.size == 0:
        raise ValueError(f"arrays need 1 to {_MAX_DIMENSIONS} axes and a value: {array.shape}")
    parts = [] if dtype else [bytes([_DTYPE_CODES[array.dtype.name]])]
    if not shape:
        width = next(w for w in range(4) if max(array.shape) < 1 << (8 << w))
        parts.append(bytes([array.ndim << 2 | width]))
        parts.append(np.array(array.shape, _DIMENSION_DTYPES[width]).tobytes())
    parts.append(array.astype(_little_endian(array.dtype.name), copy=False).tobytes())
    return b"".join(parts)


def _decode_array(dtype: str | None, shape: tuple[int, ...] | None, data: bytes) -> Any:
    at = 0
    if dtype is None:
        code = data[0] if data else 0
        if code not in _DTYPES_BY_CODE:
            raise ValueError(f"{code} is no code of an array dtype")
        dtype, at = _DTYPES_BY_CODE[code], 1
    if shape is None:
        if len(data) <= at:
            raise ValueError("the array ends before its shape")
        ndim, width = data[at] >> 2, data[at] & 3
        end = at + 1 + (ndim << width)
        if len(data) < end:
            raise ValueError("the array ends before its shape")
        shape = tuple(np.frombuffer(data[at + 1 : end], _DIMENSION_DTYPES[width]).tolist())
        at = end
    kind = _little_endian(dtype)
    if math.prod(shape) * kind.itemsize != len(data) - at:
        raise ValueError(f"{len(data) - at} bytes are no {dtype} array of shape {shape}")
    return np.frombuffer(data, kind, offset=at).reshape(shape)
