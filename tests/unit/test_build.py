"""Models from the `model` section of a YAML."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch._functorch._aot_autograd.autograd_cache import check_cacheable
from transformers import BertConfig

from mosaicbert.batch import Batch
from mosaicbert.config.sections import AlgorithmsConfig, ModelConfig
from mosaicbert.errors import CheckpointError, ConfigError
from mosaicbert.models import build as build_module
from mosaicbert.models import embeddings, encoder, operations
from mosaicbert.models.build import SHAPES, build_model, compile_model, is_packed

TINY = "prajjwal1/bert-tiny"


def settings(**keys):
    return ModelConfig.model_validate({"pretrained_model_name": TINY, **keys})


def build(task="mlm", *, max_seq_len=32, vocab_size=99, num_labels=None, algorithms=None, **keys):
    return build_model(
        settings(**keys),
        task,
        num_labels=num_labels,
        algorithms=algorithms,
        max_seq_len=max_seq_len,
        vocab_size=vocab_size,
    )


def packed_batch():
    return Batch(
        input_ids=torch.tensor([2, 5, 3, 2, 7, 8, 3]),
        cu_seqlens=torch.tensor([0, 3, 7], dtype=torch.int32),
        max_seqlen=4,
        target_positions=torch.tensor([1, 5]),
        labels=torch.tensor([5, 9]),
        num_targets=2,
        num_tokens=7,
        num_samples=2,
    )


def padded_batch():
    return Batch(
        input_ids=torch.tensor([[2, 5, 3, 0], [2, 7, 8, 3]]),
        attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        max_seqlen=4,
        target_positions=torch.tensor([1, 6]),
        labels=torch.tensor([5, 9]),
        num_targets=2,
        num_tokens=7,
        num_samples=2,
    )


@pytest.mark.parametrize("name", ["hf_bert", "mosaic_bert"])
@pytest.mark.parametrize("task", ["mlm", "classification", "token-classification", "embedding"])
def test_every_name_and_task(name, task):
    model = build(task, name=name, num_labels=3)
    assert model.training
    assert is_packed(model) == (name != "hf_bert")
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (128, 2, 2)
    assert config.intermediate_size == 512
    assert config.vocab_size == 99
    assert model.flops_per_token(32) > 0
    if task != "embedding" and task != "mlm":
        assert config.num_labels == 3


@pytest.mark.parametrize("name", SHAPES)
def test_known_shapes_need_no_hub(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with torch.device("meta"):
        model = build(name="mosaic_bert", pretrained_model_name=name, vocab_size=30522)
    if name in ("bert-base-uncased", "mosaicml/mosaic-bert-base"):
        assert sum(p.numel() for p in model.parameters()) == 137_400_384
    heads = model.config.num_attention_heads
    assert model.config.hidden_size == 64 * heads


def test_google_s_prefix():
    with torch.device("meta"):
        model = build(pretrained_model_name="google-bert/bert-large-uncased")
    assert model.config.num_hidden_layers == 24


def test_the_shape_of_a_folder(tmp_path):
    config = {"model_type": "bert", "hidden_size": 64, "num_attention_heads": 2}
    config |= {"num_hidden_layers": 3, "intermediate_size": 100, "vocab_size": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = build(name="mosaic_bert", pretrained_model_name=str(tmp_path))
    assert model.config.num_hidden_layers == 3
    assert model.config.intermediate_size == 100
    assert model.config.vocab_size == 99
    assert model.config.attention_probs_dropout_prob == 0.0


def test_a_name_nobody_knows(monkeypatch):
    monkeypatch.setattr(
        "transformers.AutoConfig.from_pretrained",
        lambda *a, **k: (_ for _ in ()).throw(OSError("no network")),
    )
    with pytest.raises(ConfigError, match="Names that need no hub: bert-base"):
        build(pretrained_model_name="someone/some-model")


@pytest.mark.parametrize("name", ["bert-base-uncasd", "bert-base-uncaesd", "prajjwal1/bert-tyny"])
def test_a_slip_in_a_known_name_asks_no_hub(name, monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    with pytest.raises(
        ConfigError, match=r'Did you mean "(bert-base-uncased|prajjwal1/bert-tiny)"'
    ):
        build(pretrained_model_name=name)


@pytest.mark.parametrize("name", ["bert-base-multilingual-cased", "mosaicml/mosaic-bert-base-1k"])
def test_a_name_of_the_hub_is_no_slip(name, monkeypatch):
    monkeypatch.setattr(
        "transformers.AutoConfig.from_pretrained",
        lambda *a, **k: BertConfig(num_hidden_layers=3, hidden_size=24, num_attention_heads=2),
    )
    assert build(pretrained_model_name=name).config.num_hidden_layers == 3


@pytest.mark.parametrize("name", ["hf_bert", "mosaic_bert"])
def test_overrides(name, caplog):
    model = build(
        name=name,
        model_config={"num_hidden_layers": 1, "max_position_embedding": 700, "hidden_size": 64},
    )
    assert model.config.num_hidden_layers == 1
    assert model.config.hidden_size == 64
    assert model.config.max_position_embeddings == 700
    assert "read as max_position_embeddings" in caplog.text


@pytest.mark.parametrize("name", ["hf_bert", "mosaic_bert"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hiden_layers": 1}, 'Did you mean "num_hidden_layers"'),
        ({"hidden_size": 127}, "does not divide"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"num_attention_heads": -2}, "at least 1"),
        ({"vocab_size": 50}, "tokenizer has 99 tokens"),
    ],
)
def test_impossible_overrides(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        build(name=name, model_config=changes)


def test_sequences_beyond_the_position_table():
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        build(name="hf_bert", max_seq_len=513)
    build(name="hf_bert", max_seq_len=513, algorithms=AlgorithmsConfig(alibi={}))
    assert build(name="mosaic_bert", max_seq_len=2048).config.alibi_starting_size == 2048


def test_algorithms_change_hf_bert():
    plain = build(name="hf_bert")
    both = build(name="hf_bert", algorithms=AlgorithmsConfig(alibi={}, gated_linear_units={}))
    assert plain.config.model_type == "bert"
    assert both.config.model_type == "hf_bert"
    names = set(both.state_dict())
    assert not any("position" in name for name in names)
    assert "bert.encoder.layer.0.intermediate.gated_layers.weight" in names
    assert both.loss(padded_batch()).loss_sum.isfinite()


def test_weights_to_start_from(tmp_path):
    first = build(name="mosaic_bert", use_pretrained=False)
    first.save_pretrained(tmp_path)
    again = build(name="mosaic_bert", pretrained_checkpoint=str(tmp_path))
    whole = build(name="mosaic_bert", use_pretrained=True, pretrained_model_name=str(tmp_path))
    assert whole.training
    wo = [m.bert.encoder.layer[1].mlp.wo.weight for m in (first, again, whole)]
    assert torch.equal(wo[0], wo[1])
    assert torch.equal(wo[0], wo[2])
    with pytest.raises(CheckpointError, match=r"model\.name"):
        build(name="hf_bert", pretrained_checkpoint=str(tmp_path))
    with pytest.raises(ConfigError, match="use_pretrained: false"):
        build(name="hf_bert", use_pretrained=True, pretrained_model_name=str(tmp_path))


@pytest.mark.parametrize("name", ["hf_bert", "mosaic_bert"])
def test_gradient_checkpointing(name):
    batch = packed_batch() if name == "mosaic_bert" else padded_batch()
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build(name=name, gradient_checkpointing=checkpointing)
        torch.manual_seed(1)
        model.loss(batch).loss_sum.backward()
        grads.append(model.bert.embeddings.word_embeddings.weight.grad)
    torch.testing.assert_close(*grads)


def test_the_same_seed_gives_the_same_weights():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(build(name="mosaic_bert"))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("name", "task", "num_graphs"),
    [("mosaic_bert", "mlm", 4), ("mosaic_bert", "classification", 2), ("hf_bert", "mlm", 1)],
)
def test_compiled_models_give_the_same_loss(name, task, num_graphs, monkeypatch):
    """One graph each for embeddings, layer, last layer of MLM and head; HF BERT is one."""
    batch = packed_batch() if name == "mosaic_bert" else padded_batch()
    if task == "classification":
        batch.labels = torch.tensor([0, 1])
    for module in (operations, embeddings, encoder):  # eager, a CPU draws its masks otherwise
        monkeypatch.setattr(module, "dropout", F.dropout)
    torch.manual_seed(0)
    model = build(task, name=name, num_labels=2)
    torch.manual_seed(1)
    logits = (name, task) != ("mosaic_bert", "mlm")  # asked for logits, its head is not compiled
    want = model.loss(batch, return_logits=logits)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compiled(f, backend=backend, **k))
    torch._dynamo.reset()
    compile_model(model)
    torch.manual_seed(1)
    got = model.loss(batch, return_logits=logits)
    torch.testing.assert_close(got.loss_sum, want.loss_sum)
    assert (got.logits is None) == (not logits)
    if logits:
        torch.testing.assert_close(got.logits, want.logits)
    assert len(graphs) == num_graphs
    model.eval().loss(batch)
    assert len(graphs) == num_graphs  # evaluation is not compiled
    for graph in graphs:
        check_cacheable(graph)  # raises for what torch would compile anew in each process


def test_graphs_that_torch_keeps_are_not_used_by_other_code(tmp_path, monkeypatch):
    """They are looked up by torch's settings too, so our sources must be in there."""
    keys = []
    for text in ("a", "b", "a"):
        (tmp_path / "kernel.py").write_text(text)
        monkeypatch.setattr(build_module, "__file__", str(tmp_path / "build.py"))
        compile_model(build(name="mosaic_bert"))
        keys.append(str(torch._inductor.config.unsafe_marked_cacheable_functions))
    assert keys[0] == keys[2] != keys[1]


def test_layers_whose_attention_loops_over_groups_are_not_compiled(monkeypatch, caplog):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **k: compiled.append(f) or f)
    with caplog.at_level("INFO"):
        compile_model(build(model_config={"attention_probs_dropout_prob": 0.1}, name="mosaic_bert"))
        compile_model(build(model_config={"attention_backend": "sdpa"}, name="mosaic_bert"))
    assert len(compiled) == 4  # embeddings and head of each
    assert caplog.text.count("The layers are not compiled") == 2
    compile_model(build(name="mosaic_bert"))
    assert len(compiled) == 4 + 2 + 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mosaic_bert", "fused_layernorm, alibi: built into mosaic_bert."),
        ("hf_bert", "fused_layernorm: built into hf_bert."),
    ],
)
def test_algorithms_that_are_built_in_are_said_to_be_so(name, said, caplog):
    algorithms = AlgorithmsConfig.model_validate({"fused_layernorm": {}, "alibi": {}})
    settings = ModelConfig(name=name, pretrained_model_name="prajjwal1/bert-tiny")
    with caplog.at_level("INFO"):
        build_model(settings, "mlm", algorithms=algorithms, max_seq_len=16, vocab_size=64)
    assert said in caplog.text
