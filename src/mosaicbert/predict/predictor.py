"""A checkpoint ready to predict: its model, its tokenizer, and the columns it makes of texts."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from mosaicbert.data.classification import tokenize_texts
from mosaicbert.data.tables import Table
from mosaicbert.data.tokenizers import load_tokenizer
from mosaicbert.errors import ConfigError
from mosaicbert.models.checkpoints import load, read_state_dict, task_of
from mosaicbert.models.register import Task
from mosaicbert.models.weights import checkpoint_folder, local_copy
from mosaicbert.predict import batches
from mosaicbert.predict.batches import Array, Precision

log = logging.getLogger(__name__)

LONGEST = 512
"""Tokens of a text where neither the checkpoint nor the command line says."""
SHORTEST = 8
FILLS = 5
"""Candidates for each mask."""


@dataclass(frozen=True, slots=True)
class Predictor:
    """A model in evaluation mode on its device, and what it needs to read texts."""

    model: Any
    task: Task
    tokenizer: PreTrainedTokenizerFast
    max_seq_len: int
    precision: Precision | None = None

    def columns(self, texts: list[Any], pairs: list[str] | None = None) -> Table:
        """Columns of the output for texts (or, for tags, lists of words)."""
        return _COLUMNS[self._kind()](self, texts, pairs)

    def labels(self) -> list[str]:
        """Names of the model's outputs."""
        names = self.model.config.id2label
        return [names[i] for i in range(len(names))]

    def run(self, texts: list[str], pairs: list[str] | None, head: batches.Head) -> Array:
        """`(num_texts, ...)` float32."""
        tokenized = tokenize_texts(texts, pairs, self.tokenizer, self.max_seq_len)
        return batches.run_texts(
            self.model,
            tokenized,
            head,
            pad_token_id=self.tokenizer.pad_token_id,
            precision=self.precision,
        )

    def _kind(self) -> str:
        config = self.model.config
        if self.task != "classification":
            return self.task
        return config.problem_type or ("regression" if config.num_labels == 1 else "classification")


def load_predictor(
    checkpoint: str | Path,
    task: Task | None = None,
    *,
    tokenizer: str | None = None,
    max_seq_len: int | None = None,
    device: str | None = None,
    precision: Precision | None = None,
) -> Predictor:
    """A checkpoint ready to predict; `task` and tokenizer are its own where none is named.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it has no head for the task, or there is no such device.
        DataError: no tokenizer lies beside it.
    """
    if device not in (None, "cpu") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: torch sees no GPU here. Use --device cpu.")
    if max_seq_len is not None and max_seq_len < SHORTEST:
        raise ConfigError(f"--max_seq_len {max_seq_len}: {SHORTEST} tokens are the least.")
    use_gpu = device != "cpu" and torch.cuda.is_available()
    with local_copy(checkpoint) as local:
        found = task_of(*read_state_dict(local))
        task = task or (found if found != "mlm" else None)  # masks are filled on request only
        if task is None or not _fits(task, found):
            raise ConfigError(
                f"{checkpoint} has no head for {task or 'classification'}, but "
                f"{f'one for {found}' if found else 'an encoder alone'}. --embed takes any; "
                "--fill_mask a pre-trained model; mosaicbert classify makes a classifier."
            )
        model: Any = load(local, task)
        reader = load_tokenizer(tokenizer or str(checkpoint_folder(local)))
    own = reader.model_max_length
    limit = max_seq_len if max_seq_len is not None else own if own < 1e9 else LONGEST
    if model.config.model_type != "mosaic_bert" and not getattr(model.config, "alibi", False):
        limit = min(limit, model.config.max_position_embeddings)
    return Predictor(model.to("cuda" if use_gpu else "cpu"), task, reader, limit, precision)


def _fits(task: Task, found: Task | None) -> bool:
    """Whether a checkpoint with the head `found` can do `task`."""
    classifiers = ("classification", "token-classification")
    return task in ("embedding", found) or (task in classifiers and found in classifiers)


# --- columns, by what the model predicts ----------------------------------------------------------


def _classes(predictor: Predictor, texts: list[str], pairs: list[str] | None) -> Table:
    p = _softmax(predictor.run(texts, pairs, batches.logits))
    names = predictor.labels()
    return {
        "label": [names[i] for i in p.argmax(-1)],
        "probability": _rounded(p.max(-1)),
        **{f"probability_{name}": _rounded(p[:, i]) for i, name in enumerate(names)},
    }


def _several_labels(predictor: Predictor, texts: list[str], pairs: list[str] | None) -> Table:
    found = predictor.run(texts, pairs, batches.logits)
    p = 1 / (1 + np.exp(-found.astype(np.float64)))
    names = predictor.labels()
    return {
        "labels": [[n for n, on in zip(names, row, strict=True) if on] for row in p > 0.5],
        **{f"probability_{name}": _rounded(p[:, i]) for i, name in enumerate(names)},
    }


def _numbers(predictor: Predictor, texts: list[str], pairs: list[str] | None) -> Table:
    return {"value": _rounded(predictor.run(texts, pairs, batches.logits)[:, 0])}


def _tags(predictor: Predictor, texts: list[Any], _: list[str] | None) -> Table:
    words = [_cut(predictor, text) if isinstance(text, str) else text for text in texts]
    found = batches.run_words(
        predictor.model, words, predictor.tokenizer, predictor.max_seq_len, predictor.precision
    )
    names = predictor.labels()
    return {
        "tokens": words,
        "tags": [[names[i] for i in p.argmax(-1)] for p in found],
        "probabilities": [_rounded(p.max(-1)) for p in found],
    }


def _cut(predictor: Predictor, text: str) -> list[str]:
    """The words the tokenizer sees in a text: cut at spaces and punctuation, and around Chinese.

    What gives no token, such as a combining accent, stays with the word it stands at.
    """
    backend = predictor.tokenizer.backend_tokenizer
    backend.no_truncation()  # the last call of the tokenizer itself may have left one behind
    backend.no_padding()
    encoding = backend.encode(text, add_special_tokens=False)
    spans: dict[int, tuple[int, int]] = {}
    for word, (start, end) in zip(encoding.word_ids, encoding.offsets, strict=True):
        if word is not None:
            spans[word] = (spans.get(word, (start, end))[0], end)
    starts = [*(start for start, _ in spans.values()), len(text)]
    words = [
        text[start:end] + "".join(re.findall(r"^\S+", text[end:after]))
        for (start, end), after in zip(spans.values(), starts[1:], strict=True)
    ]
    return words or [text]


def _embeddings(predictor: Predictor, texts: list[str], pairs: list[str] | None) -> Table:
    return {"embedding": _rounded(predictor.run(texts, pairs, batches.mean_states))}


def _fills(predictor: Predictor, texts: list[str], pairs: list[str] | None) -> Table:
    tokenizer, model, limit = predictor.tokenizer, predictor.model, predictor.max_seq_len
    tokenized = tokenize_texts(texts, pairs, tokenizer, limit)

    def best(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
        states = model.bert(**inputs).last_hidden_state  # (batch, seq, hidden)
        masked = states[inputs["input_ids"] == tokenizer.mask_token_id]
        scores = model.cls.predictions(masked)[:, : model.config.vocab_size].float()
        return scores.softmax(-1).topk(FILLS)

    tokens: list[list[list[str]]] = [[] for _ in texts]
    probabilities: list[list[list[float]]] = [[] for _ in texts]
    for rows, top in batches.run_batches(
        model, tokenized, best, pad_token_id=tokenizer.pad_token_id, precision=predictor.precision
    ):
        values, indices = top
        found = zip(_rounded(values.cpu().numpy()), indices.tolist(), strict=True)
        for row in rows:
            part = tokenized.input_ids[tokenized.offsets[row] : tokenized.offsets[row + 1]]
            for p, ids in islice(found, int((part == tokenizer.mask_token_id).sum())):
                tokens[row].append(tokenizer.convert_ids_to_tokens(ids))
                probabilities[row].append(p)
    lost = sum(
        text.count(tokenizer.mask_token) > len(f) for text, f in zip(texts, tokens, strict=True)
    )
    if lost:
        log.warning("%d texts have masks behind their first %d tokens: not filled.", lost, limit)
    filled = []
    for text, fills in zip(texts, tokens, strict=True):
        for candidates in fills:
            text = text.replace(tokenizer.mask_token, candidates[0], 1)
        filled.append(text)
    return {"filled": filled, "tokens": tokens, "probabilities": probabilities}


_COLUMNS: dict[str, Callable[[Predictor, list[Any], list[str] | None], Table]] = {
    "classification": _classes,
    "single_label_classification": _classes,
    "multi_label_classification": _several_labels,
    "regression": _numbers,
    "token-classification": _tags,
    "embedding": _embeddings,
    "mlm": _fills,
}


def _softmax(found: Array) -> Array:
    shifted = np.exp(found.astype(np.float64) - found.max(-1, keepdims=True))
    p: Array = shifted / shifted.sum(-1, keepdims=True)
    return p


def _rounded(values: Array) -> list[Any]:
    return np.round(values.astype(np.float64), 6).tolist()  # type: ignore[no-any-return]
