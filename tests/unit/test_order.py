"""The order of samples: complete, repeatable, the same on any ranks and after any resume."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicbert.config.sections import StreamConfig
from mosaicbert.data.order import Ints, Order, Source, count_draws, share
from mosaicbert.errors import ConfigError, DataError

sizes_strategy = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(sum)


def whole(sizes: list[int]) -> Source:
    return Source(tuple(sizes), sum(sizes))


def epoch_of(order: Order, epoch: int = 0) -> list[tuple[int, int]]:
    found = order.locate(epoch, 0, order.num_samples)
    return list(zip(found.shards.tolist(), found.indices.tolist(), strict=True))


def every_sample(sizes: list[int], first_shard: int = 0) -> list[tuple[int, int]]:
    return [(first_shard + shard, i) for shard, size in enumerate(sizes) for i in range(size)]


@given(sizes=sizes_strategy, block=st.integers(1, 50), seed=st.integers(0, 9))
def test_an_epoch_has_every_sample_once(sizes: list[int], block: int, seed: int) -> None:
    order = Order([whole(sizes)], seed=seed, shuffle=True, block_size=block)
    assert order.num_samples == sum(sizes)
    assert sorted(epoch_of(order)) == every_sample(sizes)
    again = Order([whole(sizes)], seed=seed, shuffle=True, block_size=block)
    assert epoch_of(again, 3) == epoch_of(order, 3)


@given(first=sizes_strategy, second=sizes_strategy, start=st.integers(0, 100))
def test_natural_order(first: list[int], second: list[int], start: int) -> None:
    order = Order([whole(first), whole(second)], seed=0, shuffle=False, block_size=7)
    expected = every_sample(first) + every_sample(second, len(first))
    assert epoch_of(order) == expected
    start = min(start, len(expected))
    found = order.locate(0, start, len(expected))
    assert found.indices.tolist() == [index for _, index in expected[start:]]
    assert found.positions.tolist() == list(range(start, len(expected)))


@given(
    sizes=sizes_strategy,
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    batch=st.integers(1, 20),
    resumes=st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 4])), max_size=4),
)
def test_ranks_and_resumes_change_nothing(
    sizes: list[int],
    shuffle: bool,
    drop_last: bool,
    batch: int,
    resumes: list[tuple[int, int]],
) -> None:
    """After a few batches each, a run goes on with 1, 2 or 4 ranks: none lost, none twice."""
    source = whole(sizes)
    total = sum(sizes) - (sum(sizes) % batch if drop_last else 0)
    expected = epoch_of(Order([source], seed=5, shuffle=shuffle, block_size=16), 2)[:total]
    seen: list[tuple[int, int]] = []
    at = 0
    for num_batches, world_size in [*resumes, (10**6, 2)]:
        order = Order([source], seed=5, shuffle=shuffle, block_size=16)  # a new process
        for _ in range(num_batches):
            end = min(at + batch, total)
            if at == end:
                break
            parts = [share(at, end, rank, world_size) for rank in range(world_size)]
            assert max(b - a for a, b in parts) - min(b - a for a, b in parts) <= 1
            for low, high in parts:
                found = order.locate(2, low, high)
                seen += zip(found.shards.tolist(), found.indices.tolist(), strict=True)
            at = end
    assert seen == expected


@given(sizes=sizes_strategy, start=st.integers(0, 240), length=st.integers(0, 40))
def test_shards_between_covers_what_is_needed(sizes: list[int], start: int, length: int) -> None:
    for shuffle in (True, False):
        order = Order([whole(sizes)], seed=1, shuffle=shuffle, block_size=10)
        start = min(start, order.num_samples)
        end = min(start + length, order.num_samples)
        needed = set(order.locate(0, start, end).shards.tolist())
        assert needed <= set(order.shards_between(0, start, start + length))


def test_epochs_and_seeds_differ() -> None:
    order = Order([whole([50, 50])], seed=1, shuffle=True, block_size=1000)
    assert epoch_of(order, 0) != epoch_of(order, 1)
    assert epoch_of(order, 0) != epoch_of(
        Order([whole([50, 50])], seed=2, shuffle=True, block_size=1000)
    )


def test_shuffling_mixes_within_blocks_alone() -> None:
    """A block of 100 needs the shards that its samples come from: few, so that they can stream."""
    order = Order([whole([20] * 50)], seed=1, shuffle=True, block_size=100)
    for start in range(0, 1000, 100):
        found = order.locate(0, start, start + 100)
        assert len(set(found.shards.tolist())) == 5
        assert len(order.shards_between(0, start, start + 100)) == 5
        assert (np.diff(found.shards) != 0).mean() > 0.5
    shards = [order.shards_between(0, at, at + 1)[0] for at in range(0, 1000, 100)]
    assert shards != sorted(shards)


def test_streams_are_mixed_in_every_block() -> None:
    sources = [Source((100,) * 10, 1000), Source((100,), 100)]
    order = Order(sources, seed=1, shuffle=True, block_size=110)
    for start in range(0, 1100, 110):
        assert (order.locate(0, start, start + 110).shards == 10).sum() == 10


@pytest.mark.parametrize("shuffle", [True, False])
def test_repeats_and_parts(shuffle: bool) -> None:
    order = Order([Source((3, 4), 17), Source((5, 5), 5)], seed=1, shuffle=shuffle, block_size=1000)
    found = epoch_of(order)
    assert len(found) == 22
    first = [pair for pair in found if pair[0] < 2]
    counts = {pair: first.count(pair) for pair in set(first)}
    assert set(counts) == set(every_sample([3, 4]))
    assert set(counts.values()) == {2, 3}
    second = [pair for pair in found if pair[0] >= 2]
    assert len(set(second)) == 5
    assert len({shard for shard, _ in second}) == 1


def test_a_part_takes_other_shards_in_other_epochs() -> None:
    order = Order([Source((5,) * 8, 5)], seed=1, shuffle=True, block_size=100)
    assert len({epoch_of(order, epoch)[0][0] for epoch in range(12)}) > 3


def test_a_source_gone_over_again_gives_its_shards_in_another_order() -> None:
    order = Order([Source((1,) * 8, 16)], seed=1, shuffle=True, block_size=1)
    shards = [shard for shard, _ in epoch_of(order)]
    assert sorted(shards[:8]) == sorted(shards[8:]) == list(range(8))
    assert shards[:8] != shards[8:]


def test_shuffling_within_a_block_differs_from_epoch_to_epoch() -> None:
    order = Order([Source((50,), 50)], seed=1, shuffle=True, block_size=1000)  # one shard
    assert epoch_of(order, 0) != epoch_of(order, 1)


def test_documents_stay_together() -> None:
    def document_of(shard: int, indices: Ints) -> Ints:
        return indices // 3

    order = Order([whole([30, 30])], seed=1, shuffle=True, block_size=1000, document_of=document_of)
    found = epoch_of(order)
    assert sorted(found) == every_sample([30, 30])
    for at in range(0, 60, 3):
        shard, first = found[at]
        assert first % 3 == 0
        assert found[at : at + 3] == [(shard, first), (shard, first + 1), (shard, first + 2)]
    assert found != sorted(found)


def test_draws() -> None:
    sizes = {"a": 100, "b": 300}
    assert count_draws(sizes, {"a": StreamConfig(), "b": StreamConfig()}) == sizes
    mixed = {"a": StreamConfig(repeat=2.5), "b": StreamConfig(samples=7)}
    assert count_draws(sizes, mixed) == {"a": 250, "b": 7}
    shares = {"a": StreamConfig(proportion=3), "b": StreamConfig(proportion=1)}
    assert count_draws(sizes, shares) == {"a": 300, "b": 100}


def test_draws_that_cannot_be() -> None:
    sizes = {"a": 100, "b": 0}
    with pytest.raises(ConfigError, match=r"streams\.b.*proportion"):
        count_draws(sizes, {"a": StreamConfig(proportion=1), "b": StreamConfig()})
    with pytest.raises(ConfigError, match=r"streams\.a.*repeat and samples"):
        count_draws(sizes, {"a": StreamConfig(repeat=1, samples=3), "b": StreamConfig()})
    with pytest.raises(DataError, match=r"streams\.b"):
        count_draws(sizes, {"a": StreamConfig(), "b": StreamConfig(samples=4)})
    with pytest.raises(DataError, match="not one sample"):
        count_draws({"b": 0}, {"b": StreamConfig()})
