"""Shards from a store with faults: the right data, or an error that names the shard."""

import json
import logging
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from faulty_store import (
    EXPECTED,
    FaultyFileSystem,
    cut,
    flip,
    folder_of,
    hang,
    litter,
    read_all,
    upload,
)

from mosaicbert.config.sections import DatasetConfig, StreamConfig
from mosaicbert.data import download as download_module
from mosaicbert.data.download import Patience, only_one, persist
from mosaicbert.data.folders import streams_of
from mosaicbert.data.stream import ShardSet
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
    assert read_all(shards) == EXPECTED
    for thread in threading.enumerate():
        if thread.name == "mosaicbert-download":
            thread.join()  # who was given up writes its file all the same, and removes it
    assert not litter(tmp_path / "local" / "train")
    FaultyFileSystem.faults |= {"index.json": [hang]}
    with pytest.raises(DataError, match=r"no answer within 0\.3 seconds"):
        folder_of(remote, tmp_path / "other", download_timeout=0.3, download_retry=0)


def test_waits_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(download_module, "BACKOFF_SECONDS", 1.0)
    monkeypatch.setattr(time, "sleep", waits.append)

    def fail() -> None:
        raise ConnectionResetError

    with pytest.raises(DataError, match="x cannot be read, after 8 tries: ConnectionResetError"):
        persist("x", fail, Patience(retries=7))
    assert waits == [1, 2, 4, 8, 16, 30, 30]


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


def test_leftovers_go_at_the_next_start(tmp_path: Path) -> None:
    """Those of shards that are never fetched again, too; what another process holds stays."""
    remote = upload(tmp_path)
    train = tmp_path / "local" / "train"
    read_all(ShardSet([folder_of(remote, tmp_path / "local")]))
    (train / ".shard.00001.mds.lock").touch()
    (train / ".shard.00001.mds.0123456789ab.tmp").write_bytes(b"half")
    with only_one(train / "shard.00002.mds", 0.0):
        (train / ".shard.00002.mds.0123456789ab.tmp").write_bytes(b"half")
        folder_of(remote, tmp_path / "local")
        assert len(litter(train)) == 2
    folder_of(remote, tmp_path / "local")
    assert litter(train) == [".shard.00002.mds.0123456789ab.tmp"]  # of a process that lives


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
    with pytest.raises(ConfigError, match="Where is the text"):
        folder_of(None, None)
    with pytest.raises(ConfigError, match="give `local`"):
        folder_of("faulty://bucket/data", None)
    with pytest.raises(ConfigError, match="streams is empty"):
        streams_of(DatasetConfig(streams={}))


def test_streams_take_from_the_data_set_what_they_leave_out() -> None:
    config = DatasetConfig(local="a", split="train", streams={"x": StreamConfig(local="b")})
    assert streams_of(config)["x"] == StreamConfig(local="b", split="train")


def _read_as_anybody(made: Path) -> None:
    if os.getuid() == 0:  # who may write everywhere
        os.setgid(65534)
        os.setuid(65534)
    assert not os.access(made, os.W_OK)
    assert read_all(ShardSet([folder_of(None, made, split=None)])) == EXPECTED


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_read_only_folder(monkeypatch: pytest.MonkeyPatch, compression: str | None) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        (folder / "tmp").mkdir()
        (folder / "tmp").chmod(0o777)
        folder.chmod(0o755)
        upload(folder, compression)
        (folder / "made").chmod(0o555)
        before = sorted(path.name for path in (folder / "made").iterdir())
        monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
        reader = multiprocessing.get_context("fork").Process(
            target=_read_as_anybody, args=(folder / "made",)
        )
        reader.start()
        reader.join(60)
        assert reader.exitcode == 0
        assert sorted(path.name for path in (folder / "made").iterdir()) == before
        (folder / "made").chmod(0o755)


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
