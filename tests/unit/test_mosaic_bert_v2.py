"""The switches of the modern sibling: each does what its paper says, and trains and saves."""

import pytest
import torch
import torch.nn.functional as F

from mosaicbert.batch import Batch
from mosaicbert.config.sections import ModelConfig
from mosaicbert.errors import CheckpointError, ConfigError
from mosaicbert.models.build import build_model
from mosaicbert.models.checkpoints import load, load_weights
from mosaicbert.models.configuration import MODERN, MosaicBertConfig
from mosaicbert.models.mosaic_bert import MosaicBertForMaskedLM
from mosaicbert.models.rotary import rotary_table, rotate

SHAPE = {
    "vocab_size": 93,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
SWITCHES = [
    {"pre_norm": True},
    {"qk_norm": True},
    {"position_encoding": "rope"},
    {"feed_forward": "relu2"},
    {"unet_skips": True},
    {"value_skips": True},
    {"logit_softcap": 5},
    {"attention_window": 1},
    {"bigram_buckets": 11},
    {
        "pre_norm": True,
        "qk_norm": True,
        "position_encoding": "rope",
        "feed_forward": "relu2",
        "unet_skips": True,
        "value_skips": True,
        "logit_softcap": 5.0,
        "bigram_buckets": 11,
    },
]
IDS = torch.tensor([[2, 5, 9, 3, 0, 0], [2, 7, 8, 9, 6, 3]])
MASK = (IDS != 0).long()


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return MosaicBertForMaskedLM(MosaicBertConfig(**SHAPE, **changes)).eval()


def batch():
    return Batch(
        input_ids=IDS[MASK == 1],
        cu_seqlens=torch.tensor([0, 4, 10], dtype=torch.int32),
        max_seqlen=6,
        target_positions=torch.tensor([1, 5, 8]),
        labels=torch.tensor([5, 7, 6]),
        num_targets=3,
        num_tokens=10,
        num_samples=2,
    )


@pytest.mark.parametrize("changes", SWITCHES, ids=lambda c: "+".join(c))
def test_each_switch_changes_the_model_and_trains(changes, tmp_path):
    plain, model = build(), build(**changes)
    logits = model(IDS, MASK).logits
    assert not torch.allclose(logits, plain(IDS, MASK).logits, atol=1e-4)
    got = model.loss(batch(), return_logits=True)
    torch.testing.assert_close(got.logits, logits[[0, 1, 1], [1, 1, 4]])
    got.loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load(tmp_path)(IDS, MASK).logits, logits)
    with pytest.raises(CheckpointError):
        load_weights(plain, tmp_path)


@pytest.mark.parametrize("changes", [*SWITCHES, MODERN], ids=lambda c: "+".join(c))
def test_each_switch_learns_packed_as_padded(changes):
    """Steps on packed batches; then the padded form, with other padding, gives the same loss."""
    model = build(**{**changes, "hidden_dropout_prob": 0.0}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model.loss(batch()).loss_sum / 3
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    ids = F.pad(IDS, (0, 3))
    labels = torch.full_like(ids, -100)
    labels[[0, 1, 1], [1, 1, 4]] = torch.tensor([5, 7, 6])
    padded = model.eval()(ids, (ids != 0).long(), labels=labels).loss
    torch.testing.assert_close(padded, model.loss(batch()).loss_sum / 3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_all_switches_compile_without_a_break():
    model = build(**SWITCHES[-1])
    want = model.loss(batch()).loss_sum
    for layer in model.bert.encoder.layer:
        layer.compile(backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(model.loss(batch()).loss_sum, want)


def test_pre_norm_is_as_written():
    model = build(pre_norm=True).bert
    ids = IDS[1:]
    x = model(ids, output_hidden_states=True).hidden_states[0][0]
    plan = model.encoder.plan(x, torch.tensor([0, 6]).int(), 6)
    for layer in model.encoder.layer:
        output, mlp = layer.attention.output, layer.mlp
        attended, _ = layer.attention.self(F.layer_norm(x, (128,)), plan, None)
        x = x + output.dense(attended)
        gate, up = mlp.gated_layers(F.layer_norm(x, (128,))).chunk(2, -1)
        x = x + mlp.wo(F.gelu(gate) * up)
    want = F.layer_norm(x, (128,))
    torch.testing.assert_close(model(ids)[0][0], want, rtol=1e-4, atol=1e-5)


def test_zero_initialised_outputs_start_as_the_identity():
    model = build(pre_norm=True, zero_init_outputs=True, unet_skips=True)
    states = model.bert(IDS, MASK, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[1], states[0])
    torch.testing.assert_close(states[2], states[0])
    torch.testing.assert_close(states[3], 2 * states[0])  # one skip
    torch.testing.assert_close(states[4] * MASK[..., None], F.layer_norm(3 * states[0], (128,)))


def test_zero_initialised_outputs_survive_loading(tmp_path):
    model = build(zero_init_outputs=True)
    with torch.no_grad():
        model.bert.encoder.layer[0].mlp.wo.weight.normal_()
    model.save_pretrained(tmp_path)
    again = MosaicBertForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_skips_of_a_single_layer_have_no_weights(tmp_path):
    config = MosaicBertConfig(**{**SHAPE, "num_hidden_layers": 1}, unet_skips=True)
    model = MosaicBertForMaskedLM(config).eval()
    assert "bert.encoder.skip_weights" not in model.state_dict()
    model.loss(batch()).loss_sum.backward()
    model.save_pretrained(tmp_path)
    again = MosaicBertForMaskedLM(config).eval()
    load_weights(again, tmp_path)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_rotation_depends_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8)
    table = rotary_table(torch.arange(6), 8, 10_000.0)
    turned = rotate(torch.cat([q, k], dim=1).expand(6, 2, 1, 8), table)[:, :, 0]
    scores = turned[:, 0] @ turned[:, 1].T
    for shift in range(-3, 4):
        diagonal = scores.diagonal(shift)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_positions_start_anew_in_each_sequence():
    encoder = build(position_encoding="rope").bert.encoder
    rotary = encoder.plan(torch.zeros(9, 128), torch.tensor([0, 3, 9]).int(), 6).rotary
    assert torch.equal(rotary[:, :3], rotary[:, 3:6])
    assert (rotary[0, 0] == 1).all()


def test_the_soft_cap_bounds_and_keeps_padding_out():
    model = build(logit_softcap=0.5)
    with torch.no_grad():
        model.cls.predictions.decoder.bias.normal_(0, 10)
    logits = model.cls.predictions(torch.randn(3, 128))
    assert (logits[:, :93].abs() <= 0.5).all()
    assert (logits[:, 93:] == -torch.inf).all()


def test_the_name_switches_the_bundle_on():
    settings = ModelConfig.model_validate(
        {"name": "mosaic_bert_v2", "pretrained_model_name": "prajjwal1/bert-tiny"}
    )
    config = build_model(settings, "mlm", max_seq_len=32, vocab_size=99).config
    assert config.pre_norm
    assert config.zero_init_outputs
    assert config.hidden_dropout_prob == 0
    assert not config.qk_norm
    settings.overrides = {"pre_norm": False, "hidden_dropout_prob": 0.1}
    config = build_model(settings, "mlm", max_seq_len=32, vocab_size=99).config
    assert not config.pre_norm
    assert config.hidden_dropout_prob == 0.1


def test_unknown_choices():
    for changes in ({"position_encoding": "rotary"}, {"feed_forward": "relu"}):
        with pytest.raises(ConfigError, match="choose"):
            build(**changes)


def test_bigrams_stay_inside_their_sequence():
    model = build(bigram_buckets=500).bert.embeddings
    torch.nn.init.normal_(model.bigram_embeddings.weight)
    ids = torch.tensor([5, 9, 5, 9, 7, 5])
    together = model.bigram_embeddings.of_neighbours(
        ids, torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    )
    alone = model.bigram_embeddings.of_neighbours(ids[:2], torch.tensor([0, 2], dtype=torch.int32))
    torch.testing.assert_close(together[:2], alone)
    assert not torch.equal(together[1], together[3])  # the same token, but here it has a follower
    assert (build(bigram_buckets=500).bert.embeddings.bigram_embeddings.weight == 0).all()


def test_bigrams_spread_over_the_rows():
    embedding = build(bigram_buckets=1000).bert.embeddings.bigram_embeddings
    first, second = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    rows = embedding._row(first.flatten(), second.flatten())
    counts = torch.bincount(rows, minlength=1000).double()
    assert rows.min() >= 0
    assert counts.std() / counts.mean() < 0.3  # 0.16 if they were random
