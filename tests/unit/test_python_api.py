"""The functions that `from mosaicbert import ...` gives."""

import inspect
import subprocess
import sys

import pytest

import mosaicbert


@pytest.mark.parametrize("name", mosaicbert.__all__)
def test_each_name_is_a_function_even_after_its_modules_are_imported(name):
    import mosaicbert.finetuning
    import mosaicbert.glue_suite.jobs
    import mosaicbert.pretraining

    assert inspect.isfunction(getattr(mosaicbert, name))


def test_unknown_names_are_an_error():
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        _ = mosaicbert.pretrian


def test_importing_the_package_imports_no_torch():
    code = (
        "import mosaicbert, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_training_mosaic_bert_imports_no_class_of_other_models():
    """The Auto classes bring in the code of generation and more: seconds of each start."""
    code = (
        "import sys, mosaicbert.pretraining\n"
        "from mosaicbert.config import ModelConfig\n"
        "from mosaicbert.data.tokenizers import load_tokenizer\n"
        "from mosaicbert.models.build import build_model\n"
        "size = len(load_tokenizer('bert-base-uncased'))\n"
        "tiny = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)\n"
        "model = ModelConfig(name='mosaic_bert', model_config=tiny)\n"
        "build_model(model, 'mlm', max_seq_len=8, vocab_size=size)\n"
        "names = 'modeling_auto', 'tokenization_auto', 'trainer_utils', 'generation.utils'\n"
        "sys.exit(', '.join(m for m in sys.modules if m.endswith(names)) or 0)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert found.returncode == 0, found.stderr.decode()
