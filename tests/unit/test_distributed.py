"""Two ranks do what one does; who a process is."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import ALONE
from two_ranks import trained

from mosaicbert.errors import ConfigError
from mosaicbert.train.distributed import init_ranks

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same runs on one rank."""
    folder = tmp_path_factory.mktemp("ranks")
    answers = {
        "plain": trained(ALONE, microbatch=8, save_folder=str(folder / "alone")),
        "muon": trained(ALONE, microbatch=8, optimizer={"name": "muon", "lr": 1e-2}),
    }
    return folder, json.loads(json.dumps(answers))


@pytest.fixture(scope="module")
def two(alone):
    """What `two_ranks.py` answered on each rank."""
    folder, _ = alone
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "two_ranks.py"), str(folder)],
        env={**os.environ, **common},
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert done.returncode == 9, done.stderr  # as rank 1 ends
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def assert_agree(answer, expected, tolerance=1e-5):
    assert answer["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    assert answer["metrics"] == pytest.approx(expected["metrics"], rel=tolerance)
    assert (answer["tokens"], answer["samples"]) == (expected["tokens"], expected["samples"])
    for name, values in expected["weights"].items():
        ours, theirs = torch.tensor(answer["weights"][name]), torch.tensor(values)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=tolerance)


def test_two_ranks_equal_one(alone, two):
    expected = alone[1]["plain"]
    assert_agree(two[0]["plain"], expected)
    assert two[0]["plain"]["weights"] == two[1]["plain"]["weights"]
    both = {tuple(place) for rank in two for place in rank["plain"]["seen"]}
    assert both == {tuple(place) for place in expected["seen"]}
    assert two[1]["plain"]["losses"] == {}  # loggers are rank 0's
    assert two[1]["plain"]["metrics"] == two[0]["plain"]["metrics"]


def test_two_ranks_equal_one_with_muon(alone, two):
    assert_agree(two[0]["muon"], alone[1]["muon"], tolerance=5e-3)


def test_gradients_may_travel_in_bf16(alone, two):
    assert_agree(two[0]["bf16"], alone[1]["plain"], tolerance=2e-2)
    assert two[0]["bf16"]["weights"] == two[1]["bf16"]["weights"]
    assert two[0]["bf16"]["weights"] != two[0]["plain"]["weights"]


def test_one_ranks_lack_of_memory_makes_both_take_the_step_anew(alone, two):
    for answer in two:
        assert answer["memory"]["parts"] == two[0]["memory"]["parts"] > 1
        assert answer["memory"]["weights"] == two[0]["memory"]["weights"]
        seen = [tuple(place) for place in answer["memory"]["seen"]]
        assert len(seen) == len(set(seen))
    assert_agree(two[0]["memory"], alone[1]["plain"])


def test_resume_on_another_number_of_ranks(alone, two):
    losses = alone[1]["plain"]["losses"]
    later = {batch: loss for batch, loss in losses.items() if int(batch) > 4}
    assert two[0]["resumed"]["losses"] == pytest.approx(later, rel=1e-5)
    assert_agree({**two[0]["resumed"], "losses": losses}, alone[1]["plain"])


@pytest.mark.parametrize("option", ["skip", "rewind"])
def test_a_loss_that_is_no_number_on_one_rank_is_answered_by_both(two, option):
    for answer in two:
        assert answer[option]["bad"] == 1
        assert answer[option]["updates"] == [4.0]  # of five steps
        assert answer[option]["weights"] == two[0][option]["weights"]
    assert not any("nan" in str(values) for values in two[0][option]["weights"].values())


def test_a_loss_that_is_no_number_on_one_rank_stops_both(two):
    for answer in two:
        assert "loss nan" in answer["stop"]["error"]
        assert "after batch 3" in answer["stop"]["error"]


def test_rank_zero_writes_and_all_know(two):
    assert two[0]["saved"]["checkpoint"] == two[1]["saved"]["checkpoint"]
    assert Path(two[0]["saved"]["checkpoint"]).name == "ep2-ba10"


def test_exchanges(two):
    for answer in two:
        assert answer["rows"] == [0, 1, 2]
        assert answer["sent"] == {"a": [0.0, 1.0, 2.0], "b": True}
        assert answer["error"] == "only on rank 0"


def test_a_signal_to_one_rank_stops_both_after_the_same_step(two):
    assert two[0]["stopped"] == two[1]["stopped"] == [143, 4]


def test_a_rank_that_dies_ends_the_others_soon(two):
    message, seconds = two[0]["survivor"]
    assert "lost contact with another rank" in message
    assert seconds < 20


def environment(monkeypatch, **values):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_alone_without_variables(monkeypatch):
    environment(monkeypatch)
    ranks = init_ranks("cpu", 60)
    assert (ranks.rank, ranks.world_size, ranks.is_first) == (0, 1, True)
    assert ranks.sum([1, 2.5]) == [1.0, 2.5]
    assert ranks.gather("x") == ["x"]
    ranks.close()


def test_variables_that_do_not_fit(monkeypatch):
    environment(monkeypatch, WORLD_SIZE="2")
    with pytest.raises(ConfigError, match="no RANK"):
        init_ranks("cpu", 60)
    environment(monkeypatch, WORLD_SIZE="2", RANK="2")
    with pytest.raises(ConfigError, match="not below"):
        init_ranks("cpu", 60)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(monkeypatch):
    environment(monkeypatch)
    with pytest.raises(ConfigError, match="sees no GPU"):
        init_ranks("gpu", 60)
