"""`mosaicbert predict`: what a model says of every row of a file of any size.

The file is read in parts, which go to one process or many; rows come out in the order they came in,
and the output file is there when it is whole.
"""

import argparse
import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from mosaicbert.data.table_writer import check_output, open_table
from mosaicbert.data.tables import Table, iter_table, text_lines
from mosaicbert.errors import ConfigError, DataError
from mosaicbert.executors import ENGINES, Event, Executor, LocalProcesses, RayTasks, run_all
from mosaicbert.models.register import TASKS
from mosaicbert.predict.parts import Part, Request, predict_part, work
from mosaicbert.run import set_log_level

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 4096
SECONDS_BETWEEN_LINES = 10.0
# --- files ----------------------------------------------------------------------------------------


def predict_file(
    checkpoint: str | Path,
    source: str | Path,
    output: str | Path,
    *,
    text: Sequence[str] = ("text",),
    keep: Sequence[str] = (),
    skip_bad_rows: bool = False,
    num_workers: int | None = None,
    engine: str = "local",
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
        num_workers: processes, which share the GPUs. Default: one for each GPU, or this one.
        engine: `local`, or `ray` for a Ray cluster, with a GPU for each part if it has any.
        options: of `load_predictor`.

    Raises:
        ConfigError, DataError, CheckpointError: for what the user can mend; no output is written.
    """
    if len(text) not in (1, 2):
        raise ConfigError(f"--text {' '.join(text)}: name one column, or two for pairs.")
    if num_workers is not None and num_workers < 1:
        raise ConfigError(f"--num_workers {num_workers} is not a number of processes.")
    check_output(output)
    if Path(output).resolve() == Path(source).resolve():
        raise ConfigError(f"--output {output} is the input: it would be replaced. Name another.")
    parts = _parts(source, text, keep)
    first = next(parts, None)  # faults of the file are told before the model is loaded
    if first is None:
        raise DataError(f"{source} has no lines.")
    request = Request(
        checkpoint=str(checkpoint),
        source=str(source),
        text=tuple(text),
        keep=tuple(keep),
        skip_bad_rows=skip_bad_rows,
        options=tuple(sorted(options.items())),
        call=uuid.uuid4().hex,
    )
    whole = chain([first], parts)
    num_rows, began, told = 0, time.monotonic(), time.monotonic()
    with open_table(Path(output)) as write:
        for table, num, warning in _predicted(request, whole, num_workers, engine):
            if warning:
                log.warning("%s", warning)
            write(table)
            num_rows += num
            if time.monotonic() - told > SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                log.info("%d rows, %.0f a second", num_rows, num_rows / (told - began))
    return num_rows


def _parts(source: str | Path, text: Sequence[str], keep: Sequence[str]) -> Iterator[Part]:
    if not str(source).lower().removesuffix(".gz").endswith(".txt"):
        columns = list(dict.fromkeys([*text, *keep]))
        tables = iter_table(source, columns, ROWS_AT_ONCE)
    elif list(text) != ["text"] or keep:
        raise ConfigError(f"{source} is plain text, a text a line: --text and --keep name columns.")
    else:
        tables = _lines(source)
    rows_before = 0
    for table in tables:
        part = Part(table, rows_before)
        yield part
        rows_before += part.num_rows


def _lines(source: str | Path) -> Iterator[Table]:
    lines = (line.rstrip("\r\n") for line in text_lines(source))
    while part := list(islice(lines, ROWS_AT_ONCE)):
        yield {"text": part}


# --- one process or many --------------------------------------------------------------------------

Predicted = Iterator[tuple[Table, int, str | None]]
"""Table of the output, number of its rows, what to warn of: in the order of the input."""


def _predicted(
    request: Request, parts: Iterator[Part], num_workers: int | None, engine: str
) -> Predicted:
    device = dict(request.options).get("device")
    num_gpus = 0 if device == "cpu" else torch.cuda.device_count()
    num_workers = num_workers or max(1, num_gpus)
    if engine == "local" and num_workers == 1:
        for part in parts:
            table, warning = predict_part(request, part)
            yield table, part.num_rows, warning
        return
    executor: Executor
    if engine == "ray":
        executor = RayTasks(work, num_gpus=0 if device == "cpu" else 1, or_cpu=device is None)
    else:
        executor = LocalProcesses(work, _slots(num_workers, num_gpus))
    with closing(executor):
        yield from _in_order(executor, request, parts)


def _slots(num_workers: int, num_gpus: int) -> list[dict[str, str]]:
    """The environment of each process: its GPU, and its share of the cores."""
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_workers))}
    if not num_gpus:
        return [threads] * num_workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(gpu) for gpu in range(num_gpus)]
    return [threads | {"CUDA_VISIBLE_DEVICES": names[i % num_gpus]} for i in range(num_workers)]


def _in_order(executor: Executor, request: Request, parts: Iterator[Part]) -> Predicted:
    """What the workers give, each part when its turn has come; the first that failed raises."""
    ended: dict[int, Event] = {}
    sizes: dict[int, int] = {}

    def tasks() -> Iterator[tuple[str, Any]]:
        for number, part in enumerate(parts):
            sizes[number] = part.num_rows
            yield str(number), (request, part)

    turn = 0
    for event in run_all(executor, tasks()):
        if event.kind not in ("done", "failed"):
            continue
        ended[int(event.key)] = event
        while turn in ended:
            event = ended.pop(turn)
            if event.kind == "failed":
                raise event.detail.error or DataError(
                    f"A process that predicted was lost: {event.detail.text}. Perhaps memory ran "
                    "out: try a smaller --num_workers."
                )
            yield event.detail[0], sizes.pop(turn), event.detail[1]
            turn += 1


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
        "--num_workers", type=int, help="processes (default: one for each GPU, or one on a CPU)"
    )
    parser.add_argument(
        "--engine", choices=ENGINES, default="local", help="processes here, or a Ray cluster"
    )
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
        num_workers=args.num_workers,
        engine=args.engine,
        task=task,
        tokenizer=args.tokenizer,
        max_seq_len=args.max_seq_len,
        device=args.device,
        precision=args.precision,
    )
    print(f"{num_rows:,} rows written to {args.output}")
    return 0
