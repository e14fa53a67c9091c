"""Mosaic BERT as `torch.nn.Module`s that are at home in Hugging Face's `transformers`.

Each model takes padded batches through `forward`, as Hugging Face's do, and packed ones through
`loss`, for training. The layers, which know packed tokens only, are in `encoder`.
"""
# mypy: disable-error-code="no-any-return"

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from mosaicbert.batch import Batch, LossOutput
from mosaicbert.errors import ConfigError
from mosaicbert.models import kernels, register
from mosaicbert.models.attention import sequence_ids
from mosaicbert.models.configuration import MosaicBertConfig, padded_vocab_size
from mosaicbert.models.embeddings import BigramEmbedding, MosaicBertEmbeddings
from mosaicbert.models.encoder import (
    MosaicBertEncoder,
    MosaicBertPooler,
    MosaicBertSelfAttention,
    OutputLinear,
    wanted_rows,
)
from mosaicbert.models.heads import (
    CheckedModel,
    check_ids,
    classification_loss_sum,
    cross_entropy_sum,
    linear_parameters,
    mean_loss,
    problem_type,
    training_flops,
)
from mosaicbert.models.mlm_head import MosaicBertMLMHead

# --- padded form in, padded form out --------------------------------------------------------------


class Packed(NamedTuple):
    """A padded batch without its padding; `indices` are the places it came from."""

    input_ids: Tensor  # (total_nnz,)
    token_type_ids: Tensor | None  # (total_nnz,)
    cu_seqlens: Tensor  # (batch + 1,) int32
    max_seqlen: int
    indices: Tensor  # (total_nnz,) into the flattened (batch, seq)
    shape: torch.Size  # (batch, seq)

    def pack(self, x: Tensor) -> Tensor:
        """`(batch, seq)` -> `(total_nnz,)`."""
        return x.flatten()[self.indices]

    def pad(self, x: Tensor) -> Tensor:
        """`(total_nnz, ...)` -> `(batch, seq, ...)`; zeros where there was padding."""
        out = x.new_zeros(self.shape.numel(), *x.shape[1:])
        return out.index_copy(0, self.indices, x).view(*self.shape, *x.shape[1:])


def pack(input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> Packed:
    """Leave the padding out. What the mask hides is as though it were not there."""
    for name, x in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
        if x is not None and x.shape != input_ids.shape:
            raise ConfigError(
                f"{name} has shape {tuple(x.shape)}, input_ids {tuple(input_ids.shape)}: "
                "both must be (batch, seq)."
            )
    mask = (torch.ones_like(input_ids) if attention_mask is None else attention_mask) != 0
    lengths = mask.sum(dim=1, dtype=torch.int32)
    return Packed(
        input_ids=input_ids[mask],
        token_type_ids=None if token_type_ids is None else token_type_ids[mask],
        cu_seqlens=F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        max_seqlen=max(1, int(lengths.max())),
        indices=mask.flatten().nonzero().flatten(),
        shape=input_ids.shape,
    )


# --- models ---------------------------------------------------------------------------------------


class MosaicBertPreTrainedModel(CheckedModel, PreTrainedModel):  # type: ignore[misc]
    """What the models share: the way in and out, vocabulary, counting."""

    config_class = MosaicBertConfig
    config: MosaicBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MosaicBertLayer",)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OutputLinear) and self.config.zero_init_outputs:
            init.zeros_(module.weight)
        if isinstance(module, BigramEmbedding):
            init.zeros_(module.weight)
        if isinstance(module, MosaicBertSelfAttention) and hasattr(module, "value_mix"):
            init.constant_(module.value_mix, 0.5)
        if isinstance(module, MosaicBertEncoder) and hasattr(module, "skip_weights"):
            init.ones_(module.skip_weights)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """As Hugging Face's; rows stay a multiple of 8, and padding is never predicted."""
        wanted = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        embedding: nn.Embedding = super().resize_token_embeddings(
            padded_vocab_size(wanted), pad_to_multiple_of, mean_resizing
        )
        self.config.vocab_size = wanted
        return embedding

    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        output_hidden_states: bool | None,
    ) -> tuple[Tensor, Packed, tuple[Tensor, ...] | None]:
        """Padded batch -> `(total_nnz, hidden)`, how to pad it again, all hidden states padded."""
        check_ids(input_ids, self.config.vocab_size)
        packed = pack(input_ids, attention_mask, token_type_ids)
        states: list[Tensor] = []
        x = self.base_model.encode(
            packed.input_ids,
            packed.token_type_ids,
            packed.cu_seqlens,
            packed.max_seqlen,
            hidden_states=states if output_hidden_states else None,
        )
        return x, packed, tuple(packed.pad(h) for h in states) or None

    def _encode(self, batch: Batch, positions: Tensor | None = None) -> Tensor:
        """Packed batch -> `(total_nnz, hidden)`, or `(rows, hidden)` at `positions (rows,)`."""
        assert batch.cu_seqlens is not None, "Mosaic BERT trains on packed batches"
        return self.base_model.encode(
            batch.input_ids,
            batch.token_type_ids,
            batch.cu_seqlens,
            batch.max_seqlen,
            positions=positions,
        )

    def flops_per_token(self, seq_len: float, more_parameters: float = 0.0) -> float:
        """FLOPs of forward + backward for one real token in sequences of `seq_len` tokens.

        Heads on whole sequences or of few classes are too small to count.
        """
        config = self.config
        if config.attention_window is not None:
            seq_len = min(seq_len, 2 * config.attention_window + 1)
        parameters = linear_parameters(self.base_model.encoder) + more_parameters
        return training_flops(parameters, config.hidden_size * config.num_hidden_layers, seq_len)


class MosaicBertModel(MosaicBertPreTrainedModel):
    """The encoder: hidden states, and one vector a sequence.

    `pooler_output` is the trained pooler's where there is one (classification), else the mean over
    the real tokens: the sentence embedding.
    """

    def __init__(self, config: MosaicBertConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config)
        self.embeddings = MosaicBertEmbeddings(config)
        self.encoder = MosaicBertEncoder(config)
        self.pooler = MosaicBertPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embedding."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another word embedding in."""
        self.embeddings.word_embeddings = value

    def encode(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        hidden_states: list[Tensor] | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Packed `input_ids (total_nnz,)` -> `(total_nnz, hidden)`.

        `hidden_states` receives the output of the embeddings and of each layer. With `positions
        (rows,)` the result is `(rows, hidden)`, and the last layer does no more than that needs;
        of a position that comes twice, only the first row may have a gradient.
        """
        if input_ids.device.type == "cpu":  # elsewhere this would wait for the device
            check_ids(input_ids, self.config.vocab_size)
        x = self.embeddings(input_ids, token_type_ids, cu_seqlens)
        plan = self.encoder.plan(x, cu_seqlens, max_seqlen)
        rows = None if positions is None else wanted_rows(positions, x.shape[0])
        return self.encoder(x, plan, hidden_states, rows)

    def pool(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """`(total_nnz, hidden)` -> `(batch, hidden)`; see the class."""
        if self.pooler is not None:
            return self.pooler(x, cu_seqlens)
        lengths = cu_seqlens.diff()
        sums = x.new_zeros(lengths.numel(), x.shape[1])
        sums = sums.index_add(0, sequence_ids(cu_seqlens, x.shape[0]), x)
        return sums / lengths.clamp(min=1)[:, None]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Padded `(batch, seq)` in; `last_hidden_state (batch, seq, hidden)`, zeros at padding."""
        x, packed, states = self._run(
            input_ids, attention_mask, token_type_ids, output_hidden_states
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=packed.pad(x),
            pooler_output=self.pool(x, packed.cu_seqlens),
            hidden_states=states,
        )


class _WithHead(MosaicBertPreTrainedModel):
    """An encoder, a head and a loss, over padded and over packed batches."""

    output_class: ClassVar[Any]
    per_token = True
    """Whether there is a label for each token, or for each sequence."""

    def logits(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """`(total_nnz, hidden)` -> `(total_nnz, outputs)`, or `(batch, outputs)`."""
        raise NotImplementedError

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Summed over the labels that count; a scalar, float32."""
        return cross_entropy_sum(logits, labels)

    def loss(self, batch: Batch, return_logits: bool = False) -> LossOutput:
        """Summed loss of a packed batch."""
        assert batch.cu_seqlens is not None
        logits = self.logits(self._encode(batch), batch.cu_seqlens)
        loss_sum = self.loss_sum(logits, batch.labels)
        return LossOutput(loss_sum, logits if return_logits else None)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> Any:
        """Padded `(batch, seq)` in; `logits (batch, seq, outputs)`, zeros at padding.

        A head on sequences gives `(batch, outputs)`. `loss` is the mean over the labels that
        count: not those of -100 (or NaN), nor any at padding.
        """
        x, packed, states = self._run(
            input_ids, attention_mask, token_type_ids, output_hidden_states
        )
        logits, loss = self.logits(x, packed.cu_seqlens), None
        if labels is not None:
            labels = packed.pack(labels) if self.per_token else labels
            loss = mean_loss(self.loss_sum(logits, labels), labels)
        logits = packed.pad(logits) if self.per_token else logits
        return self.output_class(loss=loss, logits=logits, hidden_states=states)


class MosaicBertForMaskedLM(_WithHead):
    """Mosaic BERT with the masked-language-modelling head."""

    output_class = MaskedLMOutput
    _tied_weights_keys = {  # noqa: RUF012
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"
    }
    mlm_share = 0.15
    """Share of the tokens that the head runs on, for `flops_per_token`."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__(config)
        self.bert = MosaicBertModel(config)
        self.cls = MosaicBertMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder, whose weight is the word embedding."""
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Put another decoder in."""
        self.cls.predictions.decoder = new_embeddings

    def logits(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """`(total_nnz, hidden)` -> `(total_nnz, vocab_size)`."""
        return self._real(self.cls.predictions(x))

    def _real(self, logits: Tensor) -> Tensor:
        """Logits without the vocabulary's padding."""
        return logits[:, : self.config.vocab_size]

    def loss(self, batch: Batch, return_logits: bool = False) -> LossOutput:
        """Summed cross-entropy of a packed batch's targets; the head runs on these alone."""
        assert batch.target_positions is not None
        x = self._encode(batch, batch.target_positions)
        if not return_logits:
            known = x.dtype in (torch.float32, torch.bfloat16)
            fused = known and kernels.why_not(x.device) is None
            return LossOutput(self.cls.predictions.loss(x, batch.labels, fused))
        logits = self.cls.predictions(x)
        return LossOutput(cross_entropy_sum(logits, batch.labels), self._real(logits))

    def flops_per_token(self, seq_len: float, more_parameters: float = 0.0) -> float:
        """The head, and the last layer behind its attention, run on `mlm_share` of the tokens."""
        last: Any = self.bert.encoder.layer[-1]
        behind = linear_parameters(last.attention.output) + linear_parameters(last.mlp)
        more_parameters += self.mlm_share * (linear_parameters(self.cls) + behind) - behind
        return super().flops_per_token(seq_len, more_parameters)


class _WithClassifier(_WithHead):
    """Dropout and a linear classifier, on sequences or on tokens."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MosaicBertModel(config, add_pooling_layer=not self.per_token)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        dropout = config.classifier_dropout
        self.dropout = config.hidden_dropout_prob if dropout is None else dropout
        self.post_init()

    def classify(self, x: Tensor) -> Tensor:
        """`(rows, hidden)` -> logits `(rows, num_labels)`."""
        return self.classifier(F.dropout(x, self.dropout, self.training))

    def logits(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """`(total_nnz, hidden)` -> `(total_nnz, num_labels)`, or `(batch, num_labels)`."""
        return self.classify(x if self.per_token else self.bert.pool(x, cu_seqlens))


class MosaicBertForSequenceClassification(_WithClassifier):
    """Mosaic BERT with a head on each sequence's first token: classes, labels or numbers."""

    output_class = SequenceClassifierOutput
    per_token = False
    class_weights: Tensor | None = None
    """`(num_labels,)` float32: weighs each class in the loss while training."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__(config)
        self.kind = problem_type(config.problem_type, config.num_labels)

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `heads.classification_loss_sum`."""
        weights = self.class_weights if self.training else None
        return classification_loss_sum(logits, labels, self.kind, weights)


class MosaicBertForTokenClassification(_WithClassifier):
    """Mosaic BERT with a classifier on every token."""

    output_class = TokenClassifierOutput


register.install()  # where this import brought the Auto classes in, they found it unfinished
