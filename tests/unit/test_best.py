"""The best evaluation: chosen, kept as a checkpoint, and a reason to stop."""

import json
import math
import os
import signal

import pytest
from tiny_run import TinyModel, assert_same, make_trainer, weights

from mosaicbert.duration import Progress
from mosaicbert.errors import ConfigError
from mosaicbert.train.best import Best
from mosaicbert.train.store import LATEST, SaveFolder


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


@pytest.mark.parametrize("to_keep", [-1, 1])
@pytest.mark.parametrize(
    ("values", "eval_interval"),
    [([0.1, 0.2, 0.9], "4ba"), ([0.9], "0ba"), ([0.1, 0.9, 0.2], "4ba")],
)
def test_the_last_evaluation_counts_too(tmp_path, values, eval_interval, to_keep):
    """It comes at a batch that is saved anyway: `best` and the state tell of it all the same."""
    best = Best(METRIC, keep=True)
    changes = {"max_duration": "10ba", "save_interval": "5ba", "eval_interval": eval_interval}
    trainer, _ = scripted_trainer(
        values,
        best,
        save_folder=str(tmp_path),
        save_num_checkpoints_to_keep=to_keep,
        **changes,
    )
    result = trainer.fit()
    assert os.readlink(tmp_path / "best") == best.best["checkpoint"]
    assert result.checkpoint == str(tmp_path / best.best["checkpoint"])
    assert (tmp_path / "best/state.json").exists()
    state = json.loads((tmp_path / "ep2-ba10/state.json").read_text())
    assert [e["metrics"][METRIC] for e in state["evaluations"]] == values


@pytest.mark.parametrize("uri", ["{}", "memory://{}"])
def test_an_evaluation_of_what_is_saved_already_changes_its_state_alone(tmp_path, uri, monkeypatch):
    """Such as one on a checkpoint that the run was resumed from."""
    where = uri.format(tmp_path / "ckpt")
    keys = {"save_folder": where, "max_duration": "3ba", "eval_interval": "0ba"}
    scripted_trainer([0.1], None, **keys)[0].fit()
    before = SaveFolder(where).read("ep0-ba3")
    trainer, _ = scripted_trainer([0.5], Best(METRIC, keep=True), autoresume=True, **keys)
    monkeypatch.setattr(SaveFolder, "write", lambda *args: pytest.fail("written again"))
    assert trainer.fit().checkpoint == f"{where}/ep0-ba3"
    after = SaveFolder(where).read("ep0-ba3")
    assert_same(before.model, after.model)
    assert [e["metrics"] for e in after.state["evaluations"]] == [{METRIC: 0.5}]
    if trainer.saving._writer.folder.is_local:
        assert os.readlink(tmp_path / "ckpt/best") == "ep0-ba3"


def test_a_link_that_a_kill_came_before_is_made_at_the_end(tmp_path):
    keys = {"save_folder": str(tmp_path), "autoresume": True, "max_duration": "4ba"}
    scripted_trainer([0.5, 0.4], Best(METRIC, keep=True), **keys)[0].fit()
    (tmp_path / "best").unlink()
    scripted_trainer([0.4], Best(METRIC, keep=True), **keys)[0].fit()
    assert os.readlink(tmp_path / "best") == "ep0-ba2"


@pytest.mark.parametrize("values", [[0.5, 0.4, 0.3], [0.1, 0.5, 0.4]])
def test_a_run_that_is_stopped_before_an_evaluation_decides_as_one_that_was_not(tmp_path, values):
    def run(folder, values, stop=False):
        keys = {"save_folder": str(tmp_path / folder), "autoresume": True}
        trainer, _ = scripted_trainer(values, Best(METRIC, keep=True, patience=2), **keys)
        step = trainer._train_step

        def train_step(*args):
            if stop and trainer.progress.batch == 3:
                trainer.signals._handle(signal.SIGTERM, None)
            step(*args)

        trainer._train_step = train_step
        return trainer.fit()

    whole = run("whole", [*values, 0.0])
    with pytest.raises(SystemExit):
        run("cut", values[:1], stop=True)
    again = run("cut", [*values[1:], 0.0])
    assert (again.progress.batch, again.metrics) == (whole.progress.batch, whole.metrics)
    assert os.readlink(tmp_path / "cut/best") == os.readlink(tmp_path / "whole/best")
    assert (tmp_path / "cut/best/state.json").exists()
