"""What a run shows on the console: a progress display on a terminal, plain lines elsewhere.

rich honours `NO_COLOR` and `TERM=dumb` by itself. Lines fit into 80 columns.
"""

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mosaicbert.config.jobs import TrainerConfig
from mosaicbert.duration import Duration, Progress
from mosaicbert.train.monitors import TimeLeft
from mosaicbert.train.record import Logger
from mosaicbert.train.schedule import is_due

LOSS = "loss/train/total"
CHECKPOINT = "checkpoint/batch"
"""Metric by which the trainer says that a checkpoint is whole."""
EVAL = "metrics/"
"""Prefix of what evaluations log: `metrics/LOADER/METRIC`."""


def build_console(
    config: TrainerConfig,
    total: Duration,
    *,
    rank: int = 0,
    batches_per_epoch: int | None = None,
    console: Console | None = None,
) -> Logger | None:
    """The progress display (`progress_bar`, on a terminal), plain lines (`log_to_console`) or None.

    Rank 0 alone shows anything. With `batches_per_epoch` the time left is known within an epoch.
    """
    console = console or Console(highlight=False)
    if rank != 0:
        return None
    course = Course(total, batches_per_epoch)
    if config.progress_bar and console.is_terminal and not console.is_dumb_terminal:
        return ProgressDisplay(console, course)
    if not config.log_to_console:
        return None
    return PlainLines(console, course, Duration.parse(config.console_log_interval))


class Course:
    """How far a run is, and how long it has left; `clock` tells its seconds."""

    def __init__(
        self,
        total: Duration,
        batches_per_epoch: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.batches_per_epoch = batches_per_epoch
        self._time_left = TimeLeft(total, clock)

    def done(self, progress: Progress) -> float:
        """Share of the run."""
        return min(progress.fraction_of(self.total, self.batches_per_epoch), 1.0)

    def seconds_left(self, metrics: Mapping[str, float], progress: Progress) -> float | None:
        """The runtime estimator's figure where there is one, else our own."""
        own = self._time_left.update(progress, self.batches_per_epoch)
        hours = metrics.get("time/remaining_estimate")
        return own if hours is None else hours * 3600

    def is_due(self, interval: Duration, before: Progress, now: Progress) -> bool:
        """Whether a multiple of `interval` lies between."""
        return is_due(interval, before, now, self.total, self.batches_per_epoch)


class PlainLines:
    """One line an interval, one an evaluation, one a checkpoint."""

    def __init__(self, console: Console, course: Course, interval: Duration) -> None:
        self.console = console
        self.course = course
        self.interval = interval
        self._last = Progress()

    def log(self, metrics: Mapping[str, float], progress: Progress) -> None:
        """Print what there is to say."""
        for line in event_lines(metrics, progress):
            self._print(line)
        if LOSS not in metrics:
            return
        left = self.course.seconds_left(metrics, progress)
        before, self._last = self._last, progress
        if self.course.is_due(self.interval, before, progress):
            total = self.course.total
            share = (
                f"/{total.value:g}" if total.unit == "ba" else f" {self.course.done(progress):.0%}"
            )
            self._print("  ".join([f"ba {progress.batch}{share}", *step_words(metrics, left)]))

    def close(self) -> None:
        """Nothing is held open."""

    def _print(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)


class ProgressDisplay:
    """A bar and the newest figures, in place; evaluations and checkpoints scroll by above."""

    def __init__(self, console: Console, course: Course) -> None:
        self.console = console
        self.course = course
        self._live = Live(console=console, refresh_per_second=4)
        self._last_eval = ""
        self._last_checkpoint = ""
        self._step: tuple[Mapping[str, float], Progress, float | None] | None = None

    def log(self, metrics: Mapping[str, float], progress: Progress) -> None:
        """Show the newest figures."""
        self._live.start()  # a second start does nothing
        for line in event_lines(metrics, progress):
            self.console.print(Text(line, style="green"))
            if line.startswith("eval"):
                self._last_eval = line
            else:
                self._last_checkpoint = line
        if LOSS in metrics:
            self._step = (metrics, progress, self.course.seconds_left(metrics, progress))
        if self._step is not None:  # also after an event: it changes the last lines
            self._live.update(self._draw(*self._step))

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._live.stop()

    def _draw(self, metrics: Mapping[str, float], progress: Progress, left: float | None) -> Table:
        width = min(self.console.width, 80)
        done = self.course.done(progress)
        where = place(progress, self.course.total)
        grid = Table.grid()
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(where, style="bold"),
            ProgressBar(total=1.0, completed=done, width=max(width - len(where) - 8, 10)),
            Text(f"{done:.0%}"),
        )
        grid.add_row(bar)
        grid.add_row(Text("  ".join(step_words(metrics, left))[:width], style="cyan"))
        for line in (self._last_eval, self._last_checkpoint):
            if line:
                grid.add_row(Text("last " + line[: width - 5], style="dim"))
        return grid


def place(progress: Progress, total: Duration) -> str:
    """`ba 120/1000`, in the unit of the run's length, with the batch where that is another."""
    done, end = progress.count(total.unit), total.value
    text = f"{total.unit} {_count(done)}/{_count(end)}"
    return text if total.unit == "ba" else f"ba {progress.batch}  {text}"


def step_words(metrics: Mapping[str, float], left: float | None) -> list[str]:
    """The figures of one step, shortest form: loss, learning rate, speed, MFU, time and cost
    left.
    """
    words = [f"loss {metrics[LOSS]:.4f}"]
    if "lr" in metrics:
        words.append(f"lr {metrics['lr']:.2e}")
    if "throughput/tokens_per_sec" in metrics:
        words.append(f"{_count(metrics['throughput/tokens_per_sec'])} tok/s")
    if "throughput/device/mfu" in metrics:
        words.append(f"MFU {metrics['throughput/device/mfu']:.1%}")
    if left is not None:
        words.append(f"{clock(left)} left")
    if "cost/spent" in metrics:
        to_come = metrics.get("cost/remaining_estimate")
        words.append(f"cost {metrics['cost/spent']:.2f}" + f"+{to_come or 0:.2f}" * bool(to_come))
    return words


def event_lines(metrics: Mapping[str, float], progress: Progress) -> list[str]:
    """A line for an evaluation and one for a checkpoint, where the metrics tell of one."""
    lines = []
    scores = {name.removeprefix(EVAL): v for name, v in metrics.items() if name.startswith(EVAL)}
    if scores:
        words = [f"{name.removeprefix('eval/')} {value:.4f}" for name, value in scores.items()]
        lines.append(f"eval at ba {progress.batch}: {'  '.join(words)}")
    if CHECKPOINT in metrics:
        lines.append(f"checkpoint at ba {int(metrics[CHECKPOINT])}")
    return lines


def clock(seconds: float) -> str:
    """`3h05m`, `12m04s`, `9s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def _count(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            scale = 1e3 if letter == "k" else size
            return f"{value / scale:.1f}{letter}"
    return f"{value:g}" if value == int(value) else f"{value:.1f}"
