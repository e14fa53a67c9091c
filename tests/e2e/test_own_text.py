"""Own text: a vocabulary, a model from scratch, and a model that goes on with it."""

import json

import pytest
from test_commands import ROOT, command, rows_of

TEXTS = ROOT / "src/mosaicbert/data/bundled/sample/en/c4-train.00000-of-00001.json.gz"
SMALL = (
    *("model.pretrained_model_name=prajjwal1/bert-tiny", "max_seq_len=32", "precision=fp32"),
    *("global_train_batch_size=8", "device_eval_batch_size=8", "eval_subset_num_batches=4"),
    *("data_local=mds", "train_loader.num_workers=0", "eval_loader.num_workers=0"),
    "max_duration=12ba",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("text")
    words = "convert --val_fraction 0.1 --splits train val --out_root mds --dataset"
    command(*words.split(), TEXTS, cwd=home)
    words = "tokenizer train --vocab_size 3000 --max_documents 300 --extra_tokens [DOC] --out words"
    done = command(*words.split(), "--input", TEXTS, cwd=home)
    assert "words: 3,000 tokens" in done.stdout
    return home


def losses(home, run):
    rows = rows_of(home / "runs" / run)
    return [row["metrics/eval/loss"] for row in rows if "metrics/eval/loss" in row]


def test_a_new_vocabulary_then_more_text(home):
    scratch = ("tokenizer_name=words", "save_folder=ckpt", "eval_interval=12ba")
    yaml = ROOT / "yamls/main/mosaic-bert-base-uncased.yaml"
    shape = "model.model_config={num_attention_heads: 2, num_hidden_layers: 2}"
    command(
        "pretrain", yaml, *SMALL, shape, *scratch, "run_name=first", "optimizer.lr=3e-3", cwd=home
    )
    checkpoint = home / "ckpt" / (home / "ckpt/latest").read_text().strip()
    assert json.loads((checkpoint / "config.json").read_text())["vocab_size"] == 3000

    yaml = ROOT / "yamls/main/continued-pretraining.yaml"
    more = ("tokenizer_name=words", "load_path=ckpt", "eval_interval=3ba", "optimizer.lr=1e-3")
    command("pretrain", yaml, *SMALL, *more, cwd=home)
    (end,), went_on = losses(home, "first"), losses(home, "continued-pretraining")
    assert abs(went_on[0] - end) < 0.2  # it begins where the other ended, and goes down
    assert went_on[-1] < end
    folder = home / "local-bert-checkpoints/continued-pretraining"
    assert (folder / "latest").is_file()


def test_a_model_to_go_on_with_must_be_there(home):
    yaml = ROOT / "yamls/main/continued-pretraining.yaml"
    done = command("pretrain", yaml, *SMALL, "load_path=nowhere", cwd=home, ok=False)
    assert done.returncode == 2
    assert "nowhere does not exist here" in done.stderr
