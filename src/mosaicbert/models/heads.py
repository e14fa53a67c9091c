"""Checks, losses and FLOP counts that Mosaic BERT and HF BERT share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaicbert.batch import IGNORE_INDEX
from mosaicbert.errors import ConfigError

PROBLEM_TYPES = (
    "regression",
    "single_label_classification",
    "multi_label_classification",
)


def problem_type(config_value: str | None, num_labels: int) -> str:
    """What a classification head predicts; by Hugging Face's rule where the config is silent."""
    if config_value is None:
        return "regression" if num_labels == 1 else "single_label_classification"
    if config_value not in PROBLEM_TYPES:
        raise ConfigError(f"problem_type {config_value!r}: choose one of {PROBLEM_TYPES}.")
    return config_value


def check_ids(input_ids: Tensor, vocab_size: int, name: str = "input_ids") -> None:
    """Raise ConfigError where an embedding would answer with a device-side assert."""
    if input_ids.is_floating_point():
        raise ConfigError(f"{name} are {input_ids.dtype}: they must be whole numbers.")
    low, high = (int(x) for x in input_ids.aminmax()) if input_ids.numel() else (0, 0)
    if low < 0 or high >= vocab_size:
        why = ": the tokenizer does not belong to this model" if name == "input_ids" else ""
        raise ConfigError(
            f"{name} reach from {low} to {high}, but the model knows 0 to {vocab_size - 1}{why}."
        )


class CheckedModel:
    """Mixed into a model: this package's errors where torch would give its own, or kill the GPU."""

    config: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass."""
        if not torch.compiler.is_compiling():
            input_ids = args[0] if args else kwargs.get("input_ids")
            token_type_ids = args[2] if len(args) > 2 else kwargs.get("token_type_ids")
            self._check(input_ids, token_type_ids, kwargs.get("labels"))
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        except RuntimeError as error:
            parameters = self.parameters()  # type: ignore[attr-defined]
            dtypes = sorted({str(p.dtype) for p in parameters})
            if len(dtypes) == 1 or "dtype" not in str(error):
                raise
            raise ConfigError(
                f"The model's weights are of mixed dtypes, {' and '.join(dtypes)}: give all of them"
                f" one with model.to(dtype), or use torch.autocast ({error})."
            ) from error

    def _check(
        self, input_ids: Tensor | None, token_type_ids: Tensor | None, labels: Tensor | None
    ) -> None:
        if input_ids is not None and (input_ids.ndim != 2 or len(input_ids) == 0):
            raise ConfigError(
                f"input_ids has shape {tuple(input_ids.shape)}: it must be (batch, seq), with at "
                "least one row."
            )
        if token_type_ids is not None and token_type_ids.device.type == "cpu":  # else it would wait
            check_ids(token_type_ids, self.config.type_vocab_size, "token_type_ids")
        if labels is None:
            return
        pooled = hasattr(self, "classifier") and (
            getattr(self.base_model, "pooler", None) is not None  # type: ignore[attr-defined]
        )
        if not pooled and input_ids is not None and labels.shape != input_ids.shape:
            raise ConfigError(
                f"labels have shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}: "
                "there must be one for each token."
            )
        classes = self.config.num_labels if hasattr(self, "classifier") else self.config.vocab_size
        kind = getattr(self, "kind", None) or self.config.problem_type
        if kind is None and classes > 1 and not labels.is_floating_point():
            kind = "single_label_classification"  # Hugging Face's rule
        if not pooled or kind == "single_label_classification":
            check_ids(labels.masked_fill(labels == IGNORE_INDEX, 0), classes, "labels")


def cross_entropy_sum(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy in float32, summed over the rows whose label is not `IGNORE_INDEX`.

    Shapes: `logits (..., classes)`, `labels (...)` int64, `weights (classes,)` float32; gives a
    scalar. Each row counts as much as its label's weight.
    """
    return F.cross_entropy(
        logits.flatten(0, -2).float(),
        labels.flatten(),
        None if weights is None else weights.to(logits.device),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )


def classification_loss_sum(
    logits: Tensor, labels: Tensor, kind: str, weights: Tensor | None = None
) -> Tensor:
    """Loss of a sequence-classification head, summed over its labels; a scalar, float32.

    `logits (batch, num_labels)`. `regression`: squared error against float labels `(batch,)` or
    `(batch, num_labels)`. `single_label_classification`: cross-entropy against int64 labels
    `(batch,)`, each class weighed by `weights (num_labels,)`. `multi_label_classification`: binary
    cross-entropy against float labels `(batch, num_labels)`. NaN is ignored. Divided by the number
    of labels, each is Hugging Face's loss.
    """
    if kind == "single_label_classification":
        return cross_entropy_sum(logits, labels, weights)
    labels = labels.float().view(logits.shape)
    real = ~labels.isnan()
    labels, logits = labels.masked_fill(~real, 0.0), logits.float()
    if kind == "regression":
        losses = F.mse_loss(logits, labels, reduction="none")
    else:
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return torch.where(real, losses, 0.0).sum()


def mean_loss(loss_sum: Tensor, labels: Tensor) -> Tensor:
    """`loss_sum` over the number of labels that count; 0 where none does."""
    real = ~labels.isnan() if labels.is_floating_point() else labels != IGNORE_INDEX
    return loss_sum / real.sum().clamp(min=1)


def linear_parameters(module: nn.Module) -> int:
    """Numbers in the module's matrices; embeddings do not belong in it."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def training_flops(linear_parameters: float, attention_width: float, seq_len: float) -> float:
    """FLOPs of forward + backward for one token.

    Each weight of a linear layer takes part in one multiply-add forward and two backward:
    6 FLOPs. Scores and weighted sum take `2 * 2 * seq_len * width` forward, thrice that in all;
    `attention_width` is hidden size times layers. Nothing else is counted, and recomputation never
    is (the convention of model FLOPs utilisation: Chowdhery et al. 2022, appendix B).
    """
    return 6.0 * linear_parameters + 12.0 * attention_width * seq_len
