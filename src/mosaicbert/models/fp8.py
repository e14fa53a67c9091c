"""The matrix products of Mosaic BERT's layers in fp8, for `precision: fp8`.

Forward products and gradients of inputs take 8-bit operands and add up in float32; the gradients of
weights stay in bf16, as do the residual stream, the last layer's masked rows and the head.
Activations and gradients get their 8-bit copies from the kernels that make them
(`kernels/eight.py` has formats and scales), so that hardly a pass over memory is for casting alone;
each function here is a product with the kernel behind it, because that kernel's backward pass
writes the gradient that the product takes. Weights are scaled by their largest element. With
`fp8_gate` in the model's configuration, what goes into the gated unit is in 8 bits alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mosaicbert.models.attention import AttentionPlan
from mosaicbert.models.kernels.attention import attention_backward, attention_forward
from mosaicbert.models.kernels.eight import GATED, HIGHEST, NORMED, WIDE
from mosaicbert.models.kernels.geglu import geglu_backward, geglu_forward
from mosaicbert.models.kernels.layernorm import layer_norm_backward, layer_norm_forward
from mosaicbert.models.kernels.sumnorm import sum_norm_backward, sum_norm_forward
from mosaicbert.models.operations import dropout_seed

Grads = tuple[Tensor | None, ...]


class Scales(NamedTuple):
    """What 8-bit numbers are multiplied by to be themselves again; float32 scalars."""

    normed: Tensor
    gated: Tensor
    gradient: Tensor
    wide: Tensor | None
    """What the input of a gated unit is multiplied by, where that is in 8 bits."""


def make_scales(device: torch.device, fp8_gate: bool) -> Scales:
    """The fixed ones, on `device`."""

    def scalar(value: float) -> Tensor:
        return torch.full((), value, device=device)

    wide = scalar(WIDE) if fp8_gate else None
    return Scales(scalar(1 / NORMED), scalar(1 / GATED), scalar(1.0), wide)


def to_eight(x: Tensor, scale: float, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """`x * scale`, clipped, in 8 bits."""
    return (x * scale).clamp(-HIGHEST[dtype], HIGHEST[dtype]).to(dtype)


@torch.no_grad()
def normed_in_eight(x: Tensor) -> Tensor:
    """The 8-bit copy of a LayerNorm's output, where no kernel of ours made it."""
    return to_eight(x.detach(), NORMED)


@torch.no_grad()
def _quantized(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`weight (out, in)` in 8 bits, the same transposed, and what scales it back.

    Products read both operands along rows, so the backward pass needs the transposed one.
    """
    highest = HIGHEST[torch.float8_e4m3fn]
    weight = weight.detach()
    scale = highest / weight.abs().amax().float().clamp(min=1e-12)
    eight = (weight * scale).clamp(-highest, highest).to(torch.float8_e4m3fn)
    return eight, eight.t().contiguous(), 1 / scale


def _product(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """`x (n, in)` times `weight (out, in)` transposed, both in 8 bits: `(n, out)` in `dtype`."""
    out: Tensor = torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale,
        scale_b=scale,
        bias=None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return out


def _product_in_eight(
    x: Tensor, weight: Tensor, x_scale: Tensor, scale: Tensor, out_scale: Tensor
) -> Tensor:
    """The product times `out_scale`, clipped, in 8 bits."""
    if x.device.type == "cpu":  # makes NaN of what is too large; cuBLAS clips
        return to_eight(_product(x, weight, x_scale, scale, torch.float32), out_scale.item())
    return _product(x, weight, x_scale, scale * out_scale, torch.float8_e4m3fn)


def _weight_gradient(grad: Tensor, x: Tensor, like: Tensor) -> Tensor:
    return (grad.t() @ x).to(like.dtype)


def _qkv_bias_gradient(dqkv: Tensor, grad: Tensor) -> Tensor:
    """Of what is added to all queries, keys and values, from their gradients and the output's.

    To the keys: a query's scores all shift alike, so nothing changes. To the values: attention's
    weights sum to 1, so it comes out as it is. That leaves one sum over a third of `dqkv`.
    """
    of_queries = dqkv[:, 0].flatten(1).sum(0, dtype=torch.float32)
    return torch.cat([of_queries, torch.zeros_like(of_queries), grad.sum(0, dtype=torch.float32)])


# In what follows `w8`, `w8t` and `w_scale` are those of `_quantized(weight)`, `one` a float32 1:
# the scale of gradients. (Dynamo does not trace the quantization inside of these functions.)


class _QkvAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x8: Tensor, x_scale: Tensor, one: Tensor, w8: Tensor, w8t: Tensor,
        w_scale: Tensor, weight: Tensor, bias: Tensor, heads: int, cu_seqlens: Tensor,
        max_seqlen: int, slopes: Tensor, window: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.max_seqlen, ctx.window = max_seqlen, window
        qkv = _product(x8, w8, x_scale, w_scale, x.dtype, bias).view(x.shape[0], 3, heads, -1)
        out, lse, reach, out8 = attention_forward(qkv, cu_seqlens, max_seqlen, slopes, window, True)
        ctx.save_for_backward(
            x, weight, bias, w8t, w_scale, one, qkv, out, lse, reach, cu_seqlens, slopes
        )
        out8 = out8.flatten(1)
        ctx.mark_non_differentiable(out8)
        return out.flatten(1), out8

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        (x, weight, bias, w8t, w_scale, one, qkv, out, lse, reach, cu_seqlens,
         slopes) = ctx.saved_tensors  # fmt: skip
        dqkv, dqkv8 = attention_backward(
            grads[0].reshape(out.shape), qkv, out, lse, reach, cu_seqlens, ctx.max_seqlen, slopes,
            ctx.window, True,
        )  # fmt: skip
        dbias = _qkv_bias_gradient(dqkv, grads[0]).to(bias.dtype)
        dqkv = dqkv.flatten(1)
        dx = _product(dqkv8.flatten(1), w8t, one, w_scale, x.dtype)
        dweight = _weight_gradient(dqkv, x, weight)
        return (dx, *(None,) * 6, dweight, dbias, *(None,) * 5)


NO_GATE = (None, 0.0, None)
"""In the place of a gated unit's input, its dropout and the seed of that: keep `x` itself."""


def _save(ctx: Any, x: Tensor, gate: Sequence[Any], *others: Tensor | None) -> None:
    """Keep `x` for the backward pass, or what makes it anew, and others."""
    wide, ctx.gate_dropout_p, gate_seed = gate
    ctx.has_gate, ctx.dtype = wide is not None, x.dtype
    ctx.save_for_backward(x if wide is None else wide, gate_seed, *others)


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    """The same again: `x` and the others."""
    x, gate_seed, *others = ctx.saved_tensors
    if ctx.has_gate:
        x, _ = geglu_forward(x, ctx.gate_dropout_p, gate_seed, False, ctx.dtype)
    return x, *others


class _LinearGeglu(torch.autograd.Function):
    """Also gives out what went into the gated unit."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x8: Tensor, x_scale: Tensor, one: Tensor, w8: Tensor, w8t: Tensor,
        w_scale: Tensor, weight: Tensor, wide_scale: Tensor | None, dropout_p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if wide_scale is None:
            wide = _product(x8, w8, x_scale, w_scale, x.dtype)
        else:
            wide = _product_in_eight(x8, w8, x_scale, w_scale, wide_scale)
        out, out8 = geglu_forward(wide, dropout_p, seed, True, x.dtype)
        ctx.dropout_p = dropout_p
        ctx.save_for_backward(x, weight, w8t, w_scale, one, wide, seed)
        ctx.mark_non_differentiable(out8, wide)
        return out, out8, wide

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        x, weight, w8t, w_scale, one, wide, seed = ctx.saved_tensors
        dwide, _, dwide8 = geglu_backward(grads[0], wide, ctx.dropout_p, seed, False, True)
        dx = _product(dwide8, w8t, one, w_scale, x.dtype)
        return (dx, *(None,) * 6, _weight_gradient(dwide, x, weight), *(None,) * 3)


class _LinearNorm(torch.autograd.Function):
    """Post-norm: the norm of the sum, once or twice, and its 8-bit copy."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x8: Tensor, x_scale: Tensor, one: Tensor, w8: Tensor, w8t: Tensor,
        w_scale: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor,
        norm_bias: Tensor, eps: float, dropout_p: float, seed: Tensor | None, times: int,
        *gate: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        projected = _product(x8, w8, x_scale, w_scale, residual.dtype)
        out, mean, rstd, out8 = layer_norm_forward(
            projected, residual, norm_weight, norm_bias, bias, eps, dropout_p, seed, True
        )
        ctx.dropout_p = dropout_p
        _save(
            ctx, x, gate, weight, bias, w8t, w_scale, one, projected, residual, norm_weight,
            norm_bias, mean, rstd, seed,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(out8)
        return (out, out.view_as(out), out8) if times == 2 else (out, out8)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        (x, weight, bias, w8t, w_scale, one, projected, residual, norm_weight, norm_bias, mean,
         rstd, seed) = _saved(ctx)  # fmt: skip
        first, *others = [grad for grad in grads[:-1] if grad is not None]
        dprojected, dresidual, sums, dprojected8 = layer_norm_backward(
            first, others[0] if others else None, projected, residual, norm_weight, bias, mean,
            rstd, ctx.dropout_p, seed, True,
        )  # fmt: skip
        dprojected = dprojected if ctx.dropout_p > 0 else dresidual
        dx = _product(dprojected8, w8t, one, w_scale, x.dtype)
        dweight = _weight_gradient(dprojected, x, weight)
        dnorm = sums[0].to(norm_weight.dtype), sums[1].to(norm_bias.dtype)
        dbias = sums[2].to(bias.dtype)
        return (dx, *(None,) * 6, dweight, dbias, dresidual, *dnorm, *(None,) * 7)


class _LinearSumNorm(torch.autograd.Function):
    """Pre-norm: the sum, its norm, and the norm's 8-bit copy."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x8: Tensor, x_scale: Tensor, one: Tensor, w8: Tensor, w8t: Tensor,
        w_scale: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor,
        norm_bias: Tensor, eps: float, dropout_p: float, seed: Tensor | None, *gate: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        projected = _product(x8, w8, x_scale, w_scale, residual.dtype)
        total, out, mean, rstd, out8 = sum_norm_forward(
            projected, residual, norm_weight, norm_bias, bias, eps, dropout_p, seed, True
        )
        ctx.dropout_p = dropout_p
        _save(
            ctx, x, gate, weight, bias, w8t, w_scale, one, total, norm_weight, norm_bias, mean,
            rstd, seed,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(out8)
        return total, out, out8

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        (x, weight, bias, w8t, w_scale, one, total, norm_weight, norm_bias, mean, rstd,
         seed) = _saved(ctx)  # fmt: skip
        sum_grad, grad, _ = grads
        dprojected, dresidual, sums, dprojected8 = sum_norm_backward(
            grad, sum_grad, total, norm_weight, mean, rstd, True, ctx.dropout_p, seed, True
        )
        dprojected = dprojected if ctx.dropout_p > 0 else dresidual
        dx = _product(dprojected8, w8t, one, w_scale, x.dtype)
        dweight = _weight_gradient(dprojected, x, weight)
        dnorm = sums[0].to(norm_weight.dtype), sums[1].to(norm_bias.dtype)
        dbias = sums[2].to(bias.dtype)
        return (dx, *(None,) * 6, dweight, dbias, dresidual, *dnorm, *(None,) * 6)


class _Norm(torch.autograd.Function):
    """Pre-norm, before the first layer: the norm of `x`, and its 8-bit copy."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        _, out, mean, rstd, out8 = sum_norm_forward(
            None, x, weight, bias, None, eps, 0.0, None, True
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.mark_non_differentiable(out8)
        return out, out8

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        _, dx, sums, _ = sum_norm_backward(grads[0], None, x, weight, mean, rstd, False, 0.0, None)
        return dx, sums[0].to(weight.dtype), sums[1].to(bias.dtype), None


# --- layers ---------------------------------------------------------------------------------------


def first_norm(x: Tensor, norm: nn.LayerNorm | None) -> tuple[Tensor | None, Tensor]:
    """With pre-norm the norm of `x (total_nnz, hidden)`; the 8-bit copy of what attention reads."""
    if norm is None:
        return None, normed_in_eight(x)
    found: tuple[Tensor, Tensor] = _apply(_Norm, x, norm.weight, norm.bias, norm.eps)
    return found


def layer_in_fp8(
    layer: Any, x: Tensor, normed: Tensor | None, x8: Tensor | None, plan: AttentionPlan,
    next_norm: Any, rows: Any, scales: Scales,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """A `MosaicBertLayer`: `x (total_nnz, hidden)`, its norm with pre-norm, and the 8-bit copy of
    what attention reads -> the same for the next layer.

    With `rows`, what follows attention is in 16 bits.
    """
    own = layer.attention.self
    inputs = x if normed is None else normed
    attended, attended8 = _apply(
        _QkvAttention, inputs, x8, scales.normed, scales.gradient, *_quantized(own.Wqkv.weight),
        own.Wqkv.weight, own.Wqkv.bias, own.heads, plan.cu_seqlens, plan.max_seqlen, plan.slopes,
        plan.window,
    )  # fmt: skip
    if rows is not None:
        return *layer.behind_attention(attended, x, True, next_norm, rows), None
    if layer.pre_norm:
        return _behind_pre_norm(layer, attended, attended8, x, next_norm, scales)
    return _behind_post_norm(layer, attended, attended8, x, scales)


def _behind_post_norm(
    layer: Any, x: Tensor, x8: Tensor, residual: Tensor, scales: Scales
) -> tuple[Tensor, None, Tensor]:
    output, mlp = layer.attention.output, layer.mlp
    dropout_p = layer.dropout if layer.training else 0.0
    x, residual, x8 = _add_norm(
        _LinearNorm, x, x8, scales.normed, scales, output.dense, residual, output.LayerNorm,
        dropout_p, 2, *NO_GATE,
    )  # fmt: skip
    hidden, hidden8, gate = _gated(mlp, x, x8, scales)
    x, x8 = _add_norm(
        _LinearNorm, hidden, hidden8, scales.gated, scales, mlp.wo, residual, mlp.layernorm, 0.0, 1,
        *gate,
    )  # fmt: skip
    return x, None, x8


def _behind_pre_norm(
    layer: Any, x: Tensor, x8: Tensor, residual: Tensor, next_norm: nn.LayerNorm, scales: Scales
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    output, mlp = layer.attention.output, layer.mlp
    dropout_p = layer.dropout if layer.training else 0.0
    residual, normed, normed8 = _add_norm(
        _LinearSumNorm, x, x8, scales.normed, scales, output.dense, residual, mlp.layernorm,
        dropout_p, *NO_GATE,
    )  # fmt: skip
    hidden, hidden8, gate = _gated(mlp, normed, normed8, scales)
    residual, normed, normed8 = _add_norm(
        _LinearSumNorm, hidden, hidden8, scales.gated, scales, mlp.wo, residual, next_norm, 0.0,
        *gate,
    )  # fmt: skip
    return (normed, None, None) if layer.is_last else (residual, normed, normed8)


def _gated(mlp: Any, x: Tensor, x8: Tensor, scales: Scales) -> tuple[Tensor, Tensor, Sequence[Any]]:
    """The gated unit's output, its 8-bit copy, and what is to make it anew."""
    dropout_p = mlp.dropout if mlp.training else 0.0
    weight = mlp.gated_layers.weight
    seed = dropout_seed(dropout_p, x.device)
    out, out8, wide = _apply(
        _LinearGeglu, x, x8, scales.normed, scales.gradient, *_quantized(weight), weight,
        scales.wide, dropout_p, seed,
    )  # fmt: skip
    return out, out8, (wide, dropout_p, seed) if mlp.recompute else NO_GATE


def _add_norm(
    function: Any, x: Tensor, x8: Tensor, x_scale: Tensor, scales: Scales, dense: nn.Linear,
    residual: Tensor, norm: nn.LayerNorm, dropout_p: float, *others: Any,
) -> Any:  # fmt: skip
    return _apply(
        function, x, x8, x_scale, scales.gradient, *_quantized(dense.weight), dense.weight,
        dense.bias, residual, norm.weight, norm.bias, norm.eps, dropout_p,
        dropout_seed(dropout_p, x.device), *others,
    )  # fmt: skip


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)
