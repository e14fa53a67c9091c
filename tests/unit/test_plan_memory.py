"""The counts of `plan/memory.py` against what autograd really keeps."""

import pytest
import torch
from transformers import BertConfig

from mosaicbert.batch import Batch
from mosaicbert.models import kernels
from mosaicbert.models.configuration import HfBertConfig, MosaicBertConfig
from mosaicbert.models.hf_bert import BertForMaskedLM, HfBertForMaskedLM
from mosaicbert.models.mosaic_bert import MosaicBertForMaskedLM
from mosaicbert.models.register import model_class
from mosaicbert.plan.memory import Path, activations

TOKENS, SEQ, ROWS = 32, 16, 8
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 192,
    "attention_probs_dropout_prob": 0.0,
}
FLOAT32 = {"activation": 4, "mask": 4, "mixed": False, "compiled": False}
PLAIN = Path(kernels=False, packed_attention=False, **FLOAT32)
KERNELS = Path(kernels=True, packed_attention=True, **FLOAT32)


def kept_bytes(model, batch):
    """Bytes of the tensors that the forward pass saves, each memory once, without weights."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    memories = {}

    def pack(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            memories[memory.data_ptr()] = memory
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(batch).loss_sum
    assert torch.isfinite(loss)
    return sum(memory.nbytes() for memory in memories.values())


def batch(packed):
    ids = torch.arange(TOKENS) % 60 + 1
    packing = {"cu_seqlens": torch.arange(0, TOKENS + 1, SEQ).int()}
    padding = {"attention_mask": torch.ones(TOKENS // SEQ, SEQ, dtype=torch.long)}
    return Batch(
        input_ids=ids if packed else ids.view(-1, SEQ),
        **(packing if packed else padding),
        max_seqlen=SEQ,
        target_positions=torch.arange(0, TOKENS, TOKENS // ROWS),
        labels=torch.arange(1, ROWS + 1),
        num_targets=ROWS,
        num_tokens=TOKENS,
        num_samples=TOKENS // SEQ,
    )


def in_the_interpreter(monkeypatch):
    triton = pytest.importorskip("triton", reason="the kernels need triton")
    if torch.cuda.is_available() or not triton.knobs.runtime.interpret:
        pytest.skip("the interpreter is off")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of triton < 3.7 needs numpy < 2.4")
    monkeypatch.setattr(kernels, "why_not", lambda device: None)


def check(make, config_of, packed, path, layers, tolerance):
    """A further layer's bytes, and those of the whole without the logits' gradients."""
    few, many = layers, layers + 2
    small, large = (kept_bytes(make(config_of(n)).train(), batch(packed)) for n in (few, many))
    counted = activations(config_of(few), path)
    assert counted.layer * TOKENS == pytest.approx((large - small) / 2, rel=tolerance)
    whole = counted.of(TOKENS, ROWS, few, checkpointing=False)
    whole -= counted.logits_row * ROWS
    whole += 4 * 64 * ROWS  # log-softmax: what is kept of the logits before the backward pass
    if not packed:
        whole -= 4 * 64 * TOKENS  # the gradient of all logits
    assert whole == pytest.approx(small, rel=0.06)  # the first layer has no value skip


SWITCHES = [
    {},
    {"hidden_dropout_prob": 0.0},
    {"pre_norm": True, "hidden_dropout_prob": 0.0},
    {"pre_norm": True},
    {"feed_forward": "relu2"},
    {"position_encoding": "rope", "qk_norm": True},
    {"value_skips": True},
    {"unet_skips": True},
]


def mosaic(switches, backend):
    return lambda layers: MosaicBertConfig(
        num_hidden_layers=layers, attention_backend=backend, **(SHAPE | switches)
    )


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_mosaic_bert_without_kernels(switches):
    check(MosaicBertForMaskedLM, mosaic(switches, "sdpa"), True, PLAIN, 4, 0.02)


ANEW = {"recompute_geglu": True}


@pytest.mark.parametrize("switches", [SWITCHES[0], SWITCHES[2], ANEW, SWITCHES[3] | ANEW], ids=str)
def test_mosaic_bert_with_kernels(switches, monkeypatch):
    in_the_interpreter(monkeypatch)
    check(MosaicBertForMaskedLM, mosaic(switches, "triton"), True, KERNELS, 2, 0.02)


@pytest.mark.parametrize(
    "changes", [{}, {"hidden_dropout_prob": 0.0}, {"gated_linear_units": True}]
)
def test_hf_bert(changes):
    make, config = BertForMaskedLM, BertConfig
    if "gated_linear_units" in changes:
        make, config = HfBertForMaskedLM, HfBertConfig
    check(
        make, lambda layers: config(num_hidden_layers=layers, **(SHAPE | changes)), False, PLAIN, 2,
        0.01,
    )  # fmt: skip


@pytest.mark.parametrize("task", ["classification", "token-classification"])
@pytest.mark.parametrize("name", ["mosaic_bert", "hf_bert"])
def test_classifiers(name, task):
    packed = name == "mosaic_bert"
    kind = MosaicBertConfig if packed else BertConfig
    config = kind(num_hidden_layers=4, num_labels=3, **SHAPE)
    model = model_class("mosaic_bert" if packed else "bert", task)(config).train()
    whole = batch(packed)
    whole.target_positions = None
    rows = TOKENS // SEQ if task == "classification" else TOKENS
    whole.labels = torch.zeros(rows if packed or rows != TOKENS else (2, SEQ), dtype=torch.long)
    counted = activations(config, PLAIN, task).of(TOKENS, rows, 4, checkpointing=False)
    assert counted == pytest.approx(kept_bytes(model, whole), rel=0.05)


def test_gradient_checkpointing_keeps_one_layer_and_the_inputs():
    config = MosaicBertConfig(num_hidden_layers=8, **SHAPE)
    counted = activations(config, PLAIN)
    whole = counted.of(TOKENS, ROWS, 8, checkpointing=False)
    assert counted.of(TOKENS, ROWS, 8, checkpointing=True) < whole / 3
