"""What is predicted for one part of a file, in this process or in a worker."""

from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mosaicbert.data.tables import Table, half_character
from mosaicbert.errors import ConfigError, DataError
from mosaicbert.predict.predictor import Predictor, load_predictor


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for of every part."""

    checkpoint: str
    source: str
    text: tuple[str, ...]
    keep: tuple[str, ...]
    skip_bad_rows: bool
    options: tuple[tuple[str, Any], ...]
    """Arguments of `load_predictor`."""
    call: str
    """Tells this call from others, between which the checkpoint may have changed."""

    @property
    def predictor(self) -> Predictor:
        """The model; loaded once a process."""
        return _load(self.checkpoint, self.options, self.call)


@dataclass(frozen=True, slots=True)
class Part:
    """Successive rows of the input, behind `rows_before` others."""

    table: Table
    rows_before: int

    @property
    def num_rows(self) -> int:
        """Rows of the part."""
        return len(next(iter(self.table.values())))


@lru_cache(maxsize=1)
def _load(checkpoint: str, options: tuple[tuple[str, Any], ...], call: str) -> Predictor:
    return load_predictor(checkpoint, **dict(options))


def work(payload: tuple[Request, Part], report: Callable[[Any], None]) -> tuple[Table, str | None]:
    """What an executor's worker does with a part."""
    return predict_part(*payload)


def predict_part(request: Request, part: Part) -> tuple[Table, str | None]:
    """Columns of the output, and what to warn of.

    Raises:
        ConfigError, DataError, CheckpointError: for what the user can mend.
    """
    predictor, text = request.predictor, request.text
    if predictor.task == "token-classification" and len(text) == 2:
        raise ConfigError("Tags are predicted for one column of --text, not two.")
    bad = _bad_rows(predictor, part, text)
    warning = None
    if bad:
        told_of = f"{request.source}: {'; '.join(list(bad.values())[:5])}"
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        if not request.skip_bad_rows:
            raise DataError(
                f"{told_of}{more}. Mend them, or let --skip_bad_rows give such rows empty cells."
            )
        warning = f"No prediction for {len(bad)} rows of {told_of}{more}."
    return _columns(predictor, part.table, request, bad), warning


def _bad_rows(predictor: Predictor, part: Part, text: tuple[str, ...]) -> dict[int, str]:
    """Rows of the part that give nothing to predict from, and why."""
    bad: dict[int, str] = {}
    for column in text:
        for i, value in enumerate(part.table[column]):
            fault = _fault(predictor, value)
            if fault and i not in bad:
                bad[i] = f'row {part.rows_before + i + 1}, column "{column}": {fault}'
    return bad


def _columns(predictor: Predictor, table: Table, request: Request, bad: Container[int]) -> Table:
    """The columns to keep, and those predicted; bad rows get None."""
    filler = predictor.tokenizer.mask_token or "x"  # stands in for what is blanked out below
    texts, *pairs = (
        [filler if i in bad else value for i, value in enumerate(table[column])]
        for column in request.text
    )
    found = predictor.columns(texts, pairs[0] if pairs else None)
    clash = sorted(found.keys() & set(request.keep))
    if clash:
        raise ConfigError(f"--keep {clash[0]}: the output has a column of that name already.")
    blanked = {
        name: [None if i in bad else value for i, value in enumerate(values)]
        for name, values in found.items()
    }
    return {column: table[column] for column in request.keep} | blanked


def _fault(predictor: Predictor, value: Any) -> str | None:
    """Why there is nothing to predict from."""
    if predictor.task == "token-classification" and isinstance(value, list):
        whole = bool(value) and all(isinstance(word, str) and word.strip() for word in value)
        return _half(" ".join(value)) if whole else "no list of words"
    if not isinstance(value, str):
        return "empty" if value is None else f"no text but {type(value).__name__} ({value!r:.40})"
    if not value.strip():
        return "empty"
    mask = predictor.tokenizer.mask_token
    if predictor.task == "mlm" and mask not in value:
        return f"no {mask} to fill"
    return _half(value)


def _half(text: str) -> str | None:
    half = half_character(text)
    return half and f"half a character ({half}), as of a text that was cut"
