"""Pre-training and fine-tuning of BERT encoders, fast and strict.

`load` reads any checkpoint. The jobs are `pretrain`, `classify` and `glue`: each takes the path of
a YAML file (or a mapping of its content) and overrides (`["max_duration=10ba"]`), and gives out its
result. Importing this package teaches Hugging Face's Auto classes the models, without importing
transformers or torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mosaicbert.models.register import install

if TYPE_CHECKING:
    from mosaicbert.finetuning import classify
    from mosaicbert.glue_suite.jobs import glue
    from mosaicbert.models.checkpoints import load
    from mosaicbert.pretraining import pretrain

install()

__all__ = ["classify", "glue", "load", "pretrain"]

HOMES = {
    "classify": "mosaicbert.finetuning",
    "glue": "mosaicbert.glue_suite.jobs",
    "load": "mosaicbert.models.checkpoints",
    "pretrain": "mosaicbert.pretraining",
}


def __getattr__(name: str) -> Any:
    """Import a function when it is first asked for: the command line must start at once."""
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module 'mosaicbert' has no attribute {name!r}")
