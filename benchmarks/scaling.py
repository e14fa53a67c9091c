"""Loss against parameters and tokens: a law fitted to runs of `time_to_quality.py`, and a forecast.

    python benchmarks/scaling.py RECORD ... [--recipes REGEX] [--tokens 36.7e9] [--gpus 1,8,64]
        [--price 2.5] [--out benchmarks/records/NAME.json] [--picture NAME.png]

The law is `L(N, D) = E + A / N^alpha + B / D^beta` (Hoffmann et al. 2022, arXiv:2203.15556,
approach 3): N are the parameters of the layers, without embeddings and decoder, D the tokens
trained on, L the last validation loss of a run. Each run must have had its whole schedule, so sizes
and budgets need runs of their own: three of each are the least. A run is left out of the fit and
foretold by the others, one after the other; the largest such error is what the law is good for.
Below, for each size: hours, cost and loss of `--tokens`, with the speed that its longest run had;
so many GPUs are taken to be so many times as fast. The data of the fit may be read several times
(`epochs`); the law knows nothing of that.
"""

import argparse
import itertools
import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from mosaicbert.config import ModelConfig
from mosaicbert.models.build import build_model

HUBER = 1e-3
"""Errors of log-loss beyond which they count by their size, not by its square."""
LEAST_RUNS = 6
"""More than the law's five constants."""
VOCABULARY, SEQ_LEN = 30_522, 128


@dataclass(frozen=True)
class Run:
    """What a run is to the law, and how fast it was."""

    name: str
    parameters: int  # of the layers
    tokens: float
    loss: float
    tokens_per_second: float
    epochs: float


@dataclass(frozen=True)
class Law:
    """`L(N, D) = floor + a / N^alpha + b / D^beta`."""

    floor: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Foretold loss, in nats."""
        return self.floor + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def best_parameters(self, product: float) -> float:
        """The N of least loss where N times D is `product`: compute, but for a constant."""
        share = self.beta / (self.alpha + self.beta)
        ratio = self.alpha * self.a / (self.beta * self.b)
        return float(ratio ** (1 / (self.alpha + self.beta)) * product**share)


def read(paths: list[Path], recipes: str) -> list[Run]:
    """The whole runs of these records whose names match."""
    runs = []
    for row in [row for path in paths for row in json.loads(path.read_text())["runs"]]:
        if "error" in row or row.get("cut") or not re.search(recipes, row["name"]):
            continue
        model = ModelConfig.model_validate(row["config"]["model"])
        speed, epochs = row["tokens_per_second"], row["epoch"]
        size = layer_parameters(model)
        runs.append(Run(row["name"], size, row["tokens"], row["loss"], speed, epochs))
    return runs


def layer_parameters(model: ModelConfig) -> int:
    """Of all layers of the encoder."""
    with torch.device("meta"):
        built: Any = build_model(model, "mlm", max_seq_len=SEQ_LEN, vocab_size=VOCABULARY)
    return sum(p.numel() for p in built.base_model.encoder.parameters())


def fit(runs: list[Run], near: Law | None = None) -> Law:
    """The law with the least Huber loss of log-losses, from many starts or from one law."""
    sizes, tokens, losses = (
        np.log([getattr(run, name) for run in runs]) for name in ("parameters", "tokens", "loss")
    )

    def error(x: NDArray[np.float64]) -> float:
        a, b, floor, alpha, beta = x
        terms = np.stack([a - alpha * sizes, b - beta * tokens, np.full_like(sizes, floor)])
        off = np.abs(np.logaddexp.reduce(terms) - losses)
        return float(np.where(off < HUBER, off**2 / 2, HUBER * (off - HUBER / 2)).sum())

    starts = list(itertools.product((3.0, 8.0), (3.0, 8.0), (-1.0, 0.5), (0.3, 0.6), (0.3, 0.6)))
    if near is not None:
        logs = [math.log(x) for x in (near.a, near.b, near.floor)]
        starts = [(logs[0], logs[1], logs[2], near.alpha, near.beta)]
    bounds = [(-5, 30), (-5, 30), (-10, 2), (0.01, 2), (0.01, 2)]
    found = [minimize(error, start, method="L-BFGS-B", bounds=bounds) for start in starts]
    a, b, floor, alpha, beta = min(found, key=lambda result: float(result.fun)).x
    return Law(math.exp(floor), math.exp(a), float(alpha), math.exp(b), float(beta))


def foretold(runs: list[Run]) -> list[float]:
    """Each run's loss by the law of the others."""
    whole = fit(runs)
    laws = [fit([other for other in runs if other is not run], whole) for run in runs]
    return [law.loss(run.parameters, run.tokens) for law, run in zip(laws, runs, strict=True)]


def forecast(
    law: Law, runs: list[Run], tokens: float, gpus: list[int], price: float
) -> list[dict[str, Any]]:
    """Seconds, loss and cost of `tokens` for each size."""
    rows = []
    for size in sorted({run.parameters for run in runs}):
        longest = max((run for run in runs if run.parameters == size), key=lambda run: run.tokens)
        for count in gpus:
            hours = tokens / (longest.tokens_per_second * count) / 3600
            rows.append(
                {
                    "name": longest.name,
                    "parameters": size,
                    "gpus": count,
                    "hours": hours,
                    "cost": hours * count * price,
                    "loss": law.loss(size, tokens),
                }
            )
    return rows


def tables(law: Law, runs: list[Run], left_out: list[float], rows: list[dict[str, Any]]) -> str:
    """All of it, in 80 columns."""
    lines = [
        f"L = {law.floor:.3f} + {law.a:.4g} / N^{law.alpha:.3f} + {law.b:.4g} / D^{law.beta:.3f}",
        f"\n{'run':24} {'N, M':>7} {'D, M':>7} epochs {'loss':>6} {'law':>6} left out",
    ]
    for run, alone in zip(runs, left_out, strict=True):
        lines.append(
            f"{run.name[:24]:24} {run.parameters / 1e6:7.1f} {run.tokens / 1e6:7.0f}"
            f" {run.epochs:6.0f} {run.loss:6.3f} {law.loss(run.parameters, run.tokens):6.3f}"
            f" {alone:8.3f}"
        )
    worst = max(abs(alone - run.loss) for run, alone in zip(runs, left_out, strict=True))
    lines.append(f"largest error of a run that was left out: {worst:.3f}")
    best = law.best_parameters(max(run.parameters * run.tokens for run in runs))
    lines.append(f"best size for the compute of the largest run: {best / 1e6:.0f}M in layers")
    lines.append(f"\n{'size':24} {'N, M':>7} {'GPUs':>5} {'hours':>9} {'cost':>9} {'loss':>7}")
    for row in rows:
        lines.append(
            f"{row['name'][:24]:24} {row['parameters'] / 1e6:7.1f} {row['gpus']:5}"
            f" {row['hours']:9.2f} {row['cost']:9.0f} {row['loss']:7.3f}"
        )
    return "\n".join(lines)


def draw(law: Law, runs: list[Run], path: Path) -> None:
    """Losses against tokens, a colour a size, with the law's lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    tokens = [run.tokens for run in runs]
    line = np.geomspace(min(tokens) / 2, max(tokens) * 4, 50)
    for index, size in enumerate(sorted({run.parameters for run in runs})):
        own = [run for run in runs if run.parameters == size]
        color = f"C{index}"
        axes.plot([run.tokens for run in own], [run.loss for run in own], "o", color=color)
        label = f"{own[0].name}, {size / 1e6:.0f}M in layers"
        axes.plot(line, [law.loss(size, d) for d in line], color=color, label=label)
    axes.set(xscale="log", xlabel="tokens", ylabel="validation MLM loss, 15 % masked")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> int:
    """Fit, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--recipes", default="", help="regular expression: which runs")
    parser.add_argument("--tokens", type=float, default=36.7e9, help="of the run to foretell")
    parser.add_argument("--gpus", default="1,8,64", help="comma-separated")
    parser.add_argument("--price", type=float, default=2.5, help="of one GPU for an hour")
    parser.add_argument("--out", type=Path, help="where to write the record")
    parser.add_argument("--picture", type=Path, help="where to draw it")
    args = parser.parse_args()
    runs = read(args.records, args.recipes)
    if len(runs) < LEAST_RUNS or len({run.parameters for run in runs}) < 2:
        sys.exit(f"{len(runs)} runs: the law needs {LEAST_RUNS} at least, of two sizes or more.")
    law = fit(runs)
    left_out = foretold(runs)
    rows = forecast(law, runs, args.tokens, [int(n) for n in args.gpus.split(",")], args.price)
    print(tables(law, runs, left_out, rows))
    if args.picture:
        draw(law, runs, args.picture)
    if args.out:
        record = {
            "claim": "a law of loss, parameters and tokens, and what it foretells",
            "records": [path.name for path in args.records],
            "law": asdict(law),
            "runs": [asdict(run) | {"left_out": x} for run, x in zip(runs, left_out, strict=True)],
            "tokens": args.tokens,
            "price": args.price,
            "forecast": rows,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
