"""A queue of jobs over an executor's workers.

A job that raises, or whose process dies, is reported at the end; the others go on. A job may wait
for another one: it starts when that is done, and fails with it. A job that ran out of a GPU's
memory beside others goes back to the queue, and from then on that GPU has one job fewer at a time.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosaicbert.executors import Event, Executor, Failure

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to do: `payload` goes to the executor's work function and must pickle."""

    name: str
    payload: Any
    log_file: Path
    after: str | None = None
    """Name of the job to wait for."""


@dataclass(slots=True)
class Outcome:
    """How a job ended: with a `result`, or with the `error` a person should read."""

    job: Job
    result: Any = None
    error: str | None = None


def run_jobs(
    jobs: Sequence[Job], executor: Executor, on_event: Callable[[str, Job, Any], None]
) -> list[Outcome]:
    """Run all jobs, given in the order in which they should start.

    `on_event` is called with ("start" | "progress" | "done" | "failed" | "again", job, detail).
    """
    by_name = {job.name: job for job in jobs}
    waiting, outcomes = list(jobs), dict[str, Outcome]()
    while len(outcomes) < len(jobs):
        while executor.num_free > 0 and (job := _next_ready(waiting, by_name, outcomes)):
            waiting.remove(job)
            executor.submit(job.name, job.payload, job.log_file)
        for event in executor.wait():
            job = by_name[event.key]
            kind, detail = _take_in(event, job, waiting, outcomes, executor)
            on_event(kind, job, detail)
        for job in [job for job in waiting if _is_lost(job, outcomes)]:
            waiting.remove(job)
            error = f"not run: {job.after}, from whose checkpoint it starts, failed"
            outcomes[job.name] = Outcome(job, error=error)
            on_event("failed", job, error)
    return [outcomes[job.name] for job in jobs]


def _take_in(
    event: Event,
    job: Job,
    waiting: list[Job],
    outcomes: dict[str, Outcome],
    executor: Executor,
) -> tuple[str, Any]:
    """What an event means for the queue: (kind, detail) to tell on."""
    if event.kind == "done":
        outcomes[job.name] = Outcome(job, result=event.detail)
    elif event.kind == "failed":
        failure: Failure = event.detail
        if failure.out_of_memory and executor.retire(job.name):
            waiting.insert(0, job)
            log.warning(
                "%s ran out of memory beside others: it goes on later, and its GPU takes one job "
                "fewer at a time from here on. A smaller jobs_per_gpu avoids this.",
                job.name,
            )
            return "again", failure.text
        outcomes[job.name] = Outcome(job, error=failure.text)
        return "failed", failure.text
    return event.kind, event.detail


def _next_ready(
    waiting: Sequence[Job], names: Mapping[str, Job], outcomes: Mapping[str, Outcome]
) -> Job | None:
    for job in waiting:
        if job.after is None or job.after not in names or job.after in outcomes:
            return job
    return None


def _is_lost(job: Job, outcomes: Mapping[str, Outcome]) -> bool:
    """Whether what it waits for has failed."""
    before = outcomes.get(job.after) if job.after is not None else None
    return before is not None and before.error is not None
