"""The whole model gives the same loss and gradients on every attention backend, in either form."""

import numpy
import pytest
import torch
from packaging.version import Version

from mosaicbert.batch import Batch
from mosaicbert.models import kernels
from mosaicbert.models.configuration import MosaicBertConfig
from mosaicbert.models.mosaic_bert import MosaicBertForMaskedLM

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array")  # triton 3.6's own
LENGTHS = [7, 1, 12]


def build(backend):
    torch.manual_seed(0)
    config = MosaicBertConfig(
        vocab_size=61,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_backend=backend,
    )
    model = MosaicBertForMaskedLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "orm.weight" in name else 0.0, 0.1)
    return model


def batch():
    generator = torch.Generator().manual_seed(0)
    return Batch(
        input_ids=torch.randint(1, 61, (sum(LENGTHS),), generator=generator),
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        max_seqlen=max(LENGTHS),
        target_positions=torch.tensor([1, 7, 12]),
        labels=torch.tensor([5, 9, 60]),
        num_targets=3,
        num_tokens=sum(LENGTHS),
        num_samples=len(LENGTHS),
    )


def padded():
    """The same as `(batch, seq)`, with a row that is padding alone."""
    packed = batch()
    mask = torch.arange(12) < torch.tensor([*LENGTHS, 0])[:, None]
    labels = torch.full_like(packed.input_ids, -100)
    labels[packed.target_positions] = packed.labels
    inputs = {"input_ids": torch.zeros(4, 12).long(), "labels": torch.full((4, 12), -100)}
    inputs["input_ids"][mask], inputs["labels"][mask] = packed.input_ids, labels
    return {**inputs, "attention_mask": mask.long()}


def loss_and_gradients(model, form="packed"):
    if form == "packed":
        loss = model.loss(batch()).loss_sum
    else:
        loss = model(**padded()).loss * 3
    return loss, torch.autograd.grad(loss, list(model.parameters()))


def in_the_interpreter(monkeypatch):
    triton = pytest.importorskip("triton", reason="the kernels need triton")
    if torch.cuda.is_available() or not triton.knobs.runtime.interpret:
        pytest.skip("tests/gpu runs the kernels themselves")
    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version(
        "2.4"
    ):
        pytest.skip("the interpreter of triton < 3.7 needs numpy < 2.4")
    monkeypatch.setattr(kernels, "why_not", lambda device: None)


def exact():
    loss, gradients = loss_and_gradients(build("reference").double())
    return loss.double(), gradients


def check(model, want, expected, form="packed"):
    loss, gradients = loss_and_gradients(model, form)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    for (name, _), got, true in zip(model.named_parameters(), gradients, expected, strict=True):
        assert (got.double() - true).norm() <= 1e-5 * true.norm(), name


@pytest.mark.parametrize("form", ["packed", "padded"])
@pytest.mark.parametrize("backend", ["reference", "sdpa", None])
def test_plain_backends(backend, form):
    check(build(backend), *exact(), form)


def test_bf16():
    """Loss within 1e-2, and the gradient of all parameters within 2e-2."""
    want, expected = exact()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients = loss_and_gradients(build("sdpa"))
    torch.testing.assert_close(loss.double(), want, rtol=1e-2, atol=0)
    whole, true = (torch.cat([g.double().flatten() for g in gs]) for gs in (gradients, expected))
    assert (whole - true).norm() < 2e-2 * true.norm()


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_the_kernels(monkeypatch, form):
    want = exact()
    in_the_interpreter(monkeypatch)
    check(build("triton"), *want, form)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
def test_flex_forward():
    with torch.no_grad():
        want = build("reference").double().loss(batch()).loss_sum.double()
        got = build("flex").loss(batch()).loss_sum
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_layers_with_kernels_are_one_graph(monkeypatch):
    in_the_interpreter(monkeypatch)
    model, want = build("triton"), exact()
    for layer in model.bert.encoder.layer:
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    check(model, *want)
