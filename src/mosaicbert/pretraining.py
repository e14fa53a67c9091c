"""Masked-language-model pre-training: a YAML in, a checkpoint out."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mosaicbert import run
from mosaicbert.config import PretrainConfig, load_config
from mosaicbert.data.batch_size import GrowingBatch, growing_batch
from mosaicbert.data.loader import build_text_loader
from mosaicbert.data.tokenizers import load_tokenizer
from mosaicbert.duration import Duration
from mosaicbert.errors import ConfigError
from mosaicbert.launch import add_launch_arguments, launch
from mosaicbert.models.build import build_model, is_packed
from mosaicbert.models.checkpoints import load_weights
from mosaicbert.train.distributed import Ranks
from mosaicbert.train.metrics import MaskedLM
from mosaicbert.train.record import TrainResult


def pretrain(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> TrainResult:
    """Pre-train as a YAML file (or a mapping of its content) says, in this process.

    Raises:
        ConfigError, DataError, CheckpointError: for what the user can mend.
        TrainingError: the run cannot go on.
    """
    return _pretrain(load_config(PretrainConfig, source, overrides))


def _pretrain(config: PretrainConfig) -> TrainResult:
    ranks = run.start(config)
    try:
        tokenizer = load_tokenizer(config.tokenizer_name)
        with run.naming_model(config.model):
            model: Any = build_model(
                config.model,
                "mlm",
                algorithms=config.algorithms,
                max_seq_len=config.max_seq_len,
                vocab_size=len(tokenizer),
            )
        model.mlm_share = _mean_mask_rate(config)  # counts the head's FLOPs
        if config.load_weights_only and (start := run.starting_weights(config)):
            with run.naming("load_path"):
                load_weights(model, start)
        shape: dict[str, Any] = {
            "rank": ranks.rank,
            "world_size": ranks.world_size,
            "packed": is_packed(model),
            "grid": run.wants_compile(config, ranks),
        }
        train_loader = build_text_loader(
            config.train_loader,
            batch_size=_batch_size(config, ranks),
            microbatch_samples=run.microbatch_samples(config, ranks, config.max_seq_len, model),
            training=True,
            mlm_probability=config.mlm_probability,
            max_duration=Duration.parse(config.max_duration),
            subset_batches=config.train_subset_num_batches,
            **shape,
        )
        eval_loaders = {}
        if config.eval_loader is not None:
            eval_loader = build_text_loader(
                config.eval_loader,
                batch_size=config.device_eval_batch_size * ranks.world_size,
                microbatch_samples=config.device_eval_batch_size,
                training=False,
                mlm_probability=config.mlm_probability,
                subset_batches=config.eval_subset_num_batches,
                **shape,
            )
            eval_loaders["eval"] = (eval_loader, MaskedLM)
        return run.train(
            model,
            train_loader,
            eval_loaders,
            config=config,
            ranks=ranks,
            tokenizer=tokenizer,
        )
    finally:
        ranks.close()


def _mean_mask_rate(config: PretrainConfig) -> float:
    rate = config.train_loader.dataset.mlm_probability
    rate = config.mlm_probability if rate is None else rate
    return sum(rate) / len(rate) if isinstance(rate, list) else rate


def _batch_size(config: PretrainConfig, ranks: Ranks) -> int | GrowingBatch:
    """Samples of a global batch, or what tells them by the samples before it."""
    full, warmup = config.global_train_batch_size, config.batch_size_warmup
    if warmup is None:
        return full
    if warmup.start % ranks.world_size:
        raise ConfigError(
            f"batch_size_warmup.start: {warmup.start} is not divisible by the {ranks.world_size} "
            f"ranks of this run. Choose a multiple of {ranks.world_size}."
        )
    return growing_batch(warmup, full, Duration.parse(config.max_duration))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="key=value words that win over the file")
    add_launch_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Check the YAML, start the ranks there should be, train."""
    config = load_config(PretrainConfig, args.config, args.overrides)
    return launch(args, lambda: _command(config), device=config.device)


def _command(config: PretrainConfig) -> int:
    result = _pretrain(config)
    run.print_result(result, f"{config.run_name}: pre-trained")
    return 0
