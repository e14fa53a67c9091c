"""Pre-norm's `s = residual + dropout(x + x_bias)` and `LayerNorm(s)`: kernels of `layernorm.py`."""
# mypy: disable-error-code="untyped-decorator"

from typing import Any

import torch
import triton
from torch import Tensor

from mosaicbert.models.kernels.dropout import dropout_config
from mosaicbert.models.kernels.eight import NORMED, eight_like
from mosaicbert.models.kernels.layernorm import (
    BACKWARD,
    FORWARD,
    norm_backward_kernel,
    norm_forward_kernel,
    num_programs,
)
from mosaicbert.models.kernels.ops import kernel_op, launch


@kernel_op("sum_layer_norm")
def sum_norm_forward(
    x: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None,
    eps: float, dropout_p: float, seed: Tensor | None, eight: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum (empty without `x`: it is `residual`), its norm, mean and reciprocal deviation.

    Last the norm in fp8, if `eight` (else empty).
    """
    assert residual.ndim == 2
    assert residual.is_contiguous()
    assert x is None or (x.shape == residual.shape and x.is_contiguous())
    num_rows, width = residual.shape
    out = torch.empty_like(residual)
    out8 = eight_like(out, torch.float8_e4m3fn, eight)
    total = residual.new_empty(0) if x is None else torch.empty_like(residual)
    mean = residual.new_empty(num_rows, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    dropout = dropout_config(dropout_p, seed)
    if num_rows:
        launch(
            norm_forward_kernel, (triton.cdiv(num_rows, FORWARD["ROWS"]),), x, residual, weight,
            bias, x_bias, residual if seed is None else seed, out, out8, total, mean, rstd,
            num_rows, WIDTH=width, EPS=eps, ADD=x is not None, X_BIAS=x_bias is not None,
            KEEP_SUM=x is not None, EIGHT=NORMED if eight else 0.0, **dropout,
            COLS=triton.next_power_of_2(width), **FORWARD,
        )  # fmt: skip
    return total, out, mean, rstd, out8


@kernel_op("sum_layer_norm_backward")
def sum_norm_backward(
    grad: Tensor, sum_grad: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor,
    rstd: Tensor, has_x_bias: bool, dropout_p: float, seed: Tensor | None, eight: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients: dx (empty if it is dresidual), dresidual, `(3, width)` dweight, dbias, dx_bias.

    Last dx in fp8, if `eight` (else empty).
    """
    num_rows, width = total.shape
    grad = grad.contiguous()
    sum_grad = None if sum_grad is None else sum_grad.contiguous()
    dropout = dropout_config(dropout_p, seed)
    dx = torch.empty_like(total) if dropout_p > 0 else total.new_empty(0)
    dresidual, dx8 = torch.empty_like(total), eight_like(total, torch.float8_e5m2, eight)
    if not num_rows:
        return dx, dresidual, mean.new_zeros(3, width), dx8
    programs = num_programs(total.device, num_rows)
    partial = mean.new_empty(programs, 3, width)
    launch(
        norm_backward_kernel, (programs,), grad, sum_grad, total, total, weight, None,
        total if seed is None else seed, mean, rstd, dx, dx8, dresidual, partial, num_rows,
        WIDTH=width, OTHER_GRAD=sum_grad is not None, OF_SUM=True, X_BIAS=has_x_bias,
        SPLIT=dropout_p > 0, EIGHT=eight, **dropout, COLS=triton.next_power_of_2(width), **BACKWARD,
    )  # fmt: skip
    return dx, dresidual, partial.sum(0), dx8


@sum_norm_forward.register_fake
def _(
    x: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None,
    eps: float, dropout_p: float, seed: Tensor | None, eight: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    statistic = residual.new_empty(residual.shape[0], dtype=torch.float32)
    total = residual.new_empty(0) if x is None else torch.empty_like(residual)
    out, out8 = torch.empty_like(residual), eight_like(residual, torch.float8_e4m3fn, eight)
    return total, out, statistic, torch.empty_like(statistic), out8


@sum_norm_backward.register_fake
def _(
    grad: Tensor, sum_grad: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor,
    rstd: Tensor, has_x_bias: bool, dropout_p: float, seed: Tensor | None, eight: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx = torch.empty_like(total) if dropout_p > 0 else total.new_empty(0)
    dx8 = eight_like(total, torch.float8_e5m2, eight)
    return dx, torch.empty_like(total), mean.new_empty(3, total.shape[1]), dx8


class _SumLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor,
        x_bias: Tensor | None, eps: float, dropout_p: float, seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        total, out, mean, rstd, _ = sum_norm_forward(
            x, residual, weight, bias, x_bias, eps, dropout_p, seed
        )
        total = residual.view_as(residual) if x is None else total
        ctx.dropout_p, ctx.has_x, ctx.has_x_bias = dropout_p, x is not None, x_bias is not None
        ctx.save_for_backward(total, weight, bias, x_bias, mean, rstd, seed)
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, bias, x_bias, mean, rstd, seed = ctx.saved_tensors
        sum_grad, grad = grads
        if grad is None:
            grad = torch.zeros_like(total)
        dx, dresidual, sums, _ = sum_norm_backward(
            grad, sum_grad, total, weight, mean, rstd, ctx.has_x_bias, ctx.dropout_p, seed
        )
        dx_of_x = None
        if ctx.has_x:
            dx_of_x = dx if ctx.dropout_p > 0 else dresidual
        dx_bias = sums[2].to(x_bias.dtype) if ctx.has_x_bias else None
        dweight, dbias = sums[0].to(weight.dtype), sums[1].to(bias.dtype)
        return dx_of_x, dresidual, dweight, dbias, dx_bias, None, None, None


def sum_layer_norm(
    x: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor,
    x_bias: Tensor | None = None, eps: float = 1e-12, dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`s = residual + dropout(x + x_bias)` and `LayerNorm(s)`; without `x`, s is `residual`.

    Both have gradients of their own, which the backward kernel adds. Take the next residual from
    here, not from `residual` itself. Shapes and types as in `residual_layer_norm`; `x` and
    `residual` are of one type.
    """
    if x is not None:
        x = x.to(residual.dtype).contiguous()
    total, out = _SumLayerNorm.apply(  # type: ignore[no-untyped-call]
        x, residual.contiguous(), weight, bias, x_bias, eps, dropout_p, seed
    )
    return total, out
