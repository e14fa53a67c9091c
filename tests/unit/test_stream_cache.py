"""Look-ahead, a bounded cache, and several processes on one folder of shards."""

import fcntl
import itertools
import multiprocessing
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest
from faulty_store import (
    EXPECTED,
    FaultyFileSystem,
    flip,
    folder_of,
    litter,
    read_all,
    upload,
)

from mosaicbert.data import download as download_module
from mosaicbert.data.download import BusyError, only_one
from mosaicbert.data.folders import parse_bytes
from mosaicbert.data.stream import ShardSet, _evict
from mosaicbert.errors import ConfigError, DataError

# Python 3.12 warns of every fork of a process with threads; what is forked here takes no locks.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.files.clear()
    FaultyFileSystem.reads.clear()
    FaultyFileSystem.faults.clear()
    monkeypatch.setattr(download_module, "BACKOFF_SECONDS", 0.01)


# --- look-ahead and cache ------------------------------------------------------------------------


def wait_until(condition: Any, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def test_focus_fetches_ahead_and_lets_go(tmp_path: Path) -> None:
    remote = upload(tmp_path)
    shards = ShardSet([folder_of(remote, tmp_path / "local")])
    shards.open(0)
    shards.focus([1, 2])
    assert wait_until(lambda: len(list(tmp_path.glob("local/train/*.mds"))) == 3)
    assert not shards._open
    before = FaultyFileSystem.reads.copy()
    shards.open(1)
    shards.open(2)
    assert FaultyFileSystem.reads == before
    shards.close()
    assert wait_until(lambda: not any(thread.is_alive() for thread in shards._threads))


def test_errors_of_the_look_ahead_reach_the_reader(tmp_path: Path) -> None:
    remote = upload(tmp_path)
    FaultyFileSystem.faults |= {"shard.00001.mds": [flip] * 99}
    shards = ShardSet([folder_of(remote, tmp_path / "local", download_retry=0)])
    shards.focus([0, 1, 2, 3])
    with pytest.raises(DataError, match=r"shard\.00001\.mds"):
        read_all(shards)
    shards.close()


def test_cache_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    remote = upload(tmp_path)
    folder = folder_of(remote, tmp_path / "local")
    sizes = [info.raw_bytes for info in folder.shards]
    limit = sizes[0] * 3
    for _ in range(2):
        shards = ShardSet([folder], limit)
        found = []
        for number, info in enumerate(shards.infos):
            shards.focus([number])
            found += [shards.open(number)[i]["text"] for i in range(info.samples)]
            files = list(tmp_path.glob("local/train/*.mds"))
            assert sum(path.stat().st_size for path in files) <= limit
            assert tmp_path / "local" / "train" / info.raw_basename in files
        assert found == EXPECTED
        shards.close()
    assert not caplog.records


def test_the_shard_used_longest_ago_leaves_first(tmp_path: Path) -> None:
    folder = folder_of(upload(tmp_path), tmp_path / "local")
    shards = ShardSet([folder], 3 * folder.shards[0].raw_bytes)
    for number in (0, 1, 2, 0, 3):
        shards.focus([number])
        shards.open(number)
        time.sleep(0.02)  # file times may be coarse
    left = {path.name for path in tmp_path.glob("local/train/*.mds")}
    assert left == {f"shard.0000{number}.mds" for number in (0, 2, 3)}
    shards.close()


def test_the_look_ahead_pushes_out_nothing_it_comes_to_first(tmp_path: Path) -> None:
    folder = folder_of(upload(tmp_path), tmp_path / "local")
    shards = ShardSet([folder], 2 * folder.shards[0].raw_bytes)
    shards.focus(range(len(shards.infos)))
    assert wait_until(lambda: len(list(tmp_path.glob("local/train/*.mds"))) == 2)
    time.sleep(0.2)
    assert sorted(FaultyFileSystem.reads) == ["index.json", "shard.00000.mds", "shard.00001.mds"]
    shards.close()


def test_a_shard_that_is_being_fetched_is_not_evicted(tmp_path: Path) -> None:
    """Its compressed file may be there, about to be read."""
    raw, packed = tmp_path / "shard", tmp_path / "shard.zstd"
    packed.touch()
    with only_one(raw, 0.0):
        assert not _evict(packed, raw)
        assert packed.exists()
    assert _evict(packed, raw)
    assert not packed.exists()


def test_shards_in_use_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    remote = upload(tmp_path)
    folder = folder_of(remote, tmp_path / "local")
    other = ShardSet([folder])  # as another process would
    other.open(0)
    shards = ShardSet([folder], folder.shards[0].raw_bytes * 2)
    for number in range(1, len(shards.infos)):
        shards.focus([number])
        shards.open(number)
    left = {path.name for path in tmp_path.glob("local/train/*.mds")}
    assert left == {"shard.00000.mds", shards.infos[-1].raw_basename}
    assert not caplog.records
    shards.focus(range(len(shards.infos)))
    assert read_all(shards) == EXPECTED  # all are in use: the limit gives way, with a warning
    assert "cache_limit is too small" in caplog.text
    shards.close()
    other.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, None), (5, 5), ("500", 500), ("50gb", 50 * 10**9), ("1.5 MB", 1_500_000), ("2k", 2000)],
)
def test_sizes(text: Any, expected: int | None) -> None:
    assert parse_bytes(text, "cache_limit") == expected


def test_sizes_that_are_none() -> None:
    with pytest.raises(ConfigError, match="cache_limit: '50 gib' is no size"):
        parse_bytes("50 gib", "cache_limit")


# --- several processes ---------------------------------------------------------------------------


def _read_in_process(
    remote: str, local: Path, log: Path, seconds: float, limit: int | None = None
) -> None:
    get = FaultyFileSystem.answer

    def slow(self: FaultyFileSystem, path: str) -> bytes:
        with log.open("a") as file:
            file.write(path.rsplit("/", 1)[-1] + "\n")
        time.sleep(seconds)
        return get(self, path)

    FaultyFileSystem.answer = slow  # type: ignore[method-assign]
    shards = ShardSet([folder_of(remote, local)], limit)
    for number in range(len(shards.infos)):
        shards.focus(range(number, min(number + 3, len(shards.infos))))
        info = shards.infos[number]
        first = sum(one.samples for one in shards.infos[:number])
        found = [shards.open(number)[i]["text"] for i in range(info.samples)]
        assert found == EXPECTED[first : first + info.samples]
    shards.close()
    for thread in shards._threads:
        thread.join(10)  # or the lock of what one was fetching ahead would stay
    os._exit(0)


def start_readers(count: int, *args: Any) -> list[Any]:
    context = multiprocessing.get_context("fork")  # so that they see the store in memory
    readers = [context.Process(target=_read_in_process, args=args) for _ in range(count)]
    for reader in readers:
        reader.start()
    return readers


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """One download of each shard, whoever comes first."""
    log = tmp_path / "log"
    for reader in start_readers(3, upload(tmp_path), tmp_path / "local", log, 0.02):
        reader.join(60)
        assert reader.exitcode == 0
    counts = Counter(name for name in log.read_text().split() if name != "index.json")
    assert set(counts.values()) == {1}
    assert not litter(tmp_path / "local" / "train")


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_processes_share_a_bounded_cache(tmp_path: Path, compression: str | None) -> None:
    """Each evicts what the others may want next, and all get the right data."""
    remote = upload(tmp_path, compression)
    for reader in start_readers(3, remote, tmp_path / "local", tmp_path / "log", 0.0, 2500):
        reader.join(60)
        assert reader.exitcode == 0
    assert not litter(tmp_path / "local" / "train")


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_kill_9_at_any_moment(tmp_path: Path, compression: str | None) -> None:
    remote = upload(tmp_path, compression)
    generator = random.Random(5)
    for _ in range(6):
        readers = start_readers(2, remote, tmp_path / "local", tmp_path / "log", 0.02)
        time.sleep(generator.uniform(0.0, 0.25))
        for reader in readers:
            reader.kill()
            reader.join()
    assert read_all(ShardSet([folder_of(remote, tmp_path / "local")])) == EXPECTED


def test_locks(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with only_one(path, 0) as is_alone:
        assert is_alone
        with pytest.raises(BusyError), only_one(path, 0):
            pass
        with only_one(path, 0.1) as second:
            assert not second  # goes on without, in the end
    entered: list[float] = []

    def hold() -> None:
        with only_one(path, 10):
            entered.append(time.monotonic())
            time.sleep(0.05)

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entered.sort()
    assert all(b - a >= 0.05 for a, b in itertools.pairwise(entered))
    assert not litter(tmp_path)


def test_a_lock_whose_file_was_removed_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder let go and removed it while we were about to take it; a third one made another."""
    lock = tmp_path / ".file.lock"
    flock = fcntl.flock

    is_made_anew = False

    def flock_too_late(descriptor: int, operation: int) -> None:
        lock.unlink()
        if is_made_anew:
            lock.touch()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_too_late)
    assert download_module._try_lock(lock) is None
    is_made_anew = True
    assert download_module._try_lock(lock) is None


def test_a_lock_is_removed_before_it_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After that it may be another one's."""
    close, was_there = os.close, []

    def close_and_tell(descriptor: int) -> None:
        was_there.append((tmp_path / ".file.lock").exists())
        close(descriptor)

    with only_one(tmp_path / "file", 0.0):
        monkeypatch.setattr(os, "close", close_and_tell)
    monkeypatch.undo()
    assert was_there == [False]
