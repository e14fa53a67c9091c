"""Checkpoints of every origin load by their content, or fail with a list of what is wrong."""

import json
import logging
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig
from transformers import BertForMaskedLM as HubBert

from mosaicbert.errors import CheckpointError, ConfigError
from mosaicbert.models.checkpoints import load, load_weights, read_state_dict
from mosaicbert.models.configuration import HfBertConfig, MosaicBertConfig
from mosaicbert.models.hf_bert import HfBertForMaskedLM
from mosaicbert.models.mosaic_bert import (
    MosaicBertForMaskedLM,
    MosaicBertForSequenceClassification,
)

SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
IDS = torch.tensor([[2, 5, 9, 3, 0], [2, 7, 3, 0, 0]])
MASK = (IDS != 0).long()


def mosaic(cls=MosaicBertForMaskedLM, vocab_size=96, seed=0, **changes):
    torch.manual_seed(seed)
    return cls(MosaicBertConfig(vocab_size=vocab_size, **{**SHAPE, **changes})).eval()


def same_logits(model, other, **kwargs):
    ours, theirs = model(IDS, MASK, **kwargs)[0], other(IDS, MASK, **kwargs)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def composer_content(model):
    """A full Composer checkpoint: weights, trainer's state and random state."""
    state = {
        "model": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizers": {"DecoupledAdamW": {"state": {}, "param_groups": []}},
        "integrations": {
            "huggingface": {
                "model": {"config": {"content": {**model.config.to_dict(), "model_type": "bert"}}}
            }
        },
        "run_name": "mosaic-bert",
    }
    return {"state": state, "rng": [{"torch": torch.get_rng_state()}]}


@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
def test_an_original_state_dict(tmp_path, suffix):
    model = mosaic()
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file({k: v.clone() for k, v in model.state_dict().items()}, path)
    else:
        torch.save(model.state_dict(), path)
    same_logits(load(path), model)


def test_a_full_composer_checkpoint(tmp_path):
    model = mosaic()
    torch.save(composer_content(model), tmp_path / "ep0-ba10-rank0.pt")
    os.symlink("ep0-ba10-rank0.pt", tmp_path / "latest-rank0.pt")
    for path in (tmp_path / "ep0-ba10-rank0.pt", tmp_path):
        loaded = load(path)
        same_logits(loaded, model)
        assert loaded.config.num_attention_heads == 2


def test_a_composer_checkpoint_with_objects_of_its_trainer(tmp_path):
    import collections
    import datetime
    import random

    import numpy as np

    model = mosaic()
    content = composer_content(model)
    content["state"]["timestamp"] = {"wct": datetime.timedelta(seconds=3)}
    window = collections.deque([1.0, 2.0], maxlen=2)
    counts = collections.defaultdict(list, a=[1.0])
    content["state"]["callbacks"] = [("SpeedMonitor", {"window": window, "counts": counts})]
    content["rng"].append({"numpy": np.random.get_state(), "python": random.getstate()})
    torch.save(content, tmp_path / "full.pt")
    same_logits(load(tmp_path / "full.pt"), model)


def test_the_original_s_hub_layout(tmp_path):
    model = mosaic()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    config = BertConfig(vocab_size=96, **SHAPE).to_dict()
    config |= {"alibi_starting_size": 1024, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load(tmp_path)
    same_logits(loaded, model)
    assert loaded.config.model_type == "mosaic_bert"
    assert loaded.config.alibi_starting_size == 1024


def test_a_hugging_face_folder_of_ours(tmp_path):
    model = mosaic(vocab_size=93)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config.vocab_size == 93
    same_logits(loaded, model)


def test_shards_of_hugging_face(tmp_path):
    model = mosaic()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    same_logits(load(tmp_path), model)


def test_our_own_save_folder(tmp_path):
    model = mosaic()
    model.save_pretrained(tmp_path / "ep0-ba10")
    (tmp_path / "latest").write_text("ep0-ba10\n")
    same_logits(load(tmp_path), model)
    same_logits(load(f"file://{tmp_path}"), model)
    same_logits(load(tmp_path / "latest"), model)  # as a run's `load_path` may be written
    same_logits(load(f"file://{tmp_path}/latest"), model)


def test_a_plain_bert(tmp_path):
    torch.manual_seed(0)
    model = HubBert(BertConfig(vocab_size=96, **SHAPE)).eval()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded).__name__ == "BertForMaskedLM"
    same_logits(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    same_logits(HubBert.from_pretrained(tmp_path / "again"), model)


def test_a_bert_changed_by_algorithms(tmp_path):
    torch.manual_seed(0)
    model = HfBertForMaskedLM(HfBertConfig(vocab_size=96, alibi=True, **SHAPE)).eval()
    model.save_pretrained(tmp_path)
    same_logits(load(tmp_path), model)
    plain = load_plain(tmp_path)
    with pytest.raises(CheckpointError, match="algorithms"):
        load_weights(plain, tmp_path)


def load_plain(tmp_path):
    HubBert(BertConfig(vocab_size=96, **SHAPE)).save_pretrained(tmp_path / "plain")
    return load(tmp_path / "plain")


def test_every_task_from_a_pre_trained_model(tmp_path, caplog):
    model = mosaic()
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="mosaicbert"):
        classifier = load(tmp_path, task="classification", num_labels=3)
        tokens = load(tmp_path, task="token-classification", num_labels=5)
    assert "classifier.*: a new head" in caplog.text
    assert "bert.pooler.*: a new head" in caplog.text
    assert "cls.* is left out" in caplog.text
    assert classifier(IDS).logits.shape == (2, 3)
    assert tokens(IDS).logits.shape == (2, 5, 5)
    embedding = load(tmp_path, task="embedding")
    torch.testing.assert_close(embedding(IDS, MASK)[0], model.bert(IDS, MASK)[0])
    hidden = classifier.bert(IDS, MASK)[0]
    torch.testing.assert_close(hidden, model.bert(IDS, MASK)[0])


def test_a_classifier_keeps_its_labels(tmp_path):
    model = mosaic(MosaicBertForSequenceClassification, id2label={0: "no", 1: "yes", 2: "so"})
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, task="classification")
    same_logits(loaded, model)
    assert loaded.config.id2label[2] == "so"


def test_a_classifier_of_another_task_starts_anew(tmp_path, caplog):
    mosaic(MosaicBertForSequenceClassification, num_labels=3, seed=1).save_pretrained(tmp_path)
    source = load(tmp_path, task="classification")
    for num_labels, new_head in ((2, False), (3, True)):
        caplog.clear()
        model = mosaic(MosaicBertForSequenceClassification, num_labels=num_labels)
        before = model.classifier.weight.clone()
        with caplog.at_level(logging.INFO, logger="mosaicbert"):
            load_weights(model, tmp_path, new_head=new_head)
        assert torch.equal(model.classifier.weight, before)
        assert torch.equal(model.bert.pooler.dense.weight, source.bert.pooler.dense.weight)
        assert "starts anew" in caplog.text
    load_weights(model, tmp_path)
    assert torch.equal(model.classifier.weight, source.classifier.weight)


def test_padding_of_the_vocabulary_may_differ(tmp_path, caplog):
    """The original's checkpoints say 30528 where the tokenizer has 30522."""
    original = mosaic(vocab_size=96)
    torch.save(original.state_dict(), tmp_path / "weights.pt")
    model = mosaic(vocab_size=93, seed=1)
    load_weights(model, tmp_path / "weights.pt")
    ours, theirs = model(IDS, MASK).logits, original(IDS, MASK).logits
    torch.testing.assert_close(ours, theirs[..., :93], rtol=0, atol=0)

    torch.manual_seed(0)
    HubBert(BertConfig(vocab_size=93, **SHAPE)).save_pretrained(tmp_path / "bert")
    wide = load_plain_of(96, tmp_path)
    with caplog.at_level(logging.INFO, logger="mosaicbert"):
        load_weights(wide, tmp_path / "bert")
    assert "93 rows in the checkpoint, 96 in the model" in caplog.text
    with pytest.raises(CheckpointError, match="word_embeddings"):
        load_weights(mosaic(vocab_size=40), tmp_path / "weights.pt")


def load_plain_of(vocab_size, tmp_path):
    HubBert(BertConfig(vocab_size=vocab_size, **SHAPE)).save_pretrained(tmp_path / "wide")
    return load(tmp_path / "wide")


def test_what_does_not_fit_is_listed(tmp_path):
    weights = {name: tensor.clone() for name, tensor in mosaic().state_dict().items()}
    del weights["bert.encoder.layer.1.mlp.wo.bias"]
    weights["bert.encoder.layer.0.attention.extra"] = torch.zeros(1)
    weights["bert.encoder.layer.0.mlp.wo.bias"] = torch.zeros(3)
    weights["bert.embeddings.LayerNorm.bias"] = torch.zeros(128, dtype=torch.long)
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    with pytest.raises(CheckpointError) as error:
        load_weights(mosaic(), path)
    text = str(error.value)
    assert "Missing: bert.encoder.layer.1.mlp.wo.bias." in text
    assert "Unexpected: bert.encoder.layer.0.attention.extra." in text
    assert "bert.encoder.layer.0.mlp.wo.bias (3,) (the model's: (128,))" in text
    assert "bert.embeddings.LayerNorm.bias (torch.int64)" in text


def test_half_a_head_is_no_new_head(tmp_path):
    weights = {name: tensor.clone() for name, tensor in mosaic().state_dict().items()}
    del weights["cls.predictions.transform.dense.bias"]
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"Missing: cls\.predictions\.transform\.dense\.bias"):
        load(tmp_path / "weights.safetensors")


def test_another_number_of_heads_is_refused(tmp_path):
    mosaic().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="num_attention_heads: 2"):
        load_weights(mosaic(num_attention_heads=4), tmp_path)


def test_another_activation_or_epsilon_is_refused(tmp_path):
    """They are in no weight's shape, and change what all of them compute."""
    HubBert(BertConfig(vocab_size=96, **SHAPE, hidden_act="relu")).save_pretrained(tmp_path / "a")
    HubBert(BertConfig(vocab_size=96, **SHAPE, layer_norm_eps=0.1)).save_pretrained(tmp_path / "b")
    plain = HubBert(BertConfig(vocab_size=96, **SHAPE))
    for name, said in (("a", "hidden_act: 'relu'"), ("b", "layer_norm_eps: 0.1")):
        with pytest.raises(CheckpointError, match=said):
            load_weights(plain, tmp_path / name)


class Attack:
    def __reduce__(self):
        return (os.mkdir, ("attacked",))


@pytest.mark.parametrize("way", ["torch", "legacy", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    content = {"bert.embeddings.word_embeddings.weight": torch.zeros(2), "x": Attack()}
    if way == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "torch")
    with pytest.raises(CheckpointError, match="code"):
        load(path)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_damaged_files(tmp_path, suffix):
    whole = tmp_path / f"whole.{suffix}"
    if suffix == "pt":
        torch.save(mosaic().state_dict(), whole)
    else:
        save_file({k: v.clone() for k, v in mosaic().state_dict().items()}, whole)
    content = whole.read_bytes()
    for size in (0, 10, len(content) // 2):
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "weights.pt is empty"),
        (
            b"hello, this is a text\n",
            "damaged or no checkpoint: it does not begin as torch",
        ),
        (b"\x80\x02", "damaged or no checkpoint: it ends too early"),
    ],
)
def test_files_of_another_kind(tmp_path, content, message):
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "weights.pt")


def test_a_foreign_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    save_file({"transformer.wte.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"its config.json says 'gpt2'.*transformer\.wte"):
        load(tmp_path)


def test_a_configuration_that_cannot_be_is_traced_to_its_file(tmp_path):
    mosaic().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 3}))
    with pytest.raises(ConfigError, match=f"{tmp_path}: hidden_size 128 does not divide"):
        load(tmp_path)


def test_other_dtypes_are_converted_and_said_so(tmp_path, caplog):
    model = mosaic()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    weights["bert.encoder.layer.0.mlp.wo.weight"] = torch.zeros(128, 32, dtype=torch.bfloat16)
    torch.save(weights, tmp_path / "weights.pt")
    with caplog.at_level(logging.INFO, logger="mosaicbert"):
        loaded = load(tmp_path / "weights.pt")
    assert "weights.pt: from torch.bfloat16 and torch.float32 to torch.float32" in caplog.text
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="does not exist"):
        load(f"file://{tmp_path}/nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load(tmp_path)
    torch.save({"weights": 3}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="no state dict"):
        load(tmp_path)
    torch.save({"x": torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="neither Mosaic BERT nor BERT"):
        load(tmp_path)
    (tmp_path / "b.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="several checkpoints"):
        load(tmp_path)


def test_bad_arguments(tmp_path):
    mosaic().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="token-classification"):
        load(tmp_path, task="tagging")
    with pytest.raises(ConfigError, match='Did you mean "hidden_dropout_prob"'):
        load(tmp_path, hidden_dropout=0.2)


def test_a_bare_state_dict_takes_its_heads_from_the_caller(tmp_path):
    model = mosaic(num_attention_heads=4)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    same_logits(load(tmp_path / "weights.pt", num_attention_heads=4), model)


def test_wrappers_prefixes_fall_away(tmp_path):
    model = mosaic()
    torch.save({f"module.{k}": v for k, v in model.state_dict().items()}, tmp_path / "ddp.pt")
    assert set(read_state_dict(tmp_path / "ddp.pt")[0]) == set(model.state_dict())
    torch.save(model.bert.state_dict(), tmp_path / "bare.pt")
    assert "bert.embeddings.LayerNorm.bias" in read_state_dict(tmp_path / "bare.pt")[0]


def test_safetensors_under_another_name(tmp_path):
    model = mosaic()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(weights, tmp_path / "weights.bin")
    same_logits(load(tmp_path / "weights.bin"), model)


def test_one_wrong_byte_among_the_weights(tmp_path):
    torch.save(mosaic().state_dict(), tmp_path / "weights.pt")
    data = bytearray((tmp_path / "weights.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "weights.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        load(tmp_path / "weights.pt")


def test_weights_that_are_no_numbers(tmp_path):
    weights = {k: v.clone() for k, v in mosaic().state_dict().items()}
    weights["bert.encoder.layer.0.mlp.wo.weight"][0, 0] = torch.nan
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"mlp\.wo\.weight \(not finite\)"):
        load(tmp_path / "weights.pt")


@pytest.mark.parametrize("name", ["ep0-ba99", "../elsewhere", ""])
def test_a_pointer_to_nothing(name, tmp_path):
    (tmp_path / "save").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "save/latest").write_text(name)
    with pytest.raises(CheckpointError, match="no folder beside it"):
        load(tmp_path / "save")


def test_a_misspelt_key_beside_the_weights_is_named(tmp_path, caplog):
    mosaic().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    caplog.clear()
    load(tmp_path)
    assert "no key" not in caplog.text
    config["pre_nrm"] = config.pop("pre_norm")
    (tmp_path / "config.json").write_text(json.dumps(config))
    load(tmp_path)
    assert "'pre_nrm' is no key of MosaicBertConfig. Did you mean \"pre_norm\"?" in caplog.text


def test_a_weight_without_a_name_is_no_state_dict(tmp_path):
    torch.save({None: torch.ones(2), "x": torch.ones(2)}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load(tmp_path / "odd.pt", "mlm")
