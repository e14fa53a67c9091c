"""A run on two hosts, which are network namespaces of this machine, through everything a network
does: a short cut, a host that dies and comes back. The losses are those of an untroubled run.

Needs root and `ip`; run it with: pytest -m slow tests/e2e/test_two_hosts.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None,
        reason="network namespaces need Linux, root and ip",
    ),
]

ROOT = Path(__file__).parents[2]
BATCHES = 40
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def hosts():
    """Two namespaces joined by a cable: their names."""
    names = [f"mosaicbert-{os.getpid()}-{number}" for number in range(2)]
    cables = [f"mb{os.getpid() % 100000}-{number}" for number in range(2)]
    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip("link", "set", cable, "netns", name, "name", "eth0")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sample"
    words = ["--dataset", "sample", "--out_root", folder, "--splits", "train_small", "val"]
    subprocess.run(
        [sys.executable, "-m", "mosaicbert", "convert", *words], env=environ(), check=True
    )
    return folder


def environ(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **more}


def command(data, folder):
    return [
        *(sys.executable, "-m", "mosaicbert", "pretrain", ROOT / "yamls/test/main.yaml"),
        *(f"data_local={data}", f"run_folder={folder}/run", f"save_folder={folder}/checkpoints"),
        *(f"max_duration={BATCHES}ba", "save_interval=5ba", "eval_interval=0ba", "autoresume=true"),
        *("global_train_batch_size=4", "max_seq_len=32", "train_loader.num_workers=0"),
        "eval_subset_num_batches=1",
    ]


class Host:
    """One host's share of a run."""

    def __init__(self, hosts, node, data, folder):
        place = ["--world_size=2", "--nproc=1", f"--node_rank={node}"]
        rendezvous = [f"--master_addr={ADDRESSES[0]}", "--master_port=7501"]
        self.log = folder / f"host-{node}.log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", hosts[node], *command(data, folder), *place, *rendezvous],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environ(GLOO_SOCKET_IFNAME="eth0"),
                start_new_session=True,
            )

    def wait(self, seconds=240.0):
        code = self.process.wait(seconds)
        return code, self.log.read_text()


def losses(folder):
    """Training loss by batch; no batch may stand twice."""
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    pairs = [(r["batch"], r["loss/train/total"]) for r in rows if "loss/train/total" in r]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def wait_for_batch(folder, batch, seconds=240.0):
    began = time.monotonic()
    path = folder / "run/metrics.jsonl"
    while not path.exists() or f'"batch": {batch},' not in path.read_text():
        assert time.monotonic() - began < seconds, "the run does not get there"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def untroubled(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untroubled")
    subprocess.run([*command(data, folder), "--nproc=2"], env=environ(), check=True)
    return losses(folder)


@pytest.mark.timeout(900)
def test_a_short_cut_of_the_network_changes_nothing(hosts, data, untroubled, tmp_path):
    running = [Host(hosts, node, data, tmp_path) for node in range(2)]
    wait_for_batch(tmp_path, 7)
    ip("-n", hosts[1], "link", "set", "eth0", "down")
    time.sleep(8)
    assert len(losses(tmp_path)) < BATCHES, "the cut came too late to be one"
    ip("-n", hosts[1], "link", "set", "eth0", "up")
    for host in running:
        code, log = host.wait()
        assert code == 0, log
    assert losses(tmp_path) == untroubled


@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["dies", "is cut off"])
def test_a_host_that_is_lost_and_comes_back(how, hosts, data, untroubled, tmp_path):
    running = [Host(hosts, node, data, tmp_path) for node in range(2)]
    wait_for_batch(tmp_path, 7)
    if how == "is cut off":
        ip("-n", hosts[1], "link", "set", "eth0", "down")
    else:
        for pid in subprocess.run(
            ["ip", "netns", "pids", hosts[1]], capture_output=True, text=True, check=True
        ).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
    began = time.monotonic()
    code, log = running[0].wait(75)
    assert code == 1, log
    assert "mosaicbert: Machine 1 of the run is" in log
    assert time.monotonic() - began < 60, "the other host should stop within a minute"
    running[1].wait(75)
    ip("-n", hosts[1], "link", "set", "eth0", "up")

    for host in [Host(hosts, node, data, tmp_path) for node in range(2)]:
        code, log = host.wait()
        assert code == 0, log
    assert "Resumed from" in running[0].log.read_text()
    assert losses(tmp_path) == untroubled
