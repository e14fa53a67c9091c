"""The eight tasks of GLUE (Wang et al. 2018, without WNLI), a row each."""

from collections.abc import Iterable
from dataclasses import dataclass

from mosaicbert.errors import ConfigError, did_you_mean


@dataclass(frozen=True, slots=True)
class GlueTask:
    """What a task is, and how it is fine-tuned where the YAML says nothing else."""

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]  # one name: regression
    lr: float
    weight_decay: float  # in decoupled AdamW's sense
    epochs: int
    batch_size: int
    eval_interval: str
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]  # what counts in the task's mean
    extra_metrics: tuple[str, ...] = ()  # reported beside them
    validation_splits: tuple[str, ...] = ("validation",)
    starts_from_mnli: bool = False  # from the MNLI checkpoint, all but the classifier head

    @property
    def num_labels(self) -> int:
        """Classes, or 1 for regression."""
        return len(self.label_names)

    @property
    def evaluations(self) -> dict[str, str]:
        """Name of each evaluation, as metrics carry it, and its split."""
        if len(self.validation_splits) == 1:
            return {"eval": self.validation_splits[0]}
        return {split.removeprefix("validation_"): split for split in self.validation_splits}


_SAME = ("not_equivalent", "equivalent")
_ENTAILS = ("entailment", "not_entailment")
_FIVE = (19, 8364, 717, 10536, 90166)
_MNLI_SPLITS = ("validation_matched", "validation_mismatched")
# The published fine-tuning recipe of MosaicBERT (Portes et al. 2023), columns in GlueTask's order.
# fmt: off
_ROWS = (
    GlueTask("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"),
             5e-5, 5e-6, 3, 48, "2300ba", (19,), ("accuracy",), validation_splits=_MNLI_SPLITS),
    GlueTask("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"),
             3e-5, 3e-6, 5, 16, "2000ba", (19,), ("accuracy", "f1")),
    GlueTask("qnli", ("question", "sentence"), _ENTAILS,
             1e-5, 1e-6, 10, 16, "1000ba", (19,), ("accuracy",)),
    GlueTask("sst2", ("sentence",), ("negative", "positive"),
             3e-5, 3e-6, 3, 16, "500ba", _FIVE[:3], ("accuracy",)),
    GlueTask("cola", ("sentence",), ("unacceptable", "acceptable"),
             5e-5, 5e-6, 10, 32, "250ba", _FIVE[:4], ("mcc",)),
    GlueTask("rte", ("sentence1", "sentence2"), _ENTAILS,
             1e-5, 1e-5, 3, 16, "100ba", _FIVE, ("accuracy",), starts_from_mnli=True),
    GlueTask("mrpc", ("sentence1", "sentence2"), _SAME,
             8e-5, 8e-6, 10, 32, "100ba", _FIVE, ("accuracy", "f1"), starts_from_mnli=True),
    GlueTask("stsb", ("sentence1", "sentence2"), ("similarity",),
             3e-5, 3e-6, 10, 32, "200ba", _FIVE, ("spearman",), ("pearson",),
             starts_from_mnli=True),
)
# fmt: on
TASKS: dict[str, GlueTask] = {task.name: task for task in _ROWS}


def pick(name: str) -> GlueTask:
    """The task of that name.

    Raises:
        ConfigError: there is none; names the near one and all there are.
    """
    if name not in TASKS:
        raise ConfigError(
            f'tasks.{name}: GLUE has no task "{name}".{did_you_mean(name, TASKS)} '
            f"Tasks: {', '.join(TASKS)}."
        )
    return TASKS[name]


def pick_all(names: Iterable[str]) -> list[GlueTask]:
    """The tasks of those names in the table's order, so that MNLI comes before those it starts."""
    chosen = {pick(name).name for name in names}
    return [task for task in TASKS.values() if task.name in chosen]
