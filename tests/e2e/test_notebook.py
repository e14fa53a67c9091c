"""The notebook's cells, one after the other, as a kernel would run them."""

import json
import time
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "examples/quickstart.ipynb"


def test_the_notebook_runs_in_three_minutes_of_cpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    names = {"__name__": "__main__"}
    began = time.process_time()
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert time.process_time() - began < 180
    assert names["pretrained"].progress.batch == 40
    assert names["finetuned"].metrics["metrics/eval/accuracy"] >= 0
    losses = names["run"].points("loss/train/total")
    assert losses[-1][1] < losses[0][1] - 0.5
    assert (tmp_path / "runs/quickstart/report.html").exists()
    assert (tmp_path / "runs/quickstart-task/report.html").exists()
