"""The kernels of `attention` for any length: tiles, online softmax.

Layouts as in `attention_short`; delta `(heads, total_nnz)` is the row sum of grad * out, which the
dq kernel writes and the dk/dv kernel reads. A program owns one tile of one (sequence, head);
programs of tiles beyond the sequence's end exit at once. Tiles beyond `reach` are skipped.

Distances are differences of float positions, exact up to 2^24; keys (or queries) beyond the end of
the sequence stand at `FAR`, where any slope masks them, so that no element pays for a mask.
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
# ruff: noqa: N803, N806

import triton
import triton.language as tl

from mosaicbert.models.kernels.attention_short import LOG2_E, MASKED
from mosaicbert.models.kernels.eight import store_eight

FAR: tl.constexpr = tl.constexpr(1e30)
LEAST_SLOPE: tl.constexpr = tl.constexpr(1e-20)  # stands for 0: FAR masks, and |i - j| adds nothing
UNLIMITED: tl.constexpr = tl.constexpr(1 << 24)
NEGLIGIBLE: tl.constexpr = tl.constexpr(25.0)  # nats: e^-25 times 8,192 keys is float32's rounding


@triton.jit
def _place(cu_seqlens_ptr, num_tiles, HEADS: tl.constexpr):
    """Tile, sequence * heads + head, head, start and length of the sequence: whose work this is."""
    pid = tl.program_id(0)
    tile = pid % num_tiles  # tiles of one (sequence, head) run together: they share it in L2
    unit = pid // num_tiles
    start = tl.load(cu_seqlens_ptr + unit // HEADS)
    length = tl.load(cu_seqlens_ptr + unit // HEADS + 1) - start
    return tile, unit, unit % HEADS, start, length


@triton.jit
def _slope(slopes_ptr, head):
    return tl.maximum(tl.load(slopes_ptr + head) * LOG2_E, LEAST_SLOPE)


@triton.jit
def reach_kernel(
    qkv_ptr, reach_ptr, cu_seqlens_ptr, slopes_ptr, window,
    SCALE: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """How far the positions of one (sequence, head) see: `reach (batch, heads)` int32.

    A score differs from the query's own, at distance 0, by at most 2 max|q| max|k|; where ALiBi has
    taken that and `NEGLIGIBLE` more, the softmax weight rounds to nothing.
    """
    HIDDEN: tl.constexpr = HEADS * HEAD_DIM
    _, unit, head, start, length = _place(cu_seqlens_ptr, 1, HEADS)
    dim = tl.arange(0, HEAD_DIM)
    q_max = tl.zeros([ROWS], tl.float32)
    k_max = tl.zeros([ROWS], tl.float32)
    q_ptr = qkv_ptr + start.to(tl.int64) * (3 * HIDDEN) + head * HEAD_DIM
    for first in range(0, length, ROWS):
        i = first + tl.arange(0, ROWS)
        ptrs = q_ptr + i[:, None] * (3 * HIDDEN) + dim[None, :]
        q = tl.load(ptrs, mask=(i < length)[:, None], other=0.0).to(tl.float32)
        k = tl.load(ptrs + HIDDEN, mask=(i < length)[:, None], other=0.0).to(tl.float32)
        q_max = tl.maximum(q_max, tl.sum(q * q, 1))
        k_max = tl.maximum(k_max, tl.sum(k * k, 1))
    spread = 2.0 * SCALE * tl.sqrt(tl.max(q_max, 0)) * tl.sqrt(tl.max(k_max, 0))
    reach = (spread + NEGLIGIBLE * LOG2_E) / _slope(slopes_ptr, head)
    # The comparison is false for NaN and infinity: then everything is computed, and shows them.
    reach = tl.where(reach < UNLIMITED, reach, UNLIMITED).to(tl.int32)
    if WINDOW:
        reach = tl.minimum(reach, window)
    tl.store(reach_ptr + unit, reach)


@triton.jit
def _span(reach_ptr, unit, tile, length, OWN: tl.constexpr, OTHER: tl.constexpr):
    """First and last + 1 position of the other side that tile `tile` of `OWN` positions sees."""
    reach = tl.load(reach_ptr + unit)
    low = tl.maximum(tile * OWN - reach, 0) // OTHER * OTHER
    return low, tl.minimum(tile * OWN + OWN + reach, length)


@triton.jit
def _places(i, length):
    """Positions as floats, those beyond the end at `FAR`."""
    return tl.where(i < length, i.to(tl.float32), FAR)


@triton.jit
def forward_kernel(
    qkv_ptr, out_ptr, out8_ptr, lse_ptr, cu_seqlens_ptr, slopes_ptr, window, total_nnz, reach_ptr,
    num_tiles,
    SCALE: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr,
    EIGHT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of queries."""
    HIDDEN: tl.constexpr = HEADS * HEAD_DIM
    tile, unit, head, start, length = _place(cu_seqlens_ptr, num_tiles, HEADS)
    if tile * QUERIES >= length:
        return
    dim = tl.arange(0, HEAD_DIM)
    i = tile * QUERIES + tl.arange(0, QUERIES)
    q_ptr = qkv_ptr + start.to(tl.int64) * (3 * HIDDEN) + head * HEAD_DIM
    q = tl.load(
        q_ptr + i[:, None] * (3 * HIDDEN) + dim[None, :], mask=(i < length)[:, None], other=0.0
    )
    slope = _slope(slopes_ptr, head)
    highest = tl.full([QUERIES], MASKED, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
    low, high = _span(reach_ptr, unit, tile, length, QUERIES, KEYS)
    for first in tl.range(low, high, KEYS, num_stages=STAGES):
        j = first + tl.arange(0, KEYS)
        k_ptrs = q_ptr + HIDDEN + j[:, None] * (3 * HIDDEN) + dim[None, :]
        k = tl.load(k_ptrs, mask=(j < length)[:, None], other=0.0)
        v = tl.load(k_ptrs + HIDDEN, mask=(j < length)[:, None], other=0.0)
        distance = tl.abs(i.to(tl.float32)[:, None] - _places(j, length)[None, :])
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE - slope * distance
        if WINDOW:
            s = tl.where(distance <= window, s, MASKED)
        higher = tl.maximum(highest, tl.max(s, 1))
        shrink = tl.exp2(highest - higher)
        p = tl.exp2(s - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        out = out * shrink[:, None]
        out = tl.dot(p.to(v.dtype), v, out, input_precision="ieee")
        highest = higher
    real = i < length
    out_at = start.to(tl.int64) * HIDDEN + head * HEAD_DIM + i[:, None] * HIDDEN + dim[None, :]
    out = out / total[:, None]
    tl.store(out_ptr + out_at, out, mask=real[:, None])
    if EIGHT > 0:
        store_eight(out8_ptr, out_at, out, real[:, None], EIGHT, 448.0)
    lse_ptrs = lse_ptr + head.to(tl.int64) * total_nnz + start + i
    tl.store(lse_ptrs, highest + tl.log2(total), mask=real)


@triton.jit
def dq_kernel(
    grad_ptr, qkv_ptr, out_ptr, dqkv_ptr, dqkv8_ptr, lse_ptr, delta_ptr, cu_seqlens_ptr,
    slopes_ptr, window, total_nnz, reach_ptr, num_tiles,
    SCALE: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr,
    EIGHT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries, and its delta."""
    HIDDEN: tl.constexpr = HEADS * HEAD_DIM
    tile, unit, head, start, length = _place(cu_seqlens_ptr, num_tiles, HEADS)
    if tile * QUERIES >= length:
        return
    dim = tl.arange(0, HEAD_DIM)
    i = tile * QUERIES + tl.arange(0, QUERIES)
    real = i < length
    at = start.to(tl.int64) * (3 * HIDDEN) + head * HEAD_DIM
    q_ptr = qkv_ptr + at
    q = tl.load(q_ptr + i[:, None] * (3 * HIDDEN) + dim[None, :], mask=real[:, None], other=0.0)
    narrow = start.to(tl.int64) * HIDDEN + head * HEAD_DIM + i[:, None] * HIDDEN + dim[None, :]
    grad = tl.load(grad_ptr + narrow, mask=real[:, None], other=0.0)
    out = tl.load(out_ptr + narrow, mask=real[:, None], other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    row_at = head.to(tl.int64) * total_nnz + start + i
    tl.store(delta_ptr + row_at, delta, mask=real)
    lse = tl.load(lse_ptr + row_at, mask=real, other=0.0)
    slope = _slope(slopes_ptr, head)
    dq = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
    low, high = _span(reach_ptr, unit, tile, length, QUERIES, KEYS)
    for first in tl.range(low, high, KEYS, num_stages=STAGES):
        j = first + tl.arange(0, KEYS)
        k_ptrs = q_ptr + HIDDEN + j[:, None] * (3 * HIDDEN) + dim[None, :]
        k = tl.load(k_ptrs, mask=(j < length)[:, None], other=0.0)
        v = tl.load(k_ptrs + HIDDEN, mask=(j < length)[:, None], other=0.0)
        distance = tl.abs(i.to(tl.float32)[:, None] - _places(j, length)[None, :])
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE - slope * distance
        if WINDOW:
            s = tl.where(distance <= window, s, MASKED)
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        p = tl.exp2(s - lse[:, None])
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    dq_at = at + i[:, None] * (3 * HIDDEN) + dim[None, :]
    dq = dq * (SCALE / LOG2_E)
    tl.store(dqkv_ptr + dq_at, dq, mask=real[:, None])
    if EIGHT:
        store_eight(dqkv8_ptr, dq_at, dq, real[:, None], 1.0, 57344.0)


@triton.jit
def dkv_kernel(
    grad_ptr, qkv_ptr, out_ptr, dqkv_ptr, dqkv8_ptr, lse_ptr, delta_ptr, cu_seqlens_ptr,
    slopes_ptr, window, total_nnz, reach_ptr, num_tiles,
    SCALE: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr,
    EIGHT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values; scores transposed, `(keys, queries)`."""
    HIDDEN: tl.constexpr = HEADS * HEAD_DIM
    tile, unit, head, start, length = _place(cu_seqlens_ptr, num_tiles, HEADS)
    if tile * KEYS >= length:
        return
    dim = tl.arange(0, HEAD_DIM)
    j = tile * KEYS + tl.arange(0, KEYS)
    real = j < length
    at = start.to(tl.int64) * (3 * HIDDEN) + head * HEAD_DIM
    q_ptr = qkv_ptr + at
    k_ptrs = q_ptr + HIDDEN + j[:, None] * (3 * HIDDEN) + dim[None, :]
    k = tl.load(k_ptrs, mask=real[:, None], other=0.0)
    v = tl.load(k_ptrs + HIDDEN, mask=real[:, None], other=0.0)
    grad_ptr += start.to(tl.int64) * HIDDEN + head * HEAD_DIM
    rows_at = head.to(tl.int64) * total_nnz + start
    slope = _slope(slopes_ptr, head)
    dk = tl.zeros([KEYS, HEAD_DIM], tl.float32)
    dv = tl.zeros([KEYS, HEAD_DIM], tl.float32)
    low, high = _span(reach_ptr, unit, tile, length, KEYS, QUERIES)
    for first in tl.range(low, high, QUERIES, num_stages=STAGES):
        i = first + tl.arange(0, QUERIES)
        inside = i < length
        q_ptrs = q_ptr + i[:, None] * (3 * HIDDEN) + dim[None, :]
        q = tl.load(q_ptrs, mask=inside[:, None], other=0.0)
        grad_ptrs = grad_ptr + i[:, None] * HIDDEN + dim[None, :]
        grad = tl.load(grad_ptrs, mask=inside[:, None], other=0.0)
        lse = tl.load(lse_ptr + rows_at + i, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + rows_at + i, mask=inside, other=0.0)
        distance = tl.abs(_places(j, length)[:, None] - i.to(tl.float32)[None, :])
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * SCALE - slope * distance
        s -= tl.where(inside, lse, FAR)[None, :]  # queries beyond the end weigh nothing
        if WINDOW:
            s = tl.where(distance <= window, s, MASKED)
        p = tl.exp2(s)
        dv = tl.dot(p.to(q.dtype), grad, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    dk_at = at + HIDDEN + j[:, None] * (3 * HIDDEN) + dim[None, :]
    dk = dk * (SCALE / LOG2_E)
    tl.store(dqkv_ptr + dk_at, dk, mask=real[:, None])
    tl.store(dqkv_ptr + dk_at + HIDDEN, dv, mask=real[:, None])
    if EIGHT:
        store_eight(dqkv8_ptr, dk_at, dk, real[:, None], 1.0, 57344.0)
        store_eight(dqkv8_ptr, dk_at + HIDDEN, dv, real[:, None], 1.0, 57344.0)
