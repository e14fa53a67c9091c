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
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mosaicbert.data.convert_pieces import PARTS, Request, discard, missing_shard, read_record
from mosaicbert.data.convert_samples import SampleForm, write_tokenization
from mosaicbert.data.mds import INDEX, read_index, write_index
from mosaicbert.data.mds_files import TEMPORARY_SUFFIX, write_whole
from mosaicbert.errors import ConfigError, DataError

log = logging.getLogger(__name__)

REQUEST = "convert.json"


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
            missing = missing_shard(folder, read_index(folder / INDEX))
            if missing:
                raise DataError(
                    f"{missing} is missing or cut short. Delete {folder} and convert again."
                )
            tidy(folder)
            return False
    elif any(entry.name != PARTS and not _is_temporary(entry) for entry in folder.iterdir()):
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
    records = {int(p.stem): read_record(p) for p in sorted((folder / PARTS).glob("*.json"))}
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
    gone = missing_shard(folder, shards)
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
    for path in folder.iterdir():
        if _is_temporary(path):
            path.unlink(missing_ok=True)


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX)


def drop_pieces_from(folder: Path, count: int) -> None:
    """Forget pieces `count` and up, of an earlier try whose source had more."""
    for path in (folder / PARTS).glob("*.json"):
        if int(path.stem) >= count:
            discard(folder, int(path.stem))


def undo_if_nothing_done(folder: Path) -> None:
    """After a failure: no folder stays behind that has nothing to go on from."""
    begun = (folder / REQUEST).exists() and not (folder / INDEX).exists()
    if begun and not any((folder / PARTS).glob("*.json")):
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # only what is empty: the split's folder, then that of all splits
        if folder.exists():
            folder.rmdir()
        folder.parent.rmdir()
