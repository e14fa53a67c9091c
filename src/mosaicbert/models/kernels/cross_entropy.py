"""A decoder over the vocabulary and its cross-entropy, whose gradient takes the logits' place.

The logits of masked-language modelling are the largest tensor of a training step. The gradient of a
summed loss is known as soon as the logits are, so the forward pass writes it over them: they are
read twice, the second time from the cache, and written once, and nothing else of their size ever
is. In float16 such a gradient, not yet scaled, would vanish: not for it.
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
# ruff: noqa: N803

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mosaicbert.batch import IGNORE_INDEX
from mosaicbert.models.kernels.ops import kernel_op, launch

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def _capped(z, CAP: tl.constexpr):
    """`CAP * tanh(z / CAP)` (Gemma Team 2024); `z` itself where `CAP` is 0."""
    if CAP > 0:
        z = CAP * (1.0 - 2.0 / (1.0 + tl.exp(z * (2.0 / CAP))))
    return z


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, labels_ptr, loss_ptr,
    WIDTH: tl.constexpr, CLASSES: tl.constexpr, CAP: tl.constexpr, IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of one row; its logits become their gradient."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * WIDTH
    label = tl.load(labels_ptr + row)
    highest = LOWEST
    total = 0.0
    chosen = 0.0
    for first in range(0, WIDTH, BLOCK):
        col = first + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + col, mask=col < CLASSES, other=LOWEST).to(tl.float32)
        z = tl.where(col < CLASSES, _capped(z, CAP), LOWEST)
        chosen += tl.sum(tl.where(col == label, z, 0.0))  # before anyone overwrites it
        above = tl.maximum(highest, tl.max(z))
        total = total * tl.exp2((highest - above) * LOG2_E)
        total += tl.sum(tl.exp2((z - above) * LOG2_E))
        highest = above
    log_total = highest + tl.log(total)
    real = label != IGNORED
    tl.store(loss_ptr + row, tl.where(real, log_total - chosen, 0.0))
    for first in range(0, WIDTH, BLOCK):
        col = first + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + col, mask=col < CLASSES, other=LOWEST).to(tl.float32)
        z = _capped(z, CAP)
        grad = tl.exp2((z - log_total) * LOG2_E) - tl.where(col == label, 1.0, 0.0)
        if CAP > 0:
            grad *= 1.0 - (z / CAP) * (z / CAP)
        grad = tl.where(real & (col < CLASSES), grad, 0.0)
        tl.store(logits_ptr + col, grad, mask=col < WIDTH)


CONFIG = {"BLOCK": 8192, "num_warps": 8}
"""As measured on an H100."""


@kernel_op("linear_cross_entropy")
def linear_cross_entropy_forward(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, num_classes: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """Loss of each row `(rows,)` float32, and the gradient of the logits `(rows, width)`."""
    logits = F.linear(x, weight, bias)
    loss = torch.empty_like(labels, dtype=torch.float32)
    if labels.shape[0]:  # not len(): the compiler would make a graph for each number of rows
        launch(
            _cross_entropy_kernel, (labels.shape[0],), logits, labels, loss, WIDTH=weight.shape[0],
            CLASSES=num_classes, CAP=softcap, IGNORED=IGNORE_INDEX, **CONFIG,
        )  # fmt: skip
    return loss, logits


@linear_cross_entropy_forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, num_classes: int, softcap: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(labels, dtype=torch.float32), x.new_empty(x.shape[0], weight.shape[0])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, num_classes: int,
        softcap: float,
    ) -> Tensor:  # fmt: skip
        ctx.dtype = weight.dtype
        weight = weight.to(x.dtype)
        loss, dlogits = linear_cross_entropy_forward(
            x, weight, bias.to(x.dtype), labels, num_classes, softcap
        )
        ctx.save_for_backward(x, weight, dlogits)
        total: Tensor = loss.sum()
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, dlogits = ctx.saved_tensors
        (grad,) = grads
        dx = dlogits @ weight * grad.to(x.dtype)
        dweight = (dlogits.T @ x).to(ctx.dtype) * grad
        dbias = dlogits.sum(0, dtype=torch.float32).to(ctx.dtype) * grad
        return dx, dweight, dbias, None, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, num_classes: int,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Cross-entropy of `x @ weight.T + bias`, summed over the rows that have a label; a scalar.

    `x (rows, hidden)`, float32 or bfloat16, the dtype in which it computes; `weight (width,
    hidden)`, `bias (width,)`; `labels (rows,)` int64, `IGNORE_INDEX` or below `num_classes`, beyond
    which nothing is predicted. `softcap` bounds the logits: `softcap * tanh(logits / softcap)`.
    """
    assert x.dtype in (torch.float32, torch.bfloat16)
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x.contiguous(), weight, bias, labels, num_classes, softcap or 0.0
    )
    return loss
