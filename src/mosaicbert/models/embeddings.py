"""The embeddings of Mosaic BERT: tokens, segments and, where asked for, pairs of neighbours."""
# mypy: disable-error-code="no-any-return"

import torch
from torch import Tensor, nn

from mosaicbert.models.configuration import MosaicBertConfig
from mosaicbert.models.operations import LayerNorm, dropout


class BigramEmbedding(nn.Embedding):
    """Rows for hashed pairs of neighbouring tokens, which start at zero.

    Facts about pairs of words need not go through the layers then (Svenstrup et al. 2017, "Hash
    Embeddings"). What lies outside of a sequence counts as padding.
    """

    def of_neighbours(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """`(total_nnz,)` -> `(total_nnz, hidden)`: of the pairs to the left and to the right."""
        begins = torch.zeros(input_ids.numel() + 1, dtype=torch.bool, device=input_ids.device)
        begins = begins.index_fill(0, cu_seqlens.long(), True)  # and where the last one ends
        left = input_ids.roll(1).masked_fill(begins[:-1], 0)
        right = input_ids.roll(-1).masked_fill(begins[1:], 0)
        return self(self._row(left, input_ids)) + self(self._row(input_ids, right))

    def _row(self, first: Tensor, second: Tensor) -> Tensor:
        mixed = (first.long() * 2_654_435_761 + second.long() * 2_246_822_519) % 4_294_967_291
        return (mixed ^ (mixed >> 15)) % self.num_embeddings


class MosaicBertEmbeddings(nn.Module):
    """Token and segment embeddings; positions are ALiBi's business."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(
            config.padded_vocab_size, width, padding_idx=config.pad_token_id
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        if config.bigram_buckets:
            self.bigram_embeddings = BigramEmbedding(config.bigram_buckets, width)
        self.LayerNorm = LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None, cu_seqlens: Tensor
    ) -> Tensor:
        """`(total_nnz,)` -> `(total_nnz, hidden)`."""
        x = self.word_embeddings(input_ids)
        if hasattr(self, "bigram_embeddings"):
            x = x + self.bigram_embeddings.of_neighbours(input_ids, cu_seqlens)
        if token_type_ids is None:
            x = x + self.token_type_embeddings.weight[0]
        else:
            x = x + self.token_type_embeddings(token_type_ids)
        x = dropout(self.LayerNorm(x), self.dropout, self.training)
        if torch.is_autocast_enabled(x.device.type):  # the residual stream is kept in this dtype
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x
