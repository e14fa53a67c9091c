"""Numbers of fixed models on a fixed batch: a change of numerics shows, and must be meant.

Weights and ids are formulas, so that no file of weights is needed. To accept a change:
`MOSAICBERT_WRITE_GOLDEN=1 pytest tests/golden/test_models_golden.py`, and say so in CHANGELOG.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from mosaicbert.batch import Batch
from mosaicbert.models.configuration import MODERN, HfBertConfig, MosaicBertConfig
from mosaicbert.models.hf_bert import BertForMaskedLM, HfBertForMaskedLM
from mosaicbert.models.mosaic_bert import (
    MosaicBertForMaskedLM,
    MosaicBertForSequenceClassification,
)

FILE = Path(__file__).with_name("models.json")
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
}
LENGTHS = (9, 1, 17, 5)
SWITCHES = {
    "qk_norm": True,
    "position_encoding": "rope",
    "feed_forward": "relu2",
    "unet_skips": True,
    "value_skips": True,
    "logit_softcap": 15.0,
}
MODELS = {
    "mosaic_bert": lambda: MosaicBertForMaskedLM(MosaicBertConfig(**SHAPE)),
    "mosaic_bert_window": lambda: MosaicBertForMaskedLM(
        MosaicBertConfig(**SHAPE, attention_window=3)
    ),
    "mosaic_bert_classification": lambda: MosaicBertForSequenceClassification(
        MosaicBertConfig(**SHAPE, num_labels=4)
    ),
    "mosaic_bert_v2": lambda: MosaicBertForMaskedLM(MosaicBertConfig(**SHAPE, **MODERN)),
    "mosaic_bert_v2_all": lambda: MosaicBertForMaskedLM(
        MosaicBertConfig(**SHAPE, **MODERN, **SWITCHES)
    ),
    "hf_bert": lambda: BertForMaskedLM(BertConfig(**SHAPE)),
    "hf_bert_algorithms": lambda: HfBertForMaskedLM(
        HfBertConfig(**SHAPE, alibi=True, gated_linear_units=True)
    ),
}


def fixed(model):
    """Every weight a sine of its place, in float64; norms near one."""
    model = model.double().eval()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
            values = torch.sin(torch.arange(parameter.numel()).double() * (1.3 + index) + index)
            scale = 0.05 if parameter.ndim == 1 else 0.2
            parameter.copy_((values * scale).view_as(parameter) + ("orm.weight" in name))
    return model


def batch(packed, classification):
    ids = [[(7 * i + 13 * j) % 97 for j in range(n)] for i, n in enumerate(LENGTHS)]
    lengths = torch.tensor(LENGTHS)
    seq = max(LENGTHS)
    padded = torch.tensor([row + [0] * (seq - len(row)) for row in ids])
    mask = (torch.arange(seq) < lengths[:, None]).long()
    flat = torch.arange(len(ids) * seq).view(len(ids), seq)
    chosen = mask.bool() & (flat % 3 == 0)
    labels = (padded[chosen] * 5 + 1) % 97
    positions = chosen[mask.bool()].nonzero() if packed else chosen.flatten().nonzero()
    common = {
        "labels": torch.arange(len(ids)) if classification else labels,
        "target_positions": None if classification else positions.flatten(),
        "num_targets": 1,
        "num_tokens": sum(LENGTHS),
        "num_samples": len(ids),
        "max_seqlen": seq,
    }
    if not packed:
        return Batch(input_ids=padded, attention_mask=mask, **common)
    cu_seqlens = torch.tensor([0, *lengths.cumsum(0).tolist()], dtype=torch.int32)
    return Batch(input_ids=padded[mask.bool()], cu_seqlens=cu_seqlens, **common)


def numbers(name):
    model = fixed(MODELS[name]())
    output = model.loss(
        batch(not name.startswith("hf"), "classification" in name), return_logits=True
    )
    output.loss_sum.backward()
    grads = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss_sum": output.loss_sum.item(),
        "logits": output.logits[:3, :4].flatten().tolist(),
        "gradient_norm": torch.stack(grads).norm().item(),
        "flops_per_token": model.flops_per_token(128),
    }


def test_write_golden():
    if not os.environ.get("MOSAICBERT_WRITE_GOLDEN"):
        pytest.skip("only when asked for")
    FILE.write_text(json.dumps({name: numbers(name) for name in MODELS}, indent=1) + "\n")


@pytest.mark.parametrize("name", MODELS)
def test_golden(name):
    want = json.loads(FILE.read_text())[name]
    got = numbers(name)
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
