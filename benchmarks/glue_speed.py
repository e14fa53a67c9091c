"""GLUE through `mosaicbert glue` and through transformers' Trainer, side by side by the clock.

    python benchmarks/glue_speed.py --data_dir FOLDER --out RECORD.json
        [--checkpoint FOLDER]      a Hugging Face BERT; without it one of base shape is made,
                                   with random weights
        [--model mosaic_bert]      what our side trains; hf_bert is the same model as the Trainer's
        [--tasks mnli rte] [--seeds 2] [--epochs 1] [--max_batches 200]    less work, for both
        [--jobs_per_gpu 8] [--no_mps] [--setting auto] [--probe 60] [--limit SECONDS]
        [--arms ours trainer]
        [--device cpu --tiny]      a rehearsal

Both sides are programs of their own, started one after the other and timed from start to end:
imports, tokenising, training, evaluations. Checkpoint, jobs (tasks and seeds), data, batches,
epochs, learning rates, schedule, optimizer, precision and evaluations are the same, taken from the
same plan. Ours is the command of that name with several jobs on the GPU. The Trainer takes job
after job in one process: padded to the longest text of a batch by its collator, fused AdamW, no
clipping, no checkpoints; how it samples and loads is the fastest of `SETTINGS` over `--probe` steps
(that search is not counted). No job of the Trainer's is begun after `--limit` seconds; the record
then says how many it did, and its ratio is the least there can be.
The record is written anew after every job.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from glue_trainer import SETTINGS

from mosaicbert.glue_suite.results import JobResult, Results
from mosaicbert.glue_suite.tasks import TASKS, pick

ARMS = ("ours", "trainer")


# --- what both sides do ---------------------------------------------------------------------------


def write_yaml(args: argparse.Namespace, checkpoint: Path) -> Path:
    """The YAML of our side, whose jobs are the Trainer's too."""
    tasks: dict[str, Any] = {}
    for name in args.tasks:
        task = pick(name)
        kwargs: dict[str, Any] = {"save_num_checkpoints_to_keep": int(name == "mnli")}
        if args.epochs:
            kwargs["max_duration"] = f"{args.epochs}ep"
        if args.max_batches:
            kwargs["max_duration"] = f"{args.max_batches}ba"
        if args.eval_at_end:
            kwargs["eval_interval"] = "0ba"
        seeds = [19, *task.seeds[1:]][: args.seeds or None]
        seeds += range(20, 20 + args.seeds - len(seeds))
        tasks[name] = {"seeds": seeds, "trainer_kwargs": kwargs}
    content = {
        "base_run_name": "glue-speed",
        "run_folder": str(args.work / "ours"),
        "parallel": True,
        "jobs_per_gpu": args.jobs_per_gpu,
        "cuda_mps": not args.no_mps,
        "device": args.device,
        "precision": "fp32" if args.device == "cpu" else "amp_bf16",
        "compile": args.compile,
        "data_dir": str(args.data_dir),
        "tokenizer_name": "bert-base-uncased",
        "model": {"name": args.model, "pretrained_model_name": str(checkpoint)},
        "starting_checkpoint_load_path": str(checkpoint),
        "scheduler": {"name": "linear_decay_with_warmup", "t_warmup": "0.06dur", "alpha_f": 0.0},
        "tasks": tasks,
    }
    path: Path = args.work / "glue.yaml"
    path.write_text(json.dumps(content, indent=1))  # JSON is YAML
    return path


def make_checkpoint(folder: Path, tiny: bool) -> Path:
    """A BERT with random weights, as Hugging Face saves it."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(17)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**(small | {"intermediate_size": 256} if tiny else {}))
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


# --- the comparison -------------------------------------------------------------------------------


def finished(args: argparse.Namespace, arm: str) -> list[dict[str, Any]]:
    """The jobs that a side has done so far."""
    if arm == "trainer":
        file = args.work / "rows.jsonl"
        return [json.loads(line) for line in file.open()] if file.exists() else []
    files = sorted(args.work.glob("ours/jobs/*/result.json"), key=lambda f: f.stat().st_mtime)
    return [json.loads(file.read_text())["result"] for file in files]


def run_arm(arm: str, args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Start a side, wait for it, and write the record whenever a job of it has ended."""
    if arm == "ours":
        command = [sys.executable, "-m", "mosaicbert", "glue", str(args.work / "glue.yaml")]
    else:
        command = _trainer(args, "run", record["setting"])
    log = args.work / f"{arm}.log"
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        told = 0
        while process.poll() is None:
            time.sleep(0.2)
            rows = finished(args, arm)
            for row in rows[told:]:
                done = time.monotonic() - began
                print(f"{arm:<8} {row['task']}-{row['seed']} done at {done:.1f} s", flush=True)
            if len(rows) > told:
                told = len(rows)
                note(args, record, arm, rows, time.monotonic() - began, None)
    note(args, record, arm, finished(args, arm), time.monotonic() - began, process.returncode)
    if process.returncode:
        print(f"{arm} ended with code {process.returncode}:\n{log.read_text()[-3000:]}", flush=True)


def note(
    args: argparse.Namespace,
    record: dict[str, Any],
    arm: str,
    rows: list[dict[str, Any]],
    seconds: float,
    code: int | None,
) -> None:
    """Put a side's state into the record."""
    fields = ("task", "seed", "metrics", "seconds", "batches")
    results = Results([JobResult.from_dict({f: row[f] for f in fields}) for row in rows])
    record["arms"][arm] = {
        "seconds": round(seconds, 1),
        "exit_code": code,
        "num_jobs": len(rows),
        "task_means": results.task_means(),
        "scores": [[s.task, s.metric, s.mean, s.std, s.n] for s in results.scores() if s.counts],
        "seconds_by_task": {
            task: round(sum(row["seconds"] for row in rows if row["task"] == task), 1)
            for task in TASKS
            if any(row["task"] == task for row in rows)
        },
        "jobs": rows,
    }
    both = record["arms"]
    if all(arm in both and both[arm]["exit_code"] == 0 for arm in ARMS):
        record["ratio"] = round(both["trainer"]["seconds"] / both["ours"]["seconds"], 2)
        record["ratio_is_a_lower_bound"] = both["trainer"]["num_jobs"] < both["ours"]["num_jobs"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


def table(record: dict[str, Any]) -> Iterator[str]:
    """Scores and seconds of both, task by task."""
    arms = record["arms"]
    yield f"{'task':<6} {'metric':<22}" + "".join(f"{arm:>20} {'std':>6}" for arm in arms)
    found = {arm: {(t, m): row for t, m, *row in arms[arm]["scores"]} for arm in arms}
    for task, metric in next(iter(found.values()), {}):
        cells = [found[arm].get((task, metric), [float("nan"), None, 0]) for arm in arms]
        texts = [
            f"{mean:>20.2f} {'' if std is None else f'{std:.2f}':>6}" for mean, std, _ in cells
        ]
        yield f"{task:<6} {metric:<22}" + "".join(texts)
    for task in TASKS:
        cells = [arms[arm]["seconds_by_task"].get(task) for arm in arms]
        if any(cells):
            yield f"{task:<6} {'seconds of its jobs':<22}" + "".join(
                f"{'-' if cell is None else cell:>20} {'':>6}" for cell in cells
            )
    whole = [f"{arms[arm]['seconds']:>20} {arms[arm]['num_jobs']:>3}jb" for arm in arms]
    yield f"{'all':<6} {'seconds by the clock':<22}" + "".join(whole)
    if "ratio" in record:
        least = "at least " if record["ratio_is_a_lower_bound"] else ""
        yield f"ratio: {least}{record['ratio']}"


def _trainer(args: argparse.Namespace, step: str, setting: str) -> list[str]:
    """The command of a step of the Trainer's side."""
    program = str(Path(__file__).with_name("glue_trainer.py"))
    words = [sys.executable, program, step, "--work", args.work, "--checkpoint", args.checkpoint]
    words += ["--setting", setting, "--probe", args.probe, "--limit", args.limit]
    return list(map(str, words))


def main() -> int:
    """Run the sides that are asked for, and print the table."""
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    if (args.work / "glue.yaml").exists():
        raise SystemExit(f"--work {args.work} holds another run: name an empty folder.")
    is_random = args.checkpoint is None
    if is_random:
        args.checkpoint = make_checkpoint(args.work / "checkpoint", args.tiny)
    write_yaml(args, args.checkpoint)
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": "CPU" if args.device == "cpu" else torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "accelerate")},
        },
        "commit": args.commit,
        "checkpoint": "random weights" if is_random else str(args.checkpoint),
        "jobs_per_gpu": args.jobs_per_gpu,
        "cuda_mps": not args.no_mps,
        "setting": "workers" if args.setting == "auto" else args.setting,
        "arms": {},
    }
    if "trainer" in args.arms and args.probe:
        subprocess.run(_trainer(args, "probe", args.setting), check=True)
        record["probe"] = json.loads((args.work / "probe.json").read_text())
        record["setting"] = max(record["probe"], key=record["probe"].__getitem__)
    for arm in args.arms:
        run_arm(arm, args, record)
        print(f"{arm}: {record['arms'][arm]['seconds']} s", flush=True)
    print("\n".join(table(record)))
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/glue-speed"))
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--model", choices=("hf_bert", "mosaic_bert"), default="hf_bert")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--seeds",
        type=int,
        default=0,
        help="a task; default: all of the recipe; more: further ones",
    )
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--max_batches", type=int, default=0)
    parser.add_argument("--eval_at_end", action="store_true", help="no evaluations on the way")
    parser.add_argument("--jobs_per_gpu", type=lambda n: n if n == "auto" else int(n), default=8)
    parser.add_argument("--no_mps", action="store_true", help="our side: jobs take turns")
    parser.add_argument("--compile", action="store_true", default=None, help="our side")
    parser.add_argument("--setting", choices=("auto", *SETTINGS), default="auto")
    parser.add_argument("--probe", type=int, default=60, help="steps; 0: none")
    parser.add_argument("--limit", type=float, default=0, help="seconds of the Trainer's side")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--commit", default="")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
