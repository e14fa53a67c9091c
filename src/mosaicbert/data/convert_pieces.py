"""A piece of a conversion: some of the documents, made into shards of their own."""

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from mosaicbert.data.convert_samples import SampleForm, to_samples
from mosaicbert.data.documents import documents
from mosaicbert.data.mds import MDSWriter, ShardInfo
from mosaicbert.data.mds_files import write_whole
from mosaicbert.data.mds_index import parse_shard
from mosaicbert.data.sources import Part
from mosaicbert.errors import DataError

log = logging.getLogger(__name__)

PARTS = "parts"
"""Folder of the records of pieces that are done."""
_REPORT_EVERY = 256


@dataclass(frozen=True)
class Request:
    """All that decides what is written for one split (the number of processes does not)."""

    dataset: str
    data_subset: str | None
    split: str
    limit: int | None = None
    """Only so many documents, the first ones."""
    text_column: str = "text"
    paragraphs: bool = False
    val_fraction: float | None = None
    """Share of the documents held out of the training splits for the validation splits."""
    held_out: bool = False
    """Whether this split takes the held-out documents."""
    compression: str | None = None
    size_limit: int = 1 << 26
    form: SampleForm = field(default_factory=SampleForm)


@dataclass(frozen=True)
class Piece:
    """Piece `index` of `count`, and where its documents lie."""

    index: int
    count: int
    parts: tuple[Part, ...]

    @property
    def prefix(self) -> str:
        """How the names of its shards begin."""
        return f"shard.{self.index:05d}"

    @property
    def size(self) -> int:
        """Bytes of input, or for the hub the number of parts."""
        return sum(part.size for part in self.parts)

    def key(self) -> list[Any]:
        """What tells it from other pieces, on any machine."""
        return [self.count, [part.key for part in self.parts]]


@dataclass(frozen=True)
class Progress:
    """What was done since the last report."""

    input_bytes: int = 0
    documents: int = 0
    characters: int = 0

    def __add__(self, other: "Progress") -> "Progress":
        return Progress(
            self.input_bytes + other.input_bytes,
            self.documents + other.documents,
            self.characters + other.characters,
        )


Report = Callable[[Progress], None]


# --- making a piece ------------------------------------------------------------------------------


def convert_piece(folder: Path, request: Request, piece: Piece, report: Report) -> None:
    """Write the shards of one piece, then its record.

    Raises:
        DataError: the source is damaged or missing, or the folder cannot be written to.
    """
    discard(folder, piece.index)
    meter = _Meter(report, piece.size / request.limit if request.limit else None)
    writer = MDSWriter(
        folder,
        request.form.columns(),
        compression=request.compression,
        size_limit=request.size_limit,
        prefix=piece.prefix,
        with_index=False,
    )
    texts = meter.counted(_documents(request, piece, meter.read))
    num_samples = 0
    for sample in to_samples(texts, request.form):
        writer.write(sample)
        num_samples += 1
    shards = writer.finish()
    meter.flush()
    record = {
        "key": piece.key(),
        "documents": meter.documents,
        "samples": num_samples,
        "characters": meter.characters,
        "shards": [shard.to_json() for shard in shards],
    }
    with write_whole(record_path(folder, piece.index)) as file:
        file.write(json.dumps(record).encode())


def _documents(request: Request, piece: Piece, advance: Callable[[int], None]) -> Iterator[str]:
    texts: Iterator[str] = itertools.chain.from_iterable(
        documents(part, request.text_column, request.paragraphs, advance) for part in piece.parts
    )
    if request.val_fraction is not None:
        border = int(request.val_fraction * 2.0**64)
        # By the text's own hash: the same text twice is never on both sides.
        texts = (t for t in texts if (_text_hash(t) < border) == request.held_out)
    return itertools.islice(texts, request.limit)


def _text_hash(text: str) -> int:
    return xxhash.xxh64_intdigest(text.encode("utf-8"))


class _Meter:
    """Counts what a piece reads, and reports it now and then.

    Of a source that is not read to its end, each document counts as `bytes_per_document`, so
    that the work is seen to come to its end.
    """

    def __init__(self, report: Report, bytes_per_document: float | None) -> None:
        self._report = report
        self._bytes_per_document = bytes_per_document
        self._input_bytes = 0
        self._reported = (0, 0)
        self.documents = 0
        self.characters = 0

    def read(self, num_bytes: int) -> None:
        self._input_bytes += num_bytes

    def counted(self, texts: Iterator[str]) -> Iterator[str]:
        for text in texts:
            self.documents += 1
            self.characters += len(text)
            if self.documents % _REPORT_EVERY == 0:
                self.flush()
            yield text

    def flush(self) -> None:
        documents_before, characters_before = self._reported
        self._reported = (self.documents, self.characters)
        num_documents = self.documents - documents_before
        if self._bytes_per_document is not None:
            self._input_bytes = round(num_documents * self._bytes_per_document)
        self._report(
            Progress(self._input_bytes, num_documents, self.characters - characters_before)
        )
        self._input_bytes = 0


# --- the records ---------------------------------------------------------------------------------


def record_path(folder: Path, index: int) -> Path:
    """Where the record of a piece lies."""
    return folder / PARTS / f"{index:05d}.json"


def read_record(path: Path) -> dict[str, Any]:
    """`key documents samples characters` of a piece, and its `shards`.

    Raises:
        DataError: the record is damaged.
    """
    try:
        record = json.loads(path.read_bytes())
        record["shards"] = [parse_shard(entry) for entry in record["shards"]]
        _ = record["key"][0], record["samples"] + record["documents"] + record["characters"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path} is damaged ({error!r}). Delete it and convert again.") from error
    return dict(record)


def is_done(folder: Path, piece: Piece) -> bool:
    """Whether the piece is there, made of the same source, with all its shards."""
    path = record_path(folder, piece.index)
    if not path.exists():
        return False
    record = read_record(path)
    if record["key"] != json.loads(json.dumps(piece.key())):
        log.warning("%s: the source of piece %d has changed: it is made anew", folder, piece.index)
        return False
    missing = missing_shard(folder, record["shards"])
    if missing:
        log.warning("%s is missing or cut short: piece %d is made anew", missing, piece.index)
    return missing is None


def missing_shard(folder: Path, shards: list[ShardInfo]) -> Path | None:
    """The first shard that is not there with the size it should have."""
    for shard in shards:
        path = folder / (shard.zip_basename or shard.raw_basename)
        size = shard.zip_bytes if shard.zip_basename else shard.raw_bytes
        if not path.exists() or path.stat().st_size != size:
            return path
    return None


def discard(folder: Path, index: int) -> None:
    """Take away what there is of a piece."""
    record_path(folder, index).unlink(missing_ok=True)
    for path in folder.glob(f"shard.{index:05d}.*"):
        path.unlink(missing_ok=True)
