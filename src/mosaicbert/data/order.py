"""The order of an epoch's samples: the same whatever the ranks, workers and microbatches.

An epoch draws from each source a number of samples, shards in an order hashed from (seed, epoch),
and is cut into blocks of about `block_size` samples, each with its due part of every source. Inside
a block samples are shuffled. So shards are read nearly in sequence, which lets them stream, and any
position of the epoch is found without going through those before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mosaicbert.config.sections import StreamConfig
from mosaicbert.data.hashing import hash_key, splitmix64
from mosaicbert.errors import ConfigError, DataError

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Source:
    """One stream: the samples of each of its shards, and how many an epoch draws.

    More draws than samples go over the source again, its shards in another order; fewer take the
    first shards of that order, others in each epoch.
    """

    shard_samples: tuple[int, ...]
    num_draws: int


@dataclass(frozen=True, slots=True)
class Located:
    """Where the samples at successive positions of an epoch lie; all arrays are `(n,)`."""

    positions: Ints
    shards: Ints  # numbered through all sources
    indices: Ints  # within the shard

    def __len__(self) -> int:
        return len(self.positions)


class Order:
    """Positions of an epoch to samples of shards.

    Args:
        sources: the streams; their shards are numbered through.
        seed: of the order.
        shuffle: False gives the sources as they are, one after another.
        block_size: samples shuffled together.
        document_of: for (shard, its sample numbers), the document each belongs to: samples of
            one document then stay together, in their order.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seed: int,
        shuffle: bool,
        block_size: int,
        document_of: Callable[[int, Ints], Ints] | None = None,
    ) -> None:
        self._sources = sources
        self._seed = seed
        self._shuffle = shuffle
        self._document_of = document_of
        self._first_shards = np.cumsum([0, *(len(source.shard_samples) for source in sources)])
        self._sizes = [sum(source.shard_samples) for source in sources]
        draws = np.array([source.num_draws for source in sources], np.int64)
        self.num_samples = int(draws.sum())
        """Samples of an epoch."""
        num_blocks = max(1, -(-self.num_samples // block_size))
        # (num_blocks + 1, num_sources): how much of each source comes before each block.
        self._cuts = np.arange(num_blocks + 1)[:, None] * draws // num_blocks
        # Without shuffling, a block is a source.
        self._block_starts = self._cuts.sum(1) if shuffle else np.cumsum([0, *draws])
        # Caches of plain data, so that an Order can be sent to a worker.
        self._passes: dict[tuple[int, int, int], tuple[Ints, Ints]] = {}
        self._last_block: dict[tuple[int, int], tuple[Ints, Ints]] = {}

    def locate(self, epoch: int, start: int, end: int) -> Located:
        """The samples at positions `start` to `end` (exclusive) of an epoch."""
        assert 0 <= start <= end <= self.num_samples
        shards, indices = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for block, first, last in self._overlaps(start, end):
            if self._shuffle:
                block_shards, block_indices = self._block(epoch, block)
                shards.append(block_shards[first:last])
                indices.append(block_indices[first:last])
                continue
            for shard, low, high in self._pieces(epoch, block, first, last):
                shards.append(np.full(high - low, shard, np.int64))
                indices.append(np.arange(low, high))
        return Located(np.arange(start, end), np.concatenate(shards), np.concatenate(indices))

    def shards_between(self, epoch: int, start: int, end: int) -> list[int]:
        """The shards that positions `start` to `end` need, or soon will: those of their blocks."""
        found: dict[int, None] = {}
        for block, first, last in self._overlaps(start, min(end, self.num_samples)):
            found.update((shard, None) for shard, _, _ in self._pieces(epoch, block, first, last))
        return list(found)

    def _overlaps(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """(block, first, last) of the parts of blocks that make up `start:end`."""
        begins = self._block_starts
        low = int(np.searchsorted(begins, start, "right")) - 1
        high = int(np.searchsorted(begins, end, "left"))
        parts = []
        for block in range(low, high):
            first = max(start, int(begins[block])) - int(begins[block])
            last = min(end, int(begins[block + 1])) - int(begins[block])
            if first < last:
                parts.append((block, first, last))
        return parts

    def _pieces(self, epoch: int, block: int, first: int, last: int) -> list[tuple[int, int, int]]:
        """(shard, low, high) of the runs that hold samples `first:last` of a block.

        A shuffled block gives all its runs, for its samples can lie anywhere in them.
        """
        if not self._shuffle:
            return self._runs(epoch, block, first, last)
        cuts = self._cuts[block : block + 2].T.tolist()
        return [
            run
            for source, (at, stop) in enumerate(cuts)
            for run in self._runs(epoch, source, at, stop)
        ]

    def _runs(self, epoch: int, source: int, at: int, stop: int) -> list[tuple[int, int, int]]:
        """(shard, low, high) of the runs of samples that a source gives as its draws `at:stop`."""
        runs = []
        while at < stop:
            shards, ends = self._shards_of_pass(epoch, source, at // self._sizes[source])
            within = at % self._sizes[source]
            place = int(np.searchsorted(ends, within, "right"))
            begin = int(ends[place - 1]) if place else 0
            low, size = within - begin, min(int(ends[place]) - within, stop - at)
            runs.append((int(self._first_shards[source] + shards[place]), low, low + size))
            at += size
        return runs

    def _shards_of_pass(self, epoch: int, source: int, number: int) -> tuple[Ints, Ints]:
        """A source's shards in the order of its pass `number`, and where each ends in it."""
        key = (epoch, source, number)
        if key not in self._passes:
            if len(self._passes) >= 4 * len(self._sources):
                self._passes.clear()
            sizes = np.array(self._sources[source].shard_samples, np.int64)
            shards = np.arange(len(sizes))
            if self._shuffle:
                hashes = splitmix64(shards.astype(np.uint64) ^ hash_key(self._seed, 1, *key))
                shards = np.argsort(hashes, kind="stable")
            self._passes[key] = (shards, np.cumsum(sizes[shards]))
        return self._passes[key]

    def _block(self, epoch: int, block: int) -> tuple[Ints, Ints]:
        """Shard and index of each sample of a block, in the order of the epoch."""
        if (epoch, block) not in self._last_block:
            self._last_block = {(epoch, block): self._shuffle_block(epoch, block)}
        return self._last_block[epoch, block]

    def _shuffle_block(self, epoch: int, block: int) -> tuple[Ints, Ints]:
        shards, indices, groups = [], [], []
        for shard, low, high in self._pieces(epoch, block, 0, 0):
            own = np.arange(low, high)
            shards.append(np.full(len(own), shard, np.int64))
            indices.append(own)
            if self._document_of is not None:
                # A document keeps its own key wherever it occurs, so its samples stay together.
                groups.append(self._document_of(shard, own) + (np.int64(shard) << 32))
        size = sum(map(len, indices))
        group = np.concatenate(groups) if groups else np.arange(size)
        key = hash_key(self._seed, 2, epoch, block)
        order = np.argsort(splitmix64(group.astype(np.uint64) ^ key), kind="stable")
        return np.concatenate(shards)[order], np.concatenate(indices)[order]


def share(start: int, end: int, rank: int, world_size: int) -> tuple[int, int]:
    """The part of positions `start:end` that falls to a rank: runs that differ by one at most."""
    size = end - start
    return start + size * rank // world_size, start + size * (rank + 1) // world_size


def count_draws(num_samples: dict[str, int], streams: dict[str, StreamConfig]) -> dict[str, int]:
    """How many samples an epoch draws from each stream of `num_samples[name]` samples.

    With `proportion` (for all streams or none) the epoch is as long as all streams together.

    Raises:
        ConfigError: proportions for some streams only, or two settings for one stream.
        DataError: an epoch would be empty.
    """
    for name, stream in streams.items():
        given = [
            key for key in ("proportion", "repeat", "samples") if getattr(stream, key) is not None
        ]
        if len(given) > 1:
            raise ConfigError(f"streams.{name}: give one of {' and '.join(given)}, not both.")
    weights = {name: stream.proportion for name, stream in streams.items() if stream.proportion}
    if weights and len(weights) < len(streams):
        without = next(name for name in streams if name not in weights)
        raise ConfigError(
            f"streams.{without}: other streams have a proportion, so give this one too."
        )
    total, weight_sum = sum(num_samples.values()), sum(weights.values())
    draws = {}
    for name, stream in streams.items():
        if weights:
            draws[name] = round(total * weights[name] / weight_sum)
        elif stream.samples is not None:
            draws[name] = stream.samples
        else:
            draws[name] = round(num_samples[name] * (stream.repeat or 1.0))
        if draws[name] and not num_samples[name]:
            raise DataError(f"streams.{name}: there is not one sample to draw from.")
    if not sum(draws.values()):
        raise DataError(f"There is not one sample in {', '.join(streams)}. Convert the data anew.")
    return draws
