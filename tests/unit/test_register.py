"""transformers' Auto classes know our models, whichever import comes first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mosaicbert.models.configuration import MosaicBertConfig
from mosaicbert.models.mosaic_bert import MosaicBertForMaskedLM

INSTALL = "from mosaicbert.models.register import install; install()\n"
ROOT = Path(__file__).parents[2]


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "first",
    [
        INSTALL,
        "from transformers import AutoModelForMaskedLM\n" + INSTALL,
        pytest.param(
            INSTALL + "from transformers import AutoConfig, AutoModel\n", marks=pytest.mark.slow
        ),
        pytest.param(INSTALL + "import mosaicbert.models.hf_bert\n", marks=pytest.mark.slow),
    ],
    ids=["ours-first", "theirs-first", "auto-first", "models-first"],
)
def test_auto_classes_load_a_folder(first, tmp_path):
    shape = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = MosaicBertConfig(vocab_size=9, intermediate_size=4, **shape)
    MosaicBertForMaskedLM(config).save_pretrained(tmp_path)
    code = f"""
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM
print(type(AutoModelForMaskedLM.from_pretrained({str(tmp_path)!r})).__name__)
print(type(AutoModel.from_pretrained({str(tmp_path)!r})).__name__)
small = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=4)
print(type(AutoModel.from_config(AutoConfig.for_model("hf_bert", alibi=True, **small))).__name__)
"""
    assert python(first + code).split() == [
        "MosaicBertForMaskedLM", "MosaicBertModel", "HfBertModel"
    ]  # fmt: skip


def test_installing_imports_nothing_heavy():
    code = "import sys\nprint(*(m for m in ('torch', 'transformers') if m in sys.modules))"
    assert python(INSTALL + code).strip() == ""


def test_the_finder_leaves_once_it_has_served():
    from mosaicbert.models.register import _Finder, install

    install()
    import transformers.models.auto.modeling_auto  # noqa: F401

    install()
    assert not any(isinstance(finder, _Finder) for finder in sys.meta_path)
    assert torch.is_tensor(torch.zeros(1))


@pytest.mark.parametrize("first", ["mosaicbert.models.build", "mosaicbert.pretraining"])
def test_auto_classes_know_ours_after_a_job_was_imported(first):
    python(
        f"import mosaicbert, {first}\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "from mosaicbert.models.configuration import HfBertConfig, MosaicBertConfig\n"
        "assert MosaicBertConfig in Auto._model_mapping\n"
        "assert HfBertConfig in Auto._model_mapping\n"
    )
