"""Packing and padding: nothing lost, shapes on the grid, every kind of label."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mosaicbert.batch import IGNORE_INDEX, Batch
from mosaicbert.data.packing import Sample, pack_samples, pad_samples

PAD = 0


def mlm_sample(length: int, serial: int) -> Sample:
    """Ids that tell the sample and the position apart; every third position is a target."""
    ids = (1000 * (serial + 1) + np.arange(length)).astype(np.uint32)
    positions = np.arange(0, length, 3)
    return Sample(ids, ids[positions] + 500, positions)


def sequences(batch: Batch) -> list[list[int]]:
    """The real sequences of a batch in either form."""
    if batch.cu_seqlens is not None:
        bounds = batch.cu_seqlens.tolist()
        found = [batch.input_ids[a:b].tolist() for a, b in pairwise(bounds)]
    else:
        assert batch.attention_mask is not None
        found = [
            row[mask.bool()].tolist()
            for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]
    return [sequence for sequence in found if sequence and sequence[0] != PAD]


lengths_strategy = st.lists(st.integers(1, 32), min_size=1, max_size=60)


@given(
    lengths=lengths_strategy,
    max_samples=st.integers(1, 20),
    grid=st.booleans(),
    packed=st.booleans(),
)
def test_nothing_is_lost(lengths: list[int], max_samples: int, grid: bool, packed: bool) -> None:
    samples = [mlm_sample(length, i) for i, length in enumerate(lengths)]
    make = pack_samples if packed else pad_samples
    batches = make(samples, max_samples=max_samples, max_seq_len=32, pad_token_id=PAD, grid=grid)
    found = sorted(sequence for batch in batches for sequence in sequences(batch))
    assert found == sorted(sample.input_ids.tolist() for sample in samples)
    assert sum(batch.num_tokens for batch in batches) == sum(lengths)
    assert sum(batch.num_samples for batch in batches) == len(lengths)
    for batch in batches:
        assert batch.target_positions is not None
        real = batch.labels != IGNORE_INDEX
        assert int(real.sum()) == batch.num_targets
        at_target = batch.input_ids.flatten()[batch.target_positions]
        assert torch.equal(at_target[real] + 500, batch.labels[real])
        assert (batch.target_positions[~real] == 0).all()
        assert len(batch.labels) >= 1
    assert sum(batch.num_targets for batch in batches) == sum(-(-n // 3) for n in lengths)


@given(lengths=lengths_strategy, max_samples=st.integers(1, 20), grid=st.booleans())
def test_packed_layout(lengths: list[int], max_samples: int, grid: bool) -> None:
    samples = [mlm_sample(length, i) for i, length in enumerate(lengths)]
    budget = max_samples * 32
    for batch in pack_samples(
        samples, max_samples=max_samples, max_seq_len=32, pad_token_id=PAD, grid=grid
    ):
        assert batch.is_packed
        assert batch.cu_seqlens is not None
        assert batch.cu_seqlens.dtype == torch.int32
        cu = batch.cu_seqlens.numpy()
        assert cu[0] == 0
        assert cu[-1] == len(batch.input_ids) <= budget
        assert (np.diff(cu) >= 0).all()
        assert np.diff(cu).max() <= batch.max_seqlen
        step = max(8, budget // 64) if grid else 1
        assert len(batch.input_ids) % step == 0 or len(batch.input_ids) == budget
        assert (len(cu) - 1) % step == 0
        assert len(batch.labels) % step == 0
        if not grid:
            assert len(batch.input_ids) == batch.num_tokens
            assert len(cu) - 1 == batch.num_samples


@pytest.mark.parametrize("grid", [True, False])
def test_padded_layout(grid: bool) -> None:
    samples = [mlm_sample(length, i) for i, length in enumerate([5, 9, 3, 7, 2])]
    batches = pad_samples(samples, max_samples=3, max_seq_len=16, pad_token_id=PAD, grid=grid)
    shapes = [tuple(batch.input_ids.shape) for batch in batches]
    assert shapes == ([(3, 16), (3, 16)] if grid else [(3, 9), (2, 7)])
    for batch in batches:
        assert not batch.is_packed
        assert batch.attention_mask is not None
        assert (batch.attention_mask.sum(1) >= 1).all()  # no row attends to nothing
    assert batches[0].num_tokens == 17


def test_padded_to_a_multiple_few_shapes_come_about() -> None:
    samples = [mlm_sample(length, i) for i, length in enumerate([5, 9, 3, 7, 2, 30, 33])]
    batches = pad_samples(
        samples, max_samples=3, max_seq_len=35, pad_token_id=PAD, grid=False, multiple=16
    )
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(3, 16), (3, 32), (3, 35)]
    last = batches[-1]
    assert last.num_samples == 1
    assert last.attention_mask is not None
    assert last.attention_mask.sum(1).tolist() == [33, 1, 1]


def test_fill_on_web_text() -> None:
    """70 % of C4's texts fill 128 tokens; the rest is about uniform. Few shapes, little waste."""
    generator = np.random.default_rng(0)
    positions, tokens, shapes = 0, 0, set()
    for _ in range(20):
        lengths = np.where(generator.random(512) < 0.7, 128, generator.integers(16, 128, 512))
        batches = pack_samples(
            [mlm_sample(int(n), i) for i, n in enumerate(lengths)],
            max_samples=128,
            max_seq_len=128,
            pad_token_id=PAD,
            grid=True,
        )
        assert len(batches) == 4
        positions += sum(len(batch.input_ids) for batch in batches)
        tokens += sum(batch.num_tokens for batch in batches)
        shapes |= {len(batch.input_ids) for batch in batches}
    assert tokens / positions > 0.97
    assert len(shapes) <= 6


def test_microbatches_are_about_equal() -> None:
    generator = np.random.default_rng(1)
    samples = [mlm_sample(int(n), i) for i, n in enumerate(generator.integers(1, 129, 300))]
    batches = pack_samples(samples, max_samples=40, max_seq_len=128, pad_token_id=PAD, grid=False)
    sizes = [batch.num_tokens for batch in batches]
    assert len(sizes) == -(-sum(sizes) // (40 * 128))
    assert max(sizes) - min(sizes) <= 4


def test_same_samples_same_batches() -> None:
    samples = [mlm_sample(n, i) for i, n in enumerate([9, 3, 3, 12, 1, 9])]
    first, second = (
        pack_samples(samples, max_samples=1, max_seq_len=16, pad_token_id=PAD, grid=False)
        for _ in range(2)
    )
    assert [b.input_ids.tolist() for b in first] == [b.input_ids.tolist() for b in second]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("grid", [True, False])
def test_kinds_of_labels(packed: bool, grid: bool) -> None:
    make = pack_samples if packed else pad_samples

    def batch_of(labels: list[object]) -> Batch:
        samples = [
            Sample(np.full(n, 7, np.int32), label)  # type: ignore[arg-type]
            for n, label in zip([4, 2, 3], labels, strict=True)
        ]
        (batch,) = make(samples, max_samples=4, max_seq_len=8, pad_token_id=PAD, grid=grid)
        assert batch.target_positions is None
        return batch

    classes = batch_of([2, 0, 1])
    assert classes.labels.dtype == torch.int64
    assert classes.labels[:3].tolist() == [2, 0, 1]
    assert (classes.labels[3:] == IGNORE_INDEX).all()
    assert classes.num_targets == 3

    floats = batch_of([0.5, -1.0, 3.0])
    assert floats.labels.dtype == torch.float32
    assert floats.labels[:3].tolist() == [0.5, -1.0, 3.0]
    assert floats.labels[3:].isnan().all()

    multi = batch_of([np.array([1.0, 0.0]), np.array([0.0, 0.0]), np.array([1.0, 1.0])])
    assert multi.labels.shape[1:] == (2,)
    assert multi.labels[:3].tolist() == [[1, 0], [0, 0], [1, 1]]
    assert multi.labels[3:].isnan().all()
    assert multi.num_targets == 6

    tokens = batch_of([np.array([1, 2, 3, -100]), np.array([4, 5]), np.array([-100, 6, 7])])
    assert tokens.labels.shape == tokens.input_ids.shape
    assert sorted(tokens.labels[tokens.labels != IGNORE_INDEX].tolist()) == [1, 2, 3, 4, 5, 6, 7]
    assert (tokens.labels[tokens.input_ids == PAD] == IGNORE_INDEX).all()
    assert tokens.num_targets == 7


@pytest.mark.parametrize("packed", [True, False])
def test_token_types_follow_their_tokens(packed: bool) -> None:
    make = pack_samples if packed else pad_samples
    samples = [
        Sample(np.array([5, 6, 7]), 0, token_type_ids=np.array([0, 0, 1])),
        Sample(np.array([8, 9]), 1, token_type_ids=np.array([0, 1])),
    ]
    (batch,) = make(samples, max_samples=2, max_seq_len=4, pad_token_id=PAD, grid=False)
    assert batch.token_type_ids is not None
    assert batch.input_ids[batch.token_type_ids == 1].tolist() == [7, 9]


def test_no_samples_no_batches() -> None:
    for make in (pack_samples, pad_samples):
        assert make([], max_samples=2, max_seq_len=4, pad_token_id=PAD, grid=True) == []
