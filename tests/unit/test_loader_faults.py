"""The text loader on damaged, foreign and remote data."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_sets import (
    loader,
    sequences,
    texts,
    write_set,
)

from mosaicbert.errors import DataError

# Python 3.12 warns of every fork of a process with threads; what is forked here takes no locks.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_set(folder, [{"text": text} for text in texts()], {"text": "str"})


def test_ids_of_another_tokenizer(tmp_path: Path) -> None:
    rows = [{"input_ids": np.array([5, 60000], np.uint16)}] * 10
    data = write_set(tmp_path, rows, {"input_ids": "ndarray:uint16"})
    with pytest.raises(DataError, match=r"shard\.00000.*ids up to 60000.*30522"):
        next(loader(data).steps(0))


def test_no_column_to_read(tmp_path: Path) -> None:
    data = write_set(tmp_path, [{"body": "a"}], {"body": "str"})
    with pytest.raises(DataError, match=r"columns body.*--text_column"):
        loader(data)


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    data = write_set(tmp_path, [{"text": "plain text"}] * 10, {"text": "str"})
    shard = next(iter((data / "train").glob("*.mds")))
    content = shard.read_bytes().replace(b"plain text", b"plain \xff\xfe\xfdt")
    shard.write_bytes(content)
    index = data / "train" / "index.json"
    index.write_text(_without_hashes(index.read_text()))
    with pytest.raises(DataError, match="no UTF-8 text"):
        next(loader(data).steps(0))


def _without_hashes(index: str) -> str:
    content = json.loads(index)
    for shard in content["shards"]:
        shard["raw_data"]["hashes"] = {}
    return json.dumps(content)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_shard_ends_the_epoch_with_its_name(
    data: Path, tmp_path: Path, num_workers: int
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    victim = copy / "train" / "shard.00002.mds"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(DataError, match=r"shard\.00002\.mds") as caught:
        list(loader(copy, num_workers=num_workers).steps(0))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_other_damage(data: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    victim = copy / "train" / "shard.00001.mds"
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[: 100 if damage == "truncated" else 0])
    with pytest.raises(DataError, match=r"shard\.00001\.mds"):
        list(loader(copy).steps(0))


@pytest.mark.parametrize("cache_limit", [None, 4000])
def test_streaming_gives_the_same_steps(
    data: Path, tmp_path: Path, cache_limit: int | None
) -> None:
    """Two ranks of two workers copy to one folder, with room for a few shards or for all."""
    expected = [[sequences(step) for step in loader(data).steps(epoch)] for epoch in (0, 1)]
    streamed = {"remote": f"file://{data}", "cache_limit": cache_limit, "predownload": 4}
    ranks = [
        loader(tmp_path / "cache", rank=r, world_size=2, num_workers=2, **streamed)
        for r in range(2)
    ]
    for epoch in (0, 1):
        found = [
            sorted(sequence for step in steps for sequence in sequences(step))
            for steps in zip(*(rank.steps(epoch) for rank in ranks), strict=True)
        ]
        assert found == expected[epoch]
    for rank in ranks:
        rank.close()
    assert not list((tmp_path / "cache").glob("train/.*.tmp"))


def test_a_worker_that_dies_is_an_error(data: Path) -> None:
    dying = loader(data, num_workers=1)
    dying._dataset._make_samples = _die
    with pytest.raises(DataError, match="data workers gave up"):
        next(dying.steps(0))


def test_a_workers_sigterm_is_the_trainers_to_answer(data: Path) -> None:
    """A scheduler sends SIGTERM to the whole group; the step at hand must still get its data."""
    undisturbed = [sequences(step) for step in loader(data).steps(0)]
    terminated = loader(data, num_workers=1)
    terminated._dataset._make_samples = _Terminated(terminated._dataset._make_samples)
    assert [sequences(step) for step in terminated.steps(0)] == undisturbed
    terminated.close()


class _Terminated:
    """Makes samples as ever, after a SIGTERM to its own process the first time."""

    def __init__(self, make_samples: Any) -> None:
        self.make_samples, self.is_first = make_samples, True

    def __call__(self, epoch: int, start: int, end: int) -> Any:
        if self.is_first:
            os.kill(os.getpid(), signal.SIGTERM)
            self.is_first = False
        return self.make_samples(epoch, start, end)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.make_samples, name)


FAILS = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from text_sets import loader
steps = loader(Path({data!r}), num_workers=2).steps(0)
next(steps)
raise AttributeError("a mistake of ours")
"""


def test_an_unforeseen_error_ends_the_process(data: Path) -> None:
    """Its traceback holds the steps, so nobody stops the workers but the interpreter's end."""
    program = FAILS.format(path=[str(Path(__file__).parent), *sys.path], data=str(data))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(b"AttributeError: a mistake of ours")


def _die(epoch: int, start: int, end: int) -> list[Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def test_ids_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    """In the folder and streamed from it: the note of the tokenizer comes along."""
    rows = [{"input_ids": np.array([5, 6], np.uint16)}] * 10
    data = write_set(tmp_path, rows, {"input_ids": "ndarray:uint16"})
    note = {"tokenizer": "other", "vocabulary_sha256": "0" * 64}
    (data / "train" / "tokenization.json").write_text(json.dumps(note))
    with pytest.raises(DataError, match='tokenised with "other"'):
        loader(data)
    with pytest.raises(DataError, match='tokenised with "other"'):
        loader(tmp_path / "cache", remote=f"file://{data}")
