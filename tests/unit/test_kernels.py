"""The Triton kernels in Triton's interpreter, on the CPU, against float64."""

from collections.abc import Iterator

import numpy
import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)
triton = pytest.importorskip("triton", reason="the kernels need triton")
if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
    pytest.skip("the interpreter of triton < 3.7 needs numpy < 2.4", allow_module_level=True)
if not triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is not 1 (tests/conftest.py sets it)", allow_module_level=True)

from mosaicbert.models.attention import attention  # noqa: E402
from mosaicbert.models.kernels import attention as attention_module  # noqa: E402
from mosaicbert.models.kernels import cross_entropy as cross_entropy_module  # noqa: E402
from mosaicbert.models.kernels import geglu as geglu_module  # noqa: E402
from mosaicbert.models.kernels.attention import alibi_attention  # noqa: E402
from mosaicbert.models.kernels.cross_entropy import linear_cross_entropy  # noqa: E402
from mosaicbert.models.kernels.geglu import geglu, geglu_backward, geglu_linear  # noqa: E402
from mosaicbert.models.kernels.layernorm import residual_layer_norm  # noqa: E402
from mosaicbert.models.kernels.sumnorm import sum_layer_norm  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array")  # triton 3.6's own
SEED = torch.tensor([0x1234_5678_9ABC])
HEADS, HEAD_DIM = 2, 32
SLOPES = torch.tensor([0.5, 0.03])


@pytest.fixture(autouse=True)
def setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialised memory is NaN: whatever a kernel forgets to write is seen. Few programs."""
    torch.manual_seed(17)
    monkeypatch.setattr(geglu_module, "ROWS", 32)
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


@pytest.mark.parametrize("window", [-1, 5, 90])
@pytest.mark.parametrize(
    ("dtype", "lengths", "max_seqlen", "tolerance"),
    [
        (torch.float32, [5, 0, 1, 16], 16, 1e-5),
        (torch.float32, [70, 1, 0, 129], 129, 1e-5),  # two tiles, three tiles
        (torch.float16, [0, 5, 1, 16, 0, 0], 16, 2e-3),  # short kernel
        (torch.float16, [33, 1, 24], 40, 2e-3),  # short kernel, no full sequence
        (torch.float16, [1, 129], 129, 2e-3),  # tiled kernels
        (torch.float16, [330, 0, 65], 330, 2e-3),  # tiles before, on, after and beyond the diagonal
    ],
)
def test_attention(
    dtype: torch.dtype, lengths: list[int], max_seqlen: int, tolerance: float, window: int
) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    shape = (sum(lengths), 3, HEADS, HEAD_DIM)
    generator = torch.Generator().manual_seed(max_seqlen)
    qkv = (2 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    out = alibi_attention(qkv, cu_seqlens, max_seqlen, SLOPES, window)
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    out.backward(grad)

    exact = qkv.detach().double().requires_grad_()
    want = exact_attention(exact, cu_seqlens, SLOPES, window)
    want.backward(grad.double())
    assert out.dtype == dtype
    assert off(out, want.detach()) < tolerance
    assert qkv.grad is not None
    assert exact.grad is not None
    for part in range(3):  # dq, dk, dv
        assert off(qkv.grad[:, part], exact.grad[:, part]) < 2 * tolerance


def test_attention_skips_far_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steep slopes: most tiles weigh nothing, and leaving them out changes nothing."""
    cu_seqlens = torch.tensor([0, 200], dtype=torch.int32)
    slopes = torch.tensor([4.0, 1.5])
    qkv = torch.randn(200, 3, HEADS, HEAD_DIM, requires_grad=True)
    qkv.data[:, 0] *= 0.3
    seen = []
    for at_least in (1 << 30, 1):
        monkeypatch.setattr(attention_module, "MIN_SKIPPED", at_least)
        out, _, reach, _ = attention_module.attention_forward(qkv, cu_seqlens, 200, slopes, -1)
        seen.append((out, *torch.autograd.grad(out.square().sum(), qkv), reach))
    assert seen[0][2].tolist() == [1 << 24] * HEADS
    assert all(5 < reach < 40 for reach in seen[1][2].tolist())
    torch.testing.assert_close(seen[0][:2], seen[1][:2], rtol=1e-5, atol=1e-6)


def test_attention_refuses_other_shapes() -> None:
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="head_dim 32, 64, 128, not 48"):
        alibi_attention(torch.randn(4, 3, 2, 48), cu_seqlens, 4, SLOPES)


@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_geglu(num_rows: int) -> None:
    x = (3 * torch.randn(num_rows, 2 * 40)).requires_grad_()
    out = geglu(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    exact = x.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=1)
    want = F.gelu(gate) * up
    want.backward(grad.double())
    assert x.grad is not None
    assert exact.grad is not None
    assert out.shape == want.shape
    if num_rows:
        assert off(out, want.detach()) < 1e-6
        assert off(x.grad, exact.grad) < 1e-6


def test_geglu_dropout_repeats_its_mask() -> None:
    x = torch.randn(64, 2 * 200, requires_grad=True)
    out = geglu(x, 0.1, SEED)
    kept = out != 0
    plain = geglu(x.detach())
    torch.testing.assert_close(out[kept], plain[kept] / 0.9)
    assert abs(float(kept.float().mean()) - 0.9) < 0.01  # 3.8 standard deviations
    dx, again, _ = geglu_backward(torch.ones_like(out), x.detach(), 0.1, SEED, True)
    torch.testing.assert_close(again, out.detach())
    assert torch.equal(dx.chunk(2, dim=1)[1] != 0, kept)
    assert not torch.equal(geglu(x, 0.1, SEED + 1) != 0, kept)
    assert not torch.equal(geglu(x, 0.1, SEED + (1 << 32)) != 0, kept)


def test_geglu_linear() -> None:
    """The same values and gradients as the two operations one after the other."""
    x, weight = torch.randn(12, 2 * 24, requires_grad=True), torch.randn(8, 24, requires_grad=True)
    apart = geglu(x, 0.2, SEED) @ weight.T
    together = geglu_linear(x, weight, 0.2, SEED)
    torch.testing.assert_close(together, apart)
    grad = torch.randn_like(apart)
    for got, want in zip(
        torch.autograd.grad(together, (x, weight), grad),
        torch.autograd.grad(apart, (x, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_dropout_masks_are_independent() -> None:
    """Between rows, between columns and between neighbouring seeds."""
    ones = torch.ones(256, 2 * 256)
    masks = [(geglu(ones, 0.5, SEED + i) != 0).float() - 0.5 for i in range(3)]
    for other in (masks[1], masks[2], masks[0].roll(1, 0), masks[0].roll(1, 1), masks[0].T):
        correlation = float((masks[0] * other).mean()) * 4
        assert abs(correlation) < 4 / 256  # 4 standard deviations of 65,536 independent products


def test_dropout_arguments() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="needs a seed"):
        geglu(x, 0.1)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        geglu(x, 1.0, SEED)


@pytest.mark.parametrize("with_x_bias", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("uses", ["both", "first", "second"])
def test_residual_layer_norm(dropout_p: float, with_x_bias: bool, uses: str) -> None:
    rows, width = 9, 40
    x, residual = torch.randn(rows, width), torch.randn(rows, width)
    weight, bias, x_bias = torch.randn(3, width)
    leaves = [x, residual, weight, bias, x_bias][: 4 + with_x_bias]
    for leaf in leaves:
        leaf.requires_grad_()
    outs = residual_layer_norm(
        x, residual, weight, bias, x_bias if with_x_bias else None, 1e-12, dropout_p, SEED
    )
    grads = torch.randn(2, rows, width)
    used = {"both": [0, 1], "first": [0], "second": [1]}[uses]
    torch.autograd.backward([outs[i] for i in used], [grads[i] for i in used])
    got = [leaf.grad for leaf in leaves]

    keep = torch.ones(rows, width)
    if dropout_p:
        assert x.grad is not None
        keep = (x.grad != 0) / (1 - dropout_p)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    x64 = exact[0] + (exact[4] if with_x_bias else 0)
    want = F.layer_norm(exact[1] + x64 * keep, (width,), exact[2], exact[3], 1e-12)
    want.backward(grads[used].sum(0).double())
    assert torch.equal(outs[0], outs[1])
    assert off(outs[0], want.detach()) < 1e-6
    for mine, theirs in zip(got, exact, strict=True):
        assert mine is not None
        assert theirs.grad is not None
        assert off(mine, theirs.grad) < 1e-5


@pytest.mark.parametrize("adds", ["nothing", "x", "x and bias"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("uses", [(0, 1), (0,), (1,)], ids=["both", "sum", "norm"])
def test_sum_layer_norm(dropout_p: float, adds: str, uses: tuple[int, ...]) -> None:
    rows, width = 9, 40
    x, residual = torch.randn(rows, width), torch.randn(rows, width)
    weight, bias, x_bias = torch.randn(3, width)
    leaves = [residual, weight, bias, x, x_bias][: {"nothing": 3, "x": 4, "x and bias": 5}[adds]]
    for leaf in leaves:
        leaf.requires_grad_()
    has_x = adds != "nothing"
    outs = sum_layer_norm(
        x if has_x else None, residual, weight, bias, x_bias if len(leaves) == 5 else None,
        1e-12, dropout_p if has_x else 0.0, SEED,
    )  # fmt: skip
    grads = torch.randn(2, rows, width)
    torch.autograd.backward([outs[i] for i in uses], [grads[i] for i in uses])

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    total = exact[0]
    if has_x:
        x64 = exact[3] + (exact[4] if len(leaves) == 5 else 0)
        keep = torch.ones(rows, width)
        if dropout_p:
            assert x.grad is not None
            keep = (x.grad != 0) / (1 - dropout_p)
        total = total + x64 * keep
    want = total, F.layer_norm(total, (width,), exact[1], exact[2], 1e-12)
    torch.autograd.backward([want[i] for i in uses], [grads[i].double() for i in uses])
    for mine, theirs in zip(outs, want, strict=True):
        assert off(mine, theirs.detach()) < 1e-6
    for leaf, theirs in zip(leaves, exact, strict=True):
        mine = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        if theirs.grad is None:  # of weight and bias, where nobody uses the norm
            assert not mine.any()
        else:
            assert off(mine, theirs.grad) < 1e-5


def test_sum_layer_norm_is_the_norm_of_the_sum_it_gives() -> None:
    x, residual = torch.randn(2, 5, 40, dtype=torch.float16)
    weight, bias = torch.randn(2, 40)
    total, out = sum_layer_norm(x, residual, weight, bias)
    assert torch.equal(total, x + residual)
    exact = F.layer_norm(total.double(), (40,), weight.double(), bias.double(), 1e-12)
    assert off(out, exact) < 1e-3


def test_one_graph_under_compile() -> None:
    """Forward and backward of all three trace without a break, with the same gradients."""
    cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
    weight, bias = torch.randn(2, HEADS * HEAD_DIM)
    square = torch.randn(HEADS * HEAD_DIM, HEADS * HEAD_DIM)

    def block(qkv: Tensor) -> Tensor:
        mixed = alibi_attention(qkv, cu_seqlens, 5, SLOPES).flatten(1)
        normed, again = residual_layer_norm(mixed, qkv[:, 0].flatten(1), weight, bias)
        total, normed = sum_layer_norm(None, normed, weight, bias)
        total, normed = sum_layer_norm(again, total, weight, bias)
        wide = torch.cat([normed, total], 1)
        return geglu(wide, 0.1, SEED) + geglu_linear(wide, square, 0.1, SEED)

    qkv = torch.randn(8, 3, HEADS, HEAD_DIM, requires_grad=True)
    (eager,) = torch.autograd.grad(block(qkv).square().sum(), qkv)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    (traced,) = torch.autograd.grad(compiled(qkv).square().sum(), qkv)
    torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("width", "block"), [(40, 16), (32, 64)])  # three blocks, one
def test_linear_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, width: int, block: int, softcap: float | None
) -> None:
    monkeypatch.setitem(cross_entropy_module.CONFIG, "BLOCK", block)
    classes, hidden = width - 3, 8
    leaves = [torch.randn(5, hidden), torch.randn(width, hidden), torch.randn(width)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    labels = torch.tensor([0, classes - 1, -100, 17, 17])
    loss = linear_cross_entropy(*leaves, labels, classes, softcap)
    (3 * loss).backward()

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = F.linear(*exact)[:, :classes]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    want = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    (3 * want).backward()
    assert off(loss, want.detach()) < 1e-6
    for got, expected in zip(leaves, exact, strict=True):
        assert got.grad is not None
        assert expected.grad is not None
        assert off(got.grad, expected.grad) < 1e-5


def test_linear_cross_entropy_of_no_rows() -> None:
    leaves = [torch.randn(0, 8), torch.randn(16, 8), torch.randn(16)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    linear_cross_entropy(*leaves, torch.zeros(0, dtype=torch.long), 15).backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)
