"""Variable-length bidirectional attention with symmetric ALiBi, forward and backward.

`softmax(q k^T / sqrt(head_dim) - slope |i - j|) v` (Press et al. 2022, in the symmetric form of
Mosaic BERT), computed per sequence from packed `qkv`; neither bias nor scores go to memory.

Short sequences: one program holds a whole (sequence, head): one load, one store, and one backward
kernel for dq, dk and dv. Longer: tiles with an online softmax (Dao et al. 2022, "FlashAttention"),
and a backward kernel each for dq and for dk and dv. No atomics: results repeat bit by bit.
"""
# mypy: disable-error-code="untyped-decorator"

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from mosaicbert.models.kernels import attention_short as short
from mosaicbert.models.kernels import attention_tiled as tiled
from mosaicbert.models.kernels.eight import NORMED, eight_like
from mosaicbert.models.kernels.ops import kernel_op, launch

LOG2_E = 1.4426950408889634
MAX_SHORT = 128
"""Longest sequence that one program holds whole."""
MIN_SKIPPED = 1024
"""From this length on, looking for tiles to skip costs less than it saves."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries and keys of one tile, and how it is compiled."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int

    def config(self) -> dict[str, int]:
        """As a tiled kernel takes it."""
        return {
            "QUERIES": self.queries, "KEYS": self.keys, "STAGES": self.num_stages,
            "num_warps": self.num_warps,
        }  # fmt: skip


def _roomy(device: torch.device) -> bool:
    """Whether the device has the shared memory of a data-centre GPU (A100, H100 and newer)."""
    if device.type != "cuda":
        return True
    properties: Any = torch.cuda.get_device_properties(device)
    return bool(properties.shared_memory_per_block_optin >= 160 * 1024)


def short_block(qkv: Tensor, max_seqlen: int) -> int | None:
    """Tile size if one program can hold a sequence whole, else None."""
    if max_seqlen > MAX_SHORT or qkv.element_size() > 2 or not _roomy(qkv.device):
        return None
    return max(16, int(triton.next_power_of_2(max_seqlen)))


def short_config(block: int, heads: int, head_dim: int) -> dict[str, int]:
    """How the backward kernel for short sequences is compiled."""
    num_warps = short_warps(block)
    if block < 128 or head_dim > 64:  # several programs fit, or no second head does
        return {"GROUP": 1, "STAGES": 1, "num_warps": num_warps}
    group = next(group for group in (4, 3, 2, 1) if heads % group == 0)
    return {"GROUP": group, "STAGES": 2, "num_warps": num_warps}


def short_warps(block: int) -> int:
    """`num_warps` of the kernels for short sequences."""
    return 8 if block == 128 else 4


def tiles(qkv: Tensor) -> tuple[Tile, Tile, Tile]:
    """Tiles of the forward, the dq and the dk/dv kernel, as measured on an H100."""
    head_dim = qkv.shape[-1]
    if qkv.element_size() > 2:
        side = 32 if head_dim == 128 else 64
        return (Tile(side, side, 4, 1),) * 3
    if not _roomy(qkv.device):
        return (Tile(64, 64 if head_dim < 128 else 32, 4, 2),) * 3
    if head_dim == 128:
        return Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(32, 64, 4, 3)
    return Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(128, 64, 4, 2)


def _config(qkv: Tensor, window: int) -> dict[str, Any]:
    """What all kernels are compiled for; no float arguments: inductor passes them as float64."""
    heads, head_dim = qkv.shape[2:]
    scale = LOG2_E / math.sqrt(head_dim)
    return {"SCALE": scale, "HEADS": heads, "HEAD_DIM": head_dim, "WINDOW": window >= 0}


@kernel_op("alibi_attention")
def attention_forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    slopes: Tensor,
    window: int,
    eight: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, base-2 log-sum-exp `(heads, total_nnz)`, and how far each (sequence, head) sees.

    Last the output in fp8, times `NORMED`, if `eight` (else empty).
    """
    total_nnz, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(total_nnz, heads, head_dim)
    lse = qkv.new_empty(heads, total_nnz, dtype=torch.float32)
    units = (cu_seqlens.numel() - 1) * heads
    out8 = eight_like(out, torch.float8_e4m3fn, eight)
    args: tuple[Any, ...] = (qkv, out, out8, lse, cu_seqlens, slopes, window, total_nnz)
    config = _config(qkv, window) | {"EIGHT": NORMED if eight else 0.0}
    block = short_block(qkv, max_seqlen)
    if block is not None:
        num_warps = short_warps(block)
        launch(short.forward_kernel, (units,), *args, **config, BLOCK=block, num_warps=num_warps)
        return out, lse, cu_seqlens.new_empty(0), out8
    reach = cu_seqlens.new_full((units,), window if window >= 0 else tiled.UNLIMITED.value)
    if max_seqlen >= MIN_SKIPPED:
        launch(
            tiled.reach_kernel, (units,), qkv, reach, cu_seqlens, slopes, window,
            **_config(qkv, window), ROWS=128, num_warps=8,
        )  # fmt: skip
    tile = tiles(qkv)[0]
    num_tiles = triton.cdiv(max_seqlen, tile.queries)
    launch(
        tiled.forward_kernel, (units * num_tiles,), *args, reach, num_tiles, **config,
        **tile.config(),
    )  # fmt: skip
    return out, lse, reach, out8


@kernel_op("alibi_attention_backward")
def attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, reach: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, slopes: Tensor, window: int, eight: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of `qkv`; and it in fp8, if `eight` (else empty)."""
    total_nnz, _, heads, head_dim = qkv.shape
    grad = grad.contiguous()
    dqkv, dqkv8 = torch.empty_like(qkv), eight_like(qkv, torch.float8_e5m2, eight)
    units = (cu_seqlens.numel() - 1) * heads
    config = _config(qkv, window) | {"EIGHT": eight}
    block = short_block(qkv, max_seqlen)
    if block is not None:
        short_kernel = short_config(block, heads, head_dim)
        launch(
            short.backward_kernel, (units // short_kernel["GROUP"],), grad, qkv, dqkv,
            dqkv8, lse, cu_seqlens, slopes, window, total_nnz, **config, BLOCK=block,
            **short_kernel,
        )  # fmt: skip
        return dqkv, dqkv8
    delta = torch.empty_like(lse)
    args: tuple[Any, ...] = (
        grad, qkv, out, dqkv, dqkv8, lse, delta, cu_seqlens, slopes, window, total_nnz, reach,
    )  # fmt: skip
    _, dq_tile, dkv_tile = tiles(qkv)
    num_tiles = triton.cdiv(max_seqlen, dq_tile.queries)  # this kernel writes `delta` for the next
    launch(tiled.dq_kernel, (units * num_tiles,), *args, num_tiles, **config, **dq_tile.config())
    num_tiles = triton.cdiv(max_seqlen, dkv_tile.keys)
    launch(tiled.dkv_kernel, (units * num_tiles,), *args, num_tiles, **config, **dkv_tile.config())
    return dqkv, dqkv8


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, slopes, ctx.window, _ = inputs
    ctx.save_for_backward(qkv, *output[:3], cu_seqlens, slopes)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, out, lse, reach, cu_seqlens, slopes = ctx.saved_tensors
    dqkv, _ = attention_backward(
        grad, qkv, out, lse, reach, cu_seqlens, ctx.max_seqlen, slopes, ctx.window
    )
    return dqkv, None, None, None, None, None


attention_forward.register_autograd(_backward, setup_context=_setup_context)


@attention_forward.register_fake
def _(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    slopes: Tensor,
    window: int,
    eight: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total_nnz, _, heads, head_dim = qkv.shape
    units = 0 if short_block(qkv, max_seqlen) else (cu_seqlens.numel() - 1) * heads
    lse = qkv.new_empty(heads, total_nnz, dtype=torch.float32)
    out = qkv.new_empty(total_nnz, heads, head_dim)
    out8 = eight_like(out, torch.float8_e4m3fn, eight)
    return out, lse, cu_seqlens.new_empty(units), out8


@attention_backward.register_fake
def _(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, reach: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, slopes: Tensor, window: int, eight: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(qkv), eight_like(qkv, torch.float8_e5m2, eight)


def alibi_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, slopes: Tensor, window: int = -1
) -> Tensor:
    """Attention of each sequence over itself: `(total_nnz, heads, head_dim)`.

    `qkv (total_nnz, 3, heads, head_dim)` contiguous, float32, bfloat16 or float16, head_dim 32, 64
    or 128; `cu_seqlens (batch + 1,)` int32 with sequence b at `cu_seqlens[b]:cu_seqlens[b + 1]`
    (sequences of length 0 allowed, none longer than `max_seqlen`, every position in one of them);
    `slopes (heads,)` float32; with `window >= 0` only keys with `|i - j| <= window` are seen.
    """
    assert qkv.ndim == 4
    assert qkv.shape[1] == 3
    assert qkv.is_contiguous()
    assert cu_seqlens.dtype == torch.int32
    assert slopes.dtype == torch.float32
    assert slopes.shape == (qkv.shape[2],)
    if qkv.shape[3] not in (32, 64, 128):
        raise ValueError(f"the attention kernel knows head_dim 32, 64, 128, not {qkv.shape[3]}")
    out: Tensor = attention_forward(qkv, cu_seqlens, max_seqlen, slopes, window)[0]
    return out
