"""The recipe for 128 tokens, then the YAML that goes on at 512, both cut to a small model."""

import json
from pathlib import Path

from mosaicbert import pretrain
from mosaicbert.cli import main

YAMLS = Path(__file__).parents[2] / "yamls/main"
SMALL = [
    "model.model_config.hidden_size=64",
    "model.model_config.num_hidden_layers=2",
    "model.model_config.num_attention_heads=2",
    "model.model_config.intermediate_size=64",
    "train_loader.dataset.split=train_small",
    "train_loader.num_workers=0",
    "eval_loader.num_workers=0",
    "eval_subset_num_batches=2",
    "precision=fp32",
    "optimizer.lr=4e-3",
]


def sizes(batch, samples):
    microbatch = {"device_train_microbatch_size": batch, "device_eval_batch_size": batch}
    words = {**microbatch, "global_train_batch_size": batch, "max_duration": f"{samples}sp"}
    return [f"{key}={value}" for key, value in words.items()]


def test_from_128_to_512_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert = "convert --dataset sample --out_root my-copy-c4 --splits train_small val"
    assert main(convert.split()) == 0
    first = pretrain(
        YAMLS / "mosaic-bert-base-uncased.yaml",
        [*SMALL, *sizes(16, 480), "run_name=first", "save_folder=ckpt"],
    )
    second = pretrain(
        YAMLS / "mosaic-bert-base-uncased-128-to-512.yaml",
        [*SMALL, *sizes(4, 40), "run_name=second", "load_path=ckpt"],
    )
    rows = (tmp_path / "runs/second/metrics.jsonl").read_text().splitlines()
    losses = [row["loss/train/total"] for row in map(json.loads, rows) if "loss/train/total" in row]
    assert first.metrics["metrics/eval/loss"] < 9.5  # a new model has ln(30522) = 10.3
    assert losses[0] < 9.5  # the first phase's weights, at 512
    assert second.metrics["metrics/eval/loss"] < first.metrics["metrics/eval/loss"] + 0.1
    assert second.progress.token > 40 * 128  # longer than the first phase could see
