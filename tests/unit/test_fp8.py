"""Matrix products in fp8, with the kernels in Triton's interpreter, against float64."""

import copy

import numpy
import pytest
import torch
from packaging.version import Version

from mosaicbert.batch import Batch
from mosaicbert.config.jobs import TrainerConfig
from mosaicbert.errors import ConfigError
from mosaicbert.models import kernels
from mosaicbert.models.build import compile_model, use_fp8
from mosaicbert.models.configuration import MODERN, MosaicBertConfig
from mosaicbert.models.mosaic_bert import MosaicBertForMaskedLM
from mosaicbert.train.backward import Backward
from mosaicbert.train.distributed import Ranks

if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)
triton = pytest.importorskip("triton", reason="the kernels need triton")
if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
    pytest.skip("the interpreter of triton < 3.7 needs numpy < 2.4", allow_module_level=True)

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "hidden_dropout_prob": 0.0,
    "attention_backend": "triton",
}


@pytest.fixture
def interpreted(monkeypatch):
    if not triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is not 1 (tests/conftest.py sets it)")
    monkeypatch.setattr(kernels, "why_not", lambda device: None)


def batch():
    generator = torch.Generator().manual_seed(0)
    lengths = (14, 1, 0, 9)
    positions = torch.randperm(24, generator=generator)[:8].sort().values
    return Batch(
        input_ids=torch.randint(97, (24,), generator=generator),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=14,
        target_positions=positions,
        labels=torch.randint(97, positions.shape, generator=generator),
        num_targets=8,
        num_tokens=24,
        num_samples=4,
    )


def made(**changes):
    torch.manual_seed(0)
    model = MosaicBertForMaskedLM(MosaicBertConfig(**SHAPE | changes)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def gradients(model):
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("gate", [False, True], ids=["", "gate"])
@pytest.mark.parametrize("anew", [False, True], ids=["", "anew"])
@pytest.mark.parametrize(
    "changes", [{}, MODERN | {"zero_init_outputs": False}], ids=["post", "pre"]
)
def test_loss_and_gradients(changes, anew, gate, interpreted, monkeypatch):
    model, on = made(**changes, fp8_gate=gate, recompute_geglu=anew), batch()
    exact = copy.deepcopy(model).double()
    exact.config.attention_backend = "reference"
    loss = exact.loss(on).loss_sum / on.num_targets
    loss.backward()
    use_fp8(model, CPU)
    values = {"max_duration": "1ba", "global_train_batch_size": 4, "precision": "fp8"}
    backward = Backward(model, TrainerConfig.model_validate(values), Ranks(0, 1, 0, CPU))
    monkeypatch.setattr(backward, "_autocast", lambda: torch.autocast("cpu", enabled=False))
    got = backward([on], on.num_targets, 0)
    assert got.item() == pytest.approx(loss.item(), rel=1e-2)
    error = (gradients(model) - gradients(exact)).norm() / gradients(exact).norm()
    assert 1e-4 < error < 0.06  # it is fp8, and it is near


def test_a_gated_unit_of_8_bits(interpreted):
    """Its input is the product's, rounded and clipped; so are both passes' results."""
    from mosaicbert.models import fp8
    from mosaicbert.models.kernels.eight import NORMED, WIDE
    from mosaicbert.models.kernels.geglu import geglu_backward, geglu_forward

    torch.manual_seed(0)
    weight = torch.randn(64, 32)
    x8 = fp8.to_eight(torch.randn(5, 32) * 4, NORMED)
    scales = fp8.make_scales(CPU, fp8_gate=True)
    w8, _, scale = fp8._quantized(weight)
    wide = fp8._product_in_eight(x8, w8, scales.normed, scale, scales.wide)
    exact = (x8.double() / NORMED) @ (w8.double() * scale.double()).T
    assert (exact.abs() > 56).any()  # some are clipped
    assert wide.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(
        wide.double() / WIDE, exact.clamp(-56, 56), rtol=2**-4, atol=2**-9 / WIDE
    )
    seen = (wide.double() / WIDE).requires_grad_()
    want = torch.nn.functional.gelu(seen[:, :32]) * seen[:, 32:]
    out, _ = geglu_forward(wide, 0.0, None, True, torch.float32)
    torch.testing.assert_close(out.double(), want.detach(), rtol=1e-5, atol=1e-5)
    grad = torch.randn(5, 32)
    want.backward(grad.double())
    dx, again, dx8 = geglu_backward(grad, wide, 0.0, None, True, True)
    assert dx.dtype == again.dtype == torch.float32
    torch.testing.assert_close(dx.double(), seen.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again, out)
    same(dx8, fp8.to_eight(dx, 1.0, torch.float8_e5m2))


def same(got, want):
    """Equal, but where the interpreter loses the carry of a rounding (tests/gpu has the real)."""
    assert got.dtype == want.dtype
    assert got.float().isfinite().all()
    assert (got.float() != want.float()).float().mean() < 0.1


def test_eight_bits_are_those_of_16(interpreted):
    """The copies that kernels write are casts of what they write beside them."""
    from mosaicbert.models.fp8 import to_eight
    from mosaicbert.models.kernels.eight import GATED, NORMED
    from mosaicbert.models.kernels.geglu import geglu_backward, geglu_forward
    from mosaicbert.models.kernels.sumnorm import sum_norm_backward, sum_norm_forward

    torch.manual_seed(0)
    x = torch.randn(5, 64) * 20
    out, out8 = geglu_forward(x, 0.0, None, True)
    assert (out.abs() * GATED > 448).any()  # some are clipped
    same(out8, to_eight(out, GATED))
    dx, _, dx8 = geglu_backward(torch.randn(5, 32), x, 0.0, None, False, True)
    same(dx8, to_eight(dx, 1.0, torch.float8_e5m2))
    weight, bias = torch.randn(2, 64)
    total, out, mean, rstd, out8 = sum_norm_forward(
        x, x, weight, bias, None, 1e-12, 0.0, None, True
    )
    same(out8, to_eight(out, NORMED))
    _, dx, _, dx8 = sum_norm_backward(
        torch.randn(5, 64), None, total, weight, mean, rstd, False, 0.0, None, True
    )
    same(dx8, to_eight(dx, 1.0, torch.float8_e5m2))


@pytest.mark.parametrize("changes", [{}, MODERN | {"zero_init_outputs": False}])
def test_geglu_made_anew_changes_nothing(changes, interpreted, monkeypatch):
    """In 16 bits too: the same numbers by another road."""
    found = []
    for anew in (False, True):
        model = made(**changes | {"recompute_geglu": anew, "hidden_dropout_prob": 0.2})
        torch.manual_seed(1)
        loss = model.loss(batch()).loss_sum
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("fp8", [False, True], ids=["16", "8"])
def test_pre_norm_is_four_graphs(fp8, interpreted, monkeypatch):
    """Embeddings, layers, the last layer, the head: the first layer's input is as the others'."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: compiler(f, backend="eager", **o))
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = made(**MODERN | {"zero_init_outputs": False, "num_hidden_layers": 3})
        if fp8:
            use_fp8(model, CPU)
        if compiled:
            compile_model(model)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        loss = model.loss(batch()).loss_sum
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs == 4
    torch.testing.assert_close(found[0], found[1])


def test_evaluation_is_not_in_fp8(interpreted):
    model, on = made(), batch()
    with torch.no_grad():
        before = model.eval().loss(on).loss_sum
        use_fp8(model, CPU)
        assert torch.equal(model.eval().loss(on).loss_sum, before)
        assert not torch.equal(model.train().loss(on).loss_sum, before)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"qk_norm": True, "unet_skips": True}, "qk_norm, unet_skips"),
        ({"feed_forward": "relu2"}, "feed_forward: relu2"),
        ({"attention_backend": "sdpa"}, "attention backend sdpa"),
        ({"position_encoding": "rope"}, "position_encoding: rope"),
        ({"hidden_size": 72, "num_attention_heads": 1}, "multiples of 16"),
        ({"num_attention_heads": 1, "attention_probs_dropout_prob": 0.1}, "attention dropout"),
    ],
)
def test_what_cannot_be(changes, reason, interpreted):
    with pytest.raises(ConfigError, match=f"precision: fp8 cannot be used here: .*{reason}"):
        use_fp8(made(**changes), CPU)


def test_where_it_cannot_be():
    with pytest.raises(ConfigError, match=r"the device is cpu\. Use amp_bf16"):
        use_fp8(made(), CPU)
    with pytest.raises(ConfigError, match="hf_bert knows no fp8"):
        use_fp8(_hf(), CPU)


def _hf():
    from transformers import BertConfig

    from mosaicbert.models.hf_bert import BertForMaskedLM

    sizes = {key: SHAPE[key] for key in SHAPE if key != "attention_backend"}
    return BertForMaskedLM(BertConfig(**sizes))


@pytest.mark.parametrize("max_seqlen", [14, 140], ids=["short", "tiled"])
def test_gradient_of_the_bias_of_qkv(max_seqlen, interpreted):
    """What it is said to be equals the sum of the gradients of queries, keys and values."""
    from mosaicbert.models.fp8 import _qkv_bias_gradient
    from mosaicbert.models.kernels.attention import attention_backward, attention_forward

    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, max_seqlen, 0, 9]).cumsum(0).int()
    qkv = torch.randn(max_seqlen + 9, 3, 2, 32)
    fixed = (cu_seqlens, max_seqlen, torch.tensor([0.5, 0.1]), -1)
    out, lse, reach, _ = attention_forward(qkv, *fixed)
    grad = torch.randn_like(out)
    dqkv, _ = attention_backward(grad, qkv, out, lse, reach, *fixed)
    found = _qkv_bias_gradient(dqkv, grad.flatten(1))
    torch.testing.assert_close(found, dqkv.flatten(1).sum(0), rtol=1e-4, atol=1e-4)
