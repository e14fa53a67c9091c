"""`mosaicbert plan CONFIG`: what a run will need and cost, and what will not fit."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mosaicbert import run
from mosaicbert.config import ClassifyConfig, GlueConfig, PretrainConfig, load_config
from mosaicbert.config.command import SCHEMAS, job_of
from mosaicbert.errors import ConfigError
from mosaicbert.plan.estimate import estimate
from mosaicbert.plan.glue import glue_plan
from mosaicbert.plan.jobs import classification_job, pretraining_job
from mosaicbert.plan.machine import Machine, machine_of
from mosaicbert.plan.probe import SECONDS, Probe, measure
from mosaicbert.plan.text import lines

Config = PretrainConfig | ClassifyConfig | GlueConfig


def plan(
    config: Config,
    machine: Machine,
    *,
    price: float | None = None,
    tokens_per_sample: float | None = None,
    probes: Mapping[str, Probe] | None = None,
) -> dict[str, Any]:
    """Everything about a run before it runs, as plain values; sizes in bytes.

    Args:
        price: of one GPU for an hour, in any currency.
        tokens_per_sample: real tokens of a sample on average. Default: of some samples, where the
            data are here, else all are full.
        probes: what `measure` gave, in place of the table of measured speeds.
    """
    if isinstance(config, GlueConfig):
        return glue_plan(config, machine, price, probes)
    is_text = isinstance(config, PretrainConfig)
    job = pretraining_job(config) if is_text else classification_job(config)  # type: ignore[arg-type]
    job.mean_length = tokens_per_sample or job.mean_length
    return estimate(job, machine, price, next(iter((probes or {}).values()), None))


def measured(config: Config, machine: Machine, seconds: float = SECONDS) -> dict[str, Probe]:
    """A few steps of the job on this machine, for about so many seconds.

    Raises:
        ConfigError: the plan is for another machine.
        MosaicBertError: the job cannot run here.
    """
    if not machine.is_here:
        raise ConfigError(
            f"--measure takes steps on this machine, which has no {machine.name}. Leave --gpu out, "
            "or --measure."
        )
    if isinstance(config, GlueConfig):
        return measure(config, GLUE_MICROBATCH, seconds)
    chosen = plan(config, machine)["microbatch"]["samples"]
    return measure(config, chosen, seconds)


GLUE_MICROBATCH = 48
"""Samples of the largest batch of a task: none is cut."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("config", help="YAML file of pre-training, classification or GLUE")
    parser.add_argument("overrides", nargs="*", help="key=value words that win over the file")
    parser.add_argument("--gpus", type=int, help="how many GPUs (default: those here, or 1)")
    parser.add_argument("--gpu", help="which, such as h100 or a100 (default: the one here)")
    parser.add_argument("--price", type=float, help="price of one GPU for an hour")
    parser.add_argument(
        "--tokens-per-sample",
        type=float,
        help="mean length (default: of some samples where the data are here, else all full)",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="take a few steps on this machine, with its data, for half a minute or so",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Print the plan; exit code 1 where the run would not fit."""
    config: Any = load_config(SCHEMAS[job_of(args.config)], args.config, args.overrides)
    run.set_log_level("warning")  # what a model says of itself is for its run
    machine = machine_of(args.gpu, args.gpus, config.device)
    found = plan(
        config,
        machine,
        price=args.price,
        tokens_per_sample=args.tokens_per_sample,
        probes=measured(config, machine) if args.measure else None,
    )
    print(json.dumps(found, indent=1) if args.json else "\n".join(lines(found)))
    return 1 if found["problems"] else 0


def read_plan(path: str | Path, overrides: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    """`plan` of a YAML file; `gpu` and `gpus` as on the command line."""
    config: Any = load_config(SCHEMAS[job_of(str(path))], path, overrides)
    machine = machine_of(options.pop("gpu", None), options.pop("gpus", None), config.device)
    return plan(config, machine, **options)
