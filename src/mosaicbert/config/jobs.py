"""The three jobs' YAMLs, made of the sections: pre-training, classification, GLUE."""

from typing import Any, Literal

from pydantic import Field, PositiveInt

from mosaicbert.config.sections import (
    AlgorithmsConfig,
    BatchSizeWarmupConfig,
    CallbacksConfig,
    LoaderConfig,
    LoggersConfig,
    ModelConfig,
    OptimizerConfig,
    Probability,
    RunName,
    SchedulerConfig,
    Seed,
    Strict,
    TaskLoaderConfig,
    TimeString,
)


class TrainerConfig(Strict):
    """The keys that every training job has."""

    run_name: RunName = "mosaicbert"
    """Name of the run; `{run_name}` in paths stands for it."""
    seed: Seed = 17
    """Seed of weights, dropout and order."""
    device: Literal["cpu", "gpu", "cuda"] | None = None
    """Where to train. Default: a GPU where there is one."""
    precision: Literal["fp32", "amp_bf16", "amp_fp16", "bf16", "fp8"] | None = None
    """Arithmetic. Default: `amp_bf16` on a GPU, `fp32` on a CPU. `fp8` trains as `amp_bf16`, with
    most matrix products of Mosaic BERT in 8 bits: for GPUs from compute capability 8.9 on."""
    compile: bool | None = None
    """Use torch.compile. Default: on a GPU."""
    cuda_graphs: bool | None = None
    """Launch each microbatch as one CUDA graph. Default: on a single GPU with torch.compile."""
    max_duration: TimeString
    """How long to train."""
    eval_interval: TimeString = "1ep"
    """How often to evaluate; `0ba` only at the end."""
    global_train_batch_size: PositiveInt
    """Samples of one optimizer step, over all ranks."""
    device_train_microbatch_size: PositiveInt | Literal["auto"] = "auto"
    """Samples of full length that one device takes at a time; `auto` starts from what fits by its
    count, 131,072 tokens at most (Mosaic BERT base on a GPU with 80 GB: some 106,000; 8,192 on a
    CPU), and halves when memory runs out."""
    device_eval_batch_size: PositiveInt = 64
    """Samples one device evaluates at a time."""
    train_subset_num_batches: PositiveInt | Literal[-1] | None = None
    """Batches of an epoch; the rest is left out. -1 takes all."""
    eval_subset_num_batches: PositiveInt | Literal[-1] | None = None
    """Batches of an evaluation; the rest is left out. -1 takes all."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """The optimizer."""
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    """The learning rate over the run."""
    algorithms: AlgorithmsConfig | None = None
    """The original's switches."""
    callbacks: CallbacksConfig = Field(default_factory=CallbacksConfig)
    """What is measured on the way."""
    loggers: LoggersConfig | None = None
    """Where measurements go."""
    progress_bar: bool = True
    """Show progress; plain lines where the output is no terminal."""
    log_to_console: bool = True
    """Print measurements."""
    console_log_interval: TimeString = "1ba"
    """How often to print a line where there is no progress bar."""
    python_log_level: str | None = None
    """Level of Python's logging: debug, info, warning, error."""
    run_folder: str | None = "runs/{run_name}"
    """Folder of the run's own files: metrics, configuration, report. `null`: none are written."""
    save_folder: str | None = None
    """Folder or URI for checkpoints; none are written without."""
    save_interval: TimeString = "1ep"
    """How often to save."""
    save_at_end: bool = True
    """Save the end of a run, too."""
    save_num_checkpoints_to_keep: int = Field(default=-1, ge=-1)
    """How many checkpoints stay; -1 keeps all."""
    save_overwrite: bool = False
    """Allow a save folder that holds another run's checkpoints."""
    load_path: str | None = None
    """Checkpoint to start from."""
    load_weights_only: bool = False
    """Take the weights of `load_path` alone, not optimizer, position and random state."""
    autoresume: bool = False
    """Go on from the newest checkpoint of `save_folder` where there is one."""
    gradient_reduction: Literal["fp32", "bf16"] = "fp32"
    """Numbers in which ranks exchange gradients; `bf16` halves the traffic and rounds."""
    dist_timeout: float = Field(default=600.0, gt=0)
    """Seconds after which a rank that no longer answers ends the run."""


class PretrainConfig(TrainerConfig):
    """`main.py` / `mosaicbert pretrain`: masked-language-model pre-training."""

    data_local: str | None = None
    """Folder of the data, for `${data_local}`."""
    data_remote: str | None = None
    """Folder or URI of the data, for `${data_remote}`."""
    max_seq_len: PositiveInt = 128
    """Tokens of a sample, for `${max_seq_len}`."""
    tokenizer_name: str = "bert-base-uncased"
    """Tokenizer of data, model and checkpoints: a known name, a hub id or a folder."""
    mlm_probability: Probability | list[Probability] = 0.15
    """Share of tokens to predict, for `${mlm_probability}`; two values: moved over the run."""
    batch_size_warmup: BatchSizeWarmupConfig | None = None
    """Grow the batch up to `global_train_batch_size`."""
    model: ModelConfig
    """Architecture and weights."""
    train_loader: LoaderConfig
    """Training text."""
    eval_loader: LoaderConfig | None = None
    """Validation text."""


class OwnDataConfig(Strict):
    """`data`: your own classification data."""

    train: str
    """File (CSV, TSV, JSONL, parquet), or `sample` for the bundled task."""
    validation: str | None = None
    """File; without it `validation_fraction` of the training data is held out."""
    validation_fraction: Probability = 0.1
    """Share held out where there is no validation file."""
    text: str | list[str] = "text"
    """Column of the text, or two of them."""
    label: str | list[str] = "label"
    """Column of the label: numbers or names; several columns of 0 and 1 for multi-label."""
    task: Literal["classification", "regression", "multilabel", "token_classification"] | None = (
        None
    )
    """What to predict. Default: multi-label for several labels a row, regression where
    `model.num_labels` is 1, else classification."""
    folds: int | None = Field(default=None, ge=2)
    """Train so many times, each time validating on another part of `train` (cross-validation)."""


class ClassifyConfig(TrainerConfig):
    """`sequence_classification.py` / `mosaicbert classify`: fine-tuning on one task."""

    max_seq_len: PositiveInt = 256
    """Tokens of a sample, for `${max_seq_len}`."""
    tokenizer_name: str = "bert-base-uncased"
    """Tokenizer of data, model and checkpoints: a known name, a hub id or a folder."""
    model: ModelConfig
    """Architecture and weights."""
    data: OwnDataConfig | None = None
    """Your own data. Default: what `build_my_data` in `sequence_classification.py` gives."""
    metrics: list[str] = Field(default_factory=list)
    """Scores of the validation data, such as `[accuracy, macro_f1]`. Default: by kind of labels."""
    best_metric: str | None = None
    """What `keep` and `early_stopping` go by, such as `loss`. Default: the first of `metrics`."""
    keep: Literal["last", "best"] = "last"
    """Whose scores and checkpoint a run ends with: the last evaluation's or the best one's."""
    early_stopping: PositiveInt | None = None
    """End the run after so many evaluations in a row that were no better."""
    class_weights: Literal["balanced"] | None = None
    """`balanced`: rare classes weigh more, so that all count alike in the training loss."""
    train_loader: TaskLoaderConfig
    """Training part."""
    eval_loader: TaskLoaderConfig
    """Validation part."""


class GlueTaskConfig(Strict):
    """`tasks.NAME`: what a task does other than the table's defaults."""

    seeds: list[Seed] | None = None
    """One job for each seed."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay, in decoupled AdamW's sense."""
    batch_size: PositiveInt | None = None
    """Samples of an optimizer step."""
    max_seq_len: PositiveInt | None = None
    """Tokens of a sample."""
    trainer_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Any key of a training job, such as `max_duration` or `eval_interval`."""


class GlueConfig(Strict):
    """`glue.py` / `mosaicbert glue`: fine-tuning on all of GLUE."""

    base_run_name: RunName = "glue"
    """Name of the whole; jobs add task and seed."""
    default_seed: Seed = 19
    """Seed of the tasks that name none."""
    parallel: bool = False
    """Run jobs side by side: one a GPU, or several processes on a CPU."""
    jobs_per_gpu: PositiveInt | Literal["auto"] = 1
    """Jobs that share one GPU; `auto`: as many as its memory and the cores allow, at most 8."""
    cuda_mps: bool | None = None
    """Have jobs that share a GPU compute at the same time, by a multi-process service of CUDA's
    that runs as long as they do; else they take turns. Default: where it can. Not for Ray."""
    precision: Literal["fp32", "amp_bf16", "amp_fp16", "bf16", "fp8"] | None = None
    """Arithmetic. Default: `amp_bf16` on a GPU, `fp32` on a CPU. `fp8` trains as `amp_bf16`, with
    most matrix products of Mosaic BERT in 8 bits: for GPUs from compute capability 8.9 on."""
    device: Literal["cpu", "gpu", "cuda"] | None = None
    """Where to train. Default: a GPU where there is one."""
    compile: bool | None = None
    """Use torch.compile. Default: on a GPU, for Mosaic BERT."""
    data_dir: str | None = None
    """Folder of the tasks (parquet or TSV, named as on the hub), or `sample`. Default: the hub."""
    tokenizer_name: str = "bert-base-uncased"
    """Tokenizer of data, model and checkpoints: a known name, a hub id or a folder."""
    max_seq_len: PositiveInt = 256
    """Tokens of a sample."""
    model: ModelConfig
    """Architecture."""
    starting_checkpoint_load_path: str | None = None
    """Pre-trained weights: anything `mosaicbert.load` reads."""
    local_pretrain_checkpoint_folder: str = "./local-pretrain-checkpoints/"
    """Read for compatibility; a remote starting checkpoint is copied to a temporary folder."""
    save_finetune_checkpoint_prefix: str | None = None
    """Folder or URI for the jobs' checkpoints, below which each run has a folder of its name."""
    save_finetune_checkpoint_folder: str | None = None
    """In place of that prefix and name: the folder or URI that the jobs' own are in."""
    run_folder: str = "runs/{run_name}"
    """Folder of the results, metrics and logs."""
    loggers: LoggersConfig | None = None
    """Where measurements go."""
    callbacks: CallbacksConfig = Field(default_factory=CallbacksConfig)
    """What is measured on the way."""
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    """The learning rate over each job."""
    algorithms: AlgorithmsConfig | None = None
    """The original's switches."""
    progress_bar: bool = True
    """Show progress."""
    python_log_level: str | None = None
    """Level of Python's logging."""
    tasks: dict[str, GlueTaskConfig]
    """The tasks to run, with what they change."""
