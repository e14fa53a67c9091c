"""The processes of a run: who they are, and what they tell one another.

torchrun's variables (which `mosaicbert`'s own launcher sets too) or Slurm's say who a process is;
without them it is alone. Host-side numbers travel by gloo, so that no rank waits for its GPU to
exchange them; tensors on a GPU travel by NCCL.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from mosaicbert.errors import ConfigError, MosaicBertError, TrainingError
from mosaicbert.slurm import meeting_point

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True)
class Ranks:
    """A process among those of the run. Every method but `close` is called by all of them."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks of a few host numbers, exact for integers below 2**53."""
        if self.world_size == 1:
            return [float(value) for value in values]
        numbers = torch.tensor(values, dtype=torch.float64)
        with self.contact():
            dist.all_reduce(numbers)
        return numbers.tolist()

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place, without waiting for the device."""
        if self.world_size > 1:
            with self.contact():
                dist.all_reduce(tensor)
        return tensor

    def gather_(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors of one shape, joined along the first dimension, on the device."""
        if self.world_size == 1:
            return tensor
        joined = tensor.new_empty(self.world_size * len(tensor), *tensor.shape[1:])
        with self.contact():
            dist.all_gather_into_tensor(joined, tensor.contiguous())
        return joined

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.contact():
            dist.all_gather_object(values, value)
        return values

    def gather_rows(self, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """All rows of all ranks' arrays in one; empty where there are none."""
        mine = np.concatenate(arrays) if arrays else None
        found = [rows for rows in self.gather(mine) if rows is not None]
        return np.concatenate(found) if found else np.empty(0)

    def from_first(self, function: Callable[[], T]) -> T:
        """What `function` gives or raises on rank 0, on all ranks: all go on, or none."""
        if self.world_size == 1:
            return function()
        answer: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_first:
            try:
                answer[0] = function()
            except Exception as error:
                failure = error
                known = isinstance(error, MosaicBertError)
                answer[1] = error if known else TrainingError(f"Rank 0 failed: {error!r}")
        with self.contact():
            dist.broadcast_object_list(answer, src=0)
        if failure is not None:
            raise failure
        if answer[1] is not None:
            raise answer[1]
        result: T = answer[0]
        return result

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with rank 0's."""
        if self.world_size > 1:
            with self.contact():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), src=0)

    def broadcast_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rank 0's host tensors on all ranks; the others' argument is not looked at."""
        if self.world_size == 1:
            return tensors
        layout = self.from_first(lambda: [(n, t.shape, t.dtype) for n, t in tensors.items()])
        if not self.is_first:
            tensors = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in layout}
        # As bytes: gloo does not know every type of number.
        self.broadcast_([t.contiguous().reshape(-1).view(torch.uint8) for t in tensors.values()])
        return tensors

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.sum([0.0])

    def close(self) -> None:
        """Leave the group. While an error is on its way up, without waiting for the others."""
        if not dist.is_initialized():
            return
        if sys.exc_info()[0] is not None and self.device.type == "cuda":
            # Half-done NCCL work of a rank that is gone would hold an orderly farewell up.
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()

    @contextmanager
    def contact(self) -> Iterator[None]:
        """Turn a failed exchange into a `TrainingError` that points at the other rank."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise TrainingError(
                f"Rank {self.rank} of {self.world_size} lost contact with another rank, whose own "
                f"error says why: {str(error).strip().splitlines()[0]}"
            ) from error


def init_ranks(device: str | None, timeout_seconds: float) -> Ranks:
    """Join the run that the environment describes, or be alone.

    Args:
        device: `cpu`, `gpu`/`cuda`, or None for a GPU where there is one.
        timeout_seconds: how long a collective waits for a rank that does not answer.

    Raises:
        ConfigError: no GPU where one was asked for, or variables that do not fit together.
        TrainingError: the ranks do not meet in time.
    """
    rank, world_size, local_rank = _place()
    chosen = _pick_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_seconds)
        try:
            dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
        except RuntimeError as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise TrainingError(
                f"Rank {rank} of {world_size} did not meet the others at {where}: "
                f"{str(error).strip().splitlines()[0]} See whether they run, and what they say; "
                f"dist_timeout ({timeout_seconds:g} s) allows for more."
            ) from error
    return Ranks(rank, world_size, local_rank, chosen)


def _place() -> tuple[int, int, int]:
    """Rank, number of ranks, rank on this machine; sets what `init_process_group` needs."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        if not 0 <= rank < world_size:
            raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={world_size}.")
        return rank, world_size, int(env.get("LOCAL_RANK", rank))
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        host, port = meeting_point(env)
        env.update(MASTER_ADDR=host, MASTER_PORT=str(port))
        rank, world_size = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
        return rank, world_size, int(env.get("SLURM_LOCALID", 0))
    if int(env.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            f"WORLD_SIZE={env['WORLD_SIZE']} but no RANK: start the run by `mosaicbert`, torchrun "
            "or srun, which tell each process its rank."
        )
    return 0, 1, 0


def _pick_device(name: str | None, local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if name is None and not available:
        log.info("Training on the CPU: torch sees no GPU.")
    if name == "cpu" or (name is None and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError(
            f"device: {name}, but torch {torch.__version__} sees no GPU here. Use device: cpu, or "
            "install a CUDA build of torch and check nvidia-smi."
        )
    count = torch.cuda.device_count()
    if count == 1 and "SLURM_LOCALID" in os.environ:
        local_rank = 0  # Slurm may show each task its own GPU only
    if local_rank >= count:
        raise ConfigError(
            f"Process {local_rank} of this machine has no GPU of its own: torch sees {count}. "
            "Start one process for each GPU."
        )
    return torch.device("cuda", local_rank)
