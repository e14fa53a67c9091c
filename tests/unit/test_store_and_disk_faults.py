"""Faults of stores and disks that the fault suite found: each is told in words, nothing is left."""

import errno
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from safetensors import SafetensorError

from mosaicbert import retrying
from mosaicbert.cli import guarded
from mosaicbert.data import table_writer
from mosaicbert.data.tables import read_table
from mosaicbert.duration import Progress
from mosaicbert.errors import CheckpointError, ConfigError, DataError, TrainingError
from mosaicbert.models.export import _whole_folder
from mosaicbert.models.weights import local_copy
from mosaicbert.report.runs import read_run
from mosaicbert.retrying import retried
from mosaicbert.train.distributed import init_ranks
from mosaicbert.train.loggers import RunFolderLogger
from mosaicbert.train.store import SaveFolder
from mosaicbert.train.writer import CheckpointWriter


@pytest.fixture
def store(monkeypatch):
    """An empty store in memory, whose faults are tried again at once."""
    monkeypatch.setattr(retrying, "WAITS", (0.0, 0.0))
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def failing(times, error, function):
    """`function`, which raises the first so many times."""
    left = [times]

    def call(*args, **options):
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return function(*args, **options)

    return call


def test_what_no_further_try_mends_is_tried_once():
    tries = []
    with pytest.raises(PermissionError):
        retried("x", lambda: tries.append(failing(1, PermissionError(), int)()))
    assert not tries


@pytest.mark.parametrize("times", [1, 9])
def test_a_pointer_that_the_store_does_not_give(store, monkeypatch, times):
    store.pipe_file("/saves/ep0-ba2/state.json", b"{}")
    store.pipe_file("/saves/latest", b"ep0-ba2")
    broken = failing(times, OSError(16, "reduce your request rate"), store.cat_file)
    monkeypatch.setattr(store, "cat_file", broken)
    folder = SaveFolder("memory://saves")
    monkeypatch.setattr(folder, "fs", store)
    if times == 1:
        assert folder.newest() == "ep0-ba2"
    else:
        with pytest.raises(CheckpointError, match="memory://saves cannot be read"):
            folder.newest()


def test_a_checkpoint_that_comes_cut_short_is_fetched_again(store, monkeypatch):
    store.pipe_file("/saves/ep0-ba2/state.json", b"whole")
    folder, get = SaveFolder("memory://saves"), store.get

    def short(source, target, **options):
        get(source, target, **options)
        if not seen:
            (Path(target) / "state.json").write_bytes(b"who")
        seen.append(target)

    seen = []
    monkeypatch.setattr(folder, "fs", store)
    monkeypatch.setattr(store, "get", short)
    with folder._on_disk("ep0-ba2") as here:
        assert (here / "state.json").read_bytes() == b"whole"
    assert len(seen) == 2


def test_an_old_checkpoint_that_does_not_go_does_not_stop_the_run(store, monkeypatch, caplog):
    for batch in (1, 2):
        store.pipe_file(f"/saves/ep0-ba{batch}/state.json", b'{"run_id": "r"}')
    writer = CheckpointWriter(SaveFolder("memory://saves"), "r", 1, None)
    monkeypatch.setattr(writer.folder, "remove", failing(99, OSError("Internal Error"), int))
    writer.remove_old()
    assert "ep0-ba1 cannot be removed" in caplog.text


@pytest.mark.parametrize("times", [1, 9])
def test_weights_that_the_store_does_not_give(store, monkeypatch, times):
    store.pipe_file("/model/config.json", b"{}")
    monkeypatch.setattr(store, "info", failing(times, RuntimeError("closed"), store.info))
    monkeypatch.setattr("mosaicbert.models.weights.url_to_fs", lambda uri, **o: (store, "/model"))
    if times == 1:
        with local_copy("memory://model") as folder:
            assert (folder / "config.json").read_bytes() == b"{}"
    else:
        with pytest.raises(CheckpointError, match="memory://model cannot be copied"):
            local_copy("memory://model").__enter__()


def test_what_goes_wrong_with_a_copy_is_not_said_to_be_the_store(store):
    store.pipe_file("/model/config.json", b"{}")
    with pytest.raises(OSError, match="another"), local_copy("memory://model"):
        raise OSError("another")


def test_a_table_whose_store_breaks_off(monkeypatch):

    class Broken(io.BytesIO):
        def __next__(self):
            raise RuntimeError("closed by the other side")

    monkeypatch.setattr("mosaicbert.data.tables._open", lambda path: Broken())
    with pytest.raises(DataError, match=r"rows.jsonl cannot be read: closed"):
        read_table("memory://rows.jsonl", ["text"])


def test_a_run_folder_that_comes_cut_short_is_no_shorter_run(store, monkeypatch):
    store.pipe_file("/run/metrics.jsonl", b'{"batch": 1, "seconds": 1}\n' * 2)
    cat_file = type(store).cat_file
    monkeypatch.setattr(type(store), "cat_file", lambda self, path, **o: cat_file(self, path)[:27])
    with pytest.raises(DataError, match=r"metrics.jsonl cannot be read .*27 bytes of 54"):
        read_run("memory://run")


def test_metrics_on_a_full_disk(tmp_path, monkeypatch):
    logger = RunFolderLogger(tmp_path / "run", {})
    logger.log({"loss": 1.0}, Progress(batch=1))
    with open("/dev/full", "w") as full:
        logger._jsonl_file.close()
        monkeypatch.setattr(logger, "_jsonl_file", full)
        with pytest.raises(DataError, match=r"run cannot be written .No space"):
            logger.log({"loss": 1.0}, Progress(batch=2))
        logger.close()  # tries once more to write what it holds
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), SafetensorError("full")])
def test_an_export_to_a_full_disk(tmp_path, error):
    with pytest.raises(ConfigError, match="out cannot be written"), _whole_folder(tmp_path / "out"):
        raise error
    assert not list(tmp_path.iterdir())


def test_a_table_in_a_read_only_folder(tmp_path, monkeypatch):
    """The part that could not be made cannot be removed either."""
    read_only = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(table_writer.Path, "unlink", failing(9, read_only, int))
    monkeypatch.setattr(table_writer.Path, "open", failing(9, read_only, int))
    with (
        pytest.raises(DataError, match="cannot be written: Read-only"),
        table_writer.open_table(tmp_path / "x.jsonl"),
    ):
        pass


def test_a_fault_of_the_machine_is_no_traceback(capsys):
    assert guarded(failing(1, OSError(errno.ENOSPC, "No space left on device", "a/b"), int)) == 2
    assert capsys.readouterr().err == "mosaicbert: a/b: No space left on device.\n"
    with pytest.raises(OSError, match="not one of them"):
        guarded(failing(1, OSError(errno.EINVAL, "not one of them"), int))


def test_ranks_that_do_not_meet(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")
    with pytest.raises(TrainingError, match=r"Rank 0 of 2 did not meet the others.*dist_timeout"):
        init_ranks("cpu", 1.0)


def test_a_worker_whose_parent_was_killed_while_it_started():
    program = "from mosaicbert.data import steps; steps.SECONDS_BETWEEN_LOOKS = 0.1\n"
    program += f"steps._start_worker({os.getppid()}, 0); import time; time.sleep(100)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert done.returncode == 0
    assert time.monotonic() - began < 50


ENDS = """
import sys, time
from pathlib import Path
import fsspec
from fsspec.implementations.local import LocalFileSystem
from mosaicbert.data.download import Patience, download, only_one
import threading

class Slow(LocalFileSystem):
    protocol = "slow"
    def get_file(self, source, target, **options):
        with open(target, "wb") as file:
            file.write(b"half")
            file.flush()
            time.sleep(100)

fsspec.register_implementation("slow", Slow)
path = Path(sys.argv[1]) / "shard.mds"
def fetch():
    with only_one(path, 0.0):
        download("slow:///x", path, size=9, hashes={}, patience=Patience(0, 60.0))
threading.Thread(target=fetch, daemon=True).start()
while not list(path.parent.glob("*.tmp")):
    time.sleep(0.01)
print(len(list(path.parent.iterdir())))
"""


def test_a_run_that_ends_during_a_download_leaves_nothing(tmp_path):
    words = [sys.executable, "-c", ENDS, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2\n"  # the half shard and its lock
    assert not list(tmp_path.iterdir())
