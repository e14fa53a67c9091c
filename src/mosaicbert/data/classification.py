"""Fine-tuning data: tokenised once, kept in memory, packed step by step."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from mosaicbert.batch import Step
from mosaicbert.data.examples import Examples
from mosaicbert.data.packing import Sample, pack_samples, pad_samples
from mosaicbert.data.tokenizers import encode_truncated
from mosaicbert.data.tokens import TokenExamples, tokenize_words
from mosaicbert.errors import ConfigError

TEXTS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class TokenizedTexts:
    """Token ids of many texts in one array: text i is `input_ids[offsets[i] : offsets[i + 1]]`."""

    input_ids: NDArray[np.int32]  # (total,)
    token_type_ids: NDArray[np.uint8] | None  # (total,), 1 in second texts; None for single texts
    offsets: NDArray[np.int64]  # (num_texts + 1,)

    @classmethod
    def join(
        cls, ids: Sequence[NDArray[np.int32]], types: Sequence[NDArray[np.uint8]] | None = None
    ) -> "TokenizedTexts":
        """From the arrays of each text."""
        return cls(
            np.concatenate(ids),
            None if types is None else np.concatenate(types),
            np.cumsum([0, *map(len, ids)]),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sample(self, index: int, labels: Any) -> Sample:
        """Text `index` with its labels."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        types = None if self.token_type_ids is None else self.token_type_ids[part]
        return Sample(self.input_ids[part], labels, token_type_ids=types)


def tokenize_texts(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerFast,
    max_seq_len: int,
) -> TokenizedTexts:
    """Tokenise texts or pairs with special tokens, cut to `max_seq_len`.

    Of a pair that is too long the longer text loses its end first, as in Hugging Face's
    `truncation="longest_first"`.
    """
    ids: list[NDArray[np.int32]] = []
    types: list[NDArray[np.uint8]] = []
    backend = copy.deepcopy(tokenizer.backend_tokenizer)  # its truncation is the caller's own
    backend.no_padding()
    backend.enable_truncation(max_seq_len, strategy="longest_first")
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        part = texts[start : start + TEXTS_AT_ONCE]
        if pairs is None:
            ids += encode_truncated(tokenizer, part, max_seq_len)
            continue
        both = list(zip(part, pairs[start : start + TEXTS_AT_ONCE], strict=True))
        for encoding in backend.encode_batch_fast(both):
            ids.append(np.array(encoding.ids, np.int32))
            types.append(np.array(encoding.type_ids, np.uint8))
    has_types = pairs is not None and "token_type_ids" in tokenizer.model_input_names
    return TokenizedTexts.join(ids, types if has_types else None)


class ClassificationLoader:
    """Implements `batch.Loader` for examples in memory.

    A batch is `batch_size` successive samples of the epoch's order: a permutation drawn from
    (seed, epoch) when shuffled, the files' order otherwise. It is the same on any number of
    ranks: rank r takes its samples r, r + world_size, ... A last batch may be short, so that
    ranks differ by a sample, and with fewer samples than ranks some have no microbatches.
    """

    def __init__(
        self,
        texts: TokenizedTexts,
        labels: Sequence[Any] | NDArray[Any],
        *,
        max_seq_len: int,
        pad_token_id: int,
        batch_size: int,
        microbatch_samples: int,
        packed: bool,
        grid: bool,
        shuffle: bool,
        drop_last: bool,
        seed: int,
        multiple: int = 1,
        subset_batches: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert len(texts) == len(labels)
        self.texts = texts
        self.labels = labels
        self.max_seq_len = max_seq_len
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.microbatch_samples = microbatch_samples
        self.make = pack_samples if packed else partial(pad_samples, multiple=multiple)
        self.grid = grid
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.num_samples = len(texts)
        if drop_last:
            self.num_samples -= self.num_samples % batch_size
        if subset_batches is not None and subset_batches >= 0:
            self.num_samples = min(self.num_samples, subset_batches * batch_size)
        if self.num_samples == 0:
            raise ConfigError(
                f"{len(texts)} samples in batches of {batch_size}, drop_last: {drop_last}, subset: "
                f"{subset_batches} batches: not one batch is left. Lower global_train_batch_size, "
                "or set drop_last: false."
            )

    def steps_in_epoch(self, epoch: int, sample_in_epoch: int = 0) -> int:
        """How many steps are left of `epoch` from that sample on."""
        left = max(self.num_samples - sample_in_epoch, 0)
        return left // self.batch_size if self.drop_last else -(-left // self.batch_size)

    def steps(self, epoch: int, sample_in_epoch: int = 0) -> Iterator[Step]:
        """The share of this rank in each of the epoch's batches, from that sample on."""
        order = self._order(epoch)
        for number in range(self.steps_in_epoch(epoch, sample_in_epoch)):
            start = sample_in_epoch + number * self.batch_size
            chosen = order[start : min(start + self.batch_size, self.num_samples)]
            share = chosen[self.rank :: self.world_size]
            microbatches = self.make(
                [self.texts.sample(i, _plain(self.labels[i])) for i in share],
                max_samples=self.microbatch_samples,
                max_seq_len=self.max_seq_len,
                pad_token_id=self.pad_token_id,
                grid=self.grid,
            )
            after = start + len(chosen)
            is_last = self.steps_in_epoch(epoch, after) == 0
            yield Step(microbatches, len(chosen), epoch + is_last, 0 if is_last else after)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(len(self.texts))
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.texts))


def _plain(label: Any) -> Any:
    """A Python number where the label is one, which is how `Sample` tells the kinds apart."""
    return label.item() if isinstance(label, np.generic) else label


def build_classification_loader(
    examples: Examples | TokenExamples,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_seq_len: int,
    batch_size: int,
    microbatch_samples: int,
    packed: bool,
    grid: bool,
    shuffle: bool,
    drop_last: bool,
    seed: int,
    multiple: int = 1,
    subset_batches: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> ClassificationLoader:
    """Tokenise examples and put them in batches of `batch_size` over all ranks.

    `microbatch_samples` is how many samples of full length fit a microbatch; `subset_batches`
    (None or -1: all) cuts each epoch short. For evaluation: no `shuffle`, no `drop_last`.
    `multiple` is that of `pad_samples`.

    Raises:
        ConfigError: not one batch is left.
    """
    labels: Sequence[Any] | NDArray[Any]
    if isinstance(examples, TokenExamples):
        ids, labels = tokenize_words(examples, tokenizer, max_seq_len)
        texts = TokenizedTexts.join(ids)
    else:
        texts = tokenize_texts(examples.texts, examples.pairs, tokenizer, max_seq_len)
        labels = examples.labels
    return ClassificationLoader(
        texts,
        labels,
        max_seq_len=max_seq_len,
        pad_token_id=tokenizer.pad_token_id,
        batch_size=batch_size,
        microbatch_samples=microbatch_samples,
        packed=packed,
        grid=grid,
        shuffle=shuffle,
        drop_last=drop_last,
        seed=seed,
        multiple=multiple,
        subset_batches=subset_batches,
        rank=rank,
        world_size=world_size,
    )
