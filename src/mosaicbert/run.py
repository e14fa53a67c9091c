"""What pre-training and fine-tuning share: device, microbatch, run folder, monitors, trainer."""

import gc
import logging
import math
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from mosaicbert.batch import Loader
from mosaicbert.config import ModelConfig, TrainerConfig
from mosaicbert.duration import Duration
from mosaicbert.errors import CheckpointError, ConfigError
from mosaicbert.models.build import compile_model, is_packed, use_fp8
from mosaicbert.redaction import RedactingFormatter, redact_text
from mosaicbert.report import report_at_end
from mosaicbert.train.best import Best
from mosaicbert.train.console import build_console
from mosaicbert.train.distributed import Ranks, init_ranks
from mosaicbert.train.loggers import build_loggers
from mosaicbert.train.metrics import MetricFactory
from mosaicbert.train.monitors import build_monitors
from mosaicbert.train.record import Logger, TrainResult
from mosaicbert.train.store import SaveFolder
from mosaicbert.train.trainer import Trainer

GRAPH_MULTIPLE = 16
"""Padded batches that run as CUDA graphs are so many tokens long, or a multiple of it."""
AUTO_BYTES = {"packed": 71.0, "padded": 105.0}
"""Memory that `device_train_microbatch_size: auto` reckons with for each token, layer and unit of
width in 16 bits, with CUDA graphs: 45 GB for 65,536 tokens of Mosaic BERT base
(`2026-11-26-out-of-memory-h200.json`), and twice the 32 GB of HF BERT base without."""
AUTO_STATE_BYTES = 18.0
"""The same for each parameter: weight, gradient, two moments, and a copy in 16 bits."""
AUTO_SHARE = 0.85
"""Of a GPU's memory; the rest is for what lies in pieces, and for evaluations."""
LEAST_AUTO_TOKENS, MOST_AUTO_TOKENS = 2_048, 131_072
AUTO_CPU_TOKENS = 8_192


def start(config: TrainerConfig) -> Ranks:
    """Set logging up, join the other ranks, check what depends on them, and seed."""
    set_log_level(config.python_log_level)
    # After a run in this process: compiled models end in cycles of references.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gc.collect()
        torch.cuda.empty_cache()
    ranks = init_ranks(config.device, config.dist_timeout)
    if config.global_train_batch_size % ranks.world_size:
        raise ConfigError(
            f"global_train_batch_size: {config.global_train_batch_size} is not divisible by the "
            f"{ranks.world_size} ranks of this run. Choose a multiple of {ranks.world_size}."
        )
    _seed(config.seed)
    return ranks


def _seed(seed: int) -> None:
    """Seed every global generator; transformers' function takes seconds to import."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def starting_weights(config: TrainerConfig) -> str | None:
    """`load_path`, whose weights to start from; None where `autoresume` has more to go on from."""
    if config.load_path is None:
        return None
    if config.autoresume and config.save_folder is not None:
        folder = SaveFolder(config.save_folder.replace("{run_name}", config.run_name))
        if folder.newest() is not None:
            return None
    return config.load_path.replace("{run_name}", config.run_name)


def set_log_level(level: str | None) -> None:
    """Show this package's log lines from `level` (default: info) on, on stderr."""
    name = (level or "info").upper()
    if name not in logging.getLevelNamesMapping():
        raise ConfigError(
            f"python_log_level: {level!r} is not allowed: must be debug, info, warning or error."
        )
    logger = logging.getLogger("mosaicbert")
    logger.setLevel(name)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(RedactingFormatter("%(message)s"))
        logger.addHandler(handler)


def wants_compile(config: TrainerConfig, ranks: Ranks) -> bool:
    """Whether to use torch.compile: as configured, else on a GPU."""
    return ranks.device.type == "cuda" if config.compile is None else config.compile


def wants_graphs(config: TrainerConfig, ranks: Ranks, packed: bool) -> bool:
    """Whether to run microbatches as CUDA graphs: as configured, else where shapes are few.

    That is on a single GPU, with torch.compile or with padded batches, whose lengths are then
    rounded up to `GRAPH_MULTIPLE`.
    """
    if config.cuda_graphs is not None:
        return config.cuda_graphs
    able = ranks.device.type == "cuda" and ranks.world_size == 1
    return able and (wants_compile(config, ranks) or not packed)


def auto_samples(
    model: nn.Module,
    precision: str | None,
    gpu_memory_bytes: float | None,
    max_seq_len: int,
    share: int,
) -> int:
    """Samples of the first microbatch of `auto`: the most that should fit; None: on a CPU.

    A multiple of 8, from 8 on; no more than the device's `share` of a batch. Padded microbatches
    are filled up to their size, so they cut it into equal parts. Where it is too many after all,
    the trainer halves them.
    """
    samples = max(_auto_tokens(model, precision, gpu_memory_bytes) // max_seq_len, 1)
    samples = min(share, samples if samples < 8 else samples // 8 * 8)
    return samples if is_packed(model) else math.ceil(share / math.ceil(share / samples))


def _auto_tokens(model: nn.Module, precision: str | None, gpu_memory_bytes: float | None) -> int:
    if gpu_memory_bytes is None:
        return AUTO_CPU_TOKENS
    settings: Any = model.config
    units = settings.num_hidden_layers * settings.hidden_size
    bytes_a_unit = AUTO_BYTES["packed" if is_packed(model) else "padded"]
    state = AUTO_STATE_BYTES * sum(p.numel() for p in model.parameters())
    free = AUTO_SHARE * gpu_memory_bytes - state
    tokens = int(free / (units * bytes_a_unit * (2 if precision == "fp32" else 1)))
    return min(max(tokens, LEAST_AUTO_TOKENS), MOST_AUTO_TOKENS)


def microbatch_samples(
    config: TrainerConfig, ranks: Ranks, max_seq_len: int, model: nn.Module
) -> int:
    """Samples of full length that one device takes at a time."""
    share = config.global_train_batch_size // ranks.world_size
    if config.device_train_microbatch_size == "auto":
        memory = None
        if ranks.device.type == "cuda":
            memory = torch.cuda.get_device_properties(ranks.device).total_memory
        return auto_samples(model, config.precision, memory, max_seq_len, share)
    return min(share, config.device_train_microbatch_size)


def train(
    model: nn.Module,
    train_loader: Loader,
    eval_loaders: Mapping[str, tuple[Loader, MetricFactory]],
    *,
    config: TrainerConfig,
    ranks: Ranks,
    tokenizer: PreTrainedTokenizerBase,
    more_loggers: Sequence[Logger] = (),
    best: Best | None = None,
) -> TrainResult:
    """Train `model` as `config` says; everything but the model and the data is made here."""
    trained: Any = model
    if config.precision == "fp8":
        use_fp8(model, ranks.device)
    if wants_compile(config, ranks):
        compile_model(model)
    total = Duration.parse(config.max_duration)
    monitors = build_monitors(
        config.callbacks,
        flops_per_token=trained.flops_per_token,
        world_size=ranks.world_size,
        device=ranks.device,
        total=total,
    )
    trainer = Trainer(
        model,
        train_loader,
        eval_loaders,
        config=config,
        ranks=ranks,
        loggers=[*_loggers(config, total, train_loader, ranks), *more_loggers],
        monitors=monitors,
        write_assets=_asset_writer(trained, tokenizer),
        best=best,
    )
    try:
        return trainer.fit()
    finally:
        trainer.backward.release()
        if ranks.is_first and trainer.has_started:
            report_at_end(_run_folder(config))


def _run_folder(config: TrainerConfig) -> str | None:
    return config.run_folder and config.run_folder.replace("{run_name}", config.run_name)


def _loggers(
    config: TrainerConfig, total: Duration, train_loader: Loader, ranks: Ranks
) -> list[Logger]:
    folder = _run_folder(config)
    values = config.model_dump(mode="json", by_alias=True)
    loggers = build_loggers(config.loggers, folder, config.run_name, values, ranks.rank)
    batches, limit = train_loader.steps_in_epoch(0), config.train_subset_num_batches
    if limit is not None and limit >= 0:
        batches = min(batches, limit)
    console = build_console(config, total, rank=ranks.rank, batches_per_epoch=batches)
    return loggers if console is None else [*loggers, console]


def _asset_writer(model: Any, tokenizer: PreTrainedTokenizerBase) -> Callable[[Path], None]:
    """Writes what makes a checkpoint's folder one that Hugging Face's classes load."""

    def write(folder: Path) -> None:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return write


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Puts the key that named a checkpoint before what is wrong with it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error


@contextmanager
def naming_model(settings: ModelConfig) -> Iterator[None]:
    """The same for what `build_model` reads, and for values of the wrong kind in its shape."""
    named = "pretrained_checkpoint" if settings.pretrained_checkpoint else "use_pretrained"
    try:
        with naming(f"model.{named}"):
            yield
    except ConfigError as error:
        found = _WRONG_KIND.findall(str(error))
        if not found:
            raise
        key, _, value = found[0]
        kinds = " or ".join("null" if kind == "NoneType" else kind for _, kind, _ in found)
        raise ConfigError(
            f"model.model_config.{key}: {value} is not allowed: must be of the kind {kinds}."
        ) from None


_WRONG_KIND = re.compile(r"Field '(\w+)' expected (\w+), got \w+ \(value: (.*?)\)(?:; |$)")
"""What transformers says of a configuration's value, once for each kind that it may have."""


def print_result(result: TrainResult, title: str) -> None:
    """The last lines of a run: what it reached and where it lies."""
    rows: dict[str, Any] = {
        "loss/train": "- (no step was left to take: max_duration is reached)"
        if math.isnan(result.train_loss)
        else f"{result.train_loss:.4f}",
        **{name: f"{value:.4f}" for name, value in sorted(result.metrics.items())},
    }
    if not math.isnan(result.tokens_per_second):
        rows["tokens a second"] = f"{result.tokens_per_second:,.0f}"
    rows["seconds"] = f"{result.seconds:.1f}"
    if result.checkpoint:
        rows["checkpoint"] = redact_text(result.checkpoint)
    width = max(map(len, rows))
    print(title)
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")
