"""Metrics against direct computation, over batches that are filled up."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from tiny_run import ALONE
from torch.nn import functional as F

from mosaicbert.batch import IGNORE_INDEX, Batch, LossOutput
from mosaicbert.errors import ConfigError
from mosaicbert.train.metrics import (
    MaskedLM,
    Regression,
    classification_metric,
    multilabel_metric,
    regression_metric,
)


def batch_of(labels):
    return Batch(torch.zeros(1, dtype=torch.long), labels, 0, 0, 0, 0)


def feed(metric, logits, labels, loss_sum=None):
    cut = len(labels) // 3
    for part in (slice(0, cut), slice(cut, None)):
        loss = torch.tensor(0.0) if loss_sum is None else loss_sum(logits[part], labels[part])
        metric.update(LossOutput(loss, logits[part]), batch_of(labels[part]))
    return metric.compute(ALONE)


def cross_entropy_sum(logits, labels):
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_masked_lm():
    logits, labels = torch.randn(30, 7), torch.randint(0, 7, (30,))
    labels[::4] = IGNORE_INDEX
    result = feed(MaskedLM(), logits, labels, cross_entropy_sum)
    real = labels != IGNORE_INDEX
    expected = float(F.cross_entropy(logits[real], labels[real]))
    assert result["loss"] == pytest.approx(expected, rel=1e-6)
    assert result["perplexity"] == pytest.approx(np.exp(expected), rel=1e-5)
    hits = (logits.argmax(-1) == labels)[real]
    assert result["accuracy"] == pytest.approx(float(hits.float().mean()))


def test_masked_lm_of_nothing():
    assert np.isnan(MaskedLM().compute(ALONE)["loss"])


@pytest.mark.parametrize("num_labels", [2, 3])
def test_classification(num_labels):
    logits, labels = torch.randn(40, num_labels), torch.randint(0, num_labels, (40,))
    labels[35:] = IGNORE_INDEX
    names = ("accuracy", "f1", "macro_f1", "micro_f1", "mcc", "precision", "recall")
    result = feed(classification_metric(names)(), logits, labels, cross_entropy_sum)
    y, p = labels[:35].numpy(), logits[:35].argmax(-1).numpy()
    average = "binary" if num_labels == 2 else "macro"
    assert result == pytest.approx(
        {
            "loss": float(F.cross_entropy(logits[:35], labels[:35])),
            "accuracy": (y == p).mean(),
            "f1": sk.f1_score(y, p, average=average),
            "macro_f1": sk.f1_score(y, p, average="macro"),
            "micro_f1": (y == p).mean(),
            "mcc": sk.matthews_corrcoef(y, p),
            "precision": sk.precision_score(y, p, average=average),
            "recall": sk.recall_score(y, p, average=average),
        }
    )


def test_classification_of_one_class_only():
    logits, labels = torch.tensor([[1.0, 0.0]] * 6), torch.zeros(6, dtype=torch.long)
    result = feed(classification_metric(("mcc", "f1", "accuracy"))(), logits, labels)
    assert (result["mcc"], result["f1"], result["accuracy"]) == (0.0, 0.0, 1.0)


def test_token_classification():
    logits, labels = torch.randn(6, 5, 3), torch.randint(0, 3, (6, 5))
    labels[:, 3:] = IGNORE_INDEX
    result = feed(classification_metric()(), logits, labels)
    hits = (logits.argmax(-1) == labels)[:, :3]
    assert result["accuracy"] == pytest.approx(float(hits.float().mean()))


@pytest.mark.parametrize("found", [0, 3])
def test_multi_label_of_one_label_scores_as_the_same_column_twice(found):
    names = ("f1", "macro_f1", "micro_f1", "precision", "recall", "accuracy")
    labels, logits = torch.zeros(10, 1), torch.full((10, 1), -1.0)
    labels[:2], logits[:found] = 1, 1
    once = feed(multilabel_metric(names)(), logits, labels)
    twice = feed(multilabel_metric(names)(), logits.repeat(1, 2), labels.repeat(1, 2))
    assert once == pytest.approx(twice)
    assert once["macro_f1"] == pytest.approx(0.8 if found else 0)


def test_multi_label():
    logits, labels = torch.randn(12, 4), torch.randint(0, 2, (12, 4)).float()
    labels[10:] = torch.nan
    result = feed(classification_metric(("accuracy", "f1", "micro_f1"))(), logits, labels)
    y, p = labels[:10].numpy(), (logits[:10] > 0).numpy()
    assert result["accuracy"] == (y == p).all(1).mean()
    assert result["f1"] == pytest.approx(sk.f1_score(y, p, average="macro", zero_division=0))
    assert result["micro_f1"] == pytest.approx(sk.f1_score(y, p, average="micro"))
    with pytest.raises(ConfigError, match="mcc"):
        feed(classification_metric(("mcc",))(), logits, labels)


@pytest.mark.parametrize("shape", [(20,), (20, 1)])
def test_regression(shape):
    logits, labels = torch.randn(shape), torch.randn(20)
    labels[17:] = torch.nan
    result = feed(Regression(), logits, labels)
    y, p = labels[:17].double().numpy(), logits.reshape(-1)[:17].double().numpy()
    assert result["spearman"] == pytest.approx(stats.spearmanr(y, p).statistic)
    assert result["pearson"] == pytest.approx(stats.pearsonr(y, p).statistic)
    assert result["mse"] == pytest.approx(((y - p) ** 2).mean())


def test_correlation_of_constants_is_zero():
    result = feed(regression_metric(("spearman",))(), torch.ones(9), torch.randn(9))
    assert result["spearman"] == 0.0


def test_unknown_names_are_errors():
    with pytest.raises(ConfigError, match='Did you mean "accuracy"'):
        classification_metric(("acuracy",))
    with pytest.raises(ConfigError, match="Known: spearman"):
        regression_metric(("f1",))
