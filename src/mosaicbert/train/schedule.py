"""When: learning-rate schedules, and intervals of evaluating and saving.

A schedule is a function of how far the run is, in shares of `max_duration`; nothing is counted up
on the way, so a resumed run needs no schedule state.
"""

import math

from mosaicbert.config.sections import SchedulerConfig
from mosaicbert.duration import Duration, Progress
from mosaicbert.errors import ConfigError

ROUNDING = 1e-9
"""Sums of shares such as 3 * 0.1dur may fall short by the last bits of a float."""


def lr_factor(
    config: SchedulerConfig,
    progress: Progress,
    total: Duration,
    batches_per_epoch: int | None = None,
) -> float:
    """Share of the peak learning rate for the step that starts at `progress`.

    Warm-up is linear from 0. After it: constant; linear or cosine decay from the end of the
    warm-up to `alpha_f` at `total`; or constant with a decay over the last `t_decay`
    (warmup-stable-decay; 1-sqrt as in Hägele et al., 2024, arXiv:2405.18392).
    """
    done = min(progress.fraction_of(total, batches_per_epoch), 1.0)
    warmup = _share(Duration.parse(config.t_warmup), progress, total, batches_per_epoch)
    if warmup is None or done < warmup:
        return done / warmup if warmup else 0.0
    if config.name == "constant_with_warmup":
        return 1.0
    if config.name == "warmup_stable_decay":
        decay = _share(Duration.parse(config.t_decay), progress, total, batches_per_epoch)
        x = min(max(done - (1 - decay), 0.0) / decay, 1.0) if decay else 0.0
        shape = 1 - math.sqrt(x) if config.decay_shape == "1-sqrt" else 1 - x
    else:
        x = (done - warmup) / (1 - warmup) if warmup < 1 else 1.0
        shape = 1 - x if config.name == "linear_decay_with_warmup" else _half_cosine(x)
    return config.alpha_f + (1 - config.alpha_f) * shape


def _half_cosine(x: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * x))


def _share(
    part: Duration, progress: Progress, total: Duration, batches_per_epoch: int | None
) -> float | None:
    """`part` as a share of `total`; across units by the run's own ratio so far.

    Batches, samples and tokens grow together, so the ratio is exact or nearly so. None at the very
    start, where there is no ratio yet.
    """
    if part.unit == "dur":
        return part.value
    if part.unit == total.unit or part.value == 0:
        return part.value / total.value
    parts_done = progress.fraction_of(part, batches_per_epoch)
    return progress.fraction_of(total, batches_per_epoch) / parts_done if parts_done else None


def check_schedule(config: SchedulerConfig, total: Duration) -> None:
    """Raise `ConfigError` for a schedule that cannot be within `total`."""
    if total.unit == "dur" or total.value <= 0:
        raise ConfigError(
            f"max_duration: {total} is no length of a run. Use 10ba, 3ep, 1000sp, 1000tok or 1h."
        )
    parts = {"t_warmup": Duration.parse(config.t_warmup)}
    if config.name == "warmup_stable_decay":
        parts["t_decay"] = Duration.parse(config.t_decay)
    known = [
        part.value if part.unit == "dur" else part.value / total.value
        for part in parts.values()
        if part.unit in ("dur", total.unit)
    ]
    if sum(known) > 1 + ROUNDING:
        said = " and ".join(f"scheduler.{key}: {part}" for key, part in parts.items())
        raise ConfigError(f"{said} take longer than max_duration: {total}. Shorten them.")


def is_due(
    interval: Duration,
    before: Progress,
    now: Progress,
    total: Duration,
    batches_per_epoch: int | None = None,
) -> bool:
    """Whether a multiple of `interval` was reached between two points; 0 never is."""
    if interval.value == 0:
        return False

    def multiples(progress: Progress) -> int:
        if interval.unit == "dur":
            count = progress.fraction_of(total, batches_per_epoch)
        else:
            count = progress.count(interval.unit)
        return math.floor(count / interval.value + ROUNDING)

    return multiples(now) > multiples(before)
