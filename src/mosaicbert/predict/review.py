"""What a fine-tuned model gets wrong: a confusion matrix, and the errors worth reading."""

import csv
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mosaicbert.data.examples import Examples
from mosaicbert.data.tokens import TokenExamples
from mosaicbert.predict import batches
from mosaicbert.predict.batches import Array
from mosaicbert.predict.predictor import Predictor
from mosaicbert.train.distributed import Ranks

log = logging.getLogger(__name__)

MOST_ERRORS = 1000
MOST_NAMES = 40
"""Classes up to which the picture of a confusion matrix has their names and numbers."""


def review(
    folder: Path, examples: Examples | TokenExamples, predictor: Predictor, ranks: Ranks
) -> None:
    """Predict for `examples` on all ranks and write what rank 0 then knows into `folder`.

    `errors.jsonl`: the wrong ones, the most confident first (regression: the farthest off).
    `confusion.csv` and `confusion.png`, where one class is predicted: rows are the true classes.
    """
    mine = examples.take(range(ranks.rank, len(examples), ranks.world_size))
    parts = ranks.gather(outputs(predictor, mine) if len(mine) else [])
    if not ranks.is_first:
        return
    found = [parts[i % ranks.world_size][i // ranks.world_size] for i in range(len(examples))]
    folder.mkdir(parents=True, exist_ok=True)
    errors = sorted(_errors(examples, found), key=lambda error: -error[0])[:MOST_ERRORS]
    lines = [json.dumps(error, ensure_ascii=False) + "\n" for _, error in errors]
    _write(folder / "errors.jsonl", "".join(lines).encode())
    names = examples.label_names
    if names is not None and examples.kind in ("classification", "token_classification"):
        if isinstance(examples, TokenExamples):
            true, guess = np.concatenate(examples.tags), np.concatenate(found).argmax(-1)
        else:
            true, guess = examples.labels.astype(np.int64), np.stack(found).argmax(-1)
        matrix = confusion(true, guess, len(names))
        _write(folder / "confusion.csv", _csv(matrix, names).encode())
        _write(folder / "confusion.png", _png(matrix, names))
    log.info("%d errors to read in %s.", len(errors), folder / "errors.jsonl")


def outputs(predictor: Predictor, examples: Examples | TokenExamples) -> list[Array]:
    """Logits `(num_labels,)` of each text; or tags' probabilities `(num_words, num_labels)`."""
    if isinstance(examples, TokenExamples):
        return batches.run_words(
            predictor.model, examples.words, predictor.tokenizer, predictor.max_seq_len
        )
    return list(predictor.run(examples.texts, examples.pairs, batches.logits))


def confusion(true: Array, guess: Array, num_labels: int) -> Array:
    """Counts `(num_labels, num_labels)`: row the true class, column the predicted one."""
    counts = np.bincount(true * num_labels + guess, minlength=num_labels**2)
    return counts.reshape(num_labels, num_labels)


# --- errors ---------------------------------------------------------------------------------------


def _errors(
    examples: Examples | TokenExamples, found: Sequence[Array]
) -> Iterator[tuple[float, dict[str, Any]]]:
    """How bad each error is, and what to write of it."""
    names = examples.label_names or ()
    if isinstance(examples, TokenExamples):
        for words, tags, p in zip(examples.words, examples.tags, found, strict=True):
            guess = p.argmax(-1)
            if (guess != tags).any():
                confidence = float(p.max(-1)[guess != tags].max())
                yield (
                    confidence,
                    {
                        "probability": round(confidence, 6),
                        "tokens": words,
                        "label": [names[i] for i in tags],
                        "predicted": [names[i] for i in guess],
                    },
                )
        return
    for i, (label, logits) in enumerate(zip(examples.labels, found, strict=True)):
        text = {"text": examples.texts[i]}
        if examples.pairs is not None:
            text["text_2"] = examples.pairs[i]
        logits = logits.astype(np.float64)
        if examples.kind == "regression":
            off = abs(float(logits[0]) - float(label))
            yield off, {"label": float(label), "predicted": round(float(logits[0]), 6), **text}
        elif examples.kind == "multilabel":
            p = 1 / (1 + np.exp(-logits))
            wrong = (p > 0.5) != (label > 0.5)
            if wrong.any():
                confidence = float(np.maximum(p, 1 - p)[wrong].max())
                true, guess = _chosen(names, label > 0.5), _chosen(names, p > 0.5)
                yield (
                    confidence,
                    {
                        "probability": round(confidence, 6),
                        "label": true,
                        "predicted": guess,
                        **text,
                    },
                )
        elif logits.argmax() != label:
            p = np.exp(logits - logits.max())
            confidence = float(p.max() / p.sum())
            yield (
                confidence,
                {
                    "probability": round(confidence, 6),
                    "label": names[int(label)],
                    "predicted": names[int(logits.argmax())],
                    **text,
                },
            )


def _chosen(names: Sequence[str], switches: Array) -> list[str]:
    return [name for name, on in zip(names, switches, strict=True) if on]


# --- the confusion matrix -------------------------------------------------------------------------


def _csv(matrix: Array, names: Sequence[str]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["true \\ predicted", *names])
    writer.writerows([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))
    return buffer.getvalue()


def _png(matrix: Array, names: Sequence[str]) -> bytes:
    """Shares of each true class as shades, counts as numbers."""
    from matplotlib.figure import Figure

    size = min(3 + 0.45 * len(names), 20)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    shares = matrix / matrix.sum(1, keepdims=True).clip(min=1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(names) <= MOST_NAMES:
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        for (row, column), count in np.ndenumerate(matrix):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)
