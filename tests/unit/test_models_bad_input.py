"""Inputs that cannot be: an error of this package, from Mosaic BERT and from HF BERT."""

import pytest
import torch

from mosaicbert.config.sections import ModelConfig
from mosaicbert.errors import ConfigError
from mosaicbert.models.build import build_model
from mosaicbert.models.configuration import HfBertConfig, MosaicBertConfig

IDS = torch.tensor([[2, 5, 9, 3], [2, 7, 3, 0]])
NAMES = ["mosaic_bert", "hf_bert"]


def build(name, task="mlm", **changes):
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    settings = ModelConfig.model_validate(
        {"name": name, "pretrained_model_name": "prajjwal1/bert-tiny", "model_config": shape}
    )
    return build_model(settings, task, max_seq_len=16, vocab_size=93, **changes).eval()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": IDS[0]}, r"shape \(4,\)"),
        ({"input_ids": IDS[:0]}, "at least one row"),
        ({"input_ids": IDS + 90}, "input_ids reach from 90 to 99"),
        ({"input_ids": -IDS}, "input_ids reach from -9"),
        ({"input_ids": IDS.float()}, "whole numbers"),
        ({"input_ids": IDS, "token_type_ids": IDS}, "token_type_ids reach from 0 to 9"),
        ({"input_ids": IDS, "token_type_ids": IDS.float()}, "token_type_ids are torch.float32"),
        ({"input_ids": IDS, "labels": IDS + 85}, "labels reach from 85 to 94"),
        ({"input_ids": IDS, "labels": IDS - 3}, "labels reach from -3"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, r"labels have shape \(2, 3\)"),
    ],
)
def test_ids_and_labels(name, inputs, message):
    model = build(name)
    with pytest.raises(ConfigError, match=message):
        model(**inputs)
    model(IDS, None, IDS // 9, labels=IDS)


@pytest.mark.parametrize("name", NAMES)
def test_labels_of_classifiers(name):
    model = build(name, "classification", num_labels=3)
    with pytest.raises(ConfigError, match="labels reach from 0 to 3"):
        model(IDS, labels=torch.tensor([0, 3]))
    assert model(IDS, labels=torch.tensor([2, -100])).loss.isfinite()
    tokens = build(name, "token-classification", num_labels=10)
    assert tokens(IDS, labels=IDS).loss.isfinite()
    with pytest.raises(ConfigError, match="labels reach from 1 to 10"):
        tokens(IDS, labels=IDS + 1)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes(name):
    model = build(name)
    model.base_model.encoder.layer[1].bfloat16()
    with pytest.raises(ConfigError, match=r"mixed dtypes, torch\.bfloat16 and torch\.float32"):
        model(IDS)
    assert model.bfloat16()(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("cls", [MosaicBertConfig, HfBertConfig])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 7},
        {"hidden_dropout_prob": 1.5},
        {"attention_probs_dropout_prob": -0.1},
        {"num_labels": 0},
    ],
)
def test_configurations(cls, changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        cls(**changes)


def test_configurations_of_mosaic_bert():
    with pytest.raises(ConfigError, match="attention_window"):
        MosaicBertConfig(attention_window=-1)
    with pytest.raises(ConfigError, match="head size 5 is odd"):
        MosaicBertConfig(position_encoding="rope", hidden_size=10, num_attention_heads=2)


def test_hf_bert_takes_embeddings_in_place_of_ids():
    model = build("hf_bert")
    embeddings = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(IDS).logits)


def test_sizes_beyond_all_models_are_told_at_once():
    for name in ("num_hidden_layers", "vocab_size"):
        with pytest.raises(ConfigError, match=f"{name}: 9+ is more than any model has"):
            MosaicBertConfig(**{name: 999_999_999_999})
