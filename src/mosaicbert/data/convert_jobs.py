"""One split's conversion as pieces of work that survive being killed.

The folder of a split, while it is being made:

    convert.json            what was asked for; another request for this folder is refused
    shard.00003.00000.mds   shards of piece 3: each appears when it is whole
    parts/00003.json        piece 3 is done; what went in, and its shards
    index.json              last of all, when every piece is done; then `parts` goes

What a piece holds depends on nothing but the request and the source, so a piece made twice (after a
kill, or by two machines) is the same bytes under the same names.
"""

import fcntl
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from mosaicbert.data.convert_samples import (
    SampleForm,
    to_samples,
    write_tokenization,
)
from mosaicbert.data.documents import documents
from mosaicbert.data.mds import INDEX, MDSWriter, ShardInfo, read_index, write_index
from mosaicbert.data.mds_files import TEMPORARY_SUFFIX, write_whole
from mosaicbert.data.mds_index import parse_shard
from mosaicbert.data.sources import Part
from mosaicbert.errors import ConfigError, DataError

log = logging.getLogger(__name__)

REQUEST = "convert.json"
PARTS = "parts"
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
    _discard(folder, piece.index)
    meter = _Meter(report)
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
    with write_whole(_record_path(folder, piece.index)) as file:
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
    """Counts what a piece reads, and reports it now and then."""

    def __init__(self, report: Report) -> None:
        self._report = report
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
        self._report(
            Progress(
                self._input_bytes,
                self.documents - documents_before,
                self.characters - characters_before,
            )
        )
        self._input_bytes = 0


# --- the records ---------------------------------------------------------------------------------


def _record_path(folder: Path, index: int) -> Path:
    return folder / PARTS / f"{index:05d}.json"


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        record["shards"] = [parse_shard(entry) for entry in record["shards"]]
        _ = record["key"][0], record["samples"] + record["documents"] + record["characters"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path} is damaged ({error!r}). Delete it and convert again.") from error
    return dict(record)


def is_done(folder: Path, piece: Piece) -> bool:
    """Whether the piece is there, made of the same source, with all its shards."""
    path = _record_path(folder, piece.index)
    if not path.exists():
        return False
    record = _read_record(path)
    if record["key"] != json.loads(json.dumps(piece.key())):
        log.warning("%s: the source of piece %d has changed: it is made anew", folder, piece.index)
        return False
    missing = _missing_shard(folder, record["shards"])
    if missing:
        log.warning("%s is missing or cut short: piece %d is made anew", missing, piece.index)
    return missing is None


def _missing_shard(folder: Path, shards: list[ShardInfo]) -> Path | None:
    for shard in shards:
        path = folder / (shard.zip_basename or shard.raw_basename)
        size = shard.zip_bytes if shard.zip_basename else shard.raw_bytes
        if not path.exists() or path.stat().st_size != size:
            return path
    return None


def _discard(folder: Path, index: int) -> None:
    _record_path(folder, index).unlink(missing_ok=True)
    for path in folder.glob(f"shard.{index:05d}.*"):
        path.unlink(missing_ok=True)


# --- the split -----------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold the folder for one conversion; it is let go even if the process is killed.

    `shared` lets several machines work at it, each on its own pieces.

    Raises:
        DataError: another process is converting to this folder.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"Another process is converting to {folder}. Wait for it, or choose another "
                "--out_root."
            ) from error
        except OSError as error:
            log.warning("%s cannot be locked (%s): see to it that no other process", folder, error)
        yield
    finally:
        os.close(handle)


def begin(folder: Path, request: Request) -> bool:
    """Make the folder of a split, or enter the one of an earlier try; False if it is complete.

    Raises:
        ConfigError: the folder holds something else, or the result of another request.
        DataError: it holds a complete data set of which a shard is missing.
    """
    asked = asdict(request)
    path = folder / REQUEST
    if path.exists():
        _check_same_request(path, asked)
        if (folder / INDEX).exists():
            missing = _missing_shard(folder, read_index(folder / INDEX))
            if missing:
                raise DataError(
                    f"{missing} is missing or cut short. Delete {folder} and convert again."
                )
            tidy(folder)
            return False
    elif any(entry.name != PARTS for entry in folder.iterdir()):
        raise ConfigError(
            f"{folder} is not empty, and not the work of an interrupted conversion. Choose another "
            "--out_root, or delete it."
        )
    (folder / PARTS).mkdir(exist_ok=True)
    if not path.exists():
        with write_whole(path) as file:
            file.write((json.dumps(asked, indent=2) + "\n").encode())
    return True


def read_request(folder: Path) -> Request:
    """The request that a folder is the work of.

    Raises:
        DataError: it is the work of none.
    """
    path = folder / REQUEST
    try:
        asked = json.loads(path.read_bytes())
        return Request(**{**asked, "form": SampleForm(**asked["form"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}). It is written by `mosaicbert convert`: check "
            "--out_root and --splits."
        ) from error


def _check_same_request(path: Path, asked: dict[str, Any]) -> None:
    there = asdict(read_request(path.parent))
    changed = [key for key in asked if asked[key] != there[key]]
    if changed:
        was = ", ".join(f"{key} was {there[key]!r}, now {asked[key]!r}" for key in changed)
        raise ConfigError(
            f"{path.parent} holds the result of other arguments: {was}. Choose another --out_root, "
            "delete it, or repeat the arguments it was begun with."
        )


@dataclass(frozen=True)
class Summary:
    """What a finished split holds."""

    samples: int
    shards: int
    documents: int = 0
    characters: int = 0


def finish(folder: Path) -> Summary:
    """Write the index of a split whose pieces are all done, and tidy up.

    Raises:
        DataError: a piece or a shard is missing, pieces are of different sources, or no document
            was found.
    """
    request = read_request(folder)
    records = {int(p.stem): _read_record(p) for p in sorted((folder / PARTS).glob("*.json"))}
    counts = {record["key"][0] for record in records.values()}
    if len(counts) > 1:
        raise DataError(
            f"{folder}: its pieces were cut from different sources ({sorted(counts)} pieces). "
            "Convert it with the same source on every machine."
        )
    missing = sorted(set(range(max(counts, default=1))) - set(records))
    if missing:
        listed = ", ".join(map(str, missing[:10])) + (" ..." if missing[10:] else "")
        raise DataError(
            f"{folder}: {len(missing)} pieces are not done yet ({listed}). Run `mosaicbert "
            "convert` with the same arguments for them first."
        )
    shards = [shard for index in sorted(records) for shard in records[index]["shards"]]
    gone = _missing_shard(folder, shards)
    if gone:
        raise DataError(f"{gone} is missing or cut short. Run the same `mosaicbert convert` again.")
    if not shards:
        shutil.rmtree(folder)
        raise DataError(f"{request.dataset}, split {request.split}: there is no document in it.")
    write_tokenization(folder, request.form)
    write_index(folder, shards)
    tidy(folder)
    return Summary(
        samples=sum(shard.samples for shard in shards),
        shards=len(shards),
        documents=sum(record["documents"] for record in records.values()),
        characters=sum(record["characters"] for record in records.values()),
    )


def tidy(folder: Path) -> None:
    """Take away what is of no use once the index is there."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def drop_pieces_from(folder: Path, count: int) -> None:
    """Forget pieces `count` and up, of an earlier try whose source had more."""
    for path in (folder / PARTS).glob("*.json"):
        if int(path.stem) >= count:
            _discard(folder, int(path.stem))


def undo_if_nothing_done(folder: Path) -> None:
    """After a failure: no folder stays behind that has nothing to go on from."""
    if (folder / REQUEST).exists() and not (folder / INDEX).exists():
        if not any((folder / PARTS).glob("*.json")):
            shutil.rmtree(folder, ignore_errors=True)
    else:
        with suppress(OSError):
            folder.rmdir()  # only if it is empty
