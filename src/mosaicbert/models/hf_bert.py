"""Hugging Face's BERT as the baseline: their modules, our summed loss.

The forward pass is theirs, on padded batches: absolute positions, scaled_dot_product_attention, the
MLM head on every position. Saved, it is a plain BERT that `transformers` loads without us.

`algorithms` really change it: `gated_linear_units` makes the feed-forward layers gated (Shazeer
2020), `alibi` takes the position embeddings out and biases attention instead (Press et al. 2022).
Such a model is no plain BERT, so its configuration says so in `model_type`.
"""
# mypy: disable-error-code="no-any-return"

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert import modeling_bert as hf

from mosaicbert.batch import Batch, LossOutput
from mosaicbert.errors import ConfigError
from mosaicbert.models import register
from mosaicbert.models.attention import alibi_bias, alibi_slopes
from mosaicbert.models.configuration import HfBertConfig
from mosaicbert.models.heads import (
    CheckedModel,
    check_ids,
    classification_loss_sum,
    cross_entropy_sum,
    linear_parameters,
    problem_type,
    training_flops,
)


class GatedIntermediate(nn.Module):
    """Stands in for BERT's intermediate layer: GELU of the first half times the second."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.gated_layers = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, hidden)` -> `(batch, seq, intermediate)`."""
        gate, up = self.gated_layers(x).chunk(2, dim=-1)
        return F.gelu(gate) * up


class NoPositions(nn.Module):
    """Stands in for the position embeddings: adds nothing."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """`(batch, seq)` -> zeros that broadcast over the hidden size.

        They are whole numbers, so that the sum keeps the dtype of the embeddings.
        """
        return torch.zeros_like(position_ids).unsqueeze(-1)


def _before_encoder(bert: hf.BertModel, args: Any, kwargs: dict[str, Any]) -> Any:
    """Check ids and length; with ALiBi, turn the mask `(batch, seq)` into a bias of each head."""
    input_ids = args[0] if args else kwargs.get("input_ids")
    if input_ids is None:
        return args, kwargs  # inputs_embeds, or transformers' own error
    config = bert.config
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        check_ids(input_ids, config.vocab_size)
    if getattr(config, "alibi", False):
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        slopes = alibi_slopes(config.num_attention_heads, input_ids.device)
        dtype = bert.embeddings.word_embeddings.weight.dtype
        kwargs["attention_mask"] = alibi_bias(slopes, mask != 0, dtype)
        # their defaults are cut from buffers as long as the position table
        kwargs["position_ids"] = torch.zeros_like(input_ids)
        if kwargs.get("token_type_ids") is None:
            kwargs["token_type_ids"] = torch.zeros_like(input_ids)
    elif input_ids.shape[1] > config.max_position_embeddings:
        raise ConfigError(
            f"A sequence of {input_ids.shape[1]} tokens is longer than the position table of "
            f"this BERT, {config.max_position_embeddings}. Use shorter sequences, train with a "
            "larger model.model_config.max_position_embeddings, or use mosaic_bert."
        )
    return args, kwargs


class _Trainable(CheckedModel, hf.BertPreTrainedModel):  # type: ignore[misc]
    """What the models share; their forward is Hugging Face's."""

    mlm_share = 0.15
    """Share of the tokens whose prediction counts as useful work, for `flops_per_token`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        bert = self.base_model
        if getattr(config, "gated_linear_units", False):
            for layer in bert.encoder.layer:
                layer.intermediate = GatedIntermediate(config)
                layer.intermediate.apply(self._init_weights)
        if getattr(config, "alibi", False):
            bert.embeddings.position_embeddings = NoPositions()
        bert.register_forward_pre_hook(_before_encoder, with_kwargs=True)

    def _logits(self, batch: Batch) -> Tensor:
        return self(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            token_type_ids=batch.token_type_ids,
        ).logits

    def flops_per_token(self, seq_len: float) -> float:
        """FLOPs of forward + backward for one real token; see `heads.training_flops`.

        The MLM head counts for `mlm_share` of the tokens, as in Mosaic BERT, although this model
        runs it on all: work that nobody needs is no use of the machine.
        """
        config = self.config
        linear: float = linear_parameters(self.base_model.encoder)
        head = getattr(self, "cls", None)
        if head is not None:
            linear += self.mlm_share * linear_parameters(head)
        return training_flops(linear, config.hidden_size * config.num_hidden_layers, seq_len)


class BertModel(_Trainable, hf.BertModel):  # type: ignore[misc]
    """Hugging Face's, with our checks; gives hidden states."""


class BertForMaskedLM(_Trainable, hf.BertForMaskedLM):  # type: ignore[misc]
    """Hugging Face's, trainable on padded batches."""

    def loss(self, batch: Batch, return_logits: bool = False) -> LossOutput:
        """Summed cross-entropy of a padded batch's targets."""
        assert batch.target_positions is not None
        logits = self._logits(batch).flatten(0, 1)[batch.target_positions]
        loss_sum = cross_entropy_sum(logits, batch.labels)
        return LossOutput(loss_sum, logits if return_logits else None)


class BertForSequenceClassification(_Trainable, hf.BertForSequenceClassification):  # type: ignore[misc]
    """Hugging Face's, trainable on padded batches."""

    class_weights: Tensor | None = None
    """`(num_labels,)` float32: weighs each class in `loss` while training."""

    def loss(self, batch: Batch, return_logits: bool = False) -> LossOutput:
        """Summed loss of a padded batch's sequences."""
        logits = self._logits(batch)
        kind = problem_type(self.config.problem_type, self.config.num_labels)
        weights = self.class_weights if self.training else None
        loss_sum = classification_loss_sum(logits, batch.labels, kind, weights)
        return LossOutput(loss_sum, logits if return_logits else None)


class BertForTokenClassification(_Trainable, hf.BertForTokenClassification):  # type: ignore[misc]
    """Hugging Face's, trainable on padded batches."""

    def loss(self, batch: Batch, return_logits: bool = False) -> LossOutput:
        """Summed cross-entropy of a padded batch's labelled tokens."""
        logits = self._logits(batch)
        loss_sum = cross_entropy_sum(logits, batch.labels)
        return LossOutput(loss_sum, logits if return_logits else None)


class HfBertModel(BertModel):
    """With gated layers or ALiBi."""

    config_class = HfBertConfig


class HfBertForMaskedLM(BertForMaskedLM):
    """With gated layers or ALiBi."""

    config_class = HfBertConfig


class HfBertForSequenceClassification(BertForSequenceClassification):
    """With gated layers or ALiBi."""

    config_class = HfBertConfig


class HfBertForTokenClassification(BertForTokenClassification):
    """With gated layers or ALiBi."""

    config_class = HfBertConfig


register.install()  # where this import brought the Auto classes in, they found it unfinished
