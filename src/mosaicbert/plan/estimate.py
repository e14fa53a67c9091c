"""The plan of one training job: memory, work, time, cost, disk; and what will not fit."""

import math
import resource
from typing import Any

from mosaicbert import run
from mosaicbert.config import PretrainConfig
from mosaicbert.duration import Duration
from mosaicbert.models.attention import KERNEL_HEAD_DIMS
from mosaicbert.models.mosaic_bert import MosaicBertPreTrainedModel
from mosaicbert.plan import memory, speed
from mosaicbert.plan.jobs import TrainingJob
from mosaicbert.plan.machine import Machine
from mosaicbert.plan.probe import Probe
from mosaicbert.plan.storage import checkpoints_kept, free_bytes
from mosaicbert.train.optim import HIDDEN_LAYERS

WITHOUT_KERNELS = ("V100", "T4")
"""Devices that are too old for the Triton kernels (compute capability below 8.0)."""
FORWARD_SHARE = 1 / 3
"""An evaluation's token against one trained on: the forward pass alone."""


def estimate(
    job: TrainingJob, machine: Machine, price: float | None = None, probe: Probe | None = None
) -> dict[str, Any]:
    """Everything about a job before it runs, as plain values; sizes in bytes.

    Args:
        price: of one GPU for an hour, in any currency.
        probe: a few steps that were measured here, in place of the table of measured speeds.
    """
    found: dict[str, Any] = {
        "run_name": job.config.run_name,
        "machine": machine.name,
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "vocab_size": job.vocab_size,
        "flops_per_token": job.model.flops_per_token(job.mean_length),
        "tokens_per_sample": job.mean_length,
        "problems": [],
        "notes": list(job.notes),
    }
    if job.data is not None:
        found["data"] = {
            "samples": job.data.samples,
            "raw_bytes": job.data.raw_bytes,
            "download_bytes": 0 if job.data.here else job.data.stored_bytes,
        }
    elif job.epoch_samples is not None:
        found["data"] = {"samples": job.epoch_samples, "download_bytes": 0}
    _work(job, found)
    _memory(job, machine, found)
    if probe is not None:
        found["measured"] = probe.to_dict()
    _time(job, machine, price, probe, found)
    _disk(job, found)
    return found


def _work(job: TrainingJob, found: dict[str, Any]) -> None:
    """Samples, steps, tokens and epochs of the whole run."""
    total, batch = Duration.parse(job.config.max_duration), job.config.global_train_batch_size
    samples: float | None = None
    limit = job.config.train_subset_num_batches
    if total.unit == "ba":
        samples = total.value * batch
    elif total.unit == "sp":
        samples = total.value
    elif total.unit == "tok":
        samples = total.value / job.mean_length
    elif total.unit == "ep" and job.epoch_samples is not None:
        loader = job.config.train_loader  # type: ignore[attr-defined]
        whole = job.epoch_samples // batch * batch if loader.drop_last else job.epoch_samples
        if limit is not None and limit >= 0:
            whole = min(whole, limit * batch)
        samples = total.value * whole
    if samples is None:
        found["notes"].append(f"Samples: not known of max_duration {total} before the run.")
        return
    found["samples"], found["steps"] = samples, math.ceil(samples / batch)
    found["tokens"] = samples * job.mean_length
    if job.epoch_samples:
        found["epochs"] = samples / job.epoch_samples


def path_of(job: TrainingJob, machine: Machine) -> memory.Path:
    """How the model will run on that machine."""
    gpu, config = machine.gpu, job.config
    precision = config.precision or ("amp_bf16" if gpu else "fp32")
    kernels = gpu is not None and not gpu.name.startswith(WITHOUT_KERNELS)
    settings = job.model.config
    head_dim = settings.hidden_size // settings.num_attention_heads
    known = head_dim in KERNEL_HEAD_DIMS or head_dim >= 16
    return memory.Path(
        kernels=kernels and isinstance(job.model, MosaicBertPreTrainedModel),
        packed_attention=kernels and known and settings.attention_probs_dropout_prob == 0,
        compiled=gpu is not None if config.compile is None else config.compile,
        activation=4 if precision == "fp32" else 2,
        mask=1 if gpu else 4,
        mixed=precision not in ("fp32", "bf16"),
    )


def _memory(job: TrainingJob, machine: Machine, found: dict[str, Any]) -> None:
    config, path = job.config, path_of(job, machine)
    layers = job.model.config.num_hidden_layers
    state = _optimizer_bytes(job, 4 if path.mixed or path.activation == 4 else 2)
    reduction = config.gradient_reduction == "bf16"
    fixed = memory.fixed_bytes(found["parameters"], state, path, machine.count, reduction)
    kept = memory.activations(job.model.config, path, job.task)
    checkpointing = config.model.gradient_checkpointing  # type: ignore[attr-defined]
    a_sample = kept.of(job.max_seq_len, job.rows(1), layers, checkpointing)
    process = 0.0 if machine.gpu else float(_own_bytes())
    reserve = memory.CONTEXT_BYTES if machine.gpu else process
    usable = (machine.memory_bytes - reserve) * memory.USABLE
    share = max(config.global_train_batch_size // machine.count, 1)
    fits = math.floor((usable - fixed.total) / a_sample)
    asked = config.device_train_microbatch_size
    device_memory = machine.memory_bytes if machine.gpu else None
    cap = run.auto_samples(job.model, config.precision, device_memory, job.max_seq_len, share)
    chosen = min(share, cap if asked == "auto" else asked)
    if asked == "auto":
        chosen = max(1, min(chosen, fits))
    found["memory"] = {
        "weights": fixed.weights,
        "gradients": fixed.gradients,
        "optimizer": fixed.optimizer,
        "activations": a_sample * chosen,
        **({"process": process} if process else {}),
        "total": fixed.total + a_sample * chosen + process,
        "available": machine.memory_bytes,
    }
    tokens = chosen * job.max_seq_len
    found["microbatch"] = {"samples": chosen, "tokens": tokens, "most": max(fits, 0)}
    if process:
        found["notes"].append(
            "Memory: libc's allocator keeps some of what is freed, so a long run on a CPU holds "
            "more; with MALLOC_MMAP_THRESHOLD_=262144 it gives that back, at some cost in speed."
        )
    _judge(job, machine, found, cap, checkpointing)


def _judge(
    job: TrainingJob, machine: Machine, found: dict[str, Any], cap: int, checkpointing: bool
) -> None:
    """What will not fit, and what to change."""
    batch, seq_len = job.config.global_train_batch_size, job.max_seq_len
    chosen, fits = found["microbatch"]["samples"], found["microbatch"]["most"]
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
    if batch % machine.count:
        below = batch // machine.count * machine.count
        found["problems"].append(
            f"global_train_batch_size {batch} does not divide by "
            f"{machine.count} GPUs. Set {below or machine.count} or {below + machine.count}."
        )
    better = min(max(batch // machine.count, 1), _round(fits), cap) if fits > 0 else 0
    if machine.gpu and 0 < chosen < better // 2:
        found["notes"].append(
            f"device_train_microbatch_size={better} fits too and is faster: fewer, larger kernels."
        )


def _round(samples: int) -> int:
    """Down to a power of two from 2, as sizes are usually chosen."""
    return int(2 ** math.floor(math.log2(samples)))


def _own_bytes() -> int:
    """Memory of this process at its peak: torch, transformers and a tokenizer, as in a run."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _optimizer_bytes(job: TrainingJob, size: int) -> float:
    """Adam keeps two moments of each parameter, Muon one of each matrix of the hidden layers."""
    moments = 0
    for name, p in job.model.named_parameters():
        is_muon = job.config.optimizer.name == "muon" and p.ndim == 2 and HIDDEN_LAYERS.search(name)
        moments += (1 if is_muon else 2) * p.numel()
    return float(moments * size)


# --- time and disk -------------------------------------------------------------------------------


def _time(
    job: TrainingJob,
    machine: Machine,
    price: float | None,
    probe: Probe | None,
    found: dict[str, Any],
) -> None:
    rate = _rate(job, machine, probe, found)
    if rate is None:
        return
    _evaluations(job, probe, rate, found)
    if "tokens" in found:
        found["seconds"] = found["tokens"] / rate
        whole = found["seconds"] + found.get("evaluation_seconds", 0.0)
        if price is not None:
            found["cost"] = whole / 3600 * price * machine.count


def _rate(
    job: TrainingJob, machine: Machine, probe: Probe | None, found: dict[str, Any]
) -> float | None:
    """Real tokens a second of all devices together; None, with a note, where nobody knows."""
    if probe is not None:
        rate = probe.tokens_per_second * machine.count
        found["speed"] = {"tokens_per_second": rate, "source": "measured here, just now"}
        return rate
    if machine.gpu is None:
        found["notes"].append("Speed of a CPU: --measure takes a few steps here and tells.")
        return None
    path, model_type = path_of(job, machine), job.model.config.model_type
    fp8 = job.config.precision == "fp8"
    row = speed.measured(model_type, path.compiled, fp8) if job.task == "mlm" else None
    row = row if path.kernels or model_type != "mosaic_bert" else None
    if row is None:
        what = "pre-training like this" if job.task == "mlm" else "fine-tuning"
        found["notes"].append(
            f"Speed: no record of {what}. On the machine itself, --measure takes a few steps."
        )
        return None
    rate = speed.tokens_per_second(row, machine.gpu, machine.count, found["flops_per_token"])
    tokens = found["microbatch"]["samples"] * job.mean_length
    found["speed"] = {"tokens_per_second": rate, "mfu": row.mfu, "source": row.where}
    width = job.model.config.hidden_size
    found["notes"] += [
        f"Speed: {text}." for text in speed.caveats(row, machine.gpu, machine.count, width, tokens)
    ]
    return rate


def _evaluations(job: TrainingJob, probe: Probe | None, rate: float, found: dict[str, Any]) -> None:
    """How many there are, and what they take together."""
    if not job.eval_samples:
        return
    samples, limit = job.eval_samples, job.config.eval_subset_num_batches
    if limit is not None and limit >= 0:
        samples = min(samples, limit * job.config.device_eval_batch_size)
    count = times(job, Duration.parse(job.config.eval_interval), found)
    if count is None:
        return
    found["evaluations"] = max(1, math.ceil(count))
    seconds = samples * job.mean_length / rate * FORWARD_SHARE
    if probe is not None and probe.eval_tokens_per_second:
        seconds = samples * job.mean_length / probe.eval_tokens_per_second
    found["evaluation_seconds"] = found["evaluations"] * seconds


def times(job: TrainingJob, interval: Duration, found: dict[str, Any]) -> float | None:
    """How often an interval fits into the run; 0 for an interval of nothing."""
    total = Duration.parse(job.config.max_duration)
    if not interval.value:
        return 0.0
    if interval.unit == "dur":
        return 1 / interval.value
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


def _disk(job: TrainingJob, found: dict[str, Any]) -> None:
    config = job.config
    weights = 4 * found["parameters"]
    found["checkpoint"] = {"bytes": weights + found["memory"]["optimizer"]}
    saves = times(job, Duration.parse(config.save_interval), found)
    kept = checkpoints_kept(config, saves) if saves is not None else 0
    if config.save_folder is None:
        found["notes"].append("No checkpoint will be written: save_folder is not set.")
    elif saves is not None:
        found["checkpoint"] |= {"saves": max(1, round(saves)), "kept": kept}
    need = found["checkpoint"]["bytes"] * (kept + 1) * bool(kept)
    _check_space("save_folder", config.save_folder, need, found)
    if isinstance(config, PretrainConfig) and job.data is not None and not job.data.here:
        folder = config.train_loader.dataset.local
        _check_space("the data's local folder", folder, job.data.raw_bytes, found)


def _check_space(what: str, folder: str | None, need: float, found: dict[str, Any]) -> None:
    free = free_bytes(folder)
    if free is not None and need > free:
        found["problems"].append(
            f"{what} ({folder}) needs {need / 1e9:.1f} GB and has {free / 1e9:.1f} GB free. Name "
            "another folder"
            + (", or lower save_num_checkpoints_to_keep." if what == "save_folder" else ".")
        )
