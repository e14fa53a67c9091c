"""The configuration reference, made from the schema: `python -m mosaicbert.config.reference`.

Prints `docs/configuration.md`; a test holds the file against this, so that it is never behind.
"""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from mosaicbert.config import jobs, sections
from mosaicbert.config.units import unit

HEAD = """\
# Configuration reference

Made from the schema (`python -m mosaicbert.config.reference`): every key there is. An unknown key
is an error that names the near one. On the command line a key is `section.key=value`; in a file,
`${key}` stands for the value of another, and a top-level key that only such references use is
free. `mosaicbert config show CONFIG` prints a file with all defaults filled in, `mosaicbert config
check CONFIG` only checks it.

A *time* is a number and a unit: `10ba` (batches, that is optimizer steps), `3ep` (epochs),
`1000000sp` (samples), `1000000tok` (tokens), `600sec`, `1h30m`, and `0.06dur` (share of
`max_duration`). Its unit is the one it is written in. Where no default stands, the key is needed.
"""

PARTS: tuple[tuple[str, str, type[BaseModel], type[BaseModel] | None], ...] = (
    ("Every training job", "", jobs.TrainerConfig, None),
    ("Pre-training", "", jobs.PretrainConfig, jobs.TrainerConfig),
    ("Classification", "", jobs.ClassifyConfig, jobs.TrainerConfig),
    ("`model`", "model.", sections.ModelConfig, None),
    ("`train_loader`, `eval_loader` of pre-training", "train_loader.", sections.LoaderConfig, None),
    ("`train_loader.dataset`", "train_loader.dataset.", sections.DatasetConfig, None),
    ("`train_loader.dataset.streams.NAME`", "train_loader.dataset.streams.NAME.",
     sections.StreamConfig, None),
    ("`train_loader`, `eval_loader` of classification", "train_loader.", sections.TaskLoaderConfig,
     None),
    ("`data` of classification", "data.", jobs.OwnDataConfig, None),
    ("`optimizer`", "optimizer.", sections.OptimizerConfig, None),
    ("`scheduler`", "scheduler.", sections.SchedulerConfig, None),
    ("`batch_size_warmup`", "batch_size_warmup.", sections.BatchSizeWarmupConfig, None),
    ("`algorithms`", "algorithms.", sections.AlgorithmsConfig, None),
    ("`algorithms.gradient_clipping`", "algorithms.gradient_clipping.",
     sections.GradientClippingConfig, None),
    ("`callbacks`", "callbacks.", sections.CallbacksConfig, None),
    ("`callbacks.speed_monitor`", "callbacks.speed_monitor.", sections.SpeedMonitorConfig, None),
    ("`callbacks.runtime_estimator`", "callbacks.runtime_estimator.",
     sections.RuntimeEstimatorConfig, None),
    ("`callbacks.optimizer_monitor`", "callbacks.optimizer_monitor.",
     sections.OptimizerMonitorConfig, None),
    ("`callbacks.health_checker`", "callbacks.health_checker.", sections.HealthCheckerConfig, None),
    ("`loggers`", "loggers.", sections.LoggersConfig, None),
    ("GLUE", "", jobs.GlueConfig, None),
    ("`tasks.NAME` of GLUE", "tasks.NAME.", jobs.GlueTaskConfig, None),
)  # fmt: skip
"""Heading, prefix of the keys, schema, and the schema whose keys stand elsewhere."""

EXAMPLES: dict[str, Any] = {
    "run_name": "my-bert",
    "mlm_probability": 0.3,
    "max_seq_len": 256,
    "max_duration": "286720000sp",
    "global_train_batch_size": 4096,
    "compile": False,
    "cuda_graphs": False,
    "cuda_mps": False,
    "device": "gpu",
    "precision": "amp_bf16",
    "python_log_level": "debug",
    "train_subset_num_batches": 100,
    "eval_subset_num_batches": 10,
    "save_folder": "s3://bucket/{run_name}",
    "load_path": "checkpoints/my-bert",
    "algorithms": {"alibi": {}},
    "loggers": {"tensorboard": {}},
    "optimizer": {"name": "decoupled_adamw", "lr": 5e-4},
    "scheduler": {"name": "cosine_with_warmup"},
    "callbacks": {"lr_monitor": {}},
    "data_local": "./my-copy-c4",
    "data_remote": "s3://bucket/c4",
    "batch_size_warmup": {"start": 512},
    "model": {"name": "mosaic_bert"},
    "train_loader": {"dataset": {"local": "./my-copy-c4", "split": "train"}},
    "eval_loader": {"dataset": {"local": "./my-copy-c4", "split": "val"}},
    "data": {"train": "train.csv"},
    "metrics": ["accuracy", "macro_f1"],
    "best_metric": "accuracy",
    "early_stopping": 3,
    "class_weights": "balanced",
    "tokenizer_name": "bert-base-uncased",
    "pretrained_checkpoint": "checkpoints/my-bert",
    "model_config": {"num_hidden_layers": 6},
    "num_labels": 3,
    "dataset": {"local": "./my-copy-c4", "split": "train"},
    "pin_memory": True,
    "prefetch_factor": 4,
    "persistent_workers": True,
    "local": "./my-copy-c4",
    "remote": "s3://bucket/c4",
    "split": "train",
    "streams": {"web": {"local": "./web", "proportion": 0.7}},
    "proportion": 0.7,
    "repeat": 2.0,
    "samples": 100_000,
    "shuffle_algo": "py1s",
    "num_canonical_nodes": 128,
    "predownload": 1024,
    "cache_limit": "50gb",
    "validate_hash": "sha1",
    "keep_zip": True,
    "eos_token_id": 102,
    "bos_token_id": 101,
    "validation": "validation.csv",
    "train": "train.csv",
    "task": "multilabel",
    "folds": 5,
    "start": 512,
    "speed_monitor": {"window_size": 100},
    "runtime_estimator": {"cost_per_hour": 20.0},
    "optimizer_monitor": {"interval": "100ba"},
    "health_checker": {"on_nan": "skip"},
    "gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0},
    "gpu_flops_available": 989e12,
    "cost_per_hour": 20.0,
    "wandb": {"project": "bert"},
    "tensorboard": {"log_dir": "tensorboard"},
    "mlflow": {"experiment_name": "bert"},
    "trackio": {"project": "bert"},
    "data_dir": "./glue",
    "starting_checkpoint_load_path": "checkpoints/my-bert",
    "save_finetune_checkpoint_prefix": "./finetuned",
    "save_finetune_checkpoint_folder": "./finetuned",
    "tasks": {"rte": {"seeds": [19, 8364]}},
    "seeds": [19, 8364],
    "lr": 5e-5,
    "weight_decay": 5e-6,
    "batch_size": 32,
    "trainer_kwargs": {"max_duration": "3ep"},
}
"""Of keys whose default is no good example, by the key's own name."""

CLASSIFY: dict[str, Any] = {
    "train_loader": {"split": "train", "shuffle": True},
    "eval_loader": {"split": "validation"},
}
"""Where classification means another section by a name."""


def reference() -> str:
    """The page, as Markdown."""
    return "\n".join([HEAD, *(_part(*part) for part in PARTS)])


def rows(
    prefix: str, schema: type[BaseModel], but: type[BaseModel] | None
) -> Iterator[tuple[str, str, str, Any, str]]:
    """Of each key: its dotted name, kind and unit, default, example, meaning."""
    known = but.model_fields if but else {}
    properties = schema.model_json_schema(by_alias=True).get("properties", {})
    for name, field in schema.model_fields.items():
        if name not in known:
            key = field.alias or name
            shown = kind(field, properties[key])
            meaning = " ".join((field.description or "").split())
            yield prefix + key, shown, default(field), example(schema, key, field), meaning


def _part(heading: str, prefix: str, schema: type[BaseModel], but: type[BaseModel] | None) -> str:
    lines = [
        f"## {heading}",
        "",
        "| key | kind | unit | default | example | meaning |",
        "|---|---|---|---|---|---|",
    ]
    for key, shown, usual, value, meaning in rows(prefix, schema, but):
        cells = (f"`{key}`", shown, unit(key, shown), usual, f"`{text(value)}`", meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def kind(field: FieldInfo, schema: dict[str, Any]) -> str:
    """What values are allowed, in a few words."""
    if any(isinstance(part, BeforeValidator) for part in field.metadata):
        return "time"
    return " or ".join(dict.fromkeys(_kinds(schema)))


def _kinds(schema: dict[str, Any]) -> Iterator[str]:
    for option in schema.get("anyOf", ()):
        if option.get("type") != "null":
            yield from _kinds(option)
    if "$ref" in schema:
        yield "section"
    elif "enum" in schema:
        yield from (f"`{value}`" for value in schema["enum"])
    elif "const" in schema:
        yield f"`{schema['const']}`"
    elif schema.get("type") == "array":
        inner = schema.get("items") or {}
        yield f"list of {' or '.join(_kinds(inner)) or 'values'}"
    elif schema.get("type") == "object":
        yield "section of free keys"
    elif "type" in schema:
        words = {"integer": "whole number", "number": "number", "boolean": "true or false"}
        yield words.get(schema["type"], "text") + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    words = []
    if above is not None:
        words.append(f"above {above:.10g}")
    if low is not None and high is not None:
        return f" {low:.10g} to {high:.10g}"
    if low is not None:
        words.append(f"from {low:.10g}")
    if high is not None:
        words.append(f"up to {high:.10g}")
    if below is not None:
        words.append(f"below {below:.10g}")
    return "".join(f" {word}" for word in words)


def default(field: FieldInfo) -> str:
    """The default as it would be written; empty for a key that is needed, `null` for none."""
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see there"
    return f"`{text(value)}`"


def example(schema: type[BaseModel], key: str, field: FieldInfo) -> Any:
    """A value that is allowed: the default where it says something, else one of `EXAMPLES`."""
    if schema is jobs.ClassifyConfig and key in CLASSIFY:
        return CLASSIFY[key]
    value = None if field.is_required() else field.get_default(call_default_factory=True)
    if schema is sections.OptimizerConfig and value is not None:
        return value
    if key in EXAMPLES and (value in (None, [], {}) or isinstance(value, BaseModel)):
        return EXAMPLES[key]
    return {} if value is None else value


def text(value: Any) -> str:
    """A value as YAML on one line."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return value
    return json.dumps(value).replace('"', "")


if __name__ == "__main__":
    print(reference(), end="")
