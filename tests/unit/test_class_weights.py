"""Class weights count in the training loss of both models, and in no evaluation."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig

from mosaicbert.batch import Batch
from mosaicbert.models.configuration import MosaicBertConfig
from mosaicbert.models.hf_bert import BertForSequenceClassification
from mosaicbert.models.mosaic_bert import MosaicBertForSequenceClassification

SHAPE = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IDS = torch.tensor([[2, 5, 3], [2, 6, 3], [2, 7, 3], [2, 8, 3], [2, 9, 3]])
LABELS = torch.tensor([0, 1, 2, 2, -100])


def batch(packed):
    common = {"labels": LABELS, "num_targets": 4, "num_tokens": 15, "num_samples": 5}
    if packed:
        cu_seqlens = torch.arange(0, 16, 3, dtype=torch.int32)
        return Batch(input_ids=IDS.flatten(), cu_seqlens=cu_seqlens, max_seqlen=3, **common)
    return Batch(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_seqlen=3, **common)


@pytest.mark.parametrize("packed", [True, False])
def test_class_weights(packed):
    torch.manual_seed(0)
    if packed:
        model = MosaicBertForSequenceClassification(MosaicBertConfig(**SHAPE))
    else:
        model = BertForSequenceClassification(BertConfig(**SHAPE))
    torch.nn.init.normal_(model.classifier.weight)
    plain = model.loss(batch(packed)).loss_sum
    model.class_weights = torch.tensor([0.5, 1.0, 3.0])
    loss = model.loss(batch(packed)).loss_sum
    logits = model(IDS[:4]).logits
    want = F.cross_entropy(logits, LABELS[:4], model.class_weights, reduction="none").sum()
    torch.testing.assert_close(loss, want)
    assert not torch.allclose(loss, plain)
    assert "class_weights" not in model.state_dict()
    torch.testing.assert_close(model.eval().loss(batch(packed)).loss_sum, plain)
