"""The commands of the documentation's pages, as they stand there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mosaicbert.cli import main
from mosaicbert.config import ModelConfig
from mosaicbert.data.tokenizers import load_tokenizer
from mosaicbert.models.build import build_model

ROOT = Path(__file__).parents[2]
SHORT = ["max_duration=2ba", "eval_subset_num_batches=1"]
RUN = {"quickstart.md": ("doctor", "convert", "pretrain", "watch")}
"""Commands of a page, by how they begin, that run as a user runs them."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    (home / "yamls").symlink_to(ROOT / "yamls")
    (home / "my-text").mkdir()
    text = "".join(f"A line of text with the number {number}.\n" for number in range(400))
    (home / "my-text/lines.txt").write_text(text)
    return home


def lines_of(page, beginnings):
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S):
        for line in block.splitlines():
            found = re.search(r"mosaicbert ([^)|]*)", line)
            if found and found[1].startswith(beginnings):
                yield shlex.split(found[1], comments=True)


HERE = {
    "data.md": ("convert --dataset ./my-text", "inspect", "tokenizer"),
    "commands.md": ("plan", "bench", "config", "completion"),
    "pretraining.md": ("plan yamls/main/mosaic-bert-base", "report"),
    "clusters.md": ("launch",),
    "export.md": ("export ckpt ./my-bert --run", "predict ckpt"),
    "from-the-original.md": ("inspect", "export"),
}
"""Commands that run in this process, on small things of the names they use: that is faster."""


@pytest.fixture(scope="module")
def small_home(home):
    tokenizer = load_tokenizer("bert-base-uncased")
    shape = ModelConfig(pretrained_model_name="prajjwal1/bert-tiny")
    model = build_model(shape, "mlm", max_seq_len=64, vocab_size=len(tokenizer))
    model.save_pretrained(home / "ckpt")
    tokenizer.save_pretrained(home / "ckpt")
    torch.save(model.state_dict(), home / "ep0-ba70000-rank0.pt")
    for file in (home / "ckpt").iterdir():  # beside the bare weights, as Composer's users have it
        if file.suffix in (".json", ".txt"):
            shutil.copy(file, home / file.name)
    row = {"epoch": 0, "batch": 1, "sample": 4, "token": 9, "seconds": 1.0, "lr": 0.1}
    for name in ("first", "second"):
        (home / "runs" / name).mkdir(parents=True, exist_ok=True)
        (home / "runs" / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (home / "texts.txt").write_text("A line of text.\nAnother one.\n")
    (home / "masked.txt").write_text("A [MASK] of text.\n")
    words = "convert --dataset sample --splits val --out_root"
    assert main([*words.split(), str(home / "my-copy-c4")]) == 0
    return home


@pytest.mark.parametrize("page", HERE)
def test_more_commands_of_the_pages_run(small_home, page, monkeypatch, capsys):
    monkeypatch.chdir(small_home)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = list(lines_of(page, HERE[page]))
    assert len(lines) >= len(HERE[page])
    for words in lines:
        assert main(words) == 0, f"{words}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", RUN)
def test_the_commands_of_a_page_run_in_order(home, page):
    lines = list(lines_of(page, RUN[page]))
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
