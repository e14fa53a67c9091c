"""Microbatches cut into parts: the same samples and targets."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import TinyModel, make_batch

from mosaicbert.batch import IGNORE_INDEX, Batch
from mosaicbert.train.split import split_batch


def samples_of(lengths):
    rng = np.random.default_rng(len(lengths))
    return [(rng.integers(1, 32, n), rng.permutation(n)[: n // 2]) for n in lengths]


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 40), st.booleans())
def test_packed_parts_hold_the_same_samples_and_targets(lengths, num_parts, grid):
    batch = make_batch(samples_of(lengths))
    parts = split_batch(batch, num_parts, grid=grid)
    assert len(parts) == max(min(num_parts, len(lengths)), 1)
    sequences, targets = [], []
    for part in parts:
        bounds = part.cu_seqlens.tolist()
        assert bounds[-1] == len(part.input_ids)
        assert np.diff(bounds).max() <= part.max_seqlen
        assert np.diff(bounds).min() >= 0
        sequences += [
            part.input_ids[a:b].tolist() for a, b in pairwise(bounds[: part.num_samples + 1])
        ]
        real = part.labels != IGNORE_INDEX
        assert int(real.sum()) == part.num_targets
        assert bool((part.target_positions < len(part.input_ids)).all())
        ids = part.input_ids[part.target_positions[real]]
        targets += zip(ids.tolist(), part.labels[real].tolist(), strict=True)
    whole = batch.cu_seqlens.tolist()
    assert sequences == [batch.input_ids[a:b].tolist() for a, b in pairwise(whole)]
    ids = batch.input_ids[batch.target_positions]
    kept = batch.labels != IGNORE_INDEX
    assert targets == list(zip(ids[kept].tolist(), batch.labels[kept].tolist(), strict=True))
    for name in ("num_targets", "num_tokens", "num_samples"):
        assert sum(getattr(part, name) for part in parts) == getattr(batch, name)


def test_on_a_grid_few_shapes_come_about():
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(20):
        lengths = rng.integers(16, 129, 64)
        for part in split_batch(make_batch(samples_of(lengths)), 2, grid=True):
            step = max(8, int(lengths.sum()) // 64)
            assert len(part.input_ids) % step == 0
            assert len(part.labels) % step == 0
            assert (len(part.cu_seqlens) - 1) % step == 0
            shapes.add(len(part.input_ids) // step)
    assert len(shapes) <= 4


def test_loss_of_parts_is_the_loss_of_the_whole():
    model = TinyModel(dropout=0.0)
    batch = make_batch(samples_of([5, 9, 4, 7]))
    with torch.no_grad():
        parts = split_batch(batch, 3, grid=True)
        loss = sum(float(model.loss(part).loss_sum) for part in parts)
        assert loss == pytest.approx(float(model.loss(batch).loss_sum), rel=1e-5)


def padded(labels, rows=6, real=5, seq=4, **more):
    mask = torch.ones(rows, seq, dtype=torch.long)
    mask[real:, 1:] = 0
    return Batch(
        input_ids=torch.arange(rows * seq).view(rows, seq),
        labels=labels,
        num_targets=real,
        num_tokens=real * seq,
        num_samples=real,
        max_seqlen=seq,
        attention_mask=mask,
        **more,
    )


def test_padded_rows_and_class_labels():
    labels = torch.tensor([3, 1, 4, 1, 5, IGNORE_INDEX])
    parts = split_batch(padded(labels), 2)
    assert [part.num_samples for part in parts] == [3, 2]
    assert torch.cat([part.labels for part in parts]).tolist() == [3, 1, 4, 1, 5]
    assert parts[1].input_ids.tolist() == [[12, 13, 14, 15], [16, 17, 18, 19]]
    assert [part.num_targets for part in parts] == [3, 2]


def test_padded_masked_tokens():
    batch = padded(torch.tensor([9, 8, 7]), target_positions=torch.tensor([2, 11, 17]))
    parts = split_batch(batch, 2)
    assert [part.target_positions.tolist() for part in parts] == [[2, 11], [5]]
    assert [part.labels.tolist() for part in parts] == [[9, 8], [7]]


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([0.5, 1.5, 2.5, 3.5, 4.5, torch.nan]),
        torch.cat([torch.eye(5, 4), torch.full((1, 4), torch.nan)]),
        torch.arange(24).view(6, 4),
    ],
    ids=["regression", "multi-label", "tokens"],
)
def test_other_labels_go_with_their_rows(labels):
    parts = split_batch(padded(labels), 5)
    assert len(parts) == 5
    assert torch.equal(torch.cat([part.labels for part in parts]), labels[:5])


def test_packed_class_and_token_labels():
    batch = make_batch(samples_of([3, 5, 4]))
    batch.labels, batch.target_positions = torch.tensor([7, 8, 9]), None
    assert [part.labels.tolist() for part in split_batch(batch, 3)] == [[7], [8], [9]]
    batch.labels = torch.arange(12)
    parts = split_batch(batch, 3)
    assert torch.cat([part.labels for part in parts]).tolist() == list(range(12))
