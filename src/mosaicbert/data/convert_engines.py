"""Who makes the pieces: this process, several processes of this machine, or a Ray cluster."""

import importlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any

from mosaicbert.data.convert_pieces import Piece, Progress, Report, Request, convert_piece
from mosaicbert.errors import ConfigError, DataError, MosaicBertError

log = logging.getLogger(__name__)

Task = tuple[Path, Request, Piece]
"""A folder, what is asked for there, and one piece of it."""
_SECONDS_BETWEEN_REPORTS = 0.5
_RAY_RETRIES = 3


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
    context = multiprocessing.get_context("spawn")  # fork would copy the threads' locks
    reports = context.SimpleQueue()
    pool = ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_start_worker, initargs=(reports,)
    )
    try:
        pending = {pool.submit(_work, task) for task in tasks}
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
            while not reports.empty():
                report(reports.get())
            for future in done:
                _result(future)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()
    while not reports.empty():
        report(reports.get())


def _result(future: "Future[None]") -> None:
    try:
        future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "A conversion process was killed, perhaps for want of memory. What is done is kept: "
            "run the same command again, with a smaller --num_workers."
        ) from error


_reports: Any = None


def _start_worker(reports: Any) -> None:
    """Set a worker process up: Ctrl-C is the parent's affair, and its end is ours."""
    global _reports
    _reports = reports
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: Any) -> None:
    wait_for_any([sentinel])
    os._exit(1)  # the parent was killed: nobody waits for this piece


def _work(task: Task) -> None:
    buffered = _Buffered(_reports.put)
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


def run_ray(tasks: Sequence[Task], report: Report) -> None:
    """Make the pieces as tasks of the Ray cluster that `RAY_ADDRESS` names, or of a local one.

    Ray makes a piece again, up to three times, when the machine or process that had it dies. The
    output folder and the source must be the same paths on all machines.

    Raises:
        ConfigError: Ray is not installed.
        MosaicBertError: what the first piece that failed raised.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError("--engine ray needs an extra: pip install 'mosaicbert[ray]'") from error
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(log_to_driver=False)
    try:
        remote = ray.remote(max_retries=_RAY_RETRIES)(_ray_work)
        pending = [remote.remote(task) for task in tasks]
        while pending:
            done, pending = ray.wait(pending, num_returns=1)
            report(ray.get(done[0]))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MosaicBertError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        raise DataError(
            f"Ray gave a piece up: {error}. What is done is kept: run the same command again."
        ) from error
    finally:
        if is_ours:
            ray.shutdown()


def _ray_work(task: Task) -> Progress:
    total = Progress()

    def add(progress: Progress) -> None:
        nonlocal total
        total = total + progress

    convert_piece(*task, add)
    return total
