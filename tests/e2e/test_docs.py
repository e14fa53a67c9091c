"""The commands of the quick start and of the command-line page, as they stand there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = ["max_duration=2ba", "eval_subset_num_batches=1"]
RUN = {
    "quickstart.md": ("doctor", "convert", "pretrain", "watch"),
    "data.md": ("convert --dataset ./my-text", "inspect", "tokenizer"),
    "commands.md": ("plan", "bench", "config", "completion"),
}
"""Commands of each page that run here, by how they begin."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    (home / "yamls").symlink_to(ROOT / "yamls")
    (home / "my-text").mkdir()
    text = "".join(f"A line of text with the number {number}.\n" for number in range(400))
    (home / "my-text/lines.txt").write_text(text)
    return home


def lines_of(page):
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S):
        for line in block.splitlines():
            found = re.search(r"mosaicbert ([^)|]*)", line)
            if found and found[1].startswith(RUN[page]):
                yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize("page", RUN)
def test_the_commands_of_a_page_run_in_order(home, page):
    lines = list(lines_of(page))
    assert len(lines) >= len(RUN[page])
    for words in lines:
        words += SHORT if words[0] == "pretrain" else []
        done = subprocess.run(
            [sys.executable, "-m", "mosaicbert", *words],
            cwd=home,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT / "src"),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            },
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stderr or done.stdout}"
    if page == "quickstart.md":
        assert (home / "runs/first/report.html").exists()
