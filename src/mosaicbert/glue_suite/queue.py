"""A queue of jobs over slots: each slot is one child process (one GPU, or a share of it).

A child lives through many jobs, so that imports and start-up are paid once a slot; it dies with its
parent. A job that raises, or whose child dies, is reported at the end; the others go on. A job
may wait for another one: it starts when that has ended, however it ended.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mosaicbert.errors import MosaicBertError


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to do: `payload` goes to the slot's work function and must pickle."""

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


Work = Callable[[Any, Callable[[Any], None]], Any]
"""`work(payload, report) -> result`; `report` sends word of progress to the parent."""


@dataclass(slots=True)
class _Slot:
    environment: Mapping[str, str]
    process: Any = None
    pipe: Connection | None = None
    job: Job | None = field(default=None)


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Mapping[str, str]],
    work: Work,
    on_event: Callable[[str, Job, Any], None],
) -> list[Outcome]:
    """Run all jobs; returns their outcomes in the order of `jobs`.

    Args:
        jobs: in the order in which they should start.
        slots: for each slot the environment variables of its process (such as which GPU).
        work: importable by name in the children.
        on_event: called with ("start" | "progress" | "done" | "failed", job, detail).
    """
    waiting, outcomes = list(jobs), dict[str, Outcome]()
    states = [_Slot(environment) for environment in slots]
    names = {job.name for job in jobs}
    try:
        while waiting or any(slot.job for slot in states):
            for slot in (slot for slot in states if slot.job is None):
                job = _next_ready(waiting, names, outcomes)
                if job is None:
                    break
                waiting.remove(job)
                _give(slot, job, work)
                on_event("start", job, None)
            _listen([slot for slot in states if slot.job], outcomes, on_event)
    finally:
        for slot in states:
            _stop(slot)
    return [outcomes[job.name] for job in jobs]


def _next_ready(
    waiting: Sequence[Job], names: set[str], outcomes: Mapping[str, Outcome]
) -> Job | None:
    for job in waiting:
        if job.after is None or job.after not in names or job.after in outcomes:
            return job
    return None


def _give(slot: _Slot, job: Job, work: Work) -> None:
    """Hand a job to a slot, starting its process if there is none."""
    if slot.process is None or not slot.process.is_alive():
        context = multiprocessing.get_context("spawn")
        slot.pipe, theirs = context.Pipe()
        slot.process = context.Process(
            target=_serve, args=(theirs, dict(slot.environment), work), daemon=True
        )
        slot.process.start()
        theirs.close()
    assert slot.pipe is not None
    slot.job = job
    slot.pipe.send((job.payload, str(job.log_file)))


def _listen(
    busy: Sequence[_Slot],
    outcomes: dict[str, Outcome],
    on_event: Callable[[str, Job, Any], None],
) -> None:
    """Wait for word from the busy slots and take it in."""
    by_pipe = {slot.pipe: slot for slot in busy if slot.pipe is not None}
    for pipe in wait(list(by_pipe), timeout=1.0):
        assert isinstance(pipe, Connection)
        slot = by_pipe[pipe]
        job = slot.job
        assert job is not None
        kind, detail = _receive(slot)
        if kind == "done":
            outcomes[job.name] = Outcome(job, result=detail)
        elif kind == "failed":
            outcomes[job.name] = Outcome(job, error=detail)
        if job.name in outcomes:
            slot.job = None
        on_event(kind, job, detail)


def _receive(slot: _Slot) -> tuple[str, Any]:
    """The next word of a slot's process: (kind, detail)."""
    assert slot.pipe is not None
    try:
        kind, detail = slot.pipe.recv()
        return kind, detail
    except (EOFError, ConnectionResetError):
        slot.process.join()
        code, slot.process = slot.process.exitcode, None
        return "failed", f"its process ended with code {code}"


def _stop(slot: _Slot) -> None:
    """End a slot's process: at once if it is in a job, else by closing its pipe."""
    if slot.process is None:
        return
    if slot.job is not None:
        slot.process.terminate()
    if slot.pipe is not None:
        slot.pipe.close()
    slot.process.join(timeout=10)
    if slot.process.is_alive():
        slot.process.kill()


def _serve(pipe: Connection, environment: Mapping[str, str], work: Work) -> None:
    """A slot's process: take jobs from the pipe until it closes; prints go to the job's log."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    while True:
        try:
            payload, log_file = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        _redirect_output(Path(log_file))
        try:
            message = ("done", work(payload, lambda word: pipe.send(("progress", word))))
        except MosaicBertError as error:
            print(f"mosaicbert: {error}", file=sys.stderr)
            message = ("failed", str(error))
        except Exception as error:
            traceback.print_exc()
            message = ("failed", f"{type(error).__name__}: {error} (traceback in {log_file})")
        sys.stdout.flush()
        with contextlib.suppress(BrokenPipeError):
            pipe.send(message)


def _redirect_output(log_file: Path) -> None:
    """Send this process's output, also that of libraries in C, to the end of a file."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
