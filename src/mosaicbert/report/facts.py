"""What a report says of a run in words and numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mosaicbert.duration import Duration, Progress
from mosaicbert.errors import ConfigError
from mosaicbert.report.charts import TRAIN_LOSS
from mosaicbert.report.runs import Run
from mosaicbert.train.console import clock
from mosaicbert.train.trackers import flatten

MISSING = "-"


def summary(run: Run) -> dict[str, str]:
    """The figures that decide: how far, how good, how fast, on what."""
    found = {"state": state(run)} | _results(run) | _speed(run)
    found |= {
        "model": str(run.config.get("model", {}).get("name", MISSING)),
        "hardware": hardware(run.environment),
        "versions": _versions(run.environment),
        "commit": str(run.environment.get("commit") or MISSING)[:12],
        "started": str(run.environment.get("started", MISSING)),
    }
    return found


def state(run: Run) -> str:
    """How far the run has come."""
    if not run.rows:
        return "GLUE results" if run.glue else "no step yet"
    last = run.rows[-1]
    steps = f"{last['batch']:,} steps"
    try:
        total = Duration.parse(run.config["max_duration"])
    except (KeyError, ConfigError):
        return steps
    done = progress_of(last).fraction_of(total)
    return f"{steps}, finished" if done >= 1 else f"{steps}, {done:.0%} of {total}"


def progress_of(row: Mapping[str, Any]) -> Progress:
    """Where the run stood when the row was written."""
    counts = {name: int(row[name]) for name in ("epoch", "batch", "sample", "token")}
    return Progress(**counts, seconds=float(row["seconds"]))


def _results(run: Run) -> dict[str, str]:
    found = {}
    if (loss := run.last(TRAIN_LOSS)) is not None:
        found["training loss, last step"] = f"{loss:.4f}"
    for metric in run.metrics("metrics/"):
        value = run.last(metric)
        name = metric.removeprefix("metrics/").removeprefix("eval/").replace("/", " ")
        found[f"validation {name}"] = MISSING if value is None else f"{value:.4f}"
    if run.glue:
        mean = run.glue.get("glue")
        name = "GLUE" if run.glue.get("is_complete") else "GLUE, mean of the tasks run"
        found[name] = MISSING if mean is None else f"{mean:.2f}"
    return found


def _speed(run: Run) -> dict[str, str]:
    found = {}
    if run.rows:
        last = run.rows[-1]
        found["time"] = clock(last["seconds"])
        found["tokens"] = f"{last['token']:,.0f}"
    if (rate := run.last("throughput/tokens_per_sec")) is not None:
        found["tokens a second"] = f"{rate:,.0f}"
    if (mfu := run.last("throughput/device/mfu")) is not None:
        found["MFU"] = f"{mfu:.1%}"
    if (wait := run.last("throughput/data_wait_share")) is not None:
        found["waiting for data"] = f"{wait:.1%}"
    for metric in ("memory/peak_allocated_mem", "memory/peak_rss"):
        values = [y for _, y in run.points(metric) if math.isfinite(y)]
        if values:
            found["peak memory"] = f"{max(values):.1f} GB"
    if (cost := run.last("cost/spent")) is not None:
        found["cost"] = f"{cost:,.2f}"
    return found


def hardware(environment: Mapping[str, Any]) -> str:
    """`8 x NVIDIA H100 80GB HBM3`, or the CPU's threads."""
    gpus = environment.get("gpus") or []
    if gpus:
        kinds = dict.fromkeys(gpus)
        return ", ".join(f"{gpus.count(kind)} x {kind}" for kind in kinds)
    threads = environment.get("cpu_threads")
    return f"CPU, {threads} threads" if threads else MISSING


def _versions(environment: Mapping[str, Any]) -> str:
    versions = environment.get("versions") or {}
    shown = [f"{name} {versions[name]}" for name in ("torch", "transformers") if versions.get(name)]
    return ", ".join(shown) or MISSING


def table(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Rows (name, one cell for each column), for every name that any column has."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, MISSING) for column in columns]) for name in names]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The keys of the configuration in which the runs differ."""
    columns = [{key: str(v) for key, v in flatten(run.config)} for run in runs]
    return [(name, cells) for name, cells in table(columns) if len(set(cells)) > 1]


def glue_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Each score of each task: mean over seeds, spread, number of seeds; then the mean."""
    columns: list[dict[str, str]] = []
    for run in runs:
        column = {}
        for score in (run.glue or {}).get("scores", []):
            name = f"{score['task']} {score['metric']}"
            column[name if score.get("counts", True) else f"({name})"] = _score(score)
        for task, mean in (run.glue or {}).get("task_means", {}).items():
            column[f"{task}, mean"] = _number(mean)
        if run.glue:
            column["mean of the tasks"] = _number(run.glue.get("glue"))
        columns.append(column)
    return table(columns)


def _score(score: Mapping[str, Any]) -> str:
    text = _number(score.get("mean"))
    if score.get("std") is not None:
        text += f" ± {score['std']:.2f}"
    return f"{text} ({score['n']})" if score.get("n", 1) > 1 else text


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"
