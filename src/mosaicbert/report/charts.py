"""Which charts a report has, and their points; `svg` and `png` draw them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mosaicbert.report.runs import Run

MAX_POINTS = 400
"""Points of one line; more are averaged in groups, so that a long run's report stays small."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """The values of one run; `marks`: few of them, each worth a dot."""

    run: int
    points: list[Point]
    marks: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over one x-axis, or (`bars`) a group of bars for each of `categories`."""

    name: str
    title: str
    x_label: str
    lines: list[Line]
    percent: bool = False
    categories: tuple[str, ...] = ()


AXES = {"batch": "steps", "token": "tokens", "hours": "hours"}
TRAIN_LOSS = "loss/train/total"
SINGLE: tuple[tuple[str, str, str, bool], ...] = (
    ("lr", "lr", "Learning rate", False),
    ("l2_norm/grad/global", "grad-norm", "Gradient norm", False),
    ("mask_rate", "mask-rate", "Share of tokens to predict", True),
    ("throughput/tokens_per_sec", "tokens-per-second", "Real tokens a second", False),
    ("throughput/device/mfu", "mfu", "Model FLOPs utilisation (MFU)", True),
    ("throughput/data_wait_share", "data-wait", "Share of time waiting for data", True),
    ("memory/peak_allocated_mem", "memory", "Peak memory of the GPU (GB)", False),
    ("memory/peak_rss", "process-memory", "Peak memory of the process (GB)", False),
)


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Every chart that at least one run has values for."""
    found = [*_loss_charts(runs), *_score_charts(runs)]
    for metric, name, title, percent in SINGLE:
        lines = [_line(i, run.points(metric)) for i, run in enumerate(runs)]
        found.append(Chart(name, title, "steps", lines, percent))
    found.append(_glue_chart(runs))
    for chart in found:
        chart.lines[:] = [line for line in chart.lines if _has_values(line)]
    return [chart for chart in found if chart.lines]


def _loss_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    for axis, label in AXES.items():
        lines = [_line(i, run.points(TRAIN_LOSS, axis)) for i, run in enumerate(runs)]
        for i, run in enumerate(runs):
            for metric in run.metrics("metrics/"):
                if metric.endswith("/loss"):
                    lines.append(_line(i, run.points(metric, axis), marks=True))
        yield Chart(f"loss-{label}", f"Loss against {label}", label, lines)


def _score_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    """One chart for each score of the evaluations, such as accuracy."""
    names = dict.fromkeys(name for run in runs for name in run.metrics("metrics/"))
    for metric in names:
        if metric.endswith(("/loss", "/perplexity")):
            continue
        lines = [_line(i, run.points(metric), marks=True) for i, run in enumerate(runs)]
        title = metric.removeprefix("metrics/").removeprefix("eval/").replace("/", ": ")
        name = metric.removeprefix("metrics/").replace("/", "-")
        yield Chart(name, f"Validation {title}", "steps", lines)


def _glue_chart(runs: Sequence[Run]) -> Chart:
    tasks = tuple(dict.fromkeys(t for run in runs for t in (run.glue or {}).get("task_means", ())))
    lines = []
    for index, run in enumerate(runs):
        means = (run.glue or {}).get("task_means", {})
        values = [(float(i), means[task]) for i, task in enumerate(tasks) if task in means]
        points = [(x, math.nan if y is None else float(y)) for x, y in values]
        lines.append(Line(index, points))
    return Chart("glue", "GLUE: mean of each task (points)", "", lines, categories=tasks)


def _line(run: int, points: list[Point], marks: bool = False) -> Line:
    few = marks and len(points) <= MAX_POINTS
    return Line(run, points if few else thin(points), few)


def thin(points: list[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: the means of groups of neighbours. A group with a NaN is NaN."""
    size = math.ceil(len(points) / limit)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    mean: Callable[[list[float]], float] = lambda values: sum(values) / len(values)  # noqa: E731
    return [(mean([x for x, _ in group]), mean([y for _, y in group])) for group in groups]


def _has_values(line: Line) -> bool:
    return any(math.isfinite(y) for _, y in line.points)
