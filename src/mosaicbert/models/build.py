"""A model from the `model` section of a YAML; and its compilation."""

import difflib
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

from mosaicbert.config.sections import AlgorithmsConfig, ModelConfig
from mosaicbert.errors import ConfigError
from mosaicbert.models import kernels
from mosaicbert.models.attention import KERNEL_HEAD_DIMS
from mosaicbert.models.checkpoints import load, load_weights
from mosaicbert.models.configuration import (
    MODERN,
    MosaicBertConfig,
    checked_keys,
    make_config,
    padded_vocab_size,
)
from mosaicbert.models.mosaic_bert import MosaicBertForMaskedLM, MosaicBertPreTrainedModel
from mosaicbert.models.register import Task, configuration_class, install, model_class

logger = logging.getLogger(__name__)

BASE: dict[str, Any] = {}
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}


def _miniature(layers: int, width: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
    }


SHAPES = {
    "bert-base-uncased": BASE,
    "bert-base-cased": BASE,
    "bert-large-uncased": LARGE,
    "bert-large-cased": LARGE,
    "prajjwal1/bert-tiny": _miniature(2, 128),
    "prajjwal1/bert-mini": _miniature(4, 256),
    "prajjwal1/bert-small": _miniature(4, 512),
    "prajjwal1/bert-medium": _miniature(8, 512),
    "mosaicml/mosaic-bert-base": BASE,
}
"""Shapes known without a hub, as changes of BERT base."""

_NOT_IN_FP8 = ("qk_norm", "value_skips", "unet_skips")
_GRAPH_LIMIT = 64
"""Shapes of microbatches that one layer may be compiled for."""


def build_model(
    settings: ModelConfig,
    task: Task,
    *,
    num_labels: int | None = None,
    problem_type: str | None = None,
    algorithms: AlgorithmsConfig | None = None,
    max_seq_len: int,
    vocab_size: int,
) -> nn.Module:
    """The model that a YAML's `model` and `algorithms` describe, on the CPU, in training mode.

    Args:
        task: which head.
        num_labels: outputs of a classifier; 1 is a regression unless `problem_type` differs.
        problem_type: `single_label_classification`, `multi_label_classification`, `regression`.
        max_seq_len: longest sequence it will see.
        vocab_size: tokens of the tokenizer.

    Raises:
        ConfigError: an unknown name or key, or sizes that cannot be.
        CheckpointError: the weights to start from cannot be read or do not fit.
    """
    config_class, changes = _class_and_changes(settings, algorithms)
    given = {"num_labels": num_labels, "problem_type": problem_type}
    labels = {key: value for key, value in given.items() if value is not None}
    if settings.use_pretrained:
        model = _pretrained(settings, task, config_class, changes | labels)
    else:
        shape = {"vocab_size": vocab_size, "num_labels": 2} | _known_shape(settings) | changes
        values = make_config(config_class, shape | labels)
        model = model_class(values.model_type, task)(values)
    config: Any = model.config
    config.architectures = [type(model).__name__]
    _check_lengths(config, max_seq_len, vocab_size)
    if settings.pretrained_checkpoint:
        load_weights(model, settings.pretrained_checkpoint)
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model


def _pretrained(
    settings: ModelConfig, task: Task, config_class: Any, changes: dict[str, Any]
) -> nn.Module:
    name = settings.pretrained_model_name
    name = f"google-bert/{name}" if name in SHAPES and "/" not in name else name
    model = load(name, task, **changes).train()
    found = model.config.model_type  # type: ignore[union-attr]
    if found != config_class.model_type:
        raise ConfigError(
            f"model.use_pretrained: the weights of {name} are a {found!r}, which model.name "
            f"{settings.name!r} with these algorithms cannot take. Set use_pretrained: false for "
            "its shape alone."
        )
    return model


def _class_and_changes(
    settings: ModelConfig, algorithms: AlgorithmsConfig | None
) -> tuple[Any, dict[str, Any]]:
    """Which configuration, and what the YAML changes in it."""
    _say_built_in(settings, algorithms)
    if settings.name != "hf_bert":
        changes = checked_keys(MosaicBertConfig, settings.overrides, "model.model_config")
        return MosaicBertConfig, (MODERN if settings.name == "mosaic_bert_v2" else {}) | changes
    used = {
        name: True
        for name in ("gated_linear_units", "alibi")
        if algorithms is not None and getattr(algorithms, name) is not None
    }
    found = configuration_class("hf_bert" if used else "bert")
    return found, checked_keys(found, settings.overrides, "model.model_config") | used


def _say_built_in(settings: ModelConfig, algorithms: AlgorithmsConfig | None) -> None:
    built_in = ["fused_layernorm", "low_precision_layernorm"]
    if settings.name != "hf_bert":
        built_in += ["gated_linear_units", "alibi"]
    found = [name for name in built_in if getattr(algorithms, name, None) is not None]
    if found:
        logger.info("algorithms: %s: built into %s.", ", ".join(found), settings.name)


def _known_shape(settings: ModelConfig) -> dict[str, Any]:
    """The shape that `pretrained_model_name` names: known, a folder's, or the hub's."""
    name = settings.pretrained_model_name
    short = name.removeprefix("google-bert/")
    if short in SHAPES:
        return SHAPES[short]
    near = difflib.get_close_matches(short, SHAPES, n=1, cutoff=0.9)
    if near and abs(len(near[0]) - len(short)) <= 1 and not Path(name).exists():
        raise ConfigError(  # a slip; the hub would be asked for half a minute
            f'model.pretrained_model_name: {name!r} is not known. Did you mean "{near[0]}"?'
        )
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(
            name, local_files_only=Path(name).exists(), trust_remote_code=False
        )
    except Exception as error:  # transformers and the hub's client raise every kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"model.pretrained_model_name: the shape of {name!r} is not known here, and it is no "
            f"folder with a config.json and not on the hub or in its cache ({reason}). Names that "
            f"need no hub: {', '.join(SHAPES)}."
        ) from error
    if found.model_type not in ("bert", "hf_bert", "mosaic_bert"):
        raise ConfigError(
            f"model.pretrained_model_name: {name!r} is a {found.model_type!r}, not a BERT."
        )
    keys = MosaicBertConfig().to_diff_dict().keys() | MosaicBertConfig().to_dict().keys()
    drop = {"model_type", "architectures", "vocab_size", "transformers_version", "dtype"}
    keys = (keys - drop) & found.to_dict().keys()
    if settings.name != "hf_bert":  # BERT's attention dropout is not Mosaic BERT's
        keys.discard("attention_probs_dropout_prob")
    return {key: getattr(found, key) for key in sorted(keys)}


def _check_lengths(config: Any, max_seq_len: int, vocab_size: int) -> None:
    rows = padded_vocab_size(config.vocab_size)
    if rows < vocab_size:
        raise ConfigError(
            f"The tokenizer has {vocab_size} tokens, the model {config.vocab_size}: they do not "
            "belong together. Leave model.model_config.vocab_size out, or change tokenizer_name."
        )
    if isinstance(config, MosaicBertConfig):
        config.alibi_starting_size = max(config.alibi_starting_size, max_seq_len)
    elif max_seq_len > config.max_position_embeddings and not getattr(config, "alibi", False):
        raise ConfigError(
            f"max_seq_len is {max_seq_len}, but hf_bert has {config.max_position_embeddings} "
            "positions. Set model.model_config.max_position_embeddings, use algorithms.alibi, or "
            "use mosaic_bert, which knows no limit."
        )


def enable_gradient_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass."""
    # transformers renamed it, and the old name warns
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable()


def use_fp8(model: nn.Module, device: torch.device) -> None:
    """Train a Mosaic BERT's layers with matrix products in fp8, in place; see `models/fp8.py`.

    Raises:
        ConfigError: the model or the device cannot.
    """
    config: Any = model.config
    why = None
    if not isinstance(model, MosaicBertPreTrainedModel):
        why = "hf_bert knows no fp8; mosaic_bert does"
    elif kernels.why_not(device) is not None:
        why = f"it needs the Triton kernels: {kernels.why_not(device)}"
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        why = f"{torch.cuda.get_device_name(device)} is older than compute capability 8.9"
    elif config.hidden_size % 16 or config.intermediate_size % 16:
        why = "hidden_size and intermediate_size must be multiples of 16"
    elif config.head_dim not in KERNEL_HEAD_DIMS or config.attention_probs_dropout_prob > 0:
        why = "it needs heads of 32, 64 or 128, without attention dropout"
    else:
        asked = [name for name in _NOT_IN_FP8 if getattr(config, name)]
        asked += ["feed_forward: relu2"] if config.feed_forward != "geglu" else []
        asked += ["position_encoding: rope"] if config.position_encoding == "rope" else []
        backend = os.environ.get("MOSAICBERT_ATTENTION") or config.attention_backend
        asked += [f"attention backend {backend}"] if backend not in (None, "triton") else []
        why = f"it does not go with {', '.join(asked)}" if asked else None
    if why is not None:
        raise ConfigError(f"precision: fp8 cannot be used here: {why}. Use amp_bf16.")
    encoder: Any = model.base_model
    encoder.encoder.fp8 = True


def is_packed(model: nn.Module) -> bool:
    """Whether the model trains on packed batches (Mosaic BERT) or padded ones (HF BERT)."""
    return isinstance(model, MosaicBertPreTrainedModel)


def compile_model(model: nn.Module) -> None:
    """Compile in place; in evaluation the model runs as it is written.

    Mosaic BERT: layer by layer. All layers have the same code, so that one graph for batches of
    every size serves them all and compilation takes seconds; what lies between layers is fused
    into none of them anyway. Evaluation has the same kernels, and graphs of its own would cost
    more seconds than they save. HF BERT: the whole forward pass, for batches of few shapes.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPH_LIMIT)
    # As symbols, like sizes, floats (a norm's eps) have each graph traced twice: they never change.
    torch._dynamo.config.specialize_float = True
    _cache_whole_graphs()
    _cache_kernels_beside_graphs()
    trained: Any = model
    if not isinstance(model, MosaicBertPreTrainedModel):
        trained._compiled_call_impl = _compiled(model._call_impl, model, dynamic=False)
        return
    encoder: Any = model.base_model
    parts = [encoder.embeddings, *encoder.encoder.layer]
    if _asks_for_sdpa(model.config):  # loops over groups of sequences, which inductor refuses
        logger.info("The layers are not compiled: their attention runs as 'sdpa'.")
        parts = [encoder.embeddings]
    for part in parts:
        part._compiled_call_impl = _compiled(part._call_impl, model, dynamic=True, fullgraph=True)
    if isinstance(model, MosaicBertForMaskedLM):
        head: Any = model.cls.predictions
        head.loss = _compiled(head.loss, model, dynamic=True, fullgraph=True)


def _cache_whole_graphs() -> None:
    """Let torch keep what it makes of our graphs between processes, not its last step alone.

    It leaves out graphs with autocast or an autograd.Function in them, though both are whole in
    what it hashes: autocast with its arguments, a Function as two graphs. What a cached graph
    cannot tell is our own code beside it, so that is hashed here.
    """
    from torch._functorch import config
    from torch._functorch.autograd_function import autograd_function_apply

    config.autograd_cache_allow_custom_autograd_functions = True
    autograd_function_apply._cacheable = True
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    safe = [f"torch.amp.autocast_mode.{name}" for name in ("_enter_autocast", "_exit_autocast")]
    known = torch._inductor.config.unsafe_marked_cacheable_functions
    torch._inductor.config.unsafe_marked_cacheable_functions = known | dict.fromkeys(safe, code)


def _cache_kernels_beside_graphs() -> None:
    """Have our kernels kept where inductor keeps its own, in the first process and in later ones.

    Inductor moves Triton's cache there when it compiles. A process that finds its graphs compiled
    does not, and would look for our kernels, which a process before it left there, elsewhere.
    """
    if torch.cuda.is_available():
        folder = triton_cache_dir(torch.cuda.current_device())
        os.environ.setdefault("TRITON_CACHE_DIR", folder)


def _asks_for_sdpa(config: Any) -> bool:
    asked = os.environ.get("MOSAICBERT_ATTENTION") or config.attention_backend
    return asked == "sdpa" or (not asked and config.attention_probs_dropout_prob > 0)


def _compiled(function: Callable[..., Any], model: nn.Module, **options: Any) -> Callable[..., Any]:
    """`function`, compiled for when `model` is in training mode."""
    compiled = torch.compile(function, **options)

    def call(*args: Any, **kwargs: Any) -> Any:
        return (compiled if model.training else function)(*args, **kwargs)

    return call


install()  # where this import brought the Auto classes in, they found HF BERT unfinished
