"""The gradients of one optimizer step: microbatches, precision, ranks, and too little memory."""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mosaicbert.batch import Batch, LossOutput, Trainable
from mosaicbert.config.jobs import TrainerConfig
from mosaicbert.errors import ConfigError, TrainingError
from mosaicbert.train.distributed import Ranks
from mosaicbert.train.graphs import MicrobatchGraphs
from mosaicbert.train.reducer import GradientReducer
from mosaicbert.train.split import split_batch

log = logging.getLogger(__name__)

FP8_LOSS_SCALE = 256.0
"""`fp8`: of a summed loss. Gradients of activations then fit into float8_e5m2, whatever the number
of targets: from some hundredths where the loss is high to 1e-7, the least that it can hold."""


class Backward:
    """Called with a step's microbatches, leaves the gradients of its mean loss in `.grad`.

    The mean is over all targets of all ranks. `precision`: `fp32`; `amp_bf16` and `amp_fp16`
    (autocast; the latter with a loss scale); `fp8` (autocast to bf16; what else it takes, the model
    does); `bf16` (weights and all in bfloat16).
    """

    def __init__(self, model: nn.Module, config: TrainerConfig, ranks: Ranks) -> None:
        """Move the model to its device and type."""
        is_gpu = ranks.device.type == "cuda"
        self.precision = config.precision or ("amp_bf16" if is_gpu else "fp32")
        if ranks.is_first and not is_gpu:
            _warn_of_slow_numbers(self.precision)
        self.model = model.to(ranks.device)
        if self.precision == "bf16":
            self.model.to(torch.bfloat16)
        self.ranks = ranks
        self.seed = config.seed
        self.may_split = config.device_train_microbatch_size == "auto"
        self.grid = is_gpu if config.compile is None else config.compile
        self.num_parts = 1
        """Parts to cut each microbatch into, since memory ran out."""
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.precision == "amp_fp16")
        params = [p for p in model.parameters() if p.requires_grad]
        bf16 = torch.bfloat16 if config.gradient_reduction == "bf16" else None
        self.reducer = GradientReducer(params, ranks, bf16)
        self.graphs: MicrobatchGraphs | None = None
        if _wants_graphs(config, ranks):
            self.graphs = MicrobatchGraphs(self._take, params, ranks.device)

    def forward(self, batch: Batch, return_logits: bool = False) -> LossOutput:
        """The model's summed loss of a batch that is on the device already."""
        with self._autocast():
            return cast(Trainable, self.model).loss(batch, return_logits)

    def __call__(self, microbatches: list[Batch], num_targets: int, batch_number: int) -> Tensor:
        """Gradients and mean loss (a scalar on the device) over all ranks.

        With `device_train_microbatch_size: auto`, when one rank runs out of memory, all ranks take
        the step anew with each microbatch in twice as many parts.

        Args:
            microbatches: this rank's share, on the host; maybe none.
            num_targets: of all ranks.
            batch_number: number of the step in the run, for the seed of dropout.
        """
        while True:
            parts = [
                part
                for batch in microbatches
                for part in split_batch(batch, self.num_parts, grid=self.grid)
            ]
            (self.model if self.graphs is None else self.graphs).zero_grad()
            self._seed_dropout(batch_number)
            loss = torch.zeros((), device=self.ranks.device)
            out_of_memory = False
            try:
                self._accumulate(parts, num_targets, loss)
            except torch.OutOfMemoryError as error:
                if self._give_up_graphs(batch_number):
                    continue
                if not self.may_split:
                    raise TrainingError(
                        f"Out of memory at batch {batch_number}. Lower "
                        "device_train_microbatch_size, or set it to auto."
                    ) from error
                out_of_memory = True
            self.reducer.finish()
            if self.precision == "fp8":
                self._scale_gradients(1.0 / (FP8_LOSS_SCALE * max(num_targets, 1)))
            if not (self.may_split and self.ranks.sum([out_of_memory])[0]):
                return self.ranks.sum_(loss)
            self._halve(microbatches, batch_number)

    def _accumulate(self, parts: list[Batch], num_targets: int, loss: Tensor) -> None:
        """Add up the gradients and, into `loss`, the losses of all parts."""
        for batch in parts:
            if batch is parts[-1]:
                self.reducer.arm()
            if self.graphs is not None:
                loss += self.graphs(batch, max(num_targets, 1))
            else:
                loss += self._take(batch.to(self.ranks.device), max(num_targets, 1))

    def _take(self, batch: Batch, num_targets: int | Tensor) -> Tensor:
        """Forward and backward pass of a batch on the device; its part of the mean loss."""
        loss_sum = self.forward(batch).loss_sum
        share = loss_sum / num_targets
        if self.precision == "fp8":
            (loss_sum * FP8_LOSS_SCALE).backward()  # type: ignore[no-untyped-call]
        else:
            self.scaler.scale(share).backward()  # type: ignore[no-untyped-call]
        return share.detach()

    def _give_up_graphs(self, batch_number: int) -> bool:
        """Where CUDA graphs hold memory: give it back, and say so. Whether they did."""
        if self.graphs is None:
            return False
        log.warning(
            "Out of memory at batch %d with CUDA graphs: taking it again, and going on without.",
            batch_number,
        )
        self.release()
        return True

    def release(self) -> None:
        """Give the memory of CUDA graphs back."""
        if self.graphs is not None:
            self.graphs.release()
            self.graphs = None

    def _scale_gradients(self, factor: float) -> None:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision in ("fp32", "bf16"):
            return nullcontext()
        dtype = torch.float16 if self.precision == "amp_fp16" else torch.bfloat16
        return torch.autocast(self.ranks.device.type, dtype=dtype)

    def _seed_dropout(self, batch_number: int) -> None:
        """By (seed, step, rank), so that a resumed or repeated step drops the same."""
        words = [self.seed, batch_number, self.ranks.rank]
        seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes half a millisecond
        if self.ranks.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _halve(self, microbatches: list[Batch], batch_number: int) -> None:
        largest = max((batch.num_samples for batch in microbatches), default=1)
        if self.num_parts >= max(self.ranks.gather(largest)):
            raise TrainingError(
                f"Out of memory at batch {batch_number} even with one sequence at a time. Lower "
                "max_seq_len, set model.gradient_checkpointing: true, or use a smaller model."
            )
        self.num_parts *= 2
        log.warning(
            "Out of memory at batch %d: taking it again, and each microbatch in %d parts from here "
            "on. device_train_microbatch_size can name a size that fits.",
            batch_number,
            self.num_parts,
        )
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()


def _wants_graphs(config: TrainerConfig, ranks: Ranks) -> bool:
    """As configured; else on a GPU that is alone, with torch.compile, whose shapes are few."""
    able = ranks.device.type == "cuda" and ranks.world_size == 1
    if config.cuda_graphs and not able:
        where = f"{ranks.world_size} ranks on {ranks.device.type}"
        raise ConfigError(
            f"cuda_graphs: true needs a single GPU, and this run has {where}. Leave the key out."
        )
    if config.cuda_graphs is None:
        return able and config.compile is not False
    return config.cuda_graphs


def _warn_of_slow_numbers(precision: str) -> None:
    """Say so where this CPU has no instructions for 16-bit matrix products."""
    kind = "fp16" if precision == "amp_fp16" else "bf16"
    if precision == "fp32":
        return
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (there and getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")()):
        log.warning(
            "precision: %s on a CPU without instructions for %s: torch emulates them, which takes "
            "ten times as long or more. precision: fp32 is faster here.",
            precision,
            kind,
        )
