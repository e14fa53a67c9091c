"""How fast a training step is: `mosaicbert bench`, and the parts of `benchmarks/throughput.py`.

The real model, backward pass and optimizer take the same step again and again, on made-up samples
that go through the real packing. Tokens are real ones, never padding or what fills a shape up.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mosaicbert import run
from mosaicbert.batch import Batch
from mosaicbert.config import PretrainConfig, TrainerConfig, load_config
from mosaicbert.data.packing import Sample, pack_samples, pad_samples
from mosaicbert.data.tokenizers import load_tokenizer
from mosaicbert.duration import Duration
from mosaicbert.errors import ConfigError
from mosaicbert.models.build import build_model, compile_model, is_packed, use_fp8
from mosaicbert.train.backward import Backward
from mosaicbert.train.distributed import Ranks, init_ranks
from mosaicbert.train.environment import describe_environment
from mosaicbert.train.hardware import find_device
from mosaicbert.train.optim import build_optimizer

FULL_SHARE = 0.7
"""Share of the samples that fill `max_seq_len`, as in C4 cut to 128 tokens."""
FIRST_WORD_ID = 1000
"""In BERT's vocabularies, what lies below is special or unused."""


def made_up_samples(
    num_samples: int,
    max_seq_len: int,
    *,
    vocab_size: int,
    mlm_probability: float,
    full_share: float = FULL_SHARE,
    seed: int = 17,
) -> list[Sample]:
    """Samples of random ids: `full_share` of them full, the others evenly from an eighth on."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(max(2, max_seq_len // 8), max_seq_len, num_samples)
    lengths[rng.random(num_samples) < full_share] = max_seq_len
    samples = []
    for length in lengths:
        ids = rng.integers(min(FIRST_WORD_ID, vocab_size // 2), vocab_size, length)
        positions = np.flatnonzero(rng.random(length) < mlm_probability)
        samples.append(Sample(ids, ids[positions], positions))
    return samples


def made_up_step(
    samples: Sequence[Sample],
    *,
    microbatch_samples: int,
    max_seq_len: int,
    packed: bool,
    grid: bool,
) -> list[Batch]:
    """One step's microbatches, in page-locked memory where there is a GPU."""
    make = pack_samples if packed else pad_samples
    batches = make(
        samples,
        max_samples=microbatch_samples,
        max_seq_len=max_seq_len,
        pad_token_id=0,
        grid=grid,
    )
    return [b.pin_memory() for b in batches] if torch.cuda.is_available() else batches


class Bench:
    """A model with its optimizer, that takes the same step again and again."""

    def __init__(
        self, model: Any, microbatches: list[Batch], config: TrainerConfig, ranks: Ranks
    ) -> None:
        """Move the model to its device; whoever made it has compiled it."""
        self.model = model.train()
        self.microbatches = microbatches
        self.num_tokens = sum(batch.num_tokens for batch in microbatches)
        self.num_samples = sum(batch.num_samples for batch in microbatches)
        self._num_targets = sum(batch.num_targets for batch in microbatches)
        model.mlm_share = self._num_targets / self.num_tokens  # counts the head's FLOPs
        self._backward = Backward(model, config, ranks)
        self._optimizer = build_optimizer(model, config.optimizer, ranks)
        self._device = ranks.device
        self._step = 0

    @property
    def num_graphs(self) -> int:
        """CUDA graphs that stand for microbatches; 0 where kernels are launched one by one."""
        return 0 if self._backward.graphs is None else len(self._backward.graphs)

    def step(self) -> Tensor:
        """Gradients and update; the mean loss, on the device."""
        loss = self._backward(self.microbatches, self._num_targets, self._step)
        self._optimizer.step()
        self._step += 1
        return loss

    def seconds(self, num_steps: int = 1) -> float:
        """Wall clock of one step, over a few without a wait between them."""
        self._wait()
        began = time.perf_counter()
        for _ in range(num_steps):
            self.step()
        self._wait()
        return (time.perf_counter() - began) / num_steps

    def peak_bytes(self) -> int | None:
        """Most memory of the GPU in a step, without what others hold; None on a CPU.

        Of a step whose kernels are launched one by one: what graphs use is never free.
        """
        if self._device.type != "cuda":
            return None
        graphs, self._backward.graphs = self._backward.graphs, None
        self.model.zero_grad()
        own = sum(t.nbytes for t in self._lasting() if t.device == self._device)
        others = torch.cuda.memory_allocated(self._device) - own
        torch.cuda.reset_peak_memory_stats(self._device)
        self.step()
        self._wait()
        self._backward.graphs = graphs
        return torch.cuda.max_memory_allocated(self._device) - others

    def rates(self, seconds: float) -> dict[str, float | None]:
        """Tokens a second and MFU where a step takes that long.

        MFU (Chowdhery et al. 2022, appendix B): the model's FLOPs for real tokens, at the mean
        length of the samples, over the device's dense bf16 peak.
        """
        tokens_per_second = self.num_tokens / seconds
        flops = self.model.flops_per_token(self.num_tokens / self.num_samples)
        peak = peak_flops(self._device)
        mfu = None if peak is None else tokens_per_second * flops / peak
        return {"tokens_per_second": tokens_per_second, "flops_per_token": flops, "mfu": mfu}

    def _lasting(self) -> list[Tensor]:
        states = [t for state in self._optimizer.state.values() for t in state.values()]
        return [*self.model.parameters(), *self.model.buffers(), *states]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None for a CPU or an unknown one."""
    if device.type != "cuda":
        return None
    known = find_device(torch.cuda.get_device_name(device))
    return known.flops if known else None


def kernel_times(bench: Bench) -> list[dict[str, Any]]:
    """Time of each kernel of one step on the GPU, longest first: `name`, `count`, `us`."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        bench.seconds()
    found = [
        {"name": event.key, "count": event.count, "us": event.self_device_time_total}
        for event in profiler.key_averages()
        if str(event.device_type).endswith("CUDA") and not event.is_user_annotation
    ]
    return sorted(found, key=lambda row: -row["us"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("config", help="YAML file of a pre-training run")
    parser.add_argument("overrides", nargs="*", help="key=value words that win over the file")
    parser.add_argument("--steps", type=int, default=10, help="steps to time (default: 10)")
    parser.add_argument("--kernels", action="store_true", help="list the GPU's longest kernels too")
    parser.add_argument("--out", type=Path, help="write what was measured as JSON")
    parser.add_argument("--json", action="store_true", help="print that JSON in place of text")


def main(args: argparse.Namespace) -> int:
    """Time the YAML's step on this machine; its data need not be there."""
    if args.steps < 1:
        raise ConfigError(f"--steps {args.steps}: there must be at least 1.")
    config = load_config(PretrainConfig, args.config, args.overrides)
    run.set_log_level(config.python_log_level)
    ranks = init_ranks(config.device, config.dist_timeout)
    bench = bench_of(config, ranks)
    began = time.perf_counter()
    for _ in range(2):
        bench.step()
    warm_up = bench.seconds() + time.perf_counter() - began
    times = [bench.seconds() for _ in range(args.steps)]
    seconds = statistics.median(times)
    peak = bench.peak_bytes()
    record: dict[str, Any] = {
        "run_name": config.run_name,
        "environment": describe_environment(),
        "samples_per_step": bench.num_samples,
        "tokens_per_step": bench.num_tokens,
        "warm_up_seconds": warm_up,
        "step_seconds": times,
        **bench.rates(seconds),
        "peak_bytes": peak,
        "cuda_graphs": bench.num_graphs,
    }
    if args.kernels and ranks.device.type == "cuda":
        record["kernels"] = kernel_times(bench)
    if args.json:
        print(json.dumps(record, indent=1))
    else:
        _print(config, record, seconds, ranks.device)
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _print(
    config: PretrainConfig, record: dict[str, Any], seconds: float, device: torch.device
) -> None:
    print(f"{config.run_name}: one step on {_device_name(device)}")
    for name, value in _lines(config, record, seconds).items():
        print(f"  {name:<18}  {value}")
    for row in record.get("kernels", [])[:20]:
        print(f"  {row['us'] / 1e3:9.2f} ms  {row['count']:5}  {row['name'][:60]}")


def bench_of(config: PretrainConfig, ranks: Ranks) -> Bench:
    """What a run of `config` would train, with a step of as many samples as it says."""
    torch.manual_seed(config.seed)
    vocab_size = len(load_tokenizer(config.tokenizer_name))
    model = build_model(
        config.model,
        "mlm",
        algorithms=config.algorithms,
        max_seq_len=config.max_seq_len,
        vocab_size=vocab_size,
    )
    own = config.train_loader.dataset.mlm_probability
    rate = config.mlm_probability if own is None else own
    samples = made_up_samples(
        config.global_train_batch_size,
        config.max_seq_len,
        vocab_size=vocab_size,
        mlm_probability=rate if isinstance(rate, float) else statistics.mean(rate),
    )
    microbatches = made_up_step(
        samples,
        microbatch_samples=run.microbatch_samples(config, ranks, config.max_seq_len, model),
        max_seq_len=config.max_seq_len,
        packed=is_packed(model),
        grid=run.wants_compile(config, ranks),
    )
    if config.precision == "fp8":
        use_fp8(model, ranks.device)
    if run.wants_compile(config, ranks):
        compile_model(model)
    return Bench(model, microbatches, config, ranks)


def _lines(config: PretrainConfig, record: dict[str, Any], seconds: float) -> dict[str, str]:
    mfu, peak = record["mfu"], record["peak_bytes"]
    lines = {
        "step": f"{seconds * 1e3:,.1f} ms, {record['samples_per_step']:,} samples",
        "tokens a second": f"{record['tokens_per_second']:,.0f}",
        "MFU": "peak of this device not known" if mfu is None else f"{mfu:.3f}",
        "peak memory": "-" if peak is None else f"{peak / 1e9:.1f} GB",
        "warm-up": f"{record['warm_up_seconds']:.1f} s",
    }
    total = Duration.parse(config.max_duration)
    batches = {"ba": total.value, "sp": total.value / config.global_train_batch_size}
    if total.unit in batches:
        hours = batches[total.unit] * seconds / 3600
        lines["whole run"] = f"{hours:,.2f} h for {config.max_duration}, on one such device"
    return lines


def _device_name(device: torch.device) -> str:
    return "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
