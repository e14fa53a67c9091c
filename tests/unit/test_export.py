"""What is exported loads elsewhere and computes the same."""

import json
import logging

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

import mosaicbert
from mosaicbert.cli import main as cli
from mosaicbert.errors import CheckpointError, ConfigError
from mosaicbert.models import export, register
from mosaicbert.models.configuration import HfBertConfig, MosaicBertConfig
from mosaicbert.models.export import example_inputs, export_checkpoint, write_onnx
from mosaicbert.models.hf_bert import BertForMaskedLM, BertModel, HfBertForSequenceClassification
from mosaicbert.models.mosaic_bert import (
    MosaicBertForMaskedLM,
    MosaicBertForSequenceClassification,
    MosaicBertForTokenClassification,
    MosaicBertModel,
)
from mosaicbert.models.padded import PaddedModel

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat"]


@pytest.fixture(autouse=True)
def _registered():
    register.install()


def mosaic(cls=MosaicBertForMaskedLM, **changes):
    torch.manual_seed(0)
    return cls(MosaicBertConfig(vocab_size=len(VOCAB), **{**SHAPE, **changes})).eval()


@pytest.fixture
def checkpoint(tmp_path):
    """A save folder as training writes it, its run folder, and the model in it."""
    model = mosaic()
    folder = tmp_path / "checkpoints" / "ep1-ba30"
    model.save_pretrained(folder)
    (folder.parent / "latest").write_text("ep1-ba30\n")
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "mask_token": "[MASK]"})
    )
    state = {
        "run_name": "small",
        "optimizer": "muon",
        "progress": {"epoch": 1, "batch": 30, "sample": 960, "token": 61440, "seconds": 12.34},
        "config": {"optimizer": {"lr": 0.0005}},
    }
    (folder / "state.json").write_text(json.dumps(state))
    (tmp_path / "runs/small").mkdir(parents=True)
    rows = [
        {"batch": 20, "loss/train/total": 5.5},
        {"batch": 30, "token": 61440, "loss/train/total": 4.25, "metrics/eval/loss": 4.125},
        {"batch": 40, "loss/train/total": 9.9},
    ]
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "runs/small/metrics.jsonl").write_text(text)
    return folder.parent, model


def test_a_hugging_face_folder(checkpoint, tmp_path):
    folder, model = checkpoint
    out = export_checkpoint(folder, tmp_path / "out")
    again = AutoModelForMaskedLM.from_pretrained(out).eval()
    ids = torch.tensor([[2, 5, 4, 7, 3]])
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert again.config.architectures == ["MosaicBertForMaskedLM"]
    assert AutoTokenizer.from_pretrained(out).mask_token == "[MASK]"
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoints", "runs", "out"}


def test_fill_mask(checkpoint, tmp_path, caplog):
    out = export_checkpoint(checkpoint[0], tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        fill = pipeline("fill-mask", model=str(out), device="cpu")
        answers = fill("the cat [MASK] on a mat")
    assert len(answers) == 5
    assert all(answer["token_str"] in VOCAB for answer in answers)
    assert "not supported" not in caplog.text


def test_the_card_has_the_run_s_numbers(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = export_checkpoint(checkpoint[0], tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card
    for row in (
        "| batches | 30 |",
        "| tokens | 61,440 |",
        "| optimizer | muon |",
        "| learning rate | 0.0005 |",
        "| loss/train/total | 4.25 |",
        "| metrics/eval/loss | 4.125 |",
    ):
        assert row in card
    assert "import mosaicbert" in card


def test_the_card_tells_no_other_run_s_metrics(checkpoint, tmp_path):
    metrics = tmp_path / "runs/small/metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("61440", "61441"))
    out = export_checkpoint(checkpoint[0], tmp_path / "out", run_folder=tmp_path / "runs/small")
    card = (out / "README.md").read_text()
    assert "| batches | 30 |" in card
    assert "loss/train" not in card


def test_an_embedding_model(checkpoint, tmp_path):
    folder, model = checkpoint
    out = export_checkpoint(folder, tmp_path / "out", task="embedding", alibi_starting_size=2048)
    assert json.loads((out / "sentence_bert_config.json").read_text())["max_seq_length"] == 2048
    modules = json.loads((out / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling"]
    assert json.loads((out / "1_Pooling/config.json").read_text())["pooling_mode_mean_tokens"]
    ids = torch.tensor([[2, 5, 6, 3]])
    again = AutoModel.from_pretrained(out).eval()
    torch.testing.assert_close(again(ids)[0], model.bert(ids)[0])


def test_a_bare_state_dict_needs_a_tokenizer(tmp_path):
    torch.save(mosaic().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="--tokenizer"):
        export_checkpoint(tmp_path / "weights.pt", tmp_path / "out", num_attention_heads=4)
    assert {p.name for p in tmp_path.iterdir()} == {"weights.pt"}
    export_checkpoint(
        tmp_path / "weights.pt",
        tmp_path / "out",
        num_attention_heads=4,
        tokenizer="bert-base-uncased",
    )
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 30522


def test_a_folder_that_is_not_empty_stays_as_it_is(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        export_checkpoint(checkpoint[0], tmp_path / "out")
    with pytest.raises(ConfigError, match="hf or onnx"):
        export_checkpoint(checkpoint[0], tmp_path / "new", to="tf")  # type: ignore[arg-type]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_what_a_killed_export_left_is_cleared_away(checkpoint, tmp_path, monkeypatch):
    class Killed(BaseException):
        """Stands for kill -9: nothing is tidied up."""

    to = tmp_path / "to"
    with monkeypatch.context() as patch:
        patch.setattr(export, "model_card", lambda *args: (_ for _ in ()).throw(Killed()))
        patch.setattr(export.shutil, "rmtree", lambda *args, **options: None)
        with pytest.raises(Killed):
            export_checkpoint(checkpoint[0], to / "out")
    assert len(list(to.iterdir())) == 1
    assert not (to / "out").exists()
    export_checkpoint(checkpoint[0], to / "out")
    assert [path.name for path in to.iterdir()] == ["out"]


def test_the_command(checkpoint, tmp_path, capsys):
    assert cli(["export", str(checkpoint[0]), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert cli(["export", str(tmp_path / "nothing"), str(tmp_path / "new")]) == 2
    assert "does not exist" in capsys.readouterr().err


MODELS = [
    lambda: mosaic(),
    lambda: mosaic(MosaicBertModel),
    lambda: mosaic(MosaicBertForSequenceClassification, attention_window=2),
    lambda: mosaic(
        MosaicBertForTokenClassification,
        position_encoding="rope",
        pre_norm=True,
        unet_skips=True,
        bigram_buckets=50,
    ),
    lambda: BertForMaskedLM(HfBertConfig(vocab_size=11, **SHAPE)).eval(),
    lambda: BertModel(HfBertConfig(vocab_size=11, **SHAPE)).eval(),
    lambda: HfBertForSequenceClassification(
        HfBertConfig(vocab_size=11, alibi=True, **SHAPE)
    ).eval(),
]


@pytest.mark.parametrize("build", MODELS)
def test_the_padded_form_computes_the_same(build):
    model = build()
    for parameter in model.parameters():
        if not parameter.any():  # bigrams start at zero, and would prove nothing
            torch.nn.init.normal_(parameter)
    inputs = example_inputs(model, batch=3, seq=9)
    got = PaddedModel(model)(*inputs)
    want = model(*inputs)
    torch.testing.assert_close(
        got[0] * _rows(got[0], inputs[1]), want[0] * _rows(want[0], inputs[1])
    )
    if len(got) == 2 and isinstance(model, MosaicBertModel):
        torch.testing.assert_close(got[1], want.pooler_output)


def _rows(x, mask):
    return mask[..., None] if x.ndim == 3 else 1


@pytest.mark.slow
@pytest.mark.parametrize("build", MODELS)
def test_onnx_of_every_kind(build, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    write_onnx(build(), tmp_path / "model.onnx")


def test_onnx(checkpoint, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, model = checkpoint
    out = export_checkpoint(folder, tmp_path / "out", to="onnx")
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    assert [item.shape for item in session.get_inputs()] == [["batch", "seq"]] * 3
    for batch, seq in ((1, 4), (5, 33)):
        inputs = example_inputs(model, batch, seq)
        names = ("input_ids", "attention_mask", "token_type_ids")
        feed = dict(zip(names, (x.numpy() for x in inputs), strict=True))
        (got,) = session.run(None, feed)
        want = model(*inputs).logits * inputs[1][..., None]
        got = torch.from_numpy(got) * inputs[1][..., None]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_onnx_without_its_packages(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("mosaicbert.models.export.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"mosaicbert\[onnx\]"):
        export_checkpoint(checkpoint[0], tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()
    assert mosaicbert is not None
