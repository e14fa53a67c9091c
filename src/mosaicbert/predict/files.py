"""`mosaicbert predict`: what a model says of every row of a file of any size.

The file is read in parts; rows come out in the order they came in, and the output file is there
when it is whole.
"""

import argparse
import logging
import time
from collections.abc import Container, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mosaicbert.data.table_writer import check_output, open_table
from mosaicbert.data.tables import Table, iter_table, text_lines
from mosaicbert.errors import ConfigError, DataError
from mosaicbert.models.register import TASKS
from mosaicbert.predict.predictor import Predictor, load_predictor
from mosaicbert.run import set_log_level

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 4096
# --- files ----------------------------------------------------------------------------------------


def predict_file(
    checkpoint: str | Path,
    source: str | Path,
    output: str | Path,
    *,
    text: Sequence[str] = ("text",),
    keep: Sequence[str] = (),
    skip_bad_rows: bool = False,
    **options: Any,
) -> int:
    """Predict for every row of `source` and write the rows of `output`; gives their number.

    Args:
        checkpoint: anything `mosaicbert.load` reads.
        source: CSV, TSV, JSONL, parquet, or `.txt` with a text a line.
        output: `.jsonl`, `.csv` or `.parquet`.
        text: its column, or the two of a pair.
        keep: columns of the input to copy to the output.
        skip_bad_rows: rows without text get empty cells, in place of an error.
        options: of `load_predictor`.

    Raises:
        ConfigError, DataError, CheckpointError: for what the user can mend; no output is written.
    """
    if len(text) not in (1, 2):
        raise ConfigError(f"--text {' '.join(text)}: name one column, or two for pairs.")
    check_output(Path(output))
    if Path(output).resolve() == Path(source).resolve():
        raise ConfigError(f"--output {output} is the input: it would be replaced. Name another.")
    parts = _parts(source, text, keep)
    first = next(parts, None)  # faults of the file are told before the model is loaded
    if first is None:
        raise DataError(f"{source} has no lines.")
    predictor = load_predictor(checkpoint, **options)
    if predictor.task == "token-classification" and len(text) == 2:
        raise ConfigError("Tags are predicted for one column of --text, not two.")
    num_rows, began, told = 0, time.monotonic(), time.monotonic()
    with open_table(Path(output)) as write:
        for part in chain([first], parts):
            bad = _bad_rows(predictor, part, text, num_rows)
            if bad:
                told_of = f"{source}: {'; '.join(list(bad.values())[:5])}"
                more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
                if not skip_bad_rows:
                    raise DataError(
                        f"{told_of}{more}. Mend them, or let --skip_bad_rows give such rows empty "
                        "cells."
                    )
                log.warning("No prediction for %d rows of %s%s.", len(bad), told_of, more)
            write(_predict_part(predictor, part, text, keep, bad))
            num_rows += len(part[text[0]])
            if time.monotonic() - told > 10:
                told = time.monotonic()
                log.info("%d rows, %.0f a second", num_rows, num_rows / (told - began))
    return num_rows


def _parts(source: str | Path, text: Sequence[str], keep: Sequence[str]) -> Iterator[Table]:
    if not str(source).lower().removesuffix(".gz").endswith(".txt"):
        yield from iter_table(source, list(dict.fromkeys([*text, *keep])), ROWS_AT_ONCE)
        return
    if list(text) != ["text"] or keep:
        raise ConfigError(f"{source} is plain text, a text a line: --text and --keep name columns.")
    lines = (line.rstrip("\r\n") for line in text_lines(source))
    while part := list(islice(lines, ROWS_AT_ONCE)):
        yield {"text": part}


def _bad_rows(
    predictor: Predictor, part: Table, text: Sequence[str], rows_before: int
) -> dict[int, str]:
    """Rows of the part that give nothing to predict from, and why."""
    bad: dict[int, str] = {}
    for column in text:
        for i, value in enumerate(part[column]):
            fault = _fault(predictor, value)
            if fault and i not in bad:
                bad[i] = f'row {rows_before + i + 1}, column "{column}": {fault}'
    return bad


def _predict_part(
    predictor: Predictor, part: Table, text: Sequence[str], keep: Sequence[str], bad: Container[int]
) -> Table:
    """Columns of one part; bad rows get None."""
    filler = predictor.tokenizer.mask_token or "x"  # stands in for what is blanked out below
    texts, *pairs = (
        [filler if i in bad else value for i, value in enumerate(part[column])] for column in text
    )
    found = predictor.columns(texts, pairs[0] if pairs else None)
    clash = sorted(found.keys() & set(keep))
    if clash:
        raise ConfigError(f"--keep {clash[0]}: the output has a column of that name already.")
    blanked = {
        name: [None if i in bad else value for i, value in enumerate(values)]
        for name, values in found.items()
    }
    return {column: part[column] for column in keep} | blanked


def _fault(predictor: Predictor, value: Any) -> str | None:
    """Why there is nothing to predict from."""
    if predictor.task == "token-classification" and isinstance(value, list):
        whole = bool(value) and all(isinstance(word, str) and word.strip() for word in value)
        return None if whole else "no list of words"
    if not isinstance(value, str):
        return "empty" if value is None else f"no text but {type(value).__name__} ({value!r:.40})"
    if not value.strip():
        return "empty"
    mask = predictor.tokenizer.mask_token
    return f"no {mask} to fill" if predictor.task == "mlm" and mask not in value else None


# --- command --------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", help="file, folder or URI of a checkpoint")
    parser.add_argument(
        "--input", required=True, help="CSV, TSV, JSONL, parquet, or .txt with a text a line"
    )
    parser.add_argument("--output", required=True, help=".jsonl, .csv or .parquet to write")
    parser.add_argument(
        "--text", nargs="+", default=["text"], metavar="COL", help="column, or the two of a pair"
    )
    parser.add_argument(
        "--keep", nargs="+", default=[], metavar="COL", help="columns to copy to the output"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--task", choices=TASKS, help="head (default: the checkpoint's)")
    form.add_argument("--embed", action="store_true", help="write mean-pooled sentence embeddings")
    form.add_argument("--fill_mask", action="store_true", help="fill the masks in the texts")
    parser.add_argument("--tokenizer", help="folder or name (default: the checkpoint's)")
    parser.add_argument("--max_seq_len", type=int, help="tokens of a text; longer ones are cut")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="default: a GPU if there is one")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: bf16 on a GPU")
    parser.add_argument(
        "--skip_bad_rows", action="store_true", help="empty cells for rows without text"
    )


def main(args: argparse.Namespace) -> int:
    """Predict and say how many rows."""
    set_log_level(None)
    task = "embedding" if args.embed else "mlm" if args.fill_mask else args.task
    num_rows = predict_file(
        args.model,
        args.input,
        args.output,
        text=args.text,
        keep=args.keep,
        skip_bad_rows=args.skip_bad_rows,
        task=task,
        tokenizer=args.tokenizer,
        max_seq_len=args.max_seq_len,
        device=args.device,
        precision=args.precision,
    )
    print(f"{num_rows:,} rows written to {args.output}")
    return 0
