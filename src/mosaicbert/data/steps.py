"""Optimizer steps, each made whole by a worker process."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mosaicbert.batch import Batch, Step
from mosaicbert.config.sections import LoaderConfig
from mosaicbert.data.download import leave_nothing
from mosaicbert.data.order import share
from mosaicbert.data.packing import Sample, pack_samples, pad_samples
from mosaicbert.errors import DataError, MosaicBertError

SECONDS_BETWEEN_LOOKS = 2.0
"""Of a worker for its parent."""
Range = tuple[int, int, int]
"""(epoch, start, end): the positions of one global batch."""
MakeSamples = Callable[[int, int, int], list[Sample]]
"""The samples at positions `start:end` of an epoch."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """How a global batch is shared among ranks and cut into microbatches."""

    microbatch_samples: int
    max_seq_len: int
    pad_token_id: int
    packed: bool
    grid: bool
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How an epoch is cut into global batches.

    Args:
        num_positions: samples of one epoch.
        batch_size: of a global batch; or a function of the samples before it, all epochs counted.
        drop_last: leave out the last, smaller batch.
        subset_batches: take only so many batches of an epoch; None takes all.
    """

    num_positions: int
    batch_size: int | Callable[[int], int]
    drop_last: bool
    subset_batches: int | None = None

    def batches(self, epoch: int, start: int) -> Iterator[Range]:
        """The global batches of an epoch from a position on."""
        limit = self._limit(epoch)
        while start < limit:
            size = self.size_at(epoch, start)
            end = min(start + size, limit)
            if end - start < size and self.drop_last:
                return
            yield epoch, start, end
            start = end

    def count(self, epoch: int, start: int) -> int:
        """How many these are."""
        if callable(self.batch_size):
            return sum(1 for _ in self.batches(epoch, start))
        whole, rest = divmod(max(self._limit(epoch) - start, 0), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def num_samples(self, epoch: int) -> int:
        """How many samples all of an epoch's batches hold."""
        return max((end for _, _, end in self.batches(epoch, 0)), default=0)

    def size_at(self, epoch: int, start: int) -> int:
        """Samples of the batch that starts there."""
        if callable(self.batch_size):
            return self.batch_size(epoch * self.num_positions + start)
        return self.batch_size

    def _limit(self, epoch: int) -> int:
        """Positions of an epoch that batches may take."""
        if self.subset_batches is None:
            return self.num_positions
        if not callable(self.batch_size):
            return min(self.subset_batches * self.batch_size, self.num_positions)
        limit = 0
        for _ in range(self.subset_batches):
            limit = min(limit + self.size_at(epoch, limit), self.num_positions)
        return limit


class StepLoader:
    """Implements `batch.Loader` over `make_samples`, which is sent to the workers.

    Args:
        make_samples: what an epoch holds, by position.
        plan: how an epoch is cut into batches.
        shape: how a batch is shared among ranks and cut into microbatches.
        config: the number of workers, and what else torch's DataLoader is told.

    Raises:
        DataError: not one batch can be made; from `steps`, what `make_samples` raises.
    """

    def __init__(
        self, make_samples: MakeSamples, plan: BatchPlan, shape: StepShape, config: LoaderConfig
    ) -> None:
        self._plan = plan
        self._config = config
        self._dataset = _StepDataset(make_samples, shape)
        self._ranges = _Ranges()
        self._loader = _data_loader(self._dataset, self._ranges, config)
        self.num_samples = plan.num_samples(0)
        """Samples of one epoch's batches, over all ranks."""
        if not self.num_samples:
            raise DataError(
                f"{plan.num_positions} samples make not one batch of {plan.size_at(0, 0)} "
                f"(drop_last: {plan.drop_last}, subset of batches: {plan.subset_batches}). Take "
                "more data, or a smaller batch (global_train_batch_size; of an evaluation "
                "device_eval_batch_size)."
            )

    def steps_in_epoch(self, epoch: int, sample_in_epoch: int = 0) -> int:
        """How many steps are left of `epoch` from that sample on."""
        return self._plan.count(epoch, sample_in_epoch)

    def steps(self, epoch: int, sample_in_epoch: int = 0) -> Iterator[Step]:
        """The share of this rank in each of the epoch's batches, from that sample on."""
        pin = self._config.pin_memory
        pin = torch.cuda.is_available() if pin is None else pin
        ranges = self._plan.batches(epoch, sample_in_epoch)
        shares = self._shares(epoch, sample_in_epoch)
        for (_, start, end), microbatches in zip(ranges, shares, strict=True):
            is_last = next(self._plan.batches(epoch, end), None) is None
            after = (epoch + 1, 0) if is_last else (epoch, end)
            step = Step(microbatches, end - start, *after)
            yield step.pin_memory() if pin else step

    def close(self) -> None:
        """Stop the workers, once no iterator of `steps` is in use; the next one starts others."""
        self._loader = _data_loader(self._dataset, self._ranges, self._config)

    def _shares(self, epoch: int, start: int) -> Iterator[list[Batch]]:
        """The microbatches of each step, from the workers or made here."""
        # Nothing in here may refer to this loader: in a cycle of references torch could not stop
        # its workers and would wait for seconds.
        ranges = self._plan.batches(epoch, start)
        if self._config.num_workers == 0:
            yield from map(self._dataset.make, ranges)
            return
        self._ranges.values = ranges
        results = iter(self._loader)
        while True:
            try:
                result = next(results, None)
            except RuntimeError as error:  # a worker died, or was too slow for `timeout`
                raise DataError(
                    f"The data workers gave up: {error} Is there memory for num_workers: "
                    f"{self._config.num_workers}? 0 works in the training process."
                ) from error
            if result is None:
                return
            if isinstance(result, MosaicBertError):
                del results
                self.close()
                raise result
            yield [_to_batch(arrays) for arrays in result]


class _StepDataset(Dataset[Any]):
    """The share of this rank in the global batch at a `Range`. Lives in the workers."""

    def __init__(self, make_samples: MakeSamples, shape: StepShape) -> None:
        self._make_samples = make_samples
        self._shape = shape

    def make(self, at: Range) -> list[Batch]:
        """The microbatches of the share."""
        epoch, start, end = at
        shape = self._shape
        pack = pack_samples if shape.packed else pad_samples
        return pack(
            self._make_samples(epoch, *share(start, end, shape.rank, shape.world_size)),
            max_samples=shape.microbatch_samples,
            max_seq_len=shape.max_seq_len,
            pad_token_id=shape.pad_token_id,
            grid=shape.grid,
        )

    def __getitem__(self, at: Range) -> list[dict[str, Any]] | MosaicBertError:
        """The same in arrays, which travel without shared memory; or the error, as it is."""
        try:
            return [_to_arrays(batch) for batch in self.make(at)]
        except MosaicBertError as error:
            return error


class _Ranges(Sampler[Range]):
    """What the workers are to make next."""

    def __init__(self) -> None:
        self.values: Iterator[Range] = iter(())

    def __iter__(self) -> Iterator[Range]:
        return self.values


def _data_loader(dataset: _StepDataset, ranges: _Ranges, config: LoaderConfig) -> "DataLoader[Any]":
    workers = config.num_workers
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=ranges,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=partial(_start_worker, os.getpid()),
        timeout=config.timeout if workers else 0,
        prefetch_factor=config.prefetch_factor if workers else None,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # so that the global one, which dropout uses, is left alone
    )


def _unchanged(result: Any) -> Any:
    return result


def _start_worker(parent: int, _: int) -> None:
    """One thread for each worker: it is the workers that share the cores.

    Ctrl-C reaches them too, and so does the SIGTERM that a scheduler sends to a process group,
    but it is the trainer that decides when to end. Its own SIGTERM ends a worker at once: by it
    torch and multiprocessing remove one that does not leave by itself. Torch's own watch over the
    parent misses one that was killed while the worker started.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    watch = threading.Thread(target=_await_the_end, args=(parent,), name="sigterm", daemon=True)
    watch.start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _await_the_end(parent: int) -> None:
    while os.getppid() == parent:
        told = signal.sigtimedwait({signal.SIGTERM}, SECONDS_BETWEEN_LOOKS)
        if told is not None and told.si_pid == parent:
            break
    leave_nothing()
    os._exit(0)


def _to_arrays(batch: Batch) -> dict[str, Any]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {
        name: value.numpy() if isinstance(value, Tensor) else value
        for name, value in values.items()
    }


def _to_batch(arrays: dict[str, Any]) -> Batch:
    values: dict[str, Any] = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in arrays.items()
    }
    return Batch(**values)
