"""Variable-length bidirectional attention with symmetric ALiBi, forward and backward.

`softmax(q k^T / sqrt(head_dim) - slope |i - j|) v` (Press et al. 2022, in the symmetric form of
Mosaic BERT), computed per sequence from packed `qkv`; neither bias nor scores go to memory.

Short sequences: one program holds a whole (sequence, head): one load, one store, and one backward
kernel for dq, dk and dv. Longer: tiles with an online softmax (Dao et al. 2022, "FlashAttention"),
and a backward kernel each for dq and for dk and dv. No atomics: results repeat bit by bit.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from mosaicbert.models.kernels import attention_short as short
from mosaicbert.models.kernels import attention_tiled as tiled

LOG2_E = 1.4426950408889634
MAX_SHORT = 128
"""Longest sequence that one program holds whole."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries and keys of one tile, and how it is compiled."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def _roomy(device: torch.device) -> bool:
    """Whether the device has the shared memory of a data-centre GPU (A100, H100 and newer)."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 160 * 1024


def short_block(qkv: Tensor, max_seqlen: int) -> int | None:
    """Tile size if one program can hold a sequence whole, else None."""
    if max_seqlen > MAX_SHORT or qkv.element_size() > 2 or not _roomy(qkv.device):
        return None
    return max(16, triton.next_power_of_2(max_seqlen))


def short_warps(block: int, head_dim: int) -> tuple[int, int]:
    """`num_warps` of the forward and of the backward kernel."""
    if block < 64:
        return 4, 4
    return (4, 4) if block == 64 else (4 if head_dim <= 64 else 8, 8)


def tiles(qkv: Tensor) -> tuple[Tile, Tile, Tile]:
    """Tiles of the forward, the dq and the dk/dv kernel."""
    head_dim = qkv.shape[-1]
    if qkv.element_size() > 2:
        side = 32 if head_dim == 128 else 64
        return (Tile(side, side, 4, 1),) * 3
    if head_dim == 128 or not _roomy(qkv.device):
        return Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)
    return Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)


def _shape(qkv: Tensor) -> dict[str, int]:
    return {"HEADS": qkv.shape[2], "HEAD_DIM": qkv.shape[3]}


@torch.library.custom_op("mosaicbert::alibi_attention", mutates_args=())
def attention_forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, slopes: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """Output, and base-2 log-sum-exp `(heads, total_nnz)`: the op behind `alibi_attention`."""
    total_nnz, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(total_nnz, heads, head_dim)
    lse = qkv.new_empty(heads, total_nnz, dtype=torch.float32)
    batch, scale = cu_seqlens.numel() - 1, LOG2_E / math.sqrt(head_dim)
    args: tuple[Any, ...] = (qkv, out, lse, cu_seqlens, slopes, scale, window, total_nnz)
    block = short_block(qkv, max_seqlen)
    if block is not None:
        short.forward_kernel[(batch * heads,)](
            *args, **_shape(qkv), WINDOW=window >= 0, BLOCK=block,
            num_warps=short_warps(block, head_dim)[0],
        )  # fmt: skip
    else:
        tile = tiles(qkv)[0]
        num_tiles = triton.cdiv(max_seqlen, tile.queries)
        tiled.forward_kernel[(batch * heads * num_tiles,)](
            *args, num_tiles, **_shape(qkv), WINDOW=window >= 0, QUERIES=tile.queries,
            KEYS=tile.keys, STAGES=tile.num_stages, num_warps=tile.num_warps,
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("mosaicbert::alibi_attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    slopes: Tensor, window: int,
) -> Tensor:  # fmt: skip
    """Gradient of `qkv`."""
    total_nnz, _, heads, head_dim = qkv.shape
    grad = grad.contiguous()
    dqkv = torch.empty_like(qkv)
    batch, scale = cu_seqlens.numel() - 1, LOG2_E / math.sqrt(head_dim)
    block = short_block(qkv, max_seqlen)
    if block is not None:
        short.backward_kernel[(batch * heads,)](
            grad, qkv, dqkv, lse, cu_seqlens, slopes, scale, window, total_nnz, **_shape(qkv),
            WINDOW=window >= 0, BLOCK=block, num_warps=short_warps(block, head_dim)[1],
        )  # fmt: skip
        return dqkv
    delta = torch.empty_like(lse)
    args: tuple[Any, ...] = (grad, qkv, out, dqkv, lse, delta, cu_seqlens, slopes, scale, window)
    _, tile, _ = tiles(qkv)  # this kernel writes `delta`, the next reads it
    num_tiles = triton.cdiv(max_seqlen, tile.queries)
    tiled.dq_kernel[(batch * heads * num_tiles,)](
        *args, total_nnz, num_tiles, **_shape(qkv), WINDOW=window >= 0, QUERIES=tile.queries,
        KEYS=tile.keys, STAGES=tile.num_stages, num_warps=tile.num_warps,
    )  # fmt: skip
    _, _, tile = tiles(qkv)
    num_tiles = triton.cdiv(max_seqlen, tile.keys)
    tiled.dkv_kernel[(batch * heads * num_tiles,)](
        *args, total_nnz, num_tiles, **_shape(qkv), WINDOW=window >= 0, QUERIES=tile.queries,
        KEYS=tile.keys, STAGES=tile.num_stages, num_warps=tile.num_warps,
    )  # fmt: skip
    return dqkv


@attention_forward.register_fake
def _(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, slopes: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    total_nnz, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(total_nnz, heads, head_dim)
    return out, qkv.new_empty(heads, total_nnz, dtype=torch.float32)


@attention_backward.register_fake
def _(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    slopes: Tensor, window: int,
) -> Tensor:  # fmt: skip
    return torch.empty_like(qkv)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, slopes, ctx.window = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens, slopes)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, out, lse, cu_seqlens, slopes = ctx.saved_tensors
    dqkv = attention_backward(
        grad, qkv, out, lse, cu_seqlens, ctx.max_seqlen, slopes, ctx.window
    )
    return dqkv, None, None, None, None


attention_forward.register_autograd(_backward, setup_context=_setup_context)


def alibi_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, slopes: Tensor, window: int = -1
) -> Tensor:
    """Attention of each sequence over itself: `(total_nnz, heads, head_dim)`.

    `qkv (total_nnz, 3, heads, head_dim)` contiguous, float32, bfloat16 or float16, head_dim 32, 64
    or 128; `cu_seqlens (batch + 1,)` int32 with sequence b at `cu_seqlens[b]:cu_seqlens[b + 1]`
    (sequences of length 0 allowed, none longer than `max_seqlen`, every position in one of them);
    `slopes (heads,)` float32; with `window >= 0` only keys with `|i - j| <= window` are seen.
    """
    assert qkv.ndim == 4 and qkv.shape[1] == 3 and qkv.is_contiguous(), "qkv: packed, contiguous"
    assert cu_seqlens.dtype == torch.int32 and slopes.dtype == torch.float32
    assert slopes.shape == (qkv.shape[2],)
    if qkv.shape[3] not in (32, 64, 128):
        raise ValueError(f"the attention kernel knows head_dim 32, 64, 128, not {qkv.shape[3]}")
    out: Tensor = attention_forward(qkv, cu_seqlens, max_seqlen, slopes, window)[0]
    return out
