"""How fast one core takes MDS shards to packed, masked microbatches.

    python benchmarks/data_path.py DATA [--megabytes 20] [--repeats 5] [--record FILE.json]

DATA is a folder or file that `mosaicbert convert` reads. Some of its documents are converted
plainly and with `--tokenize`; then, in alternation, in one process and on one thread,
- `read`: every sample of the plain set is read and decoded, in shuffled order;
- `text`: an epoch of the plain set is read, tokenised, masked and packed;
- `ids`: the same from the set of token ids.
The files are warm and their hashes are checked before. Tokens are real ones, never what fills a
shape up; seconds are CPU seconds, so that other work on the machine does not count as time (the
wall time is beside them), though it slows this work by taking cache and memory; `load_average` says
how many processes there were. The record has each repeat, the medians, the targets, and how many
cores feed a GPU that takes `--gpu_tokens_per_second`.
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
from importlib.metadata import version
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from convert_speed import _cpu_name, convert_to, read_texts

from mosaicbert.config.sections import DatasetConfig, LoaderConfig
from mosaicbert.data.loader import build_text_loader, open_text
from mosaicbert.data.tokenizers import load_tokenizer

STREAMING_SAMPLES_PER_SECOND = 39_000
"""mosaicml-streaming 0.13 with two workers on such a machine."""
TARGETS = {
    "read_samples_per_cpu_s": 5 * STREAMING_SAMPLES_PER_SECOND,
    "text_tokens_per_cpu_s": 100_000,
    "ids_tokens_per_cpu_s": 1_500_000,
}
BATCH_SIZE, MICROBATCH_SAMPLES = 4096, 512


def dataset(folder: Path) -> DatasetConfig:
    """The data set in that folder, in the settings of the main recipe."""
    return DatasetConfig(local=str(folder), split="train", shuffle=True, max_seq_len=128)


def read_samples(folder: Path) -> Callable[[], dict[str, float]]:
    """Reads an epoch sample by sample."""
    reader, order = open_text(dataset(folder), load_tokenizer("bert-base-uncased"))

    def read() -> dict[str, float]:
        for start in range(0, order.num_samples, BATCH_SIZE):
            places = order.locate(0, start, min(start + BATCH_SIZE, order.num_samples))
            for number, index in zip(places.shards.tolist(), places.indices.tolist(), strict=True):
                _ = reader.shards.open(number)[index]
        return {"samples": order.num_samples}

    return read


def make_batches(folder: Path) -> Callable[[], dict[str, float]]:
    """Makes an epoch of steps."""
    loader = build_text_loader(
        LoaderConfig(dataset=dataset(folder), num_workers=0, drop_last=False, pin_memory=False),
        batch_size=BATCH_SIZE,
        microbatch_samples=MICROBATCH_SAMPLES,
        rank=0,
        world_size=1,
        packed=True,
        grid=True,
        training=True,
        mlm_probability=0.3,
    )

    def make() -> dict[str, float]:
        tokens = positions = 0
        for step in loader.steps(0):
            tokens += sum(batch.num_tokens for batch in step.microbatches)
            positions += sum(batch.input_ids.numel() for batch in step.microbatches)
        return {"samples": loader.num_samples, "tokens": tokens, "fill": tokens / positions}

    return make


def timed(name: str, work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Rates of one call, by CPU and by wall time."""
    wall, cpu = time.perf_counter(), time.process_time()
    counts = work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    row = {f"{name}_fill": counts.pop("fill")} if "fill" in counts else {}
    for what, count in counts.items():
        row[f"{name}_{what}_per_cpu_s"] = count / cpu
        row[f"{name}_{what}_per_wall_s"] = count / wall
    return row


def measure(args: argparse.Namespace) -> dict[str, object]:
    """All repeats, and what they come to."""
    torch.set_num_threads(1)
    texts = read_texts(Path(args.data), args.megabytes)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        source = Path(temporary) / "train.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        plain, ids = Path(temporary) / "plain", Path(temporary) / "ids"
        convert_to(plain, source)
        convert_to(ids, source, "--tokenize", "--tokenizer", "bert-base-uncased")
        works = {
            "read": read_samples(plain),
            "text": make_batches(plain),
            "ids": make_batches(ids),
        }
        for work in works.values():
            work()  # opens and checks the shards
        rows = [
            {key: rate for name, work in works.items() for key, rate in timed(name, work).items()}
            for _ in range(args.repeats)
        ]
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "claim": "data: samples and tokens a second on one core, from warm local shards",
        "command": f"python benchmarks/data_path.py {Path(args.data).name} "
        f"--megabytes {args.megabytes:g} --repeats {args.repeats}",
        "commit": commit.stdout.strip() or None,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_cpu_name()}",
        "load_average": round(os.getloadavg()[1], 1),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "tokenizers")},
        },
        "documents": len(texts),
        "megabytes": sum(len(text.encode()) for text in texts) / 1e6,
        "batch_size": BATCH_SIZE,
        "microbatch_samples": MICROBATCH_SAMPLES,
        "rows": rows,
        "medians": medians,
        "targets_met": {
            f"{key} >= {target:,}": medians[key] >= target for key, target in TARGETS.items()
        },
        "cores_that_feed_a_gpu": {
            "tokens_per_s": args.gpu_tokens_per_second,
            **{
                name: args.gpu_tokens_per_second / medians[f"{name}_tokens_per_cpu_s"]
                for name in ("text", "ids")
            },
        },
    }


def main() -> int:
    """Measure, print, and write the record where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gpu_tokens_per_second", type=float, default=750_000)
    parser.add_argument("--folder", help="where to write; default: the temporary folder")
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    record = json.dumps(measure(args), indent=2)
    print(record)
    if args.record:
        args.record.write_text(record + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
