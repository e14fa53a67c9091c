"""`precision: fp8` on a GPU: loss and gradients against float64, compiled or not."""

import math

import pytest
import torch
from test_mosaic_bert_gpu import batch, model, reference

from mosaicbert.config.jobs import TrainerConfig
from mosaicbert.models.build import compile_model, use_fp8
from mosaicbert.models.configuration import MODERN
from mosaicbert.train.backward import Backward
from mosaicbert.train.distributed import Ranks

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a CUDA device with fp8",
    ),
]
LENGTHS = {"short": (128, 1, 77, 0, 100, 16, 128), "tiled": (300, 1, 77, 0, 512, 16, 6)}


def test_eight_bits_are_those_of_16():
    from mosaicbert.models.fp8 import to_eight
    from mosaicbert.models.kernels.eight import GATED, NORMED
    from mosaicbert.models.kernels.geglu import geglu_backward, geglu_forward
    from mosaicbert.models.kernels.sumnorm import sum_norm_backward, sum_norm_forward

    torch.manual_seed(0)
    x, grad = torch.randn(2, 50, 256, device=DEVICE) * 20
    out, out8 = geglu_forward(x, 0.0, None, True)
    assert (out.abs() * GATED > 448).any()  # some are clipped
    assert torch.equal(out8.float(), to_eight(out, GATED).float())
    dx, _, dx8 = geglu_backward(grad[:, :128], x, 0.0, None, False, True)
    assert torch.equal(dx8.float(), to_eight(dx, 1.0, torch.float8_e5m2).float())
    weight, bias = torch.randn(2, 256, device=DEVICE)
    total, out, mean, rstd, out8 = sum_norm_forward(
        x, x, weight, bias, None, 1e-12, 0.0, None, True
    )
    assert torch.equal(out8.float(), to_eight(out, NORMED).float())
    _, dx, _, dx8 = sum_norm_backward(grad, None, total, weight, mean, rstd, False, 0.0, None, True)
    assert torch.equal(dx8.float(), to_eight(dx, 1.0, torch.float8_e5m2).float())


def test_a_product_in_8_bits_is_clipped():
    from mosaicbert.models import fp8
    from mosaicbert.models.kernels.eight import NORMED, WIDE

    torch.manual_seed(0)
    x8 = fp8.to_eight(torch.randn(64, 256, device=DEVICE) * 4, NORMED)
    scales = fp8.make_scales(DEVICE, fp8_gate=True)
    w8, _, scale = fp8._quantized(torch.randn(128, 256, device=DEVICE))
    wide = fp8._product_in_eight(x8, w8, scales.normed, scale, scales.wide)
    exact = (x8.double() / NORMED) @ (w8.double() * scale.double()).T
    assert (exact.abs() > 56).any()
    torch.testing.assert_close(wide.double() / WIDE, exact.clamp(-56, 56), rtol=2**-3, atol=2**-6)


@pytest.mark.parametrize("gate", [False, True], ids=["", "gate"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, MODERN | {"zero_init_outputs": False}], ids=["post", "pre"]
)
def test_fp8(changes, compiled, lengths, gate):
    on = batch(LENGTHS[lengths])
    switches = {"fp8_gate": gate, "recompute_geglu": gate}
    built = model(**{"hidden_dropout_prob": 0.0, **switches, **changes})
    want, exact = reference(built, on)
    use_fp8(built, DEVICE)
    if compiled:
        compile_model(built)
    values = {"max_duration": "1ba", "global_train_batch_size": 8, "precision": "fp8"}
    backward = Backward(built.train(), TrainerConfig.model_validate(values), Ranks(0, 1, 0, DEVICE))
    for number in range(4):  # as it is, recorded, replayed
        loss = backward([on], on.num_targets, number)
        assert loss.item() == pytest.approx(want / on.num_targets, rel=1e-2)
        errors = {
            name: (p.grad.double() * on.num_targets - exact[name]).norm().item()
            for name, p in built.named_parameters()
        }
        whole = math.hypot(*errors.values()) / math.hypot(
            *(g.norm().item() for g in exact.values())
        )
        print(f"off: {number} {whole:.4f}")
        assert whole < 0.06
    assert backward.graphs is not None
    assert len(backward.graphs) == 1
