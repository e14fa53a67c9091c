"""A model over many texts at once: sorted by length, run, put back in order.

Padding is next to none, and Mosaic BERT computes none.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from mosaicbert.batch import IGNORE_INDEX
from mosaicbert.data.classification import TokenizedTexts
from mosaicbert.data.tokens import TokenExamples, tokenize_words
from mosaicbert.models.padded import mean

TOKENS_AT_ONCE = {"cuda": 65_536, "cpu": 4_096}

Array = NDArray[Any]
Precision = Literal["fp32", "bf16"]
Head = Callable[[Any, dict[str, Tensor]], Tensor]
"""`(model, inputs of its forward) -> (batch, ...)` or, for tokens, `(batch, seq, ...)`."""


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What a classifier gives."""
    return model(**inputs).logits  # type: ignore[no-any-return]


def mean_states(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The mean of the last hidden states over the real tokens: `(batch, hidden)`."""
    return mean(model(**inputs).last_hidden_state, inputs["attention_mask"])


@torch.inference_mode()
def run_batches(
    model: nn.Module,
    texts: TokenizedTexts,
    head: Head,
    *,
    pad_token_id: int,
    precision: Precision | None = None,
) -> Iterator[tuple[Array, Tensor]]:
    """Run texts, the longest first, in evaluation mode.

    `precision`: default `bf16` (autocast) on a GPU, `fp32` on a CPU.

    Yields:
        indices of the texts `(batch,)`, and what `head` gives for them.
    """
    device = next(model.parameters()).device
    autocast = (precision or ("bf16" if device.type == "cuda" else "fp32")) == "bf16"
    lengths = np.diff(texts.offsets)
    order = np.argsort(-lengths, kind="stable")
    was_training = model.training
    model.eval()
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        rows = order[start : start + max(1, TOKENS_AT_ONCE[device.type] // longest)]
        start += len(rows)
        inputs = {
            name: x.to(device, non_blocking=True) for name, x in _pad(texts, rows, pad_token_id)
        }
        with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
            yield rows, head(model, inputs)
    model.train(was_training)


def _pad(texts: TokenizedTexts, rows: Array, pad_token_id: int) -> Iterator[tuple[str, Tensor]]:
    lengths = np.diff(texts.offsets)[rows]
    mask = np.arange(lengths.max()) < lengths[:, None]
    places = np.concatenate([np.arange(texts.offsets[i], texts.offsets[i + 1]) for i in rows])
    ids = np.full(mask.shape, pad_token_id, np.int64)
    ids[mask] = texts.input_ids[places]
    yield "input_ids", torch.from_numpy(ids)
    yield "attention_mask", torch.from_numpy(mask.astype(np.int64))
    if texts.token_type_ids is not None:
        types = np.zeros_like(ids)
        types[mask] = texts.token_type_ids[places]
        yield "token_type_ids", torch.from_numpy(types)


def run_texts(
    model: nn.Module,
    texts: TokenizedTexts,
    head: Head,
    *,
    pad_token_id: int,
    precision: Precision | None = None,
) -> Array:
    """`(num_texts, ...)` float32, in the order of the texts."""
    found: Array | None = None
    for rows, values in run_batches(
        model, texts, head, pad_token_id=pad_token_id, precision=precision
    ):
        if found is None:
            found = np.empty((len(texts), *values.shape[1:]), np.float32)
        found[rows] = values.float().cpu().numpy()
    assert found is not None
    return found


def run_words(
    model: nn.Module,
    sentences: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerFast,
    max_seq_len: int,
    precision: Precision | None = None,
) -> list[Array]:
    """Probabilities of the tags, `(num_words, num_labels)` float32 for each sentence.

    A word's is that of its first token; one that gives no token has zeros.
    """
    ends = np.cumsum([len(words) for words in sentences])
    numbers = np.split(np.arange(ends[-1]), ends[:-1])
    numbered = TokenExamples([list(words) for words in sentences], numbers, ())
    ids, labels = tokenize_words(numbered, tokenizer, max_seq_len)  # labels: number of the word
    texts = TokenizedTexts.join(ids)
    found: Array | None = None
    for rows, values in run_batches(
        model, texts, logits, pad_token_id=tokenizer.pad_token_id, precision=precision
    ):
        if found is None:
            found = np.zeros((int(ends[-1]), values.shape[-1]), np.float32)
        words = np.full(values.shape[:2], IGNORE_INDEX, np.int64)
        for at, row in enumerate(rows):
            words[at, : len(labels[row])] = labels[row]
        real = torch.from_numpy(words != IGNORE_INDEX).to(values.device)
        found[words[words != IGNORE_INDEX]] = values[real].float().softmax(-1).cpu().numpy()
    assert found is not None
    return np.split(found, ends[:-1])
