"""The harness of quality against time: what its clock counts, what its curves say, a small run."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_sets import texts

from mosaicbert.data.mds import MDSWriter
from mosaicbert.train import trainer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(trainer, "Clock", trainer.Clock)  # which the harness replaces
    return importlib.import_module("time_to_quality")


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("quality_tables")


def curve(*points):
    return [{"seconds": float(seconds), "loss": float(loss)} for seconds, loss in points]


def test_the_clock_leaves_start_up_and_evaluations_out(harness, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    clock = harness.TrainingClock()
    clock.start(0.0)
    wait(9)  # the loader starts its workers
    assert clock.seconds_of_run == 0  # asked by the first step
    wait(2)
    clock.lap(num_tokens=10)
    wait(30)  # an evaluation
    clock.skip()
    assert clock.seconds_of_run == 2
    wait(3)
    clock.lap(num_tokens=10)
    wait(30)
    clock.skip()
    assert clock.seconds_of_run == 5
    assert clock.evaluations == [2, 5]
    assert clock.tokens_per_second == 10 / 3  # without the first step, as ever


def test_seconds_to_a_loss_lie_on_the_line_between_two_points(tables):
    points = curve((10, 6), (20, 4), (30, 5), (40, 3))
    assert tables.seconds_to(points, 5) == 15
    assert tables.seconds_to(points, 4) == 20
    assert tables.seconds_to(points, 3.5) == 37.5  # the first crossing for good or not
    assert tables.seconds_to(points, 7) == 10  # an upper bound
    assert tables.seconds_to(points, 2.9) is None


@given(losses=st.lists(st.floats(0.1, 10), min_size=2, max_size=8), target=st.floats(0.1, 10))
def test_seconds_to_a_loss_are_between_the_points_around_it(losses, target):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        seconds_to = importlib.import_module("quality_tables").seconds_to
    finally:
        sys.path.pop(0)
    points = curve(*enumerate(losses))
    found = seconds_to(points, target)
    first = next((i for i, loss in enumerate(losses) if loss <= target), None)
    if first is None:
        assert found is None
    else:
        assert max(0, first - 1) <= found <= first


def run_of(name, seed, loss, **more):
    row = {"name": name, "seed": seed, "budget": 60.0, "loss": loss, "seconds": 60.2}
    row |= {"accuracy": 0.4, "train_loss": loss, "tokens_per_second": 6e5, "tokens": 3.6e7}
    return row | {"epoch": 1, "graphs": 0, "curve": curve((30, loss + 1), (60.2, loss))} | more


def test_the_table_has_80_columns_means_and_spreads(tables):
    scores = dict.fromkeys(tables.GLUE_TASKS, 55.555)
    runs = [
        run_of("a recipe with a very long name indeed", 17, 3.0),
        run_of("a recipe with a very long name indeed", 18, 3.2, glue={"mean": 1, "tasks": scores}),
        run_of("better", 17, 2.9),
        {"name": "cut off", "seed": 17, "budget": 60.0, "error": "TrainingError: " + "x" * 300},
    ]
    text = tables.table(runs)
    assert max(map(len, text.splitlines())) <= 80
    rows = [line for line in text.splitlines() if line.startswith(("a recipe", "better"))]
    assert rows[0].startswith("better")
    assert " 2.9000 " in rows[0]
    assert " 2 " in rows[1]
    assert " 3.1000 " in rows[1]
    assert " 0.100 " in rows[1]
    assert "TrainingError" in text
    assert "55.55" in text


def test_a_comparison_takes_the_mean_of_the_longest_runs_of_the_other(tables):
    runs = [
        run_of("ours", 17, 3.0),
        run_of("theirs", 17, 9.0, budget=10.0),
        run_of("theirs", 17, 3.4),
        run_of("theirs", 18, 3.6),
    ]
    text = tables.compare(runs, "ours", "theirs")
    assert "3.5000" in text
    assert "(n = 2)" in text
    assert "45.1 of 60 s" in text
    assert "no run" in tables.compare(runs, "ours", "nobody")


def test_small_runs_leave_a_record_and_a_picture(harness, tmp_path, monkeypatch, capsys):
    for split in ("train", "val"):
        with MDSWriter(tmp_path / split, {"text": "str"}) as writer:
            for text in texts(40):
                writer.write({"text": text})
    out, picture = tmp_path / "record.json", tmp_path / "curves.png"
    words = f"--tiny --data {tmp_path} --budget 0.2 --evals 2 --out {out} --picture {picture}"
    more = ["--recipes", "^(v2|falling|wrong)$", "--also", "wrong = v2 optimizer.lr=-1"]
    more += ["--also", "falling = v2 mlm_probability=[0.3,0.15]", "--compare", "v2", "falling"]
    monkeypatch.setattr(sys, "argv", ["time_to_quality.py", *words.split(), *more])
    assert harness.main() == 0
    printed = capsys.readouterr().out
    assert "wrong, seed 17: ConfigError" in printed
    assert "Seconds to the loss of 'falling'" in printed
    assert picture.stat().st_size > 5000

    record = json.loads(out.read_text())
    assert record["settings"]["budget"] == 0.2
    assert record["environment"]["versions"]["torch"]
    by_name = {run["name"]: run for run in record["runs"]}
    assert "optimizer.lr" in by_name["wrong"]["error"]
    timed = by_name["v2"]
    assert timed["config"]["max_duration"] == "0.2sec"
    assert timed["seconds"] >= 0.2
    assert timed["tokens"] > 0
    assert timed["graphs"] == 0
    seconds = [point["seconds"] for point in timed["curve"]]
    assert len(seconds) >= 1
    assert seconds == sorted(seconds)
    assert seconds[-1] == timed["seconds"]
    assert by_name["falling"]["config"]["max_duration"].endswith("sp")
    assert by_name["falling"]["samples"] % 8 == 0
