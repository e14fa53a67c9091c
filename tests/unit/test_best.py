"""The best evaluation: chosen, kept as a checkpoint, and a reason to stop."""

import math
import os

import pytest
from tiny_run import TinyModel, assert_same, make_trainer, weights

from mosaicbert.duration import Progress
from mosaicbert.errors import ConfigError
from mosaicbert.train.best import Best
from mosaicbert.train.store import LATEST


def feed(best, *values, name="m/accuracy"):
    return [best.add({name: v}, Progress(batch=i)) for i, v in enumerate(values, 1)]


def test_the_first_of_equals_is_the_best():
    best = Best("m/accuracy")
    assert feed(best, 0.5, 0.7, 0.7, math.nan, 0.6) == [True, True, False, False, False]
    assert best.best["batch"] == 2
    assert best.summary() == "m/accuracy 0.7000 at batch 2"


def test_of_losses_the_lowest_is_the_best():
    best = Best("m/loss")
    assert feed(best, math.nan, 2.0, 1.0, 3.0, name="m/loss") == [True, True, True, False]


@pytest.mark.parametrize(("patience", "ends_at"), [(None, None), (1, 3), (2, 6), (5, None)])
def test_patience(patience, ends_at):
    best = Best("m/accuracy", patience=patience)
    ended = None
    for i, value in enumerate([0.1, 0.3, 0.2, 0.4, 0.4, 0.1], 1):
        best.add({"m/accuracy": value}, Progress(batch=i))
        ended = ended or (i if best.is_exhausted else None)
    assert ended == ends_at


def test_a_metric_that_is_not_there():
    with pytest.raises(ConfigError, match="m/loss"):
        feed(Best("m/f1"), 1.0, name="m/loss")


class Scripted:
    """A metric whose values were decided beforehand, one an evaluation."""

    def __init__(self, values):
        self.values = iter(values)

    def __call__(self):
        return self

    def update(self, output, batch):
        pass

    def compute(self, ranks):
        return {"accuracy": next(self.values)}


def scripted_trainer(values, best, **changes):
    trainer, recorder = make_trainer(
        **{"save_interval": "2ba", "eval_interval": "2ba", "max_duration": "12ba"} | changes
    )
    loader, _ = trainer.eval_loaders["eval"]
    trainer.eval_loaders = {"eval": (loader, Scripted(values))}
    trainer.best = best
    return trainer, recorder


METRIC = "metrics/eval/accuracy"


def test_a_run_ends_when_patience_does_and_gives_its_best(tmp_path):
    best = Best(METRIC, keep=True, patience=2)
    trainer, _ = scripted_trainer(
        [0.1, 0.5, 0.4, 0.3, 0.9, 0.9],
        best,
        save_folder=str(tmp_path / "ckpt"),
        save_num_checkpoints_to_keep=1,
    )
    result = trainer.fit()
    assert result.progress.batch == 8
    assert result.metrics == {METRIC: 0.5}
    assert result.checkpoint == str(tmp_path / "ckpt/ep0-ba4")
    assert os.readlink(tmp_path / "ckpt/best") == "ep0-ba4"
    assert (tmp_path / "ckpt" / LATEST).read_text() == "ep1-ba8\n"
    assert {path.name for path in (tmp_path / "ckpt").iterdir()} == {
        *("ep0-ba4", "ep1-ba8", "best", LATEST)
    }


def test_without_keep_the_last_evaluation_counts(tmp_path):
    trainer, _ = scripted_trainer([0.5, 0.1, 0.1], Best(METRIC, patience=1))
    result = trainer.fit()
    assert (result.progress.batch, result.metrics) == (4, {METRIC: 0.1})


@pytest.mark.parametrize("cut_at", [3, 4, 7])
def test_a_resumed_run_decides_as_one_that_was_not_cut(tmp_path, cut_at):
    values = [0.1, 0.5, 0.4, 0.45, 0.3, 0.2]
    keys = {"save_num_checkpoints_to_keep": 1, "save_interval": "1ba", "autoresume": True}

    def run(folder, values, stop=None):
        trainer, _ = scripted_trainer(
            values,
            Best(METRIC, keep=True, patience=3),
            model=TinyModel(),
            save_folder=str(tmp_path / folder),
            **keys,
        )
        if stop:
            step = trainer._train_step

            def train_step(*args):
                if trainer.progress.batch == stop:
                    raise KeyboardInterrupt
                step(*args)

            trainer._train_step = train_step
            with pytest.raises(KeyboardInterrupt):
                trainer.fit()
            trainer.saving.close()
            return None
        return trainer.fit(), weights(trainer)

    whole, whole_weights = run("whole", values)
    run("cut", values, stop=cut_at)
    again, again_weights = run("cut", values[cut_at // 2 :])
    assert again.progress.batch == whole.progress.batch == 10
    assert again.metrics == whole.metrics == {METRIC: 0.5}
    assert again.checkpoint == str(tmp_path / "cut/ep0-ba4")
    assert_same(again_weights, whole_weights)
