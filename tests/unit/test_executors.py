"""The executors' interface, on local processes: order, back-pressure, deaths, ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from mosaicbert.errors import DataError
from mosaicbert.executors import LocalProcesses, run_all


def work(payload, report):
    if payload == "bad":
        raise DataError("line 3 is bad")
    if payload == "odd":
        raise UnpicklableError(lambda: 0)
    if payload == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if payload == "half":
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return "x" * (1 << 24)  # more than a pipe holds
    if payload == "sleep":
        Path("asleep").write_text(str(os.getpid()))
        time.sleep(60)
    report(payload)
    return len(payload)


class UnpicklableError(Exception):
    """Holds what cannot travel between processes."""


def ended(events):
    return {event.key: event for event in events if event.kind in ("done", "failed")}


def test_tasks_are_read_no_faster_than_they_are_done():
    running, most = set(), 0

    def tasks():
        nonlocal most
        for i in range(9):
            running.add(str(i))
            most = max(most, len(running))
            yield str(i), "x" * (1 << 17)  # more than a pipe holds

    with closing(LocalProcesses(work, [{}, {}])) as workers:
        for event in run_all(workers, tasks()):
            if event.kind == "done":
                running.discard(event.key)
                assert event.detail == 1 << 17
    assert not running
    assert most <= 3


def test_failures_are_events_and_the_next_task_has_a_new_process():
    names = ("bad", "odd", "kill", "good")
    with closing(LocalProcesses(work, [{}])) as workers:
        found = ended(run_all(workers, ((name, name) for name in names)))
    assert isinstance(found["bad"].detail.error, DataError)
    assert "UnpicklableError" in str(found["odd"].detail.error)
    assert found["kill"].detail.text == "its process ended with signal 9"
    assert found["kill"].detail.error is None
    assert found["good"].detail == 4


def test_a_process_that_dies_with_its_result_half_sent():
    with closing(LocalProcesses(work, [{}])) as workers:
        workers.submit("half", "half")
        (process,) = multiprocessing.active_children()
        process.join(30)  # nobody reads meanwhile
        found = {}
        while "half" not in found:
            found |= ended(workers.wait())
    assert found["half"].detail.text == "its process ended with signal 9"


def test_closing_does_not_wait_for_tasks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    with closing(LocalProcesses(work, [{}])) as workers:
        workers.submit("long", "sleep")
        while not Path("asleep").exists():
            workers.wait()
        began = time.monotonic()
    assert time.monotonic() - began < 9


PARENT = """
import test_executors as t
from mosaicbert.executors import LocalProcesses
if __name__ == "__main__":
    workers = LocalProcesses(t.work, [{}])
    workers.submit("long", "sleep")
    while True:
        workers.wait()
"""


def test_workers_die_with_a_killed_parent(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": path}
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path, env=environment)
    asleep = tmp_path / "asleep"
    for _ in range(3000):
        if asleep.exists() and asleep.read_text():
            break
        time.sleep(0.02)
    child = int(asleep.read_text())
    parent.kill()
    parent.wait()
    for _ in range(500):
        if not is_running(child):
            return
        time.sleep(0.02)
    pytest.fail("the worker lives on")


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
