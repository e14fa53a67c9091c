"""The documents in a part of a source, in order, read strictly.

Files are UTF-8: JSON lines or one JSON array (`.jsonl .json .ndjson`), plain text (`.txt`: one
document a line, or paragraphs parted by blank lines), each also as `.gz`, `.zst` or `.bz2`, and
tables (`.parquet .csv .tsv`, see `mosaicbert.data.tables`).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mosaicbert.data.compression import decompressed
from mosaicbert.data.sources import FilePart, HubPart, Part, hub_dataset, kind_of
from mosaicbert.errors import DataError, did_you_mean

_CHUNK_BYTES = 1 << 20

Advance = Callable[[int], None]
"""Called with the number of bytes of input just read."""


class _RecordError(Exception):
    """A line (counted from the part's start) that is no document."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(number, what)
        self.number, self.what = number, what


def documents(
    part: Part, text_column: str, paragraphs: bool = False, advance: Advance = lambda _: None
) -> Iterator[str]:
    """The texts of one part, in order.

    Raises:
        DataError: a file is unreadable, damaged, not UTF-8 or malformed, or has no such column;
            names the file and the line.
    """
    if isinstance(part, HubPart):
        yield from _hub_documents(part, text_column)
        advance(part.size)
        return
    path = Path(part.path)
    kind, _ = kind_of(path)
    try:
        if kind == "table":
            yield from _table_documents(path, text_column)
            advance(part.size)
        elif kind == "json":
            yield from _json_documents(_lines(part, advance), text_column)
        else:
            yield from _text_documents(_lines(part, advance), paragraphs)
    except _RecordError as error:
        line = error.number + _lines_before(part)
        raise DataError(f"{path}, line {line}: {error.what}") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}. Fetch it anew.") from error


def _lines_before(part: FilePart) -> int:
    with open(part.path, "rb") as file:
        left, lines = part.start, 0
        while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
            lines += chunk.count(b"\n")
            left -= len(chunk)
    return lines


class _Metered:
    """A file that tells how much was read from it, and ends at `stop`."""

    def __init__(self, file: BinaryIO, part: FilePart, advance: Advance) -> None:
        self._file, self._advance = file, advance
        self._left = None if part.stop is None else part.stop - part.start
        file.seek(part.start)

    def read(self, size: int) -> bytes:
        data = self._file.read(size if self._left is None else min(size, self._left))
        if self._left is not None:
            self._left -= len(data)
        self._advance(len(data))
        return data


def _lines(part: FilePart, advance: Advance) -> Iterator[tuple[int, bytes]]:
    """The lines of a part without their ends, numbered from 1."""
    compression = kind_of(Path(part.path))[1]
    number, unfinished = 0, []
    with open(part.path, "rb") as file:
        metered: Any = _Metered(file, part, advance)
        chunks = (
            decompressed(compression, metered)
            if compression
            else iter(lambda: metered.read(_CHUNK_BYTES), b"")
        )
        for chunk in chunks:
            if b"\n" not in chunk:
                unfinished.append(chunk)
                continue
            *whole, last = b"".join([*unfinished, chunk]).split(b"\n")
            unfinished = [last]
            for line in whole:
                number += 1
                yield number, _clean(line, number == 1 and part.start == 0)
        if line := b"".join(unfinished):
            number += 1
            yield number, _clean(line, number == 1 and part.start == 0)


def _clean(line: bytes, is_first: bool) -> bytes:
    line = line.removesuffix(b"\r")
    return line.removeprefix(b"\xef\xbb\xbf") if is_first else line


def _decode(number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _RecordError(
            number,
            f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}. Save the "
            "file as UTF-8, for example with iconv -f WINDOWS-1252 -t UTF-8.",
        ) from None


def _text_documents(lines: Iterator[tuple[int, bytes]], paragraphs: bool) -> Iterator[str]:
    """One document a line, or one for the lines between blank lines."""
    document: list[str] = []
    for number, line in lines:
        text = _decode(number, line)
        if text.strip():
            if paragraphs:
                document.append(text)
            else:
                yield text
        elif document:
            yield "\n".join(document)
            document = []
    if document:
        yield "\n".join(document)


def _json_documents(lines: Iterator[tuple[int, bytes]], column: str) -> Iterator[str]:
    for number, line in lines:
        if not line.strip():
            continue
        text = _decode(number, line)
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            if text.lstrip().startswith("["):
                yield from _json_array(number, [text], lines, column)
                return
            raise _RecordError(
                number,
                f'not JSON ({error}). Each line is one object, such as {{"{column}": "..."}}.',
            ) from None
        for entry in record if isinstance(record, list) else [record]:
            yield _text_of(number, entry, column, has_escapes=b"\\u" in line)


def _json_array(
    number: int, texts: list[str], lines: Iterator[tuple[int, bytes]], column: str
) -> Iterator[str]:
    """The documents of an array over several lines, of which `texts` has the first."""
    texts.extend(_decode(i, line) for i, line in lines)
    try:
        records = json.loads("\n".join(texts))
    except json.JSONDecodeError as error:
        raise _RecordError(number + error.lineno - 1, f"not JSON ({error.msg}).") from None
    except RecursionError:
        raise _RecordError(number, "not JSON that can be read: it is nested too deep.") from None
    for at, record in enumerate(records):
        try:
            yield _text_of(number, record, column, has_escapes=True)
        except _RecordError as error:
            raise _RecordError(number, f"element {at} of the array: {error.what}") from None


def _text_of(number: int, record: Any, column: str, has_escapes: bool) -> str:
    if not isinstance(record, dict):
        raise _RecordError(number, f"a JSON {type(record).__name__}, where an object is expected.")
    text = record.get(column)
    if not isinstance(text, str):
        if column not in record:
            raise _RecordError(number, _no_column(column, record))
        raise _RecordError(number, f'"{column}" is no text but {json.dumps(text)[:60]}.')
    if has_escapes:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise _RecordError(
                number, f'"{column}" has half a character (\\ud800 to \\udfff).'
            ) from None
    return text


def _no_column(column: str, there: Any) -> str:
    names = ", ".join(map(str, there))
    hint = did_you_mean(column, there)
    return f'no column "{column}".{hint} There are: {names}. Choose one with --text_column.'


def _table_documents(path: Path, column: str) -> Iterator[str]:
    from mosaicbert.data.tables import iter_table  # pyarrow takes long to import

    row = 0
    for table in iter_table(path, [column], batch_rows=1024):
        for text in table[column]:
            row += 1
            if not isinstance(text, str):
                raise DataError(f'{path}, row {row}: "{column}" is no text but {text!r:.60}.')
            yield text


def _hub_documents(part: HubPart, column: str) -> Iterator[str]:
    dataset = hub_dataset(part.name, part.subset, part.split)
    if part.count > 1:
        dataset = dataset.shard(num_shards=part.count, index=part.index)
    where = f'"{part.name}", split {part.split}, part {part.index} of {part.count}'
    rows = iter(dataset)
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # as above
            raise DataError(f"{where}: reading failed after {number} rows: {error}") from error
        number += 1
        if column not in row:
            raise DataError(f"{where}: {_no_column(column, row)}")
        if not isinstance(row[column], str):
            raise DataError(
                f'{where}, row {number}: "{column}" is no text but {row[column]!r:.60}.'
            )
        yield row[column]
