"""A long training on a CPU, watched from outside, to see whether it grows or slows down.

    python benchmarks/soak.py FOLDER --seconds 7200 [--record FILE.json] [--picture FILE.png]

Trains a tiny Mosaic BERT on small compressed shards that are streamed through a cache too small
for them, with a checkpoint and an evaluation every few batches, every monitor on, and its console
log copied and cut off every minute as logrotate does it. Every few seconds the whole family of
processes is looked at: memory (proportional set size), file handles, threads, CPU time, files.

The record has 300 looks or so, and for each series the medians of the first and the last tenth
(after a tenth for warming up). Throughput counts tokens for each CPU second, and only while the
training had nearly all the processors that it had at its best: others may use the machine, and what
shares caches and waits for threads slows a CPU second down too. Both series, whole, are beside it.

    python benchmarks/soak.py --read FILE.json [--picture FILE.png]    prints and draws a record
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from mosaicbert.train.environment import describe_environment
from mosaicbert.train.loggers import read_rows

TICKS = os.sysconf("SC_CLK_TCK")
Look = dict[str, float]


def config(folder: Path, seconds: int) -> dict[str, Any]:
    """The training's YAML."""
    dataset = {
        "remote": str(folder / "data"),
        "local": str(folder / "cache"),
        "cache_limit": "400kb",
        "max_seq_len": 64,
    }
    return {
        "run_name": "soak",
        "model": {
            "name": "mosaic_bert",
            "model_config": {
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 128,
            },
        },
        "train_loader": {
            "dataset": {**dataset, "split": "train", "shuffle": True, "shuffle_block_size": 200},
            "num_workers": 2,
        },
        "eval_loader": {"dataset": {**dataset, "split": "val"}, "drop_last": False},
        "max_seq_len": 64,
        "global_train_batch_size": 32,
        "device_eval_batch_size": 32,
        "device": "cpu",
        "precision": "fp32",
        "max_duration": f"{seconds}sec",
        "eval_interval": "40ba",
        "eval_subset_num_batches": 4,
        "save_interval": "20ba",
        "save_folder": str(folder / "checkpoints"),
        "save_num_checkpoints_to_keep": 3,
        "run_folder": str(folder / "run"),
        "progress_bar": False,
        "loggers": {"tensorboard": {}},
        "callbacks": {
            "speed_monitor": {"window_size": 20},
            "lr_monitor": {},
            "memory_monitor": {},
            "runtime_estimator": {},
            "optimizer_monitor": {"interval": "50ba"},
            "health_checker": {},
        },
    }


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        with suppress(OSError):
            for task in Path(f"/proc/{found[-1]}/task").iterdir():
                todo += map(int, (task / "children").read_text().split())
    return found


def look(pid: int, folder: Path) -> Look:
    """What the family of processes holds at this moment."""
    total: Look = dict.fromkeys(("memory_mb", "file_handles", "threads", "processes"), 0.0)
    cpu = 0
    for member in family(pid):
        with suppress(OSError, StopIteration):  # it has just ended
            proc = Path(f"/proc/{member}")
            lines = (proc / "smaps_rollup").read_text().splitlines()
            pss = next(line for line in lines if line.startswith("Pss:"))
            fields = (proc / "stat").read_text().rpartition(")")[2].split()
            total["memory_mb"] += int(pss.split()[1]) / 1024
            total["file_handles"] += len(os.listdir(proc / "fd"))
            total["threads"] += int(fields[17])
            total["processes"] += 1
            cpu += int(fields[11]) + int(fields[12])
    files = [name for part in ("cache", "checkpoints", "run") for name in _files(folder / part)]
    return {**total, "cpu_seconds": cpu / TICKS, "files": len(files)}


def _files(folder: Path) -> list[str]:
    return [name for _, _, names in os.walk(folder) for name in names]


def rotate(log: Path) -> None:
    """Copy and cut off, as logrotate's copytruncate; one old file stays."""
    shutil.copy(log, log.with_suffix(".log.1"))
    os.truncate(log, 0)


def watch(process: "subprocess.Popen[bytes]", folder: Path, log: Path, every: float) -> list[Look]:
    """Looks until the process ends."""
    looks, began, rotated = [], time.monotonic(), time.monotonic()
    while process.poll() is None:
        now = look(process.pid, folder)
        batch = _last_row(folder / "run" / "metrics.jsonl")
        looks.append({"seconds": round(time.monotonic() - began, 1), **now, **batch})
        if time.monotonic() - rotated > 60:
            rotate(log)
            rotated = time.monotonic()
        time.sleep(every)
    return looks


def _last_row(path: Path) -> Look:
    with suppress(OSError, ValueError, IndexError):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            row = json.loads(file.read().splitlines()[-1])
        return {"batch": row["batch"], "token": row["token"]}
    return {"batch": 0, "token": 0}


def rates(looks: list[Look], window: int = 12) -> list[Look]:
    """Tokens for each second and each CPU second, over windows of looks."""
    found = []
    for before, after in zip(looks[::window], looks[window::window], strict=False):
        tokens = after["token"] - before["token"]
        cpu, wall = (after[key] - before[key] for key in ("cpu_seconds", "seconds"))
        if before["token"] and cpu > 0:
            found.append(
                {
                    "seconds": after["seconds"],
                    "processors": cpu / wall,
                    "tokens_per_second": tokens / wall,
                    "tokens_per_cpu_second": tokens / cpu,
                }
            )
    return found


def undisturbed(speed: list[Look]) -> list[Look]:
    """The windows in which the training had at least 95 % of the processors it had at its best."""
    most = max(row["processors"] for row in speed)
    return [row for row in speed if row["processors"] >= 0.95 * most]


def ends(series: list[Look], key: str) -> dict[str, float]:
    """Medians of the first and the last tenth, the first tenth of all left out."""
    values = [row[key] for row in series][len(series) // 10 :]
    tenth = max(1, len(values) // 10)
    first, last = statistics.median(values[:tenth]), statistics.median(values[-tenth:])
    change = 100 * (last / first - 1) if first else 0.0
    return {"first": round(first, 2), "last": round(last, 2), "change_percent": round(change, 2)}


def draw(looks: list[Look], speed: list[Look], path: Path) -> None:
    """Five curves over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 7.2), layout="constrained")
    quiet = undisturbed(speed)
    panels = [
        (looks, "memory_mb", "memory, MB"),
        (looks, "file_handles", "file handles"),
        (looks, "threads", "threads"),
        (looks, "files", "files on the disk"),
        (quiet, "tokens_per_cpu_second", "tokens a CPU second,\nundisturbed"),
    ]
    for axes, (series, key, label) in zip(figure.subplots(5, 1, sharex=True), panels, strict=True):
        style = "." if series is quiet else "-"
        minutes = [r["seconds"] / 60 for r in series]
        axes.plot(minutes, [r[key] for r in series], style, linewidth=0.8)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(label, fontsize=8)
        axes.grid(alpha=0.3)
    axes.set_xlabel("minutes")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def flatness(looks: list[Look], speed: list[Look]) -> dict[str, Any]:
    """First and last of every series; `undisturbed` has its share of the windows too."""
    quiet, rate = undisturbed(speed), "tokens_per_cpu_second"
    return {
        **{k: ends(looks, k) for k in ("memory_mb", "file_handles", "threads", "files")},
        **{k: ends(speed, k) for k in ("tokens_per_second", rate)},
        "undisturbed": ends(quiet, rate) | {"windows": len(quiet), "of": len(speed)},
    }


def read(record: Path, picture: Path | None) -> int:
    """Print how flat a record's series are, from its raw looks, and draw them."""
    content = json.loads(record.read_text())
    looks = [dict(zip(content["looks_columns"], row, strict=True)) for row in content["looks"]]
    speed = rates(looks, window=4)
    print(json.dumps(flatness(looks, speed), indent=1))
    if picture:
        draw(looks, speed, picture)
    return 0


def main() -> int:
    """Make the data, train, watch, and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="empty folder to work in")
    parser.add_argument("--read", type=Path, help="an earlier record in place of a training")
    parser.add_argument("--seconds", type=int, default=7200, help="length of the training")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks")
    parser.add_argument("--record", type=Path, help="JSON to write")
    parser.add_argument("--picture", type=Path, help="PNG to write")
    args = parser.parse_args()
    if args.read:
        return read(args.read, args.picture)
    if args.folder is None:
        parser.error("name an empty folder to work in")
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    words = ["convert", "--dataset", "sample", "--splits", "train", "val", "--quiet"]
    words += ["--out_root", str(folder / "data"), "--size_limit", "40000", "--compression", "zstd"]
    subprocess.run([sys.executable, "-m", "mosaicbert", *words], check=True)
    (folder / "soak.yaml").write_text(yaml.safe_dump(config(folder, args.seconds)))
    log = folder / "console.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mosaicbert", "pretrain", str(folder / "soak.yaml")],
            stdout=output,
            stderr=output,
        )
        looks = watch(process, folder, log, args.every)
    training = [row for row in looks if row["batch"] > 0][:-2]  # the end winds down
    speed = rates(training)
    rows = read_rows(folder / "run" / "metrics.jsonl")
    losses = [row["loss/train/total"] for row in rows if "loss/train/total" in row]
    left = [*folder.rglob("*.tmp"), *folder.rglob("*.part"), *folder.rglob(".part-*")]
    content = {
        "claim": "a long CPU training: memory, file handles, threads and throughput stay flat",
        "command": "python benchmarks/soak.py FOLDER --seconds " + str(args.seconds),
        "environment": describe_environment() | {"command": None},
        "exit_code": process.returncode,
        "seconds": training[-1]["seconds"] - training[0]["seconds"],
        "batches": rows[-1]["batch"],
        "checkpoints": sum("checkpoint/batch" in row for row in rows),
        "evaluations": sum("metrics/eval/loss" in row for row in rows),
        "epochs": rows[-1]["epoch"],
        "loss": {"first": losses[0], "last": losses[-1]},
        "temporary_files_left": [str(path.relative_to(folder)) for path in left],
        "flat": flatness(training, speed),
        "looks": [
            [row[key] for key in training[0]] for row in training[:: len(training) // 300 + 1]
        ],
        "looks_columns": list(training[0]),
    }
    print(json.dumps({k: v for k, v in content.items() if not k.startswith("looks")}, indent=1))
    if args.record:
        args.record.write_text(json.dumps(content) + "\n")
    if args.picture:
        draw(training, speed, args.picture)
    return int(process.returncode)


if __name__ == "__main__":
    sys.exit(main())
