"""How fast `mosaicbert convert` is on one core, plain and with `--tokenize`.

    python benchmarks/convert_speed.py DATA [--out benchmarks/records/NAME.json]

DATA is a folder or file that `convert` reads. Some of its documents are written to one uncompressed
JSONL file; then, in alternation and on one core, it is converted plainly, converted with
`--tokenize`, and its texts are given to the tokenizers library alone, already in memory. MB are
10^6 bytes of UTF-8 text; seconds are CPU seconds of the process, all its threads together, so that
other work on the machine does not count as time (waiting for the disk does not either: the wall
time is beside it), though it slows this work by taking cache and memory; `load_average` says how
many processes there were. The record has each repeat, the medians and the targets.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from mosaicbert.data import convert
from mosaicbert.data.documents import documents
from mosaicbert.data.sources import cut_into_pieces, files_of_split, find_files
from mosaicbert.data.tokenizers import load_tokenizer

TARGET_PLAIN_MB_PER_SECOND = 25.0
TARGET_TOKENIZE_SHARE = 0.8
BATCH_TEXTS = 128


def read_texts(data: Path, megabytes: float) -> list[str]:
    """The first documents of the training files, up to that much text."""
    texts: list[str] = []
    size = 0
    root = find_files(data)
    for piece in cut_into_pieces(files_of_split(root, data, "train"), 1, False):
        for part in piece:
            for text in documents(part, "text"):
                texts.append(text)
                size += len(text.encode())
                if size >= megabytes * 1e6:
                    return texts
    return texts


def timed(name: str, megabytes: float, work: Callable[[], object]) -> dict[str, float]:
    """MB a CPU second, and a second of wall time, of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {f"{name}_mb_per_cpu_s": megabytes / cpu, f"{name}_mb_per_wall_s": megabytes / wall}


def convert_to(folder: Path, source: Path, *words: str) -> None:
    """Run the command in this process, on one core."""
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    common = ["--dataset", str(source), "--out_root", str(folder), "--num_workers", "1", "--quiet"]
    convert.main(parser.parse_args([*common, "--splits", "train", *words]))


def tokenize_alone(texts: list[str], name: str) -> None:
    """What `--tokenize` cannot be faster than: the library, in the batches that suit it."""
    backend = load_tokenizer(name).backend_tokenizer
    for start in range(0, len(texts), BATCH_TEXTS):
        for encoding in backend.encode_batch_fast(
            texts[start : start + BATCH_TEXTS], add_special_tokens=False
        ):
            _ = encoding.ids


def measure(args: argparse.Namespace) -> dict[str, object]:
    """All repeats, and what they come to."""
    texts = read_texts(Path(args.data), args.megabytes)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        source = Path(temporary) / "train.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tokenize_alone(texts[:100], args.tokenizer)
        ids = ["--tokenize", "--tokenizer", args.tokenizer]
        for repeat in range(args.repeats):
            plain, tokenized = (Path(temporary) / f"{kind}-{repeat}" for kind in ("plain", "ids"))
            rows.append(
                timed("plain", megabytes, partial(convert_to, plain, source))
                | timed("tokenize", megabytes, partial(convert_to, tokenized, source, *ids))
                | timed(
                    "tokenizers_alone", megabytes, partial(tokenize_alone, texts, args.tokenizer)
                )
            )
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    # Of neighbours in time: what else the machine does then slows both.
    share = statistics.median(
        row["tokenize_mb_per_cpu_s"] / row["tokenizers_alone_mb_per_cpu_s"] for row in rows
    )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "claim": "convert: MB of text a second on one core",
        "command": f"python benchmarks/convert_speed.py {Path(args.data).name} "
        f"--megabytes {args.megabytes:g} --repeats {args.repeats}",
        "commit": commit.stdout.strip() or None,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_cpu_name()}",
        "load_average": round(os.getloadavg()[1], 1),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "tokenizers", "xxhash")},
        },
        "megabytes": megabytes,
        "documents": len(texts),
        "rows": rows,
        "medians": medians,
        "tokenize_share_of_library": share,
        "targets_met": {
            f"plain >= {TARGET_PLAIN_MB_PER_SECOND} MB/s": medians["plain_mb_per_cpu_s"]
            >= TARGET_PLAIN_MB_PER_SECOND,
            f"tokenize >= {TARGET_TOKENIZE_SHARE} of the library": share >= TARGET_TOKENIZE_SHARE,
        },
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "")


def main() -> int:
    """Measure, print, and write the record where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--megabytes", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokenizer", default="bert-base-uncased")
    parser.add_argument("--folder", help="where to write; default: the temporary folder")
    parser.add_argument("--out", type=Path, help="where to write the record")
    args = parser.parse_args()
    record = json.dumps(measure(args), indent=2)
    print(record)
    if args.out:
        args.out.write_text(record + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
