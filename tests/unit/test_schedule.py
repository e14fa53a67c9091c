"""Schedules as functions of progress; intervals."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicbert.config.sections import SchedulerConfig
from mosaicbert.duration import Duration, Progress
from mosaicbert.errors import ConfigError
from mosaicbert.train.schedule import check_schedule, is_due, lr_factor


def at(batch, batch_size=4, per_epoch=25):
    return Progress(
        epoch=batch // per_epoch,
        batch=batch,
        sample=batch * batch_size,
        token=batch * batch_size * 10,
        batch_in_epoch=batch % per_epoch,
    )


def curve(total, **changes):
    config, length = SchedulerConfig(**changes), Duration.parse(total)
    return [lr_factor(config, at(batch), length, 25) for batch in range(101)]


def test_linear_decay_as_in_the_main_recipe():
    factors = curve("100ba", name="linear_decay_with_warmup", t_warmup="0.06dur", alpha_f=0.02)
    assert factors[0] == 0
    assert factors[3] == pytest.approx(0.5)
    assert factors[6] == pytest.approx(1.0)
    assert factors[53] == pytest.approx(1 - 0.98 * 0.5)
    assert factors[100] == pytest.approx(0.02)


def test_constant():
    factors = curve("100ba", name="constant_with_warmup", t_warmup="10ba")
    assert factors[5] == pytest.approx(0.5)
    assert set(factors[10:]) == {1.0}


def test_cosine():
    factors = curve("100ba", name="cosine_with_warmup", t_warmup="0ba", alpha_f=0.1)
    assert factors[0] == 1.0
    assert factors[50] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)


@pytest.mark.parametrize(("shape", "halfway"), [("linear", 0.5), ("1-sqrt", 1 - math.sqrt(0.5))])
def test_warmup_stable_decay(shape, halfway):
    factors = curve(
        "100ba", name="warmup_stable_decay", t_warmup="5ba", t_decay="0.2dur", decay_shape=shape
    )
    assert factors[5:81] == [1.0] * 76
    assert factors[90] == pytest.approx(halfway)
    assert factors[100] == pytest.approx(0.0)


@pytest.mark.parametrize("total", ["100ba", "400sp", "4000tok", "4ep"])
@pytest.mark.parametrize("warmup", ["0.25dur", "25ba", "100sp", "1000tok", "1ep"])
@pytest.mark.parametrize("name", ["linear_decay_with_warmup", "warmup_stable_decay"])
def test_units_can_be_mixed(total, warmup, name):
    expected = curve("100ba", name=name, t_warmup="25ba", t_decay="0.3dur")
    assert curve(total, name=name, t_warmup=warmup, t_decay="0.3dur") == pytest.approx(expected)


NAMES = [
    "constant_with_warmup",
    "linear_decay_with_warmup",
    "cosine_with_warmup",
    "warmup_stable_decay",
]


@given(
    name=st.sampled_from(NAMES),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 0.5),
    alpha=st.floats(0, 1),
    batch=st.integers(0, 300),
)
def test_factors_stay_between_zero_and_one(name, warmup, decay, alpha, batch):
    config = SchedulerConfig(
        name=name, t_warmup=f"{warmup:.4f}dur", t_decay=f"{decay:.4f}dur", alpha_f=alpha
    )
    assert 0 <= lr_factor(config, at(batch), Duration.parse("100ba")) <= 1


@pytest.mark.parametrize(
    ("total", "changes"),
    [
        ("0.5dur", {}),
        ("0ba", {}),
        ("10ba", {"t_warmup": "20ba"}),
        ("10ba", {"name": "warmup_stable_decay", "t_warmup": "0.5dur", "t_decay": "6ba"}),
    ],
)
def test_impossible_schedules(total, changes):
    with pytest.raises(ConfigError, match="max_duration"):
        check_schedule(SchedulerConfig(**changes), Duration.parse(total))


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ("10ba", list(range(10, 101, 10))),
        ("0ba", []),
        ("30sp", [8, 15, 23, 30, 38, 45, 53, 60, 68, 75, 83, 90, 98]),
        ("1ep", [25, 50, 75, 100]),
        ("0.1dur", list(range(10, 101, 10))),
        ("0.3dur", [30, 60, 90]),
    ],
)
@pytest.mark.parametrize("total", ["100ba", "4ep"])
def test_intervals(interval, expected, total):
    length, step = Duration.parse(total), Duration.parse(interval)
    due = [b for b in range(1, 101) if is_due(step, at(b - 1), at(b), length, 25)]
    assert due == expected
