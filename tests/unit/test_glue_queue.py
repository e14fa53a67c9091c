"""The queue of jobs: order, waiting, failures, dead children."""

import os
import time

import pytest

from mosaicbert.errors import DataError
from mosaicbert.glue_suite.queue import Job, run_jobs


def work(payload, report):
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


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    names = ["slow", "raise", "bug", "die", "after", "last"]
    jobs = [
        Job(name, name, logs / f"{name}.log", after="slow" if name == "after" else None)
        for name in names
    ]
    events = []
    found = run_jobs(
        jobs, [{"SLOT": "a"}, {"SLOT": "b"}], work, lambda kind, job, _: events.append((kind, job))
    )
    return {outcome.job.name: outcome for outcome in found}, events, logs


def test_every_job_ends_once_and_failures_say_why(outcomes):
    found, events, _ = outcomes
    assert found["slow"].result[0] == "slow"
    assert found["after"].result[0] == "after"
    assert found["last"].result[0] == "last"
    assert found["raise"].error == "the data are bad"
    assert "ZeroDivisionError: oops" in found["bug"].error
    assert "code 9" in found["die"].error
    ended = [job.name for kind, job in events if kind in ("done", "failed")]
    assert sorted(ended) == sorted(found)


def test_a_job_waits_for_the_one_before_it(outcomes):
    _, events, _ = outcomes
    order = [(kind, job.name) for kind, job in events]
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
