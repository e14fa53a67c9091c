"""Entities of tagged words: spans by hand, in every scheme, and their scores."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import ALONE

from mosaicbert.batch import IGNORE_INDEX, Batch, LossOutput
from mosaicbert.errors import ConfigError
from mosaicbert.train.metrics import entities, token_metric


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("", set()),
        ("O O", set()),
        ("B-PER I-PER O B-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),
        ("B-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("I-PER I-PER O", {("PER", 0, 2)}),  # IOB1
        ("I-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),  # IOB1: B parts two of a type
        ("B-PER I-LOC", {("PER", 0, 1), ("LOC", 1, 2)}),
        ("O I-LOC I-PER", {("LOC", 1, 2), ("PER", 2, 3)}),
        ("S-PER B-LOC I-LOC E-LOC", {("PER", 0, 1), ("LOC", 1, 4)}),  # IOBES
        ("B-LOC E-LOC I-LOC", {("LOC", 0, 2), ("LOC", 2, 3)}),
        ("E-LOC S-LOC", {("LOC", 0, 1), ("LOC", 1, 2)}),
        ("U-PER B-LOC L-LOC", {("PER", 0, 1), ("LOC", 1, 3)}),  # BILOU
        ("PER PER O LOC", {("PER", 0, 2), ("LOC", 3, 4)}),  # bare types
        ("B-a-b I-a-b", {("a-b", 0, 2)}),
        ("NOUN-X", {("NOUN-X", 0, 1)}),
    ],
)
def test_by_hand(tags, spans):
    assert entities(tags.split()) == spans


SPANS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 3), st.integers(0, 2)))


@pytest.mark.parametrize("scheme", ["BIIB", "BIES", "BILU"])  # first, inside, last, alone
@given(spans=SPANS)
def test_what_was_written_is_read(scheme, spans):
    tags, wanted = ["O"], set()
    first, inside, last, alone = scheme
    for kind, length, gap in spans:
        wanted.add((kind, len(tags), len(tags) + length))
        prefixes = [alone] if length == 1 else [first, *inside * (length - 2), last]
        tags += [f"{prefix}-{kind}" for prefix in prefixes] + ["O"] * gap
    assert entities(tags) == wanted


TAGS = ("O", "B-X", "I-X")
SENTENCES = [  # true and predicted
    ([1, 2, 0], [1, 2, 0]),  # right
    ([1, 2], [1, 0]),  # too short
    ([0, 2], [0, 2]),  # right; would join the sentence before if there were no border
]


def scores(packed, names=("entity_f1", "entity_precision", "entity_recall", "accuracy")):
    metric = token_metric(names, TAGS)()
    rows = []
    for true, predicted in SENTENCES:  # [CLS] word word-piece ... [SEP]
        labels = [IGNORE_INDEX, *(x for tag in true for x in (tag, IGNORE_INDEX)), IGNORE_INDEX]
        guess = [1, *(x for tag in predicted for x in (tag, 1)), 1]
        rows.append((torch.tensor(labels), torch.eye(3)[guess]))
    if packed:
        labels = torch.cat([*(row[0] for row in rows), torch.full((3,), IGNORE_INDEX)])
        ends = torch.tensor([0, *(len(row[0]) for row in rows), 3, 0]).cumsum(0)
        logits = torch.cat([*(row[1] for row in rows), torch.eye(3)])
    else:
        pad = torch.nn.utils.rnn.pad_sequence
        labels = pad([row[0] for row in rows], batch_first=True, padding_value=IGNORE_INDEX)
        logits, ends = pad([row[1] for row in rows], batch_first=True), None
    batch = Batch(labels, labels, 7, 0, 3, 0, cu_seqlens=ends)
    metric.update(LossOutput(torch.tensor(14.0), logits), batch)
    return metric.compute(ALONE)


@pytest.mark.parametrize("packed", [False, True])
def test_scores(packed):
    assert scores(packed) == pytest.approx(
        {
            "loss": 2.0,
            "entity_f1": 2 / 3,
            "entity_precision": 2 / 3,
            "entity_recall": 2 / 3,
            "accuracy": 6 / 7,
        }
    )


def test_nothing_to_find_is_zero_and_names_are_checked():
    metric = token_metric(("entity_f1", "entity_recall"), TAGS)()
    labels = torch.zeros(1, 2, dtype=torch.long)
    metric.update(
        LossOutput(torch.tensor(0.0), torch.eye(3)[labels]), Batch(labels, labels, 2, *[0] * 3)
    )
    assert metric.compute(ALONE) == {"loss": 0.0, "entity_f1": 0.0, "entity_recall": 0.0}
    with pytest.raises(ConfigError, match='Did you mean "entity_f1"'):
        token_metric(("entity_f",), TAGS)
