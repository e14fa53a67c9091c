"""Batches that grow at the start of a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicbert.config.sections import BatchSizeWarmupConfig
from mosaicbert.data.batch_size import GrowingBatch, growing_batch
from mosaicbert.data.steps import BatchPlan
from mosaicbert.duration import Duration
from mosaicbert.errors import ConfigError


@given(
    start=st.integers(1, 5),
    times=st.integers(1, 6),
    t_warmup=st.integers(0, 200),
    num_positions=st.integers(1, 300),
)
def test_sizes_grow_by_start_up_to_full(
    start: int, times: int, t_warmup: int, num_positions: int
) -> None:
    size = GrowingBatch(start, start * times, t_warmup)
    sizes = [size(done) for done in range(400)]
    assert sizes == sorted(sizes)
    assert set(sizes[t_warmup:]) == {start * times}
    assert {one % start for one in sizes} == {0}
    if times > 1:
        warm = sizes[:t_warmup]
        assert set(warm) <= set(range(start, start * times, start))
        counts = [warm.count(one * start) for one in range(1, times)]
        assert max(counts) - min(counts) <= 1
    plan = BatchPlan(num_positions, size, drop_last=False)
    batches = [one for epoch in range(2) for one in plan.batches(epoch, 0)]
    assert plan.count(0, 0) + plan.count(1, 0) == len(batches)
    for number, (epoch, begin, _) in enumerate(batches):  # resumed there, the rest is the same
        rest = len([one for one in batches[number:] if one[0] == epoch])
        assert list(plan.batches(epoch, begin)) == batches[number : number + rest]


def configured(start: int, t_warmup: str, max_duration: str = "1000sp") -> GrowingBatch:
    config = BatchSizeWarmupConfig(start=start, t_warmup=t_warmup)
    return growing_batch(config, 64, Duration.parse(max_duration))


def test_configuration() -> None:
    assert configured(16, "0.1dur") == GrowingBatch(16, 64, 100)
    assert configured(16, "300sp", "2ep") == GrowingBatch(16, 64, 300)
    with pytest.raises(ConfigError, match="48 does not divide global_train_batch_size: 64"):
        configured(48, "0.1dur")
    for t_warmup, max_duration in (("0.1dur", "3ep"), ("10ba", "1000sp"), ("0.1dur", "9ba")):
        with pytest.raises(ConfigError, match="Give it in samples"):
            configured(16, t_warmup, max_duration)
