"""One file from any fsspec URI to a local folder: whole, checked, once on this machine.

Locks are `flock`s on small files beside the target. The kernel lets go of them when a process
dies, so that nothing has to be cleaned up after kill -9 and nothing waits for the dead.
"""

import errno
import fcntl
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import util
from pathlib import Path
from typing import TypeVar

import fsspec

from mosaicbert.data.mds_files import TEMPORARY_SUFFIX, verify
from mosaicbert.errors import DataError

BACKOFF_SECONDS = 1.0
"""Wait before the first further try; doubled before each one after that, up to 30 seconds."""
POLL_SECONDS = 0.05

T = TypeVar("T")

_unfinished: set[Path] = set()
"""Temporary files and locks of this process."""
_watched: set[int] = set()
"""Processes at whose end they are removed: this one, if any."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a download may take, and how often it is tried again."""

    retries: int = 2
    timeout_seconds: float = 60.0

    def total_seconds(self) -> float:
        """The most that one file can take, all tries together."""
        return (self.retries + 1) * (self.timeout_seconds + 30.0)


class BusyError(Exception):
    """Another process or thread is at work on the file; not for users."""


def download(
    uri: str, path: Path, *, size: int, hashes: Mapping[str, str], patience: Patience
) -> None:
    """Copy `uri` to `path`, which appears only when it is whole and its hashes are right.

    Raises:
        DataError: see `persist`; a damaged copy is tried again too.
    """
    _watch_the_end()

    def attempt() -> None:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY_SUFFIX}")
        try:
            _get(uri, temporary, patience.timeout_seconds)
            try:
                verify(temporary, size, hashes)
            except DataError as error:
                raise ValueError(str(error).replace(str(temporary), path.name)) from error
            temporary.replace(path)
            _unfinished.discard(temporary)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    persist(uri, attempt, patience)


def read_bytes(uri: str, patience: Patience) -> bytes:
    """The content of a small file. Raises DataError, see `persist`."""

    def cat() -> bytes:
        filesystem, path = fsspec.core.url_to_fs(uri)
        return bytes(filesystem.cat_file(path))

    return persist(uri, lambda: _within(patience.timeout_seconds, cat), patience)


def persist(uri: str, attempt: Callable[[], T], patience: Patience) -> T:
    """The result of `attempt`, tried again, ever later, where it fails.

    A file that is not in the store, a refused permission, a missing client and a full disk are
    not tried again.

    Raises:
        DataError: names the file, the last fault and what to do; its cause is that fault.
    """
    for tries in range(1, patience.retries + 2):
        try:
            return attempt()
        except Exception as error:  # every store's client has its own kinds
            fault = (str(error).strip() or type(error).__name__).splitlines()[0]
            if hint := _hopeless(error):
                raise DataError(f"{uri} cannot be read: {fault}. {hint}") from error
            if tries > patience.retries:
                raise DataError(
                    f"{uri} cannot be read, after {tries} tries: {fault}. Check the store and its "
                    "copy of this file; download_retry and download_timeout allow for more."
                ) from error
            log.warning("%s: try %d of %d: %s", uri, tries, patience.retries + 1, fault)
            time.sleep(min(BACKOFF_SECONDS * 2 ** (tries - 1), 30.0))
    raise AssertionError


def leave_nothing() -> None:
    """Remove what background threads of this process, which now ends, are at."""
    for path in list(_unfinished):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _watch_the_end() -> None:
    """Have `leave_nothing` called when this process ends, also one of multiprocessing's."""
    if os.getpid() not in _watched:
        _watched.clear()
        _unfinished.clear()  # those of the process that this one was forked off
        _watched.add(os.getpid())
        util.Finalize(None, leave_nothing, exitpriority=0)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of `path`; only for who holds `only_one`."""
    for leftover in path.parent.glob(f".{path.name}.*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove the locks of killed processes, and what they left of the files behind them.

    Nothing depends on it: a lock that nobody holds lets everybody in.
    """
    for lock in folder.glob(".*.lock"):
        with suppress(BusyError, OSError):
            path = lock.with_name(lock.name[1 : -len(".lock")])
            with only_one(path, 0.0) as is_alone:
                if is_alone:
                    remove_leftovers(path)


@contextmanager
def only_one(path: Path, wait_seconds: float) -> Iterator[bool]:
    """Keep other processes and threads of this machine from making `path` at the same time.

    After `wait_seconds` it goes on without the lock: files are renamed when whole, so that the
    worst is work done twice. Nor is there one in a folder that cannot be written to. Gives whether
    the lock is held.

    Raises:
        BusyError: `wait_seconds` is 0 and another one holds the lock.
    """
    _watch_the_end()
    lock = path.with_name(f".{path.name}.lock")
    deadline = time.monotonic() + wait_seconds
    descriptor = None
    while descriptor is None:
        try:
            descriptor = _try_lock(lock)
        except OSError as error:
            log.debug("no lock on %s (%s)", lock, error)
            break
        if descriptor is None:
            if not wait_seconds:
                raise BusyError
            if time.monotonic() > deadline:
                log.warning("%s is locked for %.0f s; going on without", lock, wait_seconds)
                break
            time.sleep(POLL_SECONDS)
    _unfinished.update([lock] if descriptor is not None else [])
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            lock.unlink(missing_ok=True)
            os.close(descriptor)
            _unfinished.discard(lock)


def _try_lock(lock: Path) -> int | None:
    """A descriptor that holds the lock; None where another one does."""
    descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == lock.stat().st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass  # held; or its holder removed the file between our two calls
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _get(uri: str, temporary: Path, timeout_seconds: float) -> None:
    abandoned = threading.Event()
    _unfinished.add(temporary)

    def work() -> None:
        try:
            filesystem, path = fsspec.core.url_to_fs(uri)
            filesystem.get_file(path, str(temporary))
        finally:
            if abandoned.is_set():
                temporary.unlink(missing_ok=True)
                _unfinished.discard(temporary)

    try:
        _within(timeout_seconds, work)
    except TimeoutError:
        abandoned.set()
        raise


def _within(timeout_seconds: float, work: Callable[[], T]) -> T:
    """The result of `work`, run in a thread that is left behind if it hangs (TimeoutError)."""
    results: list[T] = []
    faults: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=run, daemon=True, name="mosaicbert-download")
    thread.start()
    thread.join(timeout_seconds)
    if faults:
        raise faults[0]
    if not results:
        raise TimeoutError(f"no answer within {timeout_seconds:g} seconds")
    return results[0]


def _hopeless(error: Exception) -> str:
    """What to do about an error that no further try mends; an empty string for others."""
    if isinstance(error, FileNotFoundError):
        return "It is not there: check the URI, and that the whole data set was uploaded."
    if isinstance(error, PermissionError):
        return "Check the credentials and permissions."
    if isinstance(error, ImportError):
        return "Install this store's client: mosaicbert has the extras s3, gcs and azure."
    if isinstance(error, ValueError) and "Protocol not known" in str(error):
        return "Write s3://, gs://, az://, file:// or another that fsspec knows."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return "Free space, choose another local folder, or set cache_limit."
    return ""
