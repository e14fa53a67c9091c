"""Draw losses against tokens: `python benchmarks/plot_run.py RUN_FOLDER ... --out FILE`.

Training loss as a running mean, validation loss as points; one colour a run.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from mosaicbert.train.loggers import read_rows

WINDOW = 10  # batches of the running mean


def main() -> None:
    """Read each run's `metrics.jsonl` and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--title", default="", help="heading")
    args = parser.parse_args()
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, folder in enumerate(args.runs):
        rows = read_rows(folder / "metrics.jsonl")
        train = [(r["token"], r["loss/train/total"]) for r in rows if "loss/train/total" in r]
        evals = [(r["token"], r["metrics/eval/loss"]) for r in rows if "metrics/eval/loss" in r]
        tokens = [token / 1e6 for token, _ in train]
        means = [
            sum(loss for _, loss in train[max(0, i - WINDOW + 1) : i + 1]) / min(i + 1, WINDOW)
            for i in range(len(train))
        ]
        axes.plot(tokens, means, color=f"C{number}", alpha=0.5, label=f"{folder.name}: training")
        axes.plot(
            [token / 1e6 for token, _ in evals],
            [loss for _, loss in evals],
            "o-",
            color=f"C{number}",
            markersize=4,
            label=f"{folder.name}: validation",
        )
    axes.set(xlabel="million tokens", ylabel="MLM loss")
    axes.set_title(args.title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
