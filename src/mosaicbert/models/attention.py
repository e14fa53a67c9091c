"""Attention over packed sequences with symmetric ALiBi: one function, several ways to compute it.

`softmax(q k^T / sqrt(head_dim) - slope * |i - j|) v` inside each sequence, i and j positions in it
(ALiBi: Press et al. 2022; the symmetric, bidirectional form: MosaicBERT, Portes et al. 2023).

    triton     our kernel: neither bias nor scores go to memory; on a GPU, no attention dropout
    flex       torch's flex_attention: GPUs, head sizes that the kernel does not know
    sdpa       torch's scaled_dot_product_attention on padded sequences: CPUs, attention dropout
    reference  a loop over the sequences in plain torch: what the others are tested against

The first of them that can do what is asked is taken. `MOSAICBERT_ATTENTION=sdpa` (or another name)
in the environment overrides the choice. On CPUs torch's flex_attention has no backward pass.
"""

import functools
import itertools
import logging
import math
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mosaicbert.errors import ConfigError, did_you_mean
from mosaicbert.models import kernels

logger = logging.getLogger(__name__)

BACKENDS = ("triton", "flex", "sdpa", "reference")
KERNEL_HEAD_DIMS = (32, 64, 128)
FLEX_LEAST_HEAD_DIM = 16
FLEX_BLOCK = 128
MAX_BIAS_ELEMENTS = 1 << 27
"""`sdpa` takes sequences in groups whose bias has at most this many elements."""
MAX_BY_PRODUCTS = 256
"""`sdpa` in bfloat16 on a CPU: up to this length products beat torch's own on the way back."""
MAX_SCORES = 1 << 26
"""Where they are products, so many scores are kept for that: 128 MB a layer."""


class AttentionPlan(NamedTuple):
    """What all layers share about one packed batch; made once per batch by `plan_attention`."""

    backend: str
    cu_seqlens: Tensor  # (batch + 1,) int32
    max_seqlen: int
    slopes: Tensor  # (heads,) float32; zeros: no ALiBi
    window: int  # keys with |i - j| <= window are seen; -1: all
    dropout_p: float
    slot: Tensor | None  # sdpa: (total_nnz,) row of each position in the padded form; None: is it
    bias: Tensor | None  # sdpa: (batch, heads, seq, seq), where it is small enough to keep
    block_mask: BlockMask | None  # flex
    rotary: Tensor | None = None  # (2, total_nnz, head_dim // 2), for those who rotate q and k


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """Slopes `(num_heads,)` float32: `2^(-8i/n)` for the largest power of two n <= num_heads.

    Further heads take every second slope of the doubled set. Source: Press et al. 2022.
    """
    power = 2 ** int(math.log2(num_heads))
    exponents = torch.arange(1, power + 1, device=device, dtype=torch.float32) * (8 / power)
    rest = torch.arange(num_heads - power, device=device, dtype=torch.float32)
    return torch.exp2(-torch.cat([exponents, (2 * rest + 1) * (4 / power)]))


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    slopes: Tensor,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    window: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of each sequence over itself.

    Shapes: `qkv (total_nnz, 3, heads, head_dim)`, `cu_seqlens (batch + 1,)` int32 (sequences of
    length 0 allowed, none longer than `max_seqlen`), `slopes (heads,)` float32; gives
    `(total_nnz, heads, head_dim)`. `window`: see only keys with `|i - j| <= window`.
    """
    total_nnz, _, _, head_dim = qkv.shape
    plan = plan_attention(
        cu_seqlens,
        max_seqlen,
        slopes,
        total_nnz=total_nnz,
        head_dim=head_dim,
        dtype=qkv.dtype,
        dropout_p=dropout_p if training else 0.0,
        window=window,
        backend=backend,
    )
    return run_attention(qkv, plan)


def plan_attention(
    cu_seqlens: Tensor,
    max_seqlen: int,
    slopes: Tensor,
    *,
    total_nnz: int,
    head_dim: int,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    window: int | None = None,
    backend: str | None = None,
) -> AttentionPlan:
    """Choose the backend, say which and why once, and prepare what its layers share.

    Raises:
        ConfigError: `backend` or `MOSAICBERT_ATTENTION` names none of `BACKENDS`.
    """
    backend = choose_backend(cu_seqlens.device, head_dim, dtype, dropout_p, backend)
    window = -1 if window is None else window
    plan = AttentionPlan(
        backend, cu_seqlens, max_seqlen, slopes, window, dropout_p, None, None, None
    )
    if backend == "sdpa":
        batch = cu_seqlens.numel() - 1
        plan = plan._replace(slot=_padded_slots(cu_seqlens, max_seqlen, total_nnz))
        if _group_size(plan) >= batch:
            plan = plan._replace(bias=_padded_bias(plan, 0, batch, dtype))
    elif backend == "flex":
        plan = plan._replace(block_mask=_flex_block_mask(cu_seqlens, total_nnz, window))
    return plan


def run_attention(qkv: Tensor, plan: AttentionPlan) -> Tensor:
    """`qkv (total_nnz, 3, heads, head_dim)` -> `(total_nnz, heads, head_dim)`, as planned."""
    if plan.backend == "triton":
        from mosaicbert.models.kernels.attention import alibi_attention

        return alibi_attention(
            qkv.contiguous(), plan.cu_seqlens, plan.max_seqlen, plan.slopes, plan.window
        )
    if plan.backend == "flex":
        return _flex(qkv, plan)
    if plan.backend == "sdpa":
        return _sdpa(qkv, plan)
    return _reference(qkv, plan)


def choose_backend(
    device: torch.device,
    head_dim: int,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    override: str | None = None,
) -> str:
    """The first of `BACKENDS` that can do this; logs the first time which one and why.

    Raises:
        ConfigError: the one asked for is unknown, or cannot do this.
    """
    backend, why = explain_backend(device, head_dim, dtype, dropout_p, override)
    _say_once(f"Attention runs as {backend!r} on {device.type} ({why}).")
    return backend


def explain_backend(
    device: torch.device,
    head_dim: int,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    override: str | None = None,
) -> tuple[str, str]:
    """What `choose_backend` gives, and why. Raises as it does."""
    asked = os.environ.get("MOSAICBERT_ATTENTION") or override
    if asked and asked not in BACKENDS:
        raise ConfigError(
            f"attention backend {asked!r}: choose one of {', '.join(BACKENDS)}."
            f"{did_you_mean(asked, BACKENDS)}"
        )
    passed_over: dict[str, list[str]] = {}
    for backend in (asked,) if asked else BACKENDS:
        objection = _objection(backend, device, head_dim, dtype, dropout_p, bool(asked))
        if objection is None:
            break
        if asked:
            raise ConfigError(
                f"attention backend {asked!r} was asked for (attention_backend or "
                f"MOSAICBERT_ATTENTION), but {objection}. Leave it out, or ask for sdpa."
            )
        passed_over.setdefault(objection, []).append(backend)
    why = [f"not {' or '.join(names)}: {reason}" for reason, names in passed_over.items()]
    why = ["asked for"] if asked else why or ["the fastest"]
    return backend, "; ".join(why)


def _objection(
    backend: str,
    device: torch.device,
    head_dim: int,
    dtype: torch.dtype,
    dropout_p: float,
    asked: bool,
) -> str | None:
    """Why `backend` cannot do this; None if it can."""
    if backend in ("sdpa", "reference"):
        return None
    if dropout_p > 0:
        return "attention dropout needs the attention weights, a slow path"
    if dtype == torch.float64:
        return "it knows no float64"
    if backend == "triton" and head_dim not in KERNEL_HEAD_DIMS:
        return f"it knows head sizes 32, 64 and 128, not {head_dim}"
    if backend == "flex" and head_dim < FLEX_LEAST_HEAD_DIM:
        return f"head size {head_dim} is too small for it"
    if backend == "flex" and asked and device.type == "cpu":  # to look at results, not to train
        return "on CPUs torch has no backward pass of it" if torch.is_grad_enabled() else None
    return kernels.why_not(device)


def sequence_ids(cu_seqlens: Tensor, total_nnz: int) -> Tensor:
    """Which sequence each packed position belongs to: `(total_nnz,)` int64."""
    position = torch.arange(total_nnz, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], position, right=True)


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)


# --- sdpa: padded ---------------------------------------------------------------------------------


def _padded_slots(cu_seqlens: Tensor, max_seqlen: int, total_nnz: int) -> Tensor:
    """Row `(total_nnz,)` of each packed position in the flattened `(batch, max_seqlen)` form."""
    if cu_seqlens.device.type == "cpu":
        assert int(cu_seqlens.diff().max()) <= max_seqlen, "a sequence is longer than max_seqlen"
        assert int(cu_seqlens[-1]) == total_nnz, "cu_seqlens does not cover every position"
    position = torch.arange(total_nnz, device=cu_seqlens.device)
    sequence = sequence_ids(cu_seqlens, total_nnz)
    return position + sequence * max_seqlen - cu_seqlens[sequence]


def _group_size(plan: AttentionPlan) -> int:
    return max(1, MAX_BIAS_ELEMENTS // (plan.slopes.numel() * plan.max_seqlen**2))


def _padded_bias(plan: AttentionPlan, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """ALiBi and padding as one additive mask `(sequences, heads, seq, seq)`.

    What must not be seen gets the dtype's least finite value: a sequence of length 0 then has
    uniform weights that nobody reads, where -inf would give NaN and NaN gradients.
    """
    lengths = plan.cu_seqlens.diff()[start:stop]
    return alibi_bias(plan.slopes, lengths[:, None] > _positions(plan, lengths), dtype, plan.window)


def _positions(plan: AttentionPlan, like: Tensor) -> Tensor:
    return torch.arange(plan.max_seqlen, device=like.device)


def alibi_bias(slopes: Tensor, key_mask: Tensor, dtype: torch.dtype, window: int = -1) -> Tensor:
    """`-slope * |i - j|`, `(batch, heads, seq, seq)`; `key_mask (batch, seq)` says who is seen."""
    position = torch.arange(key_mask.shape[1], device=key_mask.device)
    distance = (position[:, None] - position[None, :]).abs()  # (seq, seq)
    bias = (-slopes[:, None, None] * distance).to(dtype)  # (heads, seq, seq)
    seen = key_mask[:, None, None, :]
    if window >= 0:
        seen = seen & (distance <= window)
    return torch.where(seen, bias, torch.finfo(dtype).min)


def _sdpa(qkv: Tensor, plan: AttentionPlan) -> Tensor:
    batch, seq = plan.cu_seqlens.numel() - 1, plan.max_seqlen
    padded = qkv
    if plan.slot is not None:
        padded = qkv.new_zeros(batch * seq, *qkv.shape[1:]).index_copy(0, plan.slot, qkv)
    padded = padded.view(batch, seq, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
    q, k, v = padded.unbind()  # each (batch, heads, seq, head_dim)
    if plan.bias is not None:
        out = _padded_attention(q, k, v, plan.bias, plan.dropout_p)
    else:
        group = _group_size(plan)
        parts = []
        for i in range(0, batch, group):
            bias = _padded_bias(plan, i, min(i + group, batch), qkv.dtype)
            some = (q[i : i + group], k[i : i + group], v[i : i + group])
            parts.append(_padded_attention(*some, bias, plan.dropout_p))
        out = torch.cat(parts)
    out = out.transpose(1, 2).flatten(0, 1)  # (batch * seq, heads, head_dim)
    return out if plan.slot is None else out.index_select(0, plan.slot)


def _padded_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout_p: float) -> Tensor:
    """Of `(batch, heads, seq, head_dim)`, by torch's function or, where faster, by products."""
    is_slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if not is_slow or q.shape[2] > MAX_BY_PRODUCTS or bias.numel() > MAX_SCORES:
        return F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout_p)
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1])
    scores = torch.baddbmm(bias.flatten(0, 1), flat_q, flat_k.transpose(1, 2), alpha=scale)
    weights = F.dropout(scores.softmax(dim=-1), dropout_p)
    return torch.bmm(weights, flat_v).view(q.shape)


# --- flex -----------------------------------------------------------------------------------------


def _flex_block_mask(cu_seqlens: Tensor, total_nnz: int, window: int) -> BlockMask:
    """Which blocks of 128 x 128 hold positions of the same sequence.

    Packed sequences are in order, so a block holds sequences first..last, and two blocks share
    one where these ranges overlap: no (total_nnz, total_nnz) mask is ever made.
    """
    padded = -(-total_nnz // FLEX_BLOCK) * FLEX_BLOCK
    document = sequence_ids(cu_seqlens, padded)
    blocks = document.view(-1, FLEX_BLOCK)
    first, last = blocks[:, 0], blocks[:, -1]
    overlap = (first[:, None] <= last[None, :]) & (last[:, None] >= first[None, :])
    full = overlap & (first == last)[:, None] & (first == last)[None, :]
    if window >= 0 or padded != total_nnz:
        full = torch.zeros_like(full)
    partial = overlap & ~full

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        same = document[q] == document[kv]
        return same & ((q - kv).abs() <= window) if window >= 0 else same

    return BlockMask.from_kv_blocks(
        *_block_lists(partial),
        *_block_lists(full),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(total_nnz, total_nnz),
    )


def _block_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`(1, 1, blocks)` counts and `(1, 1, blocks, blocks)` indices, marked ones first."""
    counts = mask.sum(dim=1, dtype=torch.int32)
    indices = torch.argsort(mask.int(), dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None]


@functools.cache
def _compiled_flex() -> object:
    return torch.compile(flex_attention, dynamic=False)


def _flex(qkv: Tensor, plan: AttentionPlan) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in qkv.unbind(1))  # (1, heads, nnz, head_dim)
    slopes = plan.slopes

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * (i - j).abs()

    run = flex_attention
    if qkv.is_cuda and not torch.compiler.is_compiling():  # in eager mode it would fill a matrix
        run = _compiled_flex()  # type: ignore[assignment]
    out = run(q, k, v, score_mod=score_mod, block_mask=plan.block_mask)
    assert isinstance(out, Tensor)
    return out.squeeze(0).transpose(0, 1)


# --- reference ------------------------------------------------------------------------------------


def _reference(qkv: Tensor, plan: AttentionPlan) -> Tensor:
    bounds = plan.cu_seqlens.tolist()
    parts = []
    for start, stop in itertools.pairwise(bounds):
        q, k, v = qkv[start:stop].permute(1, 2, 0, 3).unbind()  # each (heads, length, head_dim)
        position = torch.arange(stop - start, device=qkv.device)
        distance = (position[:, None] - position[None, :]).abs()
        scores = q @ k.transpose(1, 2) / math.sqrt(qkv.shape[-1])
        scores = scores - plan.slopes[:, None, None].to(scores.dtype) * distance
        if plan.window >= 0:
            scores = scores.masked_fill(distance > plan.window, -math.inf)
        weights = F.dropout(scores.softmax(dim=-1), plan.dropout_p)
        parts.append((weights @ v).transpose(0, 1))
    return torch.cat(parts)
