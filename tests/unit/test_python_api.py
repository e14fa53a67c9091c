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
