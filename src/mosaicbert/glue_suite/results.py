"""The results of GLUE jobs: task by metric over the seeds, GLUE's mean, files and a picture.

All scores are in points, 0 to 100 (correlations: -100 to 100), as papers print them.
"""

import csv
import io
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mosaicbert.glue_suite.tasks import TASKS, GlueTask

WIDTH = 80
NO_SCORE = "-"


@dataclass(frozen=True, slots=True)
class Published:
    """A row of somebody's paper or model card: GLUE dev scores in points."""

    system: str
    glue: float
    tasks: Mapping[str, float]  # empty where only the mean was published
    source: str


# fmt: off
PUBLISHED = (
    Published("mosaic-bert-base, card", 84.3,
              {"cola": 55.1, "sst2": 92.5, "mrpc": 90.0, "stsb": 89.3, "qqp": 90.3, "mnli": 85.0,
               "qnli": 90.7, "rte": 81.4}, "model card of mosaicml/mosaic-bert-base"),
    Published("MosaicBERT, 4.6 h", 83.2, {}, "Portes et al. 2023, eight A100"),
    Published("MosaicBERT, 1.13 h", 79.6, {}, "Portes et al. 2023, eight A100"),
    Published("BERT base, 11.5 h", 83.2, {}, "Portes et al. 2023, eight A100"),
    Published("Cramming, GPU-day", 78.6, {}, "Geiping and Goldstein 2022"),
    Published("M2-BERT 80M", 79.9, {}, "Fu et al. 2023"),
    Published("M2-BERT 110M", 80.9, {}, "Fu et al. 2023"),
    Published("ModernBERT base", 88.4, {}, "Warner et al. 2024"),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class JobResult:
    """How one job (a task with a seed) ended.

    `metrics` is the last evaluation, as the trainer names it: `metrics/<evaluation>/<metric>`,
    between 0 and 1.
    """

    task: str
    seed: int
    metrics: dict[str, float]
    seconds: float
    batches: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "JobResult":
        """What `to_dict` gave.

        Raises:
            TypeError: a field is missing or unknown.
        """
        return cls(**content)


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task over its seeds, in points."""

    task: str
    metric: str
    mean: float
    std: float | None  # over seeds, of a sample (n - 1); None for one seed, NaN as the mean
    n: int
    counts: bool  # in the mean of the task


def metric_keys(task: GlueTask) -> dict[str, tuple[str, bool]]:
    """Name of each metric -> its key in `JobResult.metrics`, and whether the task's mean has it."""
    keys = {}
    for evaluation in task.evaluations:
        suffix = f" {evaluation}" if len(task.validation_splits) > 1 else ""
        for metric in (*task.metrics, *task.extra_metrics):
            key = f"metrics/{evaluation}/{metric}"
            keys[f"{metric}{suffix}"] = (key, metric in task.metrics)
    return keys


class Results:
    """The results of the jobs that ended well, in the order of the table of tasks."""

    def __init__(self, jobs: Sequence[JobResult]) -> None:
        assert len({(job.task, job.seed) for job in jobs}) == len(jobs), "a job counted twice"
        self.jobs = sorted(jobs, key=lambda job: list(TASKS).index(job.task))
        self.tasks = [task for task in TASKS.values() if any(j.task == task.name for j in jobs)]

    def scores(self) -> list[Score]:
        """Every metric of every task that was run. A metric that a job lacks is NaN."""
        found = []
        for task in self.tasks:
            jobs = [job for job in self.jobs if job.task == task.name]
            for metric, (key, counts) in metric_keys(task).items():
                values = [100 * job.metrics.get(key, math.nan) for job in jobs]
                std = _deviation(values) if len(values) > 1 else None
                mean = statistics.fmean(values)
                found.append(Score(task.name, metric, mean, std, len(values), counts))
        return found

    def task_means(self) -> dict[str, float]:
        """Each task's mean over its metrics and seeds."""
        scores = self.scores()
        return {
            task.name: statistics.fmean(s.mean for s in scores if s.task == task.name and s.counts)
            for task in self.tasks
        }

    @property
    def glue(self) -> float:
        """The mean of the tasks that were run; GLUE's own only if `is_complete`."""
        means = self.task_means()
        return statistics.fmean(means.values()) if means else math.nan

    @property
    def is_complete(self) -> bool:
        """Whether all eight tasks were run."""
        return len(self.tasks) == len(TASKS)

    def to_dict(self, published: bool = False) -> dict[str, Any]:
        """Everything, for JSON. Scores that could not be computed are None."""
        content: dict[str, Any] = {
            "unit": "points (0 to 100)",
            "glue": self.glue,
            "num_tasks": len(self.tasks),
            "is_complete": self.is_complete,
            "task_means": self.task_means(),
            "scores": [asdict(score) for score in self.scores()],
            "seconds": sum(job.seconds for job in self.jobs),
            "jobs": [job.to_dict() for job in self.jobs],
        }
        if published:
            content["published"] = [{**asdict(row)} for row in PUBLISHED]
        return _without_nan(content)  # type: ignore[no-any-return]

    def table(self, published: bool = False) -> str:
        """Text of at most 80 columns: task by metric, GLUE's mean, published rows on request."""
        table = Table("task", "metric", box=SIMPLE_HEAD, title="GLUE, validation sets")
        for heading in ("mean", "std", "n", "seconds"):
            table.add_column(heading, justify="right")
        previous = None
        for score in self.scores():
            seconds = sum(job.seconds for job in self.jobs if job.task == score.task)
            is_first = score.task != previous
            previous = score.task
            table.add_row(
                score.task if is_first else "",
                score.metric if score.counts else f"({score.metric})",
                _points(score.mean),
                "" if score.std is None else _points(score.std),
                str(score.n),
                f"{seconds:,.0f}" if is_first else "",
            )
        table.add_section()
        total = sum(job.seconds for job in self.jobs)
        table.add_row(self._glue_name(), "", _points(self.glue), "", "", f"{total:,.0f}")
        text = _render(table)
        return text + _render(self._comparison()) if published else text

    def _glue_name(self) -> str:
        return "GLUE" if self.is_complete else f"mean of {len(self.tasks)} of {len(TASKS)} tasks"

    def _comparison(self) -> Table:
        """The run beside published rows, by the means of the tasks."""
        table = Table("system", box=SIMPLE_HEAD, title="Means of the tasks", padding=(0, 1, 0, 0))
        for name in (*TASKS, "GLUE"):
            table.add_column(name, justify="right")
        means = self.task_means()
        glue = self.glue if self.is_complete else math.nan
        rows = [("this run", means, glue), *((p.system, p.tasks, p.glue) for p in PUBLISHED)]
        for system, tasks, mean in rows:
            cells = [_points(tasks.get(name, math.nan), 1) for name in TASKS]
            table.add_row(system, *cells, _points(mean, 1))
        if not self.is_complete:
            table.caption = "This run has no GLUE mean: that takes all eight tasks."
        return table

    def write(self, folder: Path, published: bool = False) -> None:
        """Write `glue.json`, `glue.csv` and `glue.png` into `folder`, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(published), indent=1, allow_nan=False)
        _write_whole(folder / "glue.json", lambda path: path.write_text(text + "\n"))
        _write_whole(folder / "glue.csv", lambda path: path.write_text(self._csv()))
        if self.tasks:
            _write_whole(folder / "glue.png", lambda path: self._draw(path, published))

    def _csv(self) -> str:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["task", "metric", "mean", "std", "n", "counts"])
        for s in self.scores():
            std = "" if s.std is None else f"{s.std:.4f}"
            writer.writerow([s.task, s.metric, f"{s.mean:.4f}", std, s.n, int(s.counts)])
        writer.writerow([self._glue_name(), "mean", f"{self.glue:.4f}", "", len(self.tasks), 1])
        return buffer.getvalue()

    def _draw(self, path: Path, published: bool) -> None:
        """A bar a task and one for the mean, with each seed's score as a point."""
        from matplotlib.figure import Figure

        means = {**self.task_means(), self._glue_name().replace(" tasks", ""): self.glue}
        figure = Figure(figsize=(max(5, 1.2 + 0.9 * len(means)), 4), layout="constrained")
        axes = figure.subplots()
        colors = ["C0"] * len(self.tasks) + ["C1"]
        heights = [0.0 if math.isnan(mean) else mean for mean in means.values()]
        axes.bar(range(len(means)), heights, width=0.6, color=colors, alpha=0.7)
        for x, task in enumerate(self.tasks):
            seeds = [job_mean(job) for job in self.jobs if job.task == task.name]
            axes.scatter([x] * len(seeds), seeds, s=12, color="black", alpha=0.6, zorder=3)
        if published:
            row = PUBLISHED[0]
            shown = [row.tasks[task.name] for task in self.tasks] + [row.glue] * self.is_complete
            axes.scatter(range(len(shown)), shown, marker="_", s=500, color="C3", label=row.system)
            figure.legend(loc="outside upper right", frameon=False)
        labels = [f"{name}\n{_points(mean, 1)}" for name, mean in means.items()]
        axes.set_xticks(range(len(means)), labels)
        axes.set_ylim(min([0.0, *heights]), 100)
        axes.set_ylabel("points on the validation set")
        axes.set_title("GLUE: means of the tasks; a point a seed")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="png", dpi=150)


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample; NaN where a value is none that is finite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def job_mean(job: JobResult) -> float:
    """The mean of the metrics that count, in points."""
    keys = [key for key, counts in metric_keys(TASKS[job.task]).values() if counts]
    return statistics.fmean(100 * job.metrics.get(key, math.nan) for key in keys)


def _points(value: float, digits: int = 2) -> str:
    return NO_SCORE if math.isnan(value) else f"{value:.{digits}f}"


def _render(table: Table) -> str:
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _without_nan(content: Any) -> Any:
    """The same for JSON, which has no NaN: None stands for it."""
    if isinstance(content, Mapping):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)
