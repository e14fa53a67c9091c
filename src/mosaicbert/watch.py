"""`mosaicbert watch RUN_DIR`: a run's progress, from another terminal or machine.

Reads what the run itself writes, `metrics.jsonl`, so it needs no connection to the run, and shows
the last state of one that has died.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import yaml
from rich.console import Console

from mosaicbert.duration import Duration, Progress
from mosaicbert.errors import DataError
from mosaicbert.report.facts import progress_of
from mosaicbert.report.runs import open_folder, read_texts, runs_inside
from mosaicbert.train.console import (
    CHECKPOINT,
    EVAL,
    LOSS,
    Course,
    PlainLines,
    ProgressDisplay,
    clock,
)
from mosaicbert.train.loggers import parse_rows

METRICS = "metrics.jsonl"
QUIET_SECONDS = 60.0
"""After so long without a row it is worth saying so."""
PLACE = {"epoch", "batch", "sample", "token", "seconds"}


class Tail:
    """The rows of a growing file, each given out once."""

    def __init__(self, folder: str) -> None:
        self.store, root = open_folder(folder)
        self.path = f"{root}/{METRICS}"
        self._offset = 0

    def new_rows(self) -> tuple[list[dict[str, Any]], bool]:
        """Rows since the last call; whether the file began anew (they are then all of its rows).

        Raises:
            DataError: the file cannot be read.
        """
        try:
            size = self.store.size(self.path)
            again = size < self._offset
            self._offset = 0 if again else self._offset
            text = (
                self.store.cat_file(self.path, start=self._offset) if size > self._offset else b""
            )
        except FileNotFoundError:
            return [], False
        except Exception as error:  # each store has errors of its own
            raise DataError(
                f"{self.path} cannot be read ({type(error).__name__}: {error})."
            ) from None
        whole = text[: text.rfind(b"\n") + 1]
        try:
            rows = parse_rows(whole.decode(), self.path)
        except (DataError, UnicodeDecodeError):
            if self._offset == 0:
                raise
            self._offset = 0  # a resumed run rewrote the file, and it is longer already
            return self.new_rows()[0], True
        self._offset += len(whole)
        return rows, again


class View:
    """The run's own display (`train/console.py`), fed with rows of a file."""

    def __init__(self, console: Console, config: dict[str, Any]) -> None:
        self._progress = Progress()
        total = Duration.parse(config.get("max_duration", "1ba"))
        self.course = Course(total, None, lambda: self._progress.seconds)
        interval = Duration.parse(config.get("console_log_interval", "1ba"))
        live = console.is_terminal and not console.is_dumb_terminal
        self.display: ProgressDisplay | PlainLines = (
            ProgressDisplay(console, self.course)
            if live
            else PlainLines(console, self.course, interval)
        )

    def catch_up(self, rows: Sequence[dict[str, Any]]) -> None:
        """What came before: the newest step, evaluation and checkpoint, not every one."""
        newest: dict[str, dict[str, Any]] = {}
        for row in rows:
            for name in row:
                if name in (LOSS, CHECKPOINT) or name.startswith(EVAL):
                    newest[name if name in (LOSS, CHECKPOINT) else EVAL] = row
            if LOSS in row:
                self.course.seconds_left(self._metrics(row), self._at(row))
        for row in sorted(newest.values(), key=lambda row: (int(row["batch"]), LOSS in row)):
            self.show(row)

    def show(self, row: dict[str, Any]) -> None:
        """One row."""
        at = self._at(row)
        if isinstance(self.display, PlainLines) and LOSS in row and self.is_done:
            self.display.interval = Duration.parse("1ba")  # the last step is always told
        self.display.log(self._metrics(row), at)

    @property
    def is_done(self) -> bool:
        """Whether the run has come to the end of its `max_duration`."""
        return self.course.done(self._progress) >= 1

    def _at(self, row: dict[str, Any]) -> Progress:
        """Where the run stood; the length of an epoch is known once one has passed."""
        at = progress_of(row)
        if at.epoch and not self.course.batches_per_epoch:
            self.course.batches_per_epoch = at.batch // at.epoch
        length = self.course.batches_per_epoch
        in_epoch = max(at.batch - at.epoch * length, 0) if length else 0
        self._progress = replace(at, batch_in_epoch=in_epoch)
        return self._progress

    def _metrics(self, row: dict[str, Any]) -> dict[str, float]:
        return {
            name: float("nan") if value is None else value
            for name, value in row.items()
            if name not in PLACE
        }


def watch(
    folder: str,
    *,
    once: bool = False,
    every: float = 2.0,
    console: Console | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show a run until it has come to its end, or (`once`) as it stands.

    Raises:
        DataError: there is no run in the folder, or it cannot be read.
    """
    console = console or Console(highlight=False)
    view = View(console, _config(folder))
    tail = Tail(folder)
    rows, _ = tail.new_rows()
    view.catch_up(rows)
    if not rows:
        console.print(f"{folder}: no step yet", soft_wrap=True)
    quiet, told = _age(tail), False
    try:
        while not once and not (view.is_done and quiet > every):
            if quiet >= QUIET_SECONDS and not told:
                console.print(_quiet_line(quiet), soft_wrap=True)
                told = True
            sleep(every)
            rows, again = tail.new_rows()
            if again:
                console.print("The run began again.", soft_wrap=True)
                view.catch_up(rows)
            for row in [] if again else rows:
                view.show(row)
            quiet, told = (0.0, False) if rows else (quiet + every, told)
        if not view.is_done and quiet >= QUIET_SECONDS and not told:
            console.print(_quiet_line(quiet), soft_wrap=True)
    finally:
        view.display.close()
    if view.is_done:
        console.print("The run is finished.", soft_wrap=True)


def _quiet_line(seconds: float) -> str:
    return f"No news for {clock(seconds)}: it is evaluating or saving, or it has stopped."


def _age(tail: Tail) -> float:
    """Seconds since the file was last written; 0 where the store does not tell."""
    try:
        return max(time.time() - float(tail.store.modified(tail.path).timestamp()), 0.0)
    except Exception:  # not every store can tell, and nothing depends on it
        return 0.0


def _config(folder: str) -> dict[str, Any]:
    """The run's configuration.

    Raises:
        DataError: there is none, so this is no run's folder.
    """
    texts = read_texts(folder, ("config.yaml", "glue.json"))
    config = yaml.safe_load(texts.get("config.yaml", "")) or {}
    if config:
        return dict(config)
    jobs = _names(f"{folder.rstrip('/')}/jobs")
    if jobs:
        raise DataError(
            f"{folder} is a GLUE run: watch one of its jobs, such as {folder.rstrip('/')}/jobs/"
            f"{jobs[-1]} (there are: {', '.join(jobs)})."
        )
    raise DataError(
        f"{folder} is no run folder: it has no config.yaml.{runs_inside(folder)} Name the folder "
        "that `run_folder` in the YAML stands for, such as runs/NAME."
    )


def _names(folder: str) -> list[str]:
    store, root = open_folder(folder)
    try:
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in store.ls(root, False))
    except Exception:  # none there, or no right to list
        return []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("run", metavar="RUN_DIR", help="run folder, or the URI of one")
    parser.add_argument("--once", action="store_true", help="show how it stands, and end")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between looks (2)")


def main(args: argparse.Namespace) -> int:
    """Follow the run until it ends, or Ctrl-C."""
    watch(args.run, once=args.once, every=args.every)
    return 0
