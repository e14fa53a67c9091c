"""The loop: what it counts, when it evaluates and saves, how it agrees with itself."""

import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from tiny_run import TinyLoader, TinyModel, assert_same, make_trainer, moments, weights

from mosaicbert.config.sections import OptimizerMonitorConfig
from mosaicbert.duration import Duration
from mosaicbert.errors import ConfigError, DataError, TrainingError
from mosaicbert.run import print_result
from mosaicbert.train.monitors import OptimizerMonitor


def test_trains_evaluates_and_reports():
    trainer, recorder = make_trainer(max_duration="60ba", eval_interval="20ba")
    result = trainer.fit()
    assert result.progress.batch == 60
    assert result.progress.sample == 480
    assert (result.progress.epoch, result.progress.batch_in_epoch) == (12, 0)
    assert list(recorder.losses) == list(range(1, 61))
    assert recorder.losses[60] < recorder.losses[1] - 0.5
    assert result.train_loss == recorder.losses[60]
    assert list(recorder.values("metrics/eval/loss")) == [20, 40, 60]
    assert result.metrics["metrics/eval/loss"] == recorder.values("metrics/eval/loss")[60]
    assert 0 <= result.metrics["metrics/eval/accuracy"] <= 1
    assert result.checkpoint is None
    assert result.tokens_per_second > 0
    assert recorder.closed


@pytest.mark.parametrize(
    ("duration", "batches"),
    [("7ba", 7), ("2ep", 10), ("50sp", 7), ("100tok", None), ("0.3sec", None)],
)
def test_durations_in_any_unit(duration, batches):
    trainer, _ = make_trainer(max_duration=duration, evaluate=False)
    progress = trainer.fit().progress
    if batches is not None:
        assert progress.batch == batches
    if duration == "100tok":
        assert 100 <= progress.token < 200


def test_last_evaluation_is_not_done_twice():
    trainer, recorder = make_trainer(max_duration="2ep", eval_interval="1ep")
    trainer.fit()
    evaluations = [batch for batch, row in recorder.rows if "metrics/eval/loss" in row]
    assert evaluations == [5, 10]


def test_intervals_in_shares_of_the_run():
    trainer, recorder = make_trainer(max_duration="2ep", eval_interval="0.3dur")
    trainer.fit()
    evaluations = [batch for batch, row in recorder.rows if "metrics/eval/loss" in row]
    assert evaluations == [3, 6, 9, 10]


def test_subsets_of_batches():
    loader = TinyLoader()
    trainer, _ = make_trainer(
        loader=loader, max_duration="2ep", train_subset_num_batches=3, eval_subset_num_batches=1
    )
    progress = trainer.fit().progress
    assert (progress.epoch, progress.batch) == (2, 6)
    assert {epoch for epoch, _ in loader.seen} == {0, 1}
    assert len(trainer.eval_loaders["eval"][0].seen) == 8


@pytest.mark.parametrize("optimizer", ["decoupled_adamw", "muon"])
def test_microbatches_change_nothing(optimizer):
    finals = []
    for size in (8, 3, 1):
        trainer, recorder = make_trainer(
            model=TinyModel(dropout=0.0),
            loader=TinyLoader(microbatch=size),
            optimizer={"name": optimizer, "lr": 1e-3},
            max_duration="3ba",
            evaluate=False,
        )
        trainer.fit()
        finals.append((weights(trainer), recorder.losses))
    for final, losses in finals[1:]:
        # Muon rounds to bfloat16, which shows the last bits of the sums of gradients
        assert_same(finals[0][0], final, rtol=1e-3, atol=2e-3 if optimizer == "muon" else 1e-6)
        assert losses == pytest.approx(finals[0][1], rel=1e-3 if optimizer == "muon" else 1e-6)


def test_loss_is_the_mean_over_targets_not_over_microbatches():
    model = TinyModel(dropout=0.0)
    loader = TinyLoader(microbatch=1)
    step = next(loader.steps(0))
    with torch.no_grad():
        outputs = [float(model.loss(batch).loss_sum) for batch in step.microbatches]
    expected = sum(outputs) / sum(batch.num_targets for batch in step.microbatches)
    trainer, recorder = make_trainer(model=model, loader=loader, max_duration="1ba")
    trainer.fit()
    assert recorder.losses[1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("precision", ["amp_bf16", "amp_fp16", "bf16"])
def test_precisions(precision):
    trainer, recorder = make_trainer(
        precision=precision,
        max_duration="40ba",
        algorithms={"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}},
    )
    trainer.fit()
    assert recorder.losses[40] < recorder.losses[1]
    expected = torch.bfloat16 if precision == "bf16" else torch.float32
    assert trainer.model.embeddings.weight.dtype == expected


@pytest.mark.parametrize(("supported", "lines"), [(False, 1), (True, 0)])
def test_slow_numbers_are_told_once(supported, lines, caplog, monkeypatch):
    for kind in ("bf16", "fp16"):
        name = f"_is_mkldnn_{kind}_supported"
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: supported, raising=False)
    for precision in ("amp_bf16", "amp_fp16", "bf16"):
        caplog.clear()
        make_trainer(precision=precision, max_duration="3ba")[0].fit()
        assert [r.message.count("fp32 is faster") for r in caplog.records] == [1] * lines
    caplog.clear()
    make_trainer(precision="fp32", max_duration="1ba")[0].fit()
    assert not caplog.records


@pytest.mark.parametrize("kind", ["norm", "value"])
def test_gradient_clipping(kind):
    limit = 1e-3
    trainer, recorder = make_trainer(
        max_duration="1ba",
        algorithms={"gradient_clipping": {"clipping_type": kind, "clipping_threshold": limit}},
    )
    trainer.fit()
    grads = [p.grad for p in trainer.model.parameters()]
    assert recorder.values("l2_norm/grad/global")[1] > limit
    if kind == "norm":
        assert float(torch.nn.utils.get_total_norm(grads)) == pytest.approx(limit, rel=1e-3)
    else:
        assert max(float(grad.abs().max()) for grad in grads) == pytest.approx(limit)


class OutOfMemoryOnce:
    """Lets the model run out of memory in chosen calls."""

    def __init__(self, model, fits):
        self.inner, self.fits, self.failures = model.loss, fits, 0

    def __call__(self, batch, return_logits=False):
        output = self.inner(batch, return_logits)
        if not return_logits and batch.num_samples > self.fits:
            self.failures += 1
            raise torch.OutOfMemoryError("no more memory")
        return output


def test_auto_microbatch_takes_a_step_anew_in_parts():
    finals = []
    for fits in (8, 2):
        model = TinyModel(dropout=0.0)
        model.loss = OutOfMemoryOnce(model, fits)
        loader = TinyLoader()
        trainer, recorder = make_trainer(model=model, loader=loader, evaluate=False)
        trainer.fit()
        assert len(loader.seen) == len(set(loader.seen)) == 80
        finals.append((weights(trainer), recorder.losses))
    assert trainer.backward.num_parts == 2**model.loss.failures
    assert trainer.backward.num_parts >= 4
    assert finals[0][1] == pytest.approx(finals[1][1], rel=1e-5)
    assert_same(finals[0][0], finals[1][0], rtol=1e-4, atol=1e-6)


def test_out_of_memory_that_no_split_mends():
    model = TinyModel()
    model.loss = OutOfMemoryOnce(model, 0)
    trainer, _ = make_trainer(model=model)
    with pytest.raises(TrainingError, match="one sequence at a time"):
        trainer.fit()


def test_out_of_memory_with_a_fixed_microbatch():
    model = TinyModel()
    model.loss = OutOfMemoryOnce(model, 4)
    trainer, _ = make_trainer(model=model, device_train_microbatch_size=8)
    with pytest.raises(TrainingError, match="device_train_microbatch_size"):
        trainer.fit()


def test_one_step_has_no_speed_to_tell(capsys):
    result = make_trainer(max_duration="1ba")[0].fit()
    assert math.isnan(result.tokens_per_second)  # that step warms up
    print_result(result, "one")
    assert "tokens a second" not in capsys.readouterr().out
    print_result(replace(result, tokens_per_second=1234.5), "more")
    assert "tokens a second          1,234\n" in capsys.readouterr().out


def test_empty_epoch_is_an_error():
    class Empty(TinyLoader):
        def steps_in_epoch(self, epoch, sample_in_epoch=0):
            return 0

    trainer, _ = make_trainer(loader=Empty())
    with pytest.raises(DataError, match="no whole batch"):
        trainer.fit()


def test_loader_that_ends_early_is_an_error():
    class Short(TinyLoader):
        def steps_in_epoch(self, epoch, sample_in_epoch=0):
            return super().steps_in_epoch(epoch, sample_in_epoch) + 1

    trainer, _ = make_trainer(loader=Short())
    with pytest.raises(DataError, match="ended after 5 of 6"):
        trainer.fit()


def test_nan_loss_stops_the_run_without_a_monitor_too():
    model = TinyModel()
    with torch.no_grad():
        model.decoder.bias.fill_(math.nan)
    trainer, recorder = make_trainer(model=model)
    with pytest.raises(TrainingError, match="after batch 1"):
        trainer.fit()
    assert recorder.closed


class Judge:
    """Says `verdict` on chosen batches."""

    def __init__(self, verdict, batches):
        self.verdict, self.batches = verdict, batches

    def judge(self, loss, grad_norm, progress):
        assert math.isfinite(loss)
        assert grad_norm is not None
        return self.verdict if progress.batch in self.batches else "go"

    def after_step(self, record, trainer):
        return {"judged": float(record.progress.batch in self.batches)}


def test_a_judge_can_leave_a_step_out():
    trainer, recorder = make_trainer(monitors=[Judge("skip", range(3, 11))])
    trainer.fit()
    assert recorder.values("judged")[10] == 1.0
    steps = {float(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {2.0}


def test_a_judge_can_rewind_to_the_newest_checkpoint(tmp_path):
    at = {}

    class Watch(Judge):
        def after_step(self, record, trainer):
            at[record.progress.batch] = (weights(trainer), moments(trainer))
            return {}

    trainer, _ = make_trainer(
        monitors=[Watch("rewind", {6})], save_folder=str(tmp_path), save_interval="4ba"
    )
    result = trainer.fit()
    assert result.progress.batch == 10
    assert_same(at[6][0], at[4][0])
    assert_same(at[6][1], at[4][1])


def test_rewind_without_a_checkpoint_is_an_error():
    trainer, _ = make_trainer(monitors=[Judge("rewind", {3})])
    with pytest.raises(TrainingError, match="no checkpoint yet"):
        trainer.fit()


class Signal:
    """Sends this process a signal during a batch."""

    def __init__(self, number, batch):
        self.number, self.batch = number, batch

    def after_step(self, record, trainer):
        if record.progress.batch == self.batch:
            os.kill(os.getpid(), self.number)
        return {}


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_signals_end_the_run_with_a_checkpoint(tmp_path, number, error):
    before = signal.getsignal(number)
    trainer, recorder = make_trainer(monitors=[Signal(number, 5)], save_folder=str(tmp_path))
    with pytest.raises(error) as caught:
        trainer.fit()
    if error is SystemExit:
        assert caught.value.code == 143
    assert (tmp_path / "latest").read_text().strip() == "ep1-ba6"
    assert recorder.closed
    assert signal.getsignal(number) == before
    whole, full = make_trainer()
    whole.fit()
    resumed, rest = make_trainer(save_folder=str(tmp_path), autoresume=True)
    resumed.fit()
    assert recorder.losses | rest.losses == full.losses
    assert_same(weights(whole), weights(resumed))


@pytest.mark.parametrize("stop_at", [7, 8, 9])
def test_an_evaluation_that_a_signal_came_before_is_made_up_for(tmp_path, stop_at):
    changes = {"eval_interval": "4ba", "max_duration": "12ba"}
    whole, full = make_trainer(**changes)
    whole.fit()
    changes |= {"save_folder": str(tmp_path), "autoresume": True}
    stopped, first = make_trainer(monitors=[Signal(signal.SIGTERM, stop_at - 1)], **changes)
    with pytest.raises(SystemExit):
        stopped.fit()
    assert stopped.progress.batch == stop_at
    assert list(first.values("metrics/eval/loss")) == ([4, 8] if stop_at == 9 else [4])
    resumed, rest = make_trainer(**changes)
    resumed.fit()
    evaluations = [batch for batch, row in first.rows + rest.rows if "metrics/eval/loss" in row]
    assert evaluations == [4, 8, 12]
    for name in ("metrics/eval/loss", "loss/train/total"):
        assert first.values(name) | rest.values(name) == full.values(name)
    assert_same(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "no checkpoint (save_folder names no place for one)"),
        ({"save_folder": "x", "save_num_checkpoints_to_keep": 0}, "no checkpoint (save_num"),
        ({"save_folder": "x"}, "with a checkpoint."),
    ],
)
def test_a_signal_tells_whether_a_checkpoint_will_be(tmp_path, monkeypatch, caplog, changes, said):
    monkeypatch.chdir(tmp_path)
    trainer, _ = make_trainer(monitors=[Signal(signal.SIGTERM, 2)], **changes)
    with pytest.raises(SystemExit):
        trainer.fit()
    (line,) = [r.message for r in caplog.records if r.message.startswith("SIGTERM")]
    assert said in line
    assert bool(list(tmp_path.glob("x/ep*"))) == ("with a checkpoint" in line)


def test_optimizer_norms_come_at_the_same_steps_after_a_resume(tmp_path):
    def run(**changes):
        config = OptimizerMonitorConfig(interval="5ba")
        monitor = OptimizerMonitor(config, Duration.parse("12ba"))
        trainer, recorder = make_trainer(
            monitors=[monitor], save_folder=str(tmp_path), autoresume=True, **changes
        )
        trainer.fit()
        return list(recorder.values("l2_norm/grad/global"))

    assert run(max_duration="7ba") + run(max_duration="12ba") == [5, 10]


def test_a_relative_max_duration_is_refused():
    with pytest.raises(ConfigError, match="max_duration"):
        make_trainer(max_duration="0.5dur")
