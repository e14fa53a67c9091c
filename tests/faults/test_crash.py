"""The short form of the crash matrix; the long one: `python -m tests.faults crash --cases 500`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def faults(*words, timeout=280):
    """Run the suite's program: it forks, which a test runner with threads must not."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *words],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "kinds", [("convert", "pretrain", "pretrain-2-ranks", "upload"), ("glue", "export", "predict")]
)
def test_kill_9_loses_nothing(kinds):
    said = faults("crash", "--cases", "4", "--seed", "3", "--only", *kinds)
    assert int(re.findall(r"(\d+) kills", said)[-1]) >= 4


def test_bad_input_is_refused_in_words():
    said = faults("inputs", "--cases", "200", "--seed", "3")
    assert len(re.findall(r"'inputs': 200", said)) == 16


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_long_form():
    faults("crash", "--cases", "100", "--seed", "4", timeout=7000)
    faults("inputs", "--cases", "2000", "--seed", "4", timeout=7000)
