"""Masks: the rates of BERT, never special tokens, the same whoever makes them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mosaicbert.data.hashing import splitmix64
from mosaicbert.data.mlm import Masker, interpolate

VOCAB, MASK, CLS, SEP = 1000, 4, 2, 3
MASKER = Masker(17, MASK, np.array([0, 1, CLS, SEP, MASK]), VOCAB)


def text(length: int, token: int = 7) -> NDArray[np.int32]:
    return np.array([CLS, *[token] * length, SEP], np.int32)


@pytest.mark.parametrize("probability", [0.15, 0.3])
def test_rates(probability: float) -> None:
    """Within five standard deviations of 80/10/10 of `probability`, token by token."""
    ids = [text(126)] * 4000
    samples = MASKER.mask(ids, np.arange(4000), 0, probability)
    num_tokens = 126 * 4000

    def near(count: int, share: float, of: int) -> bool:
        return abs(count - share * of) < 5 * np.sqrt(of * share * (1 - share))

    after = np.stack([sample.input_ids for sample in samples])
    num_chosen = sum(len(sample.labels) for sample in samples)  # type: ignore[arg-type]
    assert near(num_chosen, probability, num_tokens)
    masked, changed = int((after == MASK).sum()), int((after != np.stack(ids)).sum())
    assert near(masked, 0.8, num_chosen)
    assert near(changed - masked, 0.1 * (VOCAB - 6) / (VOCAB - 5), num_chosen)
    # Every place of a sample is as likely as any other, and the draws are not alike.
    per_place = np.zeros(128)
    for sample in samples:
        assert sample.target_positions is not None
        per_place[sample.target_positions] += 1
    spread = np.sqrt(4000 * probability * (1 - probability))
    assert (np.abs(per_place[1:-1] - 4000 * probability) < 5 * spread).all()
    assert 0.5 < per_place[1:-1].var() / spread**2 < 1.6


def test_random_tokens_are_uniform_and_ordinary() -> None:
    samples = MASKER.mask([text(500)] * 1000, np.arange(1000), 0, 1.0)
    drawn = np.concatenate([sample.input_ids for sample in samples])
    drawn = drawn[~np.isin(drawn, [7, CLS, SEP, MASK])]
    counts = np.bincount(drawn, minlength=VOCAB)
    assert not counts[MASKER.special_ids].any()
    ordinary = np.delete(counts, [*MASKER.special_ids, 7])
    mean = len(drawn) / len(ordinary)
    assert len(drawn) == pytest.approx(50_000, rel=0.03)
    assert (np.abs(ordinary - mean) < 6 * np.sqrt(mean)).all()


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=20),
    epoch=st.integers(0, 5),
    cut=st.integers(0, 20),
)
def test_masks_do_not_depend_on_company(lengths: list[int], epoch: int, cut: int) -> None:
    ids = [text(n, 10 + i) for i, n in enumerate(lengths)]
    before = [one.copy() for one in ids]
    positions = np.arange(len(ids)) * 3 + 5
    together = MASKER.mask(ids, positions, epoch, 0.3)
    apart = [
        *MASKER.mask(ids[:cut], positions[:cut], epoch, 0.3),
        *MASKER.mask(ids[cut:], positions[cut:], epoch, 0.3),
    ]
    assert len(together) == len(apart) == len(ids)
    for first, second, original in zip(together, apart, before, strict=True):
        assert first.target_positions is not None
        assert second.target_positions is not None
        np.testing.assert_array_equal(first.input_ids, second.input_ids)
        np.testing.assert_array_equal(first.target_positions, second.target_positions)
        np.testing.assert_array_equal(first.labels, original[first.target_positions])
        untouched = np.delete(np.arange(len(original)), first.target_positions)
        np.testing.assert_array_equal(first.input_ids[untouched], original[untouched])
        assert not np.isin(first.labels, MASKER.special_ids).any()
    for one, original in zip(ids, before, strict=True):
        np.testing.assert_array_equal(one, original)


def test_seed_epoch_and_position_matter() -> None:
    def chosen(seed: int, position: int, epoch: int) -> list[int]:
        masker = Masker(seed, MASK, MASKER.special_ids, VOCAB)
        (sample,) = masker.mask([text(200)], np.array([position]), epoch, 0.3)
        assert sample.target_positions is not None
        return sample.target_positions.tolist()  # type: ignore[no-any-return]

    base = chosen(17, 0, 0)
    assert chosen(17, 0, 0) == base
    for other in (chosen(18, 0, 0), chosen(17, 1, 0), chosen(17, 0, 1)):
        assert other != base
        assert 0.1 < len({*other} & {*base}) / len(base) < 0.5


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0), (1.0, 1)])
def test_extremes(probability: float, share: int) -> None:
    (sample,) = MASKER.mask([text(50)], np.array([0]), 0, probability)
    assert len(sample.labels) == 50 * share  # type: ignore[arg-type]


def test_a_probability_for_each_sample() -> None:
    samples = MASKER.mask([text(50), text(50)], np.array([0, 1]), 0, np.array([0.0, 1.0]))
    assert [len(sample.labels) for sample in samples] == [0, 50]  # type: ignore[arg-type]


def test_interpolation() -> None:
    at = np.array([0, 50, 100, 200])
    assert interpolate(0.15, at, 100) == 0.15
    np.testing.assert_allclose(interpolate([0.3, 0.15], at, 100), [0.3, 0.225, 0.15, 0.15])
    assert interpolate([0.3, 0.15], at, None) == 0.15


def test_splitmix64_reference_values() -> None:
    """The first outputs of the published generator with state 1234567."""
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * golden) % 2**64 for i in range(3)], np.uint64)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert splitmix64(states).tolist() == expected
