"""The whole product in a few minutes: text, shards, two pre-trainings, two fine-tunings, one table.

Everything is small: the bundled sample text, models of four layers, some hundred steps. What it
shows is that each part works and what the numbers look like, not how good models can get.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from mosaicbert.cli import guarded, run_command
from mosaicbert.errors import MosaicBertError, TrainingError

NAMES = {"hf_bert": "HF BERT", "mosaic_bert": "Mosaic BERT"}
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
}


def main(argv: list[str] | None = None) -> int:
    """Run the demo into a folder (default `runs/demo`); prints the table."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write to")
    parser.add_argument("--steps", type=int, default=50, help="pre-training steps")
    parser.add_argument("--epochs", type=int, default=2, help="fine-tuning epochs")
    args = parser.parse_args(argv)
    return guarded(lambda: run_demo(args.out, args.steps, args.epochs))


def run_demo(out: Path, steps: int, epochs: int) -> int:
    """Convert, pre-train both models, fine-tune both, compare."""
    from mosaicbert.finetuning import classify
    from mosaicbert.pretraining import pretrain

    _make_room(out)
    data = out / "data"
    words = ["--dataset", "sample", "--out_root", str(data), "--splits", "train_small", "val"]
    code = run_command("convert", words)
    if code:
        raise TrainingError(f"The conversion of the sample text ended with code {code}.")
    rows = []
    for model, name in NAMES.items():
        print(f"\n{name}: pre-training", file=sys.stderr)
        trained = pretrain(pretrain_config(out, data, model, steps))
        print(f"\n{name}: fine-tuning", file=sys.stderr)
        tuned = classify(classify_config(out, model, trained.checkpoint, epochs))
        rows.append(
            {
                "model": name,
                "validation MLM loss": trained.metrics["metrics/eval/loss"],
                "tokens/s": trained.tokens_per_second,
                "accuracy": tuned.metrics["metrics/eval/accuracy"],
            }
        )
    (out / "demo.json").write_text(json.dumps(rows, indent=1))
    draw_losses(out)
    print_table(rows, out)
    return 0


def _make_room(out: Path) -> None:
    """Remove what an earlier demo left in `out`; refuse a folder that is something else."""
    marker = out / ".mosaicbert-demo"
    if out.exists() and any(out.iterdir()) and not marker.exists():
        raise MosaicBertError(
            f"{out} exists and was not made by this demo. Name another folder with --out."
        )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    marker.touch()


def pretrain_config(out: Path, data: Path, model: str, steps: int) -> dict[str, Any]:
    """The pre-training of one model, as the YAMLs have it; only the model differs."""

    def loader(split: str, shuffle: bool) -> dict[str, Any]:
        dataset = {
            "local": str(data),
            "split": split,
            "max_seq_len": 128,
            "shuffle": shuffle,
            "mlm_probability": 0.15,
        }
        return {"dataset": dataset, "drop_last": shuffle, "num_workers": 1 if shuffle else 0}

    return {
        "run_name": f"pretrain-{model}",
        "run_folder": str(out / f"pretrain-{model}"),
        "save_folder": str(out / f"pretrain-{model}/checkpoints"),
        "save_interval": "1dur",
        "model": {"name": model, "model_config": SHAPE},
        "train_loader": loader("train_small", True),
        "eval_loader": loader("val", False),
        "optimizer": {"name": "decoupled_adamw", "lr": 2e-3, "weight_decay": 1e-5},
        "scheduler": {"name": "linear_decay_with_warmup", "t_warmup": "0.06dur", "alpha_f": 0.02},
        "max_duration": f"{steps}ba",
        "eval_interval": f"{max(1, steps // 6)}ba",
        "global_train_batch_size": 16,
        "callbacks": {"speed_monitor": {"window_size": 50}, "lr_monitor": {}},
        "console_log_interval": f"{max(1, steps // 6)}ba",
    }


def classify_config(out: Path, model: str, checkpoint: str | None, epochs: int) -> dict[str, Any]:
    """The fine-tuning of one model on the bundled task, as the YAMLs have it."""
    return {
        "run_name": f"classify-{model}",
        "run_folder": str(out / f"classify-{model}"),
        "load_path": checkpoint,
        "max_seq_len": 128,
        "model": {"name": model, "model_config": SHAPE},
        "data": {"train": "sample"},
        "train_loader": {"split": "train", "shuffle": True, "drop_last": True},
        "eval_loader": {"split": "validation"},
        "optimizer": {"name": "decoupled_adamw", "lr": 1e-3, "weight_decay": 1e-5},
        "scheduler": {"name": "linear_decay_with_warmup", "t_warmup": "0.06dur", "alpha_f": 0.0},
        "max_duration": f"{epochs}ep",
        "eval_interval": "1ep",
        "global_train_batch_size": 32,
        "console_log_interval": "0.25dur",
    }


def draw_losses(out: Path) -> None:
    """`losses.png`: validation loss of both models against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for model, name in NAMES.items():
        rows = [
            json.loads(line)
            for line in (out / f"pretrain-{model}/metrics.jsonl").read_text().splitlines()
        ]
        points = [
            (row["batch"], row["metrics/eval/loss"]) for row in rows if "metrics/eval/loss" in row
        ]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="steps", ylabel="validation MLM loss (15 % masked)")
    axes.set_title("Same text, same steps, same shape", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "losses.png", dpi=150)


def print_table(rows: list[dict[str, Any]], out: Path) -> None:
    """The comparison, at 80 columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "validation MLM loss", "tokens/s", "accuracy", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['validation MLM loss']:.3f}",
            f"{row['tokens/s']:,.0f}",
            f"{row['accuracy']:.1%}",
        )
    print()
    Console(width=80).print(table)
    print(f"\nLoss curves: {out}/losses.png   Everything else: {out}/")


if __name__ == "__main__":
    sys.exit(main())
