"""The Trainer's side of `glue_speed.py`: transformers' Trainer over the jobs of a GLUE YAML.

    python benchmarks/glue_trainer.py probe|run --work FOLDER --checkpoint FOLDER

`FOLDER/glue.yaml` names the jobs. `probe` times each of `SETTINGS` (to `probe.json`); `run` does
one job after the other and adds a line to `rows.jsonl` for each. Needs `accelerate`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from mosaicbert.config import GlueConfig, load_config
from mosaicbert.duration import Duration
from mosaicbert.glue_suite.data import load_task
from mosaicbert.glue_suite.planning import GlueJob, plan_jobs
from mosaicbert.glue_suite.results import JobResult
from mosaicbert.glue_suite.tasks import pick

WARM_UP = 10  # steps of a probe that are not timed
_WORKERS = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "workers": _WORKERS,
    "no workers": {},
    "by length": _WORKERS | {"train_sampling_strategy": "group_by_length"},
    "compiled": _WORKERS | {"torch_compile": True},  # on request: it compiles for each job
}
PROBED = ("workers", "no workers", "by length")


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """One split of a task, tokenised."""

    def __init__(self, task: str, data_dir: str, split: str, tokenizer: Any, limit: int) -> None:
        examples = load_task(pick(task), data_dir, split)
        self.encoded = tokenizer(
            examples.texts, examples.pairs, truncation=True, max_length=limit
        ).data
        self.labels = examples.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {name: values[index] for name, values in self.encoded.items()}
        return row | {"label": self.labels[index]}


def scores(task: str) -> Any:
    """`compute_metrics` of a task."""
    from scipy import stats
    from sklearn import metrics as sk

    def compute(prediction: Any) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        if pick(task).num_labels == 1:
            values = logits[:, 0]
            return {
                "spearman": float(stats.spearmanr(values, labels).statistic),
                "pearson": float(stats.pearsonr(values, labels).statistic),
            }
        guess = logits.argmax(-1)
        found = {"accuracy": sk.accuracy_score(labels, guess)}
        if pick(task).num_labels == 2:
            found |= {"f1": sk.f1_score(labels, guess), "mcc": sk.matthews_corrcoef(labels, guess)}
        return {name: float(value) for name, value in found.items()}

    return compute


def build_trainer(
    job: GlueJob, args: argparse.Namespace, setting: dict[str, Any], starts: dict[str, Any]
) -> Any:
    """A transformers Trainer for one job of the plan; `starts`: models of finished jobs."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertModel,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from mosaicbert.data.tokenizers import load_tokenizer

    task, config = pick(job.task), job.config
    set_seed(job.seed)
    tokenizer = load_tokenizer(config.tokenizer_name)
    start = starts[job.after] if job.after else args.checkpoint
    shape = BertConfig.from_pretrained(start, num_labels=task.num_labels, problem_type=None)
    model = BertForSequenceClassification(shape)
    model.bert = BertModel.from_pretrained(start)  # all but the classifier
    split = {name: (task.name, job.data_dir, part) for name, part in _splits(task).items()}
    rows = {n: Rows(*where, tokenizer, config.max_seq_len) for n, where in split.items()}
    train = rows.pop("train")
    total = Duration.parse(config.max_duration)
    interval = int(Duration.parse(config.eval_interval).value)
    optimizer = torch.optim.AdamW(
        model.to("cpu" if job.config.device == "cpu" else "cuda").parameters(),
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay / config.optimizer.lr,
        fused=True,
    )
    arguments = TrainingArguments(
        output_dir=str(args.work / "trainer"),
        seed=job.seed,
        num_train_epochs=total.value if total.unit == "ep" else 1,
        max_steps=int(total.value) if total.unit == "ba" else -1,
        per_device_train_batch_size=config.global_train_batch_size,
        per_device_eval_batch_size=config.device_eval_batch_size,
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        max_grad_norm=0.0,
        eval_strategy="steps" if interval else "no",
        eval_steps=interval or None,
        save_strategy="no",
        logging_steps=500,
        report_to="none",
        disable_tqdm=True,
        bf16=job.config.device != "cpu",
        use_cpu=job.config.device == "cpu",
        **setting,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=scores(task.name),
        optimizers=(optimizer, None),
    )


def _splits(task: Any) -> dict[str, str]:
    return {"train": "train", **task.evaluations}


def probe(job: GlueJob, args: argparse.Namespace) -> dict[str, float]:
    """Steps a second of each way to run the Trainer."""
    from transformers import TrainerCallback

    marks: list[float] = []

    class Mark(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if len(marks) in (WARM_UP - 1, args.probe - 1) and job.config.device != "cpu":
                torch.cuda.synchronize()
            marks.append(time.monotonic())

    found = {}
    short = job.config.model_copy(
        update={"max_duration": f"{args.probe}ba", "eval_interval": "0ba"}
    )
    for name in PROBED if args.setting == "auto" else [args.setting]:
        marks.clear()
        changed = GlueJob(job.task, job.seed, short, job.data_dir, job.folder, False)
        trainer = build_trainer(changed, args, SETTINGS[name], {})
        trainer.add_callback(Mark())
        trainer.train()
        found[name] = (args.probe - WARM_UP) / (marks[-1] - marks[WARM_UP - 1])
        print(f"probe, {name}: {found[name]:.1f} steps a second", flush=True)
    return found


def run(jobs: list[GlueJob], args: argparse.Namespace) -> None:
    """All jobs, one after the other; a line of JSON to `rows.jsonl` for each."""
    began = time.monotonic()
    starts: dict[str, Any] = {}
    for job in jobs:
        if args.limit and time.monotonic() - began > args.limit:
            break
        start = time.monotonic()
        trainer = build_trainer(job, args, SETTINGS[args.setting], starts)
        trained = time.monotonic()
        trainer.train()
        evaluated = [row for row in trainer.state.log_history if _is_evaluation(row)]
        if not evaluated or evaluated[-1]["step"] != trainer.state.global_step:
            trainer.evaluate()
            evaluated = [row for row in trainer.state.log_history if _is_evaluation(row)]
        last = {name: value for row in evaluated for name, value in row.items()}  # the last wins
        if any(other.after == job.name for other in jobs):
            starts[job.name] = args.work / "trainer" / job.name
            trainer.model.save_pretrained(starts[job.name])
        seconds = time.monotonic() - trained
        metrics = {
            f"metrics/{evaluation}/{metric}": last[f"eval_{evaluation}_{metric}"]
            for evaluation in pick(job.task).evaluations
            for metric in (*pick(job.task).metrics, *pick(job.task).extra_metrics)
        }
        row = JobResult(job.task, job.seed, metrics, seconds, trainer.state.global_step)
        setup = {"setup_seconds": trained - start}
        with (args.work / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row.to_dict() | setup) + "\n")


def _is_evaluation(row: dict[str, Any]) -> bool:
    return any(name.startswith("eval_") for name in row)


def main() -> int:
    """Probe or run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("step", choices=("probe", "run"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--setting", choices=("auto", *SETTINGS), default="workers")
    parser.add_argument("--probe", type=int, default=60, help="steps")
    parser.add_argument("--limit", type=float, default=0, help="seconds; no job begins after it")
    args = parser.parse_args()
    jobs = plan_jobs(load_config(GlueConfig, args.work / "glue.yaml"))
    if args.step == "run":
        run(jobs, args)
        return 0
    speeds = probe(next(job for job in jobs if job.after is None), args)
    (args.work / "probe.json").write_text(json.dumps(speeds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
