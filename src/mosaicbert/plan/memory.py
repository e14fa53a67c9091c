"""Memory of one GPU in a training step, by counting what the models keep for the backward pass.

The counts are those of the code in `models/`: `tests/unit/test_plan_memory.py` holds them against
what autograd really saves, on the CPU, with the kernels and without. Sizes per token in bytes;
"rows" are the masked tokens, the only ones that the last layer and the head of Mosaic BERT run on.
"""

from dataclasses import dataclass, replace
from typing import Any

CONTEXT_BYTES = 0.8e9
"""What CUDA itself takes of a GPU, and what the allocator cannot use."""
USABLE = 0.95
"""Share of the rest that a run may fill."""


@dataclass(frozen=True, slots=True)
class Path:
    """How a model will run; decides what is kept.

    `kernels`: our Triton kernels for LayerNorm and GeGLU. `packed_attention`: attention without
    padding (our kernel or flex_attention). `compiled`: torch.compile. `activation`: bytes of an
    activation. `mask`: bytes of an element of a dropout mask (the CPU keeps floats).
    """

    kernels: bool
    packed_attention: bool
    compiled: bool
    activation: int
    mask: int = 1
    mixed: bool = True
    """Autocast: float32 weights, and copies of them in the type of the activations."""


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes kept for the backward pass for each token, and for each row."""

    layer: float
    """One layer but the last, for a token."""
    last_layer_token: float
    last_layer_row: float
    embeddings: float
    head_row: float
    """The head without its logits, for a row."""
    logits_row: float
    """Logits and what their loss and its gradient need at the peak, for a row."""
    layer_input: float
    """All that gradient checkpointing keeps of a layer, for a token."""

    def of(self, tokens: float, rows: float, num_layers: int, checkpointing: bool) -> float:
        """Bytes of a microbatch at the peak: when the loss has just been computed."""
        last = self.last_layer_token * tokens + self.last_layer_row * rows
        if checkpointing:
            kept = self.layer_input * tokens * num_layers
            most = max(self.layer * tokens, (self.head_row + self.logits_row) * rows)
            return self.embeddings * tokens + kept + most
        layers = self.layer * tokens * (num_layers - 1) + last
        return self.embeddings * tokens + layers + (self.head_row + self.logits_row) * rows


def activations(config: Any, path: Path, task: str = "mlm") -> Activations:
    """What a model of this configuration (`MosaicBertConfig` or `BertConfig`) keeps.

    Classifiers run their last layer on every token; their rows are the sequences, or (of
    `token-classification`) the tokens.
    """
    is_mosaic = config.model_type == "mosaic_bert"
    kept = _mosaic(config, path) if is_mosaic else _hf_bert(config, path)
    if task == "mlm":
        return kept
    width, dropout = config.hidden_size, config.hidden_dropout_prob > 0
    pooler = (2 if task == "classification" else 0) * width * path.activation
    return replace(
        kept,
        last_layer_token=kept.layer,
        last_layer_row=0.0,
        head_row=pooler + width * (path.activation + dropout * path.mask),
        logits_row=config.num_labels * (path.activation + 8.0),
    )


def _mosaic(config: Any, path: Path) -> Activations:
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    dropout = config.hidden_dropout_prob > 0
    # up to attention: on all tokens. Input, Wqkv's output, attention's output
    if path.packed_attention:
        token = (1 + 3 + 1) * width
    else:  # also: q, k, v and the output once more in the padded form
        token = (1 + 3 + 3 + 1 + 1) * width
    if config.qk_norm or config.position_encoding == "rope":
        token += 3 * width
    if config.value_skips:
        token += 3 * width
    # behind attention: on the rows alone in the last layer
    masks = 0
    if path.kernels and not config.pre_norm:
        row = 3 * width  # outputs of both projections, and of the first norm
    elif config.pre_norm:
        row = 2 * width  # input and output of the second norm
        token += width  # and the output of the first
        masks += (dropout and not path.kernels) * width
    else:
        row = 3 * width  # inputs of both norms, output of the first
        masks += dropout * width
    if config.feed_forward == "relu2":
        row += 2 * inner
        masks += dropout * inner
    elif path.kernels:  # both halves, and their product with dropout
        row += (2 if config.recompute_geglu else 3) * inner
    else:
        row += 4 * inner  # also GELU's output
        masks += dropout * inner
    statistics = 4.0 * (4 + heads)  # mean and deviation of two norms, log-sum-exp of attention
    size = path.activation
    behind = row * size + masks * path.mask
    copies = 2 * width * size  # attention's output and the residual, at the rows
    return Activations(
        layer=token * size + behind + statistics,
        last_layer_token=token * size + statistics + 8,
        last_layer_row=behind + copies,
        embeddings=(4 + dropout * path.mask) * width + 8,  # in float32
        head_row=4 * width * size,
        logits_row=_logits(config.padded_vocab_size, path),
        layer_input=width * size,
    )


def _hf_bert(config: Any, path: Path) -> Activations:
    """Hugging Face's BERT: padded, and its head runs on every position."""
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    dropout = config.hidden_dropout_prob > 0
    size = path.activation
    norm = 4 if path.mixed else size  # autocast runs LayerNorm in float32
    # inputs and outputs of two norms; q, k, v; attention's output
    layer = 2 * width * norm + 2 * width * norm + 4 * width * size
    if path.mixed and not path.compiled:
        layer += 4 * width * size  # copies of the norms' outputs for q, k, v and the next layer
    elif path.mixed:
        layer += 2 * width * (size - norm)  # only the copies are kept
    layer += (4 if getattr(config, "gated_linear_units", False) else 2) * inner * size
    layer += 2 * dropout * width * path.mask + 4.0 * (4 + heads)
    head = 2 * width * size + 2 * width * norm
    vocab = config.vocab_size * size  # the gradient of all logits
    return Activations(
        layer=layer,
        last_layer_token=layer + head + vocab,
        last_layer_row=0.0,
        embeddings=(4 + dropout * path.mask) * width + width * norm,
        head_row=0.0,
        logits_row=_logits(config.vocab_size, path),
        layer_input=width * norm,
    )


def _logits(vocab_size: int, path: Path) -> float:
    """Compiled: the logits and their gradient. Else also log-softmax and its gradient, float32."""
    if path.compiled:
        return 2.0 * vocab_size * path.activation
    return vocab_size * (path.activation + 8.0)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one GPU at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def fixed_bytes(
    parameters: int, optimizer_bytes: float, path: Path, num_gpus: int, bf16_reduction: bool
) -> Memory:
    """What does not depend on the microbatch. `optimizer_bytes`: of all states together.

    Autocast's copies of the weights are kept for the backward pass. With several GPUs the
    gradients lie twice: once more in the buckets in which they are exchanged.
    """
    weight = 4 if path.mixed else path.activation
    copies = path.activation if path.mixed else 0
    buckets = (2 if bf16_reduction else weight) if num_gpus > 1 else 0
    return Memory(
        weights=float(parameters * (weight + copies)),
        gradients=float(parameters * (weight + buckets)),
        optimizer=optimizer_bytes,
        activations=0.0,
    )
