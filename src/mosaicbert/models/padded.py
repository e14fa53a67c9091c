"""The models in padded form with no data-dependent shape, for exporters."""

from typing import Any

import torch
from torch import Tensor, nn

from mosaicbert.models.attention import AttentionPlan, alibi_bias, alibi_slopes
from mosaicbert.models.mosaic_bert import MosaicBertPreTrainedModel
from mosaicbert.models.rotary import rotary_table


class PaddedModel(nn.Module):
    """`(batch, seq)` in; a tuple of tensors out, named in `output_names`.

    Padding is computed like everything else and masked in the attention; what comes out at padded
    places means nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.has_logits = hasattr(model, "classifier") or hasattr(model, "cls")
        self.output_names = (
            ("logits",) if self.has_logits else ("last_hidden_state", "sentence_embedding")
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits, or hidden states and their mean over the real tokens."""
        model = self.model
        if not isinstance(model, MosaicBertPreTrainedModel):
            first = model(input_ids, attention_mask, token_type_ids)[0]
            return (first,) if self.has_logits else (first, mean(first, attention_mask))
        x = self._encode(input_ids, attention_mask, token_type_ids)  # (batch, seq, hidden)
        if hasattr(model, "cls"):
            return (model.cls.predictions(x)[..., : model.config.vocab_size],)
        if not hasattr(model, "classifier"):
            return x, mean(x, attention_mask)
        if model.bert.pooler is not None:
            x = torch.tanh(model.bert.pooler.dense(x[:, 0]))
        return (model.classify(x),)

    def _encode(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        bert = self.model.base_model
        config = bert.config
        batch, seq = input_ids.shape
        cu_seqlens = torch.arange(batch + 1, device=input_ids.device) * seq
        seen = input_ids * (attention_mask != 0)  # padding is what a bigram ends at
        x = bert.embeddings(seen.flatten(), token_type_ids.flatten(), cu_seqlens)
        slopes = alibi_slopes(config.num_attention_heads, x.device)
        rotary = None
        if config.position_encoding == "rope":
            slopes = torch.zeros_like(slopes)
            position = torch.arange(seq, device=x.device).repeat(batch)
            rotary = rotary_table(position, config.head_dim, config.rope_theta)
        window = -1 if config.attention_window is None else config.attention_window
        bias = alibi_bias(slopes, attention_mask != 0, x.dtype, window)
        plan = AttentionPlan("sdpa", cu_seqlens, seq, slopes, window, 0.0, None, bias, None, rotary)
        hidden: Tensor = bert.encoder(x, plan).view(batch, seq, -1)
        return hidden


def mean(x: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over the real tokens: `(batch, seq, hidden)` -> `(batch, hidden)`."""
    weights = (attention_mask != 0).to(x.dtype)[..., None]
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1)
