"""What a plan needs to know of a training job: its model, its samples, how long they are."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from mosaicbert.config import ClassifyConfig, PretrainConfig, TrainerConfig
from mosaicbert.config.sections import DatasetConfig
from mosaicbert.data.classification import tokenize_texts
from mosaicbert.data.examples import Examples, sample_examples
from mosaicbert.data.loader import open_text
from mosaicbert.data.tokenizers import load_tokenizer
from mosaicbert.data.tokens import TokenExamples, tokenize_words
from mosaicbert.errors import DataError
from mosaicbert.finetuning import KINDS, read_data
from mosaicbert.models.build import build_model
from mosaicbert.models.register import Task
from mosaicbert.plan.storage import DataSize, data_size

SAMPLES_READ = 512
"""Samples whose mean length stands for that of all."""


@dataclass(slots=True)
class TrainingJob:
    """One training run, before it runs."""

    config: TrainerConfig
    model: Any
    """Of the meta device: a shape without weights."""
    task: Task
    vocab_size: int
    max_seq_len: int
    mean_length: float
    """Real tokens of a sample; `max_seq_len` where the data cannot be read here."""
    mask_rate: float = 0.0
    data: DataSize | None = None
    epoch_samples: int | None = None
    eval_samples: int | None = None
    """Samples of one evaluation, over all its sets."""
    notes: list[str] = field(default_factory=list)

    def rows(self, samples: float) -> float:
        """Rows that the head runs on, of samples of full length."""
        if self.task == "mlm":
            return samples * self.max_seq_len * self.mask_rate
        return samples if self.task == "classification" else samples * self.max_seq_len


def pretraining_job(config: PretrainConfig) -> TrainingJob:
    """Of `mosaicbert pretrain`. Data that are not here leave their figures out, with a note."""
    tokenizer = load_tokenizer(config.tokenizer_name)
    job = TrainingJob(
        config, _model(config, "mlm", len(tokenizer), config.max_seq_len), "mlm", len(tokenizer),
        config.max_seq_len, float(config.max_seq_len), _mask_rate(config),
    )  # fmt: skip
    job.model.mlm_share = job.mask_rate
    dataset = config.train_loader.dataset
    try:
        job.data = data_size(dataset)
    except DataError as error:
        job.notes.append(f"Training data: {str(error).rstrip('.')}.")
        return job
    job.epoch_samples = job.data.samples
    if job.data.here and dataset.long_documents == "truncate":  # pieces are full but for the last
        job.mean_length = _mean_length_of_text(_local(dataset), tokenizer)
    if config.eval_loader is not None:
        try:
            job.eval_samples = data_size(config.eval_loader.dataset).samples
        except DataError as error:
            job.notes.append(f"Validation data: {str(error).rstrip('.')}.")
    return job


def classification_job(config: ClassifyConfig) -> TrainingJob:
    """Of `mosaicbert classify`; of `data.folds`, one of the runs."""
    try:
        pairs = read_data(config, sample_examples)
    except DataError as error:
        return finetuning_job(config, None, [], str(error))
    job = finetuning_job(config, pairs[0][0], [pairs[0][1]])
    if len(pairs) > 1:
        job.notes.append(f"data.folds: {len(pairs)} such runs, one after the other.")
    return job


def finetuning_job(
    config: ClassifyConfig,
    train: Examples | TokenExamples | None,
    validation: Sequence[Examples | TokenExamples],
    trouble: str = "",
) -> TrainingJob:
    """Of fine-tuning on these examples; None where they cannot be read, for what `trouble` says."""
    tokenizer = load_tokenizer(config.tokenizer_name)
    labels = config.model.num_labels or (2 if train is None else train.num_labels)
    unread = "regression" if labels == 1 else "classification"
    kind = KINDS[unread if train is None else train.kind]
    job = TrainingJob(
        config, _model(config, kind.task, len(tokenizer), config.max_seq_len, num_labels=labels,
                       problem_type=kind.problem_type),
        kind.task, len(tokenizer), config.max_seq_len, float(config.max_seq_len),
    )  # fmt: skip
    if train is None:
        job.notes.append(f"Training data: {trouble.rstrip('.')}.")
        return job
    job.epoch_samples = len(train)
    job.eval_samples = sum(map(len, validation))
    job.mean_length = _mean_length(train, tokenizer, config.max_seq_len)
    return job


def _model(
    config: PretrainConfig | ClassifyConfig,
    task: Task,
    vocab_size: int,
    max_seq_len: int,
    **labels: Any,
) -> Any:
    shape = config.model.model_copy(update={"use_pretrained": False, "pretrained_checkpoint": None})
    with torch.device("meta"):
        return build_model(
            shape,
            task,
            algorithms=config.algorithms,
            max_seq_len=max_seq_len,
            vocab_size=vocab_size,
            **labels,
        )


def _mask_rate(config: PretrainConfig) -> float:
    own = config.train_loader.dataset.mlm_probability
    rate = config.mlm_probability if own is None else own
    return statistics.fmean(rate) if isinstance(rate, list) else rate


def _local(dataset: DatasetConfig) -> DatasetConfig:
    """The same without its stores: all of it is here."""
    streams = dataset.streams and {
        name: stream.model_copy(update={"remote": None, "local": stream.local or dataset.local})
        for name, stream in dataset.streams.items()
    }
    return dataset.model_copy(update={"remote": None, "streams": streams})


def _mean_length_of_text(dataset: DatasetConfig, tokenizer: PreTrainedTokenizerFast) -> float:
    """Of the samples that an epoch begins with, cut and with special tokens."""
    reader, order = open_text(dataset, tokenizer)
    try:
        places = order.locate(0, 0, min(SAMPLES_READ, order.num_samples))
        return statistics.fmean(map(len, reader.read(places)))
    finally:
        reader.shards.close()


def _mean_length(
    examples: Examples | TokenExamples, tokenizer: PreTrainedTokenizerFast, max_seq_len: int
) -> float:
    """Of examples drawn at random, always the same ones."""
    rng = np.random.default_rng(17)
    part = examples.take(rng.permutation(len(examples))[:SAMPLES_READ])
    if isinstance(part, TokenExamples):
        return statistics.fmean(map(len, tokenize_words(part, tokenizer, max_seq_len)[0]))
    texts = tokenize_texts(part.texts, part.pairs, tokenizer, max_seq_len)
    return float(texts.offsets[-1]) / len(texts)
