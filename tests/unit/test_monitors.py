import json
import math
from types import SimpleNamespace

import pytest
import torch

from mosaicbert.config.sections import CallbacksConfig, HealthCheckerConfig, OptimizerMonitorConfig
from mosaicbert.duration import Duration, Progress
from mosaicbert.errors import TrainingError
from mosaicbert.train import monitors
from mosaicbert.train.monitors import (
    HealthChecker,
    LRMonitor,
    MemoryMonitor,
    OptimizerMonitor,
    RuntimeEstimator,
    SpeedMonitor,
    TimeLeft,
    build_monitors,
)
from mosaicbert.train.record import StepRecord


def record(batch=1, *, tokens=1000, samples=10, seconds=2.0, wait=0.5, lr=None):
    return StepRecord(
        progress=Progress(batch=batch, sample=batch * samples, seconds=batch * seconds),
        loss=3.0,
        lr=lr or {"all": 1e-3},
        grad_norm=1.0,
        num_tokens=tokens,
        num_samples=samples,
        seconds=seconds,
        data_wait_seconds=wait,
        extra={},
    )


def speed(window=100, flops=6.0, world_size=2, peak=1e4):
    return SpeedMonitor(window, flops, world_size, peak)


def test_speed_is_counts_over_the_steps_own_seconds():
    metrics = speed().after_step(record(), None)
    assert metrics["throughput/tokens_per_sec"] == 500
    assert metrics["throughput/samples_per_sec"] == 5
    assert metrics["throughput/batches_per_sec"] == 0.5
    assert metrics["throughput/seconds_per_batch"] == 2
    assert metrics["throughput/data_wait_share"] == 0.25
    assert metrics["throughput/device/tokens_per_sec"] == 250
    assert metrics["throughput/device/mfu"] == pytest.approx(500 * 6 / 2 / 1e4)


def test_the_first_step_leaves_the_window_and_the_window_moves():
    monitor = speed(window=2)
    monitor.after_step(record(1, seconds=60.0), None)
    for batch, seconds in ((2, 1.0), (3, 1.0), (4, 4.0)):
        metrics = monitor.after_step(record(batch, seconds=seconds), None)
        if batch == 3:
            assert metrics["throughput/tokens_per_sec"] == 1000
    assert metrics["throughput/tokens_per_sec"] == 2000 / 5


def test_speed_is_the_same_whatever_the_clock_reads():
    early, late = record(), record()
    late.progress.seconds = 1e9
    assert speed().after_step(early, None) == speed().after_step(late, None)


def test_speed_gives_nothing_for_no_time_and_no_mfu_for_an_unknown_peak():
    assert speed().after_step(record(seconds=0.0), None) == {}
    assert "throughput/device/mfu" not in speed(peak=None).after_step(record(), None)


def test_flops_depend_on_the_mean_length():
    metrics = speed(flops=lambda length: length, world_size=1, peak=None).after_step(record(), None)
    assert metrics["throughput/device/flops_per_sec"] == 100 * 1000 / 2


def test_flops_are_counted_once_a_step():
    calls = []
    monitor = speed(window=50, flops=lambda length: calls.append(length) or length)
    for batch in range(1, 21):
        metrics = monitor.after_step(record(batch, tokens=1000 + batch), None)
    assert len(calls) == 20
    tokens = [1000 + batch for batch in range(2, 21)]  # the first has left the window
    flops = sum(t * t / 10 for t in tokens) / 38.0 / 2
    assert metrics["throughput/device/flops_per_sec"] == pytest.approx(flops)


def test_learning_rates():
    assert LRMonitor().after_step(record(lr={"adamw": 0.1, "muon": 0.02}), None) == {
        "lr": 0.1,
        "lr/muon": 0.02,
    }


def test_memory_of_the_process():
    metrics = MemoryMonitor(torch.device("cpu")).after_step(record(), None)
    assert 0.01 < metrics["memory/rss"] <= metrics["memory/peak_rss"] * 1.01


def test_time_and_cost_left_from_differences_of_the_clock():
    now = iter([1000.0, 1010.0, 1020.0])
    estimator = RuntimeEstimator(
        TimeLeft(Duration(10, "ba"), clock=lambda: next(now)), cost_per_hour=36.0
    )
    trainer = SimpleNamespace(batches_per_epoch=None)
    first = estimator.after_step(record(1), trainer)
    assert "time/remaining_estimate" not in first
    metrics = estimator.after_step(record(2), trainer)
    assert metrics["time/remaining_estimate"] == pytest.approx(80 / 3600)
    assert metrics["cost/remaining_estimate"] == pytest.approx(0.8)
    assert metrics["cost/spent"] == pytest.approx(0.04)
    assert estimator.after_step(record(10), trainer)["time/remaining_estimate"] == 0


def test_optimizer_norms_per_parameter():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    trainer = SimpleNamespace(model=model, optimizer=optimizer, batches_per_epoch=None)
    monitor = OptimizerMonitor(OptimizerMonitorConfig(interval="2ba"), Duration(10, "ba"))
    assert monitor.after_step(record(1), trainer) == {}
    metrics = monitor.after_step(record(2), trainer)
    assert metrics["l2_norm/grad/weight"] == pytest.approx(math.sqrt(6))
    assert metrics["l2_norm/grad/global"] == pytest.approx(math.sqrt(8))
    assert metrics["l2_norm/param/weight"] == pytest.approx(float(model.weight.detach().norm()))
    moment = optimizer.state[model.bias]["exp_avg"]
    assert metrics["l2_norm/exp_avg/bias"] == pytest.approx(float(moment.norm()))

    again = OptimizerMonitor(OptimizerMonitorConfig(interval="2ba"), Duration(10, "ba"))
    again.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert again.after_step(record(3), trainer) == {}  # a resumed run keeps to the same steps

    plain = OptimizerMonitorConfig(interval="1ba", log_optimizer_metrics=False)
    metrics = OptimizerMonitor(plain, Duration(10, "ba")).after_step(record(1), trainer)
    assert set(metrics) == {"l2_norm/grad/weight", "l2_norm/grad/bias", "l2_norm/grad/global"}


def health(**options):
    return HealthChecker(HealthCheckerConfig(**options))


AT = Progress(batch=7, sample=70)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.inf)])
def test_nan_stops_by_default_and_says_where(loss, norm):
    with pytest.raises(TrainingError, match="after batch 7"):
        health().judge(loss, norm, AT)


@pytest.mark.parametrize("option", ["skip", "rewind"])
def test_nan_can_be_skipped_or_rewound(option, caplog):
    checker = health(on_nan=option)
    assert checker.judge(math.nan, 1.0, AT) == option
    assert checker.judge(2.0, None, AT) == "go"
    assert checker.after_step(record(), None) == {"health/bad_steps": 1, "health/spikes": 0}
    assert "batch 7" in caplog.text


@pytest.mark.parametrize("option", ["skip", "rewind"])
@pytest.mark.parametrize("bad", ["nan", "spike"])
def test_leaving_steps_out_for_ever_stops(bad, option):
    checker = health(on_nan=option, on_spike=option, spike_factor=2.0)
    for _ in range(10):
        checker.judge(1.0, 1.0, AT)
    losses = iter([math.nan] * 99 if bad == "nan" else [3.0**i for i in range(1, 99)])
    for _ in range(monitors.MAX_BAD_STEPS_IN_A_ROW):
        assert checker.judge(next(losses), 1.0, AT) == option
    with pytest.raises(TrainingError, match="21 steps in a row were skipped or rewound"):
        checker.judge(next(losses), 1.0, AT)


@pytest.mark.parametrize(
    ("option", "verdict"),
    [("ignore", "go"), ("warn", "go"), ("skip", "skip"), ("rewind", "rewind")],
)
def test_spikes_against_the_running_median(option, verdict, caplog):
    checker = health(on_spike=option, spike_factor=2.0, window_size=20)
    for _ in range(10):
        assert checker.judge(2.0, 1.0, AT) == "go"
    assert checker.judge(3.9, 1.0, AT) == "go"
    assert checker.judge(4.1, 1.0, AT) == verdict
    assert checker.num_spikes == 1
    assert ("jumped" in caplog.text) == (option != "ignore")


def test_a_spike_can_stop_and_a_new_level_is_no_spike_for_ever():
    checker = health(on_spike="stop", window_size=20)
    for _ in range(10):
        checker.judge(2.0, 1.0, AT)
    with pytest.raises(TrainingError, match="jumped"):
        checker.judge(9.0, 1.0, AT)

    checker = health(on_spike="skip", window_size=20)
    for _ in range(20):
        checker.judge(2.0, 1.0, AT)
    verdicts = [checker.judge(9.0, 1.0, AT) for _ in range(20)]
    assert verdicts[0] == "skip"
    assert verdicts[-1] == "go"


CPU = torch.device("cpu")


def test_build_monitors_takes_what_the_yaml_names(caplog, monkeypatch):
    caplog.set_level("INFO")
    config = CallbacksConfig.model_validate(
        {
            "speed_monitor": {"window_size": 5},
            "lr_monitor": {},
            "memory_monitor": {},
            "runtime_estimator": {"cost_per_hour": 2},
            "optimizer_monitor": {},
            "health_checker": {},
        }
    )
    arguments = {"flops_per_token": 1.0, "world_size": 1, "total": Duration(10, "ba")}
    built = build_monitors(config, device=CPU, **arguments)
    assert [type(monitor).__name__ for monitor in built] == [
        "SpeedMonitor",
        "LRMonitor",
        "MemoryMonitor",
        "RuntimeEstimator",
        "OptimizerMonitor",
        "HealthChecker",
    ]
    assert "No MFU" in caplog.text
    assert build_monitors(CallbacksConfig(), device=CPU, **arguments) == []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    only_speed = CallbacksConfig.model_validate({"speed_monitor": {}})
    (known,) = build_monitors(only_speed, device=torch.device("cuda"), **arguments)
    assert isinstance(known, SpeedMonitor)
    assert known.peak_flops == pytest.approx(989.4e12)
