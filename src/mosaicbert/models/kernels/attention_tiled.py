"""The kernels of `attention` for any length: tiles, online softmax.

Layouts as in `attention_short`; delta `(heads, total_nnz)` is the row sum of grad * out, which the
dq kernel writes and the dk/dv kernel reads. A program owns one tile of one (sequence, head);
programs of tiles beyond the sequence's end exit at once.
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
# ruff: noqa: N803, N806

import triton
import triton.language as tl

from mosaicbert.models.kernels.attention_short import LOG2_E, MASKED


@triton.jit
def _place(cu_seqlens_ptr, num_tiles, HEADS: tl.constexpr):
    """Tile, head, start and length of the sequence: whose work this program does."""
    pid = tl.program_id(0)
    tile = pid % num_tiles  # tiles of one (sequence, head) run together: they share it in L2
    head = (pid // num_tiles) % HEADS
    seq = pid // (num_tiles * HEADS)
    start = tl.load(cu_seqlens_ptr + seq)
    return tile, head, start, tl.load(cu_seqlens_ptr + seq + 1) - start


@triton.jit
def _reach(tile, length, window, OWN: tl.constexpr, OTHER: tl.constexpr, WINDOW: tl.constexpr):
    """First and last + 1 position of the other side that tile `tile` of `OWN` positions sees."""
    low = 0
    high = length
    if WINDOW:
        low = tl.maximum(tile * OWN - window, 0) // OTHER * OTHER
        high = tl.minimum(tile * OWN + OWN + window, length)
    return low, high


@triton.jit
def _distance(rows, cols):
    return tl.abs(rows[:, None].to(tl.float32) - cols[None, :].to(tl.float32))


@triton.jit
def forward_kernel(
    qkv_ptr, out_ptr, lse_ptr, cu_seqlens_ptr, slopes_ptr, scale, window, total_nnz, num_tiles,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of queries."""
    HIDDEN: tl.constexpr = HEADS * HEAD_DIM
    tile, head, start, length = _place(cu_seqlens_ptr, num_tiles, HEADS)
    if tile * QUERIES >= length:
        return
    dim = tl.arange(0, HEAD_DIM)
    i = tile * QUERIES + tl.arange(0, QUERIES)
    q_ptr = qkv_ptr + start.to(tl.int64) * (3 * HIDDEN) + head * HEAD_DIM
    q = tl.load(
        q_ptr + i[:, None] * (3 * HIDDEN) + dim[None, :], mask=(i < length)[:, None], other=0.0
    )
    slope = tl.load(slopes_ptr + head) * LOG2_E
    highest = tl.full([QUERIES], MASKED, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
    low, high = _reach(tile, length, window, QUERIES, KEYS, WINDOW)
    for first in tl.range(low, high, KEYS, num_stages=STAGES):
        j = first + tl.arange(0, KEYS)
        k_ptrs = q_ptr + HIDDEN + j[:, None] * (3 * HIDDEN) + dim[None, :]
        k = tl.load(k_ptrs, mask=(j < length)[:, None], other=0.0)
        v = tl.load(k_ptrs + HIDDEN, mask=(j < length)[:, None], other=0.0)
        distance = _distance(i, j)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - slope * distance
        seen = (j < length)[None, :]
        if WINDOW:
            seen = seen & (distance <= window)
        s = tl.where(seen, s, MASKED)
        higher = tl.maximum(highest, tl.max(s, 1))
        shrink = tl.exp2(highest - higher)
        p = tl.exp2(s - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        out = out * shrink[:, None]
        out = tl.dot(p.to(v.dtype), v, out, input_precision="ieee")
        highest = higher
    real = i < length
    out_ptr += start.to(tl.int64) * HIDDEN + head * HEAD_DIM
    out_ptrs = out_ptr + i[:, None] * HIDDEN + dim[None, :]
    tl.store(out_ptrs, out / total[:, None], mask=real[:, None])
    lse_ptrs = lse_ptr + head.to(tl.int64) * total_nnz + start + i
    tl.store(lse_ptrs, highest + tl.log2(total), mask=real)


@triton.jit
def dq_kernel(
    grad_ptr, qkv_ptr, out_ptr, dqkv_ptr, lse_ptr, delta_ptr, cu_seqlens_ptr, slopes_ptr,
    scale, window, total_nnz, num_tiles,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq and delta of one tile of queries."""
    HIDDEN: tl.constexpr = HEADS * HEAD_DIM
    tile, head, start, length = _place(cu_seqlens_ptr, num_tiles, HEADS)
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
    slope = tl.load(slopes_ptr + head) * LOG2_E
    dq = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
    low, high = _reach(tile, length, window, QUERIES, KEYS, WINDOW)
    for first in tl.range(low, high, KEYS, num_stages=STAGES):
        j = first + tl.arange(0, KEYS)
        k_ptrs = q_ptr + HIDDEN + j[:, None] * (3 * HIDDEN) + dim[None, :]
        k = tl.load(k_ptrs, mask=(j < length)[:, None], other=0.0)
        v = tl.load(k_ptrs + HIDDEN, mask=(j < length)[:, None], other=0.0)
        distance = _distance(i, j)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - slope * distance
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        seen = (j < length)[None, :]
        if WINDOW:
            seen = seen & (distance <= window)
        p = tl.exp2(tl.where(seen, s - lse[:, None], MASKED))
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    dq_ptrs = dqkv_ptr + at + i[:, None] * (3 * HIDDEN) + dim[None, :]
    tl.store(dq_ptrs, dq * (scale / LOG2_E), mask=real[:, None])


@triton.jit
def dkv_kernel(
    grad_ptr, qkv_ptr, out_ptr, dqkv_ptr, lse_ptr, delta_ptr, cu_seqlens_ptr, slopes_ptr,
    scale, window, total_nnz, num_tiles,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys; scores transposed, `(keys, queries)`."""
    HIDDEN: tl.constexpr = HEADS * HEAD_DIM
    tile, head, start, length = _place(cu_seqlens_ptr, num_tiles, HEADS)
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
    slope = tl.load(slopes_ptr + head) * LOG2_E
    dk = tl.zeros([KEYS, HEAD_DIM], tl.float32)
    dv = tl.zeros([KEYS, HEAD_DIM], tl.float32)
    low, high = _reach(tile, length, window, KEYS, QUERIES, WINDOW)
    for first in tl.range(low, high, QUERIES, num_stages=STAGES):
        i = first + tl.arange(0, QUERIES)
        inside = i < length
        q_ptrs = q_ptr + i[:, None] * (3 * HIDDEN) + dim[None, :]
        q = tl.load(q_ptrs, mask=inside[:, None], other=0.0)
        grad_ptrs = grad_ptr + i[:, None] * HIDDEN + dim[None, :]
        grad = tl.load(grad_ptrs, mask=inside[:, None], other=0.0)
        # Queries beyond the end get p = exp2(-inf) = 0. Rows of keys beyond the end may overflow:
        # they mix with no other row and are not stored.
        lse = tl.load(lse_ptr + rows_at + i, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + rows_at + i, mask=inside, other=0.0)
        distance = _distance(j, i)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale - slope * distance
        s -= lse[None, :]
        if WINDOW:
            s = tl.where(distance <= window, s, MASKED)
        p = tl.exp2(s)
        dv = tl.dot(p.to(q.dtype), grad, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    dk_ptrs = dqkv_ptr + at + HIDDEN + j[:, None] * (3 * HIDDEN) + dim[None, :]
    tl.store(dk_ptrs, dk * (scale / LOG2_E), mask=real[:, None])
    tl.store(dk_ptrs + HIDDEN, dv, mask=real[:, None])
