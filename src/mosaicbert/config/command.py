"""`mosaicbert config show|check CONFIG`: what a YAML means, without running it."""

import argparse

from pydantic import BaseModel

from mosaicbert.config.jobs import ClassifyConfig, GlueConfig, PretrainConfig
from mosaicbert.config.load import dump_config, load_config, told_job

SCHEMAS: dict[str, type[BaseModel]] = {
    "pretrain": PretrainConfig,
    "classify": ClassifyConfig,
    "glue": GlueConfig,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("action", choices=("show", "check"), help="print it whole, or only check")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="key=value words that win over the file")
    parser.add_argument(
        "--job",
        choices=tuple(SCHEMAS),
        help="what it is for; default: told by its keys",
    )


def main(args: argparse.Namespace) -> int:
    """Check; print the whole configuration, defaults included, for `show`."""
    job = args.job or job_of(args.config)
    config = load_config(SCHEMAS[job], args.config, args.overrides)
    print(dump_config(config) if args.action == "show" else f"{args.config}: a sound {job} YAML")
    return 0


def job_of(path: str) -> str:
    """`tasks` makes it GLUE; a loader with a `dataset` section is pre-training's."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError):
        return "pretrain"  # load_config tells what is wrong with the file
    keys = content if isinstance(content, dict) else {}
    loader = keys.get("train_loader")
    lacks = isinstance(loader, dict) and "dataset" not in loader
    return told_job(keys) or ("classify" if lacks else "pretrain")
