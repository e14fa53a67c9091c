"""How near `mosaicbert plan --measure` comes to the run it plans, on the machine at hand.

For each case: plan, run, compare the memory at the peak and the wall clock, several times in turn.

    python benchmarks/plan_accuracy.py --data DIR --out RECORD.json [--repeat 3]

`DIR` is what `mosaicbert convert --dataset sample --out_root DIR --splits train_small val` made.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mosaicbert.train.environment import describe_environment

ROOT = Path(__file__).parents[1]
CASES = {
    "pretrain, Mosaic BERT of 4 layers": (
        "pretrain", "main/mosaic-bert-small-cpu.yaml",
        ["max_duration=60ba", "eval_interval=30ba", "autoresume=false"],
    ),
    "pretrain, HF BERT tiny": (
        "pretrain", "test/main.yaml", ["max_duration=120ba", "eval_interval=60ba"],
    ),
    "classify, Mosaic BERT of 4 layers": (
        "classify", "test/sequence_classification.yaml",
        ["model.name=mosaic_bert", "model.pretrained_model_name=prajjwal1/bert-mini",
         "max_duration=2ep", "eval_interval=1ep"],
    ),
    "glue, HF BERT tiny, two tasks": (
        "glue", "test/glue.yaml",
        [f"tasks.{task}.trainer_kwargs.{key}" for task in ("mnli", "rte")
         for key in ("max_duration=60ep", "eval_interval=20ep")],
    ),
}  # fmt: skip
"""Command, YAML and what is changed of it."""


def command(*words: str) -> tuple[str, float, float, int]:
    """Run `mosaicbert`: what it printed, seconds by the wall and by the CPU, and the most memory
    of one process in it.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen([sys.executable, "-m", "mosaicbert", *words], stdout=out)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{' '.join(words)} ended with {child.returncode}")
        out.seek(0)
        cpu = usage.ru_utime + usage.ru_stime
        return out.read(), seconds, cpu, usage.ru_maxrss * 1024


def compare(job: str, yaml: str, overrides: list[str], data: str) -> dict[str, Any]:
    """Plan a case, run it, and put both beside one another."""
    words = [str(ROOT / "yamls" / yaml), *overrides]
    words += [f"data_local={data}"] if job == "pretrain" else []
    load = os.getloadavg()[0]
    planned = json.loads(command("plan", *words, "--measure", "--json")[0])
    with tempfile.TemporaryDirectory() as folder:
        words.append(f"run_folder={folder}/run")
        words += ["save_finetune_checkpoint_prefix=null", "save_finetune_checkpoint_folder=null"] \
            if job == "glue" else ["save_folder=null"]  # fmt: skip
        _, seconds, cpu, peak = command(job, *words)
    start = planned["measured"]["start_seconds"]
    steps = planned["seconds"] + planned["evaluation_seconds"]
    row = {
        "planned_seconds": steps + start,
        "seconds": seconds,
        "planned_cpu_seconds": (steps + start) * planned["measured"]["cpu_share"],
        "cpu_seconds": cpu,
        "counted_bytes": planned["memory"]["total"],
        "measured_bytes": planned["measured"]["peak_bytes"],
        "peak_bytes": peak,
        "load_before": load,
        "load_after": os.getloadavg()[0],
    }
    row["cpu_seconds_off"] = row["planned_cpu_seconds"] / cpu - 1
    row["seconds_off"] = row["planned_seconds"] / seconds - 1
    row["counted_bytes_off"] = row["counted_bytes"] / peak - 1
    row["measured_bytes_off"] = row["measured_bytes"] / peak - 1
    print({key: round(value, 3) for key, value in row.items()}, file=sys.stderr)
    return row | {"plan": planned}


def main() -> None:
    """Every case `--repeat` times, in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    for _ in range(args.repeat):
        for name, (job, yaml, overrides) in CASES.items():
            print(name, file=sys.stderr)
            rows[name].append(compare(job, yaml, overrides, args.data))
    record = {
        "claim": "mosaicbert plan --measure is within 15 % of the memory and time of the run",
        "environment": describe_environment(),
        "variables": {
            key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_")
        },
        "cases": {
            name: {"command": [job, yaml, *words], "rows": rows[name]}
            for name, (job, yaml, words) in CASES.items()
        },
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
