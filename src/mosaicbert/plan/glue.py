"""The plan of a GLUE run: each task as a training job, and all of them together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mosaicbert.config import GlueConfig
from mosaicbert.executors import Event
from mosaicbert.glue_suite.data import load_task
from mosaicbert.glue_suite.planning import GlueJob, longest_first, plan_jobs
from mosaicbert.glue_suite.queue import Job, run_jobs
from mosaicbert.glue_suite.tasks import pick
from mosaicbert.plan.estimate import estimate
from mosaicbert.plan.jobs import TrainingJob, finetuning_job
from mosaicbert.plan.machine import Machine
from mosaicbert.plan.probe import Probe

TRAIN_ROWS = {
    "mnli": 392_702, "qqp": 363_846, "qnli": 104_743, "sst2": 67_349,
    "cola": 8_551, "rte": 2_490, "mrpc": 3_668, "stsb": 5_749,
}  # fmt: skip
"""Training examples of the tasks as the hub has them."""


def glue_plan(
    config: GlueConfig,
    machine: Machine,
    price: float | None = None,
    probes: Mapping[str, Probe] | None = None,
) -> dict[str, Any]:
    """The largest task's memory, the work and time of all jobs, and a row for each task.

    Time is that of the queue with a job a GPU; several are faster by what nobody knows before.
    """
    jobs: dict[str, list[GlueJob]] = {}
    for job in plan_jobs(config):
        jobs.setdefault(job.task, []).append(job)
    alone = Machine(machine.gpu, 1, machine.memory_bytes, machine.is_here)  # a job has one device
    plans = {
        task: estimate(_job(of_task[0], config), alone, None, (probes or {}).get(task))
        for task, of_task in jobs.items()
    }
    largest = max(plans.values(), key=lambda plan: float(plan["memory"]["total"]))
    slots = machine.count if config.parallel else 1
    found = dict(largest) | {
        "run_name": config.base_run_name,
        "machine": machine.name,
        "problems": _together(plans, "problems"),
        "notes": _together(plans, "notes"),
        "tasks": [_row(task, plans[task], len(jobs[task])) for task in jobs],
    }
    for key in ("samples", "steps", "tokens", "evaluations", "evaluation_seconds", "seconds"):
        found.pop(key, None)
        if all(key in plan for plan in plans.values()):
            found[key] = sum(plan[key] * len(jobs[task]) for task, plan in plans.items())
    for key in ("epochs", "speed", "cost", "data", "measured"):
        found.pop(key, None)
    found["jobs"] = sum(map(len, jobs.values()))
    if probes:
        starts = sorted(probe.start_seconds for probe in probes.values())
        found["measured"] = {
            "peak_bytes": max(probe.peak_bytes for probe in probes.values()),
            # the first job of a slot's process imports what all need, and so does the command
            "cpu_share": min(probe.cpu_share for probe in probes.values()),
            "start_seconds": 2 * starts[-1] + starts[0] * (found["jobs"] / slots - 2),
        }
    if "seconds" in found:
        evaluation = found.get("evaluation_seconds", 0.0)
        whole = _queue_seconds([job for of_task in jobs.values() for job in of_task], plans, slots)
        share = evaluation / (found["seconds"] + evaluation or 1.0)
        found["seconds"], found["evaluation_seconds"] = whole * (1 - share), whole * share
        if price is not None:
            found["cost"] = whole / 3600 * price * slots
    return found


class _Clock:
    """An executor that does nothing but tell the time: each job takes what its task's plan says."""

    def __init__(self, num_slots: int, seconds: Mapping[str, float]) -> None:
        self.num_free = num_slots
        self.now = 0.0
        self._seconds = seconds
        self._ends: dict[str, float] = {}

    def submit(self, key: str, payload: GlueJob, log_file: Path | None = None) -> None:
        self.num_free -= 1
        self._ends[key] = self.now + self._seconds[payload.task]

    def wait(self) -> list[Event]:
        key = min(self._ends, key=self._ends.__getitem__)
        self.now = self._ends.pop(key)
        self.num_free += 1
        return [Event(key, "done")]

    def retire(self, key: str) -> bool:
        return False

    def close(self) -> None:
        """Nothing runs."""


def _queue_seconds(
    jobs: Sequence[GlueJob], plans: Mapping[str, Mapping[str, Any]], slots: int
) -> float:
    """From the first job's start to the last one's end, with the order and waits of a real run."""
    rows = {task: plan.get("data", {}).get("samples", 0) for task, plan in plans.items()}
    clock = _Clock(
        slots,
        {task: p["seconds"] + p.get("evaluation_seconds", 0.0) for task, p in plans.items()},
    )
    order = longest_first(jobs, rows)
    queue = [Job(job.name, job, job.folder, job.after) for job in order]
    run_jobs(queue, clock, lambda *_: None)
    return clock.now


def _job(job: GlueJob, config: GlueConfig) -> TrainingJob:
    """The job with its data; those of the hub are not fetched to be counted."""
    task = pick(job.task)
    if config.data_dir is None:
        why = "on the hub; lengths are not known before they are read, so all count as full"
        found = finetuning_job(job.config, None, [], why)
        found.epoch_samples = TRAIN_ROWS[job.task]
        return found
    train = load_task(task, config.data_dir, "train")
    sets = [load_task(task, config.data_dir, split) for split in task.validation_splits]
    return finetuning_job(job.config, train, sets)


def _row(task: str, plan: Mapping[str, Any], num_jobs: int) -> dict[str, Any]:
    return {
        "task": task,
        "jobs": num_jobs,
        "samples": plan.get("data", {}).get("samples"),
        "tokens_per_sample": plan["tokens_per_sample"],
        "steps": plan.get("steps"),
        "memory_bytes": plan["memory"]["total"],
        "seconds": plan.get("seconds"),
        "measured": plan.get("measured"),
    }


def _together(plans: Mapping[str, Mapping[str, Any]], key: str) -> list[str]:
    """Each text once, with the tasks it is about where it is not about all."""
    texts: dict[str, list[str]] = {}
    for task, plan in plans.items():
        for text in plan[key]:
            texts.setdefault(text, []).append(task)
    everywhere = len(plans)
    return [
        text if len(tasks) == everywhere else f"{', '.join(tasks)}: {text}"
        for text, tasks in texts.items()
    ]
