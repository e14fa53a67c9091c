"""The loader of pre-training: masked text from shards, packed or padded, step by step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from mosaicbert.config.sections import DatasetConfig, LoaderConfig
from mosaicbert.data.convert_samples import check_tokenization
from mosaicbert.data.folders import open_folder, parse_bytes, streams_of
from mosaicbert.data.mlm import Masker, interpolate
from mosaicbert.data.order import Order, Source, count_draws
from mosaicbert.data.packing import Sample
from mosaicbert.data.reader import TokenReader
from mosaicbert.data.steps import BatchPlan, StepLoader, StepShape
from mosaicbert.data.stream import ShardSet
from mosaicbert.data.tokenizers import load_tokenizer
from mosaicbert.duration import Duration
from mosaicbert.errors import ConfigError

PREDOWNLOAD_BATCHES = 8
"""Look-ahead of an unshuffled stream; a shuffled one looks a block ahead."""


@dataclass(frozen=True, slots=True)
class _MaskedText:
    """Masked samples of text by position: the `make_samples` of pre-training."""

    reader: TokenReader
    order: Order
    masker: Masker
    probability: float | Sequence[float]
    samples_of_epoch: int
    total_samples: int | None
    training: bool
    predownload: int

    def __call__(self, epoch: int, start: int, end: int) -> list[Sample]:
        if not self.training:
            epoch = 0  # every evaluation sees the same samples and masks
        self._fetch_ahead(epoch, start, end + self.predownload)
        places = self.order.locate(epoch, start, end)
        done = places.positions + epoch * self.samples_of_epoch
        probability = interpolate(self.probability, done, self.total_samples)
        return self.masker.mask(self.reader.read(places), places.positions, epoch, probability)

    def _fetch_ahead(self, epoch: int, start: int, end: int) -> None:
        shards = self.order.shards_between(epoch, start, end)
        if self.training and end > self.order.num_samples:
            first = self.order.shards_between(epoch + 1, 0, end - self.order.num_samples)
            shards += [shard for shard in first if shard not in set(shards)]
        self.reader.shards.focus(shards)


def build_text_loader(
    config: LoaderConfig,
    *,
    batch_size: int | Callable[[int], int],
    microbatch_samples: int,
    rank: int,
    world_size: int,
    packed: bool,
    grid: bool,
    training: bool,
    mlm_probability: float | Sequence[float],
    max_duration: Duration | None = None,
    subset_batches: int | None = None,
) -> StepLoader:
    """Batches of masked text for one rank, from the data set that `config` names.

    Args:
        config: `train_loader` or `eval_loader` of a YAML.
        batch_size: samples of a global batch, or a function of the samples before it.
        microbatch_samples: samples of full length that a microbatch has room for.
        rank: whose share.
        world_size: number of shares.
        packed: without padding, or padded.
        grid: sizes are rounded to a few, for torch.compile.
        training: False gives every epoch the samples and masks of the first.
        mlm_probability: for a data set that has none of its own; two values move linearly over
            `max_duration`, and stay at the last in evaluations.
        max_duration: of the whole run.
        subset_batches: take only so many batches of an epoch; None or -1 takes all.

    Raises:
        ConfigError: settings that cannot be.
        DataError: no data set, none that can be read, or fewer samples than one batch.
    """
    dataset = config.dataset
    tokenizer = load_tokenizer(dataset.tokenizer_name)
    own = dataset.mlm_probability
    probability = mlm_probability if own is None else own
    _check_probability(probability)
    reader, order = open_text(dataset, tokenizer)
    masker = make_masker(dataset, tokenizer)
    is_part = subset_batches is not None and subset_batches >= 0
    plan = BatchPlan(
        order.num_samples, batch_size, config.drop_last, subset_batches if is_part else None
    )
    shape = StepShape(
        microbatch_samples=microbatch_samples,
        max_seq_len=dataset.max_seq_len,
        pad_token_id=tokenizer.pad_token_id or 0,
        packed=packed,
        grid=grid,
        rank=rank,
        world_size=world_size,
    )
    samples_of_epoch = plan.num_samples(0)
    total = _samples_of_run(max_duration, samples_of_epoch, batch_size) if training else None
    if training and total is None and not isinstance(probability, int | float):
        raise ConfigError(
            f"mlm_probability moves over the run, but max_duration: {max_duration} does not tell "
            "its samples. Give max_duration in samples (sp), epochs (ep) or, where the batch size "
            "stays the same, in batches (ba)."
        )
    ahead = _look_ahead(dataset, plan.size_at(0, 0))
    text = _MaskedText(reader, order, masker, probability, samples_of_epoch, total, training, ahead)
    return StepLoader(text, plan, shape, config)


def open_text(
    dataset: DatasetConfig, tokenizer: PreTrainedTokenizerFast
) -> tuple[TokenReader, Order]:
    """The samples of a data set as token ids, and their order.

    Raises:
        ConfigError, DataError: there is none, or none that this tokenizer can read.
    """
    streams = streams_of(dataset)
    folders = [open_folder(dataset, name, stream) for name, stream in streams.items()]
    for folder in folders:
        check_tokenization(folder.local, tokenizer)
    shards = ShardSet(folders, parse_bytes(dataset.cache_limit, "cache_limit"))
    is_chunked = dataset.long_documents == "chunk"
    reader = TokenReader(shards, tokenizer, dataset.max_seq_len, is_chunked)
    sizes, first = {}, 0
    for name, folder in zip(streams, folders, strict=True):
        numbers = range(first, first := first + len(folder.shards))
        sizes[name] = tuple(reader.num_samples(number) for number in numbers)
    draws = count_draws({name: sum(size) for name, size in sizes.items()}, streams)
    order = Order(
        [Source(sizes[name], draws[name]) for name in streams],
        seed=dataset.shuffle_seed,
        shuffle=dataset.shuffle,
        block_size=dataset.shuffle_block_size,
        document_of=reader.document_of if is_chunked else None,
    )
    return reader, order


def make_masker(dataset: DatasetConfig, tokenizer: PreTrainedTokenizerFast) -> Masker:
    """The masking of a data set: never the tokenizer's special tokens, nor those between texts."""
    if tokenizer.mask_token_id is None:
        raise ConfigError(f"{dataset.tokenizer_name} has no mask token: take another tokenizer.")
    between = {dataset.bos_token_id, dataset.eos_token_id} - {None}
    special_ids = sorted({*tokenizer.all_special_ids, *between})
    seed, vocab_size = dataset.shuffle_seed, len(tokenizer)
    return Masker(seed, tokenizer.mask_token_id, np.array(special_ids, np.int64), vocab_size)


def _look_ahead(dataset: DatasetConfig, batch_size: int) -> int:
    """Samples to fetch shards for in advance."""
    if dataset.predownload is not None:
        return dataset.predownload
    return dataset.shuffle_block_size if dataset.shuffle else PREDOWNLOAD_BATCHES * batch_size


def _check_probability(probability: float | Sequence[float]) -> None:
    if not isinstance(probability, int | float) and len(probability) != 2:
        raise ConfigError("mlm_probability: give one value, or the first and the last.")


def _samples_of_run(
    max_duration: Duration | None, samples_of_epoch: int, batch_size: int | Callable[[int], int]
) -> int | None:
    """Samples of the whole run; None where its unit does not tell."""
    units = {"sp": 1, "ep": samples_of_epoch}
    if not callable(batch_size):
        units["ba"] = batch_size
    if max_duration is None or max_duration.unit not in units:
        return None
    return int(max_duration.value) * units[max_duration.unit]
