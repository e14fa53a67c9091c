"""Which evaluation of a run was the best, and whether to go on."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

from mosaicbert.duration import Progress
from mosaicbert.errors import ConfigError

log = logging.getLogger(__name__)

LOWER_IS_BETTER = ("loss", "perplexity", "mse", "mae")


@dataclass(slots=True)
class Best:
    """The evaluations of a run, by one of their metrics.

    The trainer notes `evaluations` in each checkpoint, so a resumed run decides as one that was
    never cut off. NaN is worse than everything.
    """

    metric: str
    """Such as `metrics/eval/accuracy`."""
    keep: bool = False
    """Keep the checkpoint of the best evaluation, and report that evaluation."""
    patience: int | None = None
    """End the run after so many evaluations in a row that were no better."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """`{"batch": int, "checkpoint": str, "metrics": {name: value}}`, oldest first."""

    def add(self, metrics: dict[str, float], progress: Progress) -> bool:
        """Take an evaluation in; whether it is the best so far.

        Raises:
            ConfigError: there is no such metric.
        """
        if self.metric not in metrics:
            raise ConfigError(
                f"No evaluation gives {self.metric}. There are: {', '.join(metrics)}."
            )
        name = f"ep{progress.epoch}-ba{progress.batch}"
        self.evaluations.append(
            {"batch": progress.batch, "checkpoint": name, "metrics": dict(metrics)}
        )
        return self.best is self.evaluations[-1]

    @property
    def best(self) -> dict[str, Any]:
        """The best evaluation; of equals the first."""
        return max(self.evaluations, key=self._rank)

    @property
    def is_exhausted(self) -> bool:
        """Whether patience is at its end."""
        if self.patience is None or not self.evaluations:
            return False
        since = len(self.evaluations) - 1 - self.evaluations.index(self.best)
        return since >= self.patience

    def summary(self) -> str:
        """`metrics/eval/accuracy 0.9100 at batch 200`."""
        best = self.best
        return f"{self.metric} {best['metrics'][self.metric]:.4f} at batch {best['batch']}"

    def _rank(self, evaluation: dict[str, Any]) -> float:
        value = float(evaluation["metrics"][self.metric])
        if math.isnan(value):
            return -math.inf
        return -value if self.metric.rpartition("/")[2] in LOWER_IS_BETTER else value
