"""From samples to microbatches: packed without padding (Mosaic BERT), or padded (HF BERT)."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mosaicbert.batch import IGNORE_INDEX, Batch

SHAPES_PER_BUDGET = 64
"""On a grid, sizes are rounded up to this share of the token budget."""
SMALLEST_GRID = 8


@dataclass(slots=True)
class Sample:
    """One tokenised sample, special tokens included, and what is to be learnt from it.

    `labels` is one of
    - the true ids `(num_targets,)` at `target_positions` (masked language modelling),
    - an int (class) or a float (regression),
    - a float array `(num_labels,)` (multi-label),
    - an integer array of the length of `input_ids`, `IGNORE_INDEX` where there is no loss
      (token classification).
    """

    input_ids: NDArray[np.integer]  # (length,)
    labels: NDArray[np.generic] | int | float
    target_positions: NDArray[np.integer] | None = None  # (num_targets,), within the sample
    token_type_ids: NDArray[np.integer] | None = None  # (length,)


@dataclass(slots=True)
class _Layout:
    """Where the samples of one microbatch stand in its flattened positions."""

    starts: NDArray[np.int64]  # (num_samples,) flat position of each sample's first token
    lengths: NDArray[np.int64]  # (num_samples,)
    shape: tuple[int, ...]  # of the microbatch's input_ids, with what fills it up
    num_rows: int  # sequences, or rows of the padded form, with what fills the shape up
    grid: int  # sizes are multiples of it; 1: not rounded

    def scatter(self, parts: list[NDArray[np.generic]], fill: int) -> torch.Tensor:
        """The samples' arrays at their places, int64 of the microbatch's shape."""
        placed = np.full(self.shape, fill, np.int64)
        ends = np.cumsum(self.lengths)
        shift = np.repeat(self.starts - ends + self.lengths, self.lengths)
        placed.reshape(-1)[np.arange(ends[-1]) + shift] = np.concatenate(parts)
        return torch.from_numpy(placed)


def pack_samples(
    samples: Sequence[Sample],
    *,
    max_samples: int,
    max_seq_len: int,
    pad_token_id: int,
    grid: bool,
) -> list[Batch]:
    """Pack samples into the fewest microbatches of `max_samples * max_seq_len` tokens.

    The microbatches are of about equal size. On a `grid` (for torch.compile) the numbers of
    tokens, sequences and target rows are rounded up to a 64th of that budget, at least 8, and
    `max_seqlen` is `max_seq_len`; otherwise nothing is rounded and nothing fills up. No samples
    give no microbatches.
    """
    budget = max_samples * max_seq_len
    step = max(SMALLEST_GRID, budget // SHAPES_PER_BUDGET) if grid else 1
    lengths = np.array([len(sample.input_ids) for sample in samples], np.int64)
    assert lengths.max(initial=0) <= max_seq_len, "a sample is longer than max_seq_len"
    batches = []
    for members in _balance(lengths, budget):
        chosen = [samples[i] for i in members]
        own = lengths[members]
        num_tokens = int(own.sum())
        num_positions = max(num_tokens, min(_round_up(num_tokens, step), budget))
        max_seqlen = max_seq_len if grid else int(own.max())
        fillers = np.arange(num_tokens + max_seqlen, num_positions, max_seqlen)
        ends = np.concatenate([np.cumsum(own), fillers])
        num_sequences = len(ends) + (num_positions > num_tokens)
        cu_seqlens = np.full(_round_up(num_sequences, step) + 1, num_positions, np.int32)
        cu_seqlens[0] = 0
        cu_seqlens[1 : len(ends) + 1] = ends
        starts = cu_seqlens[: len(own)].astype(np.int64)
        layout = _Layout(starts, own, (num_positions,), len(cu_seqlens) - 1, step)
        batch = _assemble(chosen, layout, pad_token_id)
        batch.max_seqlen = max_seqlen
        batch.cu_seqlens = torch.from_numpy(cu_seqlens)
        batches.append(batch)
    return batches


def pad_samples(
    samples: Sequence[Sample],
    *,
    max_samples: int,
    max_seq_len: int,
    pad_token_id: int,
    grid: bool,
    multiple: int = 1,
) -> list[Batch]:
    """Cut samples into padded microbatches of `max_samples` rows, in their order.

    On a `grid` each is `(max_samples, max_seq_len)`, and target rows are rounded up as in
    `pack_samples`; otherwise each is as long as its longest sample. With a `multiple` above 1, for
    CUDA graphs, that is rounded up to one, and all have `max_samples` rows. A row that only fills
    up attends to its first pad token, so that no softmax is over nothing.
    """
    step = max(SMALLEST_GRID, max_samples * max_seq_len // SHAPES_PER_BUDGET) if grid else 1
    batches = []
    for first in range(0, len(samples), max_samples):
        chosen = samples[first : first + max_samples]
        own = np.array([len(sample.input_ids) for sample in chosen], np.int64)
        assert own.max() <= max_seq_len, "a sample is longer than max_seq_len"
        rows = max_samples if grid or multiple > 1 else len(own)
        longest = max_seq_len if grid else int(own.max())
        seq = min(_round_up(longest, multiple), max(longest, max_seq_len))
        layout = _Layout(np.arange(len(own)) * seq, own, (rows, seq), rows, step)
        batch = _assemble(chosen, layout, pad_token_id)
        filled = np.ones(rows, np.int64)
        filled[: len(own)] = own
        mask = np.arange(seq) < filled[:, None]
        batch.attention_mask = torch.from_numpy(mask.astype(np.int64))
        batch.max_seqlen = seq
        batches.append(batch)
    return batches


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _balance(lengths: NDArray[np.int64], budget: int) -> list[NDArray[np.int64]]:
    """Indices of the fewest bins of at most `budget` tokens, about equally full.

    Longest processing time first: each sample goes to the emptiest bin so far. Where that
    overfills a bin, one bin more is tried; one a sample always fits.
    """
    if not len(lengths):
        return []
    longest_first = np.argsort(-lengths, kind="stable")
    num_bins = -(-int(lengths.sum()) // budget)
    while True:
        heap = [(0, index) for index in range(num_bins)]
        bin_of = np.empty(len(lengths), np.int64)
        for sample in longest_first:
            load, index = heap[0]
            bin_of[sample] = index
            heapq.heapreplace(heap, (load + int(lengths[sample]), index))
        if max(heap)[0] <= budget:
            return [np.flatnonzero(bin_of == index) for index in range(num_bins)]
        num_bins += 1


def _assemble(samples: Sequence[Sample], layout: _Layout, pad_token_id: int) -> Batch:
    """A batch with everything but the fields that tell packed from padded."""
    token_types = None
    if samples[0].token_type_ids is not None:
        token_types = layout.scatter([s.token_type_ids for s in samples], 0)  # type: ignore[misc]
    labels, target_positions, num_targets = _targets(samples, layout)
    return Batch(
        input_ids=layout.scatter([s.input_ids for s in samples], pad_token_id),
        labels=labels,
        num_targets=num_targets,
        num_tokens=int(layout.lengths.sum()),
        num_samples=len(samples),
        max_seqlen=0,
        token_type_ids=token_types,
        target_positions=target_positions,
    )


def _targets(
    samples: Sequence[Sample], layout: _Layout
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """`labels`, `target_positions` and the number of targets, by the kind of label."""
    first = samples[0]
    values = [sample.labels for sample in samples]
    if first.target_positions is not None:
        counts = [len(sample.target_positions) for sample in samples]  # type: ignore[arg-type]
        num_targets = sum(counts)
        num_rows = _round_up(max(num_targets, 1), layout.grid)  # never an empty tensor
        positions = np.zeros(num_rows, np.int64)
        within = np.concatenate([sample.target_positions for sample in samples])
        positions[:num_targets] = within + np.repeat(layout.starts, counts)
        labels = np.full(num_rows, IGNORE_INDEX, np.int64)
        labels[:num_targets] = np.concatenate(values)
        return torch.from_numpy(labels), torch.from_numpy(positions), num_targets
    if isinstance(first.labels, np.ndarray) and np.issubdtype(first.labels.dtype, np.integer):
        token_labels = layout.scatter(values, IGNORE_INDEX)  # type: ignore[arg-type]
        return token_labels, None, int((token_labels != IGNORE_INDEX).sum())
    if isinstance(first.labels, int | np.integer):
        classes = np.full(layout.num_rows, IGNORE_INDEX, np.int64)
        classes[: len(values)] = values
        return torch.from_numpy(classes), None, len(values)
    stacked = np.array(values, np.float32)  # (num_samples,) or (num_samples, num_labels)
    floats = np.full((layout.num_rows, *stacked.shape[1:]), np.nan, np.float32)
    floats[: len(stacked)] = stacked
    return torch.from_numpy(floats), None, stacked.size
