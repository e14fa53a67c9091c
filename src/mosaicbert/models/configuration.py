"""The configurations: Hugging Face BERT's keys and a few of our own."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from mosaicbert.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

VOCAB_MULTIPLE = 8
"""Embedding rows of Mosaic BERT are padded to this multiple, for tensor cores."""


def padded_vocab_size(vocab_size: int) -> int:
    """`vocab_size` rounded up to `VOCAB_MULTIPLE`."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class _BertShape(PretrainedConfig):  # type: ignore[misc]
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        check_shape(self)


MOST_LAYERS, MOST = 10_000, 1 << 26
"""Sizes beyond these are damage: building such a model would never end."""


def check_shape(config: PretrainedConfig) -> None:
    """Raise ConfigError for sizes that cannot be."""
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "type_vocab_size",
    ):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: {value!r} must be a whole number of at least 1.")
        most = MOST_LAYERS if name == "num_hidden_layers" else MOST
        if value > most:
            raise ConfigError(f"{name}: {value} is more than any model has (at most {most}).")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"{name}: {value!r} must lie between 0 and 1.")
    if config.num_labels < 1:
        raise ConfigError(f"num_labels: {config.num_labels!r} must be at least 1.")
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"hidden_size {config.hidden_size} does not divide by num_attention_heads "
            f"{config.num_attention_heads}: change one of them."
        )


@strict
class HfBertConfig(_BertShape):
    """A BERT that `algorithms` changed; see `hf_bert`."""

    model_type = "hf_bert"

    use_cache: bool = False
    is_decoder: bool = False
    add_cross_attention: bool = False
    gated_linear_units: bool = False
    """The feed-forward layers are gated."""
    alibi: bool = False
    """ALiBi stands in for the position embeddings."""


@strict
class MosaicBertConfig(_BertShape):
    """Shape of a Mosaic BERT; saved as `config.json` beside the weights.

    `vocab_size` counts the tokens there are; the embedding has `padded_vocab_size` rows, of which
    the last are never predicted. (The original's checkpoints count the padded rows as tokens.)
    There are no position embeddings, so `max_position_embeddings` and `alibi_starting_size` limit
    nothing: ALiBi extrapolates. They are kept for those who read them.
    """

    model_type = "mosaic_bert"

    attention_probs_dropout_prob: float | int = 0.0
    alibi_starting_size: int = 512
    attention_window: int | None = None
    """See only keys at most this far away; None: the whole sequence."""
    attention_backend: str | None = None
    """One of `mosaicbert.models.attention.BACKENDS`; None: by what the machine has."""

    # The modern sibling's switches, each off in Mosaic BERT.
    pre_norm: bool = False
    """LayerNorm before each block in place of after it."""
    qk_norm: bool = False
    """RMSNorm of queries and keys."""
    position_encoding: str = "alibi"
    """`alibi` or `rope`."""
    rope_theta: float | int = 10_000.0
    """`rope`: base of the wavelengths."""
    feed_forward: str = "geglu"
    """`geglu` or `relu2`."""
    zero_init_outputs: bool = False
    """Start with blocks that add nothing: their last projections are zero."""
    unet_skips: bool = False
    """Layers of the first half feed those of the second, mirrored."""
    value_skips: bool = False
    """Mix the first layer's attention values into each later layer's."""
    logit_softcap: float | int | None = None
    """Bound the MLM logits smoothly."""
    bigram_buckets: int = 0
    """Embed each token's pairs with its two neighbours, hashed into so many rows; 0: do not."""
    recompute_geglu: bool = False
    """Make GeGLU's output anew in the backward pass, where the kernels run: less memory."""
    fp8_gate: bool = False
    """With `precision: fp8`: what goes into GeGLU is computed and kept in 8 bits too."""

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        for key, choices in (
            ("position_encoding", ("alibi", "rope")),
            ("feed_forward", ("geglu", "relu2")),
        ):
            if getattr(self, key) not in choices:
                raise ConfigError(f"{key} {getattr(self, key)!r}: choose {' or '.join(choices)}.")
        if self.attention_window is not None and self.attention_window < 0:
            raise ConfigError(f"attention_window: {self.attention_window} must be at least 0.")
        if self.bigram_buckets < 0:
            raise ConfigError(f"bigram_buckets: {self.bigram_buckets} must be at least 0.")
        if self.recompute_geglu and self.feed_forward != "geglu":
            raise ConfigError(
                f"recompute_geglu: there is none in feed_forward: {self.feed_forward}."
            )
        if self.position_encoding == "rope" and self.head_dim % 2:
            raise ConfigError(f"position_encoding 'rope': head size {self.head_dim} is odd.")
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


MODERN = {"pre_norm": True, "zero_init_outputs": True, "hidden_dropout_prob": 0.0}
"""What `model.name: mosaic_bert_v2` switches on."""

RENAMED = {"max_position_embedding": "max_position_embeddings"}
"""Misspellings of the original's own YAMLs, which it swallowed."""

_WITHOUT_MEANING = {"position_embedding_type", "use_cache", "is_decoder", "add_cross_attention"}
"""Keys of BERT that change nothing here, at the values BERT has."""


def checked_keys(config_class: type, changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`changes` of a configuration, after a look at every key.

    Raises:
        ConfigError: there is no such key; suggests the near one.
    """
    known = {field.name for field in dataclasses.fields(config_class)} - {"architectures"}
    checked = {}
    for key, value in changes.items():
        name = RENAMED.get(key, key)
        if name != key:
            logger.warning("%s.%s is read as %s.", where, key, name)
        if name in _WITHOUT_MEANING - known:
            logger.warning("%s.%s changes nothing in this model.", where, key)
        elif name not in known | {"num_labels"}:
            raise ConfigError(
                f"{where}.{key}: there is no such key.{did_you_mean(key, known)} The keys are "
                f"those of BERT's configuration: {', '.join(sorted(_BertShape.__annotations__))}."
            )
        else:
            checked[name] = value
    return checked


def make_config(config_class: Any, values: Mapping[str, Any]) -> Any:
    """A configuration of `values`; a value of the wrong kind is a ConfigError."""
    try:
        config = config_class(**values)
        check_shape(config)
        return config
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
