"""Every attention backend on a GPU against float64, gradients too."""

import pytest
import torch

from mosaicbert.models.attention import alibi_slopes, attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
LENGTHS = [0, 1, 5, 128, 77, 0, 700, 3]


def output_and_gradients(qkv, cu_seqlens, window, backend):
    """Output, and the gradients of q, k and v for fixed gradients of it."""
    qkv = qkv.clone().requires_grad_()
    slopes = alibi_slopes(qkv.shape[2], qkv.device)
    out = attention(qkv, cu_seqlens, max(LENGTHS), slopes, window=window, backend=backend)
    weights = torch.linspace(-1, 1, out.numel(), device="cuda", dtype=torch.bfloat16)
    weights = weights.view_as(out).to(out.dtype)  # the same values in every dtype
    (grad,) = torch.autograd.grad(out, qkv, weights)
    return out.detach(), *grad.unbind(1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("backend", "head_dim", "window"),
    [
        ("triton", 32, None),
        ("triton", 64, 20),
        ("triton", 128, None),
        ("flex", 48, None),
        ("flex", 64, 20),
        ("sdpa", 48, 20),
        ("sdpa", 64, None),
        ("reference", 64, None),
    ],
)
def test_backends(backend, head_dim, window, dtype):
    torch.set_float32_matmul_precision("highest")
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(LENGTHS), 3, 3, head_dim, generator=generator).to("cuda", dtype)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int().to("cuda")
    want = output_and_gradients(qkv.double(), cu_seqlens, window, "reference")
    got = output_and_gradients(qkv, cu_seqlens, window, backend)
    for name, ours, exact in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert ours.dtype == dtype
        assert ours.isfinite().all()
        error = ((ours.double() - exact).norm() / exact.norm()).item()
        print(f"off: {backend} {head_dim} {dtype} {name}: {error:.1e}")
        assert error < TOLERANCE[dtype], name


@pytest.mark.parametrize("backend", ["triton", "flex", "sdpa"])
def test_rows_without_a_token_leave_no_nan(backend):
    qkv = torch.randn(2, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 0, 1, 1, 2, 2], dtype=torch.int32, device="cuda")
    qkv.requires_grad_()
    out = attention(qkv, cu_seqlens, 8, alibi_slopes(2, "cuda"), backend=backend)
    torch.testing.assert_close(out, qkv[:, 2])  # a token that sees itself alone
    out.sum().backward()
    torch.testing.assert_close(qkv.grad[:, 2], torch.ones_like(qkv.grad[:, 2]))
    assert (qkv.grad[:, :2].abs() < 1e-2).all()
