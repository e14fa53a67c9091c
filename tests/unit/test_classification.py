"""Fine-tuning batches: the same on any number of ranks, resumed anywhere, each example once."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedTokenizerFast

from mosaicbert.batch import IGNORE_INDEX, Batch, Loader, Step
from mosaicbert.data.classification import (
    ClassificationLoader,
    TokenizedTexts,
    build_classification_loader,
    tokenize_texts,
)
from mosaicbert.data.examples import Examples, sample_examples
from mosaicbert.data.tokenizers import load_tokenizer
from mosaicbert.errors import ConfigError
from mosaicbert.glue_suite.data import load_task
from mosaicbert.glue_suite.tasks import TASKS

SETTINGS: dict[str, Any] = {
    "max_seq_len": 16,
    "microbatch_samples": 4,
    "packed": True,
    "grid": False,
    "shuffle": True,
    "drop_last": False,
    "seed": 5,
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer("bert-base-uncased")


def numbered(size: int, labels: Any = None, **changes: Any) -> ClassificationLoader:
    """A loader of `size` samples; sample i is the token 1000 + i, 1 + i % 7 times."""
    lengths = 1 + np.arange(size) % 7
    texts = TokenizedTexts(
        np.repeat(1000 + np.arange(size), lengths).astype(np.int32),
        None,
        np.cumsum([0, *lengths]),
    )
    labels = np.arange(size) if labels is None else labels
    settings = {**SETTINGS, "batch_size": 8, "pad_token_id": 0, **changes}
    return ClassificationLoader(texts, labels, **settings)


def members(batch: Batch) -> list[int]:
    """The samples of a batch, told by their tokens; checks that labels go with them."""
    if batch.cu_seqlens is None:
        firsts = batch.input_ids[:, 0][batch.attention_mask.sum(1) > 0]  # type: ignore[union-attr]
    else:
        firsts = batch.input_ids[batch.cu_seqlens[:-1][batch.cu_seqlens.diff() > 0].long()]
    found = [int(i) - 1000 for i in firsts if i >= 1000]
    assert batch.labels[: len(found)].tolist() == found
    assert (batch.labels[len(found) :] == IGNORE_INDEX).all()
    assert batch.num_samples == batch.num_targets == len(found)
    return found


def batches(loaders: list[ClassificationLoader], epoch: int, sample: int = 0) -> list[list[int]]:
    """The members of each global batch, gathered from all ranks, sorted."""
    merged = []
    for steps in zip(*(x.steps(epoch, sample) for x in loaders), strict=True):
        assert len({(s.num_samples, s.epoch, s.sample_in_epoch) for s in steps}) == 1
        merged.append(sorted(i for s in steps for b in s.microbatches for i in members(b)))
        assert len(merged[-1]) == steps[0].num_samples
    return merged


@given(
    size=st.integers(1, 70),
    batch_size=st.integers(1, 20),
    world_size=st.integers(1, 5),
    resume_at=st.integers(0, 70),
    flags=st.tuples(*[st.booleans()] * 4),
)
def test_ranks_and_resuming_change_nothing(
    size: int, batch_size: int, world_size: int, resume_at: int, flags: tuple[bool, ...]
) -> None:
    shuffle, drop_last, packed, grid = flags
    drop_last &= size >= batch_size
    changes: dict[str, Any] = {
        "batch_size": batch_size,
        "shuffle": shuffle,
        "drop_last": drop_last,
        "packed": packed,
        "grid": grid,
    }
    alone = numbered(size, **changes)
    whole = batches([alone], 3)
    seen = [i for batch in whole for i in batch]
    assert len(seen) == len(set(seen)) == alone.num_samples
    assert alone.num_samples == (size - size % batch_size if drop_last else size)
    assert len(whole) == alone.steps_in_epoch(3)
    ranks = [
        numbered(size, rank=rank, world_size=world_size, **changes) for rank in range(world_size)
    ]
    assert batches(ranks, 3) == whole
    resume_at -= resume_at % batch_size
    assert batches(ranks, 3, resume_at) == whole[resume_at // batch_size :]


def test_it_is_a_loader_and_says_where_the_next_batch_starts() -> None:
    loader: Loader = numbered(20)
    positions = [(s.num_samples, s.epoch, s.sample_in_epoch) for s in loader.steps(0)]
    assert positions == [(8, 0, 8), (8, 0, 16), (4, 1, 0)]
    positions = [(s.num_samples, s.epoch, s.sample_in_epoch) for s in loader.steps(0, 5)]
    assert positions == [(8, 0, 13), (7, 1, 0)]
    loader = numbered(20, drop_last=True)
    assert [(s.epoch, s.sample_in_epoch) for s in loader.steps(0)] == [(0, 8), (1, 0)]


def test_shuffled_anew_each_epoch_and_in_order_without() -> None:
    assert batches([numbered(40)], 0) != batches([numbered(40)], 1)
    assert batches([numbered(40)], 0) != batches([numbered(40, seed=6)], 0)
    in_order = numbered(9, shuffle=False, batch_size=3)
    assert batches([in_order], 0) == batches([in_order], 1) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_a_subset_of_batches() -> None:
    whole = batches([numbered(40)], 2)
    for subset, left in ((2, 2), (100, 5), (-1, 5), (None, 5)):
        assert batches([numbered(40, subset_batches=subset)], 2) == whole[:left]
    for changes in ({"subset_batches": 0}, {"batch_size": 41, "drop_last": True}):
        with pytest.raises(ConfigError, match="not one batch"):
            numbered(40, **changes)


def test_kinds_of_labels() -> None:
    def only(labels: Any) -> torch.Tensor:
        (step,) = numbered(len(labels), labels, shuffle=False, grid=True).steps(0)
        (batch,) = step.microbatches
        return batch.labels

    classes = only(np.array([2, 0, 1]))
    assert classes.dtype == torch.int64
    assert classes[:3].tolist() == [2, 0, 1]
    assert (classes[3:] == IGNORE_INDEX).all()
    numbers = only(np.array([0.5, 1.0], np.float32))
    assert numbers.dtype == torch.float32
    assert numbers[:2].tolist() == [0.5, 1.0]
    assert numbers[2:].isnan().all()
    several = only(np.array([[0, 1, 1], [1, 0, 0]], np.float32))
    assert several.shape[1] == 3
    assert several[:2].tolist() == [[0, 1, 1], [1, 0, 0]]
    assert several[2:].isnan().all()


LONG = " ".join(["a long text, naïve and (quoted)"] * 30)


@pytest.mark.parametrize("max_seq_len", [7, 16, 64])
def test_tokens_are_those_of_hugging_face(max_seq_len: int) -> None:
    texts = ["", "short", LONG, LONG, "word", LONG]
    pairs = ["other", LONG, "short", LONG, "", "half " * 10]
    for second in (None, pairs):
        found = tokenize_texts(texts, second, tokenizer(), max_seq_len)
        wanted = tokenizer()(texts, second, truncation="longest_first", max_length=max_seq_len)
        for i in range(len(texts)):
            sample = found.sample(i, 0)
            assert sample.input_ids.tolist() == wanted["input_ids"][i]
            if second is None:
                assert sample.token_type_ids is None
            else:
                assert sample.token_type_ids is not None
                assert sample.token_type_ids.tolist() == wanted["token_type_ids"][i]


def test_tokenising_leaves_the_tokenizer_as_it_was() -> None:
    tokenize_texts([LONG], [LONG], tokenizer(), 8)
    assert len(tokenizer()(LONG)["input_ids"]) > 100


def test_max_seq_len_is_no_part_of_a_cache() -> None:
    lengths = [len(tokenize_texts([LONG], [LONG], tokenizer(), n).input_ids) for n in (64, 32, 64)]
    assert lengths == [64, 32, 64]


def loader_for(examples: Examples, **changes: Any) -> ClassificationLoader:
    settings = {**SETTINGS, "batch_size": 16, "microbatch_samples": 16, "max_seq_len": 64}
    return build_classification_loader(examples, tokenizer(), **{**settings, **changes})


def test_packed_and_padded_batches_hold_the_same_pairs() -> None:
    examples = load_task(TASKS["mrpc"], "sample", "validation")
    packed: Step = next(loader_for(examples, shuffle=False).steps(0))
    padded: Step = next(loader_for(examples, shuffle=False, packed=False).steps(0))
    (flat,), (square,) = packed.microbatches, padded.microbatches
    assert square.attention_mask is not None
    mask = square.attention_mask.bool()
    assert flat.input_ids.tolist() == square.input_ids[mask].tolist()
    assert flat.token_type_ids is not None
    assert square.token_type_ids is not None
    assert flat.token_type_ids.tolist() == square.token_type_ids[mask].tolist()
    assert flat.token_type_ids.sum() > 100
    assert flat.labels.tolist() == square.labels.tolist() == examples.labels[:16].tolist()


def test_a_small_model_learns_the_bundled_task() -> None:
    whole = sample_examples("train")
    train, validation = whole.take(range(400)), whole.take(range(400, 600))
    torch.manual_seed(0)
    model = nn.EmbeddingBag(1024, train.num_labels, mode="mean")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    loader = loader_for(train, drop_last=True)
    for epoch in range(3):
        for step in loader.steps(epoch):
            for batch in step.microbatches:
                assert batch.cu_seqlens is not None
                logits = model(batch.input_ids % 1024, batch.cu_seqlens[:-1].long())
                nn.functional.cross_entropy(logits, batch.labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    right = 0
    for step in loader_for(validation, shuffle=False).steps(0):
        for batch in step.microbatches:
            assert batch.cu_seqlens is not None
            logits = model(batch.input_ids % 1024, batch.cu_seqlens[:-1].long())
            right += int((logits.argmax(1) == batch.labels).sum())
    assert right / len(validation) > 0.6
