"""Tables out: CSV, JSONL or parquet, part by part, visible when whole."""

import csv
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from mosaicbert.data.tables import Table
from mosaicbert.errors import ConfigError, DataError

SUFFIXES = (".jsonl", ".csv", ".parquet")
Write = Callable[[Table], None]


def check_output(output: str | Path) -> None:
    """Raise `ConfigError` where no table can be written."""
    if "://" in str(output):
        raise ConfigError(f"{output} is not on this machine. Write to a local file and copy it.")
    path = Path(output)
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: the name must end in one of {', '.join(SUFFIXES)}.")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder.")


@contextmanager
def open_table(path: Path) -> Iterator[Write]:
    """Gives a function that appends a part; the file gets its name when all went well.

    JSONL: one object a row; what JSON does not know, such as a date, as text. CSV: lists as JSON,
    None as an empty cell. Parquet: the narrowest types that hold a column's values as they are.

    Raises:
        ConfigError: the kind of file is not known by its name.
        DataError: it cannot be written, or a column mixes types (parquet).
    """
    check_output(path)
    part = path.with_name(f".{path.name}.part")
    opener = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[path.suffix]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with opener(part) as write:
            yield write
        os.replace(part, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}.") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(
            f"{path}: a text has half a character ({half!a}), which this format cannot hold. "
            "Write .jsonl."
        ) from error
    finally:
        with suppress(OSError):  # gone already, or never there
            part.unlink()


def _rows(table: Table) -> Iterator[tuple[Any, ...]]:
    return zip(*table.values(), strict=True)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


@contextmanager
def _jsonl(path: Path) -> Iterator[Write]:
    # half a character, which UTF-8 cannot hold, becomes an escape, as JSON writes it
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:

        def write(table: Table) -> None:
            for row in _rows(table):
                named = dict(zip(table, row, strict=True))
                file.write(_json(named) + "\n")

        yield write


@contextmanager
def _csv(path: Path) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="") as file:
        yield _csv_write(file)


def _csv_write(file: TextIO) -> Write:
    writer = csv.writer(file, lineterminator="\n")

    def write(table: Table) -> None:
        if file.tell() == 0:
            writer.writerow(table)
        for row in _rows(table):
            writer.writerow(_json(v) if isinstance(v, list) else v for v in row)

    return write


@contextmanager
def _parquet(path: Path) -> Iterator[Write]:
    writer: pq.ParquetWriter | None = None

    def write(table: Table) -> None:
        nonlocal writer
        try:
            part = pa.Table.from_pydict(table)
            before = writer.schema if writer else part.schema
            schema = pa.unify_schemas([before, part.schema], promote_options="permissive")
            if writer and not schema.equals(before):  # rare: such as a column's first value
                writer.close()
                writer = _widened(path, schema)
            writer = writer or pq.ParquetWriter(path, schema)
            writer.write_table(part.cast(schema))
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"A column changes its type, which parquet does not allow ({error}). Write .jsonl."
            ) from error
        except OverflowError as error:
            raise DataError(f"A number is too large for parquet: {error}. Write .jsonl.") from error

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


def _widened(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """The file's rows anew, in wider types; a writer to go on with."""
    narrow = path.with_name(path.name + ".narrow")
    os.replace(path, narrow)
    writer = pq.ParquetWriter(path, schema)
    try:
        with pq.ParquetFile(narrow) as file:
            for batch in file.iter_batches():
                writer.write_table(pa.Table.from_batches([batch]).cast(schema))
    except BaseException:
        writer.close()
        raise
    finally:
        narrow.unlink()
    return writer
