"""GLUE's queue and `predict` on a local Ray cluster, where Ray (extra `ray`) is installed."""

import json
import os
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from mosaicbert.config.sections import ModelConfig
from mosaicbert.data.tokenizers import load_tokenizer
from mosaicbert.errors import ConfigError, DataError, TrainingError
from mosaicbert.executors import RayTasks
from mosaicbert.glue_suite.jobs import glue
from mosaicbert.glue_suite.queue import Job, run_jobs
from mosaicbert.models.build import build_model
from mosaicbert.predict import files

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with pytest.MonkeyPatch.context() as patch:  # the workers import this file
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
        yield
        ray.shutdown()


def work(payload: Any, report: Any) -> Any:
    report({"seen": payload})
    print("in the job", payload)
    if payload == "raise":
        raise DataError("the data are bad")
    if isinstance(payload, Path) and not payload.exists():
        payload.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return payload


def test_the_queue(tmp_path: Path) -> None:
    names = {"first": "a", "raise": "raise", "dies": tmp_path / "once", "last": "b"}
    after = {"last": "first"}
    jobs = [
        Job(name, payload, tmp_path / f"{name}.log", after.get(name))
        for name, payload in names.items()
    ]
    events: list[tuple[str, str]] = []
    with closing(RayTasks(work)) as workers:
        found = run_jobs(jobs, workers, lambda kind, job, _: events.append((kind, job.name)))
    ended = {outcome.job.name: (outcome.result, outcome.error) for outcome in found}
    assert ended["first"] == ("a", None)
    assert ended["raise"] == (None, "the data are bad")
    assert ended["dies"] == (tmp_path / "once", None)  # Ray did it again
    assert ended["last"] == ("b", None)
    assert events.index(("done", "first")) < events.index(("start", "last"))
    assert ("progress", "first") in events
    assert "in the job a" in (tmp_path / "first.log").read_text()


def test_a_cluster_without_gpus() -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        RayTasks(work, num_gpus=0.5)
    with closing(RayTasks(work, num_gpus=0.5, or_cpu=True)) as workers:
        assert workers.num_free == 4


def test_glue(tmp_path: Path) -> None:
    short = {"max_duration": "2ba", "eval_subset_num_batches": 1}
    tasks = {
        "mnli": {"trainer_kwargs": short},
        "rte": {"seeds": [1, 2], "trainer_kwargs": short},
        "cola": {"seeds": [1], "trainer_kwargs": short | {"load_path": str(tmp_path / "none")}},
    }
    config = {
        "run_folder": str(tmp_path),
        "data_dir": "sample",
        "tokenizer_name": "prajjwal1/bert-tiny",
        "max_seq_len": 32,
        "model": {"name": "mosaic_bert", "pretrained_model_name": "prajjwal1/bert-tiny"},
        "tasks": tasks,
    }
    with pytest.raises(TrainingError, match=r"1 of the jobs failed.*\n  cola-1: .*none does not"):
        glue(config, engine="ray")
    content = json.loads((tmp_path / "glue.json").read_text())
    assert sorted((job["task"], job["seed"]) for job in content["jobs"]) == [
        ("mnli", 19),
        ("rte", 1),
        ("rte", 2),
    ]
    tasks.pop("cola")
    assert len(glue(config, engine="ray").jobs) == 3  # known again, not run again


def test_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    shape = ModelConfig(pretrained_model_name="prajjwal1/bert-tiny")
    model: Any = build_model(
        shape, "classification", num_labels=3, max_seq_len=32, vocab_size=30522
    )
    model.save_pretrained(tmp_path / "model")
    load_tokenizer("bert-base-uncased").save_pretrained(tmp_path / "model")
    lines = [f"text number {i}" for i in range(40)]
    (tmp_path / "in.txt").write_text("\n".join(lines))
    monkeypatch.setattr(files, "ROWS_AT_ONCE", 7)
    found = {}
    for engine in ("local", "ray"):
        out = tmp_path / f"{engine}.jsonl"
        assert files.predict_file(tmp_path / "model", tmp_path / "in.txt", out, engine=engine) == 40
        found[engine] = out.read_bytes()
    assert found["ray"] == found["local"]
