"""Which class is which model, and how transformers' Auto classes learn of them.

Light to import: transformers and torch come in only when somebody needs them.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Literal, get_args

Task = Literal["mlm", "classification", "token-classification", "embedding"]
TASKS: tuple[Task, ...] = get_args(Task)

_AUTO = {
    "mlm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "embedding": "AutoModel",
}
_CONFIGS = {
    "mosaic_bert": "configuration.MosaicBertConfig",
    "hf_bert": "configuration.HfBertConfig",
}
_MODELS = {
    "mosaic_bert": {
        "mlm": "mosaic_bert.MosaicBertForMaskedLM",
        "classification": "mosaic_bert.MosaicBertForSequenceClassification",
        "token-classification": "mosaic_bert.MosaicBertForTokenClassification",
        "embedding": "mosaic_bert.MosaicBertModel",
    },
    "hf_bert": {
        "mlm": "hf_bert.HfBertForMaskedLM",
        "classification": "hf_bert.HfBertForSequenceClassification",
        "token-classification": "hf_bert.HfBertForTokenClassification",
        "embedding": "hf_bert.HfBertModel",
    },
    "bert": {
        "mlm": "hf_bert.BertForMaskedLM",
        "classification": "hf_bert.BertForSequenceClassification",
        "token-classification": "hf_bert.BertForTokenClassification",
        "embedding": "hf_bert.BertModel",
    },
}
_CONFIGURATION_AUTO = "transformers.models.auto.configuration_auto"
_MODELING_AUTO = "transformers.models.auto.modeling_auto"


def model_class(model_type: str, task: Task) -> Any:
    """The class for a configuration's `model_type` (`mosaic_bert`, `hf_bert`, `bert`)."""
    return _load(_MODELS[model_type][task])


def configuration_class(model_type: str) -> Any:
    """The configuration of a `model_type`; BERT's own takes seconds to import."""
    if model_type == "bert":
        from transformers import BertConfig

        return BertConfig
    return _load(_CONFIGS[model_type])


def install() -> None:
    """Have transformers' Auto classes know ours: now, or when somebody imports them."""
    for name, register in ((_CONFIGURATION_AUTO, _register_configs), (_MODELING_AUTO, _register)):
        module = sys.modules.get(name)
        waiting = [f for f in sys.meta_path if isinstance(f, _Finder) and f.name == name]
        if module is None:
            if not waiting:
                sys.meta_path.insert(0, _Finder(name, register))
        elif not module.__spec__._initializing:  # type: ignore[union-attr]
            register()
            for finder in waiting:
                sys.meta_path.remove(finder)


def _load(path: str) -> Any:
    """`module.Class` of this package."""
    module, name = path.split(".")
    return getattr(importlib.import_module(f"mosaicbert.models.{module}"), name)


def _load_if_ready(path: str) -> Any:
    """The same; None while that module, or what it needs of transformers, is being imported.

    An error here would undo the import of transformers' own module that it happens in.
    """
    try:
        return _load(path)
    except (ImportError, AttributeError):
        return None


def _register_configs() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    for model_type, path in _CONFIGS.items():
        if (config := _load_if_ready(path)) is not None:
            AutoConfig.register(model_type, config, exist_ok=True)


def _register() -> None:
    from transformers.models.auto import modeling_auto

    _register_configs()
    for model_type, path in _CONFIGS.items():
        for task, model_path in _MODELS[model_type].items():
            config, model = _load_if_ready(path), _load_if_ready(model_path)
            if config is not None and model is not None:
                getattr(modeling_auto, _AUTO[task]).register(config, model, exist_ok=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Calls `then` once the module `name` has been imported."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Let the others find it, and put `then` behind its execution."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.then()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
