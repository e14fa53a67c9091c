"""HF BERT is Hugging Face's own: same weights, logits and losses; `algorithms` change it."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig
from transformers.models.bert import modeling_bert as hf

from mosaicbert.batch import Batch
from mosaicbert.errors import ConfigError
from mosaicbert.models import hf_bert
from mosaicbert.models.attention import alibi_slopes
from mosaicbert.models.configuration import HfBertConfig

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}
IDS = torch.tensor([[2, 5, 9, 3, 0], [2, 7, 8, 9, 3]])
MASK = (IDS != 0).long()


def batch(labels, positions=None):
    return Batch(
        input_ids=IDS,
        attention_mask=MASK,
        labels=labels,
        target_positions=positions,
        num_targets=2,
        num_tokens=9,
        num_samples=2,
        max_seqlen=5,
    )


def pair(ours, theirs, **changes):
    models = []
    for cls in (ours, theirs):
        torch.manual_seed(0)
        models.append(cls(BertConfig(**SHAPE, **changes)).eval())
    return models


def test_masked_lm_is_theirs():
    model, other = pair(hf_bert.BertForMaskedLM, hf.BertForMaskedLM)
    assert model.config._attn_implementation == "sdpa"
    labels = torch.full_like(IDS, -100)
    labels[0, 1], labels[1, 2] = 5, 11
    want = other(IDS, attention_mask=MASK, labels=labels)
    got = model.loss(batch(torch.tensor([5, 11, -100]), torch.tensor([1, 7, 0])), True)
    torch.testing.assert_close(got.loss_sum / 2, want.loss)
    torch.testing.assert_close(got.logits[:2], want.logits[[0, 1], [1, 2]])


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({"num_labels": 3}, torch.tensor([2, 0])),
        ({"num_labels": 1}, torch.tensor([0.5, -1.0])),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            torch.tensor([[1.0, 0, 1], [0, 0, 1]]),
        ),
    ],
)
def test_classification_is_theirs(changes, labels):
    model, other = pair(
        hf_bert.BertForSequenceClassification, hf.BertForSequenceClassification, **changes
    )
    want = other(IDS, attention_mask=MASK, labels=labels)
    torch.testing.assert_close(model.loss(batch(labels)).loss_sum / labels.numel(), want.loss)


def test_token_classification_is_theirs():
    model, other = pair(
        hf_bert.BertForTokenClassification, hf.BertForTokenClassification, num_labels=3
    )
    labels = torch.where(MASK == 1, IDS % 3, -100)
    want = other(IDS, attention_mask=MASK, labels=labels)
    torch.testing.assert_close(model.loss(batch(labels)).loss_sum / 9, want.loss)


def test_gated_layers_and_alibi_compute_what_they_say():
    config = HfBertConfig(gated_linear_units=True, alibi=True, **SHAPE)
    torch.manual_seed(0)
    model = hf_bert.HfBertForMaskedLM(config).double().eval()
    bert = model.bert
    ids = IDS[1]
    x = bert.embeddings.word_embeddings(ids) + bert.embeddings.token_type_embeddings.weight[0]
    x = bert.embeddings.LayerNorm(x)
    distance = (torch.arange(5)[:, None] - torch.arange(5)).abs()
    for layer in bert.encoder.layer:
        attention = layer.attention.self
        q, k, v = (
            f(x).view(5, 4, 8).transpose(0, 1)
            for f in (attention.query, attention.key, attention.value)
        )
        scores = q @ k.transpose(1, 2) / 8**0.5 - alibi_slopes(4)[:, None, None] * distance
        attended = (scores.softmax(-1) @ v).transpose(0, 1).reshape(5, 32)
        x = layer.attention.output.LayerNorm(layer.attention.output.dense(attended) + x)
        gate, up = layer.intermediate.gated_layers(x).chunk(2, -1)
        x = layer.output.LayerNorm(layer.output.dense(F.gelu(gate) * up) + x)
    logits = model(IDS, attention_mask=MASK).logits[1]
    torch.testing.assert_close(logits, model.cls(x), rtol=1e-6, atol=1e-6)


def test_alibi_sees_no_padding_and_knows_no_limit():
    model = hf_bert.HfBertForMaskedLM(HfBertConfig(alibi=True, **SHAPE)).eval()
    alone = model(IDS[:1, :4]).logits
    torch.testing.assert_close(model(IDS, attention_mask=MASK).logits[:1, :4], alone)
    assert model(torch.ones(1, 40, dtype=torch.long)).logits.isfinite().all()


@pytest.mark.parametrize("gated", [False, True])
def test_alibi_trains_in_bfloat16(gated):
    config = HfBertConfig(alibi=True, gated_linear_units=gated, **SHAPE)
    model = hf_bert.HfBertForMaskedLM(config).bfloat16()
    loss = model.loss(batch(torch.tensor([5, 11]), torch.tensor([1, 7]))).loss_sum
    loss.backward()
    assert loss.isfinite()
    assert model.bert.embeddings(IDS).dtype == torch.bfloat16


def test_a_sequence_beyond_the_position_table():
    model = hf_bert.BertForMaskedLM(BertConfig(**SHAPE))
    with pytest.raises(ConfigError, match="position table of this BERT, 16"):
        model(torch.ones(1, 17, dtype=torch.long))
    with pytest.raises(ConfigError, match="0 to 49"):
        model(torch.full((1, 3), 50))


def test_a_saved_model_is_a_plain_bert(tmp_path):
    model = hf_bert.BertForMaskedLM(BertConfig(**SHAPE)).eval()
    model.save_pretrained(tmp_path)
    other = hf.BertForMaskedLM.from_pretrained(tmp_path)
    assert other.config.architectures == ["BertForMaskedLM"]
    torch.testing.assert_close(model(IDS).logits, other(IDS).logits)
