"""`mosaicbert plan --measure`: a few real steps of the job, in a process of their own.

The job itself runs, with its data, its workers and its model, for some seconds, then evaluates two
batches; nothing is kept. In a process of its own its memory at the peak is its own, too. Weights to
start from are not read: they change neither time nor, but for a moment, memory.
"""

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mosaicbert.config import ClassifyConfig, GlueConfig, PretrainConfig, TrainerConfig, check
from mosaicbert.errors import DataError, MosaicBertError
from mosaicbert.train.record import TrainResult

SECONDS = 15.0
"""How long the measured steps take, about."""
FEWEST_STEPS, MOST_STEPS = 4, 200
MICROBATCHES = 4
"""Most of a measured step: a step of hundreds takes as long for each token."""
EVAL_BATCHES = 2
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")


@dataclass(frozen=True, slots=True)
class Probe:
    """What was measured; rates are real tokens a second of one device."""

    steps: int
    tokens_per_second: float
    eval_tokens_per_second: float | None
    peak_bytes: int
    """Most memory of the GPU, or on a CPU of the process."""
    start_seconds: float
    """From the start of the process to the first step, which a run takes once."""
    cpu_share: float
    """CPU time of the process over the wall clock; well below the number of threads where others
    use the CPU too, or the data are waited for.
    """

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def measure(
    config: TrainerConfig | GlueConfig, microbatch: int, seconds: float = SECONDS
) -> dict[str, Probe]:
    """Probes of a job, by name: one, or of GLUE one for each task.

    Args:
        microbatch: samples that a device takes at a time; a step has a few of them at most.
        seconds: of measured steps; the start and the warm-up come on top.

    Raises:
        MosaicBertError: the job cannot run here; says why.
    """
    kind = type(config).__name__
    values = config.model_dump(mode="json", by_alias=True)
    request = {
        "kind": kind,
        "config": values,
        "microbatch": microbatch,
        "seconds": seconds,
        "began": time.time(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "mosaicbert.plan.probe"],
        input=json.dumps(request),
        env={k: v for k, v in os.environ.items() if k not in RANK_VARIABLES},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise DataError(f"--measure: the job cannot run here: {lines[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: Probe(**values) for name, values in found.items()}


# --- in the process of its own -------------------------------------------------------------------

Run = Callable[[dict[str, Any]], TrainResult]


def shortened(values: Mapping[str, Any], steps: int, batch: int, folder: str) -> dict[str, Any]:
    """A job's configuration, for so many steps, that writes into `folder` alone."""
    rate = values.get("mlm_probability")
    short = dict(values) | {
        "max_duration": f"{steps}ba",
        "global_train_batch_size": batch,
        "eval_interval": "0ba",
        "eval_subset_num_batches": EVAL_BATCHES,
        "save_folder": None,
        "load_path": None,
        "autoresume": False,
        "scheduler": {"t_warmup": "0ba"},
        "run_folder": folder,
        "loggers": None,
        "progress_bar": False,
        "log_to_console": False,
        "python_log_level": "error",
        "model": dict(values["model"]) | {"use_pretrained": False, "pretrained_checkpoint": None},
    }
    if "data" in short:  # classification
        short |= {"keep": "last", "early_stopping": None, "best_metric": None}
        short["data"] = short["data"] and dict(short["data"]) | {"folds": None}
    else:
        short["batch_size_warmup"] = None
        short["mlm_probability"] = sum(rate) / len(rate) if isinstance(rate, list) else rate
        if short["eval_loader"]:
            short["eval_loader"] = dict(short["eval_loader"]) | {"num_workers": 0}
    return {key: value for key, value in short.items() if value is not None}


def probe_job(
    values: Mapping[str, Any], microbatch: int, seconds: float, run: Run, began: float
) -> Probe:
    """Two steps to warm up, then as many as `seconds` have, and an evaluation."""
    batch = min(values["global_train_batch_size"], microbatch * MICROBATCHES)
    with tempfile.TemporaryDirectory() as folder:
        warm = run(shortened(values, 2, batch, f"{folder}/warm"))
        start = time.time() - began
        a_step = warm.progress.token / warm.progress.batch / warm.tokens_per_second
        steps = min(max(math.ceil(seconds / a_step), FEWEST_STEPS), MOST_STEPS)
        cpu, wall = time.process_time(), time.perf_counter()
        result = run(shortened(values, steps, batch, f"{folder}/run"))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        rows = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, rows) if "loss/train/total" in row][-1]
    progress = result.progress
    a_step = progress.token / progress.batch / result.tokens_per_second
    evaluation = result.seconds - last["seconds"] - a_step  # rows tell when their step began
    samples = EVAL_BATCHES * values["device_eval_batch_size"]
    tokens = samples * progress.token / progress.sample
    return Probe(
        steps=steps,
        tokens_per_second=result.tokens_per_second,
        eval_tokens_per_second=tokens / evaluation if result.metrics and evaluation > 0 else None,
        peak_bytes=_peak_bytes(),
        start_seconds=max(start - 2 * a_step, 0.0),
        cpu_share=cpu / wall,
    )


def _peak_bytes() -> int:
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _glue(
    values: Mapping[str, Any], microbatch: int, seconds: float, began: float
) -> dict[str, Probe]:
    """The first job of each task, one after another, as a slot's process runs them."""
    from mosaicbert import run as jobs_run
    from mosaicbert.finetuning import finetune
    from mosaicbert.glue_suite.data import load_task
    from mosaicbert.glue_suite.planning import plan_jobs
    from mosaicbert.glue_suite.tasks import pick

    found: dict[str, Probe] = {}
    for job in plan_jobs(check(GlueConfig, values)):
        task = pick(job.task)
        if task.name in found:
            continue
        train = load_task(task, job.data_dir, "train")
        sets = {n: load_task(task, job.data_dir, s) for n, s in task.evaluations.items()}
        sets = dict(list(sets.items())[:1])

        def run(short: dict[str, Any], train: Any = train, sets: Any = sets) -> TrainResult:
            config = check(ClassifyConfig, short)
            ranks = jobs_run.start(config)
            return finetune(config, train, sets, ranks=ranks)

        config = job.config.model_dump(mode="json", by_alias=True)
        found[task.name] = probe_job(config, microbatch, seconds, run, began)
        began = time.time()
    return found


def main() -> int:
    """Read a request from stdin, print the probes as one line of JSON."""
    from mosaicbert.finetuning import classify
    from mosaicbert.pretraining import pretrain

    request = json.load(sys.stdin)
    values, began = request["config"], request["began"]
    microbatch, seconds = request["microbatch"], request["seconds"]
    try:
        if request["kind"] == GlueConfig.__name__:
            found = _glue(values, microbatch, seconds, began)
        else:
            run: Run = pretrain if request["kind"] == PretrainConfig.__name__ else classify
            found = {values["run_name"]: probe_job(values, microbatch, seconds, run, began)}
    except MosaicBertError as error:
        print(str(error).replace("\n", " "), file=sys.stderr)
        return error.exit_code
    print(json.dumps({name: probe.to_dict() for name, probe in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
