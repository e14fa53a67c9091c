"""Mosaic BERT on a GPU: every backend, fused or not, compiled or not, against float64."""

import copy

import pytest
import torch

from mosaicbert.batch import Batch
from mosaicbert.models import kernels
from mosaicbert.models.build import compile_model
from mosaicbert.models.configuration import MODERN, MosaicBertConfig
from mosaicbert.models.mosaic_bert import MosaicBertForMaskedLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = {
    "vocab_size": 997,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 320,
}
LENGTHS = (128, 1, 77, 0, 100, 16, 128)
ALL = {"qk_norm": True, "position_encoding": "rope", "unet_skips": True, "value_skips": True}


def batch(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    positions = torch.randperm(total, generator=generator)[: total // 4].sort().values
    return Batch(
        input_ids=torch.randint(997, (total,), generator=generator),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
        target_positions=positions,
        labels=torch.randint(997, positions.shape, generator=generator),
        num_targets=len(positions),
        num_tokens=total,
        num_samples=len(lengths),
    )


def model(**changes):
    torch.manual_seed(0)
    built = MosaicBertForMaskedLM(MosaicBertConfig(**SHAPE, **changes)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return built


def reference(built, on):
    exact = copy.deepcopy(built).double()
    exact.bert.encoder.config.attention_backend = "reference"
    loss = exact.loss(on).loss_sum
    loss.backward()
    return loss, {name: p.grad for name, p in exact.named_parameters()}


def check(built, on, tolerance, autocast):
    want, grads = reference(built, on)
    built.to("cuda").zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        loss = built.loss(on.to(torch.device("cuda"))).loss_sum
    loss.backward()
    assert abs(loss.item() / want.item() - 1) < tolerance
    for name, parameter in built.named_parameters():
        error = (parameter.grad.cpu().double() - grads[name]).norm() / grads[name].norm()
        assert error < 10 * tolerance, f"{name}: {error}"


@pytest.mark.parametrize("backend", ["triton", "flex", "sdpa"])
@pytest.mark.parametrize("lengths", [LENGTHS, (700, 3, 259)])
def test_backends(backend, lengths):
    torch.set_float32_matmul_precision("highest")
    check(model(attention_backend=backend), batch(lengths), 1e-4, autocast=False)
    check(model(attention_backend=backend), batch(lengths), 1e-2, autocast=True)


@pytest.mark.parametrize("changes", [{}, MODERN, {**MODERN, **ALL}, {"attention_window": 9}])
@pytest.mark.parametrize("compiled", [False, True])
def test_fused_and_compiled(changes, compiled):
    assert kernels.why_not(torch.device("cuda")) is None
    built = model(**{**changes, "zero_init_outputs": False, "hidden_dropout_prob": 0.0}).train()
    want, grads = reference(built, batch())
    built.to("cuda")
    if compiled:
        compile_model(built)
    for autocast, tolerance in ((False, 1e-3), (True, 1e-2)):
        built.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            loss = built.loss(batch().to(torch.device("cuda"))).loss_sum
        loss.backward()
        assert abs(loss.item() / want.item() - 1) < tolerance
        for name, parameter in built.named_parameters():
            error = (parameter.grad.cpu().double() - grads[name]).norm() / grads[name].norm()
            assert error < 10 * tolerance, f"{name}: {error}"


def test_dropout_is_seeded_and_has_the_right_mean():
    built = model(hidden_dropout_prob=0.1).train().to("cuda")
    on = batch().to(torch.device("cuda"))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(built.loss(on).loss_sum.item())
    assert losses[0] == losses[1] != losses[2]
    clean = built.eval().loss(on).loss_sum.item()
    built.train()
    mean = sum(built.loss(on).loss_sum.item() for _ in range(50)) / 50
    assert abs(mean / clean - 1) < 0.05


def test_gradient_checkpointing_with_the_kernels():
    grads = []
    for checkpointing in (False, True):
        built = model(hidden_dropout_prob=0.1).train().to("cuda")
        built.bert.encoder.gradient_checkpointing = checkpointing
        built.bert.encoder._gradient_checkpointing_func = lambda f, *args: (
            torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False)
        )
        torch.manual_seed(5)
        built.loss(batch().to(torch.device("cuda"))).loss_sum.backward()
        grads.append([p.grad for p in built.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-4)
