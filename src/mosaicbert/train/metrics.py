"""Metrics of an evaluation: sums for masked language modelling, scikit-learn for the rest.

Each rank collects its own predictions; `compute` gathers them all, so the result is exact however
unevenly the ranks share the data. What only fills a batch up carries `IGNORE_INDEX` or NaN as label
and does not count.
"""

import logging
import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mosaicbert.batch import IGNORE_INDEX, Batch, LossOutput
from mosaicbert.errors import ConfigError, did_you_mean
from mosaicbert.train.distributed import Ranks

log = logging.getLogger(__name__)

Array = NDArray[Any]


class Metric(Protocol):
    """Fed batch by batch on each rank, computed once over all of them."""

    def update(self, output: LossOutput, batch: Batch) -> None:
        """Take in one microbatch; `output.logits` are there."""
        ...

    def compute(self, ranks: Ranks) -> dict[str, float]:
        """The results over all ranks, by name. Every rank must call it."""
        ...


MetricFactory = Callable[[], Metric]


class MaskedLM:
    """`loss` (mean over all masked tokens), `perplexity` and `accuracy` on masked tokens."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (3,) float64 on the device: loss, hits, targets

    def update(self, output: LossOutput, batch: Batch) -> None:
        """Add a microbatch up, without a wait for the device."""
        assert output.logits is not None
        logits = output.logits.reshape(-1, output.logits.shape[-1])
        labels = batch.labels.reshape(-1)
        counts = labels != IGNORE_INDEX
        hits = (logits.argmax(-1) == labels) & counts
        sums = torch.stack([output.loss_sum.double(), hits.sum().double(), counts.sum().double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def compute(self, ranks: Ranks) -> dict[str, float]:
        """NaN where there was no masked token."""
        mine = [0.0, 0.0, 0.0] if self._sums is None else self._sums.tolist()
        loss_sum, hits, targets = ranks.sum(mine)
        if not targets:
            return {"loss": np.nan, "perplexity": np.nan, "accuracy": np.nan}
        loss = loss_sum / targets
        perplexity = float(np.exp(min(loss, 700.0)))
        return {"loss": loss, "perplexity": perplexity, "accuracy": hits / targets}


def _mean_loss(total: float, count: int, ranks: Ranks) -> float:
    loss_sum, num_targets = ranks.sum([total, float(count)])
    return loss_sum / num_targets if num_targets else float("nan")


SCORES = ("accuracy", "f1", "macro_f1", "micro_f1", "mcc", "precision", "recall")
"""`f1`, `precision` and `recall` are those of class 1 where there are two classes, else the mean
over classes; `mcc` is Matthews' correlation."""


def _score(name: str, labels: Array, predictions: Array, num_labels: int) -> float:
    from sklearn import metrics as sk  # here, as it takes two seconds that pre-training can spare

    average, micro, macro = "macro", "micro", "macro"
    classes: range | None = range(num_labels)
    if labels.ndim == 2 and num_labels == 1:  # a column of one is binary data to scikit-learn
        labels, predictions, classes = labels[:, 0], predictions[:, 0], None
        average = micro = macro = "binary"
    elif labels.ndim == 1 and num_labels == 2:
        average = "binary"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one class only: the scores say so
        match name:
            case "accuracy":
                return float(sk.accuracy_score(labels, predictions))
            case "mcc":
                return float(sk.matthews_corrcoef(labels, predictions))
            case "f1":
                score = sk.f1_score(labels, predictions, average=average, zero_division=0)
            case "micro_f1":
                score = sk.f1_score(labels, predictions, average=micro, zero_division=0)
            case "macro_f1":
                score = sk.f1_score(
                    labels, predictions, labels=classes, average=macro, zero_division=0
                )
            case "precision":
                score = sk.precision_score(labels, predictions, average=average, zero_division=0)
            case _:
                score = sk.recall_score(labels, predictions, average=average, zero_division=0)
    return float(score)


class Classification:
    """`loss` and the scores asked for: one label a sample or a token, or several (multi-label).

    Of several labels those with a logit above 0 are predicted; `accuracy` then wants all right.
    """

    def __init__(self, names: Sequence[str] = ("accuracy",)) -> None:
        self.names = tuple(names)
        self._loss = 0.0
        self._num_targets = 0
        self._num_labels = 0
        self._predictions: list[Array] = []
        self._labels: list[Array] = []

    def update(self, output: LossOutput, batch: Batch) -> None:
        """Keep the predicted classes."""
        assert output.logits is not None
        self._num_labels = output.logits.shape[-1]
        self._loss += float(output.loss_sum)
        logits, labels = output.logits.reshape(-1, self._num_labels), batch.labels
        if labels.is_floating_point():  # (batch, num_labels)
            kept = ~labels.isnan().any(-1)
            labels, predictions = labels > 0.5, logits > 0
        else:
            labels = labels.reshape(-1)
            kept, predictions = labels != IGNORE_INDEX, logits.argmax(-1)
        self._labels.append(labels[kept].cpu().numpy())
        self._predictions.append(predictions[kept].cpu().numpy())
        self._num_targets += self._labels[-1].size

    def compute(self, ranks: Ranks) -> dict[str, float]:
        """NaN where there was no label."""
        labels = ranks.gather_rows(self._labels)
        predictions = ranks.gather_rows(self._predictions)
        num_labels = max(ranks.gather(self._num_labels))
        result = {"loss": _mean_loss(self._loss, self._num_targets, ranks)}
        for name in self.names:
            try:
                scored = _score(name, labels, predictions, num_labels) if len(labels) else np.nan
            except ValueError as error:
                raise ConfigError(f"Metric {name!r} does not fit these labels: {error}.") from None
            result[name] = scored
        return result


ENTITY_SCORES = ("entity_f1", "entity_precision", "entity_recall")
"""An entity counts as found where its first word, its last word and its type are right."""


class Tokens:
    """`loss`, and the scores asked for: `ENTITY_SCORES` over entities, `SCORES` over words.

    A sentence that was too long for one sample counts as two.
    """

    def __init__(self, names: Sequence[str], tags: Sequence[str]) -> None:
        self.names = tuple(names)
        self.tags = tuple(tags)
        self._words = Classification([name for name in names if name in SCORES])
        self._counts = [0, 0, 0]  # entities found, in the data, predicted

    def update(self, output: LossOutput, batch: Batch) -> None:
        """Count the entities of each sample."""
        assert output.logits is not None
        self._words.update(output, batch)
        labels = batch.labels.flatten().cpu()
        predictions = output.logits.flatten(0, -2).argmax(-1).cpu()
        if batch.cu_seqlens is not None:
            ends = batch.cu_seqlens.cpu()
        else:
            ends = torch.arange(0, labels.numel() + 1, batch.labels.shape[-1])
        for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            words = labels[start:end] != IGNORE_INDEX  # the first token of each word
            true = entities([self.tags[i] for i in labels[start:end][words].tolist()])
            found = entities([self.tags[i] for i in predictions[start:end][words].tolist()])
            for i, spans in enumerate((true & found, true, found)):
                self._counts[i] += len(spans)

    def compute(self, ranks: Ranks) -> dict[str, float]:
        """Precision, recall and F1 are 0 where there is nothing to find."""
        result = self._words.compute(ranks)
        hits, true, found = ranks.sum(self._counts)
        values = {
            "entity_f1": 2 * hits / max(true + found, 1),
            "entity_precision": hits / max(found, 1),
            "entity_recall": hits / max(true, 1),
        }
        return result | {name: values[name] for name in self.names if name in values}


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Entities of a sentence: type, first word, word behind the last.

    Reads IOB1, IOB2 (BIO), IOBES, BILOU and bare types. A tag that cannot go on begins anew, as in
    the CoNLL-2000 shared task's scoring (Tjong Kim Sang and Buchholz 2000).
    """
    found = set()
    kind, start = "", 0  # of the entity that is open; "" for none
    for at, tag in enumerate([*tags, "O"]):
        prefix, dash, name = tag.partition("-")
        if tag == "O":
            prefix, name = "O", ""
        elif not dash or prefix not in ("B", "I", "E", "S", "L", "U", "M"):
            prefix, name = "I", tag
        if kind and (name != kind or prefix in ("B", "S", "U")):
            found.add((kind, start, at))
            kind = ""
        if name and not kind:
            kind, start = name, at
        if kind and prefix in ("E", "L", "S", "U"):
            found.add((kind, start, at + 1))
            kind = ""
    return found


REGRESSION_SCORES = ("spearman", "pearson", "mse", "mae")


class Regression:
    """`loss` and, of `REGRESSION_SCORES`, those asked for."""

    def __init__(self, names: Sequence[str] = ("spearman", "pearson", "mse")) -> None:
        self.names = tuple(names)
        self._loss = 0.0
        self._predictions: list[Array] = []
        self._labels: list[Array] = []

    def update(self, output: LossOutput, batch: Batch) -> None:
        """Keep the predictions, logits of `(batch,)` or `(batch, 1)`."""
        assert output.logits is not None
        kept = ~batch.labels.isnan()
        self._loss += float(output.loss_sum)
        self._labels.append(batch.labels[kept].double().cpu().numpy())
        self._predictions.append(output.logits.reshape(-1)[kept].double().cpu().numpy())

    def compute(self, ranks: Ranks) -> dict[str, float]:
        """Correlations are 0 where labels or predictions are all the same."""
        labels = ranks.gather_rows(self._labels)
        predictions = ranks.gather_rows(self._predictions)
        result = {"loss": _mean_loss(self._loss, sum(map(len, self._labels)), ranks)}
        for name in self.names:
            if name == "mse":
                result[name] = float(np.mean((labels - predictions) ** 2))
            elif name == "mae":
                result[name] = float(np.mean(np.abs(labels - predictions)))
            else:
                result[name] = _correlation(name, labels, predictions)
        return result


def _correlation(name: str, labels: Array, predictions: Array) -> float:
    if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        log.warning("No %s correlation of constant labels or predictions: it counts as 0.", name)
        return 0.0
    from scipy import stats

    correlate = stats.spearmanr if name == "spearman" else stats.pearsonr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # near-constant input: the value stands
        return float(correlate(labels, predictions).statistic)


def classification_metric(names: Sequence[str] = ("accuracy",)) -> MetricFactory:
    """A factory of `Classification`; raises `ConfigError` for an unknown name."""
    _check_names(names, SCORES)
    return partial(Classification, tuple(names))


def regression_metric(names: Sequence[str] = ("spearman", "pearson")) -> MetricFactory:
    """A factory of `Regression`; raises `ConfigError` for an unknown name."""
    _check_names(names, REGRESSION_SCORES)
    return partial(Regression, tuple(names))


def multilabel_metric(names: Sequence[str] = ("micro_f1",)) -> MetricFactory:
    """A factory of `Classification` for several labels a sample; raises `ConfigError`."""
    _check_names(names, [name for name in SCORES if name != "mcc"])
    return partial(Classification, tuple(names))


def token_metric(names: Sequence[str], tags: Sequence[str]) -> MetricFactory:
    """A factory of `Tokens`, where class i is `tags[i]`; raises `ConfigError`."""
    _check_names(names, [*ENTITY_SCORES, *SCORES])
    return partial(Tokens, tuple(names), tuple(tags))


def _check_names(names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(
                f"There is no metric {name!r} for this kind of labels.{did_you_mean(name, known)} "
                f"Known: {', '.join(known)}."
            )
