import socket
import time

import pytest

from mosaicbert.launch.nodes import NodeWatch
from mosaicbert.launch.processes import free_port


@pytest.fixture
def start():
    """Start the watch of one machine; all are ended after the test."""
    port, started = free_port(), []

    def start(node, num_nodes=2, lost_seconds=60.0):
        environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": str(node)}
        watch = NodeWatch(environ, num_nodes, beat_seconds=0.05, lost_seconds=lost_seconds)
        started.append(watch)
        return watch

    yield start
    for watch in started:
        watch.end()


def wait_for(condition, seconds=10.0):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "waited in vain"
        time.sleep(0.02)


def connected(*watches):
    return all(watch._peers for watch in watches)


def test_a_failure_is_heard_by_machine_0_and_told_on(start):
    first, second, third = (start(node, num_nodes=3) for node in range(3))
    wait_for(lambda: connected(second, third) and len(first._peers) == 2)
    second.end("rank 9 failed with exit code 1")
    wait_for(first.trouble)
    assert first.trouble().startswith(
        "Machine 1 of the run has failed: rank 9 failed with exit code 1."
    )
    first.end(first.trouble())
    wait_for(third.trouble)
    assert "rank 9" in third.trouble()


@pytest.mark.parametrize("done_first", [0, 1])
def test_a_good_end_is_no_trouble(start, done_first):
    watches = [start(node, lost_seconds=0.3) for node in range(2)]
    wait_for(lambda: connected(*watches))
    watches[done_first].end()
    time.sleep(0.6)
    assert watches[1 - done_first].trouble() is None


def connect(watch):
    return socket.create_connection(("127.0.0.1", watch.port), timeout=5)


def test_silence_is_trouble(start):
    first = start(0, lost_seconds=0.3)
    time.sleep(0.1)
    with connect(first) as other:
        other.sendall(b"node 1\n")
        wait_for(first.trouble)
    assert "Machine 1 of the run is silent" in first.trouble()


def test_a_connection_that_breaks_is_trouble(start):
    first = start(0)
    time.sleep(0.1)
    with connect(first) as other:
        other.sendall(b"node 1\nalive\n")
        wait_for(lambda: connected(first))
    wait_for(first.trouble)
    assert "Machine 1 of the run is gone" in first.trouble()


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.1\r\n\r\n", b"node 7\n", b"\xff" * 200_000])
def test_strangers_do_no_harm(start, words):
    first = start(0, lost_seconds=0.3)
    time.sleep(0.1)
    with connect(first) as other:
        other.sendall(words)
    time.sleep(0.5)
    assert first.trouble() is None


def test_machine_0_may_come_late(start):
    second = start(1)
    time.sleep(0.3)
    first = start(0)
    wait_for(lambda: connected(first, second))
    assert second.trouble() is None


def test_a_port_that_is_taken_is_told(start, caplog):
    first = start(0)
    time.sleep(0.1)
    start(0)
    wait_for(lambda: "do not watch one another" in caplog.text)
    assert first.trouble() is None
