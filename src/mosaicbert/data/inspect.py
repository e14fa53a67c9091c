"""`mosaicbert inspect`: whether a data set is whole, and what is in it."""

import argparse
import itertools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from mosaicbert.config.sections import DatasetConfig
from mosaicbert.data.convert_samples import check_tokenization, read_tokenization
from mosaicbert.data.folders import open_folder, streams_of
from mosaicbert.data.inspect_report import Report, draw_lengths
from mosaicbert.data.mds import INDEX, Shard, ShardInfo, ensure_raw, read_index, verify
from mosaicbert.errors import DataError

log = logging.getLogger(__name__)

_LONGEST = 1 << 17  # lengths are counted one by one up to here, longer ones together
_TOKENISED_TEXTS = 1000
_QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
_UNITS = {"text": "characters", "tokens": "tokens", "input_ids": "tokens"}
"""The columns that convert writes -> what their length counts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("folder", nargs="?", help="a data set: a folder with an index, or with splits")
    add("--local_path", help="the same, as the original has it; with --remote_path: where it goes")
    add("--remote_path", help="folder or URI (s3://, gs://, ...) to copy the data set from first")
    add("--split", help="subfolder to look at; default: all that there are")
    add("--tokenizer", help="a folder or name: counts tokens and shows masked examples")
    add("--max_seq_len", type=int, default=128, help="tokens of a sample (default: 128)")
    add("--mlm_probability", type=float, default=0.15, help="share to mask (default: 0.15)")
    add("--num_samples", type=int, default=3, help="how many samples to show (default: 3)")
    add("--picture", metavar="FILE", help="draw the lengths to a .png, .svg or .pdf")
    add("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Check and describe the data sets that the arguments name; returns the exit code.

    Raises:
        DataError: there is no data set, or shards are missing or damaged; names them all.
    """
    if bool(args.folder) == bool(args.local_path):
        raise DataError("Name one folder: `mosaicbert inspect DIR`, or --local_path DIR.")
    root = Path(args.folder or args.local_path)
    if args.remote_path:
        _copy(args.remote_path, root, args.split)
    reports = []
    for folder in _data_sets(root, args.split):
        report = inspect_folder(folder, args.tokenizer, args.max_seq_len, args.num_samples)
        if not report.faults:
            report.masked_examples = _masked_examples(report, args)
        reports.append(report)
        if not args.json:
            print(report.to_text())
    if args.json:
        print(json.dumps([report.to_json() for report in reports], indent=2, default=str))
    if args.picture:
        draw_lengths(reports, Path(args.picture))
    faults = [fault for report in reports for fault in report.faults]
    if faults:
        raise DataError("\n".join(faults))
    return 0


def _data_sets(root: Path, split: str | None) -> list[Path]:
    if split is not None or (root / INDEX).exists():
        return [root / split if split else root]
    found = sorted(path.parent for path in root.glob(f"*/{INDEX}"))
    if not found:
        raise DataError(
            f"{root} holds no data set: neither it nor a folder in it has an {INDEX}. Make one "
            "with `mosaicbert convert`."
        )
    return found


# --- one data set --------------------------------------------------------------------------------


def inspect_folder(
    folder: Path, tokenizer_name: str | None, max_seq_len: int, num_samples: int
) -> Report:
    """Check every hash, read every sample, and count.

    Raises:
        DataError: the index is missing or damaged, or another tokenizer made the ids. Damaged
            shards do not raise: they are the report's `faults`.
    """
    shards = read_index(folder / INDEX)
    first = shards[0]
    note = read_tokenization(folder)
    report = Report(
        folder=str(folder),
        shards=len(shards),
        samples=sum(shard.samples for shard in shards),
        columns=dict(zip(first.column_names, first.column_encodings, strict=True)),
        compression=first.compression,
        raw_bytes=sum(shard.raw_bytes for shard in shards),
        stored_bytes=sum(shard.zip_bytes or shard.raw_bytes for shard in shards),
        tokenizer=tokenizer_name or (note["tokenizer"] if note else None),
    )
    if report.tokenizer:
        from mosaicbert.data.tokenizers import load_tokenizer

        check_tokenization(folder, load_tokenizer(report.tokenizer))
    counter = _Counter(report, num_samples)
    for shard in _readable_shards(folder, shards, report):
        try:
            counter.count(shard)
        except DataError as error:
            report.faults.append(str(error))
    counter.finish()
    if report.tokenizer and counter.texts:
        report.tokens = _token_statistics(counter.texts, report.tokenizer, max_seq_len)
    return report


class _Counter:
    """Reads shards, and gathers lengths, first samples and some texts for a report."""

    def __init__(self, report: Report, num_samples: int) -> None:
        self._report, self._num_samples = report, num_samples
        self._column = next((name for name in _UNITS if name in report.columns), None)
        self._counts = np.zeros(_LONGEST + 1, np.int64)
        self._every = max(report.samples // _TOKENISED_TEXTS, 1)
        self._seconds, self._samples, self._bytes, self._longest = 0.0, 0, 0, 0
        self.texts: list[str] = []

    def count(self, shard: Shard) -> None:
        """Read every sample of a shard."""
        start = time.perf_counter()
        lengths = []
        for i in range(len(shard)):
            sample = shard[i]
            if self._column is not None:
                lengths.append(_length(sample[self._column], self._column))
            if len(self._report.first_samples) < self._num_samples:
                self._report.first_samples.append(sample)
            if self._column == "text" and i % self._every == 0:
                self.texts.append(_as_text(sample["text"]))
        self._seconds += time.perf_counter() - start
        self._samples += len(shard)
        self._bytes += shard.info.raw_bytes
        self._report.total_length += sum(lengths)
        self._longest = max(self._longest, *lengths, 0)
        self._counts += np.bincount(
            np.minimum(lengths, _LONGEST).astype(int), minlength=_LONGEST + 1
        )

    def finish(self) -> None:
        """Put what was gathered into the report."""
        report, seconds = self._report, max(self._seconds, 1e-9)
        report.samples_per_second = self._samples / seconds
        report.megabytes_per_second = self._bytes / 1e6 / seconds
        if self._column is not None and self._counts.any():
            report.unit = _UNITS[self._column]
            report.quantiles, report.histogram = _quantiles(self._counts), _histogram(self._counts)
            report.quantiles["longest"] = self._longest


def _readable_shards(folder: Path, shards: list[ShardInfo], report: Report) -> Iterator[Shard]:
    """Every shard whose files are what the index says; the others go to the report's faults."""
    with tempfile.TemporaryDirectory(prefix="mosaicbert-inspect-") as temporary:
        for number, info in enumerate(shards):
            if sys.stderr.isatty():
                print(f"\r{folder}: shard {number + 1} of {len(shards)}", end="", file=sys.stderr)
            try:
                _verify_files(folder, info)
                raw = ensure_raw(folder, info, raw_folder=Path(temporary))
                shard = Shard(raw, info)
            except DataError as error:
                report.faults.append(str(error))
                continue
            yield shard
            shard.close()
            if raw.parent != folder:
                raw.unlink()
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)


def _verify_files(folder: Path, info: ShardInfo) -> None:
    """Check the raw and the zip file, whichever are there."""
    if info.zip_basename is not None and (folder / info.zip_basename).exists():
        verify(folder / info.zip_basename, info.zip_bytes, info.zip_hashes)
    if info.zip_basename is None or (folder / info.raw_basename).exists():
        verify(folder / info.raw_basename, info.raw_bytes, info.raw_hashes)


def _as_text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _length(value: Any, column: str) -> int:
    return len(value) // 8 if column == "tokens" else len(value)


def _quantiles(counts: NDArray[np.int64]) -> dict[str, int]:
    below = np.cumsum(counts)
    ranks = [max(int(np.ceil(q * below[-1])), 1) for q in _QUANTILES]
    names = ["shortest", *(f"{q:.0%}" for q in _QUANTILES[1:-1]), "longest"]
    return {n: int(np.searchsorted(below, r)) for n, r in zip(names, ranks, strict=True)}


def _histogram(counts: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Counts between powers of two, from the first to the last that has any."""
    borders = [0, 1, *(1 << power for power in range(1, 18)), 1 << 62]
    bins = [
        (low, high, int(counts[low : min(high, len(counts))].sum()))
        for low, high in itertools.pairwise(borders)
    ]
    used = [number for number, (_, _, count) in enumerate(bins) if count]
    return bins[used[0] : used[-1] + 1]


# --- tokens --------------------------------------------------------------------------------------


def _token_statistics(texts: list[str], name: str, max_seq_len: int) -> dict[str, float]:
    """Of some texts, evenly spaced: how they are tokenised whole."""
    from mosaicbert.data.tokenizers import load_tokenizer, special_affixes

    tokenizer = load_tokenizer(name)
    prefix, suffix = special_affixes(tokenizer)
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    lengths = np.array([len(encoding.ids) for encoding in encodings])
    limit = max_seq_len - len(prefix) - len(suffix)
    total = max(int(lengths.sum()), 1)
    unknown = sum(encoding.ids.count(tokenizer.unk_token_id) for encoding in encodings)
    return {
        "texts": len(texts),
        "tokens a text": float(lengths.mean()),
        "characters a token": sum(map(len, texts)) / total,
        "share unknown": unknown / total,
        f"share of texts cut at {max_seq_len}": float((lengths > limit).mean()),
        f"share of tokens kept at {max_seq_len}": float(np.minimum(lengths, limit).sum() / total),
    }


def _masked_examples(report: Report, args: argparse.Namespace) -> list[dict[str, str]]:
    """The first samples as a model gets them: cut, masked, decoded."""
    if not report.tokenizer or not any(name in report.columns for name in _UNITS):
        return []
    from mosaicbert.data.mlm import Masker
    from mosaicbert.data.tokenizers import encode_truncated, load_tokenizer, surround

    tokenizer = load_tokenizer(report.tokenizer)
    if tokenizer.mask_token_id is None:
        log.warning("%s has no mask token: no masked examples", report.tokenizer)
        return []
    ids: list[NDArray[Any]] = []
    for sample in report.first_samples:
        if "text" in sample:
            ids += encode_truncated(tokenizer, [_as_text(sample["text"])], args.max_seq_len)
        elif "input_ids" in sample:
            ids += surround(tokenizer, sample["input_ids"], args.max_seq_len)[:1]
        else:
            ids.append(np.frombuffer(sample["tokens"], "<i8")[: args.max_seq_len])
    special = np.array(tokenizer.all_special_ids, np.int64)
    masker = Masker(0, tokenizer.mask_token_id, special, len(tokenizer))
    positions = np.arange(len(ids), dtype=np.int64)
    examples = []
    for before, after in zip(
        ids, masker.mask(ids, positions, 0, args.mlm_probability), strict=True
    ):
        at = after.target_positions
        assert at is not None
        hidden = [
            f"{tokenizer.decode([true])} -> {tokenizer.decode([seen])}"
            for true, seen in zip(before[at], after.input_ids[at], strict=True)
        ]
        examples.append(
            {
                "text": tokenizer.decode(before),
                "input": tokenizer.decode(after.input_ids),
                "to predict": f"{len(hidden)} of {len(before)}: {', '.join(hidden)}",
            }
        )
    return examples


# --- remote folders ------------------------------------------------------------------------------


def _copy(remote: str, local: Path, split: str | None) -> None:
    """Copy the data sets below a folder or URI, as a training run does."""
    try:
        system, root = fsspec.core.url_to_fs(remote)
        indexes = (
            [] if split else [*system.glob(f"{root}/{INDEX}"), *system.glob(f"{root}/*/{INDEX}")]
        )
    except (OSError, ImportError, ValueError) as error:
        raise DataError(f"--remote_path {remote} cannot be listed: {error}") from error
    found = [index.removeprefix(root).removesuffix(INDEX).strip("/") for index in indexes]
    if not split and not found:
        raise DataError(f"--remote_path {remote}: neither it nor a folder in it has an {INDEX}.")
    for name in [split] if split else found:
        config = DatasetConfig(local=str(local), remote=remote, split=name, keep_zip=True)
        folder = open_folder(config, "--remote_path", streams_of(config)["dataset"])
        for info in folder.shards:
            folder.fetch(info)
