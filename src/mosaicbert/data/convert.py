"""`mosaicbert convert`: text of any source to MDS shards, one folder for each split."""

import argparse
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mosaicbert.data import convert_jobs as jobs
from mosaicbert.data.compression import parse_compression
from mosaicbert.data.convert_engines import Task, run_here, run_processes, run_ray
from mosaicbert.data.convert_pieces import PARTS, Piece, Progress, Request, is_done
from mosaicbert.data.convert_samples import SampleForm
from mosaicbert.data.sample import SAMPLE_DIR
from mosaicbert.data.sources import (
    FORMATS,
    Part,
    cut_into_pieces,
    files_of_split,
    find_files,
    hub_parts,
)
from mosaicbert.errors import ConfigError, DataError, did_you_mean

log = logging.getLogger(__name__)

SPLITS: dict[str, tuple[str, int | None]] = {
    "train": ("train", None),
    "train_small": ("train", 100_000),
    "val": ("validation", None),
    "val_small": ("validation", 10_000),
}
"""Names of splits -> which part of the source, and how many documents of it."""
NAMED_DATASETS: dict[str, tuple[str, str | None]] = {
    "sample": (str(SAMPLE_DIR), "en"),
    "c4": ("allenai/c4", "en"),
}
"""Short names of data sets -> where they lie, and the subset where none is asked for."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_PLAIN_LINE_SECONDS = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; those of the original come first."""
    add = parser.add_argument
    add("--dataset", help="a file or folder of text, sample (bundled), c4, or a name on the hub")
    add("--data_subset", help="folder below the data set, or subset on the hub, such as en")
    add("--splits", nargs="+", metavar="SPLIT", help="train train_small val val_small, or others")
    add("--out_root", required=True, help="folder to write to, one subfolder for each split")
    add("--compression", help="zstd, zstd:LEVEL, gz, bz2, br or snappy; default: none")
    add("--concat_tokens", type=int, metavar="N", help="samples of N token ids, texts joined up")
    add("--tokenizer", help="for --concat_tokens and --tokenize: a folder or a name on the hub")
    add("--bos_text", default="", help="with --concat_tokens: text to begin each document with")
    add("--eos_text", default="", help="with --concat_tokens: text to end each document with")
    add("--no_wrap", action="store_true", help="with --concat_tokens: drop what exceeds a sample")
    add("--tokenize", action="store_true", help="store token ids in place of text (faster to read)")
    add("--text_column", default="text", help="column of the text (default: text)")
    add("--paragraphs", action="store_true", help=".txt: blank lines part documents, not lines")
    add("--val_fraction", type=float, metavar="F", help="hold this share out of train for val")
    add("--size_limit", type=int, default=1 << 26, metavar="BYTES", help="of a shard (64 MiB)")
    add("--num_workers", type=int, metavar="N", help="processes; default: one for each core")
    add("--engine", choices=("local", "ray"), default="local", help="who does the work")
    add("--shard", metavar="I/N", help="do only the I-th of N shares (from 0); --merge them later")
    add("--merge", action="store_true", help="write the indexes, once all shares are done")
    add("--quiet", action="store_true", help="show no progress")


def main(args: argparse.Namespace) -> int:
    """Convert what the arguments ask for; returns the exit code.

    Raises:
        ConfigError: arguments contradict one another, or the folder holds something else.
        DataError: the source is missing, damaged or empty, or the disk is full.
    """
    out_root = Path(args.out_root)
    if args.merge:
        return _merge(out_root, args.splits)
    share = _share(args.shard)
    requests = _requests(args)
    pieces = [_pieces(request, is_only=len(requests) == 1) for request in requests]
    folders = [_make_folder(out_root / request.split) for request in requests]
    with _locks(folders, shared=share is not None):
        try:
            tasks: list[Task] = []
            for folder, request, of_split in zip(folders, requests, pieces, strict=True):
                tasks += _tasks(folder, request, of_split, share)
            _run(tasks, args)
        except BaseException:
            for folder in folders if share is None else []:  # the others may be at work there
                jobs.undo_if_nothing_done(folder)
            raise
        if share is None:
            for folder in folders:
                _finish(folder)
    if share is not None:
        print(
            f"Share {args.shard} is done. When all are, and their folders are in one place: "
            f"mosaicbert convert --merge --out_root {args.out_root}"
        )
    return 0


# --- what is asked for ---------------------------------------------------------------------------


def _requests(args: argparse.Namespace) -> list[Request]:
    if not args.dataset:
        raise ConfigError("--dataset is missing: a file or folder, sample, c4, or a hub name.")
    form = _form(args)
    if args.compression:
        parse_compression(args.compression)
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        raise ConfigError(f"--val_fraction {args.val_fraction} is not between 0 and 1.")
    if args.num_workers is not None and args.num_workers < 1:
        raise ConfigError(f"--num_workers {args.num_workers} is not a number of processes.")
    if not 0 < args.size_limit < 1 << 32:
        raise ConfigError(f"--size_limit {args.size_limit} is not between 1 and 4 GiB.")
    subset = args.data_subset or NAMED_DATASETS.get(args.dataset, ("", None))[1]
    requests = []
    for split in args.splits or _default_splits(args, subset):
        if not re.fullmatch(r"[\w-][\w.-]*", split):
            raise ConfigError(f'--splits: "{split}" is no name of a folder.')
        source, limit = SPLITS.get(split, (split, None))
        held_out = args.val_fraction is not None and source == "validation"
        requests.append(
            Request(
                dataset=_normal(args.dataset),
                data_subset=subset,
                split=split,
                limit=limit,
                text_column=args.text_column,
                paragraphs=args.paragraphs,
                val_fraction=args.val_fraction if source in ("train", "validation") else None,
                held_out=held_out,
                compression=args.compression,
                size_limit=args.size_limit,
                form=form,
            )
        )
    if len({request.split for request in requests}) < len(requests):
        raise ConfigError(f"--splits {' '.join(args.splits)}: a split is named twice.")
    return requests


def _normal(dataset: str) -> str:
    """The same for all spellings of one path; `./c4` stays a folder, and `c4` a known name."""
    path = os.path.normpath(dataset)
    return f"./{path}" if path in NAMED_DATASETS and dataset not in NAMED_DATASETS else path


def _form(args: argparse.Namespace) -> SampleForm:
    wants_ids = args.tokenize or args.concat_tokens is not None
    if args.tokenize and args.concat_tokens is not None:
        raise ConfigError("--tokenize and --concat_tokens are two forms of a sample: choose one.")
    if wants_ids and not args.tokenizer:
        raise ConfigError("--concat_tokens and --tokenize need a --tokenizer.")
    if not wants_ids and args.tokenizer:
        raise ConfigError("--tokenizer is for --concat_tokens or --tokenize; name one of them.")
    if args.concat_tokens is None and (args.bos_text or args.eos_text or args.no_wrap):
        raise ConfigError("--bos_text, --eos_text and --no_wrap are for --concat_tokens.")
    if args.concat_tokens is not None and args.concat_tokens < 1:
        raise ConfigError(f"--concat_tokens {args.concat_tokens} is not a number of tokens.")
    form = SampleForm(
        args.tokenizer, args.concat_tokens, args.bos_text, args.eos_text, args.no_wrap
    )
    form.check()
    return form


def _local_root(dataset: str, subset: str | None) -> Path | None:
    """The folder or file that a data set lies in, or None for one on the hub."""
    path = Path(NAMED_DATASETS.get(dataset, (dataset, None))[0])
    if path.exists() and dataset != "c4":
        return path / subset if subset else path
    looks_like_path = dataset.startswith((".", "/", "~")) or path.suffix in FORMATS
    if looks_like_path or not _HUB_NAME.fullmatch(dataset):
        raise DataError(f"--dataset {dataset}: there is no such file or folder.")
    return None


def _default_splits(args: argparse.Namespace, subset: str | None) -> list[str]:
    root = _local_root(args.dataset, subset)
    if root is None:
        return ["train", "train_small", "val"]
    files = find_files(root)
    has_validation = args.val_fraction or files_of_split(files, root, "validation")
    has_train = files_of_split(files, root, "train")
    return [*(["train"] if has_train else []), *(["val"] if has_validation else [])]


def _pieces(request: Request, is_only: bool) -> list[Piece]:
    """The pieces of a split: the same on every machine and for any number of processes.

    A single file whose name says nothing is the only split that is asked for, whichever that is.
    """
    source = SPLITS.get(request.split, (request.split, None))[0]
    if request.held_out:
        source = "train"
    groups: list[tuple[Part, ...]]
    root = _local_root(request.dataset, request.data_subset)
    if root is None:
        name = NAMED_DATASETS.get(request.dataset, (request.dataset, None))[0]
        groups = [(part,) for part in hub_parts(name, request.data_subset, source)]
    else:
        files = find_files(root)
        chosen = files_of_split(files, root, source)
        if request.val_fraction and files_of_split(files, root, "validation"):
            raise ConfigError(
                f"--val_fraction: {root} has files for validation already. Leave it out."
            )
        if not chosen and is_only and files == [root]:
            chosen = files
        if not chosen:
            hint = " or hold a part of train out with --val_fraction" * (source == "validation")
            raise DataError(
                f'{root} has no file for the split "{request.split}": none has "{source}" in its '
                f"name.{did_you_mean(request.split, SPLITS)} Rename one{hint}, or ask for other "
                "--splits."
            )
        cut = cut_into_pieces(chosen, max(request.size_limit // 2, 1), request.paragraphs)
        groups = list(cut)
    if request.limit is not None:  # the first so many can only be counted in one go
        groups = [tuple(part for group in groups for part in group)]
    return [Piece(index, len(groups), group) for index, group in enumerate(groups)]


def _share(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ConfigError(f"--shard {text}: write I/N with I from 0 to N-1, such as 0/8.")
    return int(match[1]), int(match[2])


# --- doing it ------------------------------------------------------------------------------------


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be made: {error.strerror}. Choose another --out_root."
        ) from error
    return folder


@contextmanager
def _locks(folders: list[Path], shared: bool) -> Iterator[None]:
    if not folders:
        yield
        return
    with jobs.locked(folders[0], shared), _locks(folders[1:], shared):
        yield


def _tasks(
    folder: Path, request: Request, pieces: list[Piece], share: tuple[int, int] | None
) -> list[Task]:
    """The pieces of a split that are left to do."""
    if not jobs.begin(folder, request):
        return []
    if share is None:
        jobs.drop_pieces_from(folder, len(pieces))
    else:
        pieces = pieces[share[0] :: share[1]]
    left = [piece for piece in pieces if not is_done(folder, piece)]
    if len(left) < len(pieces):
        log.warning(
            "%s: %d of %d pieces are there already", folder, len(pieces) - len(left), len(pieces)
        )
    return [(folder, request, piece) for piece in left]


def _run(tasks: list[Task], args: argparse.Namespace) -> None:
    num_workers = min(args.num_workers or _num_cores(), len(tasks))
    with _progress(sum(piece.size for _, _, piece in tasks), args.quiet) as report:
        if args.engine == "ray":
            run_ray(tasks, report)
        elif num_workers > 1:
            run_processes(tasks, num_workers, report)
        else:
            run_here(tasks, report)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _finish(folder: Path) -> None:
    if not (folder / PARTS).is_dir():
        print(f"{folder}: complete already")
        return
    summary = jobs.finish(folder)
    print(
        f"{folder}: {summary.samples:,} samples in {summary.shards:,} shards, from "
        f"{summary.documents:,} documents ({summary.characters / 1e6:,.1f} M characters)"
    )


def _merge(out_root: Path, splits: list[str] | None) -> int:
    names = splits or sorted(path.parent.name for path in out_root.glob(f"*/{jobs.REQUEST}"))
    if not names:
        raise DataError(f"{out_root} holds no share of a conversion. Check --out_root.")
    for name in names:
        jobs.read_request(out_root / name)
        with jobs.locked(out_root / name):
            _finish(out_root / name)
    return 0


# --- progress ------------------------------------------------------------------------------------


@dataclass
class _Rate:
    """How far the work is, how fast, and how long it will still take."""

    total_bytes: int
    done: Progress
    started: float

    def add(self, progress: Progress) -> None:
        self.done = self.done + progress

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-6)
        fraction = min(self.done.input_bytes / max(self.total_bytes, 1), 1.0)
        left = f", {seconds / fraction - seconds:,.0f} s left" if fraction > 0.01 else ""
        return (
            f"{fraction:.0%}: {self.done.documents:,} documents, "
            f"{self.done.characters / 1e6 / seconds:.1f} M characters/s{left}"
        )


@contextmanager
def _progress(total_bytes: int, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """A function to report progress to: a line in place in a terminal, else a line now and then."""
    rate = _Rate(total_bytes, Progress(), time.monotonic())
    last = time.monotonic()

    def print_now_and_then(progress: Progress) -> None:
        nonlocal last
        rate.add(progress)
        if time.monotonic() - last > _PLAIN_LINE_SECONDS:
            last = time.monotonic()
            print(f"converting {rate}", file=sys.stderr, flush=True)

    if quiet or total_bytes == 0:
        yield rate.add
    elif not sys.stderr.isatty():
        yield print_now_and_then
    else:
        from rich.console import Console

        with Console(stderr=True).status("converting") as status:

            def show(progress: Progress) -> None:
                rate.add(progress)
                status.update(f"converting {rate}")

            yield show
