"""What is seen while the jobs run: one line a job, in place of many processes' printouts."""

import math
import sys
import time
from collections.abc import Collection, Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table


class NamedJob(Protocol):
    """All that is shown of a job before it starts."""

    @property
    def name(self) -> str:
        """Task and seed."""
        ...


class LiveTable:
    """A table that follows the queue's events; plain lines where the output is no terminal.

    A context manager; `on_event` is what `run_jobs` calls.
    """

    def __init__(self, jobs: Sequence[NamedJob], finished: Collection[str], show: bool) -> None:
        self._rows = {
            job.name: {"state": "done before" if job.name in finished else "waiting"}
            for job in jobs
        }
        self._started: dict[str, float] = {}
        self._first: dict[str, tuple[float, float]] = {}  # word of progress: when, and how far
        self._console = Console(file=sys.stderr)
        self._live = (
            Live(console=self._console, get_renderable=self._table, refresh_per_second=2)
            if show and self._console.is_terminal
            else None
        )

    def __enter__(self) -> "LiveTable":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def on_event(self, kind: str, job: Any, detail: Any) -> None:
        """Take in one event of the queue."""
        row = self._rows[job.name]
        if kind == "start":
            self._started[job.name] = time.monotonic()
            self._first.pop(job.name, None)
            row["state"] = "0%"
        elif kind == "progress":
            row |= self._progress(job.name, detail)
        elif kind == "done":
            spent = _clock(time.monotonic() - self._started[job.name])
            row |= {"state": "done", "left": spent, "metric": _metric(detail.metrics)}
        elif kind == "again":
            row |= {"state": "waiting", "left": "", "metric": "out of GPU memory, goes on later"}
        else:
            row |= {"state": "FAILED", "left": "", "metric": str(detail).splitlines()[0]}
        if self._live is None and kind != "progress":
            words = (kind, job.name, row.get("metric", ""), row.get("left", ""))
            print("  ".join(word for word in words if word), file=sys.stderr, flush=True)

    def _progress(self, name: str, detail: dict[str, Any]) -> dict[str, str]:
        done = min(max(float(detail["done"]), 0.0), 1.0)
        now = time.monotonic()
        since, done_then = self._first.setdefault(name, (now, done))  # start-up tells nothing
        found = {"state": f"{done:.0%}"}
        if done > done_then:
            left = (now - since) * (1 - done) / (done - done_then)
            found["left"] = f"{_clock(left)} left"
        if detail["metrics"]:
            found["metric"] = _metric(detail["metrics"])
        return found

    def _table(self) -> Table:
        table = Table("job", "progress", "last evaluation", "time", box=None)
        for name, row in self._rows.items():
            table.add_row(name, row["state"], row.get("metric", ""), row.get("left", ""))
        return table


def _metric(metrics: dict[str, float]) -> str:
    """The metrics of an evaluation in one cell, without losses."""
    shown = {
        name.removeprefix("metrics/").removeprefix("eval/"): value
        for name, value in metrics.items()
        if "loss" not in name
    }
    return " ".join(
        f"{name} {value:.3f}" if math.isfinite(value) else f"{name} {value}"
        for name, value in sorted(shown.items())
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
