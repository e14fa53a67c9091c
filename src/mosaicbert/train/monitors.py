"""What is measured on the way: speed, learning rate, memory, time left, norms, health.

A monitor gets the record of each step (and the trainer) and returns metrics by name. Names follow
the original's style: `throughput/tokens_per_sec`, `memory/peak_allocated_mem`, `l2_norm/grad/...`.
"""

import logging
import math
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mosaicbert.config.sections import CallbacksConfig, HealthCheckerConfig, OptimizerMonitorConfig
from mosaicbert.duration import Duration, Progress
from mosaicbert.errors import TrainingError
from mosaicbert.train.hardware import find_device
from mosaicbert.train.record import Monitor, StepRecord
from mosaicbert.train.schedule import is_due

if TYPE_CHECKING:
    from mosaicbert.train.trainer import Trainer

log = logging.getLogger(__name__)

GIGABYTE = 1e9
MAX_BAD_STEPS_IN_A_ROW = 20
MIN_LOSSES_FOR_MEDIAN = 10

Verdict = Literal["go", "skip", "rewind"]


def build_monitors(
    config: CallbacksConfig,
    *,
    flops_per_token: Callable[[float], float] | float,
    world_size: int,
    device: torch.device,
    total: Duration,
) -> list[Monitor]:
    """The monitors that `callbacks` asks for.

    `flops_per_token`: FLOPs of forward + backward for one real token, given the mean length of a
    sequence. `total`: `max_duration`.
    """
    monitors: list[Monitor] = []
    if config.speed_monitor is not None:
        peak = config.speed_monitor.gpu_flops_available or _known_peak(device)
        monitors.append(
            SpeedMonitor(config.speed_monitor.window_size, flops_per_token, world_size, peak)
        )
    if config.lr_monitor is not None:
        monitors.append(LRMonitor())
    if config.memory_monitor is not None:
        monitors.append(MemoryMonitor(device))
    if config.runtime_estimator is not None:
        cost = config.runtime_estimator.cost_per_hour
        monitors.append(RuntimeEstimator(TimeLeft(total), cost))
    if config.optimizer_monitor is not None:
        monitors.append(OptimizerMonitor(config.optimizer_monitor, total))
    if config.health_checker is not None:
        monitors.append(HealthChecker(config.health_checker))
    return monitors


def _known_peak(device: torch.device) -> float | None:
    name = "this CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    known = find_device(name)
    if known is None:
        log.info(
            "No MFU: the peak FLOP/s of %s is not known. "
            "callbacks.speed_monitor.gpu_flops_available can name it.",
            name,
        )
    return known.flops if known else None


class SpeedMonitor:
    """Real tokens, samples and batches a second, MFU and data-wait share over the last steps.

    Rates divide sums of counts by sums of the steps' own seconds. The first step, which compiles
    and warms up, leaves the window as soon as there is a second. MFU (Chowdhery et al., 2022,
    appendix B) counts real tokens only.
    """

    def __init__(
        self,
        window_size: int,
        flops_per_token: Callable[[float], float] | float,
        world_size: int,
        peak_flops: float | None,
    ) -> None:
        self.window: deque[StepRecord] = deque(maxlen=window_size)
        self._window_flops: deque[float] = deque(maxlen=window_size)
        self.flops_per_token = flops_per_token
        self.world_size = world_size
        self.peak_flops = peak_flops
        self._num_steps = 0

    def after_step(self, record: StepRecord, trainer: "Trainer") -> dict[str, float]:
        """Rates over the window, in units per second; no metric where no time has passed."""
        self._num_steps += 1
        if self._num_steps == 2:
            self.window.clear()
            self._window_flops.clear()
        self.window.append(record)
        self._window_flops.append(self._flops(record))  # once a step: a model counts for long
        seconds = sum(step.seconds for step in self.window)
        if seconds <= 0:
            return {}
        tokens = sum(step.num_tokens for step in self.window) / seconds
        samples = sum(step.num_samples for step in self.window) / seconds
        batches = len(self.window) / seconds
        flops = sum(self._window_flops) / seconds / self.world_size
        metrics = {
            "throughput/tokens_per_sec": tokens,
            "throughput/samples_per_sec": samples,
            "throughput/batches_per_sec": batches,
            "throughput/seconds_per_batch": 1 / batches,
            "throughput/data_wait_share": sum(s.data_wait_seconds for s in self.window) / seconds,
            "throughput/device/tokens_per_sec": tokens / self.world_size,
            "throughput/device/samples_per_sec": samples / self.world_size,
            "throughput/device/flops_per_sec": flops,
        }
        if self.peak_flops:
            metrics["throughput/device/mfu"] = flops / self.peak_flops
        return metrics

    def _flops(self, step: StepRecord) -> float:
        if not callable(self.flops_per_token):
            return self.flops_per_token * step.num_tokens
        mean_length = step.num_tokens / max(step.num_samples, 1)
        return self.flops_per_token(mean_length) * step.num_tokens


class LRMonitor:
    """The learning rates of the step: `lr` for the only (or first) group, `lr/NAME` for others."""

    def after_step(self, record: StepRecord, trainer: "Trainer") -> dict[str, float]:
        """One metric a group."""
        names = iter(record.lr)
        first = next(names, None)
        if first is None:
            return {}
        return {"lr": record.lr[first], **{f"lr/{name}": record.lr[name] for name in names}}


class MemoryMonitor:
    """Memory of this rank in gigabytes (1e9 bytes): of the GPU, or of the process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def after_step(self, record: StepRecord, trainer: "Trainer") -> dict[str, float]:
        """Now and at the peak; `alloc_retries` above 0 means that memory is too tight."""
        if self.device.type == "cpu":
            peak, current = resident_bytes()
            metrics = {"memory/peak_rss": peak / GIGABYTE}
            return metrics if current is None else metrics | {"memory/rss": current / GIGABYTE}
        stats = torch.cuda.memory_stats(self.device)
        return {
            "memory/current_allocated_mem": stats["allocated_bytes.all.current"] / GIGABYTE,
            "memory/peak_allocated_mem": stats["allocated_bytes.all.peak"] / GIGABYTE,
            "memory/current_reserved_mem": stats["reserved_bytes.all.current"] / GIGABYTE,
            "memory/peak_reserved_mem": stats["reserved_bytes.all.peak"] / GIGABYTE,
            "memory/alloc_retries": stats["num_alloc_retries"],
        }


def resident_bytes() -> tuple[int, int | None]:
    """Resident memory of this process at its peak and, where /proc tells, now."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak, None
    return peak, pages * resource.getpagesize()


class TimeLeft:
    """Seconds until the end, from the wall clock since the first call.

    That first call comes at the end of a step, so compilation does not count; evaluations and
    checkpoints do.
    """

    def __init__(
        self,
        total: Duration,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.clock = clock
        self._start: tuple[float, float] | None = None

    def update(self, progress: Progress, batches_per_epoch: int | None = None) -> float | None:
        """Seconds left, or None as long as no progress can be seen."""
        done, now = progress.fraction_of(self.total, batches_per_epoch), self.clock()
        if self._start is None:
            self._start = (now, done)
        elapsed, advanced = now - self._start[0], done - self._start[1]
        return max(1 - done, 0.0) * elapsed / advanced if advanced > 0 else None


class RuntimeEstimator:
    """Hours left and, with `cost_per_hour` (of all machines together), cost so far and left."""

    def __init__(self, time_left: TimeLeft, cost_per_hour: float | None = None) -> None:
        self.time_left = time_left
        self.cost_per_hour = cost_per_hour

    def after_step(self, record: StepRecord, trainer: "Trainer") -> dict[str, float]:
        """`time/remaining_estimate` in hours, once progress can be seen."""
        seconds = self.time_left.update(record.progress, trainer.batches_per_epoch)
        metrics = {} if seconds is None else {"time/remaining_estimate": seconds / 3600}
        if self.cost_per_hour is not None:
            metrics["cost/spent"] = record.progress.seconds / 3600 * self.cost_per_hour
            if seconds is not None:
                metrics["cost/remaining_estimate"] = seconds / 3600 * self.cost_per_hour
        return metrics


class OptimizerMonitor:
    """L2 norms per parameter: gradients, and with `log_optimizer_metrics` weights and moments."""

    reads_gradients = True

    def __init__(self, config: OptimizerMonitorConfig, total: Duration) -> None:
        self.config = config
        self.interval = Duration.parse(config.interval, "callbacks.optimizer_monitor.interval")
        self.total = total
        self._last = Progress()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know to keep to this one's steps."""
        return {"last": asdict(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._last = Progress(**state["last"])

    def after_step(self, record: StepRecord, trainer: "Trainer") -> dict[str, float]:
        """Norms, at the interval; one wait for the device for all of them."""
        due = is_due(
            self.interval, self._last, record.progress, self.total, trainer.batches_per_epoch
        )
        self._last = record.progress
        if not due:
            return {}
        tensors: dict[str, Tensor] = {}
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                tensors[f"l2_norm/grad/{name}"] = parameter.grad
            if self.config.log_optimizer_metrics:
                tensors[f"l2_norm/param/{name}"] = parameter.detach()
                state = trainer.optimizer.state.get(parameter, {})
                for moment in ("exp_avg", "momentum_buffer", "exp_avg_sq"):
                    if moment in state:
                        tensors[f"l2_norm/{moment}/{name}"] = state[moment]
        metrics = dict(zip(tensors, norms(tensors.values()), strict=True))
        grads = [value for name, value in metrics.items() if name.startswith("l2_norm/grad/")]
        if grads:
            metrics["l2_norm/grad/global"] = math.hypot(*grads)
        return metrics


def norms(tensors: Iterable[Tensor]) -> list[float]:
    """L2 norms in float32, brought to the host in one copy."""
    found = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
    return torch.stack(found).tolist() if found else []


class HealthChecker:
    """NaN, infinities and loss spikes: stop, skip the update or rewind to the last checkpoint.

    The trainer asks `judge` between the backward pass and the update, with the loss and gradient
    norm that all ranks share, so that all ranks act alike.
    """

    def __init__(self, config: HealthCheckerConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window_size)
        self.num_bad_steps = 0
        self.num_spikes = 0
        self._bad_in_a_row = 0

    def judge(self, loss: float, grad_norm: float | None, progress: Progress) -> Verdict:
        """What to do with a step's gradients.

        Raises:
            TrainingError: the options say stop, or too many steps in a row were left out.
        """
        where = f"batch {progress.batch} (sample {progress.sample})"
        verdict: Verdict = "go"
        if not math.isfinite(loss) or not math.isfinite(grad_norm or 0.0):
            self.num_bad_steps += 1
            what = f"loss {loss:g}, gradient norm {grad_norm or 0.0:g}"
            verdict = self._act(self.config.on_nan, f"{what} after {where}", "on_nan")
        else:
            median = self._median()
            self.losses.append(loss)  # spikes too: a level that stays is no spike for ever
            if median is not None and loss > self.config.spike_factor * median:
                self.num_spikes += 1
                what = f"the loss jumped to {loss:.4g} (median {median:.4g}) after {where}"
                verdict = self._act(self.config.on_spike, what, "on_spike")
        self._bad_in_a_row = 0 if verdict == "go" else self._bad_in_a_row + 1
        if self._bad_in_a_row > MAX_BAD_STEPS_IN_A_ROW:
            raise TrainingError(
                f"{self._bad_in_a_row} steps in a row were skipped or rewound by the health "
                f"checker, the last after {where}. Lower optimizer.lr, or go back to an older "
                "checkpoint."
            )
        return verdict

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know to judge as this one would."""
        return {
            "losses": list(self.losses),
            "num_bad_steps": self.num_bad_steps,
            "num_spikes": self.num_spikes,
            "skips_in_a_row": self._bad_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.losses.extend(state["losses"])
        self.num_bad_steps, self.num_spikes = state["num_bad_steps"], state["num_spikes"]
        self._bad_in_a_row = state["skips_in_a_row"]

    def after_step(self, record: StepRecord, trainer: "Trainer") -> dict[str, float]:
        """How many steps were bad so far."""
        return {"health/bad_steps": self.num_bad_steps, "health/spikes": self.num_spikes}

    def _median(self) -> float | None:
        enough = len(self.losses) >= min(MIN_LOSSES_FOR_MEDIAN, self.config.window_size)
        return statistics.median(self.losses) if enough else None

    def _act(self, option: str, what: str, key: str) -> Verdict:
        if option == "stop":
            raise TrainingError(
                f"Training stopped: {what}. Lower optimizer.lr, clip gradients "
                f"(algorithms.gradient_clipping), or set callbacks.health_checker.{key} to skip "
                "or rewind."
            )
        if option != "ignore":
            log.warning("%s (callbacks.health_checker.%s: %s)", what, key, option)
        if option == "skip":
            return "skip"
        return "rewind" if option == "rewind" else "go"
