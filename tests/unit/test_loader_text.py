"""The text loader: the same global batches on any ranks, workers and resumes."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_sets import (
    BERT,
    CLS,
    SEP,
    expected_ids,
    loader,
    sequences,
    texts,
    true_ids,
    write_set,
)

from mosaicbert.errors import ConfigError, DataError

# Python 3.12 warns of every fork of a process with threads; what is forked here takes no locks.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_set(folder, [{"text": text} for text in texts()], {"text": "str"})


def test_natural_order_is_the_texts(data: Path) -> None:
    steps = list(loader(data, shuffle=False, drop_last=False).steps(0))
    assert [step.num_samples for step in steps] == [8] * 6 + [2]
    expected = expected_ids(texts())
    for number, step in enumerate(steps):
        assert true_ids(step) == sorted(expected[8 * number : 8 * number + 8])
    assert [(s.epoch, s.sample_in_epoch) for s in steps][-2:] == [(0, 48), (1, 0)]


def test_an_epoch_has_each_text_once_and_epochs_differ(data: Path) -> None:
    whole = loader(data, drop_last=False)
    epochs = [[sequences(step) for step in whole.steps(epoch)] for epoch in (0, 1)]
    for epoch in range(2):
        found = sorted(ids for step in whole.steps(epoch) for ids in true_ids(step))
        assert found == sorted(expected_ids(texts()))
    assert epochs[0] != epochs[1]
    assert epochs[0] == [sequences(step) for step in whole.steps(0)]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("sample", [0, 13])
def test_ranks_share_the_same_global_batches(data: Path, world_size: int, sample: int) -> None:
    alone = [sequences(step) for step in loader(data).steps(1, sample)]
    ranks = [loader(data, rank=r, world_size=world_size) for r in range(world_size)]
    together = [
        sorted(sample for step in steps for sample in sequences(step))
        for steps in zip(*(rank.steps(1, sample) for rank in ranks), strict=True)
    ]
    assert together == alone


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 99),
    block=st.integers(1, 60),
    epoch=st.integers(0, 2),
    start=st.integers(0, 49),
    world_size=st.sampled_from([1, 2, 4]),
    long_documents=st.sampled_from(["truncate", "chunk"]),
)
def test_a_resume_at_any_sample_on_any_ranks_has_the_same_samples_and_masks(
    data: Path,
    seed: int,
    block: int,
    epoch: int,
    start: int,
    world_size: int,
    long_documents: str,
) -> None:
    """One rank takes the epoch sample by sample; others join it at `start` in batches of 8."""
    same = {
        "shuffle_seed": seed,
        "shuffle_block_size": block,
        "long_documents": long_documents,
        "max_seq_len": 16,
        "drop_last": False,
    }
    single = loader(data, batch_size=1, **same)
    one_by_one = [sequences(step)[0] for step in single.steps(epoch)]
    assert len(one_by_one) == single.num_samples
    ranks = [loader(data, rank=r, world_size=world_size, **same) for r in range(world_size)]
    at = start
    for steps in zip(*(rank.steps(epoch, start) for rank in ranks), strict=True):
        found = sorted(sample for step in steps for sample in sequences(step))
        assert found == sorted(one_by_one[at : at + 8])
        at += len(found)
    assert at == single.num_samples


def test_resume_goes_on(data: Path) -> None:
    whole = loader(data)
    steps = list(whole.steps(0))
    assert len(steps) == whole.steps_in_epoch(0) == 6
    assert whole.num_samples == 48
    at = steps[2].sample_in_epoch
    rest = list(loader(data).steps(steps[2].epoch, at))
    assert len(rest) == whole.steps_in_epoch(0, at) == 3
    assert [sequences(step) for step in rest] == [sequences(step) for step in steps[3:]]
    assert (steps[-1].epoch, steps[-1].sample_in_epoch) == (1, 0)


def test_workers_change_nothing(data: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    inside, outside = loader(data), loader(data, num_workers=2)
    for epoch, start in ((0, 0), (1, 5)):
        for mine, theirs in zip(
            inside.steps(epoch, start), outside.steps(epoch, start), strict=True
        ):
            assert (mine.num_samples, mine.sample_in_epoch) == (
                theirs.num_samples,
                theirs.sample_in_epoch,
            )
            for first, second in zip(mine.microbatches, theirs.microbatches, strict=True):
                assert first.num_targets == second.num_targets
                assert first.tensors().keys() == second.tensors().keys()
                for name, tensor in first.tensors().items():
                    assert torch.equal(tensor, second.tensors()[name])
    abandoned = outside.steps(0)
    next(abandoned)
    again = next(outside.steps(2))
    assert sequences(again) == sequences(next(inside.steps(2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_padded_batches_have_the_same_samples_and_masks(data: Path) -> None:
    packed = [sequences(step) for step in loader(data).steps(0)]
    padded = [sequences(step) for step in loader(data, packed=False).steps(0)]
    assert packed == padded


def test_evaluation_is_fixed(data: Path) -> None:
    fixed = loader(data, training=False, shuffle=False, drop_last=False)
    first = [sequences(step) for step in fixed.steps(0)]
    assert [sequences(step) for step in fixed.steps(7)] == first
    assert [step.epoch for step in fixed.steps(7)][-1] == 8


def test_masks_change_from_epoch_to_epoch(data: Path) -> None:
    training = loader(data, shuffle=False)
    assert [sequences(step) for step in training.steps(0)] != [
        sequences(step) for step in training.steps(1)
    ]


def test_batch_size_may_grow(data: Path) -> None:
    growing = loader(data, batch_size=lambda done: 4 if done < 12 else 16, drop_last=False)
    sizes = [step.num_samples for step in growing.steps(0)]
    assert sizes == [4, 4, 4, 16, 16, 6]
    assert growing.steps_in_epoch(0) == 6
    assert [step.num_samples for step in growing.steps(1)] == [16, 16, 16, 2]


def test_subset_of_batches(data: Path) -> None:
    part = loader(data, subset_batches=3, drop_last=False)
    assert part.num_samples == 24
    steps = list(part.steps(0))
    assert len(steps) == part.steps_in_epoch(0) == 3
    assert (steps[-1].epoch, steps[-1].sample_in_epoch) == (1, 0)
    assert loader(data, subset_batches=-1).num_samples == 48


@pytest.mark.parametrize("length", ["96sp", "12ba", "2ep"])
def test_mask_rate_moves_over_the_run(data: Path, length: str) -> None:
    moving = loader(data, mlm_probability=[0.0, 1.0], max_duration=length)
    shares = []
    for epoch in (0, 1):
        for step in moving.steps(epoch):
            targets = sum(batch.num_targets for batch in step.microbatches)
            tokens = sum(batch.num_tokens - 2 * batch.num_samples for batch in step.microbatches)
            shares.append(targets / tokens)
    np.testing.assert_allclose(shares, np.linspace(1 / 24, 23 / 24, 12), atol=0.12)


def test_mask_rates_that_cannot_be(data: Path) -> None:
    moving = {"mlm_probability": [0.3, 0.15]}
    for length, size in ((None, 8), ("5000tok", 8), ("1h", 8), ("9ba", lambda done: 8)):
        with pytest.raises(ConfigError, match="does not tell its samples"):
            loader(data, max_duration=length, batch_size=size, **moving)
    assert loader(data, training=False, **moving).num_samples == 48
    with pytest.raises(ConfigError, match="the first and the last"):
        loader(data, mlm_probability=[0.3, 0.2, 0.15])


def test_bare_ids_give_what_text_gives(data: Path, tmp_path: Path) -> None:
    ids = [BERT(text, add_special_tokens=False)["input_ids"] for text in texts()]
    rows = [{"input_ids": np.array(one, np.uint16)} for one in ids]
    other = write_set(tmp_path, rows, {"input_ids": "ndarray:uint16"})
    for long_documents in ("truncate", "chunk"):
        same = {"shuffle": False, "long_documents": long_documents, "max_seq_len": 16}
        first = [sequences(step) for step in loader(data, **same).steps(0)]
        second = [sequences(step) for step in loader(other, **same).steps(0)]
        assert first == second


def test_concatenated_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [[CLS, 2000 + i, 2001, SEP, 2002, 2003, 2004, SEP] for i in range(20)]
    samples = [{"tokens": np.array(row, "<i8").tobytes()} for row in rows]
    data = write_set(tmp_path, samples, {"tokens": "bytes"})
    steps = list(loader(data, max_seq_len=8, shuffle=False, eos_token_id=2001).steps(0))
    found = [
        batch.input_ids.view(-1, 8)[i]
        for step in steps
        for batch in step.microbatches
        for i in range(batch.num_samples)
    ]
    assert {len(row) for row in found} == {8}
    labels = torch.cat([batch.labels for step in steps for batch in step.microbatches]).tolist()
    assert 2001 not in labels
    assert not {CLS, SEP} & set(labels)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_chunks_use_all_of_every_document(data: Path, shuffle: bool, world_size: int) -> None:
    settings = {"long_documents": "chunk", "max_seq_len": 8, "drop_last": False}
    ranks = [
        loader(data, rank=r, world_size=world_size, shuffle=shuffle, **settings)
        for r in range(world_size)
    ]
    content: dict[int, int] = {}
    for rank in ranks:
        for step in rank.steps(0):
            for ids in true_ids(step):
                assert len(ids) <= 8
                for token in ids[1:-1]:
                    content[token] = content.get(token, 0) + 1
    expected: dict[int, int] = {}
    for text in texts():
        for token in BERT(text, add_special_tokens=False)["input_ids"]:
            expected[token] = expected.get(token, 0) + 1
    assert content == expected
    assert ranks[0].num_samples == sum(
        -(-len(BERT(text, add_special_tokens=False)["input_ids"]) // 6) for text in texts()
    )


def test_chunk_counts_are_kept_beside_the_shards(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    for kept in copy.glob("train/.*.chunks.npy"):
        kept.unlink()
    settings = {"long_documents": "chunk", "max_seq_len": 8}
    first = loader(copy, **settings)
    kept = sorted(copy.glob("train/.*.chunks.npy"))
    assert len(kept) == len(list(copy.glob("train/*.mds")))
    times = [path.stat().st_mtime_ns for path in kept]
    assert loader(copy, **settings).num_samples == first.num_samples
    assert [path.stat().st_mtime_ns for path in kept] == times
    kept[0].write_bytes(b"damaged")
    assert loader(copy, **settings).num_samples == first.num_samples
    loader(copy, **{**settings, "max_seq_len": 9})
    assert len(list(copy.glob("train/.*.chunks.npy"))) == 2 * len(kept)
    assert not list(copy.glob("train/.*.lock"))


def test_streams_are_mixed(data: Path, tmp_path: Path) -> None:
    other = write_set(tmp_path, [{"text": "seven"}] * 10, {"text": "str"})
    mixed = loader(
        None,
        split=None,
        drop_last=False,
        streams={
            "first": {"local": str(data), "split": "train", "samples": 30},
            "second": {"local": str(other), "split": "train", "repeat": 3},
        },
    )
    assert mixed.num_samples == 60
    seven = expected_ids(["seven"])[0]
    counts = [true_ids(step).count(seven) for step in mixed.steps(0)]
    assert sum(counts) == 30
    assert max(counts) < 8


def test_fewer_samples_than_a_batch(data: Path) -> None:
    with pytest.raises(DataError, match="50 samples make not one batch of 64"):
        loader(data, batch_size=64)
    assert loader(data, batch_size=64, drop_last=False).num_samples == 50


def test_workers_can_be_started_by_pickling(data: Path) -> None:
    """As where processes are spawned, not forked."""
    for long_documents in ("truncate", "chunk"):
        made = loader(data, long_documents=long_documents)
        next(made.steps(0))
        again = pickle.loads(pickle.dumps(made._dataset))
        first, second = (dataset.make((0, 0, 8)) for dataset in (made._dataset, again))
        assert [b.input_ids.tolist() for b in first] == [b.input_ids.tolist() for b in second]
