"""Numbers that go bad on one of two ranks only: the run goes on rightly, or both end soon.

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
import json, sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
import forks, works

home = Path(sys.argv[1])
works.prepare(home)
work = works.TwoRanks(home)
answers = {{}}

def bad(what):
    def setup():
        import torch
        from mosaicbert.train.backward import Backward
        from mosaicbert.train.trainer import Trainer
        step, call, where = Trainer._train_step, Backward.__call__, [0, 0]
        def train_step(self, *args):
            where[:] = [self.progress.batch + 1, self.ranks.rank]
            step(self, *args)
        def backward(self, microbatches, *args):
            if where == [3, 1]:  # the third batch, rank 1 alone
                if what == "memory":
                    raise torch.OutOfMemoryError("no more memory")
                weight = next(self.model.parameters())
                value = torch.nan if what == "nan" else torch.inf
                hook = weight.register_hook(lambda grad: grad.fill_(value))
                try:
                    return call(self, microbatches, *args)
                finally:
                    hook.remove()
            return call(self, microbatches, *args)
        Trainer._train_step, Backward.__call__ = train_step, backward
    return setup

skip = "callbacks.health_checker.on_nan=skip"
stop = "callbacks.health_checker.on_nan=stop"
for name, what, more in (("nan", "nan", []), ("stop", "nan", [stop]), ("skip", "nan", [skip]),
                         ("inf", "inf", [skip]), ("memory", "memory", [])):
    folder = home / name
    folder.mkdir()
    words = [*work.words(folder, None), "max_duration=6ba", "dist_timeout=20", *more]
    running = forks.start(words, folder, ranks=2, setup=bad(what))
    began = time.monotonic()
    code = running.wait(90)
    gone = running.group_is_gone(30)
    answers[name] = [code, time.monotonic() - began, gone, running.said()]
    running.kill()
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
            timeout=290,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["nan", "stop"])
def test_a_gradient_that_is_no_number_ends_both_ranks_with_the_cause(answers, name):
    code, _, gone, said = answers[name]
    assert code == 1, said
    assert gone
    assert "nan" in said.lower()


@pytest.mark.parametrize("name", ["skip", "inf"])
def test_a_step_is_left_out_on_both_ranks(answers, name):
    code, _, gone, said = answers[name]
    assert code == 0, said
    assert gone


def test_memory_that_runs_out_outside_the_model_on_one_rank(answers):
    """Not where the trainer can take the step anew: both end, within the exchange's time limit."""
    code, seconds, gone, said = answers["memory"]
    assert code not in (0, None), said
    assert gone
    assert seconds < 80
    assert "memory" in said.lower()
