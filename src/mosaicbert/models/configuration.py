"""The configuration of Mosaic BERT: Hugging Face BERT's keys and a few of its own."""

from transformers import PretrainedConfig

from mosaicbert.errors import ConfigError

VOCAB_MULTIPLE = 8
"""Embedding rows are padded to this multiple, for tensor cores."""


def padded_vocab_size(vocab_size: int) -> int:
    """`vocab_size` rounded up to `VOCAB_MULTIPLE`."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class MosaicBertConfig(PretrainedConfig):  # type: ignore[misc]
    """Shape of a Mosaic BERT; saved as `config.json` beside the weights.

    `vocab_size` counts the tokens there are; the embedding has `padded_vocab_size` rows, of which
    the last are never predicted. (The original's checkpoints count the padded rows as tokens.)
    There are no position embeddings, so `max_position_embeddings` limits nothing: ALiBi
    extrapolates. `alibi_starting_size` and the keys of BERT without a meaning here are kept so
    that configurations pass through unchanged.
    """

    model_type = "mosaic_bert"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.0
    max_position_embeddings: int = 512
    alibi_starting_size: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | int | None = None
    tie_word_embeddings: bool = True
    attention_window: int | None = None
    """See only keys at most this far away; None: the whole sequence."""
    attention_backend: str | None = None
    """One of `mosaicbert.models.attention.BACKENDS`; None: by what the machine has."""

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} does not divide by num_attention_heads "
                f"{self.num_attention_heads}: change one of them."
            )
        if self.hidden_act != "gelu":
            raise ConfigError(f"hidden_act {self.hidden_act!r}: Mosaic BERT knows 'gelu' (exact).")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the word embedding."""
        return padded_vocab_size(self.vocab_size)
