"""Dropout by counter: the mask is a function of (seed, row, column), so nobody has to store it.

The backward pass and activation recomputation draw the same mask from the same seed.
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
# ruff: noqa: N803

import triton
import triton.language as tl
from torch import Tensor

BITS = 24


def dropout_config(dropout_p: float, seed: Tensor | None) -> dict[str, float]:
    """Checks the arguments; what a kernel with dropout is compiled for.

    Of the `BITS`-bit numbers, those below `DROP_BELOW` drop their element; the others are scaled by
    `KEEP_SCALE`, so that the expectation is exact.
    """
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), not {dropout_p}")
    if dropout_p > 0.0 and (seed is None or seed.numel() != 1):
        raise ValueError("dropout needs a seed: an int64 tensor of one element")
    drop_below = round(dropout_p * (1 << BITS))
    return {"DROP_BELOW": drop_below, "KEEP_SCALE": 1.0 / (1.0 - drop_below / (1 << BITS))}


@triton.jit
def _mix(x):
    """A bijection of uint32 with low bias in every bit (Wellons, "lowbias32")."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def keep_mask(seed_ptr, row, col, DROP_BELOW: tl.constexpr):
    """Which elements stay; `row` and `col` are integer tensors that broadcast.

    A key for each row, then one hash for each element: Philox would cost more than
    the memory traffic it hides behind.
    """
    seed = tl.load(seed_ptr)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key = _mix(_mix(row.to(tl.uint32) ^ low) + high)
    bits = _mix(key ^ col.to(tl.uint32))
    return (bits >> 8).to(tl.int32) >= DROP_BELOW
