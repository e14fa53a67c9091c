"""Every way to compute attention gives what the plain loop in float64 gives."""

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicbert.errors import ConfigError
from mosaicbert.models import attention as module
from mosaicbert.models.attention import (
    alibi_slopes,
    attention,
    choose_backend,
    plan_attention,
    run_attention,
)

LENGTHS = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any)


def packed(lengths: list[int], heads: int = 3, head_dim: int = 8, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=generator, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return qkv, cu_seqlens, max(lengths)


def output_and_gradient(qkv, *args, **kwargs):
    qkv = qkv.clone().requires_grad_()
    out = attention(qkv, *args, **kwargs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, torch.autograd.grad((out * weights).sum(), qkv)[0]


def test_slopes_of_12_heads():
    exponents = [-1, -2, -3, -4, -5, -6, -7, -8, -0.5, -1.5, -2.5, -3.5]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor([2.0**e for e in exponents]))


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 16])
def test_slopes_of_a_power_of_two_are_geometric(heads):
    power = 2 ** int(math.log2(heads))
    expected = torch.tensor([2 ** (-8 * (i + 1) / power) for i in range(power)])
    torch.testing.assert_close(alibi_slopes(heads)[:power], expected)
    assert alibi_slopes(heads).unique().numel() == heads


@settings(max_examples=30, deadline=None, derandomize=True)
@given(LENGTHS, st.sampled_from([None, 0, 3]))
def test_sdpa_agrees_with_the_reference(lengths, window):
    qkv, cu_seqlens, max_seqlen = packed(lengths)
    args = (cu_seqlens, max_seqlen, alibi_slopes(3))
    want, want_grad = output_and_gradient(qkv, *args, window=window, backend="reference")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        got, grad = output_and_gradient(qkv.to(dtype), *args, window=window, backend="sdpa")
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(grad.double(), want_grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("by_products", [0, 256])
def test_sdpa_in_bfloat16(by_products, monkeypatch):
    monkeypatch.setattr(module, "MAX_BY_PRODUCTS", by_products)
    qkv, cu_seqlens, max_seqlen = packed([17, 0, 40, 1], head_dim=32)
    qkv = qkv.bfloat16()
    args = (cu_seqlens, max_seqlen, alibi_slopes(3))
    want, want_grad = output_and_gradient(qkv.double(), *args, backend="reference")
    got, grad = output_and_gradient(qkv, *args, backend="sdpa")
    assert (got.double() - want).norm() < 0.01 * want.norm()
    assert (grad.double() - want_grad).norm() < 0.02 * want_grad.norm()


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
@pytest.mark.parametrize("window", [None, 5])
@torch.no_grad()
def test_flex_agrees_with_the_reference(window):
    qkv, cu_seqlens, max_seqlen = packed([130, 3, 77, 0, 1, 190], head_dim=16)
    args = (cu_seqlens, max_seqlen, alibi_slopes(3))
    want = attention(qkv, *args, window=window, backend="reference")
    got = attention(qkv.float(), *args, window=window, backend="flex")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_flex_blocks_cover_every_pair_of_a_sequence():
    lengths = [130, 3, 77, 0, 1, 190]
    _, cu_seqlens, max_seqlen = packed(lengths)
    total = sum(lengths)
    plan = plan_attention(
        cu_seqlens, max_seqlen, alibi_slopes(3),
        total_nnz=total, head_dim=16, dtype=torch.float32, backend="flex",
    )  # fmt: skip
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    same = document[:, None] == document[None, :]
    blocks = plan.block_mask.to_dense()[0, 0].bool()
    row, col = same.nonzero(as_tuple=True)
    assert blocks[row // 128, col // 128].all()
    assert not blocks.all()


def test_groups_of_sequences_agree_with_all_at_once(monkeypatch):
    qkv, cu_seqlens, max_seqlen = packed([5, 9, 0, 1, 7])
    args = (cu_seqlens, max_seqlen, alibi_slopes(3))
    want = output_and_gradient(qkv, *args, backend="sdpa")
    monkeypatch.setattr(module, "MAX_BIAS_ELEMENTS", 2 * 3 * 81)
    for ours, expected in zip(output_and_gradient(qkv, *args, backend="sdpa"), want, strict=True):
        torch.testing.assert_close(ours, expected)


def test_no_sequence_sees_another():
    qkv, cu_seqlens, max_seqlen = packed([4, 6, 3])
    args = (cu_seqlens, max_seqlen, alibi_slopes(3))
    want = attention(qkv, *args)
    qkv[4:10] = 1e3
    got = attention(qkv, *args)
    torch.testing.assert_close(got[:4], want[:4])
    torch.testing.assert_close(got[10:], want[10:])


def test_empty_sequences_leave_gradients_finite():
    qkv, cu_seqlens, _ = packed([0, 3, 0, 0, 1, 0])
    out, grad = output_and_gradient(qkv.float(), cu_seqlens, 8, alibi_slopes(3))
    assert out.isfinite().all()
    assert grad.isfinite().all()


def test_attention_dropout_drops_in_training_only():
    qkv, cu_seqlens, max_seqlen = packed([40, 30])
    args = (cu_seqlens, max_seqlen, alibi_slopes(3))
    clean = attention(qkv, *args)
    torch.testing.assert_close(attention(qkv, *args, dropout_p=0.5, training=False), clean)
    torch.manual_seed(0)
    runs = torch.stack([attention(qkv, *args, dropout_p=0.5, training=True) for _ in range(300)])
    assert not torch.equal(runs[0], runs[1])
    assert (runs.mean(0) - clean).abs().mean() < 0.1 * clean.abs().mean() + 0.05


def test_the_path_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(module.kernels, "why_not", lambda device: None)
    module._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=module.__name__):
        for _ in range(3):
            choose_backend(torch.device("cuda"), 64, torch.float32)
            choose_backend(torch.device("cuda"), 64, torch.float32, dropout_p=0.1)
            choose_backend(torch.device("cuda"), 64, torch.float32, override="reference")
    assert [record.message for record in caplog.records] == [
        "Attention runs as 'triton' on cuda (the fastest).",
        "Attention runs as 'sdpa' on cuda (not triton or flex: attention dropout needs the "
        "attention weights, a slow path).",
        "Attention runs as 'reference' on cuda (asked for).",
    ]


@pytest.mark.parametrize(
    ("asked", "head_dim", "dtype", "dropout_p", "message"),
    [
        ("triton", 64, torch.float32, 0.0, "but (triton is not installed|the device is cpu)"),
        ("triton", 48, torch.float32, 0.0, "head sizes 32, 64 and 128, not 48"),
        ("triton", 64, torch.float32, 0.1, "attention dropout"),
        ("flex", 64, torch.float32, 0.1, "attention dropout"),
        ("flex", 64, torch.float64, 0.0, "no float64"),
        ("flex", 8, torch.float32, 0.0, "head size 8 is too small"),
        ("flex", 64, torch.float32, 0.0, "on CPUs torch has no backward pass"),
    ],
)
def test_a_backend_that_cannot_do_what_it_is_asked_for(asked, head_dim, dtype, dropout_p, message):
    """Nothing is left out in silence: a kernel without dropout does not stand in for dropout."""
    with pytest.raises(ConfigError, match=message):
        choose_backend(torch.device("cpu"), head_dim, dtype, dropout_p, asked)


def test_the_environment_overrides(monkeypatch):
    monkeypatch.setenv("MOSAICBERT_ATTENTION", "reference")
    assert choose_backend(torch.device("cpu"), 64, torch.float32) == "reference"
    monkeypatch.setenv("MOSAICBERT_ATTENTION", "tritn")
    with pytest.raises(ConfigError, match='Did you mean "triton"'):
        choose_backend(torch.device("cpu"), 64, torch.float32)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "dropout_p", "expected"),
    [
        (64, torch.bfloat16, 0.0, "triton"),
        (64, torch.bfloat16, 0.1, "sdpa"),
        (48, torch.bfloat16, 0.0, "flex"),
        (8, torch.bfloat16, 0.0, "sdpa"),
        (64, torch.float64, 0.0, "sdpa"),
    ],
)
def test_choice_where_the_kernels_run(monkeypatch, head_dim, dtype, dropout_p, expected):
    monkeypatch.setattr(module.kernels, "why_not", lambda device: None)
    assert choose_backend(torch.device("cuda"), head_dim, dtype, dropout_p) == expected


def test_a_layer_compiles_into_one_graph():
    qkv, cu_seqlens, max_seqlen = packed([5, 9, 1])
    plan = plan_attention(
        cu_seqlens, max_seqlen, alibi_slopes(3),
        total_nnz=15, head_dim=8, dtype=qkv.dtype, backend="sdpa",
    )  # fmt: skip
    compiled = torch.compile(run_attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(qkv, plan), run_attention(qkv, plan))
