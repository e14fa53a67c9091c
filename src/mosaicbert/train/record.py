"""What the trainer tells monitors, loggers and its caller about a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from mosaicbert.duration import Progress

if TYPE_CHECKING:
    from mosaicbert.train.trainer import Trainer


@dataclass(slots=True)
class StepRecord:
    """One optimizer step. Counts and the loss are global: over all ranks."""

    progress: Progress
    """Where the run stands after the step (a copy)."""
    loss: float
    """Mean loss over all targets of the step."""
    lr: dict[str, float]
    """Learning rate the step was taken with, by parameter group."""
    grad_norm: float | None
    """Norm of all gradients before clipping, where something asked for it."""
    num_tokens: int
    """Real tokens, without padding."""
    num_samples: int
    """Samples."""
    seconds: float
    """Wall clock of the step, without evaluation and saving."""
    data_wait_seconds: float
    """Part of it in which this rank waited for its loader."""
    extra: dict[str, float] = field(default_factory=dict)
    """Further measurements of the trainer's own."""


class Monitor(Protocol):
    """Measures, or judges, each step. Runs on every rank, so that all act alike.

    A monitor may also have:
    - `reads_gradients = True`: `after_step` sees the gradients of its own step. On a GPU the
      trainer then waits for each step before it starts the next (about one per cent slower).
    - `judge(loss, grad_norm, progress) -> "go" | "skip" | "rewind"`: asked before the update;
      `skip` leaves the update out, `rewind` takes weights and optimizer back to the newest
      checkpoint. The data goes on behind the step in both cases, or it would come back.
    """

    def after_step(self, record: StepRecord, trainer: "Trainer") -> dict[str, float]:
        """Metrics of the step, by name.

        Raises:
            TrainingError: the run should not go on.
        """
        ...


class Logger(Protocol):
    """Somewhere measurements go. The trainer calls it on rank 0 only.

    A logger may also have `start(progress)`: told where the run starts, before the first row.
    """

    def log(self, metrics: Mapping[str, float], progress: Progress) -> None:
        """Note metrics measured at this progress."""
        ...

    def close(self) -> None:
        """Write out what is still held back."""
        ...


@dataclass(slots=True)
class TrainResult:
    """How a run ended."""

    progress: Progress
    train_loss: float
    """Loss of the last step; NaN where no step was left to take."""
    metrics: dict[str, float]
    """The last evaluation."""
    checkpoint: str | None
    """The last checkpoint written or loaded: folder or URI."""
    seconds: float
    """Wall clock of this call."""
    tokens_per_second: float
    """Real tokens over the steps' own seconds, without the first step (it compiles); or NaN."""
