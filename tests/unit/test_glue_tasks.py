"""The table of tasks holds the published recipe, and a misspelt task is told."""

import pytest

from mosaicbert.duration import Duration
from mosaicbert.errors import ConfigError
from mosaicbert.glue_suite.tasks import TASKS, pick, pick_all

# task: learning rate, weight decay, epochs, batch, evaluation interval, number of seeds
RECIPE = {
    "mnli": (5e-5, 5e-6, 3, 48, "2300ba", 1),
    "qqp": (3e-5, 3e-6, 5, 16, "2000ba", 1),
    "qnli": (1e-5, 1e-6, 10, 16, "1000ba", 1),
    "sst2": (3e-5, 3e-6, 3, 16, "500ba", 3),
    "cola": (5e-5, 5e-6, 10, 32, "250ba", 4),
    "rte": (1e-5, 1e-5, 3, 16, "100ba", 5),
    "mrpc": (8e-5, 8e-6, 10, 32, "100ba", 5),
    "stsb": (3e-5, 3e-6, 10, 32, "200ba", 5),
}


def test_the_recipe() -> None:
    assert {
        name: (t.lr, t.weight_decay, t.epochs, t.batch_size, t.eval_interval, len(t.seeds))
        for name, t in TASKS.items()
    } == RECIPE


def test_rows_are_whole() -> None:
    for task in TASKS.values():
        Duration.parse(task.eval_interval)
        assert task.seeds == (19, 8364, 717, 10536, 90166)[: len(task.seeds)]
        assert len(task.text_columns) in (1, 2)
        assert task.metrics
    assert {n for n, t in TASKS.items() if t.starts_from_mnli} == {"rte", "mrpc", "stsb"}
    assert {n: t.num_labels for n, t in TASKS.items() if t.num_labels != 2} == {
        "mnli": 3,
        "stsb": 1,
    }
    assert TASKS["mnli"].validation_splits == ("validation_matched", "validation_mismatched")
    assert len(TASKS["mrpc"].metrics) == len(TASKS["qqp"].metrics) == 2


def test_pick() -> None:
    assert pick("rte") is TASKS["rte"]
    with pytest.raises(ConfigError, match=r'Did you mean "mrpc"\?.*mnli, qqp'):
        pick("mprc")


def test_mnli_comes_before_those_it_starts() -> None:
    assert [task.name for task in pick_all(["rte", "stsb", "mnli"])] == ["mnli", "rte", "stsb"]
    with pytest.raises(ConfigError, match="wnli"):
        pick_all(["rte", "wnli"])
