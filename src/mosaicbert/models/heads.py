"""Checks, losses and FLOP counts that Mosaic BERT and HF BERT share."""

import torch
import torch.nn.functional as F
from torch import Tensor

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


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raise ConfigError where an embedding would answer with a device-side assert."""
    if input_ids.is_floating_point():
        raise ConfigError(f"input_ids are {input_ids.dtype}: they must be whole numbers.")
    low, high = (int(x) for x in input_ids.aminmax()) if input_ids.numel() else (0, 0)
    if low < 0 or high >= vocab_size:
        raise ConfigError(
            f"input_ids reach from {low} to {high}, but the model knows 0 to {vocab_size - 1}: "
            "the tokenizer does not belong to this model."
        )


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in float32, summed over the rows whose label is not `IGNORE_INDEX`.

    Shapes: `logits (..., classes)`, `labels (...)` int64; gives a scalar.
    """
    return F.cross_entropy(
        logits.flatten(0, -2).float(),
        labels.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )


def classification_loss_sum(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """Loss of a sequence-classification head, summed over its rows; a scalar, float32.

    `logits (batch, num_labels)`. `regression`: squared error against float labels `(batch,)` or
    `(batch, num_labels)`, averaged over outputs, NaN rows ignored. `single_label_classification`:
    cross-entropy against int64 labels `(batch,)`. `multi_label_classification`: binary
    cross-entropy against float labels `(batch, num_labels)`, averaged over the labels, NaN rows
    ignored. Divided by the number of rows, each is Hugging Face's loss.
    """
    if kind == "single_label_classification":
        return cross_entropy_sum(logits, labels)
    labels = labels.float().view(logits.shape)
    real = ~labels.isnan()
    labels, logits = labels.masked_fill(~real, 0.0), logits.float()
    if kind == "regression":
        losses = F.mse_loss(logits, labels, reduction="none")
    else:
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return torch.where(real, losses, 0.0).mean(dim=-1).sum()


def mean_loss(loss_sum: Tensor, labels: Tensor) -> Tensor:
    """`loss_sum` over the number of rows that count; 0 where none does."""
    if labels.is_floating_point():
        real = ~labels.isnan()
        rows = real if real.ndim == 1 else real.any(dim=-1)
    else:
        rows = labels != IGNORE_INDEX
    return loss_sum / rows.sum().clamp(min=1)


def training_flops(linear_parameters: float, attention_width: float, seq_len: float) -> float:
    """FLOPs of forward + backward for one token.

    Each weight of a linear layer takes part in one multiply-add forward and two backward:
    6 FLOPs. Scores and weighted sum take `2 * 2 * seq_len * width` forward, thrice that in all;
    `attention_width` is hidden size times layers. Nothing else is counted, and recomputation never
    is (the convention of model FLOPs utilisation: Chowdhery et al. 2022, appendix B).
    """
    return 6.0 * linear_parameters + 12.0 * attention_width * seq_len
