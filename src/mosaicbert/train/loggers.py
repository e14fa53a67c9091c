"""Where measurements go: JSONL and CSV in the run folder, and the trackers of `loggers`.

The run folder holds `metrics.jsonl` (the record), `metrics.csv` (the same for a spreadsheet),
`config.yaml` and `environment.json`. A tracker that fails or hangs never stops the training.
"""

import contextlib
import csv
import io
import json
import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import yaml

from mosaicbert.config.sections import LoggersConfig
from mosaicbert.duration import Progress
from mosaicbert.errors import DataError
from mosaicbert.redaction import redact
from mosaicbert.train import trackers
from mosaicbert.train.environment import describe_environment
from mosaicbert.train.record import Logger

log = logging.getLogger(__name__)


def build_loggers(
    config: LoggersConfig | None,
    run_folder: str | Path | None,
    run_name: str,
    config_dict: Mapping[str, Any],
    rank: int,
) -> list[Logger]:
    """The loggers of a run; rank 0 alone has any. Nothing is written before the run starts.

    `config_dict`: the whole configuration; what looks like a secret is blanked out here.

    Raises:
        ConfigError: a tracker's package is missing, or a setting of it is unknown.
    """
    if rank != 0:
        return []
    safe_config = redact(config_dict)
    folder = None if run_folder is None else Path(run_folder)
    opened = trackers.build_trackers(config, trackers.Run(run_name, folder, safe_config))
    loggers: list[Logger] = [] if folder is None else [RunFolderLogger(folder, safe_config)]
    loggers += [Background(name, open_tracker) for name, open_tracker in opened.items()]
    return loggers


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()  # gone already, unless something went wrong


class RunFolderLogger:
    """Appends each row to `metrics.jsonl` and `metrics.csv`, flushed at once.

    When the run starts it writes `config.yaml` (of `config`) and `environment.json`.

    A row is the progress (`epoch batch sample token seconds`) and the metrics; NaN and infinities
    are null (JSON) or empty (CSV). When a resumed run starts, rows beyond its starting point go, so
    that no step stands twice; a run that starts anew keeps the earlier rows as
    `metrics.previous.jsonl`. New metrics give the CSV new columns: it is rewritten from the JSONL.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.config = dict(config or {})
        self.jsonl = folder / "metrics.jsonl"
        self.csv = folder / "metrics.csv"
        self._jsonl_file: TextIO | None = None
        self._csv_file: TextIO | None = None
        self._columns: dict[str, None] = {}
        self._start = 0
        self._known_at_start: set[str] = set()

    def start(self, progress: Progress) -> None:
        """Say where the run starts, before the first row; without it the first row tells.

        Raises:
            DataError: the run folder cannot be written.
        """
        with self._telling():
            self._describe_run()
            if progress.batch == 0 and self.jsonl.exists():
                os.replace(self.jsonl, self.jsonl.with_name("metrics.previous.jsonl"))
            kept = [row for row in read_rows(self.jsonl) if row["batch"] <= progress.batch]
            write_whole(self.jsonl, "".join(json.dumps(row) + "\n" for row in kept))
            self._columns = dict.fromkeys(name for row in kept for name in row)
            self._start = progress.batch
            self._known_at_start = {n for row in kept if row["batch"] == self._start for n in row}
            self._jsonl_file = self.jsonl.open("a", encoding="utf-8")
            self._rewrite_csv(kept)

    def _describe_run(self) -> None:
        text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
        environment = json.dumps(describe_environment(), indent=2)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "config.yaml", text)
        write_whole(self.folder / "environment.json", environment + "\n")

    def log(self, metrics: Mapping[str, float], progress: Progress) -> None:
        """Append one row."""
        if self._jsonl_file is None:
            self.start(Progress(batch=max(progress.batch - 1, 0)))
        assert self._jsonl_file is not None
        if progress.batch == self._start and metrics.keys() <= self._known_at_start:
            return  # a run that was at its end evaluates again, to report on it
        row = _row(metrics, progress)
        with self._telling():
            self._jsonl_file.write(json.dumps(row) + "\n")
            self._jsonl_file.flush()
            if row.keys() <= self._columns.keys():
                assert self._csv_file is not None
                self._write_csv(self._csv_file, [row])
            else:
                self._columns |= dict.fromkeys(row)
                self._rewrite_csv(read_rows(self.jsonl))

    def close(self) -> None:
        """Close both files."""
        for file in (self._jsonl_file, self._csv_file):
            with contextlib.suppress(OSError):  # of a row that could not be written, which was told
                if file is not None:
                    file.close()
        self._jsonl_file = self._csv_file = None

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Turn a full disk and the like into a `DataError`."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"run_folder: {self.folder} cannot be written ({error.strerror}). Free space, or "
                "name another folder, or null for none."
            ) from error

    def _rewrite_csv(self, rows: Iterable[Mapping[str, Any]]) -> None:
        if self._csv_file is not None:
            self._csv_file.close()
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerow(self._columns)
        self._write_csv(text, rows)
        write_whole(self.csv, text.getvalue())
        self._csv_file = self.csv.open("a", encoding="utf-8", newline="")

    def _write_csv(self, file: TextIO, rows: Iterable[Mapping[str, Any]]) -> None:
        csv.DictWriter(file, list(self._columns), lineterminator="\n").writerows(rows)
        file.flush()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line that was cut off by a kill is left out.

    Raises:
        DataError: another line is no row.
    """
    return parse_rows(path.read_text(encoding="utf-8"), str(path)) if path.exists() else []


def parse_rows(text: str, where: str) -> list[dict[str, Any]]:
    """The rows in the text of a `metrics.jsonl`; `where` names it in errors. See `read_rows`."""
    lines = text.split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last "\n" is cut off
        try:
            row = json.loads(line)
            rows.append({**row, "batch": int(row["batch"])})
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{where}, line {number} is no row of metrics. Move the file away, or repair it."
            ) from None
    return rows


def _row(metrics: Mapping[str, float], progress: Progress) -> dict[str, float | None]:
    place = asdict(progress)
    row = {name: place[name] for name in ("epoch", "batch", "sample", "token", "seconds")}
    row |= metrics
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


class Background:
    """A tracker in its own thread: neither its errors nor its waits reach the training.

    Errors are told once; after `MAX_ERRORS` in a row the tracker is given up. Rows wait in a queue;
    one that is full (the tracker hangs) drops them.
    """

    MAX_ERRORS = 5
    MAX_WAITING_ROWS = 10_000

    def __init__(
        self, name: str, open_tracker: Callable[[Progress], Logger], close_seconds: float = 60.0
    ) -> None:
        self.name = name
        self.close_seconds = close_seconds
        self._open = open_tracker
        self._rows: queue.Queue[tuple[dict[str, float], Progress] | None]
        self._rows = queue.Queue(self.MAX_WAITING_ROWS)
        self._told: set[str] = set()
        self._thread = threading.Thread(target=self._work, name=f"logger-{name}", daemon=True)

    def log(self, metrics: Mapping[str, float], progress: Progress) -> None:
        """Hand the row over; returns at once."""
        if not self._thread.is_alive() and self._thread.ident is None:
            self._thread.start()
        try:
            self._rows.put_nowait((dict(metrics), Progress(**asdict(progress))))
        except queue.Full:
            self._tell_once("full", "does not keep up; rows are dropped")

    def close(self) -> None:
        """Wait until the tracker has everything, at most `close_seconds`."""
        if self._thread.ident is None:
            return
        with contextlib.suppress(queue.Full):
            self._rows.put(None, timeout=self.close_seconds)
        self._thread.join(self.close_seconds)
        if self._thread.is_alive():
            self._tell_once("close", f"did not finish within {self.close_seconds:g} s")

    def _work(self) -> None:
        tracker: Logger | None = None
        errors = 0
        while (item := self._rows.get()) is not None:
            if errors >= self.MAX_ERRORS:
                continue  # given up: only empty the queue
            try:
                tracker = tracker or self._open(item[1])
                tracker.log(*item)
                errors = 0
            except Exception as error:
                errors += 1
                self._tell_once("error", f"failed: {type(error).__name__}: {error}")
                if errors == self.MAX_ERRORS:
                    self._tell_once("given up", f"failed {errors} times in a row and is given up")
        try:
            if tracker is not None:
                tracker.close()
        except Exception as error:
            self._tell_once("error", f"failed: {type(error).__name__}: {error}")

    def _tell_once(self, kind: str, what: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            log.warning("Logger %s %s. Training goes on without it.", self.name, what)
