import io

import pytest
from rich.console import Console

from mosaicbert.config import TrainerConfig
from mosaicbert.duration import Duration, Progress
from mosaicbert.train.console import PlainLines, ProgressDisplay, build_console, clock, place

STEP = {
    "loss/train/total": 10.123456,
    "lr": 4.8e-4,
    "throughput/tokens_per_sec": 1_472_123.0,
    "throughput/device/mfu": 0.3512,
    "time/remaining_estimate": 1.05,
}


def at(batch):
    return Progress(batch=batch, sample=batch * 4096, seconds=float(batch))


def build(console, interval="1ba", total="1000ba", rank=0, **options):
    config = TrainerConfig(
        max_duration=total, console_log_interval=interval, global_train_batch_size=1, **options
    )
    return build_console(config, Duration.parse(total), rank=rank, console=console)


def pipe():
    return Console(file=io.StringIO(), width=80, highlight=False)


def terminal(**options):
    return Console(file=io.StringIO(), width=80, force_terminal=True, highlight=False, **options)


def test_plain_lines_where_the_output_is_no_terminal():
    console = pipe()
    logger = build(console)
    assert isinstance(logger, PlainLines)
    logger.log(STEP, at(120))
    logger.log({"metrics/eval/accuracy": 0.5, "metrics/mnli_mm/f1": 0.25}, at(120))
    logger.log({"checkpoint/batch": 120.0}, at(120))
    logger.close()
    assert console.file.getvalue().splitlines() == [
        "ba 120/1000  loss 10.1235  lr 4.80e-04  1.5M tok/s  MFU 35.1%  1h03m left",
        "eval at ba 120: accuracy 0.5000  mnli_mm/f1 0.2500",
        "checkpoint at ba 120",
    ]


@pytest.mark.parametrize(
    "total", ["70000ba", "286720000sp", "1000ep", "300000000000tok", "90000sec"]
)
def test_lines_fit_into_80_columns(total):
    console = pipe()
    logger = build(console, total=total)
    logger.log(STEP, at(69_999))
    assert 0 < len(console.file.getvalue().rstrip("\n")) <= 80


def test_lines_come_at_the_interval():
    console = pipe()
    logger = build(console, interval="5ba")
    for batch in range(1, 11):
        logger.log(STEP, at(batch))
    assert [line.split()[1] for line in console.file.getvalue().splitlines()] == [
        "5/1000",
        "10/1000",
    ]


def test_the_time_left_needs_no_runtime_estimator():
    console = pipe()
    logger = build(console)
    for batch in (1, 2):
        logger.log({"loss/train/total": 1.0}, at(batch))
    first, second = console.file.getvalue().splitlines()
    assert "left" not in first
    assert second.endswith("left")


def test_a_progress_display_on_a_terminal():
    console = terminal()
    logger = build(console)
    assert isinstance(logger, ProgressDisplay)
    logger.log(STEP, at(500))
    logger.log({"metrics/eval/accuracy": 0.5}, at(500))
    logger.log({"checkpoint/batch": 500.0}, at(500))
    logger.log(STEP, at(501))
    logger.close()
    shown = console.file.getvalue()
    for word in (
        "ba 501/1000",
        "50%",
        "loss 10.1235",
        "MFU 35.1%",
        "1h03m left",
        "last eval at ba",
    ):
        assert word in shown
    assert "last checkpoint at ba 500" in shown


def test_what_the_end_of_a_run_brings_stays_on_the_screen():
    console = terminal()
    logger = build(console)
    logger.log(STEP, at(1000))
    logger.log({"metrics/eval/accuracy": 0.75}, at(1000))
    logger.log({"checkpoint/batch": 1000.0}, at(1000))
    logger.close()
    shown = console.file.getvalue()
    assert "last eval at ba 1000: accuracy 0.7500" in shown
    assert "last checkpoint at ba 1000" in shown


def test_no_color_is_honoured(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console = terminal()
    logger = build(console)
    logger.log(STEP, at(1))
    logger.close()
    assert "\x1b[3" not in console.file.getvalue()  # colours; the cursor still moves


def test_what_turns_it_off():
    assert build(pipe(), log_to_console=False) is None
    assert build(terminal(), rank=1) is None
    assert isinstance(build(terminal(), progress_bar=False), PlainLines)
    assert isinstance(build(terminal(), log_to_console=False), ProgressDisplay)


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.4, "9s"), (59.6, "1m00s"), (724, "12m04s"), (11100, "3h05m")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_place_names_the_unit_of_the_run():
    assert place(at(2), Duration(10, "ba")) == "ba 2/10"
    assert place(at(2), Duration(286720000, "sp")) == "ba 2  sp 8192/286.7M"
