"""What a layer of Mosaic BERT is made of, by our kernels (`fused`) or by torch's own operations.

The kernels need Triton, so they are imported where they are used.
"""
# mypy: disable-error-code="no-any-return"

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[..., Tensor]
"""`product(x, weight)`, as `F.linear`."""


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its input, also under autocast; its statistics are float32."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` -> the same."""
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """`F.dropout`; eager on a CPU by 16-bit numbers, four to a draw: a third of the time.

    `p` is then rounded to a multiple of 2^-16.
    """
    if not training or p == 0.0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    drop_below = round(p * 2**16)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= drop_below - 2**15
    return x * (keep * torch.tensor(1 / (1 - drop_below / 2**16), dtype=x.dtype))


def geglu(x: Tensor, dropout_p: float, fused: bool) -> Tensor:
    """`dropout(gelu(x[:, :n]) * x[:, n:])`, `(total_nnz, 2n)` -> `(total_nnz, n)`; exact GELU."""
    if fused:
        from mosaicbert.models.kernels.geglu import geglu as kernel

        return kernel(x, dropout_p, dropout_seed(dropout_p, x.device))
    gate, up = x.chunk(2, dim=-1)
    return dropout(F.gelu(gate) * up, dropout_p)


def geglu_linear(dropout_p: float, x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` of `geglu`, fused, which is made anew on the way back."""
    from mosaicbert.models.kernels.geglu import geglu_linear as kernel

    return kernel(x, weight, dropout_p, dropout_seed(dropout_p, x.device))


def dropout_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """What the kernels draw their masks from; None without dropout."""
    return torch.randint(2**31, (1,), device=device) if dropout_p else None


def add_norm(
    x: Tensor,
    residual: Tensor,
    dense: nn.Linear,
    norm: LayerNorm,
    dropout_p: float,
    fused: bool,
    times: int = 2,
    product: Product = F.linear,
) -> tuple[Tensor, ...]:
    """`norm(residual + dropout(dense(x)))`, so many times; `product` stands in for `F.linear`.

    What reads the one and what reads the other have gradients of their own, which the fused
    LayerNorm adds in passing.
    """
    if fused:
        from mosaicbert.models.kernels.layernorm import residual_layer_norm

        return residual_layer_norm(*_operands(x, residual, dense, norm, dropout_p, product), times)
    return (norm(residual + dropout(dense(x), dropout_p)),) * times


def sum_and_norm(
    x: Tensor,
    residual: Tensor,
    dense: nn.Linear,
    norm: LayerNorm,
    dropout_p: float,
    fused: bool,
    product: Product = F.linear,
) -> tuple[Tensor, Tensor]:
    """`s = residual + dropout(dense(x))` and `norm(s)`; `product` stands in for `F.linear`."""
    if fused:
        from mosaicbert.models.kernels.sumnorm import sum_layer_norm

        return sum_layer_norm(*_operands(x, residual, dense, norm, dropout_p, product))
    total = residual + dropout(dense(x), dropout_p)
    return total, norm(total)


def _operands(
    x: Tensor,
    residual: Tensor,
    dense: nn.Linear,
    norm: LayerNorm,
    dropout_p: float,
    product: Product,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float, float, Tensor | None]:
    """What both kernels take: the bias of `dense` apart, because they add it."""
    projected, seed = product(x, dense.weight), dropout_seed(dropout_p, x.device)
    return projected, residual, norm.weight, norm.bias, dense.bias, norm.eps, dropout_p, seed


def norm_alone(x: Tensor, norm: LayerNorm | None, fused: bool) -> Tensor | None:
    """`norm(x)`; None for None."""
    if norm is None or not fused:
        return None if norm is None else norm(x)
    from mosaicbert.models.kernels.sumnorm import sum_layer_norm

    return sum_layer_norm(None, x, norm.weight, norm.bias, eps=norm.eps)[1]
