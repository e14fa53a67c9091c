"""GeGLU with exact GELU and optional dropout, one pass over memory each way.

`gelu(x[:, :I]) * x[:, I:]` (Shazeer 2020, "GLU Variants Improve Transformer"). Only `x` is kept for
the backward pass.
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
# ruff: noqa: N803, N806

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosaicbert.models.kernels.dropout import BITS, keep_mask, threshold


@triton.jit
def _normal(x):
    """Cumulative distribution and density of the standard normal.

    Abramowitz and Stegun 7.1.26: within 1e-7 of erf, and its exponential is the density's.
    """
    e = tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(x))
    poly = t * (
        0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
    )
    tail = poly * e
    return tl.where(x >= 0, 1.0 - tail, tail), 0.3989422804 * e


@triton.jit
def _forward_kernel(
    x_ptr, out_ptr, seed_ptr, num_rows, width, drop_below, keep_scale,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    col_blocks = tl.cdiv(width, COLS)
    pid = tl.program_id(0)
    row = (pid // col_blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (pid % col_blocks) * COLS + tl.arange(0, COLS)[None, :]
    inside = (row < num_rows) & (col < width)
    at = row.to(tl.int64) * (2 * width) + col
    gate = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
    cdf, _ = _normal(gate)
    out = gate * cdf * up
    if DROPOUT:
        out = tl.where(keep_mask(seed_ptr, row, col, drop_below), out * keep_scale, 0.0)
    tl.store(out_ptr + row.to(tl.int64) * width + col, out, mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, dx_ptr, out_ptr, seed_ptr, num_rows, width, drop_below, keep_scale,
    DROPOUT: tl.constexpr, RECOMPUTE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    col_blocks = tl.cdiv(width, COLS)
    pid = tl.program_id(0)
    row = (pid // col_blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (pid % col_blocks) * COLS + tl.arange(0, COLS)[None, :]
    inside = (row < num_rows) & (col < width)
    at = row.to(tl.int64) * (2 * width) + col
    narrow_at = row.to(tl.int64) * width + col
    gate = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + narrow_at, mask=inside, other=0.0).to(tl.float32)
    cdf, density = _normal(gate)
    gelu = gate * cdf
    out = gelu * up
    if DROPOUT:
        keep = keep_mask(seed_ptr, row, col, drop_below)
        grad = tl.where(keep, grad * keep_scale, 0.0)
        out = tl.where(keep, out * keep_scale, 0.0)
    tl.store(dx_ptr + at, grad * up * (cdf + gate * density), mask=inside)
    tl.store(dx_ptr + at + width, grad * gelu, mask=inside)
    if RECOMPUTE:
        tl.store(out_ptr + narrow_at, out, mask=inside)


ROWS, COLS, NUM_WARPS = 1, 1024, 4
"""Elements of one program."""


def _launch(num_rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    cols = min(COLS, triton.next_power_of_2(width))
    grid = (triton.cdiv(num_rows, ROWS) * triton.cdiv(width, cols),)
    return grid, {"ROWS": ROWS, "COLS": cols, "num_warps": NUM_WARPS}


@torch.library.custom_op("mosaicbert::geglu", mutates_args=())
def geglu_forward(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """The op behind `geglu`."""
    assert x.ndim == 2 and x.shape[1] % 2 == 0 and x.is_contiguous()
    num_rows, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(num_rows, width)
    drop_below = threshold(dropout_p, seed)
    if out.numel():
        grid, config = _launch(num_rows, width)
        _forward_kernel[grid](
            x, out, seed if drop_below else x, num_rows, width, drop_below,
            1.0 / (1.0 - drop_below / (1 << BITS)), DROPOUT=drop_below > 0, **config,
        )  # fmt: skip
    return out


@torch.library.custom_op("mosaicbert::geglu_backward", mutates_args=())
def geglu_backward(
    grad: Tensor, x: Tensor, dropout_p: float, seed: Tensor | None, recompute: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of `x`, and `geglu(x)` once more if `recompute` (else an empty tensor)."""
    num_rows, width = x.shape[0], x.shape[1] // 2
    grad = grad.contiguous()
    dx = torch.empty_like(x)
    out = x.new_empty(num_rows, width) if recompute else x.new_empty(0)
    drop_below = threshold(dropout_p, seed)
    if dx.numel():
        grid, config = _launch(num_rows, width)
        _backward_kernel[grid](
            grad, x, dx, out, seed if drop_below else x, num_rows, width, drop_below,
            1.0 / (1.0 - drop_below / (1 << BITS)), DROPOUT=drop_below > 0, RECOMPUTE=recompute,
            **config,
        )  # fmt: skip
    return dx, out


@geglu_forward.register_fake
def _(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@geglu_backward.register_fake
def _(
    grad: Tensor, x: Tensor, dropout_p: float, seed: Tensor | None, recompute: bool
) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape[0], x.shape[1] // 2) if recompute else x.new_empty(0)
    return torch.empty_like(x), out


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(x, seed)


def _backward(ctx, grad):
    x, seed = ctx.saved_tensors
    return geglu_backward(grad, x, ctx.dropout_p, seed, False)[0], None, None


geglu_forward.register_autograd(_backward, setup_context=_setup_context)


def geglu(x: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """`dropout(gelu(x[:, :I]) * x[:, I:])` for `x (n, 2 * I)`; `(n, I)`, in the dtype of `x`.

    `seed` (int64, one element, on the device of `x`) decides the dropout mask.
    """
    return geglu_forward(x.contiguous(), dropout_p, seed)
