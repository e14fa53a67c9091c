"""The Triton kernels on a GPU against float64, on fresh random inputs and poisoned outputs."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*CUBLAS_WORKSPACE_CONFIG.*"),
    pytest.mark.filterwarnings("ignore:.*not have a deterministic implementation.*"),
]
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from mosaicbert.models.attention import attention  # noqa: E402
from mosaicbert.models.kernels.attention import alibi_attention  # noqa: E402
from mosaicbert.models.kernels.cross_entropy import linear_cross_entropy  # noqa: E402
from mosaicbert.models.kernels.geglu import geglu, geglu_backward, geglu_linear  # noqa: E402
from mosaicbert.models.kernels.layernorm import residual_layer_norm  # noqa: E402

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN: whatever a kernel forgets to write is seen."""
    torch.manual_seed(17)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def off(got: Tensor, want: Tensor) -> float:
    """Relative error by norm; NaN never passes."""
    assert got.isfinite().all()
    return ((got.detach().double() - want).norm() / want.norm()).item()


def exact_attention(qkv: Tensor, cu_seqlens: Tensor, slopes: Tensor, window: int) -> Tensor:
    longest = int(cu_seqlens.diff().max())
    seen = None if window < 0 else window
    return attention(qkv, cu_seqlens, longest, slopes, window=seen, backend="reference")


def random_lengths(max_seqlen: int) -> list[int]:
    some = torch.randint(0, max_seqlen + 1, (5,)).tolist()
    return [0, 1, *some, max_seqlen, 2, max_seqlen - 1, 0, 0]


def check_attention(
    dtype: torch.dtype, heads: int, head_dim: int, lengths: list[int], window: int
) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    slopes = 2.0 ** -torch.linspace(0.5, 8, heads, device=DEVICE)
    qkv = (1.5 * torch.randn(sum(lengths), 3, heads, head_dim, device=DEVICE)).to(dtype)
    qkv.requires_grad_()
    out = alibi_attention(qkv, cu_seqlens, max(lengths), slopes, window)
    grad = torch.randn_like(out)
    out.backward(grad)
    exact = qkv.detach().double().requires_grad_()
    want = exact_attention(exact, cu_seqlens, slopes, window)
    want.backward(grad.double())
    assert qkv.grad is not None
    assert exact.grad is not None
    errors = [off(qkv.grad[:, part], exact.grad[:, part]) for part in range(3)]
    errors.append(off(out, want.detach()))
    assert max(errors) < TOLERANCE[dtype], errors
    again = qkv.detach().requires_grad_()
    alibi_attention(again, cu_seqlens, max(lengths), slopes, window).backward(grad)
    assert again.grad is not None
    assert torch.equal(again.grad, qkv.grad)  # bit by bit


@pytest.mark.parametrize("window", [-1, 20])
@pytest.mark.parametrize("max_seqlen", [1, 16, 50, 64, 128, 300])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention(dtype: torch.dtype, head_dim: int, max_seqlen: int, window: int) -> None:
    check_attention(dtype, 3, head_dim, random_lengths(max_seqlen), window)


@pytest.mark.parametrize("window", [-1, 128])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_long_attention(dtype: torch.dtype, window: int) -> None:
    """Long enough for far tiles to be skipped."""
    check_attention(dtype, 2, 64, [8192, 0, 1000, 1], window)


@pytest.mark.parametrize("num_rows", [1, 77, 4096])
@pytest.mark.parametrize("width", [512, 3072, 100])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_geglu(dtype: torch.dtype, width: int, num_rows: int) -> None:
    x = (2 * torch.randn(num_rows, 2 * width, device=DEVICE)).to(dtype).requires_grad_()
    out = geglu(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    exact = x.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=1)
    want = F.gelu(gate) * up
    want.backward(grad.double())
    assert x.grad is not None
    assert exact.grad is not None
    assert off(out, want.detach()) < TOLERANCE[dtype]
    assert off(x.grad, exact.grad) < TOLERANCE[dtype]


def test_geglu_dropout_repeats_its_mask() -> None:
    seed = torch.tensor([987_654_321_012], device=DEVICE)
    x = torch.rand(1024, 2 * 3072, device=DEVICE, dtype=torch.bfloat16) + 1  # no result is 0
    out = geglu(x, 0.1, seed)
    dx, again, _ = geglu_backward(torch.ones_like(out), x, 0.1, seed, True)
    kept = again != 0
    assert torch.equal(out, again)
    assert off(out, geglu(x).double() * kept / 0.9) < 1e-2
    assert abs(kept.double().mean().item() - 0.9) < 1e-3
    assert torch.equal(dx[:, 3072:] != 0, kept)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 768), (5000, 768), (333, 1024), (2000, 100)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_residual_layer_norm(
    dtype: torch.dtype, num_rows: int, width: int, dropout_p: float
) -> None:
    seed = torch.tensor([55], device=DEVICE)
    x, residual, *grads = torch.randn(4, num_rows, width, device=DEVICE).to(dtype)
    weight, bias, x_bias = torch.randn(3, width, device=DEVICE)
    leaves = [leaf.clone().requires_grad_() for leaf in (x, residual, weight, bias, x_bias)]
    outs = residual_layer_norm(*leaves, 1e-12, dropout_p, seed)
    torch.autograd.backward(outs, grads)
    keep = torch.ones_like(x, dtype=torch.float64)
    if dropout_p:
        assert leaves[0].grad is not None
        keep = (leaves[0].grad != 0) / (1 - dropout_p)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    summed = exact[1] + (exact[0] + exact[4]) * keep
    want = F.layer_norm(summed, (width,), exact[2], exact[3], 1e-12)
    want.backward(grads[0].double() + grads[1].double())
    assert off(outs[0], want.detach()) < TOLERANCE[dtype]
    for mine, theirs in zip(leaves, exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert off(mine.grad, theirs.grad) < TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore:TensorFloat32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_seqlen", [96, 1100])
def test_one_graph_under_inductor(dtype: torch.dtype, max_seqlen: int) -> None:
    """All three, forward and backward, in one compiled graph, for two shapes."""
    slopes = torch.tensor([0.5, 0.25], device=DEVICE)
    seed = torch.tensor([7], device=DEVICE)
    weight, bias, x_bias = torch.randn(3, 128, device=DEVICE)
    square = torch.randn(128, 128, device=DEVICE)

    def block(qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
        mixed = alibi_attention(qkv, cu_seqlens, max_seqlen, slopes).flatten(1)
        normed, again = residual_layer_norm(
            mixed, qkv[:, 0].flatten(1), weight, bias, x_bias, 1e-12, 0.1, seed
        )
        wide = torch.cat([normed * 2, again], 1)
        return geglu(wide, 0.1, seed) + geglu_linear(wide, square, 0.1, seed)

    compiled = torch.compile(block, fullgraph=True)
    for lengths in ([max_seqlen, 50], [max_seqlen, 96, 0, 3]):
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
        qkv = torch.randn(sum(lengths), 3, 2, 64, device=DEVICE).to(dtype).requires_grad_()
        want, got = block(qkv, cu_seqlens), compiled(qkv, cu_seqlens)
        (eager,) = torch.autograd.grad(want.float().square().sum(), qkv)
        (fast,) = torch.autograd.grad(got.float().square().sum(), qkv)
        assert off(got, want.detach().double()) < TOLERANCE[dtype]
        assert off(fast, eager.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "classes"), [(30_528, 30_522), (104, 101)])
def test_linear_cross_entropy(
    width: int, classes: int, dtype: torch.dtype, softcap: float | None
) -> None:
    x = torch.randn(333, 64, device=DEVICE).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(width, 64, device=DEVICE)).requires_grad_()
    bias = torch.randn(width, device=DEVICE, requires_grad=True)
    labels = torch.randint(classes, (333,), device=DEVICE)
    labels[::7] = -100
    loss = linear_cross_entropy(x, weight, bias, labels, classes, softcap)
    (loss / 285).backward()
    leaves = [t.detach().to(dtype).double().requires_grad_() for t in (x, weight, bias)]
    logits = F.linear(*leaves)[:, :classes]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    want = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    (want / 285).backward()
    errors = [off(loss, want.detach())]
    for got, expected in zip((x, weight, bias), leaves, strict=True):
        assert got.grad is not None
        assert expected.grad is not None
        errors.append(off(got.grad, expected.grad))
    assert max(errors) < (1e-2 if dtype == torch.bfloat16 else 2e-5), errors
