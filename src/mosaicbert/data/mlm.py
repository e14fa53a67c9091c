"""Masking for masked language modelling (BERT, Devlin et al. 2019), without a generator's state.

Every draw is a hash of (seed, epoch, position of the sample in the epoch, position of the token),
so masks depend neither on workers and ranks nor on where a run resumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mosaicbert.data.hashing import GOLDEN, hash_key, splitmix64, unit_interval
from mosaicbert.data.packing import Sample

SHARE_MASKED = 0.8  # of the chosen tokens: these become the mask token,
SHARE_RANDOM = 0.1  # these another token, and the rest stay as they are


@dataclass(frozen=True, slots=True)
class Masker:
    """Chooses tokens to predict, and hides them.

    Tokens of `special_ids` are never chosen, and never drawn as random tokens.
    """

    seed: int
    mask_token_id: int
    special_ids: NDArray[np.int64]
    vocab_size: int

    def mask(
        self,
        ids: Sequence[NDArray[np.integer]],
        positions: NDArray[np.int64],
        epoch: int,
        probability: float | NDArray[np.float64],
    ) -> list[Sample]:
        """Samples with 80 % of the chosen tokens masked, 10 % random and 10 % kept.

        Args:
            ids: the tokens of each sample, special ones included; left as they are.
            positions: `(len(ids),)` of the samples in the epoch.
            epoch: passes over the data so far; 0 in every evaluation.
            probability: that a token is chosen; one for all, or one for each sample.
        """
        if not len(ids):
            return []
        lengths = np.array([len(one) for one in ids], np.int64)
        ends = np.cumsum(lengths)
        flat = np.concatenate(ids).astype(np.int32)
        within = np.arange(len(flat)) - np.repeat(ends - lengths, lengths)

        sample_keys = splitmix64(positions.astype(np.uint64) ^ hash_key(self.seed, epoch))
        keys = np.repeat(sample_keys, lengths) + within.astype(np.uint64) * GOLDEN
        share = np.broadcast_to(np.asarray(probability, np.float64), lengths.shape)
        may_choose = np.ones(self.vocab_size, bool)
        may_choose[self.special_ids] = False
        chosen = np.flatnonzero(
            (unit_interval(splitmix64(keys)) < np.repeat(share, lengths)) & may_choose[flat]
        )

        true_ids = flat[chosen]
        second = splitmix64(splitmix64(keys[chosen]))
        kind = unit_interval(second)
        ordinary = np.flatnonzero(may_choose)
        random_ids = ordinary[splitmix64(second) % np.uint64(len(ordinary))]
        flat[chosen] = np.select(
            [kind < SHARE_MASKED, kind < SHARE_MASKED + SHARE_RANDOM],
            [self.mask_token_id, random_ids],
            true_ids,
        )

        cuts = np.searchsorted(chosen, ends)
        begins, firsts = (ends - lengths).tolist(), [0, *cuts[:-1].tolist()]
        target_positions = within[chosen]
        return [
            Sample(flat[begin:end], true_ids[first:cut], target_positions[first:cut])
            for begin, end, first, cut in zip(
                begins, ends.tolist(), firsts, cuts.tolist(), strict=True
            )
        ]


def interpolate(
    probability: float | Sequence[float], samples_done: NDArray[np.int64], total_samples: int | None
) -> float | NDArray[np.float64]:
    """The masking probability of each sample: constant, or moved linearly over the run.

    Args:
        probability: one value, or the first and the last of a line.
        samples_done: `(n,)`, how many samples of the run precede each.
        total_samples: of the whole run; with None a line stays at its last value.
    """
    if isinstance(probability, int | float):
        return float(probability)
    first, last = probability[0], probability[-1]
    if total_samples is None:
        return float(last)
    return first + (last - first) * np.clip(samples_done / total_samples, 0.0, 1.0)
