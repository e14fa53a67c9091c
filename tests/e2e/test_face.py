"""What people see of a run: the report it leaves, and the commands that look at it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mosaicbert.cli import main
from mosaicbert.config import PretrainConfig, load_config
from mosaicbert.plan.command import measured, plan
from mosaicbert.plan.machine import machine_of

ROOT = Path(__file__).parents[2]


def command(*words, cwd, code=0):
    """Run `mosaicbert` as a user would; gives what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "mosaicbert", *map(str, words)],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "80",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data and a finished run."""
    home = tmp_path_factory.mktemp("home")
    words = "convert --dataset sample --out_root ./my-copy-c4 --splits train_small val"
    command(*words.split(), cwd=home)
    yaml = ROOT / "yamls/test/main.yaml"
    words = ["model.name=mosaic_bert", "max_duration=4ba", "eval_subset_num_batches=1"]
    command("pretrain", yaml, "run_name=run", *words, cwd=home)
    return home


def test_a_run_leaves_a_report_and_report_compares(home):
    page = (home / "runs/run/report.html").read_text()
    assert "4 steps, finished" in page
    assert "Share of tokens to predict" in page
    command("report", "runs/run", "runs/run", "--out", "both.html", "--no-png", cwd=home)
    assert "2 runs compared" in (home / "both.html").read_text()


def test_watch_shows_a_finished_run(home):
    lines = command("watch", "runs/run", cwd=home).splitlines()
    assert any(line.startswith("ba 4/4") for line in lines)
    assert lines[-1] == "The run is finished."
    assert all(len(line) <= 80 for line in lines)


def test_plan_measures_here_with_the_jobs_own_steps(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["eval_loader.num_workers=0", "train_loader.num_workers=0"]
    config = load_config(PretrainConfig, ROOT / "yamls/test/main.yaml", words)
    here = machine_of(None, None, "cpu")
    probes = measured(config, here, seconds=0.1)
    found = plan(config, here, probes=probes)
    assert found["steps"] == 10
    assert found["data"]["download_bytes"] == 0
    assert found["tokens_per_sample"] < 128
    assert found["seconds"] > 0
    assert found["evaluations"] == 1
    assert found["evaluation_seconds"] > 0
    assert 0.5 < found["memory"]["total"] / found["measured"]["peak_bytes"] < 2
    assert list((home / "runs").iterdir()) == [home / "runs/run"]  # it leaves nothing


def test_doctor_looks_at_the_runs_needs(home, monkeypatch, capsys):
    """In this process, to spare the imports of a new one."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yaml = str(ROOT / "yamls/test/main.yaml")
    assert main(["doctor", yaml]) == 0
    text = capsys.readouterr().out
    assert "train_loader ./my-copy-c4" in text
    assert "0 problems" in text
    assert main(["doctor", yaml, "data_local=gone"]) == 1
    assert "problem  train_loader" in capsys.readouterr().out
