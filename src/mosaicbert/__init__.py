"""Pre-training and fine-tuning of BERT encoders, fast and strict.

`load` reads any checkpoint. The jobs: `pretrain.pretrain`, `classify.classify`, `glue.jobs.glue`.
Importing this package teaches Hugging Face's Auto classes the models, without importing
transformers.
"""

from typing import TYPE_CHECKING, Any

from mosaicbert.models.register import install

if TYPE_CHECKING:
    from mosaicbert.models.checkpoints import load

install()

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import `load` when it is first asked for: the command line must start at once."""
    if name == "load":
        from mosaicbert.models.checkpoints import load

        return load
    raise AttributeError(f"module 'mosaicbert' has no attribute {name!r}")
