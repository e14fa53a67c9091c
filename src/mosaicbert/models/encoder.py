"""The layers of Mosaic BERT: embeddings, encoder, pooler and MLM head.

Source: Portes et al. 2023, "MosaicBERT: A Bidirectional Encoder Optimized for Fast Pretraining".
Tokens of all sequences lie one after another, `(total_nnz, hidden)`; sequence i is
`cu_seqlens[i]:cu_seqlens[i + 1]`. Modules carry the names of the original's checkpoints.
"""
# mypy: disable-error-code="no-any-return"

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaicbert.models import kernels
from mosaicbert.models.attention import (
    AttentionPlan,
    alibi_slopes,
    plan_attention,
    run_attention,
)
from mosaicbert.models.configuration import MosaicBertConfig


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its input, also under autocast; its statistics are float32."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` -> the same."""
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class MosaicBertEmbeddings(nn.Module):
    """Token and segment embeddings; positions are ALiBi's business."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(
            config.padded_vocab_size, width, padding_idx=config.pad_token_id
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """`(total_nnz,)` -> `(total_nnz, hidden)`."""
        x = self.word_embeddings(input_ids)
        if token_type_ids is None:
            x = x + self.token_type_embeddings.weight[0]
        else:
            x = x + self.token_type_embeddings(token_type_ids)
        x = F.dropout(self.LayerNorm(x), self.dropout, self.training)
        if torch.is_autocast_enabled(x.device.type):  # the residual stream is kept in this dtype
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x


class MosaicBertSelfAttention(nn.Module):
    """Queries, keys and values in one projection, then attention."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """`(total_nnz, hidden)` -> the same."""
        qkv = self.Wqkv(x).view(-1, 3, self.heads, self.head_dim)
        return run_attention(qkv, plan).flatten(1)


class MosaicBertSelfOutput(nn.Module):
    """Projection of the attention's output."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """`(total_nnz, hidden)` twice -> the same."""
        return self.LayerNorm(residual + F.dropout(self.dense(x), self.dropout, self.training))


class MosaicBertAttention(nn.Module):
    """Attention with its projections and residual."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.self = MosaicBertSelfAttention(config)
        self.output = MosaicBertSelfOutput(config)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """`(total_nnz, hidden)` -> the same."""
        return self.output(self.self(x, plan), x)


class MosaicBertMLP(nn.Module):
    """Gated feed-forward layer, GeGLU (Shazeer 2020): GELU of the first half times the second."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.gated_layers = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size)
        self.layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, x: Tensor, fused: bool) -> Tensor:
        """`(total_nnz, hidden)` -> the same; `fused`: with our GeGLU kernel."""
        dropout_p = self.dropout if self.training else 0.0
        hidden = geglu(self.gated_layers(x), dropout_p, fused)  # (total_nnz, intermediate)
        return self.layernorm(x + self.wo(hidden))


def geglu(x: Tensor, dropout_p: float, fused: bool) -> Tensor:
    """`dropout(gelu(x[:, :n]) * x[:, n:])`, `(total_nnz, 2n)` -> `(total_nnz, n)`; exact GELU."""
    if fused:
        from mosaicbert.models.kernels.geglu import geglu as kernel

        seed = torch.randint(2**31, (1,), device=x.device) if dropout_p else None
        return kernel(x, dropout_p, seed)
    gate, up = x.chunk(2, dim=-1)
    return F.dropout(F.gelu(gate) * up, dropout_p)


class MosaicBertLayer(nn.Module):
    """One layer of the encoder; the unit that is compiled."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.attention = MosaicBertAttention(config)
        self.mlp = MosaicBertMLP(config)

    def forward(self, x: Tensor, plan: AttentionPlan, fused: bool) -> Tensor:
        """`(total_nnz, hidden)` -> the same."""
        return self.mlp(self.attention(x, plan), fused)


class MosaicBertEncoder(nn.Module):
    """The layers, over one packed batch."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(MosaicBertLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False  # both set by `gradient_checkpointing_enable`
        self._gradient_checkpointing_func: Callable[..., Tensor] | None = None

    def plan(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> AttentionPlan:
        """What the layers share about a batch of embeddings `x (total_nnz, hidden)`."""
        config = self.config
        return plan_attention(
            cu_seqlens,
            max_seqlen,
            alibi_slopes(config.num_attention_heads, x.device),
            total_nnz=x.shape[0],
            head_dim=config.head_dim,
            dtype=x.dtype,
            dropout_p=config.attention_probs_dropout_prob if self.training else 0.0,
            window=config.attention_window,
            backend=config.attention_backend,
        )

    def forward(
        self, x: Tensor, plan: AttentionPlan, hidden_states: list[Tensor] | None = None
    ) -> Tensor:
        """`(total_nnz, hidden)` -> the same; `hidden_states` receives `x` and each output."""
        fused = kernels.why_not(x.device) is None and x.dtype != torch.float64
        for layer in self.layer:
            if hidden_states is not None:
                hidden_states.append(x)
            if self._gradient_checkpointing_func and self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x, plan, fused)
            else:
                x = layer(x, plan, fused)
        if hidden_states is not None:
            hidden_states.append(x)
        return x


class MosaicBertPooler(nn.Module):
    """tanh of a projection of each sequence's first token."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """`(total_nnz, hidden)` -> `(batch, hidden)`; zeros stand in for an empty sequence."""
        x = F.pad(x, (0, 0, 0, 1))
        first = torch.where(cu_seqlens.diff() > 0, cu_seqlens[:-1], x.shape[0] - 1)
        return torch.tanh(self.dense(x[first]))


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
        bias: Tensor = self.decoder.bias
        vocab_size = self.config.vocab_size
        if vocab_size < bias.shape[0]:
            token = torch.arange(bias.shape[0], device=bias.device)
            bias = bias.masked_fill(token >= vocab_size, -torch.inf)
        return F.linear(self.transform(x), self.decoder.weight, bias)


class MosaicBertMLMHead(nn.Module):
    """Holds the head under its checkpoint name."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.predictions = MosaicBertPredictions(config)
