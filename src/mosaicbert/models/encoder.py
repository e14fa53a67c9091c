"""The layers of Mosaic BERT: encoder and pooler.

Source: Portes et al. 2023, "MosaicBERT: A Bidirectional Encoder Optimized for Fast Pretraining".
Tokens of all sequences lie one after another, `(total_nnz, hidden)`; sequence i is
`cu_seqlens[i]:cu_seqlens[i + 1]`. Modules carry the names of the original's checkpoints.
"""
# mypy: disable-error-code="no-any-return"

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaicbert.models import kernels
from mosaicbert.models.attention import (
    AttentionPlan,
    alibi_slopes,
    plan_attention,
    run_attention,
    sequence_ids,
)
from mosaicbert.models.configuration import MosaicBertConfig
from mosaicbert.models.operations import (
    LayerNorm,
    Product,
    add_norm,
    dropout,
    geglu,
    geglu_linear,
    norm_alone,
    sum_and_norm,
)
from mosaicbert.models.rotary import rotary_table, rotate


class OutputLinear(nn.Linear):
    """The last projection of a block, which `zero_init_outputs` starts at zero."""


class MosaicBertSelfAttention(nn.Module):
    """Queries, keys and values in one projection, then attention."""

    def __init__(self, config: MosaicBertConfig, index: int) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.qk_norm = config.qk_norm
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.value_skips = config.value_skips
        if config.value_skips and index > 0:  # Zhou et al. 2024, "Value Residual Learning"
            self.value_mix = nn.Parameter(torch.full((1,), 0.5))

    def forward(
        self, x: Tensor, plan: AttentionPlan, first_values: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`(total_nnz, hidden)` -> the same, and the values of the first layer where they are used.

        Where they are not, giving them out would cost a gradient of zeros in compiled code.
        """
        qkv = self.Wqkv(x).view(-1, 3, self.heads, self.head_dim)
        if self.qk_norm or plan.rotary is not None:
            qk, v = qkv[:, :2], qkv[:, 2:]
            if self.qk_norm:  # without weights; Henry et al. 2020
                qk = F.rms_norm(qk, (self.head_dim,))
            if plan.rotary is not None:
                qk = rotate(qk, plan.rotary)
            qkv = torch.cat([qk.to(v.dtype), v], dim=1)
        if hasattr(self, "value_mix"):
            assert first_values is not None
            v = torch.lerp(qkv[:, 2], first_values, self.value_mix.to(qkv.dtype))
            qkv = torch.stack([qkv[:, 0], qkv[:, 1], v], dim=1)
        elif self.value_skips:
            first_values = qkv[:, 2]
        return run_attention(qkv, plan).flatten(1), first_values


class Rows(NamedTuple):
    """The positions whose output is wanted; the last layer leaves the others out."""

    positions: Tensor  # (rows,) int64; only rows without a gradient may repeat an earlier one
    inverse: Tensor  # (total_nnz,) int64: first row of each position; `rows`: none


def wanted_rows(positions: Tensor, total_nnz: int) -> Rows:
    """`positions (rows,)` with their inverse, so that the gradient is gathered, not scattered."""
    numbers = torch.arange(positions.numel(), device=positions.device)
    inverse = torch.full((total_nnz,), positions.numel(), device=positions.device)
    return Rows(positions, inverse.scatter_reduce(0, positions, numbers, "amin"))


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[positions]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        (grad,) = grads
        return F.pad(grad, (0, 0, 0, 1))[inverse], None, None


def take_rows(x: Tensor, rows: Rows | None) -> Tensor:
    """`(total_nnz, width)` -> `(rows, width)`; all of them without `rows`."""
    if rows is None:
        return x
    taken: Tensor = _TakeRows.apply(  # type: ignore[no-untyped-call]
        x, rows.positions, rows.inverse
    )
    return taken


class MosaicBertSelfOutput(nn.Module):
    """Projection of the attention's output, and the block's LayerNorm."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.dense = OutputLinear(config.hidden_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class MosaicBertAttention(nn.Module):
    """Attention with its projections; under the checkpoint's names."""

    def __init__(self, config: MosaicBertConfig, index: int) -> None:
        super().__init__()
        self.self = MosaicBertSelfAttention(config, index)
        self.output = MosaicBertSelfOutput(config)


class MosaicBertMLP(nn.Module):
    """Feed-forward layer: GeGLU (Shazeer 2020), or ReLU^2 without a gate (So et al. 2021)."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gated = config.feed_forward == "geglu"
        if self.gated:
            self.gated_layers = nn.Linear(width, 2 * inner, bias=False)
        else:
            self.wi = nn.Linear(width, inner, bias=False)
        self.wo = OutputLinear(inner, width)
        self.layernorm = LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob
        self.recompute = config.recompute_geglu

    def before_last(self, x: Tensor, fused: bool) -> tuple[Tensor, Product]:
        """What `wo` takes, and the product that it is to take it by, from `x (total_nnz, hidden)`.

        That is the activation `(total_nnz, intermediate)`, dropout included, or with `recompute`
        its input, for a product that makes the activation itself, also on the way back.
        """
        dropout_p = self.dropout if self.training else 0.0
        if not self.gated:
            return dropout(F.relu(self.wi(x)).square(), dropout_p), F.linear
        wide = self.gated_layers(x)
        if fused and self.recompute:
            return wide, partial(geglu_linear, dropout_p)
        return geglu(wide, dropout_p, fused), F.linear


class MosaicBertLayer(nn.Module):
    """One layer of the encoder; the unit that is compiled.

    Post-norm as in BERT: `LayerNorm(x + block(x))`. Pre-norm: `x + block(LayerNorm(x))`, where the
    layer's last sum and the norm that reads it, which is the next layer's, are one operation: a
    layer gets its input and the norm of it from the one before.
    """

    def __init__(self, config: MosaicBertConfig, index: int) -> None:
        super().__init__()
        self.attention = MosaicBertAttention(config, index)
        self.mlp = MosaicBertMLP(config)
        self.pre_norm = config.pre_norm
        self.is_last = index == config.num_hidden_layers - 1
        self.dropout = config.hidden_dropout_prob

    def forward(
        self,
        x: Tensor,
        normed: Tensor | None,
        first_values: Tensor | None,
        plan: AttentionPlan,
        fused: bool,
        next_norm: LayerNorm | None = None,
        rows: Rows | None = None,
        eight: Any = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`x (total_nnz, hidden)`, its norm, the first layer's values -> the same for the next.

        The norm is None with post-norm; with pre-norm it is by `next_norm`, and the last layer
        gives it out in the place of `x`. With `rows`, everything after attention runs on these
        alone. With `eight`, the `fp8.Scales`, products are in fp8, and the 8-bit copy of what
        attention reads stands for the values.
        """
        if eight is not None:
            from mosaicbert.models.fp8 import layer_in_fp8

            return layer_in_fp8(self, x, normed, first_values, plan, next_norm, rows, eight)
        inputs = x if normed is None else normed
        attended, values = self.attention.self(inputs, plan, first_values)
        return *self.behind_attention(attended, x, fused, next_norm, rows), values

    def behind_attention(
        self,
        attended: Tensor,
        x: Tensor,
        fused: bool,
        next_norm: LayerNorm | None,
        rows: Rows | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The rest: projection and feed-forward layer, each added to the residual `x`."""
        output, mlp = self.attention.output, self.mlp
        dropout_p = self.dropout if self.training else 0.0
        attended, x = take_rows(attended, rows), take_rows(x, rows)
        if self.pre_norm:
            x, normed = sum_and_norm(attended, x, output.dense, mlp.layernorm, dropout_p, fused)
            hidden, product = mlp.before_last(normed, fused)
            assert next_norm is not None
            x, normed = sum_and_norm(hidden, x, mlp.wo, next_norm, 0.0, fused, product)
            return (normed, None) if self.is_last else (x, normed)
        x, residual = add_norm(attended, x, output.dense, output.LayerNorm, dropout_p, fused)
        hidden, product = mlp.before_last(x, fused)
        (x,) = add_norm(hidden, residual, mlp.wo, mlp.layernorm, 0.0, fused, 1, product)
        return x, None


class MosaicBertEncoder(nn.Module):
    """The layers, over one packed batch."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.config = config
        layers = config.num_hidden_layers
        self.layer = nn.ModuleList(MosaicBertLayer(config, index) for index in range(layers))
        if config.pre_norm:
            self.final_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.unet_skips and layers > 1:
            # the first half's outputs, last first, join the second half's inputs
            self.skip_weights = nn.Parameter(torch.ones(layers // 2))
        self.fp8 = False  # set by `build.use_fp8`
        self.gradient_checkpointing = False  # both set by `gradient_checkpointing_enable`
        self._gradient_checkpointing_func: Callable[..., Any] | None = None

    def plan(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> AttentionPlan:
        """What the layers share about a batch of embeddings `x (total_nnz, hidden)`."""
        config = self.config
        slopes = alibi_slopes(config.num_attention_heads, x.device)
        rotary = None
        if config.position_encoding == "rope":
            slopes = torch.zeros_like(slopes)
            position = torch.arange(x.shape[0], device=x.device)
            position = position - cu_seqlens[sequence_ids(cu_seqlens, x.shape[0])]
            rotary = rotary_table(position, config.head_dim, config.rope_theta)
        plan = plan_attention(
            cu_seqlens,
            max_seqlen,
            slopes,
            total_nnz=x.shape[0],
            head_dim=config.head_dim,
            dtype=x.dtype,
            dropout_p=config.attention_probs_dropout_prob if self.training else 0.0,
            window=config.attention_window,
            backend=config.attention_backend,
        )
        return plan._replace(rotary=rotary)

    def _norms(self) -> list[LayerNorm | None]:
        """Pre-norm: what normalises each layer's input, and the last one's output."""
        if not self.config.pre_norm:
            return [None] * (len(self.layer) + 1)
        own = [layer.attention.output.LayerNorm for layer in self.layer]  # type: ignore[union-attr]
        return [*own, self.final_norm]  # type: ignore[list-item]

    def _begin(
        self, x: Tensor, norm: LayerNorm | None, fused: bool
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        """The norm of the first layer's input, its 8-bit copy, and the `fp8.Scales`."""
        if self.fp8 and self.training:
            from mosaicbert.models import fp8

            return *fp8.first_norm(x, norm), fp8.make_scales(x.device, self.config.fp8_gate)
        return norm_alone(x, norm, fused), None, None

    def forward(
        self,
        x: Tensor,
        plan: AttentionPlan,
        hidden_states: list[Tensor] | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """`(total_nnz, hidden)` -> the same, or `(rows, hidden)` where `rows` asks for some only.

        `hidden_states` receives `x` and each output.
        """
        fused = kernels.why_not(x.device) is None and x.dtype != torch.float64
        half = len(self.layer) // 2
        norms = self._norms()
        normed, values, eight = self._begin(x, norms[0], fused)
        skips: list[Tensor] = []
        for index, layer in enumerate(self.layer):
            if hidden_states is not None:
                hidden_states.append(x)
            if self.config.unet_skips and index >= len(self.layer) - half:
                x = x + self.skip_weights[len(skips) - 1].to(x.dtype) * skips.pop()
                normed = norm_alone(x, norms[index], fused)
            last = index == len(self.layer) - 1
            args = (x, normed, values, plan, fused, norms[index + 1], rows if last else None, eight)
            if self._gradient_checkpointing_func and self.gradient_checkpointing and self.training:
                x, normed, values = self._gradient_checkpointing_func(layer.__call__, *args)
            else:
                x, normed, values = layer(*args)
            if self.config.unet_skips and index < half:
                skips.append(x)
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
