"""Shards at hand: in a local folder, or copied there from a remote one as they are needed.

Nothing but files is shared between processes: a shard appears under its name when it is whole, a
`flock` beside it keeps two processes from fetching it at once, and one on the shard itself says
that it is in use. So ranks, workers and other runs may share a folder, and a killed process leaves
nothing that stands in the way.
"""

import fcntl
import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mosaicbert.data.download import BusyError, Patience, download, only_one, remove_leftovers
from mosaicbert.data.mds import Shard, ShardInfo, ensure_raw
from mosaicbert.data.mds_files import REMEDY
from mosaicbert.errors import DataError

MAX_OPEN_SHARDS = 128
"""Shards that a process keeps mapped; more are closed, least recently used first."""
NUM_DOWNLOADERS = 2
"""Background threads of a process."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardFolder:
    """The shards of one stream: where they lie, and where they come from (None: nowhere)."""

    local: Path
    remote: str | None
    shards: tuple[ShardInfo, ...]
    patience: Patience = field(default_factory=Patience)
    keep_zip: bool = False

    def is_here(self, info: ShardInfo) -> bool:
        """Whether the raw shard is there."""
        return (self.local / info.raw_basename).exists()

    def open(self, info: ShardInfo) -> tuple[Shard, int | None]:
        """A shard, copied, decompressed and checked as far as need be; and what says it is in use.

        That is a descriptor to be closed after use (None: nobody evicts from a folder without a
        remote). A local copy that turns out to be damaged is fetched anew where there is a remote.

        Raises:
            DataError: it cannot be had, or is damaged.
        """
        try:
            return self._open(self.local / info.raw_basename, info)
        except FileNotFoundError:
            pass
        except DataError as error:
            if self.remote is None:
                raise
            log.warning("%s Fetching it anew.", error)
        except OSError as error:
            raise _unreadable(self.local / info.raw_basename, error) from error
        with only_one(self.local / info.raw_basename, self.patience.total_seconds()) as is_alone:
            path = self._bring(info, is_alone)
            try:
                return self._open(path, info)
            except OSError as error:
                raise _unreadable(path, error) from error

    def fetch(self, info: ShardInfo) -> None:
        """Copy and decompress a shard ahead of its use.

        Raises:
            DataError: it cannot be had, or is damaged.
            BusyError: another process or thread is at it.
        """
        with only_one(self.local / info.raw_basename, 0.0) as is_alone:
            self._bring(info, is_alone)

    def _open(self, path: Path, info: ShardInfo) -> tuple[Shard, int | None]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if self.remote is not None:
                _mark_in_use(path, descriptor)
            shard = Shard(ensure_raw(path.parent, info), info)
        except BaseException:
            os.close(descriptor)
            raise
        if self.remote is not None:
            return shard, descriptor
        os.close(descriptor)
        return shard, None

    def _bring(self, info: ShardInfo, is_alone: bool) -> Path:
        """The path of the raw file, which is there in the end."""
        if self.remote is not None:
            if is_alone:
                remove_leftovers(self.local / info.raw_basename)
            self._copy(info)
        return ensure_raw(self.local, info, keep_zip=self.keep_zip or self.remote is None)

    def _copy(self, info: ShardInfo) -> None:
        """Get the raw or the compressed file, unless a sound one is there."""
        with suppress(DataError):
            ensure_raw(self.local, info)  # another process was faster
            return
        (self.local / info.raw_basename).unlink(missing_ok=True)
        name = info.zip_basename or info.raw_basename
        is_raw = info.zip_basename is None
        (self.local / name).unlink(missing_ok=True)
        download(
            f"{self.remote}/{name}",
            self.local / name,
            size=info.raw_bytes if is_raw else info.zip_bytes,
            hashes=info.raw_hashes if is_raw else info.zip_hashes,
            patience=self.patience,
        )


class ShardSet:
    """All shards of a data set, numbered through its folders; opened, fetched ahead, and evicted.

    Args:
        folders: the streams, in order.
        cache_limit_bytes: most bytes to keep in local folders that have a remote; the shards
            used longest ago leave first, those in use never.
    """

    def __init__(
        self, folders: Sequence[ShardFolder], cache_limit_bytes: int | None = None
    ) -> None:
        self._folders = tuple(folders)
        self._shards = [(folder, info) for folder in folders for info in folder.shards]
        self._limit = cache_limit_bytes
        self.infos = [info for _, info in self._shards]
        """The index entries of all shards."""
        self._open: OrderedDict[int, tuple[Shard, int | None]] = OrderedDict()
        self._wanted: deque[int] = deque()
        self._focus: tuple[int, ...] = ()
        self._threads: list[threading.Thread] = []
        self._wake = threading.Condition()
        self._eviction = threading.Lock()
        self._is_closed = False
        self._warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet, (self._folders, self._limit)  # a worker opens its own files and threads

    def open(self, number: int) -> Shard:
        """A shard, fetched if need be. Raises DataError where it cannot be had."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number][0]
        folder, info = self._shards[number]
        if not folder.is_here(info):
            self._make_room(number, may_exceed=True)
        self._open[number] = folder.open(info)
        while len(self._open) > MAX_OPEN_SHARDS:
            self._close(next(iter(self._open)))
        return self._open[number][0]

    def path_beside(self, number: int, ending: str) -> Path:
        """The path of a hidden file beside a shard."""
        folder, info = self._shards[number]
        return folder.local / f".{info.raw_basename}.{ending}"

    def focus(self, numbers: Sequence[int]) -> None:
        """Copy or decompress these shards in the background, in this order; let go of others."""
        if tuple(numbers) == self._focus:
            return
        self._focus = tuple(numbers)
        for number in set(self._open) - set(numbers):
            self._close(number)
        wanted, size = [], 0
        for number in numbers:
            folder, info = self._shards[number]
            size += info.raw_bytes
            if self._limit is not None and size > self._limit:
                break  # more would only push out what is needed before it
            if not folder.is_here(info):
                wanted.append(number)
        with self._wake:
            self._wanted = deque(wanted)
            self._wake.notify_all()
        while wanted and len(self._threads) < NUM_DOWNLOADERS:
            thread = threading.Thread(target=self._fetch_ahead, daemon=True, name="mosaicbert-data")
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Let go of all shards; the background threads end after the file they are at."""
        with self._wake:
            self._is_closed = True
            self._wake.notify_all()
        for number in list(self._open):
            self._close(number)

    def _close(self, number: int) -> None:
        shard, in_use = self._open.pop(number)
        shard.close()
        if in_use is not None:
            os.close(in_use)

    def _fetch_ahead(self) -> None:
        while True:
            with self._wake:
                while not self._wanted and not self._is_closed:
                    self._wake.wait()
                if self._is_closed:
                    return
                number = self._wanted.popleft()
            folder, info = self._shards[number]
            try:
                if not folder.is_here(info) and self._make_room(number, may_exceed=False):
                    folder.fetch(info)
            except BusyError:
                pass  # another worker's
            except Exception as error:  # `open` meets it again and raises
                log.debug("%s: %s", info.raw_basename, error)

    def _make_room(self, number: int, may_exceed: bool) -> bool:
        """Evict until a shard fits; False, or with `may_exceed` a warning, where none can go."""
        if self._limit is None or self._shards[number][0].remote is None:
            return True
        with self._eviction:  # two threads would take each other's hold on a file for use of it
            excess = self._evict_for(number, self._limit)
        if excess > 0 and may_exceed and not self._warned:
            self._warned = True
            log.warning(
                "cache_limit is too small for the shards in use: %d bytes more are needed. Raise "
                "it, or lower shuffle_block_size.",
                excess,
            )
        return excess <= 0

    def _evict_for(self, number: int, limit: int) -> int:
        """Evict until a shard fits into the limit; the bytes by which it does not."""
        folder, info = self._shards[number]
        files = sorted(self._cached_files())
        if any(path == folder.local / info.raw_basename for _, _, path, _ in files):
            return 0  # a background thread was faster
        excess = sum(size for _, size, _, _ in files) + info.raw_bytes + info.zip_bytes - limit
        for _, size, path, raw in files:
            if excess > 0 and _evict(path, raw):
                excess -= size
        return excess

    def _cached_files(self) -> list[tuple[int, int, Path, Path]]:
        """(last use, bytes, path, path of the raw shard) of files that could be fetched again."""
        files = []
        for folder, info in self._shards:
            raw = folder.local / info.raw_basename
            for name in (info.raw_basename, info.zip_basename):
                if folder.remote is None or name is None:
                    continue
                with suppress(FileNotFoundError):
                    stat = (folder.local / name).stat()
                    files.append((stat.st_atime_ns, stat.st_size, folder.local / name, raw))
        return files


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"Shard {path} cannot be read ({error.strerror}). {REMEDY}")


def _mark_in_use(path: Path, descriptor: int) -> None:
    """A shared lock keeps others from evicting the file until the descriptor is closed."""
    with suppress(OSError):  # a file system without locks, a file of somebody else's
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        # The access time says when it was last used; the time of change must stay.
        os.utime(path, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))


def _evict(path: Path, raw: Path) -> bool:
    """Remove a file unless a process uses it or is fetching its shard; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with only_one(raw, 0.0):
            path.unlink(missing_ok=True)
    except (OSError, BusyError):  # in use, being fetched, or not ours to remove
        return False
    finally:
        os.close(descriptor)
    log.debug("evicted %s", path)
    return True
