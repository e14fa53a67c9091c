"""Random numbers as hashes of counters: no state to carry, the same on every machine."""

import numpy as np
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""The odd number nearest 2^64 divided by the golden ratio."""


def splitmix64(x: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """A bijection of 64-bit integers that looks random (Steele, Lea and Flood 2014)."""
    mixed = np.atleast_1d(x) + GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def hash_key(*counters: int) -> np.uint64:
    """One 64-bit key for a tuple of integers from 0 on, such as (seed, epoch)."""
    key = np.zeros(1, np.uint64)
    for counter in counters:
        key = splitmix64(key ^ np.uint64(counter % 2**64))
    return np.uint64(key[0])


def unit_interval(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniform numbers of [0, 1) from the upper 53 bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
