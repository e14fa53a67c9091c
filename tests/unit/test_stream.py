"""Shards from a store with faults: the right data, or an error that names the shard."""

import itertools
import json
import logging
import multiprocessing
import os
import random
import threading
import time
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec import AbstractFileSystem

from mosaicbert.config.sections import DatasetConfig, StreamConfig
from mosaicbert.data import download as download_module
from mosaicbert.data.download import BusyError, only_one
from mosaicbert.data.folders import open_folder, parse_bytes, streams_of
from mosaicbert.data.mds import MDSWriter
from mosaicbert.data.stream import ShardFolder, ShardSet
from mosaicbert.errors import ConfigError, DataError

# Python 3.12 warns of every fork of a process with threads; what is forked here takes no locks.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


class FaultyFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """A store in memory that counts reads and, on request, fails them."""

    protocol = "faulty"
    cachable = False
    files: ClassVar[dict[str, bytes]] = {}
    reads: ClassVar[Counter[str]] = Counter()
    faults: ClassVar[dict[str, list[Any]]] = {}

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        return self.answer(path)

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        Path(lpath).write_bytes(self.answer(rpath))

    def glob(self, path: str, maxdepth: Any = None, **kwargs: Any) -> list[str]:
        return [name for name in self.files if fnmatch(name, self._strip_protocol(path))]

    def answer(self, path: str) -> bytes:
        name = path.rsplit("/", 1)[-1]
        self.reads[name] += 1
        if (content := self.files.get(self._strip_protocol(path))) is None:
            raise FileNotFoundError(path)
        faults = self.faults.get(name, [])
        fault = faults.pop(0) if faults else None
        if isinstance(fault, Exception):
            raise fault
        return fault(content) if fault else content


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    return bytes([*content[:-1], content[-1] ^ 1])


def hang(content: bytes) -> bytes:
    time.sleep(3)
    return content


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.files.clear()
    FaultyFileSystem.reads.clear()
    FaultyFileSystem.faults.clear()
    monkeypatch.setattr(download_module, "BACKOFF_SECONDS", 0.01)


def upload(folder: Path, compression: str | None = None, num_samples: int = 40) -> str:
    """A data set of five shards or so, in the store."""
    with MDSWriter(
        folder / "made", {"text": "str"}, size_limit=900, compression=compression
    ) as writer:
        for i in range(num_samples):
            writer.write({"text": f"text number {i:04d} " + "x" * 60})
    for path in (folder / "made").glob("[!.]*"):
        FaultyFileSystem.files[f"bucket/data/train/{path.name}"] = path.read_bytes()
    return "faulty://bucket/data"


def folder_of(remote: str | None, local: Path | None, **settings: Any) -> ShardFolder:
    config = DatasetConfig(
        **{
            "remote": remote,
            "local": local and str(local),
            "split": "train",
            "download_timeout": 5.0,
            **settings,
        }
    )
    ((name, stream),) = streams_of(config).items()
    return open_folder(config, name, stream)


def read_all(shards: ShardSet) -> list[str]:
    return [
        shards.open(number)[i]["text"]
        for number, info in enumerate(shards.infos)
        for i in range(info.samples)
    ]


EXPECTED = [f"text number {i:04d} " + "x" * 60 for i in range(40)]


def litter(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".*")]


@pytest.mark.parametrize("compression", [None, "zstd", "gz"])
@pytest.mark.parametrize("keep_zip", [False, True])
def test_copies_each_shard_once(tmp_path: Path, compression: str | None, keep_zip: bool) -> None:
    remote = upload(tmp_path, compression)
    local = tmp_path / "local"
    for _ in range(2):  # the second time from the local folder
        shards = ShardSet([folder_of(remote, local, keep_zip=keep_zip)])
        assert read_all(shards) == EXPECTED
        shards.close()
    assert all(n == 1 for name, n in FaultyFileSystem.reads.items() if name != "index.json")
    assert not litter(local / "train")
    zips = list(local.glob("train/*.mds.*"))
    assert len(zips) == (len(shards.infos) if compression and keep_zip else 0)


@pytest.mark.parametrize(
    "fault", [cut, flip, lambda _: b"", ConnectionResetError("cut"), OSError("503 Slow Down")]
)
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_fault_is_tried_again(tmp_path: Path, fault: Any, compression: str | None) -> None:
    remote = upload(tmp_path, compression)
    ending = ".zstd" if compression else ""
    FaultyFileSystem.faults |= {f"shard.0000{i}.mds{ending}": [fault, fault] for i in range(3)}
    FaultyFileSystem.faults["index.json"] = [ConnectionResetError("cut")]
    shards = ShardSet([folder_of(remote, tmp_path / "local")])
    assert read_all(shards) == EXPECTED
    assert FaultyFileSystem.reads[f"shard.00000.mds{ending}"] == 3
    assert not litter(tmp_path / "local" / "train")


@pytest.mark.parametrize("fault", [cut, flip, OSError("500 Internal Error")])
def test_a_lasting_fault_names_the_shard(tmp_path: Path, fault: Any) -> None:
    remote = upload(tmp_path)
    FaultyFileSystem.faults |= {"shard.00001.mds": [fault] * 9}
    shards = ShardSet([folder_of(remote, tmp_path / "local", download_retry=1)])
    with pytest.raises(DataError, match=r"shard\.00001\.mds cannot be read, after 2 tries"):
        read_all(shards)
    assert not litter(tmp_path / "local" / "train")
    assert not (tmp_path / "local" / "train" / "shard.00001.mds").exists()
    FaultyFileSystem.faults.clear()
    assert read_all(shards) == EXPECTED


def test_a_store_that_hangs(tmp_path: Path) -> None:
    remote = upload(tmp_path)
    FaultyFileSystem.faults |= {"shard.00001.mds": [hang]}
    shards = ShardSet([folder_of(remote, tmp_path / "local", download_timeout=0.3)])
    start = time.monotonic()
    assert read_all(shards) == EXPECTED
    assert time.monotonic() - start < 5
    FaultyFileSystem.faults |= {"index.json": [hang]}
    with pytest.raises(DataError, match=r"no answer within 0\.3 seconds"):
        folder_of(remote, tmp_path / "other", download_timeout=0.3, download_retry=0)


def test_a_missing_shard_is_not_tried_again(tmp_path: Path) -> None:
    remote = upload(tmp_path)
    del FaultyFileSystem.files["bucket/data/train/shard.00002.mds"]
    shards = ShardSet([folder_of(remote, tmp_path / "local")])
    with pytest.raises(DataError, match=r"shard\.00002\.mds.*whole data set was uploaded"):
        read_all(shards)
    assert FaultyFileSystem.reads["shard.00002.mds"] == 1


def test_a_full_disk(tmp_path: Path) -> None:
    remote = upload(tmp_path)
    FaultyFileSystem.faults |= {"shard.00000.mds": [OSError(28, "No space left on device")]}
    shards = ShardSet([folder_of(remote, tmp_path / "local")])
    with pytest.raises(DataError, match=r"shard\.00000\.mds.*No space left.*cache_limit"):
        read_all(shards)


def test_a_damaged_local_copy_is_fetched_anew(tmp_path: Path) -> None:
    remote = upload(tmp_path)
    local = tmp_path / "local"
    read_all(ShardSet([folder_of(remote, local)]))
    for number, damage in enumerate([cut, flip, lambda _: b""]):
        path = local / "train" / f"shard.0000{number}.mds"
        path.write_bytes(damage(path.read_bytes()))
    assert read_all(ShardSet([folder_of(remote, local)])) == EXPECTED


def test_leftovers_of_a_killed_process_do_not_stand_in_the_way(tmp_path: Path) -> None:
    remote = upload(tmp_path)
    train = tmp_path / "local" / "train"
    folder = folder_of(remote, tmp_path / "local")
    (train / ".shard.00000.mds.0123456789ab.tmp").write_bytes(b"half")
    (train / ".shard.00000.mds.lock").touch()
    assert read_all(ShardSet([folder])) == EXPECTED
    assert not litter(train)


def test_an_unreachable_store_with_a_local_index(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote = upload(tmp_path)
    local = tmp_path / "local"
    read_all(ShardSet([folder_of(remote, local)]))
    FaultyFileSystem.faults |= {"index.json": [ConnectionResetError("away")] * 9}
    with caplog.at_level(logging.WARNING):
        assert read_all(ShardSet([folder_of(remote, local)])) == EXPECTED
    assert "Going on with the index in" in caplog.text


def test_another_data_set_in_the_local_folder(tmp_path: Path) -> None:
    remote = upload(tmp_path)
    folder_of(remote, tmp_path / "local")
    upload(tmp_path / "other", num_samples=20)
    with pytest.raises(DataError, match="holds another data set"):
        folder_of(remote, tmp_path / "local")


def test_a_split_that_is_not_in_the_store(tmp_path: Path) -> None:
    remote = upload(tmp_path)
    with pytest.raises(DataError, match=r"data/val has no index\.json.*Splits there: train"):
        folder_of(remote, tmp_path / "local", split="val")


def test_a_store_without_client(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        folder_of("nowhere://bucket/data", tmp_path / "local", download_retry=0)


# --- local folders -------------------------------------------------------------------------------


def test_local_folders_are_read_where_they_lie(tmp_path: Path) -> None:
    upload(tmp_path)
    made = tmp_path / "made"
    for remote, local in ((None, made), (made, None), (made, made), (f"file://{made}", made)):
        folder = folder_of(remote and str(remote), local, split=None)
        assert folder.remote is None
        assert read_all(ShardSet([folder])) == EXPECTED
    copied = folder_of(f"file://{made}", tmp_path / "copy", split=None)
    assert read_all(ShardSet([copied])) == EXPECTED
    assert (tmp_path / "copy" / "shard.00000.mds").exists()


def test_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no folder .*nothing"):
        folder_of(None, tmp_path / "nothing")
    upload(tmp_path)
    (tmp_path / "made").rename(tmp_path / "train_small")
    with pytest.raises(
        DataError, match=r'split "train_smal"\)\. Splits there: train_small\. Did you mean'
    ):
        folder_of(None, tmp_path, split="train_smal")
    with pytest.raises(ConfigError, match="where is the text"):
        folder_of(None, None)
    with pytest.raises(ConfigError, match="give `local`"):
        folder_of("faulty://bucket/data", None)
    with pytest.raises(ConfigError, match="streams is empty"):
        streams_of(DatasetConfig(streams={}))


def test_streams_take_from_the_data_set_what_they_leave_out() -> None:
    config = DatasetConfig(local="a", split="train", streams={"x": StreamConfig(local="b")})
    assert streams_of(config)["x"] == StreamConfig(local="b", split="train")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    upload(tmp_path, "zstd")
    made = tmp_path / "made"
    made.chmod(0o555)
    try:
        assert read_all(ShardSet([folder_of(None, made, split=None)])) == EXPECTED
    finally:
        made.chmod(0o755)


def test_a_folder_that_takes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for root: no lock can be made, and none is needed."""

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    upload(tmp_path)
    monkeypatch.setattr(download_module, "_try_lock", refuse)
    assert read_all(ShardSet([folder_of(None, tmp_path / "made", split=None)])) == EXPECTED


def test_wrong_index(tmp_path: Path) -> None:
    upload(tmp_path)
    index = tmp_path / "made" / "index.json"
    content = json.loads(index.read_text())
    content["shards"][0]["samples"] += 1
    index.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"shard\.00000\.mds.*samples"):
        read_all(ShardSet([folder_of(None, tmp_path / "made", split=None)]))
    index.write_text('{"version": 2, "shards": []}')
    with pytest.raises(DataError, match=r"index\.json"):
        folder_of(None, tmp_path / "made", split=None)


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
