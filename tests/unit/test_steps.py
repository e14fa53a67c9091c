"""Steps: global batches that do not depend on ranks, and a position to resume from after each."""

import pickle
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicbert.config.sections import DatasetConfig, LoaderConfig
from mosaicbert.data.packing import Sample
from mosaicbert.data.steps import BatchPlan, StepLoader, StepShape
from mosaicbert.errors import DataError


def make_samples(epoch: int, start: int, end: int) -> list[Sample]:
    """Samples whose label says where in which epoch they stand."""
    return [Sample(np.ones(1 + at % 5, np.int32), 1000 * epoch + at) for at in range(start, end)]


def loader(
    num_positions: int,
    batch_size: int | Callable[[int], int],
    drop_last: bool = False,
    subset_batches: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> StepLoader:
    return StepLoader(
        make_samples,
        BatchPlan(num_positions, batch_size, drop_last, subset_batches),
        StepShape(2, 5, 0, packed=True, grid=False, rank=rank, world_size=world_size),
        LoaderConfig(dataset=DatasetConfig(), num_workers=0, pin_memory=False),
    )


@given(
    num_positions=st.integers(1, 60),
    batch_size=st.integers(1, 13),
    drop_last=st.booleans(),
    subset=st.none() | st.integers(1, 5),
    stops=st.lists(st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 4])), max_size=5),
)
def test_resuming_on_other_ranks_changes_nothing(
    num_positions: int,
    batch_size: int,
    drop_last: bool,
    subset: int | None,
    stops: list[tuple[int, int]],
) -> None:
    if drop_last and num_positions < batch_size:
        return
    settings = (num_positions, batch_size, drop_last, subset)
    alone = loader(*settings)
    expected = [
        sorted(label for batch in step.microbatches for label in batch.labels.tolist())
        for epoch in range(2)
        for step in alone.steps(epoch)
    ]
    assert sorted(label for batch in expected for label in batch) == [
        1000 * epoch + at for epoch in range(2) for at in range(alone.num_samples)
    ]
    found: list[list[int]] = []
    epoch, sample = 0, 0
    for num_steps, world_size in [*stops, (10**6, 2)]:
        while num_steps > 0 and epoch < 2:
            ranks = [loader(*settings, rank=r, world_size=world_size) for r in range(world_size)]
            assert ranks[0].steps_in_epoch(epoch, sample) > 0
            for steps in zip(*(rank.steps(epoch, sample) for rank in ranks), strict=True):
                batches = [batch for step in steps for batch in step.microbatches]
                found.append(sorted(label for batch in batches for label in batch.labels.tolist()))
                assert {step.num_samples for step in steps} == {len(found[-1])}
                epoch, sample = steps[0].epoch, steps[0].sample_in_epoch
                num_steps -= 1
                if num_steps == 0:
                    break
    assert found == expected


@given(
    num_positions=st.integers(1, 60),
    start=st.integers(0, 59),
    batch_size=st.integers(1, 13),
    world_size=st.sampled_from([1, 2, 3, 4]),
)
def test_from_any_sample_on_none_is_lost_and_none_comes_twice(
    num_positions: int, start: int, batch_size: int, world_size: int
) -> None:
    """Also in the middle of what was a batch when the run began."""
    start %= num_positions
    ranks = [
        loader(num_positions, batch_size, rank=r, world_size=world_size) for r in range(world_size)
    ]
    at = start
    for steps in zip(*(rank.steps(0, start) for rank in ranks), strict=True):
        batches = [batch for step in steps for batch in step.microbatches]
        found = sorted(label for batch in batches for label in batch.labels.tolist())
        assert found == list(range(at, min(at + batch_size, num_positions)))
        at += len(found)
        assert {(s.epoch, s.sample_in_epoch) for s in steps} == {
            (1, 0) if at == num_positions else (0, at)
        }
    assert at == num_positions


@given(
    num_positions=st.integers(1, 60),
    start=st.integers(0, 60),
    batch_size=st.integers(1, 13),
    drop_last=st.booleans(),
    subset=st.none() | st.integers(0, 5),
)
def test_the_count_is_that_of_the_batches(
    num_positions: int, start: int, batch_size: int, drop_last: bool, subset: int | None
) -> None:
    fixed = BatchPlan(num_positions, batch_size, drop_last, subset)
    function = BatchPlan(num_positions, lambda _: batch_size, drop_last, subset)
    batches = list(fixed.batches(1, start))
    assert fixed.count(1, start) == function.count(1, start) == len(batches)
    assert list(function.batches(1, start)) == batches


def test_not_one_batch() -> None:
    for settings in ({"drop_last": True}, {"subset_batches": 0}):
        with pytest.raises(DataError, match="not one batch"):
            loader(3, 4, **settings)  # type: ignore[arg-type]
    assert loader(3, 4).num_samples == 3


def test_a_rank_without_samples_has_a_step_without_microbatches() -> None:
    steps = [next(loader(3, 8, rank=r, world_size=4).steps(0)) for r in range(4)]
    assert [len(step.microbatches) for step in steps] == [0, 1, 1, 1]
    assert {step.num_samples for step in steps} == {3}


def test_workers_can_be_started_by_pickling() -> None:
    dataset = loader(9, 4)._dataset
    again = pickle.loads(pickle.dumps(dataset))
    assert len(again[0, 0, 4]) == len(dataset[0, 0, 4])
