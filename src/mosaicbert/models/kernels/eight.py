"""8-bit floats beside 16-bit ones: what the kernels write for matrix products in fp8.

Activations are float8_e4m3 with a fixed scale: they come out of a LayerNorm, an average of values
or a gated unit, whose size hardly moves. Gradients are float8_e5m2, whose 30 powers of two need
none where the backward pass is that of a summed loss (`train/backward.py`).
Source of the two formats and of their uses: Micikevicius et al. 2022, "FP8 Formats for Deep
Learning".
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

NORMED = 8.0
"""Scale of what a LayerNorm or attention gives out: clipped at 56."""
GATED = 2.0
"""Scale of what a gated unit gives out: clipped at 224."""
WIDE = 8.0
"""Scale of what goes into a gated unit, where that is in 8 bits: clipped at 56."""
HIGHEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def eight_like(x: Tensor, dtype: torch.dtype, wanted: bool) -> Tensor:
    """Room for an 8-bit copy of `x`; empty where none is wanted."""
    return torch.empty_like(x, dtype=dtype) if wanted else x.new_empty(0, dtype=dtype)


CLIPS: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether to clip before the conversion: a GPU's clips by itself, the interpreter's does not."""


@triton.jit
def store_eight(ptr, at, values, mask, SCALE: tl.constexpr, HIGHEST: tl.constexpr):
    """`values * SCALE`, clipped, as the 8-bit floats that `ptr` points to."""
    values = values * SCALE
    if CLIPS:
        values = tl.minimum(tl.maximum(values, -HIGHEST), HIGHEST)
    tl.store(ptr + at, values.to(ptr.dtype.element_ty), mask=mask)
