"""HF BERT on a GPU, plain and changed by algorithms, compiled or not, against float64."""

import copy

import pytest
import torch

from mosaicbert.batch import Batch
from mosaicbert.models.build import compile_model
from mosaicbert.models.configuration import HfBertConfig
from mosaicbert.models.hf_bert import BertForMaskedLM, HfBertForMaskedLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
SHAPE = {
    "vocab_size": 997,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 320,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def batch():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([128, 1, 77, 100])
    mask = (torch.arange(128) < lengths[:, None]).long()
    ids = torch.randint(997, mask.shape, generator=generator) * mask
    positions = mask.flatten().nonzero().flatten()[::4]
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        labels=torch.randint(997, positions.shape, generator=generator),
        target_positions=positions,
        num_targets=positions.numel(),
        num_tokens=int(lengths.sum()),
        num_samples=4,
        max_seqlen=128,
    )


def loss_and_gradient(model, on, autocast=False):
    model.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        loss = model.loss(on).loss_sum
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat([g.cpu().double().flatten() for g in gradients])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("algorithms", [False, True])
def test_hf_bert(algorithms, compiled):
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    cls = HfBertForMaskedLM if algorithms else BertForMaskedLM
    config = HfBertConfig(**SHAPE, alibi=algorithms, gated_linear_units=algorithms)
    model = cls(config).train()
    want, exact = loss_and_gradient(copy.deepcopy(model).double(), batch())
    model.to(DEVICE)
    if compiled:
        compile_model(model)
    for autocast, tolerance in ((False, 1e-5), (True, 1e-2)):
        loss, gradient = loss_and_gradient(model, batch().to(DEVICE), autocast)
        off = ((gradient - exact).norm() / exact.norm()).item()
        print(f"off: autocast={autocast} loss {abs(loss / want - 1):.1e} gradient {off:.1e}")
        assert abs(loss / want - 1) < tolerance
        assert off < 2 * tolerance
