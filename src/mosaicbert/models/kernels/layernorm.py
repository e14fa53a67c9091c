"""`LayerNorm(residual + dropout(x + x_bias))`, one pass over memory each way.

Post-norm wants the norm alone, twice (`residual_layer_norm`, here); pre-norm the sum and its norm,
by the same kernels (`sumnorm.py`). Kept for the backward pass: the inputs or the sum, which the
surrounding layers keep anyway, and mean and reciprocal deviation of each row. The backward kernel
reads the gradients of both outputs (one feeds a linear layer, the other the next residual), so that
no addition runs on its own, and sums the gradients of weight, bias and x_bias in registers.
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
# ruff: noqa: N803

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosaicbert.models.kernels.dropout import dropout_config, keep_mask
from mosaicbert.models.kernels.eight import NORMED, eight_like, store_eight
from mosaicbert.models.kernels.ops import kernel_op, launch


@triton.jit
def _summed(
    x_ptr, residual_ptr, x_bias, seed_ptr, row, col, inside,
    WIDTH: tl.constexpr, DROP_BELOW: tl.constexpr, KEEP_SCALE: tl.constexpr,
):  # fmt: skip
    """The sum residual + dropout(x + x_bias) of some rows, in float32."""
    at = row.to(tl.int64) * WIDTH + col
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + x_bias
    residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if DROP_BELOW > 0:
        keep = inside & keep_mask(seed_ptr, row, col, DROP_BELOW)
        x = tl.where(keep, x * KEEP_SCALE, 0.0)
    return residual + x


@triton.jit
def norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, x_bias_ptr, seed_ptr, out_ptr, out8_ptr, sum_ptr,
    mean_ptr, rstd_ptr, num_rows,
    WIDTH: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr, X_BIAS: tl.constexpr,
    KEEP_SUM: tl.constexpr, EIGHT: tl.constexpr, DROP_BELOW: tl.constexpr, KEEP_SCALE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Without `ADD`, the norm of `residual` alone. `KEEP_SUM` also writes what is normed."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, col = rows[:, None], tl.arange(0, COLS)[None, :]
    in_row = col < WIDTH
    inside = (row < num_rows) & in_row
    x_bias = 0.0
    if X_BIAS:
        x_bias = tl.load(x_bias_ptr + col, mask=in_row, other=0.0).to(tl.float32)
    at = row.to(tl.int64) * WIDTH + col
    if ADD:
        z = _summed(
            x_ptr, residual_ptr, x_bias, seed_ptr, row, col, inside, WIDTH, DROP_BELOW,
            KEEP_SCALE,
        )  # fmt: skip
    else:
        z = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if KEEP_SUM:  # the norm is that of the sum as it is kept, which the backward pass reads
        kept = z.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, kept, mask=inside)
        z = kept.to(tl.float32)
    mean = tl.sum(z, 1) / WIDTH
    centred = tl.where(inside, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + EPS)
    weight = tl.load(weight_ptr + col, mask=in_row, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=in_row, other=0.0).to(tl.float32)
    out = centred * rstd[:, None] * weight + bias
    tl.store(out_ptr + at, out, mask=inside)
    if EIGHT > 0:
        store_eight(out8_ptr, at, out, inside, EIGHT, 448.0)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit
def norm_backward_kernel(
    grad_ptr, other_grad_ptr, x_ptr, residual_ptr, weight_ptr, x_bias_ptr, seed_ptr, mean_ptr,
    rstd_ptr, dx_ptr, dx8_ptr, dresidual_ptr, partial_ptr, num_rows,
    WIDTH: tl.constexpr, OTHER_GRAD: tl.constexpr, OF_SUM: tl.constexpr, X_BIAS: tl.constexpr,
    SPLIT: tl.constexpr, EIGHT: tl.constexpr, DROP_BELOW: tl.constexpr, KEEP_SCALE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`SPLIT`: dx is not simply dresidual, so it is written beside it.

    `OF_SUM`: `residual` is the sum already, and `other_grad` its gradient, not that of the norm.
    """
    programs = tl.num_programs(0)
    col = tl.arange(0, COLS)[None, :]
    in_row = col < WIDTH
    weight = tl.load(weight_ptr + col, mask=in_row, other=0.0).to(tl.float32)
    x_bias = 0.0
    if X_BIAS and not OF_SUM:
        x_bias = tl.load(x_bias_ptr + col, mask=in_row, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    dbias = tl.zeros([ROWS, COLS], tl.float32)
    dx_bias = tl.zeros([ROWS, COLS], tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, num_rows, programs * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        row = rows[:, None]
        inside = (row < num_rows) & in_row
        at = row.to(tl.int64) * WIDTH + col
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        other = 0.0
        if OTHER_GRAD:
            other = tl.load(other_grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if OF_SUM:
            z = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        else:
            grad += other
            z = _summed(
                x_ptr, residual_ptr, x_bias, seed_ptr, row, col, inside, WIDTH,
                DROP_BELOW, KEEP_SCALE,
            )  # fmt: skip
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        normed = tl.where(inside, (z - mean) * rstd, 0.0)
        dweight += grad * normed
        dbias += grad
        scaled = grad * weight
        along = (tl.sum(scaled * normed, 1) / WIDTH)[:, None]
        level = (tl.sum(scaled, 1) / WIDTH)[:, None]
        dz = (scaled - level - normed * along) * rstd
        if OF_SUM:
            dz += other
        tl.store(dresidual_ptr + at, dz, mask=inside)
        if DROP_BELOW > 0:
            keep = inside & keep_mask(seed_ptr, row, col, DROP_BELOW)
            dz = tl.where(keep, dz * KEEP_SCALE, 0.0)
        if SPLIT:
            tl.store(dx_ptr + at, dz, mask=inside)
        if EIGHT:
            store_eight(dx8_ptr, at, dz, inside, 1.0, 57344.0)
        if X_BIAS:
            dx_bias += tl.where(inside, dz, 0.0)
    partial_ptrs = partial_ptr + tl.program_id(0) * 3 * WIDTH + tl.arange(0, COLS)
    in_row_flat = tl.arange(0, COLS) < WIDTH
    tl.store(partial_ptrs, tl.sum(dweight, 0), mask=in_row_flat)
    tl.store(partial_ptrs + WIDTH, tl.sum(dbias, 0), mask=in_row_flat)
    if X_BIAS:
        tl.store(partial_ptrs + 2 * WIDTH, tl.sum(dx_bias, 0), mask=in_row_flat)


FORWARD = {"ROWS": 4, "num_warps": 4}
BACKWARD = {"ROWS": 1, "STAGES": 3, "num_warps": 4}
PROGRAMS_PER_PROCESSOR = 4


def num_programs(device: torch.device, num_rows: int) -> int:
    """Programs of the backward kernel: each keeps running sums over many rows."""
    if device.type != "cuda":
        return min(2, num_rows)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(processors * PROGRAMS_PER_PROCESSOR, num_rows)


@kernel_op("residual_layer_norm")
def layer_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None, eps: float,
    dropout_p: float, seed: Tensor | None, eight: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, mean and reciprocal deviation of each row; output in fp8 if `eight` (else empty)."""
    assert x.ndim == 2
    assert x.shape == residual.shape
    assert x.is_contiguous()
    assert residual.is_contiguous()
    num_rows, width = x.shape
    out = torch.empty_like(residual)
    out8 = eight_like(out, torch.float8_e4m3fn, eight)
    mean = x.new_empty(num_rows, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    dropout = dropout_config(dropout_p, seed)
    if num_rows:
        launch(
            norm_forward_kernel, (triton.cdiv(num_rows, FORWARD["ROWS"]),), x, residual, weight,
            bias, x_bias, x if seed is None else seed, out, out8, out, mean, rstd, num_rows,
            WIDTH=width, EPS=eps, ADD=True, X_BIAS=x_bias is not None, KEEP_SUM=False,
            EIGHT=NORMED if eight else 0.0, **dropout, COLS=triton.next_power_of_2(width),
            **FORWARD,
        )  # fmt: skip
    return out, mean, rstd, out8


@kernel_op("residual_layer_norm_backward")
def layer_norm_backward(
    grad: Tensor, other_grad: Tensor | None, x: Tensor, residual: Tensor, weight: Tensor,
    x_bias: Tensor | None, mean: Tensor, rstd: Tensor, dropout_p: float, seed: Tensor | None,
    eight: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients: dx (empty if it is dresidual), dresidual, `(3, width)` dweight, dbias, dx_bias.

    Last dx in fp8, if `eight` (else empty).
    """
    num_rows, width = x.shape
    grad = grad.contiguous()
    other_grad = None if other_grad is None else other_grad.contiguous()
    dropout = dropout_config(dropout_p, seed)
    split = dropout_p > 0 or x.dtype != residual.dtype
    dx, dresidual = torch.empty_like(x) if split else x.new_empty(0), torch.empty_like(residual)
    dx8 = eight_like(x, torch.float8_e5m2, eight)
    if not num_rows:
        return dx, dresidual, mean.new_zeros(3, width), dx8
    programs = num_programs(x.device, num_rows)
    partial = mean.new_empty(programs, 3, width)
    launch(
        norm_backward_kernel, (programs,), grad, other_grad, x, residual, weight, x_bias,
        x if seed is None else seed, mean, rstd, dx, dx8, dresidual, partial, num_rows, WIDTH=width,
        OTHER_GRAD=other_grad is not None, OF_SUM=False, X_BIAS=x_bias is not None, SPLIT=split,
        EIGHT=eight, **dropout, COLS=triton.next_power_of_2(width), **BACKWARD,
    )  # fmt: skip
    return dx, dresidual, partial.sum(0), dx8


@layer_norm_forward.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None, eps: float,
    dropout_p: float, seed: Tensor | None, eight: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    statistic = x.new_empty(x.shape[0], dtype=torch.float32)
    out8 = eight_like(residual, torch.float8_e4m3fn, eight)
    return torch.empty_like(residual), statistic, torch.empty_like(statistic), out8


@layer_norm_backward.register_fake
def _(
    grad: Tensor, other_grad: Tensor | None, x: Tensor, residual: Tensor, weight: Tensor,
    x_bias: Tensor | None, mean: Tensor, rstd: Tensor, dropout_p: float, seed: Tensor | None,
    eight: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    split = dropout_p > 0 or x.dtype != residual.dtype
    dx = torch.empty_like(x) if split else x.new_empty(0)
    dx8 = eight_like(x, torch.float8_e5m2, eight)
    return dx, torch.empty_like(residual), mean.new_empty(3, x.shape[1]), dx8


class _ResidualLayerNorm(torch.autograd.Function):
    """Returns its output once or twice; twice, so that two gradients arrive apart."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor,
        x_bias: Tensor | None, eps: float, dropout_p: float, seed: Tensor | None, times: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        out, mean, rstd, _ = layer_norm_forward(
            x, residual, weight, bias, x_bias, eps, dropout_p, seed
        )
        ctx.dropout_p = dropout_p
        ctx.save_for_backward(x, residual, weight, bias, x_bias, mean, rstd, seed)
        ctx.set_materialize_grads(False)
        return (out, out.view_as(out)) if times == 2 else (out,)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, residual, weight, bias, x_bias, mean, rstd, seed = ctx.saved_tensors
        first, *others = [grad for grad in grads if grad is not None]
        dx, dresidual, sums, _ = layer_norm_backward(
            first, others[0] if others else None, x, residual, weight, x_bias, mean, rstd,
            ctx.dropout_p, seed,
        )  # fmt: skip
        dx = dx if dx.numel() else dresidual
        dx_bias = None if x_bias is None else sums[2].to(x_bias.dtype)
        dweight, dbias = sums[0].to(weight.dtype), sums[1].to(bias.dtype)
        return dx, dresidual, dweight, dbias, dx_bias, None, None, None, None


def residual_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None = None,
    eps: float = 1e-12, dropout_p: float = 0.0, seed: Tensor | None = None, times: int = 2,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`LayerNorm(residual + dropout(x + x_bias))`, twice: two names of the same values.

    Give one to the next layer and the other to the next residual: their gradients are then added
    inside the backward kernel. Ask for it once (`times`) where there is one reader, or where the
    other is outside of the compiled graph: compiled code would fill a gradient with zeros for it.
    `x`, `residual` `(n, hidden)`; `weight`, `bias`, `x_bias` `(hidden,)`; statistics and sums in
    float32, output in the dtype of `residual`. `x_bias` is the bias of the linear layer before,
    whose gradient costs nothing here. `seed` as in `geglu`.
    """
    out: tuple[Tensor, ...] = _ResidualLayerNorm.apply(  # type: ignore[no-untyped-call]
        x.contiguous(), residual.contiguous(), weight, bias, x_bias, eps, dropout_p, seed, times
    )
    return out
