"""`benchmarks/scaling.py`: the law that made the losses is found again."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks/scaling.py"
SHAPES = {"small": (256, 4), "middle": (512, 6), "large": (768, 12)}


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scaling"]


@pytest.fixture(scope="module")
def law(scaling):
    return scaling.Law(floor=1.6, a=300.0, alpha=0.36, b=2000.0, beta=0.41)


@pytest.fixture
def record(law, scaling, tmp_path):
    """Nine runs that follow the law, and two that do not count."""
    from mosaicbert.config import ModelConfig

    rows = []
    for name, (width, layers) in SHAPES.items():
        shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4}
        model = {"name": "mosaic_bert_v2", "model_config": shape | {"intermediate_size": 4 * width}}
        size = scaling.layer_parameters(ModelConfig.model_validate(model))
        for tokens in (3e7, 1e8, 3e8):
            row = {"name": name, "tokens": tokens, "loss": law.loss(size, tokens), "epoch": 1}
            rows.append(row | {"tokens_per_second": 1e14 / size, "config": {"model": model}})
    rows += [rows[0] | {"cut": True, "loss": 9.0}, {"name": "broken", "error": "no"}]
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"runs": rows}))
    return path


def test_the_law_is_found_again(record, law, scaling):
    runs = scaling.read([record], "")
    assert len(runs) == 9
    found = scaling.fit(runs)
    for size, tokens in ((8.5e7, 3e8), (2e7, 1e9), (3e8, 1e9)):
        assert found.loss(size, tokens) == pytest.approx(law.loss(size, tokens), rel=0.01)
    assert scaling.foretold(runs) == pytest.approx([run.loss for run in runs], rel=0.01)


def test_the_best_size_has_the_least_loss(law):
    product = 1e16
    best = law.best_parameters(product)
    losses = [law.loss(best * by, product / (best * by)) for by in (0.9, 1.0, 1.1)]
    assert min(losses) == losses[1]


def test_a_forecast_in_80_columns(record, scaling, monkeypatch, capsys, tmp_path):
    out, picture = tmp_path / "law.json", tmp_path / "law.png"
    words = ["scaling.py", str(record), "--tokens", "1e9", "--gpus", "1,8", "--price", "2"]
    monkeypatch.setattr("sys.argv", [*words, "--out", str(out), "--picture", str(picture)])
    assert scaling.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert picture.stat().st_size > 10_000
    rows = json.loads(out.read_text())["forecast"]
    assert [(row["name"], row["gpus"]) for row in rows][:2] == [("small", 1), ("small", 8)]
    assert rows[0]["hours"] == pytest.approx(8 * rows[1]["hours"])
    assert rows[0]["cost"] == pytest.approx(rows[1]["cost"]) == pytest.approx(2 * rows[0]["hours"])
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_too_few_runs_are_no_law(record, scaling, monkeypatch):
    monkeypatch.setattr("sys.argv", ["scaling.py", str(record), "--recipes", "small"])
    with pytest.raises(SystemExit, match="3 runs: the law needs 6"):
        scaling.main()
