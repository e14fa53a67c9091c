"""CUDA graphs of microbatches: the losses and gradients of plain passes, dropout included."""

import copy

import pytest
import torch

from mosaicbert.bench import made_up_samples, made_up_step
from mosaicbert.config.jobs import TrainerConfig
from mosaicbert.data.packing import Sample, pack_samples
from mosaicbert.models.build import compile_model
from mosaicbert.models.configuration import MODERN, MosaicBertConfig
from mosaicbert.models.hf_bert import BertForMaskedLM
from mosaicbert.models.mosaic_bert import (
    MosaicBertForMaskedLM,
    MosaicBertForSequenceClassification,
)
from mosaicbert.train.backward import Backward
from mosaicbert.train.distributed import Ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = {
    "vocab_size": 2000,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 320,
}
RANKS = Ranks(0, 1, 0, torch.device("cuda"))


def masked_lm(seed, packed):
    samples = made_up_samples(16, 64, vocab_size=2000, mlm_probability=0.3, seed=seed)
    return made_up_step(samples, microbatch_samples=8, max_seq_len=64, packed=packed, grid=True)


def classes(seed, packed):
    samples = made_up_samples(16, 64, vocab_size=2000, mlm_probability=0.3, seed=seed)
    samples = [Sample(s.input_ids, number % 3) for number, s in enumerate(samples)]
    return pack_samples(samples, max_samples=8, max_seq_len=64, pad_token_id=0, grid=True)


def backward(model, graphs, **changes):
    values = {"max_duration": "1ba", "global_train_batch_size": 16, "cuda_graphs": graphs}
    return Backward(model.train(), TrainerConfig.model_validate(values | changes), RANKS)


@pytest.mark.parametrize("precision", ["amp_bf16", "amp_fp16", "fp32"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["mosaic", "v2", "classes", "hf"])
def test_graphs(kind, compiled, precision):
    torch.manual_seed(0)
    packed, steps = kind != "hf", masked_lm
    if kind == "hf":
        from transformers import BertConfig

        model = BertForMaskedLM(BertConfig(**SHAPE))
    elif kind == "classes":
        steps = classes
        model = MosaicBertForSequenceClassification(MosaicBertConfig(num_labels=3, **SHAPE))
    else:
        model = MosaicBertForMaskedLM(MosaicBertConfig(**SHAPE | (MODERN if kind == "v2" else {})))
    other = copy.deepcopy(model)
    if compiled:
        compile_model(model)
        compile_model(other)
    plain = backward(model, False, precision=precision)
    graphed = backward(other, True, precision=precision)
    for number in range(6):
        step = steps(number % 2, packed)
        targets = sum(batch.num_targets for batch in step)
        want, got = (one(step, targets, number) for one in (plain, graphed))
        assert got.item() == pytest.approx(want.item(), rel=1e-4)
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            if p.grad is None:
                assert q.grad is None or not q.grad.any(), name
            else:
                difference = (p.grad - q.grad).norm() / p.grad.norm().clamp(min=1e-6)
                assert difference < 2e-3, (name, difference.item())
    assert graphed.graphs is not None
    assert len(graphed.graphs) >= 1
