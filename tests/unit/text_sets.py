"""Small data sets of text, loaders for them, and what their steps hold."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mosaicbert.batch import IGNORE_INDEX, Step
from mosaicbert.config.sections import DatasetConfig, LoaderConfig
from mosaicbert.data.loader import build_text_loader
from mosaicbert.data.mds import MDSWriter
from mosaicbert.data.steps import StepLoader
from mosaicbert.data.tokenizers import load_tokenizer
from mosaicbert.duration import Duration

BERT = load_tokenizer("bert-base-uncased")
WORDS = [
    "the",
    "of",
    "and",
    "market",
    "window",
    "river",
    "paper",
    "seven",
    "engine",
    "garden",
    "plain",
    "history",
]
CLS, SEP, MASK = 101, 102, 103


def texts(count: int = 50) -> list[str]:
    generator = np.random.default_rng(3)
    return [
        f"{number} " + " ".join(generator.choice(WORDS, generator.integers(1, 40)))
        for number in range(1000, 1000 + count)
    ]


def write_set(folder: Path, rows: list[dict[str, Any]], column: dict[str, str]) -> Path:
    with MDSWriter(folder / "train", column, size_limit=1500) as writer:
        for row in rows:
            writer.write(row)
    return folder


def loader(
    local: Path | None,
    *,
    batch_size: int | Callable[[int], int] = 8,
    num_workers: int = 0,
    drop_last: bool = True,
    pin_memory: bool | None = None,
    timeout: int = 60,
    rank: int = 0,
    world_size: int = 1,
    packed: bool = True,
    training: bool = True,
    max_duration: str | None = None,
    subset_batches: int | None = None,
    **dataset: Any,
) -> StepLoader:
    settings = {"split": "train", "shuffle": True, "max_seq_len": 32, "shuffle_block_size": 20}
    return build_text_loader(
        LoaderConfig(
            dataset=DatasetConfig(local=local and str(local), **{**settings, **dataset}),
            num_workers=num_workers,
            drop_last=drop_last,
            pin_memory=pin_memory,
            timeout=timeout,
        ),
        batch_size=batch_size,
        microbatch_samples=4,
        rank=rank,
        world_size=world_size,
        packed=packed,
        grid=False,
        training=training,
        mlm_probability=0.3,
        max_duration=Duration.parse(max_duration) if max_duration else None,
        subset_batches=subset_batches,
    )


def sequences(step: Step) -> list[tuple[int, ...]]:
    """The samples of a step with the true ids put back, and the masked ones: sorted."""
    found = []
    for batch in step.microbatches:
        masked = batch.input_ids.flatten()
        true = masked.clone()
        assert batch.target_positions is not None
        real = batch.labels != IGNORE_INDEX
        true[batch.target_positions[real]] = batch.labels[real]
        if batch.cu_seqlens is not None:
            bounds = batch.cu_seqlens.tolist()
            rows = [slice(a, b) for a, b in pairwise(bounds)]
        else:
            width = batch.input_ids.shape[1]
            rows = [slice(i * width, (i + 1) * width) for i in range(len(batch.input_ids))]
        for row in rows:
            length = int((true[row] == SEP).nonzero()[0, 0]) + 1
            found.append((*true[row].tolist()[:length], *masked[row].tolist()[:length]))
    return sorted(found)


def true_ids(step: Step) -> list[list[int]]:
    return sorted(list(both[: len(both) // 2]) for both in sequences(step))


def expected_ids(items: list[str], max_seq_len: int = 32) -> list[list[int]]:
    encoded = BERT(items, truncation=True, max_length=max_seq_len)
    return encoded["input_ids"]  # type: ignore[no-any-return]
