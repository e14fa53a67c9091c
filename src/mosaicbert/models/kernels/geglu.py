"""GeGLU with exact GELU and optional dropout, one pass over memory each way.

`gelu(x[:, :I]) * x[:, I:]` (Shazeer 2020, "GLU Variants Improve Transformer"). Only `x` is kept for
the backward pass, by `geglu_linear` too. It may be in fp8, times `WIDE`.
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
# ruff: noqa: N803

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosaicbert.models.kernels.dropout import dropout_config, keep_mask
from mosaicbert.models.kernels.eight import GATED, WIDE, eight_like, store_eight
from mosaicbert.models.kernels.ops import kernel_op, launch


@triton.jit
def _normal(x):
    """Cumulative distribution and density of the standard normal.

    Abramowitz and Stegun 7.1.26: within 1e-7 of erf, and its exponential is the density's.
    """
    e = tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(x))
    poly = 0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)
    poly = t * (0.127414796 + t * (-0.142248368 + t * poly))
    tail = poly * e
    return tl.where(x >= 0, 1.0 - tail, tail), 0.3989422804 * e


@triton.jit
def _geglu_forward_kernel(
    x_ptr, out_ptr, out8_ptr, seed_ptr, num_rows,
    X_SCALE: tl.constexpr, EIGHT: tl.constexpr, WIDTH: tl.constexpr, DROP_BELOW: tl.constexpr,
    KEEP_SCALE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    col_blocks = tl.cdiv(WIDTH, COLS)
    pid = tl.program_id(0)
    row = (pid // col_blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (pid % col_blocks) * COLS + tl.arange(0, COLS)[None, :]
    inside = (row < num_rows) & (col < WIDTH)
    at = row.to(tl.int64) * (2 * WIDTH) + col
    gate = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * X_SCALE
    up = tl.load(x_ptr + at + WIDTH, mask=inside, other=0.0).to(tl.float32) * X_SCALE
    cdf, _ = _normal(gate)
    out = gate * cdf * up
    if DROP_BELOW > 0:
        out = tl.where(keep_mask(seed_ptr, row, col, DROP_BELOW), out * KEEP_SCALE, 0.0)
    narrow_at = row.to(tl.int64) * WIDTH + col
    tl.store(out_ptr + narrow_at, out, mask=inside)
    if EIGHT > 0:
        store_eight(out8_ptr, narrow_at, out, inside, EIGHT, 448.0)


@triton.jit
def _geglu_backward_kernel(
    grad_ptr, x_ptr, dx_ptr, dx8_ptr, out_ptr, seed_ptr, num_rows,
    X_SCALE: tl.constexpr, EIGHT: tl.constexpr, WIDTH: tl.constexpr, DROP_BELOW: tl.constexpr,
    KEEP_SCALE: tl.constexpr, RECOMPUTE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    col_blocks = tl.cdiv(WIDTH, COLS)
    pid = tl.program_id(0)
    row = (pid // col_blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (pid % col_blocks) * COLS + tl.arange(0, COLS)[None, :]
    inside = (row < num_rows) & (col < WIDTH)
    at = row.to(tl.int64) * (2 * WIDTH) + col
    narrow_at = row.to(tl.int64) * WIDTH + col
    gate = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * X_SCALE
    up = tl.load(x_ptr + at + WIDTH, mask=inside, other=0.0).to(tl.float32) * X_SCALE
    grad = tl.load(grad_ptr + narrow_at, mask=inside, other=0.0).to(tl.float32)
    cdf, density = _normal(gate)
    gelu = gate * cdf
    out = gelu * up
    if DROP_BELOW > 0:
        keep = keep_mask(seed_ptr, row, col, DROP_BELOW)
        grad = tl.where(keep, grad * KEEP_SCALE, 0.0)
        out = tl.where(keep, out * KEEP_SCALE, 0.0)
    dgate, dup = grad * up * (cdf + gate * density), grad * gelu
    tl.store(dx_ptr + at, dgate, mask=inside)
    tl.store(dx_ptr + at + WIDTH, dup, mask=inside)
    if EIGHT:
        store_eight(dx8_ptr, at, dgate, inside, 1.0, 57344.0)
        store_eight(dx8_ptr, at + WIDTH, dup, inside, 1.0, 57344.0)
    if RECOMPUTE:
        tl.store(out_ptr + narrow_at, out, mask=inside)


ROWS, COLS = 1, 1024
"""Elements of one program."""


def _tiling(num_rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    cols = min(COLS, triton.next_power_of_2(width))
    grid = (triton.cdiv(num_rows, ROWS) * triton.cdiv(width, cols),)
    return grid, {"WIDTH": width, "ROWS": ROWS, "COLS": cols}


def _scale_of(x: Tensor) -> float:
    return 1 / WIDE if x.dtype == torch.float8_e4m3fn else 1.0


@kernel_op("geglu")
def geglu_forward(
    x: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    eight: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The op behind `geglu`; and its output in fp8, times `GATED`, if `eight` (else empty).

    `dtype`: of the output, where `x` is in fp8.
    """
    assert x.ndim == 2
    assert x.shape[1] % 2 == 0
    assert x.is_contiguous()
    num_rows, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(num_rows, width, dtype=dtype or x.dtype)
    out8 = eight_like(out, torch.float8_e4m3fn, eight)
    dropout = dropout_config(dropout_p, seed)
    if out.numel():
        grid, config = _tiling(num_rows, width)
        launch(
            _geglu_forward_kernel, grid, x, out, out8, out if seed is None else seed, num_rows,
            X_SCALE=_scale_of(x), EIGHT=GATED if eight else 0.0, **dropout, **config, num_warps=2,
        )  # fmt: skip
    return out, out8


@kernel_op("geglu_backward")
def geglu_backward(
    grad: Tensor,
    x: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    recompute: bool,
    eight: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `x`; `geglu(x)` once more if `recompute`, dx in fp8 if `eight` (else empty).

    They are of the type of `grad` where `x` is in fp8.
    """
    num_rows, width = x.shape[0], x.shape[1] // 2
    grad = grad.contiguous()
    dx, dx8, out = _empty_gradients(grad, x, recompute, eight)
    dropout = dropout_config(dropout_p, seed)
    if dx.numel():
        grid, config = _tiling(num_rows, width)
        launch(
            _geglu_backward_kernel, grid, grad, x, dx, dx8, out, dx if seed is None else seed,
            num_rows, X_SCALE=_scale_of(x), EIGHT=eight, **dropout, RECOMPUTE=recompute, **config,
            num_warps=8,
        )  # fmt: skip
    return dx, out, dx8


def _empty_gradients(
    grad: Tensor, x: Tensor, recompute: bool, eight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for dx, its 8-bit copy and the activation."""
    dtype = grad.dtype if x.dtype == torch.float8_e4m3fn else x.dtype
    dx = torch.empty_like(x, dtype=dtype)
    rows = x.shape[0] if recompute else 0
    return dx, eight_like(dx, torch.float8_e5m2, eight), dx.new_empty(rows, x.shape[1] // 2)


@geglu_forward.register_fake
def _(
    x: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    eight: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape[0], x.shape[1] // 2, dtype=dtype or x.dtype)
    return out, eight_like(out, torch.float8_e4m3fn, eight)


@geglu_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    recompute: bool,
    eight: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dx8, out = _empty_gradients(grad, x, recompute, eight)
    return dx, out, dx8


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.dropout_p, seed, *_ = inputs
    ctx.save_for_backward(x, seed)


def _backward(ctx, grad, _):
    x, seed = ctx.saved_tensors
    return geglu_backward(grad, x, ctx.dropout_p, seed, False)[0], None, None, None, None


geglu_forward.register_autograd(_backward, setup_context=_setup_context)


def geglu(x: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """`dropout(gelu(x[:, :I]) * x[:, I:])` for `x (n, 2 * I)`; `(n, I)`, in the dtype of `x`.

    `seed` (int64, one element, on the device of `x`) decides the dropout mask.
    """
    out: Tensor = geglu_forward(x.contiguous(), dropout_p, seed)[0]
    return out


class _GegluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, dropout_p: float, seed: Tensor | None
    ) -> Tensor:
        ctx.dropout_p = dropout_p
        ctx.save_for_backward(x, weight, seed)
        out: Tensor = geglu_forward(x, dropout_p, seed)[0] @ weight.to(x.dtype).T
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, seed = ctx.saved_tensors
        (grad,) = grads
        dx, out, _ = geglu_backward(grad @ weight.to(x.dtype), x, ctx.dropout_p, seed, True)
        return dx, (grad.T @ out).to(weight.dtype), None, None


def geglu_linear(
    x: Tensor, weight: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """`geglu(x, dropout_p, seed) @ weight.T`, without keeping `geglu(x)` for the backward pass.

    `x (n, 2 * I)`, `weight (hidden, I)`, taken in the dtype of `x`; `(n, hidden)`. The backward
    kernel makes the activation anew in the pass it makes anyway: a sixth more of its time for
    `n * I` elements less of memory.
    """
    out: Tensor = _GegluLinear.apply(  # type: ignore[no-untyped-call]
        x.contiguous(), weight, dropout_p, seed
    )
    return out
