"""Tables of the user's own: CSV, TSV, JSONL (each also gzipped) and parquet, read strictly.

A table is `{column: values}`. CSV and TSV give strings; JSONL and parquet give what the file holds.
Files are UTF-8, with a header (CSV, TSV) or the same keys on every line (JSONL). CSV is quoted as
RFC 4180 says; in TSV a quote is a letter like any other, as in GLUE's files.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import fsspec

from mosaicbert.errors import DataError, did_you_mean

Table = dict[str, list[Any]]
FORMATS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_LONGEST_CELL = 1 << 30  # characters; the csv module's own limit of 131,072 is short for documents


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> Table:
    """The whole table, or some of its columns.

    Raises:
        DataError: as `iter_table`.
    """
    table: Table = {}
    for part in iter_table(path, columns):
        for name, values in part.items():
            table.setdefault(name, []).extend(values)
    return table


def iter_table(
    path: str | Path, columns: Sequence[str] | None = None, batch_rows: int = 10_000
) -> Iterator[Table]:
    """The table in parts of up to `batch_rows` rows, for files of any size.

    `path` is a file or anything fsspec opens, such as `s3://...` or `hf://datasets/...`.

    Raises:
        DataError: the file is missing, empty, of an unknown kind, damaged or not UTF-8, a row is
            malformed (with its line), or a column is missing (with those there are).
    """
    with _open(path) as stream:
        kind = _format_of(path)
        if kind == "parquet":
            parts = _parquet_parts(path, stream, columns, batch_rows)
        else:
            rows = _json_rows if kind == "jsonl" else _csv_rows if kind == "csv" else _tsv_rows
            parts = _row_parts(path, rows(path, _lines(path, stream)), columns, batch_rows)
        has_rows = False
        for part in parts:
            has_rows = True
            yield part
    if not has_rows:
        raise DataError(f"{path} has no rows. Each row after the header is one example.")


def text_lines(path: str | Path) -> Iterator[str]:
    """Lines of a UTF-8 text file (also gzipped), with their ends.

    Raises:
        DataError: the file is missing, damaged or not UTF-8 (with the line).
    """
    with _open(path) as stream:
        yield from _lines(path, stream)


def half_character(text: str) -> str | None:
    """The first half of a surrogate pair that stands alone, as an escape; None: there is none.

    JSON can hold it, UTF-8 cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ascii(text[error.start])
    return None


def _format_of(path: str | Path) -> str:
    name = str(path).lower().removesuffix(".gz")
    for suffix, kind in FORMATS.items():
        if name.endswith(suffix):
            return kind
    raise DataError(
        f"{path}: the kind of this file is not known by its name. It must end in one of "
        f"{', '.join(FORMATS)} (text formats also with .gz)."
    )


def _open(path: str | Path) -> IO[bytes]:
    if "://" not in str(path):
        local = Path(path)
        if local.is_dir():
            raise DataError(f"{path} is a folder. Name one file in it.")
        if not local.exists():
            beside = [f.name for f in local.parent.iterdir()] if local.parent.is_dir() else []
            raise DataError(f"{path} does not exist.{did_you_mean(local.name, beside)}")
    try:
        return cast(IO[bytes], fsspec.open(str(path), "rb").open())
    except Exception as error:  # every store's client has its own kinds
        raise DataError(f"{path} cannot be opened: {error}") from error


def _lines(path: str | Path, stream: IO[bytes]) -> Iterator[str]:
    """Decoded lines with their ends; a bad byte is reported with the line it stands on."""
    for number, line in enumerate(_raw_lines(path, stream), 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise DataError(
                f"{path}, line {number}: byte 0x{byte:02x} at position {error.start + 1} "
                "is not UTF-8. Save the file as UTF-8, for example with iconv -f WINDOWS-1252 "
                "-t UTF-8."
            ) from error


def _raw_lines(path: str | Path, stream: IO[bytes]) -> Iterator[bytes]:
    try:
        yield from gzip.GzipFile(fileobj=stream) if str(path).lower().endswith(".gz") else stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    except Exception as error:  # every store's client has its own kinds
        raise DataError(f"{path} cannot be read: {error}") from error


Row = tuple[int, dict[str, Any]]  # line number, column -> value


def _csv_rows(path: str | Path, lines: Iterator[str]) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    first_line = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}: the row that begins on line {first_line} is malformed CSV: {error}. "
                'A cell with commas, quotes or newlines stands in "..." with its quotes doubled.'
            ) from error
        if header is None:
            header = _checked_header(path, cells)
        else:
            yield first_line, _as_row(path, first_line, header, cells)
        first_line = reader.line_num + 1


def _tsv_rows(path: str | Path, lines: Iterator[str]) -> Iterator[Row]:
    header: list[str] | None = None
    for number, line in enumerate(lines, 1):
        text = line.rstrip("\r\n")
        cells = text.split("\t") if text else []
        if header is None:
            header = _checked_header(path, cells)
        else:
            yield number, _as_row(path, number, header, cells)


def _checked_header(path: str | Path, header: list[str]) -> list[str]:
    if not header:
        raise DataError(f"{path}: the first line is empty. It must name the columns.")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}: the header names {twice} more than once.")
    return header


def _as_row(path: str | Path, line: int, header: list[str], cells: list[str]) -> dict[str, Any]:
    if cells and len(cells) != len(header):
        raise DataError(
            f"{path}, line {line}: {len(cells)} cells where the header names {len(header)} columns "
            f"({', '.join(header)})."
        )
    return dict(zip(header, cells, strict=False))  # a blank line becomes an empty row


def _json_rows(path: str | Path, lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            yield number, {}
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({error}). Each line is one object, such as "
                '{"text": "...", "label": "..."}.'
            ) from error
        if not isinstance(row, dict) or not row:
            raise DataError(
                f"{path}, line {number}: a JSON {type(row).__name__} where one object "
                '{"column": value, ...} a line is expected.'
            )
        yield number, row


def _row_parts(
    path: str | Path, rows: Iterator[Row], columns: Sequence[str] | None, batch_rows: int
) -> Iterator[Table]:
    """Rows gathered into columns. Blank lines may end a file, and stand nowhere else."""
    wanted = list(columns) if columns is not None else None
    part: Table = {}
    blank_line = None
    for line, row in rows:
        if not row:
            blank_line = blank_line or line
            continue
        if blank_line is not None:
            raise DataError(f"{path}, line {blank_line} is empty, but more rows follow it.")
        if wanted is None:
            wanted = list(row)
        missing = [name for name in wanted if name not in row]
        if missing:
            raise _missing_column(f"{path}, line {line}", missing[0], list(row))
        if columns is None and len(row) != len(wanted):
            extra = next(name for name in row if name not in wanted)
            raise DataError(f'{path}, line {line}: column "{extra}" is not on the first line.')
        for name in wanted:
            part.setdefault(name, []).append(row[name])
        if len(part[wanted[0]]) == batch_rows:
            yield part
            part = {}
    if part:
        yield part


def _parquet_parts(
    path: str | Path, stream: IO[bytes], columns: Sequence[str] | None, batch_rows: int
) -> Iterator[Table]:
    import pyarrow as pa  # here, as it takes long to import and text formats do without
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(stream)
        names = file.schema_arrow.names
        wanted = list(columns) if columns is not None else names
        for name in wanted:
            if name not in names:
                raise _missing_column(str(path), name, names)
        for batch in file.iter_batches(batch_size=batch_rows, columns=wanted):
            if batch.num_rows:
                yield {name: batch.column(name).to_pylist() for name in wanted}
    except (pa.ArrowException, OSError, ValueError) as error:  # also text that is not UTF-8
        raise DataError(f"{path} is not a whole parquet file: {error}") from error


def _missing_column(where: str, name: str, there: list[str]) -> DataError:
    hint = did_you_mean(name, there)
    if len(there) == 1 and ";" in there[0]:
        hint = " The columns seem to be separated by semicolons; save the file with commas."
    listed = ", ".join(f'"{column}"' for column in there)
    return DataError(f'{where}: there is no column "{name}".{hint} Columns: {listed}.')
