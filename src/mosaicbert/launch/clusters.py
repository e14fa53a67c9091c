"""`mosaicbert launch`: a file for Slurm, Kubernetes or SkyPilot from a training YAML.

Reads the job's own YAML, or the original's `mcloud_run*.yaml`: `name image compute integrations
command parameters`, with the job's YAML under `parameters`. The file carries the whole
configuration, so it is all that has to be handed in.
"""

import argparse
import logging
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from mosaicbert.config import ClassifyConfig, GlueConfig, PretrainConfig, load_config
from mosaicbert.errors import ConfigError, did_you_mean
from mosaicbert.launch.cluster_files import RENDERERS, ClusterJob

log = logging.getLogger(__name__)

CLOUD_KEYS = {
    "name",
    "run_name",
    "image",
    "compute",
    "gpu_num",
    "gpu_type",
    "cluster",
    "integrations",
    "env_variables",
    "command",
    "parameters",
}
COMPUTE_KEYS = {"gpus", "gpu_type", "cluster"}
SCRIPTS = {"main.py": "pretrain", "sequence_classification.py": "classify", "glue.py": "glue"}
GPUS_PER_NODE = 8


@dataclass(slots=True)
class CloudRun:
    """A job as a YAML describes it, before it is checked."""

    text: str
    """The job's own YAML."""
    values: dict[str, Any]
    name: str | None = None
    gpus: int | None = None
    """On all machines together."""
    gpu_type: str | None = None
    environ: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    preparation: list[str] = field(default_factory=list)
    """Commands before the job, one a line."""
    left_out: list[str] = field(default_factory=list)
    """What the file said and nothing here stands for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("config", help="YAML file of a job, or one of the form mcloud_run*.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value words that win over the file")
    parser.add_argument("--to", required=True, choices=sorted(RENDERERS), help="what to write for")
    parser.add_argument("--nodes", type=int, help="machines (default: 1, or as the file says)")
    parser.add_argument("--gpus", type=int, help="GPUs a machine (default: 8, or as it says)")
    parser.add_argument("--gpu_type", help="SkyPilot: such as H100 or A100-80GB")
    parser.add_argument("--name", help="name of the job (default: the run's)")
    parser.add_argument("--image", help="container image with mosaicbert in it")
    parser.add_argument("--time", default="24:00:00", help="Slurm: time limit (24:00:00)")
    parser.add_argument("--partition", help="Slurm: partition")
    parser.add_argument("--account", help="Slurm: account")
    parser.add_argument("--cpus", type=int, default=8, help="CPU cores a GPU (8)")
    parser.add_argument("--volume", help="Kubernetes: CLAIM:/path, a volume claim for data")
    parser.add_argument("--secret", help="Kubernetes: secret whose keys become variables")
    parser.add_argument("--env", action="append", default=[], help="NAME=VALUE for every process")
    parser.add_argument("--out", help="file to write (default: standard output)")


def main(args: argparse.Namespace) -> int:
    """Render the file."""
    text = render(args)
    if args.out is None:
        sys.stdout.write(text)
    else:
        Path(args.out).write_text(text, encoding="utf-8")
        print(f"{args.out}: hand it in with {RENDERERS[args.to].command.format(file=args.out)}")
    return 0


def render(args: argparse.Namespace) -> str:
    """The text of the cluster file.

    Raises:
        ConfigError: the YAML or an argument is wrong, or they do not fit together.
    """
    run = read_run(Path(args.config))
    overrides = [*run.overrides, *args.overrides]
    command, schema = kind_of(run.values)
    config = load_config(schema, run.values, overrides)
    nodes, gpus = _machines(args, run)
    _check(config, nodes, gpus, args.config)
    if _goes_on(config) and not any(word.startswith("autoresume=") for word in overrides):
        overrides.append("autoresume=true")
    for line in run.left_out:
        log.warning("%s: not carried over: %s", args.config, line)
    job = ClusterJob(
        command=["mosaicbert", command, "{config}", *overrides],
        config=run.text,
        name=_valid_name(args.name or run.name or _run_name(config)),
        nodes=nodes,
        gpus=gpus,
        gpu_type=args.gpu_type or run.gpu_type,
        image=args.image,
        environ=run.environ | dict(_variable(word) for word in args.env),
        preparation=run.preparation,
        left_out=run.left_out,
        cpus=args.cpus,
        time=args.time,
        partition=args.partition,
        account=args.account,
        volume=args.volume,
        secret=args.secret,
    )
    return RENDERERS[args.to].render(job)


def kind_of(values: Mapping[str, Any]) -> tuple[str, type[BaseModel]]:
    """The command that a job's YAML is for, and its schema."""
    if "tasks" in values:
        return "glue", GlueConfig
    loader = values.get("train_loader")
    if isinstance(loader, Mapping) and "split" in loader:
        return "classify", ClassifyConfig
    return "pretrain", PretrainConfig


def _check(config: BaseModel, nodes: int, gpus: int, where: str) -> None:
    if isinstance(config, GlueConfig):
        if nodes > 1:
            raise ConfigError(f"{where}: GLUE's jobs share one machine. Use --nodes 1.")
        return
    assert isinstance(config, PretrainConfig | ClassifyConfig)
    batch, world_size = config.global_train_batch_size, nodes * gpus
    if batch % world_size:
        raise ConfigError(
            f"{where}: global_train_batch_size: {batch} is not divisible by the {world_size} ranks "
            f"of {nodes} x {gpus} GPUs. Choose a multiple of {world_size}."
        )
    if config.save_folder is None:
        log.warning("%s: no save_folder: a job that is restarted begins anew.", where)


def _goes_on(config: BaseModel) -> bool:
    """Whether a restarted job can go on from its checkpoints."""
    return getattr(config, "save_folder", None) is not None


def _run_name(config: BaseModel) -> str:
    name = getattr(config, "run_name", None) or getattr(config, "base_run_name", None)
    return str(name)


def _valid_name(name: str) -> str:
    """A name that Kubernetes takes: lower case, digits and hyphens, 40 of them at most."""
    valid = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    if not valid:
        raise ConfigError(f"--name: {name!r} has no letter or digit that a job's name may have.")
    return valid


def _machines(args: argparse.Namespace, run: CloudRun) -> tuple[int, int]:
    for flag in ("nodes", "gpus"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ConfigError(f"--{flag} {getattr(args, flag)}: there must be at least 1.")
    gpus = args.gpus or min(run.gpus or GPUS_PER_NODE, GPUS_PER_NODE)
    if args.nodes or run.gpus is None:
        return args.nodes or 1, gpus
    if run.gpus % gpus:
        raise ConfigError(f"compute.gpus: {run.gpus} is no multiple of {gpus} GPUs a machine.")
    return run.gpus // gpus, gpus


def _variable(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"--env {word}: write NAME=VALUE.")
    return name, value


# --- reading -------------------------------------------------------------------------------------


def read_run(path: Path) -> CloudRun:
    """A job's YAML, or that of a cloud run around it.

    Raises:
        ConfigError: the file cannot be read, or a key of a cloud run is unknown.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path} cannot be read ({what}). Name the YAML of a job.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is no YAML of a job: it must hold keys and values.")
    if "parameters" not in values:
        return CloudRun(text, values)
    return _read_cloud_run(values, path)


def _read_cloud_run(values: dict[str, Any], path: Path) -> CloudRun:
    compute = values.get("compute") or {}
    for key, known, where in [
        *((key, CLOUD_KEYS, "") for key in values),
        *((key, COMPUTE_KEYS, "compute.") for key in compute),
    ]:
        if key not in known:
            raise ConfigError(
                f"{path}: {where}{key}: unknown key.{did_you_mean(key, known)} "
                f"There are: {', '.join(sorted(known))}."
            )
    name = values.get("name") or values.get("run_name")
    parameters = dict(values["parameters"] or {})
    name_key = "base_run_name" if "tasks" in parameters else "run_name"
    if parameters.get(name_key) is None and name:
        parameters[name_key] = name
    gpus = compute.get("gpus") or values.get("gpu_num")
    run = CloudRun(
        text=yaml.safe_dump(parameters, sort_keys=False, allow_unicode=True),
        values=parameters,
        name=name,
        gpus=int(gpus) if gpus else None,
        gpu_type=_gpu_name(compute.get("gpu_type") or values.get("gpu_type")),
        environ=_environ(values.get("env_variables")),
    )
    if image := values.get("image"):
        run.left_out.append(f"image: {image} (name one with mosaicbert in it by --image)")
    for integration in values.get("integrations") or []:
        words = " ".join(f"{key}={value}" for key, value in integration.items())
        run.left_out.append(f"integration: {words}")
    _read_commands(str(values.get("command") or ""), run)
    return run


def _read_commands(script: str, run: CloudRun) -> None:
    """The original's commands in ours: its three scripts, and the conversion before them."""
    for line in script.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # such as a quote that ends on another line
            run.left_out.append(f"command: {line.strip()}")
            continue
        scripts = [word for word in words if Path(word).name in SCRIPTS]
        converters = [word for word in words if Path(word).name == "convert_dataset.py"]
        if scripts:
            at = words.index(scripts[0])
            run.overrides += _assignments(words[at:])
            for word in _assignments(words[:at]):
                name = word.partition("=")[0]
                run.left_out.append(f"variable of the command: {name} (give it by --env)")
        elif converters:
            flags = words[words.index(converters[0]) + 1 :]
            run.preparation.append(shlex.join(["mosaicbert", "convert", *flags]))
        elif words and words[0] != "cd":
            run.left_out.append(f"command: {shlex.join(words)}")


def _assignments(words: list[str]) -> list[str]:
    return [word for word in words if "=" in word and not word.startswith("-")]


def _environ(variables: Any) -> dict[str, str]:
    """`{NAME: value}`, or a list of `{key: NAME, value: value}`."""
    if isinstance(variables, list):
        return {str(each["key"]): str(each["value"]) for each in variables}
    return {str(name): str(value) for name, value in (variables or {}).items()}


def _gpu_name(name: str | None) -> str | None:
    """`a100_80gb` as SkyPilot calls it: `A100-80GB`."""
    if name is None:
        return None
    known = {"A100-40GB": "A100", "H100-80GB": "H100"}
    upper = name.upper().replace("_", "-")
    return known.get(upper, upper)
