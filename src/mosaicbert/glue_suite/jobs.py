"""`mosaicbert glue`: a YAML into a queue of fine-tuning jobs, and their results into a table.

A job is a task with a seed. Each has its own folder under the run folder; `result.json` there marks
it as finished, so the same command again runs only what is left, and resumes what was cut off.
"""

import argparse
import gc
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from mosaicbert.config import ClassifyConfig, GlueConfig, load_config
from mosaicbert.duration import Duration, Progress
from mosaicbert.errors import ConfigError, TrainingError
from mosaicbert.executors import ENGINES
from mosaicbert.glue_suite.claims import claim_folder, drop_checkpoints, has_checkpoint
from mosaicbert.glue_suite.planning import GlueJob, longest_first, plan_jobs, run_folder
from mosaicbert.glue_suite.queue import Job, Outcome, run_jobs
from mosaicbert.glue_suite.results import JobResult, Results
from mosaicbert.glue_suite.tasks import pick

log = logging.getLogger(__name__)

# --- running -------------------------------------------------------------------------------------


def run_job(job: GlueJob, report: Callable[[Any], None]) -> JobResult:
    """Fine-tune one job, in a slot's process; writes `result.json` when it is finished."""
    import torch

    from mosaicbert import run
    from mosaicbert.finetuning import finetune
    from mosaicbert.glue_suite.data import load_task

    task = pick(job.task)
    train = load_task(task, job.data_dir, "train")
    claim_folder(job)
    ranks = run.start(job.config)
    try:
        result = finetune(
            job.config,
            train,
            {n: load_task(task, job.data_dir, split) for n, split in task.evaluations.items()},
            ranks=ranks,
            metrics=(*task.metrics, *task.extra_metrics),
            new_head=job.after is not None,
            more_loggers=[_Reporter(job.config, len(train), report)],
        )
    finally:
        if ranks.device.type == "cuda":  # others on this GPU can use it between two jobs
            gc.collect()
            torch.cuda.empty_cache()
    found = JobResult(
        task=job.task,
        seed=job.seed,
        metrics=result.metrics,
        seconds=result.seconds,
        batches=result.progress.batch,
    )
    _write_result(job, found)
    return found


class _Reporter:
    """A logger that tells the parent how far the job is, at most twice a second."""

    def __init__(
        self, config: ClassifyConfig, num_samples: int, report: Callable[[Any], None]
    ) -> None:
        self._report = report
        self._total = Duration.parse(config.max_duration)
        self._batches_per_epoch = math.ceil(num_samples / config.global_train_batch_size)
        self._told = 0.0
        self._metrics: dict[str, float] = {}

    def log(self, metrics: Mapping[str, float], progress: Progress) -> None:
        """Keep the last evaluation; tell the parent when it is time."""
        found = {name: value for name, value in metrics.items() if name.startswith("metrics/")}
        self._metrics = found or self._metrics
        if time.monotonic() - self._told > 0.5:
            self._told = time.monotonic()
            done = progress.fraction_of(self._total, self._batches_per_epoch)
            self._report({"done": done, "metrics": self._metrics})

    def close(self) -> None:
        """Nothing is held back."""


def _result_file(job: GlueJob) -> Path:
    return job.folder / "result.json"


def _write_result(job: GlueJob, result: JobResult) -> None:
    path = _result_file(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"digest": job.digest, "result": result.to_dict()}, indent=1))
    os.replace(temporary, path)


def finished_result(job: GlueJob) -> JobResult | None:
    """The result of a job that an earlier call finished, if it was the same job."""
    path = _result_file(job)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        same = content["digest"] == job.digest
        return JobResult.from_dict(content["result"]) if same else None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}). Remove {job.folder} to run this job again."
        ) from None


def glue(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), engine: str = "local"
) -> Results:
    """Fine-tune on all tasks that a YAML file (or a mapping of its content) names.

    `engine`: `local`, or `ray` for a Ray cluster.

    Raises:
        ConfigError, DataError, CheckpointError: for what the user can mend.
        TrainingError: some jobs failed; the others have finished.
    """
    results, failed = _glue(load_config(GlueConfig, source, overrides), engine)
    if failed:
        raise TrainingError(failure_text(failed))
    return results


def _glue(
    config: GlueConfig, engine: str, published: bool = False
) -> tuple[Results, list[Outcome]]:
    from mosaicbert.glue_suite.live import LiveTable
    from mosaicbert.glue_suite.workers import build_executor
    from mosaicbert.report import report_at_end

    jobs = plan_jobs(config)
    _check_start(config.starting_checkpoint_load_path)
    done = _done_before(jobs)
    if done:
        log.info("%d of %d jobs were finished before and are not run again.", len(done), len(jobs))
    left = [job for job in jobs if job.name not in done]
    outcomes: list[Outcome] = []
    if left:
        with closing(build_executor(config, left, engine)) as workers:
            order = longest_first(left, check_data(left))  # faults are told before any training
            queue = [Job(job.name, job, job.folder / "log.txt", job.after) for job in order]
            with LiveTable(jobs, done, show=config.progress_bar) as table:
                outcomes = run_jobs(queue, workers, table.on_event)
    done |= {outcome.job.name: outcome.result for outcome in outcomes if outcome.error is None}
    _drop_checkpoints(jobs, done)
    results = Results([done[job.name] for job in jobs if job.name in done])
    results.write(run_folder(config), published=published)
    report_at_end(run_folder(config))
    return results, [outcome for outcome in outcomes if outcome.error is not None]


def _done_before(jobs: Sequence[GlueJob]) -> dict[str, JobResult]:
    """The results of finished jobs, by name.

    One from which a job that is left starts counts only while its checkpoint is there: without, its
    result is removed, so that it runs again.
    """
    done = {job.name: result for job in jobs if (result := finished_result(job)) is not None}
    needed = {job.after for job in jobs if job.name not in done}
    for job in jobs:
        if job.name in needed and job.name in done and not has_checkpoint(job):
            log.info("%s runs again: others start from its checkpoint, which is gone.", job.name)
            _result_file(job).unlink()
            del done[job.name]
    return done


def _check_start(path: str | None) -> None:
    """Raise CheckpointError where the checkpoint to start from is not there."""
    from mosaicbert.models.weights import local_copy
    from mosaicbert.run import naming

    if path is not None and "://" not in path:
        with naming("starting_checkpoint_load_path"), local_copy(path):
            pass


def check_data(jobs: Sequence[GlueJob]) -> dict[str, int]:
    """Read all that the jobs will read; the training examples of each task."""
    from mosaicbert.glue_suite.data import load_task

    rows = {}
    for name, data_dir in {job.task: job.data_dir for job in jobs}.items():
        rows[name] = len(load_task(pick(name), data_dir, "train"))
        for split in pick(name).validation_splits:
            load_task(pick(name), data_dir, split)
    return rows


def _drop_checkpoints(jobs: Sequence[GlueJob], done: Mapping[str, Any]) -> None:
    """Remove the checkpoints of finished jobs that nobody keeps or still starts from."""
    needed = {job.after for job in jobs if job.name not in done}
    for job in jobs:
        if not job.keep_checkpoint and job.name in done and job.name not in needed:
            drop_checkpoints(job)


def failure_text(failed: Sequence[Outcome]) -> str:
    """What to say of jobs that failed, each with its error."""
    lines = [f"{len(failed)} of the jobs failed; the same command runs them again:"]
    lines += [f"  {outcome.job.name}: {outcome.error}" for outcome in failed]
    return "\n".join(lines)


# --- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="key=value words that win over the file")
    parser.add_argument(
        "--published", action="store_true", help="put published results beside the table"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object in place of tables"
    )
    parser.add_argument(
        "--engine", choices=ENGINES, default="local", help="processes here, or a Ray cluster"
    )


def main(args: argparse.Namespace) -> int:
    """Run the queue, print the table; exit code 1 if a job failed."""
    from mosaicbert.run import set_log_level

    config = load_config(GlueConfig, args.config, args.overrides)
    set_log_level(config.python_log_level)
    results, failed = _glue(config, args.engine, args.published)
    if args.json:
        print(json.dumps(results.to_dict(args.published), indent=1, allow_nan=False))
    elif results.jobs:
        print(results.table(published=args.published))
        print(f"Written: {run_folder(config)}/glue.json, glue.csv, glue.png and report.html")
    if failed:
        print(f"mosaicbert: {failure_text(failed)}", file=sys.stderr)
    return 1 if failed else 0
