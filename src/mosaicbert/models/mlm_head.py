"""The masked-language-modelling head of Mosaic BERT: transform, tied decoder, loss."""
# mypy: disable-error-code="no-any-return"

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaicbert.models.configuration import MosaicBertConfig
from mosaicbert.models.heads import cross_entropy_sum
from mosaicbert.models.operations import LayerNorm


class MosaicBertTransform(nn.Module):
    """Dense layer, GELU and LayerNorm before the decoder."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """`(rows, hidden)` -> the same."""
        return self.LayerNorm(F.gelu(self.dense(x)))


class MosaicBertPredictions(nn.Module):
    """The masked-language-modelling head, over whichever rows it is given."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.config = config
        self.transform = MosaicBertTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.padded_vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        """`(rows, hidden)` -> logits `(rows, padded_vocab)`; pad rows of the vocabulary: -inf."""
        x, weight, bias = self.transform(x), self.decoder.weight, self.decoder.bias
        padding = torch.arange(len(bias), device=bias.device) >= self.config.vocab_size
        cap = self.config.logit_softcap
        if cap is None:
            return F.linear(x, weight, bias.masked_fill(padding, -torch.inf))
        logits = cap * torch.tanh(F.linear(x, weight, bias) / cap)  # Gemma Team 2024
        return logits.masked_fill(padding, -torch.inf)

    def loss(self, x: Tensor, labels: Tensor, fused: bool) -> Tensor:
        """Cross-entropy of `x (rows, hidden)`, summed: for when nobody wants the logits."""
        if not fused:
            return cross_entropy_sum(self(x), labels)
        from mosaicbert.models.kernels.cross_entropy import linear_cross_entropy

        x, decoder, config = self.transform(x), self.decoder, self.config
        classes, cap = config.vocab_size, config.logit_softcap
        return linear_cross_entropy(x, decoder.weight, decoder.bias, labels, classes, cap)


class MosaicBertMLMHead(nn.Module):
    """Holds the head under its checkpoint name."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.predictions = MosaicBertPredictions(config)
