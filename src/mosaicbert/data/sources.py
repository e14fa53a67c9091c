"""Where text to convert lies: files, or parts of a data set on the hub, cut into pieces of work."""

import importlib
import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mosaicbert.errors import ConfigError, DataError, did_you_mean

log = logging.getLogger(__name__)

FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".txt": "text",
    ".parquet": "table",
    ".csv": "table",
    ".tsv": "table",
}
_COMPRESSIONS = {".gz": "gz", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2"}
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev", "eval"},
    "test": {"test", "testing"},
}
_COMPRESSED_RATIO = 3
"""Text is about this many times larger than its compressed file; only to cut work into pieces."""


@dataclass(frozen=True)
class FilePart:
    """A file, or the bytes `start:stop` of it, which begin and end at a line's border."""

    path: str
    size: int
    start: int = 0
    stop: int | None = None

    @property
    def key(self) -> list[Any]:
        """What tells it from other parts, on any machine."""
        return [Path(self.path).name, self.size, self.start, self.stop]


@dataclass(frozen=True)
class HubPart:
    """Part `index` of `count` of a split of a data set on the hub."""

    name: str
    subset: str | None
    split: str
    index: int
    count: int
    size: int = 1

    @property
    def key(self) -> list[Any]:
        """What tells it from other parts, on any machine."""
        return [self.name, self.subset, self.split, self.index, self.count]


Part = FilePart | HubPart


# --- which files ---------------------------------------------------------------------------------


def kind_of(path: Path) -> tuple[str, str | None]:
    """Format (`json`, `text`, `table`) and compression of a file, by its name; `""` for neither."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes.pop()
    kind = FORMATS.get(suffixes[-1], "") if suffixes else ""
    return (
        ("", None) if kind == "table" and compression not in (None, "gz") else (kind, compression)
    )


def find_files(root: Path) -> list[Path]:
    """The files of text below `root`, by name, or `root` itself; hidden ones do not count.

    Raises:
        DataError: there is no such file or folder, or nothing in it that can be read.
    """
    if root.is_file():
        if not kind_of(root)[0]:
            raise DataError(f"{root} is of no known kind. Known are {', '.join(FORMATS)}.")
        return [root]
    if not root.is_dir():
        parent = root.parent
        beside = [path.name for path in parent.iterdir()] if parent.is_dir() else []
        raise DataError(f"{root} does not exist.{did_you_mean(root.name, beside)}")
    there = [path for path in root.rglob("*") if path.is_file()]
    there = [p for p in there if not any(x.startswith(".") for x in p.relative_to(root).parts)]
    files = sorted((path for path in there if kind_of(path)[0]), key=lambda path: path.as_posix())
    if not files:
        raise DataError(
            f"{root} holds no file of text. Known are {', '.join(FORMATS)} (text and JSON also "
            f"with {', '.join(_COMPRESSIONS)})."
        )
    if others := sorted({path.suffix or path.name for path in there if not kind_of(path)[0]}):
        log.warning("%s: files of other kinds are left out: %s", root, ", ".join(others))
    return files


def split_named_in(path: Path) -> str | None:
    """`train`, `validation` or `test` where the file's name, or a folder above it, says so."""
    for part in reversed(path.parts):
        words = set(re.split(r"[^a-z]+", part.lower()))
        found = [split for split, names in _SPLIT_WORDS.items() if words & names]
        if len(found) == 1:
            return found[0]
    return None


def files_of_split(files: Sequence[Path], root: Path, split: str) -> list[Path]:
    """Those of `files` that belong to `split`; files that name no split are all `train`.

    `split` is `train`, `validation`, `test`, or any other word that the names contain.
    """
    named: dict[str | None, list[Path]] = {}
    for path in files:
        relative = path.relative_to(root) if path != root else Path(path.name)
        found = split_named_in(relative)
        if split not in _SPLIT_WORDS and split in re.split(r"[^\w]+|_", str(relative)):
            found = split
        named.setdefault(found, []).append(path)
    if None in named and set(named) != {None} and split == "train":
        log.warning(
            "%d files name no split and are left out: %s ...", len(named[None]), named[None][0]
        )
    if set(named) == {None} and split == "train":
        return named[None]
    return named.get(split, [])


def cut_into_pieces(
    files: Sequence[Path], piece_bytes: int, paragraphs: bool
) -> list[tuple[FilePart, ...]]:
    """Group small files and cut large ones, so that a piece has about `piece_bytes` of text.

    Only uncompressed files of one document a line are cut. Depends on nothing but the files.
    """
    pieces: list[tuple[FilePart, ...]] = []
    group: list[FilePart] = []
    weight = 0
    for path in files:
        size = path.stat().st_size
        if size == 0:
            log.warning("%s is empty", path)
        for part in _cut_file(path, size, piece_bytes, paragraphs):
            group.append(part)
            text_bytes = (part.stop or size) - part.start
            weight += text_bytes * (_COMPRESSED_RATIO if _is_compressed(path) else 1)
            if weight >= piece_bytes:
                pieces.append(tuple(group))
                group, weight = [], 0
    return [*pieces, tuple(group)] if group else pieces


def _is_compressed(path: Path) -> bool:
    return kind_of(path)[1] is not None or path.suffix.lower() == ".parquet"


def _cut_file(path: Path, size: int, piece_bytes: int, paragraphs: bool) -> list[FilePart]:
    kind, compression = kind_of(path)
    by_line = compression is None and (kind == "json" or (kind == "text" and not paragraphs))
    if not by_line or size < 2 * piece_bytes:
        return [FilePart(str(path), size)]
    with path.open("rb") as file:
        if kind == "json" and file.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return [FilePart(str(path), size)]
        borders = [0]
        while borders[-1] + piece_bytes < size:
            file.seek(borders[-1] + piece_bytes)
            file.readline()
            borders.append(file.tell())
    if borders[-1] < size:
        borders.append(size)
    spans = itertools.pairwise(borders)
    return [FilePart(str(path), stop - start, start, stop) for start, stop in spans]


# --- the hub -------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def hub_dataset(name: str, subset: str | None, split: str) -> Any:
    """The split as a streamed data set of the `datasets` library (extra `hub`).

    Raises:
        ConfigError: the library is not installed.
        DataError: there is no such data set, subset or split, or the hub cannot be reached.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            f'--dataset {name}: there is no such file or folder here, and to read "{name}" from '
            "the hub an extra is needed: pip install 'mosaicbert[hub]'"
        ) from error
    try:
        return datasets.load_dataset(name, subset, split=split, streaming=True)
    except Exception as error:  # the library raises what its many back ends do
        raise DataError(
            f'"{name}" (subset {subset}, split {split}) cannot be read from the hub: {error}'
        ) from error


def hub_parts(name: str, subset: str | None, split: str) -> list[HubPart]:
    """The parts that the hub keeps the split in."""
    dataset = hub_dataset(name, subset, split)
    count = max(int(getattr(dataset, "num_shards", 0) or getattr(dataset, "n_shards", 1)), 1)
    return [HubPart(name, subset, split, index, count) for index in range(count)]
