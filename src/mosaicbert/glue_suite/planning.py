"""From a GLUE YAML to jobs: each a task with a seed, its settings and where it starts from."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosaicbert.config import ClassifyConfig, GlueConfig, GlueTaskConfig, check
from mosaicbert.duration import Duration
from mosaicbert.errors import ConfigError
from mosaicbert.glue_suite.tasks import GlueTask, pick, pick_all

log = logging.getLogger(__name__)

SAVE_INTERVAL = "2m"
"""What a killed job loses at most, unless the YAML says otherwise."""


@dataclass(frozen=True, slots=True)
class GlueJob:
    """One task with one seed: everything a child process needs to run it."""

    task: str
    seed: int
    config: ClassifyConfig
    data_dir: str | None
    folder: Path
    keep_checkpoint: bool
    after: str | None = None
    """The MNLI job whose checkpoint it starts from."""
    start: str | None = None
    """What tells its start from others: that job's digest, or the name of the newest checkpoint."""

    @property
    def name(self) -> str:
        """Task and seed, as shown."""
        return f"{self.task}-{self.seed}"

    @property
    def digest(self) -> str:
        """Tells whether a finished or unfinished job was this very one."""
        text = self.config.model_dump_json() + str(self.data_dir) + str(self.start)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan_jobs(config: GlueConfig) -> list[GlueJob]:
    """The jobs of a YAML, MNLI first, with the checkpoint each starts from.

    Raises:
        ConfigError: a task's name or one of its keys is wrong.
    """
    jobs: list[GlueJob] = []
    for task in pick_all(config.tasks):
        settings = config.tasks[task.name]
        for index, seed in enumerate(_seeds(config, task)):
            start = None
            if task.starts_from_mnli:
                mnli = [job for job in jobs if job.task == "mnli"]
                start = mnli[index % len(mnli)] if mnli else None
            jobs.append(_plan_job(config, task, settings, seed, start))
    if not any(job.task == "mnli" for job in jobs):
        names = [name for name in config.tasks if pick(name).starts_from_mnli]
        if names:
            log.warning(
                "MNLI is not in this run: %s start from the pre-trained checkpoint, not MNLI's.",
                ", ".join(names),
            )
    return jobs


def _seeds(config: GlueConfig, task: GlueTask) -> list[int]:
    """A task's seeds, each once: those of the YAML, else the default one and the table's others."""
    seeds = config.tasks[task.name].seeds
    if not seeds:
        default = config.default_seed
        return [default, *(seed for seed in task.seeds[1:] if seed != default)]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise ConfigError(
            f"tasks.{task.name}.seeds: {', '.join(map(str, twice))} is there more than once, but "
            "the same seed would give the same job. Name each seed once."
        )
    return seeds


def _plan_job(
    config: GlueConfig,
    task: GlueTask,
    settings: GlueTaskConfig,
    seed: int,
    start: GlueJob | None,
) -> GlueJob:
    folder = run_folder(config) / "jobs" / f"{task.name}-{seed}"
    max_seq_len = settings.max_seq_len or config.max_seq_len
    name = config.model.name
    starts_others = task.name == "mnli" and any(pick(t).starts_from_mnli for t in config.tasks)
    values: dict[str, Any] = {
        "run_name": f"{config.base_run_name}-{task.name}-{seed}",
        "seed": seed,
        "device": config.device,
        "precision": config.precision,
        # HF BERT would be compiled for batches padded to max_seq_len: slower than short ones
        "compile": False if config.compile is None and name == "hf_bert" else config.compile,
        "tokenizer_name": config.tokenizer_name,
        "max_seq_len": max_seq_len,
        "model": config.model.model_dump(by_alias=True) | {"num_labels": task.num_labels},
        "max_duration": f"{task.epochs}ep",
        "eval_interval": task.eval_interval,
        "global_train_batch_size": settings.batch_size or task.batch_size,
        "optimizer": {
            "name": "decoupled_adamw",
            "lr": settings.lr or task.lr,
            "betas": [0.9, 0.98],
            "eps": 1e-6,
            "weight_decay": task.weight_decay
            if settings.weight_decay is None
            else settings.weight_decay,
        },
        "scheduler": config.scheduler.model_dump(),
        "algorithms": config.algorithms,
        "callbacks": config.callbacks.model_dump(),
        "loggers": config.loggers,
        "progress_bar": False,
        "console_log_interval": "50ba",
        "run_folder": str(folder),
        "save_folder": _save_folder(config, task, seed, folder),
        "save_interval": SAVE_INTERVAL,
        "save_num_checkpoints_to_keep": 1,
        "autoresume": True,
        "load_path": start.config.save_folder if start else config.starting_checkpoint_load_path,
        "train_loader": {"split": "train", "shuffle": True},
        "eval_loader": {"split": "validation"},
    }
    wished = dict(settings.trainer_kwargs)
    where = f"tasks.{task.name}.trainer_kwargs"
    for section in ("data", "metrics"):
        if section in wished:
            raise ConfigError(
                f"{where}.{section}: GLUE has its own {section} for each task. Leave the key out."
            )
    for section in ("train_loader", "eval_loader", "optimizer", "scheduler"):
        if isinstance(wished.get(section), dict):  # some keys of it; the others stay
            wished[section] = values[section] | wished[section]
    keep = wished.get("save_num_checkpoints_to_keep", 0) != 0
    if not keep:
        wished.pop("save_num_checkpoints_to_keep", None)
    values |= {"save_at_end": keep or starts_others} | wished
    job_config = check(ClassifyConfig, {k: v for k, v in values.items() if v is not None}, where)
    return GlueJob(
        task.name,
        seed,
        job_config,
        config.data_dir,
        folder,
        keep,
        after=start.name if start else None,
        start=start.digest if start else _newest(job_config.load_path),
    )


def _newest(path: str | None) -> str | None:
    """The newest checkpoint of a save folder on this machine; None for anything else."""
    latest = Path(path or "", "latest")
    return latest.read_text().strip() if path and latest.is_file() else None


def _save_folder(config: GlueConfig, task: GlueTask, seed: int, folder: Path) -> str:
    """Where a job's checkpoints go: as configured, else into its own folder."""
    root, prefix = config.save_finetune_checkpoint_folder, config.save_finetune_checkpoint_prefix
    if root is None and prefix is not None:
        root = f"{prefix.rstrip('/')}/{config.base_run_name}"
    if root is None:
        return str(folder / "checkpoints")
    return f"{root.rstrip('/')}/task={task.name}/seed={seed}"


def run_folder(config: GlueConfig) -> Path:
    """The folder of the whole run."""
    return Path(config.run_folder.replace("{run_name}", config.base_run_name))


def longest_first(jobs: Sequence[GlueJob], rows: Mapping[str, int]) -> list[GlueJob]:
    """The order in which to start: what others wait for, then by samples to train on.

    So the last to end are short ones, and no worker is idle for long before the end. `rows`: the
    training examples of each task.
    """
    awaited = {job.after for job in jobs}

    def samples(job: GlueJob) -> float:
        total = Duration.parse(job.config.max_duration)
        if total.unit == "ep":
            return total.value * rows[job.task]
        return total.value * (job.config.global_train_batch_size if total.unit == "ba" else 1)

    return sorted(jobs, key=lambda job: (job.name not in awaited, -samples(job)))
