"""Who makes the pieces: this process, several processes of this machine, or a Ray cluster."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from mosaicbert.data.convert_pieces import Piece, Progress, Report, Request, convert_piece
from mosaicbert.errors import DataError
from mosaicbert.executors import Executor, LocalProcesses, RayTasks, run_all

Task = tuple[Path, Request, Piece]
"""A folder, what is asked for there, and one piece of it."""
_SECONDS_BETWEEN_REPORTS = 0.5


def run_here(tasks: Sequence[Task], report: Report) -> None:
    """Make the pieces one after another in this process."""
    for folder, request, piece in tasks:
        convert_piece(folder, request, piece, report)


def run_processes(tasks: Sequence[Task], num_workers: int, report: Report) -> None:
    """Make the pieces in `num_workers` processes.

    Raises:
        MosaicBertError: what the first piece that failed raised; the others are stopped.
        DataError: a process was killed.
    """
    _run(LocalProcesses(work, [{}] * num_workers), tasks, report)


def run_ray(tasks: Sequence[Task], report: Report) -> None:
    """Make the pieces as tasks of the Ray cluster that `RAY_ADDRESS` names, or of a local one.

    The output folder and the source must be the same paths on all machines.

    Raises:
        ConfigError: Ray is not installed.
        MosaicBertError: what the first piece that failed raised.
    """
    _run(RayTasks(work), tasks, report)


def _run(executor: Executor, tasks: Sequence[Task], report: Report) -> None:
    with closing(executor):
        for event in run_all(executor, ((str(i), task) for i, task in enumerate(tasks))):
            if event.kind == "progress":
                report(event.detail)
            elif event.kind == "failed":
                raise event.detail.error or DataError(
                    f"A conversion process was lost: {event.detail.text}. Perhaps memory ran out. "
                    "What is done is kept: run the same command again, with a smaller "
                    "--num_workers."
                )


def work(task: Task, report: Callable[[Any], None]) -> None:
    """What an executor's worker does with a piece."""
    buffered = _Buffered(report)
    convert_piece(*task, buffered.add)
    buffered.flush()


class _Buffered:
    """Reports on, but not more often than a person can read."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._sum = Progress()
        self._last = time.monotonic()

    def add(self, progress: Progress) -> None:
        self._sum = self._sum + progress
        if time.monotonic() - self._last > _SECONDS_BETWEEN_REPORTS:
            self.flush()

    def flush(self) -> None:
        self._report(self._sum)
        self._sum, self._last = Progress(), time.monotonic()
