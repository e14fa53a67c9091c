"""Optimizer steps, each made whole by a worker process."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mosaicbert.batch import Batch, Step
from mosaicbert.config.sections import LoaderConfig
from mosaicbert.data.order import share
from mosaicbert.data.packing import Sample, pack_samples, pad_samples
from mosaicbert.errors import DataError, MosaicBertError

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


class StepLoader:
    """Implements `batch.Loader` over `make_samples`, which is sent to the workers.

    Args:
        make_samples: what an epoch holds, by position.
        num_positions: samples of one epoch.
        batch_size: samples of a global batch; or a function of the samples before it, all epochs
            counted.
        shape: how a batch is shared and cut.
        config: `drop_last`, the number of workers, and what else torch's DataLoader is told.
        subset_batches: take only so many batches of an epoch; None or -1 takes all.

    Raises:
        DataError: not one batch can be made; from `steps`, what `make_samples` raises.
    """

    def __init__(
        self,
        make_samples: MakeSamples,
        *,
        num_positions: int,
        batch_size: int | Callable[[int], int],
        shape: StepShape,
        config: LoaderConfig,
        subset_batches: int | None = None,
    ) -> None:
        self._num_positions = num_positions
        self._batch_size = batch_size
        self._config = config
        self._subset = subset_batches if subset_batches is None or subset_batches >= 0 else None
        self._dataset = _StepDataset(make_samples, shape)
        self._ranges = _Ranges()
        self._loader = _data_loader(self._dataset, self._ranges, config)
        self.num_samples = max((end for _, _, end in self._batches(0, 0)), default=0)
        """Samples of one epoch's batches, over all ranks."""
        if not self.num_samples:
            raise DataError(
                f"{num_positions} samples make not one batch of {self._size_at(0, 0)} (drop_last: "
                f"{config.drop_last}, subset of batches: {subset_batches}). Take more data, or a "
                "smaller batch."
            )

    def steps_in_epoch(self, epoch: int, sample_in_epoch: int = 0) -> int:
        """How many steps are left of `epoch` from that sample on."""
        if callable(self._batch_size):
            return sum(1 for _ in self._batches(epoch, sample_in_epoch))
        left = max(self._limit(epoch) - sample_in_epoch, 0)
        whole, rest = divmod(left, self._batch_size)
        return whole + (rest > 0 and not self._config.drop_last)

    def steps(self, epoch: int, sample_in_epoch: int = 0) -> Iterator[Step]:
        """The share of this rank in each of the epoch's batches, from that sample on."""
        pin = self._config.pin_memory
        pin = torch.cuda.is_available() if pin is None else pin
        ranges = self._batches(epoch, sample_in_epoch)
        shares = self._shares(epoch, sample_in_epoch)
        for (_, start, end), microbatches in zip(ranges, shares, strict=True):
            is_last = next(self._batches(epoch, end), None) is None
            after = (epoch + 1, 0) if is_last else (epoch, end)
            step = Step(microbatches, end - start, *after)
            yield step.pin_memory() if pin else step

    def _shares(self, epoch: int, start: int) -> Iterator[list[Batch]]:
        """The microbatches of each step, from the workers or made here."""
        if self._config.num_workers == 0:
            yield from map(self._dataset.make, self._batches(epoch, start))
            return
        self._ranges.values = self._batches(epoch, start)
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
                raise result
            yield [_to_batch(arrays) for arrays in result]

    def _size_at(self, epoch: int, start: int) -> int:
        if callable(self._batch_size):
            return self._batch_size(epoch * self._num_positions + start)
        return self._batch_size

    def _limit(self, epoch: int) -> int:
        """Positions of an epoch that batches may take."""
        limit = 0 if self._subset is not None else self._num_positions
        for _ in range(self._subset or 0):
            limit = min(limit + self._size_at(epoch, limit), self._num_positions)
        return limit

    def _batches(self, epoch: int, start: int) -> Iterator[Range]:
        """The global batches of an epoch from a position on."""
        limit = self._limit(epoch)
        while start < limit:
            size = self._size_at(epoch, start)
            end = min(start + size, limit)
            if end - start < size and self._config.drop_last:
                return
            yield epoch, start, end
            start = end


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
        worker_init_fn=_start_worker,
        timeout=config.timeout if workers else 0,
        prefetch_factor=config.prefetch_factor if workers else None,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # so that the global one, which dropout uses, is left alone
    )


def _unchanged(result: Any) -> Any:
    return result


def _start_worker(_: int) -> None:
    """One thread for each worker: it is the workers that share the cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


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
