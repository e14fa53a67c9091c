"""The kernels of `attention` for short sequences: one program, one whole (sequence, head).

Layouts: qkv and dqkv `(total_nnz, 3, heads, head_dim)`, out and grad `(total_nnz, heads,
head_dim)`, lse `(heads, total_nnz)`. Scores are in base 2: `SCALE` is log2(e) / sqrt(head_dim).
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
# ruff: noqa: N803, N806

import triton
import triton.language as tl

from mosaicbert.models.kernels.eight import store_eight

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
MASKED: tl.constexpr = tl.constexpr(-1e30)  # finite: rows that only fill the tile up see no key


@triton.jit
def _biased(scores, pos, real, slope, window, WINDOW: tl.constexpr):
    """Scores with ALiBi; keys beyond the end masked, queries not, as nothing comes of them."""
    sloped = pos.to(tl.float32) * slope
    s = scores - tl.abs(sloped[:, None] - sloped[None, :])
    seen = real[None, :]
    if WINDOW:
        seen = seen & (tl.abs(pos[:, None] - pos[None, :]) <= window)
    return tl.where(seen, s, MASKED)


@triton.jit
def forward_kernel(
    qkv_ptr, out_ptr, out8_ptr, lse_ptr, cu_seqlens_ptr, slopes_ptr, window, total_nnz,
    SCALE: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr,
    EIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one (sequence, head)."""
    HIDDEN: tl.constexpr = HEADS * HEAD_DIM
    head = tl.program_id(0) % HEADS  # heads of a sequence run together: they share DRAM pages
    seq = tl.program_id(0) // HEADS
    start = tl.load(cu_seqlens_ptr + seq)
    length = tl.load(cu_seqlens_ptr + seq + 1) - start
    if length <= 0:
        return
    pos = tl.arange(0, BLOCK)
    dim = tl.arange(0, HEAD_DIM)
    real = pos < length
    at = start.to(tl.int64) * (3 * HIDDEN) + head * HEAD_DIM
    q_ptrs = qkv_ptr + at + pos[:, None] * (3 * HIDDEN) + dim[None, :]
    q = tl.load(q_ptrs, mask=real[:, None], other=0.0)
    k = tl.load(q_ptrs + HIDDEN, mask=real[:, None], other=0.0)
    v = tl.load(q_ptrs + 2 * HIDDEN, mask=real[:, None], other=0.0)

    slope = tl.load(slopes_ptr + head) * LOG2_E
    s = _biased(tl.dot(q, tl.trans(k)) * SCALE, pos, real, slope, window, WINDOW)
    highest = tl.max(s, 1)
    p = tl.exp2(s - highest[:, None])
    total = tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v) * (1.0 / total)[:, None]
    at = start.to(tl.int64) * HIDDEN + head * HEAD_DIM + pos[:, None] * HIDDEN + dim[None, :]
    tl.store(out_ptr + at, out, mask=real[:, None])
    if EIGHT > 0:
        store_eight(out8_ptr, at, out, real[:, None], EIGHT, 448.0)
    lse_ptrs = lse_ptr + head.to(tl.int64) * total_nnz + start + pos
    tl.store(lse_ptrs, highest + tl.log2(total), mask=real)


@triton.jit
def backward_kernel(
    grad_ptr, qkv_ptr, dqkv_ptr, dqkv8_ptr, lse_ptr, cu_seqlens_ptr, slopes_ptr, window, total_nnz,
    SCALE: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr,
    EIGHT: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of q, k and v of `GROUP` heads of one sequence, the next head loading meanwhile."""
    HIDDEN: tl.constexpr = HEADS * HEAD_DIM
    first = tl.program_id(0) % (HEADS // GROUP) * GROUP
    seq = tl.program_id(0) // (HEADS // GROUP)
    start = tl.load(cu_seqlens_ptr + seq)
    length = tl.load(cu_seqlens_ptr + seq + 1) - start
    if length <= 0:
        return
    pos = tl.arange(0, BLOCK)
    dim = tl.arange(0, HEAD_DIM)
    real = pos < length
    wide = start.to(tl.int64) * (3 * HIDDEN) + pos[:, None] * (3 * HIDDEN) + dim[None, :]
    narrow = start.to(tl.int64) * HIDDEN + pos[:, None] * HIDDEN + dim[None, :]
    for head in tl.range(first, first + GROUP, num_stages=STAGES):
        q_ptrs = qkv_ptr + wide + head * HEAD_DIM
        q = tl.load(q_ptrs, mask=real[:, None], other=0.0)
        k = tl.load(q_ptrs + HIDDEN, mask=real[:, None], other=0.0)
        v = tl.load(q_ptrs + 2 * HIDDEN, mask=real[:, None], other=0.0)
        grad = tl.load(grad_ptr + narrow + head * HEAD_DIM, mask=real[:, None], other=0.0)
        lse_ptrs = lse_ptr + tl.cast(head, tl.int64) * total_nnz + start + pos
        lse = tl.load(lse_ptrs, mask=real, other=0.0)

        slope = tl.load(slopes_ptr + head) * LOG2_E
        s = _biased(tl.dot(q, tl.trans(k)) * SCALE, pos, real, slope, window, WINDOW)
        p = tl.exp2(s - lse[:, None])  # (queries, keys); rows beyond the end have no gradient
        dq_at = wide + head * HEAD_DIM
        dv = tl.dot(tl.trans(p.to(q.dtype)), grad)
        tl.store(dqkv_ptr + dq_at + 2 * HIDDEN, dv, mask=real[:, None])
        if EIGHT:
            store_eight(dqkv8_ptr, dq_at + 2 * HIDDEN, dv, real[:, None], 1.0, 57344.0)
        dp = tl.dot(grad, tl.trans(v))
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q.dtype)
        dq = tl.dot(ds, k) * (SCALE / LOG2_E)
        tl.store(dqkv_ptr + dq_at, dq, mask=real[:, None])
        if EIGHT:
            store_eight(dqkv8_ptr, dq_at, dq, real[:, None], 1.0, 57344.0)
        dk = tl.dot(tl.trans(ds), q) * (SCALE / LOG2_E)
        tl.store(dqkv_ptr + dq_at + HIDDEN, dk, mask=real[:, None])
        if EIGHT:
            store_eight(dqkv8_ptr, dq_at + HIDDEN, dk, real[:, None], 1.0, 57344.0)
