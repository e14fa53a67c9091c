"""A microbatch in smaller parts, for when memory has run out."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from mosaicbert.batch import IGNORE_INDEX, Batch

SHAPES_PER_BATCH = 64
SMALLEST_GRID = 8


def split_batch(batch: Batch, num_parts: int, *, grid: bool = False) -> list[Batch]:
    """Cut a batch between sequences into at most `num_parts` parts of about equal size.

    The parts have the same sequences, in order, and the same targets; what fills the shape up may
    differ. On a `grid` (for torch.compile) their sizes are rounded up to a 64th of the batch's, so
    that few shapes come about. A batch of one real sequence comes back as it is.
    """
    num_parts = min(num_parts, batch.num_samples)
    if num_parts <= 1:
        return [batch]
    step = max(SMALLEST_GRID, batch.input_ids.numel() // SHAPES_PER_BATCH) if grid else 1
    if batch.cu_seqlens is None:
        size = math.ceil(batch.num_samples / num_parts)
        firsts = list(range(0, batch.num_samples, size))
        ends = [min(first + size, batch.num_samples) for first in firsts]
        return [_rows(batch, first, end, step) for first, end in zip(firsts, ends, strict=True)]
    bounds = batch.cu_seqlens[: batch.num_samples + 1]
    cuts = [0]
    for part in range(1, num_parts):
        goal = batch.num_tokens * part // num_parts
        nearest = int(torch.searchsorted(bounds, goal))
        last = batch.num_samples - (num_parts - part)  # leaves one sequence for each part to come
        cuts.append(min(max(nearest, cuts[-1] + 1), last))
    return [
        _sequences(batch, first, end, step)
        for first, end in zip(cuts, [*cuts[1:], batch.num_samples], strict=True)
    ]


def _sequences(batch: Batch, first: int, end: int, step: int) -> Batch:
    """Sequences `first` to `end` of a packed batch, filled up to a multiple of `step`."""
    assert batch.cu_seqlens is not None
    lo, hi = int(batch.cu_seqlens[first]), int(batch.cu_seqlens[end])
    num_tokens = hi - lo
    num_positions = _round_up(num_tokens, step)
    fillers = torch.arange(num_tokens, num_positions, batch.max_seqlen)[1:]
    bounds = torch.cat([batch.cu_seqlens[first : end + 1] - lo, fillers.to(torch.int32)])
    num_sequences = len(bounds) - 1 + (num_positions > num_tokens)
    cu_seqlens = torch.full((_round_up(num_sequences, step) + 1,), num_positions, dtype=torch.int32)
    cu_seqlens[: len(bounds)] = bounds
    types = batch.token_type_ids
    part = replace(
        batch,
        input_ids=_fit(batch.input_ids[lo:hi], num_positions, 0),
        cu_seqlens=cu_seqlens,
        token_type_ids=None if types is None else _fit(types[lo:hi], num_positions, 0),
        num_tokens=num_tokens,
        num_samples=end - first,
    )
    return _with_targets(part, batch, (first, end), (lo, hi), len(cu_seqlens) - 1, step)


def _rows(batch: Batch, first: int, end: int, step: int) -> Batch:
    """Rows `first` to `end` of a padded batch, in the batch's own length."""
    assert batch.attention_mask is not None
    seq = batch.input_ids.shape[1]
    mask = batch.attention_mask[first:end]
    part = replace(
        batch,
        input_ids=batch.input_ids[first:end],
        attention_mask=mask,
        token_type_ids=None if batch.token_type_ids is None else batch.token_type_ids[first:end],
        num_tokens=int(mask.sum()),
        num_samples=end - first,
    )
    return _with_targets(part, batch, (first, end), (first * seq, end * seq), end - first, step)


def _with_targets(
    part: Batch,
    whole: Batch,
    samples: tuple[int, int],
    positions: tuple[int, int],
    num_rows: int,
    step: int,
) -> Batch:
    """`part` with those of `whole`'s labels that fall to its samples and flat positions."""
    labels = whole.labels
    fill = math.nan if labels.is_floating_point() else IGNORE_INDEX
    if whole.target_positions is not None:
        at = whole.target_positions
        mine = (at >= positions[0]) & (at < positions[1]) & (labels != IGNORE_INDEX)
        size = _round_up(max(int(mine.sum()), 1), step)
        part.target_positions = _fit(at[mine] - positions[0], size, 0)
        part.labels = _fit(labels[mine], size, fill)
    elif _is_by_token(whole):
        flat = labels.reshape(-1)[positions[0] : positions[1]]
        part.labels = _fit(flat, part.input_ids.numel(), fill).view(part.input_ids.shape)
    else:
        part.labels = _fit(labels[samples[0] : samples[1]], num_rows, fill)
    real = ~part.labels.isnan() if labels.is_floating_point() else part.labels != IGNORE_INDEX
    part.num_targets = int(real.sum())
    return part


def _is_by_token(batch: Batch) -> bool:
    by_sample = batch.cu_seqlens is not None and len(batch.labels) == len(batch.cu_seqlens) - 1
    is_float = batch.labels.is_floating_point()
    return batch.labels.shape == batch.input_ids.shape and not is_float and not by_sample


def _fit(values: Tensor, size: int, fill: float) -> Tensor:
    """`values` with `fill` behind them, `size` long."""
    fitted = torch.full((size, *values.shape[1:]), fill, dtype=values.dtype)
    fitted[: len(values)] = values
    return fitted


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
