"""The queue of jobs: order, waiting, failures, dead children."""

import os
import time
from contextlib import closing

import pytest

from mosaicbert.errors import DataError, TrainingError
from mosaicbert.executors import LocalProcesses
from mosaicbert.glue_suite.queue import Job, run_jobs


def work(payload, report):
    if isinstance(payload, tuple):
        return crowd(*payload)
    report({"seen": payload})
    print("in the job", payload)
    if payload == "raise":
        raise DataError("the data are bad")
    if payload == "bug":
        raise ZeroDivisionError("oops")
    if payload == "die":
        os._exit(9)
    if payload == "slow":
        time.sleep(0.3)
    return payload, os.environ["SLOT"], os.getpid()


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def crowd(folder, name):
    """Fails as a full GPU does: once both jobs are there, and later beside another one."""
    first, mine = folder / f"{name}.first", folder / f"{name}.now"
    mine.touch()
    if not first.exists():
        first.touch()
        while len(list(folder.glob("*.first"))) < 2:
            time.sleep(0.01)
        full = True
    else:
        time.sleep(0.2)
        full = len(list(folder.glob("*.now"))) > 1
    mine.unlink()
    if full:
        try:
            raise OutOfMemoryError("full")
        except OutOfMemoryError as error:
            raise TrainingError("out of memory") from error


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    names = ["slow", "raise", "bug", "die", "after", "lost", "last"]
    waits = {"after": "slow", "lost": "raise"}
    jobs = [Job(name, name, logs / f"{name}.log", after=waits.get(name)) for name in names]
    events = []
    with closing(LocalProcesses(work, [{"SLOT": "a"}, {"SLOT": "b"}])) as workers:
        found = run_jobs(jobs, workers, lambda kind, job, _: events.append((kind, job)))
    return {outcome.job.name: outcome for outcome in found}, events, logs


def test_every_job_ends_once_and_failures_say_why(outcomes):
    found, events, _ = outcomes
    assert found["slow"].result[0] == "slow"
    assert found["after"].result[0] == "after"
    assert found["last"].result[0] == "last"
    assert found["raise"].error == "the data are bad"
    assert "ZeroDivisionError: oops" in found["bug"].error
    assert "code 9" in found["die"].error
    assert found["lost"].error == "not run: raise, from whose checkpoint it starts, failed"
    ended = [job.name for kind, job in events if kind in ("done", "failed")]
    assert sorted(ended) == sorted(found)


def test_a_job_waits_for_the_one_before_it(outcomes):
    _, events, _ = outcomes
    order = [(kind, job.name) for kind, job in events]
    assert ("start", "lost") not in order
    assert order.index(("done", "slow")) < order.index(("start", "after"))


def test_slots_have_their_environment_and_live_on(outcomes):
    found, _, _ = outcomes
    assert {found[name].result[1] for name in ("slow", "after", "last")} <= {"a", "b"}
    assert found["slow"].result[2] != os.getpid()


def test_output_goes_to_the_jobs_own_log(outcomes):
    _, _, logs = outcomes
    assert "in the job slow" in (logs / "slow.log").read_text()
    assert "the data are bad" in (logs / "raise.log").read_text()
    assert "in the job raise" not in (logs / "slow.log").read_text()


def test_jobs_that_fill_a_gpu_together_end_one_after_the_other(tmp_path, caplog):
    (tmp_path / "crowd").mkdir()
    names = ["a", "b"]
    jobs = [Job(name, (tmp_path / "crowd", name), tmp_path / "log.txt") for name in names]
    events = []
    with closing(LocalProcesses(work, [{"GPU": "0"}] * 2)) as workers:
        found = run_jobs(jobs, workers, lambda kind, job, _: events.append(kind))
        assert workers.num_free == 1
    assert [outcome.error for outcome in found] == [None, None]
    assert events.count("again") == 2  # both ran out of memory, each beside the other
    assert "one job fewer" in caplog.text


def test_a_job_too_large_for_an_empty_gpu_fails(tmp_path):
    for name in ("a.first", "b.first", "somebody-elses.now"):
        (tmp_path / name).touch()
    jobs = [Job("a", (tmp_path, "a"), tmp_path / "log.txt")]
    with closing(LocalProcesses(work, [{"GPU": "0"}, {"GPU": "1"}])) as workers:
        (outcome,) = run_jobs(jobs, workers, lambda *_: None)
    assert outcome.error == "out of memory"
