"""The sections of a YAML: every key there is, its type, default and meaning.

The line under a key is its help, its documentation and its comment at once.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
)

from mosaicbert.duration import Duration
from mosaicbert.errors import ConfigError


def _check_time(text: Any) -> str:
    try:
        return str(Duration.parse(text))
    except ConfigError:
        raise ValueError(
            "a time string: a number and a unit, such as 10ba, 3ep, 286720000sp, 1000000tok, "
            "0.06dur, 600sec or 1h30m"
        ) from None


TimeString = Annotated[str, BeforeValidator(_check_time)]
"""A time string (`10ba`, `3ep`, `0.06dur`); see `mosaicbert.duration`."""


def _check_run_name(name: str) -> str:
    if not name.strip() or name.startswith("/") or {"..", "."} & set(name.split("/")):
        raise ValueError("a name for a folder: without a leading / and without . or .. in it")
    if any(not character.isprintable() or character == "\\" for character in name):
        raise ValueError("a name for a folder: of characters that can be printed, and no \\")
    return name


RunName = Annotated[str, AfterValidator(_check_run_name)]
"""A run's name: part of paths, so it must not lead out of the folders it is put into."""

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # as NumPy takes it


class Strict(BaseModel):
    """Base of every section: no unknown keys, no silent conversions of the wrong kind."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        populate_by_name=True,
    )


# --- model ---------------------------------------------------------------------------------------


class ModelConfig(Strict):
    """`model`: which architecture, of which shape, from which weights."""

    name: Literal["hf_bert", "mosaic_bert", "mosaic_bert_v2"] = "mosaic_bert"
    """Architecture: Hugging Face's BERT, Mosaic BERT, or its modern sibling."""
    pretrained_model_name: str = "bert-base-uncased"
    """Whose shape (and, with `use_pretrained`, weights) to take: a known name, hub id or folder."""
    tokenizer_name: str | None = None
    """If given, the same as the top-level `tokenizer_name`."""
    use_pretrained: bool = False
    """Start from the published weights of `pretrained_model_name`."""
    pretrained_checkpoint: str | None = None
    """Start from these weights: anything `mosaicbert.load` reads."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    overrides: dict[str, Any] = Field(default_factory=dict, alias="model_config")
    """Changes of shape: any key of BERT's configuration, such as `num_hidden_layers`."""
    num_labels: PositiveInt | None = None
    """Classification only: classes, or 1 for regression. Default: from the data."""


# --- data ----------------------------------------------------------------------------------------


class StreamConfig(Strict):
    """One of several sources of text, mixed by proportion, repetition or sample count."""

    remote: str | None = None
    """Folder or URI to copy shards from."""
    local: str | None = None
    """Folder the shards lie in, or are copied to."""
    split: str | None = None
    """Subfolder of both."""
    proportion: float | None = Field(default=None, gt=0)
    """Share of the mixture."""
    repeat: float | None = Field(default=None, gt=0)
    """How often an epoch sees each sample."""
    samples: PositiveInt | None = None
    """How many samples an epoch draws."""


class DatasetConfig(Strict):
    """`train_loader.dataset` / `eval_loader.dataset`: where the text lies and how it is read."""

    local: str | None = None
    """Folder the shards lie in, or are copied to."""
    remote: str | None = None
    """Folder or URI (`s3://`, `gs://`, `az://`, `file://`) the shards are copied from."""
    split: str | None = None
    """Subfolder of both, such as `train`."""
    streams: dict[str, StreamConfig] | None = None
    """Several sources in place of one."""
    tokenizer_name: str = "bert-base-uncased"
    """If given, the same as the top-level `tokenizer_name`."""
    max_seq_len: PositiveInt = 128
    """Tokens of a sample, special ones included; longer texts are cut."""
    mlm_probability: Probability | list[Probability] | None = None
    """Share of tokens to predict; two values: moved linearly from first to last over the run."""
    long_documents: Literal["truncate", "chunk"] = "truncate"
    """Keep the start of a long text, or use all of it as successive samples."""
    shuffle: bool = False
    """Shuffle anew each epoch."""
    shuffle_seed: Seed = 9176
    """Seed of the order, the masks and the mixture."""
    shuffle_algo: str | None = None
    """Read for compatibility; there is one algorithm."""
    shuffle_block_size: PositiveInt = 1 << 18
    """Samples shuffled together; shards stay sequential enough to stream."""
    num_canonical_nodes: int | None = None
    """Read for compatibility; the order never depends on nodes."""
    predownload: NonNegativeInt | None = None
    """Samples to download ahead."""
    cache_limit: int | str | None = None
    """Most bytes of local shards kept when streaming, such as `50gb`. Shards in use stay, and each
    process that shares the folder may be fetching two more."""
    download_retry: NonNegativeInt = 2
    """Further tries for a failed download."""
    download_timeout: float = 60.0
    """Seconds one download may take."""
    validate_hash: str | None = None
    """Read for compatibility; hashes are checked whenever the index has them."""
    keep_zip: bool | None = None
    """Keep the compressed shard beside the raw one."""
    keep_raw: bool = True
    """Read for compatibility."""
    eos_token_id: int | None = None
    """Token that ended each text when they were concatenated."""
    bos_token_id: int | None = None
    """Token that began each text when they were concatenated."""


class LoaderConfig(Strict):
    """`train_loader` / `eval_loader` of pre-training."""

    name: Literal["text"] = "text"
    """Kind of loader."""
    dataset: DatasetConfig
    """Where the text lies and how it is read."""
    drop_last: bool = True
    """Leave out the last, smaller batch of an epoch."""
    num_workers: NonNegativeInt = 2
    """Processes that read, tokenise, mask and pack; 0 does it in the training process."""
    pin_memory: bool | None = None
    """Page-locked batches. Default: on with a GPU."""
    prefetch_factor: PositiveInt | None = None
    """Batches each worker prepares ahead."""
    persistent_workers: bool | None = None
    """Read for compatibility; workers live for the whole run."""
    timeout: NonNegativeInt = 0
    """Seconds to wait for a batch before it counts as an error; 0 waits for ever."""


class TaskLoaderConfig(Strict):
    """`train_loader` / `eval_loader` of classification."""

    split: str
    """Which part of the data."""
    tokenizer_name: str | None = None
    """If given, the same as the top-level `tokenizer_name`."""
    max_seq_len: PositiveInt | None = None
    """Tokens of a sample. Default: the top-level `max_seq_len`."""
    shuffle: bool = False
    """Shuffle anew each epoch."""
    drop_last: bool = False
    """Leave out the last, smaller batch of an epoch."""
    num_workers: NonNegativeInt = 0
    """Read for compatibility; tokenised samples are kept in memory."""
    pin_memory: bool | None = None
    """Read for compatibility."""
    prefetch_factor: PositiveInt | None = None
    """Read for compatibility."""
    persistent_workers: bool | None = None
    """Read for compatibility."""
    timeout: NonNegativeInt = 0
    """Read for compatibility."""


# --- optimisation --------------------------------------------------------------------------------


class OptimizerConfig(Strict):
    """`optimizer`."""

    name: Literal["decoupled_adamw", "adamw", "stable_adamw", "muon"] = "decoupled_adamw"
    """`decoupled_adamw` scales the decay by lr/initial_lr; `muon` is for hidden matrices."""
    lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    """Decay of the two moments."""
    eps: float = Field(default=1e-6, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=1e-5, ge=0)
    """Weight decay, in the optimizer's own sense."""
    decay_norm_and_bias: bool = True
    """Decay norms and biases too, as the original does."""
    muon_lr: float = Field(default=0.02, gt=0)
    """`muon`: learning rate of the hidden matrices; `lr` is that of the rest."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """`muon`: momentum."""
    muon_nesterov: bool = True
    """`muon`: Nesterov's form of it."""
    muon_cautious_decay: bool = False
    """`muon`: decay of a hidden matrix only those weights that the update makes smaller."""


class SchedulerConfig(Strict):
    """`scheduler`."""

    name: Literal[
        "constant_with_warmup",
        "linear_decay_with_warmup",
        "cosine_with_warmup",
        "warmup_stable_decay",
    ] = "linear_decay_with_warmup"
    """Shape of the learning rate over the run."""
    t_warmup: TimeString = "0.06dur"
    """Linear warm-up from 0."""
    alpha_f: float = Field(default=0.0, ge=0)
    """Last learning rate, as a share of the peak."""
    t_decay: TimeString = "0.2dur"
    """`warmup_stable_decay`: length of the decay at the end."""
    decay_shape: Literal["1-sqrt", "linear"] = "1-sqrt"
    """`warmup_stable_decay`: shape of that decay."""


class BatchSizeWarmupConfig(Strict):
    """`batch_size_warmup`: small batches first (pre-training)."""

    start: PositiveInt
    """First batch size. It grows by so much at a time, and divides `global_train_batch_size`."""
    t_warmup: TimeString = "0.1dur"
    """Growth to the full size: in samples (`sp`), or `dur` of a `max_duration` in samples."""


class GradientClippingConfig(Strict):
    """`algorithms.gradient_clipping`."""

    clipping_type: Literal["norm", "value"] = "norm"
    """Clip the norm of all gradients together, or each value."""
    clipping_threshold: float = Field(default=1.0, gt=0)
    """Largest norm or value."""


class AlgorithmsConfig(Strict):
    """`algorithms`: the original's switches."""

    fused_layernorm: dict[str, Any] | None = None
    """Built in."""
    low_precision_layernorm: dict[str, Any] | None = None
    """Built in under `amp_bf16` and `amp_fp16`."""
    gated_linear_units: dict[str, Any] | None = None
    """Built into Mosaic BERT; changes HF BERT's feed-forward layers."""
    alibi: dict[str, Any] | None = None
    """Built into Mosaic BERT; replaces HF BERT's position embeddings."""
    gradient_clipping: GradientClippingConfig | None = None
    """Limit the gradients of each step."""


# --- callbacks and loggers -----------------------------------------------------------------------


class SpeedMonitorConfig(Strict):
    """`callbacks.speed_monitor`."""

    window_size: PositiveInt = 100
    """Batches to average over."""
    gpu_flops_available: float | None = None
    """Peak FLOP/s for MFU. Default: from the table of known devices."""


class NoSettings(Strict):
    """A monitor that is switched on by its name alone: `lr_monitor: {}`."""


class RuntimeEstimatorConfig(Strict):
    """`callbacks.runtime_estimator`."""

    cost_per_hour: float | None = Field(default=None, ge=0)
    """Price of an hour of all machines together, in any currency."""


class OptimizerMonitorConfig(Strict):
    """`callbacks.optimizer_monitor`."""

    log_optimizer_metrics: bool = True
    """Norms of gradients, weights and moments, per parameter."""
    interval: TimeString = "10ba"
    """How often."""


class HealthCheckerConfig(Strict):
    """`callbacks.health_checker`."""

    on_nan: Literal["stop", "skip", "rewind"] = "stop"
    """What to do when the loss or a gradient is NaN or infinite."""
    on_spike: Literal["ignore", "warn", "skip", "rewind", "stop"] = "warn"
    """What to do when the loss jumps."""
    spike_factor: float = Field(default=2.0, gt=1)
    """A jump is a loss above this multiple of its running median."""
    window_size: PositiveInt = 100
    """Batches of that median."""


class CallbacksConfig(Strict):
    """`callbacks`: what is measured on the way."""

    speed_monitor: SpeedMonitorConfig | None = None
    """Tokens, samples and batches a second, MFU, share of time waiting for data."""
    lr_monitor: NoSettings | None = None
    """Learning rates."""
    memory_monitor: NoSettings | None = None
    """Memory in use and at its peak."""
    runtime_estimator: RuntimeEstimatorConfig | None = None
    """Time and, with `cost_per_hour`, cost left."""
    optimizer_monitor: OptimizerMonitorConfig | None = None
    """Norms of gradients, weights and moments."""
    health_checker: HealthCheckerConfig | None = None
    """NaN, infinities and loss spikes."""


class LoggersConfig(Strict):
    """`loggers`: where measurements go, besides the JSONL and CSV of the run folder."""

    wandb: dict[str, Any] | None = None
    """Weights & Biases (extra `wandb`): arguments of `wandb.init`."""
    tensorboard: dict[str, Any] | None = None
    """TensorBoard: `log_dir`."""
    comet_ml: dict[str, Any] | None = None
    """Comet (extra `comet`): arguments of `comet_ml.start`."""
    mlflow: dict[str, Any] | None = None
    """MLflow (extra `mlflow`): `tracking_uri` (default: files in the run folder) and others."""
    trackio: dict[str, Any] | None = None
    """Trackio (extra `trackio`): arguments of `trackio.init`."""
