"""Tables of made-up results: means, deviations, and what is said of a run that is not whole."""

import csv
import json
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicbert.glue_suite.results import PUBLISHED, JobResult, Results, job_mean, metric_keys
from mosaicbert.glue_suite.tasks import TASKS


def job(task: str, seed: int = 19, seconds: float = 10.0, **metrics: float) -> JobResult:
    """Metrics by name, with the evaluation's name in front where it is not `eval`."""
    keys = {
        f"metrics/{name.replace('__', '/') if '__' in name else f'eval/{name}'}": value
        for name, value in metrics.items()
    }
    return JobResult(task, seed, keys, seconds, batches=5)


MNLI = job("mnli", matched__accuracy=0.8, mismatched__accuracy=0.9)
RTE = [job("rte", 19, accuracy=0.5), job("rte", 20, accuracy=0.7)]
STSB = job("stsb", spearman=0.6, pearson=0.9)


def all_tasks() -> list[JobResult]:
    return [
        JobResult(name, seed, {key: 0.5 for key, _ in metric_keys(task).values()}, 1.0, 1)
        for name, task in TASKS.items()
        for seed in task.seeds
    ]


def test_a_score_that_is_no_number_makes_none_of_its_task() -> None:
    results = Results([RTE[0], job("rte", 20, accuracy=math.nan)])
    (score,) = results.scores()
    assert math.isnan(score.mean)
    assert score.std is not None
    assert math.isnan(score.std)
    assert results.to_dict()["scores"][0]["std"] is None
    assert "rte" in results.table()


def test_means_and_deviations() -> None:
    results = Results([STSB, *RTE, MNLI])
    found = {(s.task, s.metric): s for s in results.scores()}
    assert list(found) == [
        ("mnli", "accuracy matched"),
        ("mnli", "accuracy mismatched"),
        ("rte", "accuracy"),
        ("stsb", "spearman"),
        ("stsb", "pearson"),
    ]
    rte = found["rte", "accuracy"]
    assert (rte.mean, rte.n, rte.counts) == (pytest.approx(60), 2, True)
    assert rte.std == pytest.approx(statistics.stdev([50, 70]))
    assert found["mnli", "accuracy matched"].std is None
    assert not found["stsb", "pearson"].counts
    assert results.task_means() == pytest.approx({"mnli": 85, "rte": 60, "stsb": 60})
    assert results.glue == pytest.approx((85 + 60 + 60) / 3)
    assert job_mean(MNLI) == pytest.approx(85)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6, unique=True), st.randoms())
def test_the_order_of_jobs_changes_nothing(accuracies: list[float], random: object) -> None:
    jobs = [job("mrpc", i, accuracy=a, f1=1 - a) for i, a in enumerate(accuracies)]
    results = Results(jobs)
    assert results.task_means()["mrpc"] == pytest.approx(50)
    random.shuffle(jobs)  # type: ignore[attr-defined]
    assert Results(jobs).glue == pytest.approx(results.glue)


def test_a_part_of_glue_is_called_so() -> None:
    part, whole = Results([MNLI, *RTE]), Results(all_tasks())
    assert not part.is_complete
    assert "mean of 2 of 8 tasks" in part.table()
    assert "all eight tasks" in part.table(published=True)
    assert whole.is_complete
    assert whole.glue == pytest.approx(50)
    assert "of 8 tasks" not in whole.table(published=True)
    this_run = next(x for x in whole.table(published=True).splitlines() if "this run" in x)
    assert this_run.split() == ["this", "run", *["50.0"] * 9]


def test_tables_fit_80_columns() -> None:
    for jobs in (all_tasks(), [MNLI], []):
        text = Results(jobs).table(published=True)
        assert max(map(len, text.splitlines())) <= 80
        assert not any(line != line.rstrip() for line in text.splitlines())
        for row in PUBLISHED:
            assert row.system in text  # not cut short
    assert "84.3" not in Results([MNLI]).table()


def test_published_rows_are_consistent() -> None:
    for row in PUBLISHED:
        if row.tasks:
            assert set(row.tasks) == set(TASKS)
            assert statistics.fmean(row.tasks.values()) == pytest.approx(row.glue, abs=0.05)


def test_a_missing_metric_is_no_zero() -> None:
    results = Results([MNLI, job("cola", mcc=math.nan), job("sst2", loss=1.0)])
    assert math.isnan(results.task_means()["cola"])
    assert math.isnan(results.task_means()["sst2"])
    assert math.isnan(results.glue)
    content = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    assert content["task_means"] == {"mnli": pytest.approx(85), "sst2": None, "cola": None}


def test_files(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "glue"
    results = Results([MNLI, *RTE])
    results.write(folder, published=True)
    assert sorted(f.name for f in folder.iterdir()) == ["glue.csv", "glue.json", "glue.png"]
    content = json.loads((folder / "glue.json").read_text())
    assert content["glue"] == pytest.approx(72.5)
    assert content["seconds"] == 30
    assert len(content["published"]) == len(PUBLISHED)
    assert [JobResult.from_dict(x) for x in content["jobs"]] == results.jobs
    with (folder / "glue.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["metric"]) for row in rows] == [
        ("mnli", "accuracy matched"),
        ("mnli", "accuracy mismatched"),
        ("rte", "accuracy"),
        ("mean of 2 of 8 tasks", "mean"),
    ]
    assert rows[2]["mean"] == "60.0000"
    assert (folder / "glue.png").read_bytes().startswith(b"\x89PNG")
    Results([]).write(tmp_path / "none")
    assert json.loads((tmp_path / "none" / "glue.json").read_text())["glue"] is None


def test_job_results_are_read_strictly() -> None:
    assert JobResult.from_dict(MNLI.to_dict()) == MNLI
    with pytest.raises(TypeError):
        JobResult.from_dict({**MNLI.to_dict(), "other": 1})
    with pytest.raises(AssertionError, match="twice"):
        Results([MNLI, MNLI])
