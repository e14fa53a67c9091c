"""Weights from wherever they lie: read by looking at the content, nothing executed.

    read_state_dict(path)   tensors by name, and the configuration beside them
    load(path, task)        a model
    load_weights(model, p)  into a model that is there
    task_of(weights, ...)   which head they have

A path is a file (`.safetensors`, or a pickle of torch's: the original's state dict or a full
Composer checkpoint), a folder with `config.json` (Hugging Face's layout, or one of our
checkpoints), a folder whose file `latest` names one, any of these behind a URI, or a name on the
hub. Pickles are read with torch's restricted loader; what it does not know is left out as inert
objects if it belongs to a trainer's state, and refused otherwise.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from mosaicbert.errors import CheckpointError, ConfigError, did_you_mean
from mosaicbert.models.configuration import (
    MosaicBertConfig,
    checked_keys,
    make_config,
    padded_vocab_size,
)
from mosaicbert.models.register import TASKS, Task, configuration_class, model_class
from mosaicbert.models.weights import local_copy, read_folder_or_file

logger = logging.getLogger(__name__)

HEADS = ("cls.", "classifier.", "bert.pooler.", "pooler.")
"""What belongs to a task: may be missing as a whole, and is left out for another task."""
MEANING = (
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "gated_linear_units",
    "alibi",
    "pre_norm",
    "qk_norm",
    "position_encoding",
    "rope_theta",
    "attention_window",
    "logit_softcap",
)
"""Keys that change a model but not the names and shapes of its weights, or not all of them."""


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a checkpoint under this package's names, and its configuration if it has one.

    Raises:
        CheckpointError: nothing there, damaged, not a checkpoint, or a pickle with code in it.
    """
    try:
        with local_copy(path) as local:
            weights, config = read_folder_or_file(local)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return _our_names(weights), config


def load(path: str | Path, task: Task = "mlm", **config: Any) -> nn.Module:
    """A model with the weights of a checkpoint, in evaluation mode.

    Args:
        path: see the module.
        task: which head: `mlm`, `classification`, `token-classification` or `embedding`.
        config: changes of the configuration, such as `num_labels=3` or `num_attention_heads=2`
            (a bare state dict does not tell it; heads are taken to be 64 wide).

    Raises:
        CheckpointError: it cannot be read, or its weights are not of this shape.
        ConfigError: unknown task or key.
    """
    if task not in TASKS:
        raise ConfigError(f"task {task!r}: choose one of {', '.join(TASKS)}.")
    weights, found = read_state_dict(path)
    model_type = _model_type(weights, found, path)
    config_class = configuration_class(model_type)
    values = _shape_of(weights) | _known_values(config_class, found or {})
    if "num_labels" in config:
        values.pop("id2label", None)
        values.pop("label2id", None)
    values |= checked_keys(config_class, config, "config")
    try:
        shape = make_config(config_class, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    model: nn.Module = model_class(model_type, task)(shape)
    model.config.architectures = [type(model).__name__]  # type: ignore[union-attr]
    put_weights(model, weights, str(path))
    return model.eval()


def task_of(weights: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> Task | None:
    """The head of a checkpoint: by the class that was saved, else by its weights; None for none."""
    saved = " ".join((config or {}).get("architectures") or [])
    if "classifier.weight" in weights:
        pooled = any(name.startswith("bert.pooler.") for name in weights)
        of_tokens = "ForTokenClassification" in saved or not pooled
        return "token-classification" if of_tokens else "classification"
    return "mlm" if any(name.startswith("cls.") for name in weights) else None


def load_weights(model: nn.Module, path: str | Path, *, new_head: bool = False) -> None:
    """Start `model` from a checkpoint; a head that it lacks stays as initialised, and is named.

    `new_head`: leave the checkpoint's classifier out even if it fits (another task's).

    Raises:
        CheckpointError: it cannot be read, or does not belong to a model of this shape.
    """
    weights, found = read_state_dict(path)
    config: Any = model.config
    theirs = _model_type(weights, found, path)
    if theirs != config.model_type:
        raise CheckpointError(
            f"{path} holds a model of type {theirs!r}, not {config.model_type!r}: set model.name"
            " and algorithms as they were in its training."
        )
    _check_same_meaning(config, found or {}, str(path))
    classifier = weights.get("classifier.weight")
    if classifier is not None and isinstance(getattr(model, "classifier", None), nn.Linear):
        other = classifier.shape != model.classifier.weight.shape  # type: ignore[union-attr]
        if new_head or other:
            why = "asked for" if new_head else f"the checkpoint's has {len(classifier)} outputs"
            logger.info("%s: the classifier starts anew (%s).", path, why)
            weights = {k: v for k, v in weights.items() if not k.startswith("classifier.")}
    put_weights(model, weights, str(path))


def put_weights(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy every weight into the model; only a whole head may be missing or left over.

    Raises:
        CheckpointError: lists missing and unexpected names, and shapes that differ.
    """
    own = model.state_dict()
    if not any(name.startswith("bert.") for name in own):  # a bare encoder
        weights = {name.removeprefix("bert."): tensor for name, tensor in weights.items()}
    ours, theirs = {_head(name) for name in own}, {_head(name) for name in weights}
    new, left_out = ours - theirs - {None}, theirs - ours - {None}
    given = {own[name].data_ptr() for name in weights if name in own}  # tied: one of two names
    missing = [
        name
        for name, tensor in own.items()
        if tensor.data_ptr() not in given and _head(name) not in new
    ]
    unexpected = [name for name in weights if name not in own and _head(name) not in left_out]
    rows_may_differ = _same_padded_vocabulary(own, weights)
    differing = [
        f"{name} {tuple(tensor.shape)} (the model's: {tuple(own[name].shape)})"
        for name, tensor in weights.items()
        if name in own
        and tensor.shape != own[name].shape
        and not (rows_may_differ and _is_vocabulary(name))
    ]
    differing += [
        f"{name} ({tensor.dtype})" for name, tensor in weights.items()
        if not tensor.is_floating_point()
    ]  # fmt: skip
    differing += [f"{n} (not finite)" for n, t in weights.items() if n in own and not _finite(t)]
    if missing or unexpected or differing:
        raise CheckpointError(
            f"{where} does not fit this model.{_listed('Missing', missing)}"
            f"{_listed('Unexpected', unexpected)}{_listed('Of another shape or kind', differing)}"
            " Give the model the shape it was trained with."
        )
    for head in sorted(filter(None, new)):
        logger.info("%s has no %s*: a new head, as initialised.", where, head)
    for head in sorted(filter(None, left_out)):
        logger.info("%s: %s* is left out, it belongs to another task.", where, head)
    _say_conversion(own, weights, where)
    with torch.no_grad():
        for name, tensor in weights.items():
            if name in own:
                rows = min(len(tensor), len(own[name])) if tensor.ndim else None
                own[name][:rows].copy_(tensor[:rows])


def _say_conversion(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: str) -> None:
    ours, theirs = ({str(t.dtype) for t in some.values()} for some in (own, weights))
    if ours != theirs:
        names = (" and ".join(sorted(some)) for some in (theirs, ours))
        logger.info("%s: from %s to %s.", where, *names)


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _head(name: str) -> str | None:
    return next((head for head in HEADS if name.startswith(head)), None)


def _is_vocabulary(name: str) -> bool:
    return "word_embeddings" in name or name.startswith(
        ("cls.predictions.decoder.", "cls.predictions.bias")
    )


def _same_padded_vocabulary(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
    """Whether the vocabularies differ only by the rows that pad them to a multiple of 8."""
    name = next(n for n in own if n.endswith("word_embeddings.weight"))
    if name not in weights:
        return False
    ours, theirs = len(own[name]), len(weights[name])
    same = padded_vocab_size(ours) == padded_vocab_size(theirs)
    if same and ours != theirs:
        logger.info("Vocabulary: %d rows in the checkpoint, %d in the model.", theirs, ours)
    return same


def _listed(title: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f" {title}: {', '.join(names[:20])}{more}."


# --- names and configurations ---------------------------------------------------------------------


def _our_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without wrappers' prefixes and old spellings, and without what is no weight."""
    names = dict(weights)
    for prefix in ("module.", "_orig_mod.", "model."):
        if names and all(name.startswith(prefix) for name in names):
            names = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
    if "embeddings.word_embeddings.weight" in names:  # a bare encoder
        names = {
            name if name.startswith(("cls.", "classifier.")) else f"bert.{name}": tensor
            for name, tensor in names.items()
        }
    ours = {}
    for name, tensor in names.items():
        if name.endswith(("LayerNorm.gamma", "LayerNorm.beta")):
            name = name.replace(".gamma", ".weight").replace(".beta", ".bias")
        if name.endswith((".position_ids", ".token_type_ids")):
            continue  # buffers of older transformers
        if name.startswith("cls.seq_relationship."):
            continue  # next-sentence prediction, which nothing here uses
        ours[name] = tensor
    return ours


def _model_type(
    weights: Mapping[str, Tensor], config: Mapping[str, Any] | None, path: object
) -> str:
    """`mosaic_bert`, `hf_bert` or `bert`, by the names of the weights."""
    layer = "bert.encoder.layer.0."
    if f"{layer}attention.self.Wqkv.weight" in weights:
        return "mosaic_bert"
    if f"{layer}attention.self.query.weight" not in weights:
        says = f"its config.json says {config.get('model_type')!r}, " if config else ""
        raise CheckpointError(
            f"{path} holds neither Mosaic BERT nor BERT: {says}its weights are named "
            f"{', '.join(list(weights)[:5]) or '(there are none)'} ..."
        )
    gated = f"{layer}intermediate.gated_layers.weight" in weights
    positions = "bert.embeddings.position_embeddings.weight" in weights
    changed = gated or not positions or (config or {}).get("model_type") == "hf_bert"
    return "hf_bert" if changed else "bert"


def _shape_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of the weights tell about the configuration."""
    layer = "bert.encoder.layer."
    for name in ("word", "token_type"):
        if f"bert.embeddings.{name}_embeddings.weight" not in weights:
            raise CheckpointError(
                f"The checkpoint has no bert.embeddings.{name}_embeddings.weight."
            )
    words = weights["bert.embeddings.word_embeddings.weight"]
    wide = weights.get(f"{layer}0.mlp.wo.weight", weights.get(f"{layer}0.output.dense.weight"))
    shape: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": words.shape[1],
        "num_hidden_layers": len({n.split(".")[3] for n in weights if n.startswith(layer)}),
        "num_attention_heads": max(1, words.shape[1] // 64),
        "type_vocab_size": len(weights["bert.embeddings.token_type_embeddings.weight"]),
    }
    if wide is not None:
        shape["intermediate_size"] = wide.shape[1]
    positions = weights.get("bert.embeddings.position_embeddings.weight")
    if positions is not None:
        shape["max_position_embeddings"] = len(positions)
    if f"{layer}0.attention.self.query.weight" in weights:
        shape["gated_linear_units"] = f"{layer}0.intermediate.gated_layers.weight" in weights
        shape["alibi"] = positions is None
        if not (shape["gated_linear_units"] or shape["alibi"]):
            del shape["gated_linear_units"], shape["alibi"]
    if "bert.encoder.final_norm.weight" in weights:
        shape["pre_norm"] = True
    if "classifier.bias" in weights:
        shape["num_labels"] = len(weights["classifier.bias"])
    return shape


def _known_values(config_class: type, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of a checkpoint's `config.json`, what this class of configuration knows."""
    drop = {"model_type", "architectures", "auto_map", "transformers_version", "torch_dtype"}
    if config_class is not MosaicBertConfig or found.get("model_type") == "mosaic_bert":
        _warn_of_unknown(config_class, found)
        return {key: value for key, value in found.items() if key not in drop}
    # the original's hub layout calls itself "bert" and carries BERT's keys
    known = {*MosaicBertConfig().to_dict(), "id2label", "label2id", "problem_type"} - drop
    return {key: value for key, value in found.items() if key in known}


def _warn_of_unknown(config_class: type, found: Mapping[str, Any]) -> None:
    """Name the keys that no configuration of transformers has by itself, nor ours."""
    known = {*config_class().to_dict(), *PretrainedConfig().to_dict(), "auto_map", "torch_dtype"}
    known |= {field.name for field in dataclasses.fields(config_class)}
    for key in found.keys() - known:
        if not key.startswith("_") and key != "position_embedding_type":
            near = did_you_mean(key, known)
            logger.warning("config.json: %r is no key of %s.%s", key, config_class.__name__, near)


def _check_same_meaning(config: Any, found: Mapping[str, Any], where: str) -> None:
    for key in MEANING:
        ours, theirs = getattr(config, key, None), found.get(key)
        if key in found and hasattr(config, key) and ours != theirs:
            raise CheckpointError(
                f"{where} was trained with {key}: {theirs!r}, this model has {ours!r}. "
                "Make them the same in model.model_config or algorithms."
            )
