"""Validation loss after a fixed time of training: recipes one after another on one GPU.

    python benchmarks/time_to_quality.py --data FOLDER --budget 60 [--recipes REGEX] [--seeds 17,18]
        [--also "NAME = RECIPE key=value ..."] [--override key=value] [--evals 10] [--limit SECONDS]
        [--target LOSS] [--compare A B] [--keep FOLDER [--glue FOLDER]] [--glue_seeds 1]
        [--glue_override key=value] [--add RECORD ...] [--out benchmarks/records/NAME.json]
        [--picture NAME.png] [--glue_picture NAME.png] [--commit HASH] [--tiny]

Each run goes through `mosaicbert.pretrain`, with its loaders, for `--budget` seconds of training:
the clock starts with the first batch and stands still in evaluations. What a recipe compiles is
compiled in a short run before, and a run that compiled more while it was timed says so (`graphs`).
A recipe whose mask rate or batch size moves over the run needs its length in samples: the budget
times the samples a second of the run before of that model, so its seconds are a little off.
The validation set is FOLDER/val (15 % masked, the same masks each time), all of it at every point
of the curve. `--seeds` are those of weights, dropout, order and masks of the training data.
The record is written after each run, and of one that SIGTERM stops it holds what there is (`cut`);
`--add` takes runs of earlier records, of the chosen recipes, into the tables and the picture, and
with `--glue` fine-tunes those whose checkpoints `--keep` still holds (without `--data` nothing is
trained). `--compare A B`: when A's curve reaches the mean of B's last losses.
"""

import argparse
import gc
import json
import re
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quality_tables import GLUE_TASKS, compare, draw, draw_glue, reached, table

import mosaicbert
from mosaicbert.config import PretrainConfig, load_config
from mosaicbert.glue_suite.tasks import TASKS
from mosaicbert.train import trainer
from mosaicbert.train.clock import Clock
from mosaicbert.train.environment import describe_environment
from mosaicbert.train.loggers import read_rows

MAIN = Path(__file__).parents[1] / "yamls/main"


@dataclass(frozen=True)
class Recipe:
    """A YAML of yamls/main and what is changed in it."""

    yaml: str
    changes: tuple[str, ...] = ()

    def but(self, *changes: str) -> "Recipe":
        """The same with further changes, which win."""
        return Recipe(self.yaml, (*self.changes, *changes))


BATCH_256 = ("global_train_batch_size=256", "device_train_microbatch_size=256")
BATCH_512 = ("global_train_batch_size=512", "device_train_microbatch_size=512")
CHUNKS = "train_loader.dataset.long_documents=chunk"

HF = Recipe("hf-bert-base-uncased.yaml", (*BATCH_256, CHUNKS, "scheduler.alpha_f=0"))
MOSAIC = Recipe("mosaic-bert-base-uncased.yaml", (*BATCH_512, CHUNKS, "scheduler.alpha_f=0"))
V2 = Recipe("mosaic-bert-v2-base.yaml", BATCH_512)
RECIPES = {
    "hf 1e-4": HF.but("optimizer.lr=1e-4", "scheduler.t_warmup=0.2dur"),
    "hf 2e-4": HF.but("optimizer.lr=2e-4", "scheduler.t_warmup=0.2dur"),
    "hf 4e-4": HF.but("optimizer.lr=4e-4", "scheduler.t_warmup=0.4dur"),
    "mosaic 4e-4": MOSAIC.but("optimizer.lr=4e-4"),
    "mosaic 8e-4": MOSAIC.but("optimizer.lr=8e-4", "scheduler.t_warmup=0.2dur"),
    "v2": V2,
    "v2 batch 256": V2.but(*BATCH_256),
    "v2 masks falling": V2.but("mlm_probability=[0.3,0.15]"),
    "v2 masks 15 %": V2.but("mlm_probability=0.15"),
    "v2 mini": Recipe("mosaic-bert-v2-mini.yaml"),
}
TINY = (
    "model.model_config.hidden_size=64",
    "model.model_config.num_hidden_layers=2",
    "model.model_config.num_attention_heads=2",
    "model.model_config.intermediate_size=128",
    "global_train_batch_size=8",
    "device_train_microbatch_size=8",
    "device_eval_batch_size=64",
    "precision=fp32",
    "device=cpu",
    "train_loader.num_workers=0",
)
WARM_UP_BATCHES = 40
WAITS = "throughput/data_wait_share"


class TrainingClock(Clock):
    """Counts training alone: from the first batch on, and not in evaluations."""

    last: "TrainingClock"

    def __init__(self) -> None:
        super().__init__()
        self.has_begun = False
        self.evaluations: list[float] = []
        """When each evaluation began, in seconds of training."""
        TrainingClock.last = self

    @property
    def seconds_of_this_call(self) -> float:
        """Since the first step, which asks first."""
        if not self.has_begun:
            self.has_begun = True
            self.start(0.0)
        return time.monotonic() - self._began

    def skip(self) -> None:
        """An evaluation is over: what it took does not count."""
        self.evaluations.append(self._mark - self._began)
        self._began += time.monotonic() - self._mark
        super().skip()


# --- runs -----------------------------------------------------------------------------------------


class Harness:
    """Runs recipes; knows which models have been compiled and how fast they were."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.speeds: dict[str, float] = {}
        """Samples a second of each model that ran."""
        trainer.Clock = TrainingClock  # type: ignore[misc]

    def config(self, recipe: Recipe, *changes: str) -> PretrainConfig:
        """The recipe on this benchmark's data, with `changes` and the command line's on top."""
        args = self.args
        words = [
            *recipe.changes,
            f"data_local={args.data}",
            f"max_duration={args.budget}sec",
            f"eval_interval={1 / args.evals}dur",
            "eval_loader.dataset.split=val",
            "eval_loader.num_workers=0",
            "save_interval=0ba",
            "log_to_console=false",
            "progress_bar=false",
            "python_log_level=warning",
            *(TINY if args.tiny else ()),
            *args.override,
        ]
        return load_config(PretrainConfig, MAIN / recipe.yaml, [*words, *changes])

    def run(self, name: str, recipe: Recipe, seed: int) -> dict[str, Any]:
        """One timed run, with what it compiles compiled before."""
        began = time.monotonic()
        row: dict[str, Any] = {"name": name, "seed": seed, "budget": self.args.budget}
        row["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        row |= {"yaml": recipe.yaml, "changes": [*recipe.changes, *self.args.override]}
        config = self.config(recipe, f"seed={seed}", f"train_loader.dataset.shuffle_seed={seed}")
        key = _compiled_key(config)
        if key not in self.speeds:
            self.speeds[key] = self._warm_up(config)
        if config.batch_size_warmup is not None or _moves(config):
            batch = config.global_train_batch_size
            batches = max(1, round(self.args.budget * self.speeds[key] / batch))
            config.max_duration = f"{batches * batch}sp"
        if self.args.keep:
            config.save_folder = str(checkpoints_of(row, self.args.keep))
            config.save_overwrite, config.save_num_checkpoints_to_keep = True, 1
        with tempfile.TemporaryDirectory(prefix="time-to-quality-") as folder:
            config.run_folder = folder
            row |= self._timed(config, Path(folder))
        self.speeds[key] = row["samples"] / row["seconds"]
        row["overhead_seconds"] = time.monotonic() - began - row["seconds"]
        return row

    def _warm_up(self, config: PretrainConfig) -> float:
        """Compile what the recipe needs, for all sizes its batches have; samples a second."""
        short = config.model_copy(deep=True)
        batches = WARM_UP_BATCHES if not self.args.tiny else 3
        short.max_duration, short.eval_interval = f"{batches}ba", "0ba"
        short.run_folder = short.save_folder = None
        short.batch_size_warmup = None
        result = mosaicbert.pretrain(short.model_dump(mode="json", by_alias=True))
        _release()
        tokens_per_sample = result.progress.token / result.progress.sample
        return result.tokens_per_second / tokens_per_sample

    def _timed(self, config: PretrainConfig, folder: Path) -> dict[str, Any]:
        graphs = _graphs()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        cut = False
        try:
            mosaicbert.pretrain(config.model_dump(mode="json", by_alias=True))
        except (SystemExit, KeyboardInterrupt):  # SIGTERM or SIGINT, between two steps
            cut = True
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        rows = read_rows(folder / "metrics.jsonl")
        losses = [row for row in rows if "metrics/eval/loss" in row]
        times = TrainingClock.last.evaluations
        assert len(times) == len(losses), f"{len(times)} evaluations, {len(losses)} rows"
        if not losses:
            raise SystemExit("Stopped before the first evaluation.")
        curve = [
            {
                "seconds": seconds,
                **{unit: row[unit] for unit in ("token", "sample", "batch", "epoch")},
                "loss": row["metrics/eval/loss"],
                "accuracy": row["metrics/eval/accuracy"],
            }
            for seconds, row in zip(times, losses, strict=True)
        ]
        train = [row["loss/train/total"] for row in rows if "loss/train/total" in row]
        tail = train[-max(1, len(train) // 20) :]
        waits = [row[WAITS] for row in rows if WAITS in row]
        _release()
        last = curve[-1]
        return {
            "cut": cut,
            "loss": last["loss"],
            "accuracy": last["accuracy"],
            "train_loss": statistics.fmean(tail),
            "seconds": last["seconds"],
            "tokens": last["token"],
            "samples": last["sample"],
            "batches": last["batch"],
            "epoch": last["epoch"],
            "tokens_per_second": last["token"] / last["seconds"],
            "data_wait_share": statistics.fmean(waits) if waits else None,
            "graphs": _graphs() - graphs,
            "peak_bytes": peak,
            "curve": curve,
            "config": config.model_dump(mode="json", by_alias=True, exclude_unset=True),
        }


def checkpoints_of(run: dict[str, Any], keep: Path) -> Path:
    """Where a run's checkpoint lies."""
    return keep / re.sub(r"[^\w-]+", "_", f"{run['name']}-{run['budget']:g}s-{run['seed']}")


def _moves(config: PretrainConfig) -> bool:
    """Whether the mask rate moves over the run."""
    own = config.train_loader.dataset.mlm_probability
    return isinstance(config.mlm_probability if own is None else own, list)


def _compiled_key(config: PretrainConfig) -> str:
    """What tells whether a run can use the graphs of another."""
    sizes = (config.device_train_microbatch_size, config.max_seq_len, config.precision)
    rate = config.train_loader.dataset.mlm_probability
    fixed = (config.global_train_batch_size, rate) if config.model.name == "hf_bert" else ()
    return json.dumps([config.model.model_dump(), sizes, fixed])


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _release() -> None:
    """Give the last model's memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fine_tune(run: dict[str, Any], checkpoints: Path, args: argparse.Namespace) -> dict[str, Any]:
    """GLUE of a run's checkpoint: the complete tasks, by the published settings.

    MNLI too, because three of them start from it; its part of the data counts for no mean. In bf16
    where the run was in fp8, so that models of both kinds compare.
    """
    began, folder = time.monotonic(), checkpoints.with_suffix(".glue")
    config = run["config"]
    tasks: dict[str, Any] = {}
    for name in ("mnli", *GLUE_TASKS):
        kwargs: dict[str, Any] = {"save_num_checkpoints_to_keep": int(name == "mnli")}
        if args.tiny:
            kwargs |= {"max_duration": "2ba"}
        seeds = list(TASKS[name].seeds[: args.glue_seeds])
        tasks[name] = {"seeds": seeds, "trainer_kwargs": kwargs}
    names = ("precision", "device", "tokenizer_name", "algorithms")
    if config.get("precision") == "fp8":
        config = config | {"precision": "amp_bf16"}
    suite = {
        "base_run_name": "glue",
        "data_dir": str(args.glue),
        "parallel": True,
        "jobs_per_gpu": "auto",
        "model": config["model"],
        "starting_checkpoint_load_path": str(checkpoints),
        "run_folder": str(folder),
        "progress_bar": False,
        "python_log_level": "warning",
        "scheduler": {"name": "linear_decay_with_warmup", "t_warmup": "0.06dur"},
        "tasks": tasks,
        **{name: config[name] for name in names if config.get(name) is not None},
    }
    try:
        mosaicbert.glue(suite, args.glue_override)
    except ModuleNotFoundError as error:  # of the picture, which comes after the scores
        if error.name != "matplotlib":
            raise
    found = json.loads((folder / "glue.json").read_text())
    return {
        "mean": statistics.fmean(found["task_means"][name] for name in GLUE_TASKS),
        "tasks": found["task_means"],
        "num_seeds": args.glue_seeds,
        "overrides": args.glue_override,
        "scores": found["scores"],
        "seconds": time.monotonic() - began,
    }


# --- command --------------------------------------------------------------------------------------


def log(text: str) -> None:
    """Print at once: the run may be cut off."""
    print(text, flush=True)


def chosen(args: argparse.Namespace) -> dict[str, Recipe]:
    """The recipes that `--recipes` matches, with those of `--also`."""
    recipes = dict(RECIPES)
    for text in args.also:
        name, equals, words = text.partition(" = ")
        base, *changes = shlex.split(words)
        base = base.replace("_", " ")
        if not equals or base not in recipes:
            known = ", ".join(name.replace(" ", "_") for name in recipes)
            sys.exit(f"--also {text!r}: write NAME = RECIPE key=value ...; recipes: {known}")
        recipes[name] = recipes[base].but(*changes)
    return {name: recipe for name, recipe in recipes.items() if re.search(args.recipes, name)}


def read_runs(records: list[Path]) -> list[dict[str, Any]]:
    """The runs of earlier records, each with the device that it ran on."""
    runs = []
    for path in records:
        record = json.loads(path.read_text())
        devices = record["environment"].get("gpus") or ["CPU"]
        runs += [{"device": devices[0]} | run for run in record["runs"]]
    return runs


def write(args: argparse.Namespace, runs: list[dict[str, Any]], environment: Any) -> None:
    """The record as far as it is, whole or not at all."""
    if args.out is None:
        return
    record = {
        "claim": "validation MLM loss (15 % masked) after a fixed time of training on one device",
        "environment": environment | {"commit": args.commit or environment["commit"]},
        "settings": {"budget": args.budget, "evals": args.evals, "tiny": args.tiny},
        "runs": runs,
    }
    part = args.out.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(args.out)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", default="", help="regular expression: which recipes")
    parser.add_argument("--also", action="append", default=[], help="'NAME = RECIPE key=value ..'")
    parser.add_argument("--override", action="append", default=[], help="key=value, for all")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of training")
    parser.add_argument("--seeds", default="17", help="comma-separated")
    parser.add_argument("--evals", type=int, default=10, help="points of the curve")
    parser.add_argument("--limit", type=float, help="start no run that would end after so long")
    parser.add_argument("--data", type=Path, help="folder with train/ and val/")
    parser.add_argument("--keep", type=Path, help="folder to leave the runs' checkpoints in")
    parser.add_argument("--glue", type=Path, help="folder of GLUE: fine-tune what --keep holds")
    parser.add_argument("--glue_override", action="append", default=[], help="key=value")
    parser.add_argument("--glue_seeds", type=int, default=1, help="of each task's published ones")
    parser.add_argument("--target", type=float, action="append", default=[], help="a loss")
    parser.add_argument("--compare", nargs=2, action="append", default=[], metavar=("A", "B"))
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="records of earlier runs")
    parser.add_argument("--out", type=Path, help="where to write the record")
    parser.add_argument("--picture", type=Path, help="where to draw the curves")
    parser.add_argument("--glue_picture", type=Path, help="where to draw GLUE's scores")
    parser.add_argument("--commit", help="commit that is measured")
    parser.add_argument("--tiny", action="store_true", help="small shapes on a CPU, to rehearse")
    args = parser.parse_args()
    if args.glue and not args.keep:
        parser.error("--glue needs --keep: where the checkpoints lie")
    return args


def main() -> int:
    """Run, print, write."""
    began = time.monotonic()
    args = parse()
    runs = [run for run in read_runs(args.add) if re.search(args.recipes, run["name"])]
    environment = describe_environment()
    harness = Harness(args)
    todo = [(n, r, int(s)) for s in args.seeds.split(",") for n, r in chosen(args).items()]
    for name, recipe, seed in todo if args.data else []:
        if args.limit and time.monotonic() - began + args.budget + 10 > args.limit:
            log(f"{name}, seed {seed}: left out, no time")
            continue
        try:
            run = harness.run(name, recipe, seed)
            log(
                f"{name}, seed {seed}: {run['loss']:.4f} after {run['seconds']:.1f} s, "
                f"{run['tokens_per_second'] / 1e3:.0f}k tok/s, {run['overhead_seconds']:.1f} s more"
                f" [{' '.join(format(point['loss'], '.2f') for point in run['curve'])}]"
            )
        except Exception as error:  # a recipe that cannot be does not end the others
            run = {"name": name, "seed": seed, "budget": args.budget}
            run["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            log(f"{name}, seed {seed}: {run['error']}")
            _release()
        runs.append(run)
        write(args, runs, environment)
        if run.get("cut"):
            log("Stopped in the midst of a run; what it had is in the record.")
            return 1
    whole = [run for run in runs if "error" not in run]
    for run in whole if args.glue else []:
        checkpoints = checkpoints_of(run, args.keep)
        if "glue" not in run and checkpoints.exists():
            run["glue"] = fine_tune(run, checkpoints, args)
            write(args, runs, environment)
    log("\n" + table(runs))
    for loss in args.target:
        log(reached(whole, loss, "the target"))
    for a, b in args.compare:
        log(compare(whole, a, b))
    if args.picture and whole:
        draw(whole, args.picture)
    if args.glue_picture and any("glue" in run for run in whole):
        draw_glue(whole, args.glue_picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
