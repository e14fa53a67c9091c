"""A whole command that is asked to stop: by a person, a scheduler, twice, on one or two ranks.

One process imports everything and forks each command off; see `forks.py`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, shutil, signal, sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
import forks, works

home = Path(sys.argv[1])
works.prepare(home)
answers = {{}}
SLURM = {{"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}}
for name, kind, environ, signals in (
    ("undisturbed", "pretrain", {{}}, []),
    ("term", "pretrain", {{}}, [signal.SIGTERM]),
    ("int", "pretrain", {{}}, [signal.SIGINT]),
    ("slurm", "pretrain", SLURM, [signal.SIGCONT, signal.SIGTERM, signal.SIGTERM]),
    ("two ranks", "pretrain-2-ranks", {{}}, [signal.SIGTERM]),
):
    work = works.KINDS[kind](home)
    folder = home / name.replace(" ", "-")
    folder.mkdir()

    def setup(work=work, folder=folder, slow=bool(signals)):
        original = type(work).setup(work, folder)
        def both():
            original()
            from mosaicbert.train.trainer import Trainer
            step = Trainer._train_step
            def slowly(self, *args):
                time.sleep(0.2 if slow else 0)
                step(self, *args)
            Trainer._train_step = slowly
        return both

    running = forks.start(
        work.words(folder, None), folder, ranks=work.ranks, setup=setup(), environ=environ
    )
    metrics = folder / "run/metrics.jsonl"
    if signals:  # in the middle of the run
        running.wait(100, lambda: metrics.exists() and metrics.read_text().count("\\n") >= 3)
    for number in signals:
        running.signal_group(number)
        time.sleep(0.02)
    sent = time.monotonic()
    code = running.wait(120)
    seconds = time.monotonic() - sent
    saved = sorted(path.name for path in (folder / "ckpt").glob("ep*"))
    again = forks.start(work.words(folder, None), folder, ranks=work.ranks)
    answers[name] = [code, seconds, saved, again.wait(120), work.result(folder)["model"],
                     "Traceback" in running.said()]

# twice Ctrl-C, in a step that does not end
work = works.KINDS["pretrain"](home)
folder = home / "twice"
folder.mkdir()
def hang():
    from mosaicbert.train.trainer import Trainer
    step = Trainer._train_step
    def train_step(self, *args):
        step(self, *args)
        if self.progress.batch == 3:
            (folder / "hangs").touch()
            time.sleep(600)
    Trainer._train_step = train_step
running = forks.start(work.words(folder, None), folder, setup=hang)
running.wait(100, (folder / "hangs").exists)
running.signal_group(signal.SIGINT)
first = running.wait(1.0)
running.signal_group(signal.SIGINT)
answers["twice"] = [first, running.wait(60), "Traceback" in running.said()]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers():
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(here=str(Path(__file__).parent)), home],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["term", "int", "slurm"])
def test_a_run_that_is_stopped_saves_and_goes_on(answers, name):
    code, seconds, saved, again, model, has_traceback = answers[name]
    assert code == (130 if name == "int" else 143)  # what shells and schedulers take it for
    assert seconds < 30  # Slurm's and Kubernetes' shortest usual grace time
    assert saved
    assert not has_traceback
    assert again == 0
    assert model == answers["undisturbed"][4]  # to the bit


def test_two_ranks_stop_together_and_go_on(answers):
    code, seconds, saved, again, _, has_traceback = answers["two ranks"]
    assert (code, again) == (143, 0)
    assert seconds < 30
    assert saved
    assert not has_traceback


def test_a_second_ctrl_c_does_not_wait(answers):
    first, second, has_traceback = answers["twice"]
    assert first is None  # the first waits for the step
    assert second == 130
    assert not has_traceback
