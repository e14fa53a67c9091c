import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mosaicbert.errors import ConfigError
from mosaicbert.launch.processes import (
    NodeShare,
    add_launch_arguments,
    decide,
    free_port,
    launch,
)
from mosaicbert.launch.supervisor import supervise

SRC = str(Path(__file__).parents[2] / "src")


def flags(*words):
    parser = argparse.ArgumentParser()
    add_launch_arguments(parser)
    return parser.parse_args(words)


def plan(*words, gpus=0, **environ):
    return decide(flags(*words), environ, lambda: gpus)


# --- what to start -------------------------------------------------------------------------------


def test_alone_on_a_cpu_or_one_gpu():
    assert plan() is None
    assert plan(gpus=1) is None
    assert plan("--nproc", "1", gpus=8) is None


@pytest.mark.parametrize(("words", "gpus"), [((), 8), (("--nproc", "8"), 0)])
def test_one_process_a_gpu_or_as_many_as_told(words, gpus):
    share = plan(*words, gpus=gpus)
    assert (share.nproc, share.world_size, share.node_rank) == (8, 8, 0)
    assert share.master_addr == "127.0.0.1"
    assert 1024 < share.master_port < 65536
    assert share.num_nodes == 1


def test_one_machine_of_a_told_size():
    share = plan("--world_size=2", "--node_rank=0", "--master_addr=10.0.0.1", gpus=8)
    assert (share.nproc, share.world_size, share.node_rank) == (2, 2, 0)
    assert plan("--world_size=1", gpus=8) is None
    assert plan("--nproc=2", "--world_size=2", gpus=8).nproc == 2
    assert plan("--nproc=2", "--master_port=7501").master_port == 7501
    assert plan("--world_size=2", gpus=8, MASTER_PORT="7501").master_port == 7501


def test_under_torchrun_the_process_joins():
    assert plan(gpus=8, RANK="3", WORLD_SIZE="16", LOCAL_RANK="3") is None
    with pytest.raises(ConfigError, match="LOCAL_RANK"):
        plan(gpus=8, RANK="1", WORLD_SIZE="2")


VARIABLES = {
    "WORLD_SIZE": "16",
    "NODE_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "7501",
}


def test_several_machines_by_flags_or_variables():
    words = ["--world_size=16", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=7501"]
    expected = NodeShare(8, 16, 1, "10.0.0.1", 7501)
    assert plan(*words, gpus=8) == expected
    assert plan(gpus=8, **VARIABLES) == expected
    assert plan("--node_rank", "0", gpus=8, **VARIABLES).node_rank == 0
    assert expected.num_nodes == 2


def test_each_process_is_told_its_place():
    environments = NodeShare(2, 4, 1, "h", 7501).environments({"PATH": "/bin"})
    assert [e["RANK"] for e in environments] == ["2", "3"]
    assert [e["LOCAL_RANK"] for e in environments] == ["0", "1"]
    assert {e["WORLD_SIZE"] for e in environments} == {"4"}
    assert {e["LOCAL_WORLD_SIZE"] for e in environments} == {"2"}
    assert environments[0]["PATH"] == "/bin"
    assert environments[0]["MASTER_PORT"] == "7501"
    own = NodeShare(2, 2, 0, "h", 1).environments({"OMP_NUM_THREADS": "7"})
    assert own[0]["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("words", "environ", "message"),
    [
        (["--nproc", "0"], {}, "at least 1"),
        (["--world_size", "16"], {}, "--node_rank.*--master_addr"),
        (["--node_rank", "1"], {}, "need --world_size"),
        (["--nproc", "5"], VARIABLES, "not a multiple"),
        (["--world_size", "2", "--node_rank", "1"], {}, "node_rank 1: .*--nproc"),
        ([], VARIABLES | {"WORLD_SIZE": "8"}, "node_rank 1: .*--nproc"),
        ([], VARIABLES | {"WORLD_SIZE": "1"}, "node_rank 1: .*--nproc"),
        ([], {"WORLD_SIZE": "2", "NODE_RANK": "x"}, "NODE_RANK"),
        (["--nproc", "4", "--world_size", "2"], {}, "world_size 2 .*--nproc 4"),
        (["--nproc", "2", "--master_port", "0"], {}, "MASTER_PORT"),
        ([], VARIABLES | {"NODE_RANK": "2"}, "numbered from 0"),
        ([], VARIABLES | {"NODE_RANK": "x"}, "NODE_RANK"),
        ([], VARIABLES | {"MASTER_PORT": "-1"}, "MASTER_PORT"),
    ],
)
def test_what_does_not_fit_together(words, environ, message):
    with pytest.raises(ConfigError, match=message):
        plan(*words, gpus=8, **environ)


def slurm(tasks, nodes):
    return {
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NODELIST": "gpu[003-004]",
        "SLURM_NODEID": "1",
        "SLURM_JOB_ID": "20042",
    }


def test_slurm():
    assert plan(gpus=8, **slurm(tasks=16, nodes=2)) is None  # one task a rank
    assert plan(gpus=1, **slurm(tasks=2, nodes=2)) is None
    share = plan(gpus=8, **slurm(tasks=2, nodes=2))  # one task a node
    assert share == NodeShare(8, 16, 1, "gpu003", 20042)
    assert plan(gpus=8, **slurm(tasks=1, nodes=1)).world_size == 8


def test_alone_runs_in_this_process():
    assert launch(flags(), lambda: 7, device="cpu", environ={}) == 7


# --- processes -----------------------------------------------------------------------------------


def start(script, nproc=2, node_rank=0, num_nodes=1, port=1):
    """Supervise `nproc` processes of a script, in a process of its own."""
    parent = f"""
import os, sys
from mosaicbert.cli import guarded
from mosaicbert.launch.processes import NodeShare
from mosaicbert.launch.supervisor import supervise
share = NodeShare({nproc}, {nproc * num_nodes}, {node_rank}, "127.0.0.1", {port})
command = [sys.executable, "-S", "-c", {script!r}]
environments = share.environments(os.environ)
sys.exit(guarded(lambda: supervise(command, environments, num_nodes=share.num_nodes)))
"""
    return subprocess.Popen(
        [sys.executable, "-c", parent],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": SRC},
    )


def finish(process, seconds=30):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


HEAD = """
import os, sys, time
rank = int(os.environ["RANK"])
"""


def test_all_end_well_and_rank_0_alone_is_heard():
    script = HEAD + "print('out', rank); print('err', rank, file=sys.stderr)"
    assert finish(start(script, 3)) == (0, "out 0\n", "err 0\n")


def test_the_first_error_is_shown_alone_and_its_exit_code_passed_on():
    script = (
        HEAD
        + """
if rank == 1:
    print("Traceback (most recent call last)\\nValueError: the cause", file=sys.stderr)
    sys.exit(3)
print("working", file=sys.stderr, flush=True)
time.sleep(0.1)
print("connection reset", file=sys.stderr, flush=True)
time.sleep(60)
"""
    )
    began = time.monotonic()
    code, _, err = finish(start(script))
    assert code == 3
    assert "Rank 1 failed first" in err
    assert "connection reset" not in err
    assert err.rstrip().endswith("ValueError: the cause")
    assert time.monotonic() - began < 10


def test_what_follows_from_another_ranks_error_is_not_taken_for_the_cause():
    script = (
        HEAD
        + """
if rank == 0:
    print("mosaicbert: Rank 0 lost contact with another rank", file=sys.stderr)
    sys.exit(1)
time.sleep(0.8)
print("Traceback (most recent call last)", file=sys.stderr)
print("RuntimeError: the cause", file=sys.stderr)
sys.exit(1)
"""
    )
    code, _, err = finish(start(script))
    assert code == 1
    assert "the cause" in err
    assert "lost contact" not in err


def test_a_users_mistake_is_told_once():
    script = (
        HEAD
        + """
print("some log line", rank, file=sys.stderr)
time.sleep(0.05 * (3 - rank))
print("mosaicbert: no such key", file=sys.stderr)
sys.exit(2)
"""
    )
    code, _, err = finish(start(script, 3))
    assert code == 2
    assert err.count("no such key") == 1


def test_a_killed_process_is_named():
    script = (
        HEAD
        + """
if rank == 1:
    os.kill(os.getpid(), 9)
time.sleep(60)
"""
    )
    code, _, err = finish(start(script))
    assert code == 128 + 9
    assert "Rank 1 was ended by SIGKILL (out of memory?)" in err


def is_there(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=20.0):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "waited in vain"
        time.sleep(0.05)


def test_signals_are_passed_on_and_awaited(tmp_path):
    script = (
        HEAD
        + f"""
import signal
def leave(number, frame):
    time.sleep(0.5)  # as if a checkpoint were written
    print("saved", rank, flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, leave)
open({str(tmp_path)!r} + f"/{{rank}}", "w").close()
time.sleep(60)
"""
    )
    process = start(script)
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    process.send_signal(signal.SIGTERM)
    code, out, _ = finish(process)
    assert code == 143
    assert out == "saved 0\n"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl and /proc")
@pytest.mark.parametrize("how", ["supervisor killed", "rank fails"])
def test_there_are_no_orphans(how, tmp_path):
    # A grandchild stands for a data worker; it would live on by itself.
    script = (
        HEAD
        + f"""
import subprocess
worker = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
with open({str(tmp_path)!r} + f"/{{rank}}.part", "w") as file:
    print(os.getpid(), worker.pid, file=file)
os.rename(file.name, file.name[:-5])
while rank == 0 or {how == "supervisor killed"}:
    time.sleep(0.1)
time.sleep(0.3)
sys.exit(1)
"""
    )
    process = start(script)
    wait_for(lambda: {path.name for path in tmp_path.iterdir()} == {"0", "1"})
    pids = [int(word) for path in tmp_path.iterdir() for word in path.read_text().split()]
    children = [int(path.read_text().split()[0]) for path in tmp_path.iterdir()]
    if how == "supervisor killed":
        process.kill()
        finish_pids = children  # grandchildren see their parent go, as torch's data workers do
    else:
        finish_pids = pids
    try:
        wait_for(lambda: not any(is_there(pid) for pid in finish_pids))
    finally:
        for pid in filter(is_there, pids):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def test_a_command_that_cannot_be_started_leaves_nothing_behind():
    with pytest.raises(FileNotFoundError):
        supervise(["/no/such/program"], NodeShare(2, 2, 0, "h", 1).environments({}))


def test_a_failure_on_one_machine_ends_the_others(tmp_path):
    script = (
        HEAD
        + f"""
open({str(tmp_path)!r} + f"/{{rank}}", "w").close()
while rank < 2 or len(os.listdir({str(tmp_path)!r})) < 4:
    time.sleep(0.05)
sys.exit(f"mosaicbert: out of paper on rank {{rank}}" if rank == 3 else 0)
"""
    )
    port = free_port()
    first, second = (start(script, 2, node, 2, port) for node in range(2))
    code, _, err = finish(second)
    assert code == 1
    assert "out of paper on rank 3" in err
    code, _, err = finish(first)
    assert code == 1
    assert "Machine 1 of the run has failed: rank 3 failed with exit code 1" in err
