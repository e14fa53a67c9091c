"""`mosaicbert plan CONFIG`: what a run will need and cost, and what will not fit."""

import argparse
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch

from mosaicbert import run
from mosaicbert.config import PretrainConfig, load_config
from mosaicbert.data.tokenizers import load_tokenizer
from mosaicbert.duration import Duration
from mosaicbert.errors import ConfigError, DataError, did_you_mean
from mosaicbert.models.attention import KERNEL_HEAD_DIMS
from mosaicbert.models.build import build_model
from mosaicbert.models.mosaic_bert import MosaicBertPreTrainedModel
from mosaicbert.plan import memory, speed
from mosaicbert.plan.storage import DataSize, checkpoints_kept, data_size, free_bytes
from mosaicbert.plan.text import lines
from mosaicbert.train.hardware import DEVICES, Device, find_device
from mosaicbert.train.optim import HIDDEN_LAYERS

WITHOUT_KERNELS = ("V100", "T4")
"""Devices that are too old for the Triton kernels (compute capability below 8.0)."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the run is planned for; `gpu` is None for this machine's CPU."""

    gpu: Device | None
    count: int
    memory_bytes: float

    @property
    def name(self) -> str:
        """Shown at the top."""
        return f"{self.count} x {self.gpu.name}" if self.gpu else "this machine's CPU"


def plan(
    config: PretrainConfig,
    machine: Machine,
    *,
    price: float | None = None,
    tokens_per_sample: float | None = None,
    measured_tokens_per_second: float | None = None,
) -> dict[str, Any]:
    """Everything about a run before it runs, as plain values; sizes in bytes.

    Args:
        price: of one GPU for an hour, in any currency.
        tokens_per_sample: real tokens of a sample on average. Default: all are full.
        measured_tokens_per_second: in place of the table of measured speeds.
    """
    model, vocab_size = _model(config)
    mask_rate = _mask_rate(config)
    model.mlm_share = mask_rate
    mean_length = tokens_per_sample or float(config.max_seq_len)
    found: dict[str, Any] = {
        "run_name": config.run_name,
        "machine": machine.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocab_size": vocab_size,
        "flops_per_token": model.flops_per_token(mean_length),
        "problems": [],
        "notes": [],
    }
    data = _data(config, found)
    _work(config, data, mean_length, found)
    _memory(config, machine, model, mask_rate, found)
    _time(config, machine, model, mean_length, price, measured_tokens_per_second, found)
    _disk(config, model, data, found)
    return found


# --- parts ---------------------------------------------------------------------------------------


def _model(config: PretrainConfig) -> tuple[Any, int]:
    """The model without weights, and the number of the tokenizer's tokens."""
    vocab_size = len(load_tokenizer(config.tokenizer_name))
    shape = config.model.model_copy(update={"use_pretrained": False, "pretrained_checkpoint": None})
    with torch.device("meta"):
        model = build_model(
            shape,
            "mlm",
            algorithms=config.algorithms,
            max_seq_len=config.max_seq_len,
            vocab_size=vocab_size,
        )
    return model, vocab_size


def _mask_rate(config: PretrainConfig) -> float:
    own = config.train_loader.dataset.mlm_probability
    rate = config.mlm_probability if own is None else own
    return statistics.fmean(rate) if isinstance(rate, list) else rate


def _data(config: PretrainConfig, found: dict[str, Any]) -> DataSize | None:
    try:
        data = data_size(config.train_loader.dataset)
    except DataError as error:
        found["notes"].append(f"Training data: {str(error).rstrip('.')}.")
        return None
    found["data"] = {
        "samples": data.samples,
        "raw_bytes": data.raw_bytes,
        "download_bytes": 0 if data.here else data.stored_bytes,
    }
    return data


def _work(
    config: PretrainConfig, data: DataSize | None, mean_length: float, found: dict[str, Any]
) -> None:
    """Samples, steps, tokens and epochs of the whole run."""
    total, batch = Duration.parse(config.max_duration), config.global_train_batch_size
    samples: float | None = None
    if total.unit == "ba":
        samples = total.value * batch
    elif total.unit == "sp":
        samples = total.value
    elif total.unit == "tok":
        samples = total.value / mean_length
    elif total.unit == "ep" and data is not None:
        samples = total.value * (data.samples // batch * batch)
    if samples is None:
        found["notes"].append(f"Samples: not known of max_duration {total} before the run.")
        return
    found["samples"], found["steps"] = samples, math.ceil(samples / batch)
    found["tokens"] = samples * mean_length
    if data is not None:
        found["epochs"] = samples / data.samples


def _path(config: PretrainConfig, machine: Machine, model: Any) -> memory.Path:
    """How the model will run on that machine."""
    gpu = machine.gpu
    precision = config.precision or ("amp_bf16" if gpu else "fp32")
    kernels = gpu is not None and not gpu.name.startswith(WITHOUT_KERNELS)
    settings = model.config
    head_dim = settings.hidden_size // settings.num_attention_heads
    known = head_dim in KERNEL_HEAD_DIMS or head_dim >= 16
    return memory.Path(
        kernels=kernels and isinstance(model, MosaicBertPreTrainedModel),
        packed_attention=kernels and known and settings.attention_probs_dropout_prob == 0,
        compiled=gpu is not None if config.compile is None else config.compile,
        activation=4 if precision == "fp32" else 2,
        mask=1 if gpu else 4,
        mixed=precision not in ("fp32", "bf16"),
    )


def _memory(
    config: PretrainConfig, machine: Machine, model: Any, mask_rate: float, found: dict[str, Any]
) -> None:
    path = _path(config, machine, model)
    layers = model.config.num_hidden_layers
    state = _optimizer_bytes(config, model, 4 if path.mixed or path.activation == 4 else 2)
    reduction = config.gradient_reduction == "bf16"
    fixed = memory.fixed_bytes(found["parameters"], state, path, machine.count, reduction)
    kept = memory.activations(model.config, path)
    checkpointing = config.model.gradient_checkpointing
    seq_len = config.max_seq_len
    a_sample = kept.of(seq_len, seq_len * mask_rate, layers, checkpointing)
    reserve = memory.CONTEXT_BYTES if machine.gpu else 0.0
    usable = (machine.memory_bytes - reserve) * memory.USABLE
    share = max(config.global_train_batch_size // machine.count, 1)
    fits = math.floor((usable - fixed.total) / a_sample)
    asked = config.device_train_microbatch_size
    cap = run.AUTO_MICROBATCH_TOKENS["cuda" if machine.gpu else "cpu"] // seq_len
    chosen = min(share, max(cap, 1) if asked == "auto" else asked)
    if asked == "auto":
        chosen = max(1, min(chosen, fits))
    found["memory"] = {
        "weights": fixed.weights,
        "gradients": fixed.gradients,
        "optimizer": fixed.optimizer,
        "activations": a_sample * chosen,
        "total": fixed.total + a_sample * chosen,
        "available": machine.memory_bytes,
    }
    found["microbatch"] = {"samples": chosen, "tokens": chosen * seq_len, "most": max(fits, 0)}
    if fits < 1:
        found["problems"].append(
            f"Not even one sample of {seq_len} tokens fits into {machine.memory_bytes / 1e9:.0f} "
            "GB. Use a larger GPU, a smaller model, or shorter sequences"
            + ("." if checkpointing else ", or set model.gradient_checkpointing: true.")
        )
    elif chosen > fits:
        found["problems"].append(
            f"A microbatch of {chosen} samples does not fit. Set "
            f"device_train_microbatch_size={_round(fits)}, or auto."
        )
    if config.global_train_batch_size % machine.count:
        below = config.global_train_batch_size // machine.count * machine.count
        found["problems"].append(
            f"global_train_batch_size {config.global_train_batch_size} does not divide by "
            f"{machine.count} GPUs. Set {below or machine.count} or {below + machine.count}."
        )
    better = min(share, _round(fits), max(cap, 1)) if fits > 0 else 0
    if machine.gpu and 0 < chosen < better // 2:
        found["notes"].append(
            f"device_train_microbatch_size={better} fits too and is faster: fewer, larger kernels."
        )


def _round(samples: int) -> int:
    """Down to a power of two from 2, as sizes are usually chosen."""
    return int(2 ** math.floor(math.log2(samples)))


def _optimizer_bytes(config: PretrainConfig, model: Any, size: int) -> float:
    """Adam keeps two moments of each parameter, Muon one of each matrix of the hidden layers."""
    moments = 0
    for name, p in model.named_parameters():
        is_muon = config.optimizer.name == "muon" and p.ndim == 2 and HIDDEN_LAYERS.search(name)
        moments += (1 if is_muon else 2) * p.numel()
    return float(moments * size)


def _time(
    config: PretrainConfig,
    machine: Machine,
    model: Any,
    mean_length: float,
    price: float | None,
    rate: float | None,
    found: dict[str, Any],
) -> None:
    if rate is not None:
        found["speed"] = {"tokens_per_second": rate, "source": "measured here, just now"}
    elif machine.gpu is not None:
        path = _path(config, machine, model)
        row = speed.measured(model.config.model_type, path.compiled)
        row = row if path.kernels or model.config.model_type != "mosaic_bert" else None
        if row is None:
            found["notes"].append("Speed: nothing like this was measured; see mosaicbert bench.")
            return
        rate = speed.tokens_per_second(row, machine.gpu, machine.count, found["flops_per_token"])
        tokens = found["microbatch"]["samples"] * mean_length
        width = model.config.hidden_size
        found["speed"] = {"tokens_per_second": rate, "mfu": row.mfu, "source": row.where}
        found["notes"] += [
            f"Speed: {text}."
            for text in speed.caveats(row, machine.gpu, machine.count, width, tokens)
        ]
    else:
        found["notes"].append("Speed of a CPU: --measure takes a few steps here and tells.")
        return
    if "tokens" in found:
        found["seconds"] = found["tokens"] / rate
        if price is not None:
            found["cost"] = found["seconds"] / 3600 * price * machine.count


def _disk(config: PretrainConfig, model: Any, data: DataSize | None, found: dict[str, Any]) -> None:
    weights = 4 * found["parameters"]
    found["checkpoint"] = {"bytes": weights + found["memory"]["optimizer"]}
    interval = Duration.parse(config.save_interval)
    saves = _times(interval, config, found)
    kept = checkpoints_kept(config, saves) if saves is not None else 0
    if config.save_folder is None:
        found["notes"].append("No checkpoint will be written: save_folder is not set.")
    elif saves is not None:
        found["checkpoint"] |= {"saves": max(1, round(saves)), "kept": kept}
    need = found["checkpoint"]["bytes"] * (kept + 1) * bool(kept)
    _check_space("save_folder", config.save_folder, need, found)
    if data is not None and not data.here:
        _check_space(
            "the data's local folder", config.train_loader.dataset.local, data.raw_bytes, found
        )


def _times(interval: Duration, config: PretrainConfig, found: dict[str, Any]) -> float | None:
    """How often an interval fits into the run."""
    total = Duration.parse(config.max_duration)
    if interval.unit == "dur":
        return 1 / interval.value if interval.value else 0.0
    if interval.unit == total.unit:
        return total.value / interval.value
    counts = {
        "ba": found.get("steps"),
        "sp": found.get("samples"),
        "tok": found.get("tokens"),
        "ep": found.get("epochs"),
        "sec": found.get("seconds"),
    }
    whole = counts[interval.unit]
    return None if whole is None else float(whole) / interval.value


def _check_space(what: str, folder: str | None, need: float, found: dict[str, Any]) -> None:
    free = free_bytes(folder)
    if free is not None and need > free:
        found["problems"].append(
            f"{what} ({folder}) needs {need / 1e9:.1f} GB and has {free / 1e9:.1f} GB free. Name "
            "another folder"
            + (", or lower save_num_checkpoints_to_keep." if what == "save_folder" else ".")
        )


# --- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("config", help="YAML file of a pre-training run")
    parser.add_argument("overrides", nargs="*", help="key=value words that win over the file")
    parser.add_argument("--gpus", type=int, help="how many GPUs (default: those here, or 1)")
    parser.add_argument("--gpu", help="which, such as h100 or a100 (default: the one here)")
    parser.add_argument("--price", type=float, help="price of one GPU for an hour")
    parser.add_argument("--tokens-per-sample", type=float, help="mean length (default: all full)")
    parser.add_argument("--measure", action="store_true", help="time a few steps on this machine")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Print the plan; exit code 1 where the run would not fit."""
    config = load_config(PretrainConfig, args.config, args.overrides)
    machine = machine_of(args.gpu, args.gpus)
    rate = _measure(config, machine) if args.measure else None
    found = plan(
        config,
        machine,
        price=args.price,
        tokens_per_sample=args.tokens_per_sample,
        measured_tokens_per_second=rate,
    )
    print(json.dumps(found, indent=1) if args.json else "\n".join(lines(found)))
    return 1 if found["problems"] else 0


def machine_of(gpu: str | None, count: int | None) -> Machine:
    """The machine that the words name, else this one.

    Raises:
        ConfigError: there is no such GPU in the table, or no such number of them.
    """
    if count is not None and count < 1:
        raise ConfigError(f"--gpus {count}: there must be at least one.")
    if gpu is None and not torch.cuda.is_available():
        if count is not None:
            raise ConfigError("--gpus: there is no GPU here; name the kind too, as in --gpu h100.")
        return Machine(None, 1, float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    name = gpu or torch.cuda.get_device_name(0)
    known = find_device(name)
    if known is None:
        names = [device.name for device in DEVICES]
        near = did_you_mean(name.upper(), {n.split()[0] for n in names})
        raise ConfigError(f"--gpu {name}: not known.{near} There are: {', '.join(names)}.")
    here = gpu is None
    memory_bytes = float(torch.cuda.mem_get_info()[1]) if here else known.memory
    return Machine(known, count or (torch.cuda.device_count() if here else 1), memory_bytes)


def _measure(config: PretrainConfig, machine: Machine) -> float:
    """Real tokens a second of a few steps here, times the machine's GPUs."""
    from mosaicbert.bench import bench_of
    from mosaicbert.train.distributed import init_ranks

    ranks = init_ranks("cpu" if machine.gpu is None else config.device, config.dist_timeout)
    bench = bench_of(config, ranks)
    bench.step()
    bench.step()
    rate = bench.num_tokens / statistics.median(bench.seconds() for _ in range(3))
    return rate * machine.count


def read_plan(
    path: str | FilePath, overrides: Sequence[str] = (), **options: Any
) -> dict[str, Any]:
    """`plan` of a YAML file; `gpu` and `gpus` as on the command line."""
    config = load_config(PretrainConfig, path, overrides)
    machine = machine_of(options.pop("gpu", None), options.pop("gpus", None))
    return plan(config, machine, **options)
