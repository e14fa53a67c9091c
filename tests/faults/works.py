"""The kinds of work that are killed: how each starts, and what it must have made at its end."""

import gzip
import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import forks
import fsspec
import numpy as np
import torch
import yaml
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

NUM_BATCHES, BATCH_SIZE = 12, 8
WORDS = ("the", "of", "and", "market", "window", "river", "paper", "seven", "engine", "garden")


class SlowStore(DirFileSystem):  # type: ignore[misc]
    """A folder as an object store: uploads take their time, and are seen when they are whole."""

    protocol = "slow"
    cachable = False
    seconds_per_megabyte: ClassVar[float] = 0.02

    def __init__(self, **options: Any) -> None:
        super().__init__(path="/", fs=LocalFileSystem(auto_mkdir=True))

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("slow://").lstrip("/")

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        target = Path("/") / self._strip_protocol(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        uploads = target.parents[1] / "uploads"  # what a store does not show
        uploads.mkdir(exist_ok=True)
        part = uploads / f"{os.getpid()}-{target.name}"
        with part.open("wb") as file:
            for at in range(0, len(value), 1 << 16):
                file.write(value[at : at + (1 << 16)])
                time.sleep(self.seconds_per_megabyte / 16)
        os.replace(part, target)


fsspec.register_implementation("slow", SlowStore, clobber=True)


# --- what the works read --------------------------------------------------------------------------


def documents(count: int) -> list[str]:
    """Texts, each with a number of its own."""
    generator = np.random.default_rng(5)
    return [
        f"{number} " + " ".join(generator.choice(WORDS, generator.integers(4, 40)))
        for number in range(count)
    ]


def prepare(home: Path) -> None:
    """Text to convert, shards to train on, a model and rows to predict."""
    forks.warm_up()
    source = home / "source" / "en"
    source.mkdir(parents=True)
    for split, texts in (("train", documents(3000)), ("validation", documents(300))):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        path = source / f"c4-{split}.00000-of-00001.json.gz"
        path.write_bytes(gzip.compress(lines.encode(), 1))
    rows = "".join(json.dumps({"text": text}) + "\n" for text in documents(1500))
    (home / "rows.jsonl").write_text(rows)
    write_tokenizer(home / "tokenizer")
    (home / "pretrain.yaml").write_text(yaml.safe_dump(_training(home)))
    (home / "glue.yaml").write_text(yaml.safe_dump(_glue(home)))
    started = forks.start(
        [
            *("convert", "--dataset", str(home / "source"), "--out_root", str(home / "data")),
            *("--splits", "train", "val", "--size_limit", "6000", "--quiet", "--num_workers", "1"),
        ],
        home,
    )
    assert started.wait(120) == 0, started.said()
    started = forks.start(["pretrain", str(home / "pretrain.yaml"), "save_folder=model"], home)
    assert started.wait(120) == 0, started.said()


def write_tokenizer(folder: Path) -> None:
    """One with a small vocabulary, so that a training is short."""
    from transformers import BertTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *letters, *(f"##{letter}" for letter in letters), *WORDS]
    folder.mkdir()
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)


def _training(home: Path) -> dict[str, Any]:
    tokenizer = str(home / "tokenizer")
    dataset = {"local": str(home / "data"), "max_seq_len": 32, "tokenizer_name": tokenizer}
    train = {**dataset, "split": "train", "shuffle": True, "shuffle_block_size": 64}
    return {
        "run_name": "faults",
        "model": {
            "name": "mosaic_bert",
            "model_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "hidden_dropout_prob": 0.1,
            },
        },
        "max_seq_len": 32,
        "tokenizer_name": tokenizer,
        "train_loader": {"dataset": train, "num_workers": 0},
        "eval_loader": {"dataset": {**dataset, "split": "val"}, "num_workers": 0},
        "global_train_batch_size": BATCH_SIZE,
        "train_subset_num_batches": 7,  # so that the run has more than one epoch
        "device_train_microbatch_size": 4,
        "eval_subset_num_batches": 2,
        "device_eval_batch_size": 8,
        "device": "cpu",
        "precision": "fp32",
        "max_duration": f"{NUM_BATCHES}ba",
        "eval_interval": "5ba",
        "save_interval": "2ba",
        "save_num_checkpoints_to_keep": 2,
        "autoresume": True,
        "progress_bar": False,
        "dist_timeout": 20,
        "run_folder": "run",
        "optimizer": {"lr": 1e-2},
    }


def _glue(home: Path) -> dict[str, Any]:
    short = {"max_duration": "6ba", "eval_interval": "3ba", "eval_subset_num_batches": 2}
    return {
        "base_run_name": "g",
        "device": "cpu",
        "data_dir": "sample",
        "run_folder": "run",
        "progress_bar": False,
        "max_seq_len": 32,
        "tokenizer_name": str(home / "tokenizer"),
        "model": _training(home)["model"],
        "save_finetune_checkpoint_prefix": "kept",
        "tasks": {
            "mnli": {"trainer_kwargs": {**short, "save_num_checkpoints_to_keep": 1}},
            "rte": {"seeds": [19, 717], "trainer_kwargs": short},
        },
    }


# --- the works ------------------------------------------------------------------------------------


class Work:
    """One kind of work. `home` has what it reads; each case has a folder for what it makes."""

    name: str
    files: tuple[str, ...] = ()
    """Patterns of files whose appearance is a moment to be killed at."""
    ranks = 1

    def __init__(self, home: Path) -> None:
        self.home = home

    def words(self, folder: Path, moments: random.Random | None) -> list[str]:
        """The command; `moments` varies what must not change the result."""
        raise NotImplementedError

    def setup(self, folder: Path) -> Callable[[], None] | None:
        """What to do in the new process before the command."""
        return None

    def start(self, folder: Path, moments: random.Random | None = None) -> forks.Running:
        """Start the command."""
        scratch = folder / "scratch"
        scratch.mkdir(exist_ok=True)
        return forks.start(
            self.words(folder, moments),
            folder,
            ranks=self.ranks,
            setup=self.setup(folder),
            environ={"TMPDIR": str(scratch)},
        )

    def result(self, folder: Path) -> dict[str, Any]:
        """What must be the same however often it was killed."""
        raise NotImplementedError

    def after_kill(self, folder: Path, seen: Any) -> Any:
        """Look at what a kill left; `seen` is what this gave after the kill before."""

    def litter(self, folder: Path) -> list[str]:
        """Temporary files that are still there at the end."""
        left = [*folder.rglob("*.tmp"), *folder.rglob("*.part"), *folder.rglob(".part-*")]
        left += [path for path in folder.rglob(".*") if path not in left]
        left += [path for path in (folder / "scratch").iterdir() if "torch" not in path.name]
        return [str(path.relative_to(folder)) for path in left]


def digest(path: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(folder: Path) -> dict[str, str]:
    """Digests of all files by name."""
    return {
        str(path.relative_to(folder)): digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Convert(Work):
    """Text to shards."""

    name = "convert"
    files = ("o/*/.*.tmp", "o/*/shard.*", "o/*/parts/*.json", "o/*/index.json")

    def words(self, folder: Path, moments: random.Random | None) -> list[str]:
        workers = "2" if moments and moments.random() < 0.4 else "1"
        source = ["--dataset", str(self.home / "source"), "--data_subset", "en"]
        form = ["--splits", "train", "val", "--size_limit", "8000", "--compression", "zstd"]
        return ["convert", *source, *form, "--out_root", "o", "--quiet", "--num_workers", workers]

    def after_kill(self, folder: Path, seen: Any) -> None:
        from mosaicbert.data.mds import ensure_raw, read_index

        for index in (folder / "o").glob("*/index.json"):
            for info in read_index(index):
                ensure_raw(index.parent, info, raw_folder=self._raw(index.parent))

    def result(self, folder: Path) -> dict[str, Any]:
        from mosaicbert.data.mds import Shard, ensure_raw, read_index

        found: dict[str, Any] = tree(folder / "o")
        for split, count in (("train", 3000), ("val", 300)):
            texts = []
            made = folder / "o" / split
            for info in read_index(made / "index.json"):
                shard = Shard(ensure_raw(made, info, raw_folder=self._raw(made)), info)
                texts += [shard[i]["text"] for i in range(len(shard))]
                shard.close()
            assert sorted(texts) == sorted(documents(count)), "samples are lost or repeated"
        return found

    def _raw(self, made: Path) -> Path:
        """Where to decompress: beside what the command made, not among it."""
        raw = made.parents[1] / "raw" / made.name
        raw.mkdir(parents=True, exist_ok=True)
        return raw


class Pretrain(Work):
    """Pre-training in one process, with or without a worker and a cache of streamed shards."""

    name = "pretrain"
    files = ("ckpt/.part-*", "ckpt/ep*", "run/metrics.jsonl")
    save_folder = "ckpt"
    whole = "ep*/*.json"
    """What counts as a checkpoint that is there: also half of one."""
    more: tuple[str, ...] = ()
    streams: bool | None = None
    """Whether this case streams its shards: a cache is tidied by who uses it."""

    def words(self, folder: Path, moments: random.Random | None) -> list[str]:
        words = ["pretrain", str(self.home / "pretrain.yaml"), f"save_folder={self.save_folder}"]
        if moments and moments.random() < 0.3:
            words += ["train_loader.num_workers=1"]
        if moments and self.streams is None:
            self.streams = moments.random() < 0.3
        if moments and self.streams:
            words += [f"train_loader.dataset.remote={self.home / 'data'}"]
            words += [f"train_loader.dataset.local={folder / 'cache'}"]
        return [*words, *self.more]

    def setup(self, folder: Path) -> Callable[[], None]:
        return lambda: note_steps(folder / "steps.txt")

    def after_kill(self, folder: Path, seen: int | None) -> int | None:
        """Every checkpoint that counts can be read, and the newest is not older than before."""
        from mosaicbert.train.checkpoint import read_folder
        from mosaicbert.train.store import SaveFolder

        root = self.checkpoints(folder)
        saved = SaveFolder(str(root))
        for name in saved.names():
            read_folder(root / name)
        newest = saved.newest()
        reached = saved.read(newest).progress.batch if newest else None
        assert seen is None or (reached is not None and reached >= seen), (
            f"batch {seen} had been saved, now the newest is {reached}"
        )
        return reached

    def checkpoints(self, folder: Path) -> Path:
        """Where they lie."""
        return folder / self.save_folder

    def result(self, folder: Path) -> dict[str, Any]:
        root = self.checkpoints(folder)
        newest = root / (root / "latest").read_text().strip()
        state = json.loads((newest / "state.json").read_text())
        state["progress"].pop("seconds")
        lines = (folder / "run/metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        losses = [row for row in rows if "loss/train/total" in row]
        assert [row["batch"] for row in losses] == list(range(1, len(losses) + 1))
        return {
            "checkpoints": sorted({path.parent.name for path in root.glob(self.whole)}),
            "model": digest(newest / "model.safetensors"),
            "optimizer": digest(newest / "optimizer.safetensors"),
            "progress": state["progress"],
            "losses": [(row["batch"], row["sample"], row["token"], row["loss/train/total"])
                       for row in losses],
            "evaluations": [(row["batch"], row["metrics/eval/loss"])
                            for row in rows if "metrics/eval/loss" in row],
            "steps": self._steps(folder),
        }  # fmt: skip

    def _steps(self, folder: Path) -> dict[str, list[str]]:
        """For each batch and rank the digests of what was trained on: one, however often."""
        found: dict[str, set[str]] = {}
        for line in (folder / "steps.txt").read_text().splitlines():
            place, _, content = line.rpartition(" ")
            found.setdefault(place, set()).add(content)
        return {place: sorted(found[place]) for place in sorted(found)}


def note_steps(path: Path) -> None:
    """Have the trainer note a digest of each step's samples, one line at a time."""
    from mosaicbert.train.trainer import Trainer

    original = Trainer._train_step

    def train_step(self: Trainer, step: Any, *others: Any) -> None:
        hasher = hashlib.sha256()
        for batch in step.microbatches:
            for tensor in (batch.input_ids, batch.labels, batch.target_positions):
                assert isinstance(tensor, torch.Tensor)
                hasher.update(tensor.numpy().tobytes())
        original(self, step, *others)
        line = f"{self.progress.batch} {self.ranks.rank} {hasher.hexdigest()[:16]}\n"
        with path.open("a") as file:
            file.write(line)

    Trainer._train_step = train_step  # type: ignore[method-assign]


class TwoRanks(Pretrain):
    """Pre-training on two ranks; sometimes one of them alone is killed."""

    name = "pretrain-2-ranks"
    ranks = 2


class CheckpointWrite(Pretrain):
    """A checkpoint after every batch of a model that takes longer to write."""

    name = "checkpoint-write"
    files = ("ckpt/.part-*", "ckpt/.part-*/*", "ckpt/latest", "ckpt/.part-old-*")
    more = ("save_interval=1ba", "model.model_config.hidden_size=64", "max_duration=8ba")


class Upload(Pretrain):
    """Checkpoints to a store that takes its time."""

    name = "upload"
    files = ("store/*", "store/ckpt/*/*", "store/ckpt/ep*", "store/uploads/*")
    more = ("max_duration=8ba",)
    whole = "ep*/state.json"  # objects of one half removed may stay in a store

    def words(self, folder: Path, moments: random.Random | None) -> list[str]:
        self.save_folder = f"slow://{folder}/store/ckpt"
        return super().words(folder, moments)

    def checkpoints(self, folder: Path) -> Path:
        return folder / "store/ckpt"


class Glue(Work):
    """The queue of fine-tuning jobs."""

    name = "glue"
    files = ("kept/*/*/*/.part-*", "run/jobs/*/checkpoints/.part-*", "run/jobs/*/result.json")

    def words(self, folder: Path, moments: random.Random | None) -> list[str]:
        parallel = "true" if moments and moments.random() < 0.5 else "false"
        return ["glue", str(self.home / "glue.yaml"), f"parallel={parallel}"]

    def result(self, folder: Path) -> dict[str, Any]:
        found = json.loads((folder / "run/glue.json").read_text())
        jobs = sorted(
            (job["task"], job["seed"], job["batches"], json.dumps(job["metrics"], sort_keys=True))
            for job in (
                json.loads(path.read_text())["result"]
                for path in (folder / "run/jobs").glob("*/result.json")
            )
        )
        (newest,) = (folder / "kept/g").glob("task=mnli/seed=19/ep*")
        return {
            "mean": found.get("glue"),
            "jobs": jobs,
            "kept": sorted(
                str(path.relative_to(folder)) for path in (folder / "kept/g").glob("*/*")
            ),
            "model": digest(newest / "model.safetensors"),
        }


class Export(Work):
    """A checkpoint to a Hugging Face folder."""

    name = "export"
    files = (".out-*", ".out-*/*", "out/*")

    def words(self, folder: Path, moments: random.Random | None) -> list[str]:
        return ["export", str(self.home / "model"), "out"]

    def after_kill(self, folder: Path, seen: Any) -> None:
        out = folder / "out"
        if out.exists() and any(out.iterdir()):
            assert (out / "README.md").exists(), "half an export under its name"

    def result(self, folder: Path) -> dict[str, Any]:
        return tree(folder / "out")

    def start(self, folder: Path, moments: random.Random | None = None) -> forks.Running:
        """Again after it has ended it would refuse the folder, which is right: start anew."""
        if (folder / "out").exists():
            import shutil

            shutil.rmtree(folder / "out")
        return super().start(folder, moments)


class Predict(Work):
    """A file of rows through a model."""

    name = "predict"
    files = (".rows.jsonl.part", "rows.jsonl")

    def words(self, folder: Path, moments: random.Random | None) -> list[str]:
        files = ["--input", str(self.home / "rows.jsonl"), "--output", "rows.jsonl"]
        return ["predict", str(self.home / "model"), "--embed", *files]

    def setup(self, folder: Path) -> Callable[[], None]:
        def smaller_parts() -> None:
            from mosaicbert.predict import files

            files.ROWS_AT_ONCE = 100

        return smaller_parts

    def after_kill(self, folder: Path, seen: Any) -> None:
        if (folder / "rows.jsonl").exists():
            assert len((folder / "rows.jsonl").read_text().splitlines()) == 1500

    def result(self, folder: Path) -> dict[str, Any]:
        return {"rows": digest(folder / "rows.jsonl")}

    def litter(self, folder: Path) -> list[str]:
        return sorted(set(os.listdir(folder)) - {"log.txt", "rows.jsonl", "scratch"})


KINDS: dict[str, type[Work]] = {
    kind.name: kind
    for kind in (Convert, Pretrain, TwoRanks, CheckpointWrite, Upload, Glue, Export, Predict)
}
