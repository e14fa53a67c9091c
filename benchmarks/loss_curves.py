"""Losses of the same training steps by different paths, beside one another.

    python benchmarks/loss_curves.py --data FOLDER [--yaml mosaic-bert-v2-base] [--batches 200]
        [--arms "bf16,bf16 other seed,plain,fp8"] [--override key=value] [--out RECORD.json]
        [--commit HASH] [--tiny]

Arms: `bf16`, with our kernels; `bf16 other seed`, which starts from other weights and shows what
noise is; `plain`, without any kernel of ours (torch's attention, norms and gates); `fp8`; and
`fp8 gate`, which keeps GeGLU's input in 8 bits too. All see the same batches with the same masks.
Printed is each arm's mean loss over tenths of the run, and its largest difference there from the
first arm.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import mosaicbert
from mosaicbert.config import PretrainConfig, load_config
from mosaicbert.models import kernels
from mosaicbert.train.environment import describe_environment
from mosaicbert.train.loggers import read_rows

MAIN = Path(__file__).parents[1] / "yamls/main"
ARMS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "bf16 other seed": ("seed=18", "train_loader.dataset.shuffle_seed=17"),
    "plain": (),
    "fp8": ("precision=fp8",),
    "fp8 gate": ("precision=fp8", "model.model_config.fp8_gate=true"),
}
TINY = (
    "model.model_config.hidden_size=64",
    "model.model_config.num_hidden_layers=2",
    "model.model_config.num_attention_heads=2",
    "model.model_config.intermediate_size=128",
    "global_train_batch_size=8",
    "precision=fp32",
    "device=cpu",
    "train_loader.num_workers=0",
)


def run(arm: str, args: argparse.Namespace) -> list[float]:
    """The loss of each step."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            f"data_local={args.data}",
            f"max_duration={args.batches}ba",
            "eval_interval=0ba",
            "eval_subset_num_batches=1",
            "save_interval=0ba",
            "save_folder=null",
            "eval_loader.dataset.split=val",
            "log_to_console=false",
            "progress_bar=false",
            f"run_folder={folder}",
            *(TINY if args.tiny else ()),
            *args.override,
            *ARMS[arm],
        ]
        config = load_config(PretrainConfig, MAIN / f"{args.yaml}.yaml", words)
        why_not = kernels.why_not
        if arm == "plain":
            kernels.why_not = lambda device: "this arm goes without"
        try:
            mosaicbert.pretrain(config.model_dump(mode="json", by_alias=True))
        finally:
            kernels.why_not = why_not
        rows = read_rows(Path(folder) / "metrics.jsonl")
    return [row["loss/train/total"] for row in rows if "loss/train/total" in row]


def tenths(losses: list[float]) -> list[float]:
    """Mean loss of each tenth of a run."""
    step = max(1, len(losses) // 10)
    return [statistics.fmean(losses[i : i + step]) for i in range(0, len(losses), step)][:10]


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--yaml", default="mosaic-bert-v2-base")
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--override", action="append", default=[], help="key=value, for all")
    parser.add_argument("--out", type=Path, help="where to write the record")
    parser.add_argument("--commit", help="commit that is measured")
    parser.add_argument("--tiny", action="store_true", help="small shapes on a CPU, to rehearse")
    args = parser.parse_args()
    environment = describe_environment()
    record: dict[str, Any] = {
        "claim": "training losses of the same steps by different paths",
        "command": " ".join(["python", *sys.argv]),
        "environment": environment | {"commit": args.commit or environment["commit"]},
        "losses": {},
    }
    means: dict[str, list[float]] = {}
    for arm in args.arms.split(","):
        losses = record["losses"][arm] = run(arm, args)
        means[arm] = tenths(losses)
        first = next(iter(means.values()))
        apart = max(abs(a - b) for a, b in zip(means[arm], first, strict=True))
        print(
            f"{arm:16} {' '.join(f'{x:6.3f}' for x in means[arm])}  apart {apart:.3f}", flush=True
        )
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
