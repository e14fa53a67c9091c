"""The works whose stores and disks go wrong: how each starts, what it reads, and what it must make.

Each case has a folder of its own. The command works in `out` there, which may be a disk of its own;
with `remote` what it reads, or its checkpoints, lie in a store.
"""

import hashlib
import http.client
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import forks
import works
from works import digest, tree

SHORT = ("max_duration=4ba", "eval_interval=4ba", "save_interval=1ba", "run_folder=run")
PATIENCE = ("train_loader.dataset.download_timeout=1", "train_loader.dataset.download_retry=4")
ODD = "größer & 数据 it's"
"""A folder's name with spaces, a quote and letters of other scripts."""


KNOWN = "AWS4-HMAC-SHA256 Credential=test/20200101/us-east-1/s3/aws4_request, Signature=x"


class Store:
    """The store itself, without the proxy."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The answer's body; AssertionError unless it went well."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        link.request(method, quote(path, safe="/?=&%"), body, {"Authorization": KNOWN})
        answer = link.getresponse()
        content = answer.read()
        link.close()
        assert answer.status < 300, f"{method} {path}: {answer.status} {content[:200]!r}"
        return content

    def fill(self, path: str, folder: Path) -> None:
        """Copy a local folder."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.ask("PUT", f"/{path}/{file.relative_to(folder)}", file.read_bytes())

    def names(self, bucket: str, prefix: str) -> list[str]:
        """Keys below a prefix, without it."""
        from xml.etree import ElementTree

        found = self.ask("GET", f"/{bucket}?list-type=2&prefix={quote(prefix)}")
        keys = [e.text or "" for e in ElementTree.fromstring(found).iter() if e.tag.endswith("Key")]
        return sorted(key.removeprefix(f"{prefix}/") for key in keys)


@dataclass
class Case:
    """One case's places."""

    home: Path
    folder: Path
    store: Store
    prefix: str
    """Of the case's own keys."""
    remote: bool
    odd: bool = False
    """Whether names in the store are odd too."""

    @property
    def out(self) -> Path:
        """Where the command works."""
        return self.folder / "out"

    def at(self, place: str) -> str:
        """The URI of what all cases read, or its path here."""
        if not self.remote:
            return str(self.home / place)
        return f"s3://texts/{ODD}/{place}" if self.odd else f"s3://texts/{place}"


class Job:
    """One kind of work."""

    name: str
    uses_store = True
    places: tuple[str, ...]
    """An error in words names one of these."""

    def prepare(self, case: Case) -> None:
        """Make what this case alone reads."""

    def words(self, case: Case) -> list[str]:
        """The command."""
        raise NotImplementedError

    def inputs(self, case: Case) -> list[Path]:
        """Local files without which it cannot work."""
        raise NotImplementedError

    def result(self, case: Case) -> Any:
        """What must be as if nothing had happened."""
        raise NotImplementedError

    def also_right(self, fault: str, found: Any, expected: Any) -> bool:
        """Whether a result that differs is right all the same, since nobody could have told."""
        return False


class Convert(Job):
    """Text to shards."""

    name = "convert"
    uses_store = False
    places = ("o/", "o ", "source")

    def words(self, case: Case) -> list[str]:
        source = ["--dataset", str(case.home / "source"), "--data_subset", "en"]
        form = ["--splits", "train", "val", "--size_limit", "30000", "--compression", "zstd"]
        return ["convert", *source, *form, "--out_root", "o", "--quiet", "--num_workers", "1"]

    def inputs(self, case: Case) -> list[Path]:
        return sorted((case.home / "source/en").iterdir())

    def result(self, case: Case) -> Any:
        return tree(case.out / "o")


class Training(Job):
    """Four batches of pre-training."""

    more: tuple[str, ...] = ()

    def words(self, case: Case) -> list[str]:
        return ["pretrain", str(case.home / "pretrain.yaml"), *SHORT, *self.more]

    def losses(self, case: Case) -> list[Any]:
        """Of each batch that this call trained."""
        rows = map(json.loads, (case.out / "run/metrics.jsonl").read_text().splitlines())
        return [(r["batch"], r["loss/train/total"]) for r in rows if "loss/train/total" in r]


class Stream(Training):
    """Shards copied from a store as they are needed."""

    name = "stream"
    more = ("autoresume=false", "train_loader.dataset.local=cache", *PATIENCE)
    places = ("shard.", "index.json", "cache", "run_folder", "run/")

    def words(self, case: Case) -> list[str]:
        return [*super().words(case), f"train_loader.dataset.remote={case.at('data')}"]

    def inputs(self, case: Case) -> list[Path]:
        return [case.home / "data/train/index.json", *(case.home / "data/train").glob("shard*")]

    def result(self, case: Case) -> Any:
        shards = case.home / "data/train"
        for path in (case.out / "cache/train").glob("shard*"):
            assert digest(path) == digest(shards / path.name), f"{path.name} is damaged"
        return self.losses(case)


class Checkpoint(Training):
    """A checkpoint after each batch; in a store it is an upload."""

    name = "checkpoint"
    places = ("ckpt", "run_folder", "run/", "tokenizer")

    def words(self, case: Case) -> list[str]:
        folder = f"s3://saves/{case.prefix}/ckpt" if case.remote else "ckpt"
        return [*super().words(case), f"save_folder={folder}"]

    def inputs(self, case: Case) -> list[Path]:
        return [case.home / "tokenizer/tokenizer.json", case.home / "data/train/index.json"]

    def also_right(self, fault: str, found: Any, expected: Any) -> bool:
        """With an old list an old checkpoint is not seen, and stays."""
        more = set(found["names"]) >= set(expected["names"])
        return fault == "stale" and more and found | {"names": 0} == expected | {"names": 0}

    def result(self, case: Case) -> Any:
        """The last checkpoint, and which there are."""
        if not case.remote:
            root = case.out / "ckpt"
            newest = root / (root / "latest").read_text().strip()
            names = sorted(path.name for path in root.iterdir() if (path / "state.json").exists())
            weights = [(newest / name).read_bytes() for name in self.files]
        else:
            keys, key = case.store.names("saves", f"{case.prefix}/ckpt"), f"/saves/{case.prefix}"
            latest = case.store.ask("GET", f"{key}/ckpt/latest").decode().strip()
            names = sorted({name.split("/")[0] for name in keys if name.endswith("state.json")})
            weights = [case.store.ask("GET", f"{key}/ckpt/{latest}/{n}") for n in self.files]
        return {
            "names": names,
            "hashes": [hashlib.sha256(part).hexdigest() for part in weights],
            **self.told(case),
        }

    files = ("model.safetensors", "optimizer.safetensors")

    def told(self, case: Case) -> dict[str, Any]:
        """What the run folder says."""
        return {"losses": self.losses(case)}


class Resume(Checkpoint):
    """The same from the checkpoint after two batches on."""

    name = "resume"

    def prepare(self, case: Case) -> None:
        begun = case.home / "begun"
        if case.remote:
            case.store.fill(f"saves/{case.prefix}/ckpt", begun)
            case.store.fill(f"older-saves/{case.prefix}/ckpt", begun)
        else:
            shutil.copytree(begun, case.out / "ckpt")

    def inputs(self, case: Case) -> list[Path]:
        return sorted((case.out / "ckpt/ep0-ba2").glob("*.safetensors"))

    def told(self, case: Case) -> dict[str, Any]:
        """Those of the batches after it: a call after one that failed may have begun later."""
        return {"last loss": self.losses(case)[-1:]}


class Predict(Job):
    """A file of rows through a model."""

    name = "predict"
    places = ("model", "rows.jsonl")

    def words(self, case: Case) -> list[str]:
        files = ["--input", case.at("rows/rows.jsonl"), "--output", "rows.jsonl"]
        return ["predict", case.at("model"), "--embed", *files]

    def inputs(self, case: Case) -> list[Path]:
        newest = (case.home / "model/latest").read_text().strip()
        return [case.home / "rows/rows.jsonl", case.home / "model" / newest / "model.safetensors"]

    def result(self, case: Case) -> Any:
        return digest(case.out / "rows.jsonl")


class Export(Predict):
    """A checkpoint to a Hugging Face folder."""

    name = "export"
    places = ("model", "exported")

    def words(self, case: Case) -> list[str]:
        return ["export", case.at("model"), "exported"]

    def inputs(self, case: Case) -> list[Path]:
        return super().inputs(case)[1:]

    def result(self, case: Case) -> Any:
        return tree(case.out / "exported")


class Report(Job):
    """The page and the pictures about a run."""

    name = "report"
    places = ("run", "report.html")

    def words(self, case: Case) -> list[str]:
        return ["report", case.at("run"), "--out", "report.html"]

    def inputs(self, case: Case) -> list[Path]:
        return [case.home / "run" / name for name in ("metrics.jsonl", "config.yaml")]

    def also_right(self, fault: str, found: Any, expected: Any) -> bool:
        """Of an older state, or without a file that a run need not have, it is another page."""
        return fault in ("stale", "404") and found.keys() <= expected.keys()

    def result(self, case: Case) -> Any:
        return tree(case.out)


JOBS: dict[str, Job] = {
    job.name: job
    for job in (Convert(), Stream(), Checkpoint(), Resume(), Predict(), Export(), Report())
}


def prepare(home: Path, store: Store, start: Callable[..., forks.Running]) -> None:
    """Make what all cases read, here and in the store."""
    works.prepare(home)
    (home / "rows").mkdir()
    (home / "rows.jsonl").rename(home / "rows/rows.jsonl")
    begun = home / "begin"
    begun.mkdir()
    words = ["pretrain", str(home / "pretrain.yaml"), *SHORT, "save_folder=../begun"]
    started = start([*words, "save_num_checkpoints_to_keep=-1"], begun)
    assert started.wait(120) == 0, started.said()
    for path in (home / "begun").iterdir():
        if path.name in ("ep0-ba3", "ep0-ba4"):
            shutil.rmtree(path)
    (home / "begun/latest").write_text("ep0-ba2\n")
    for bucket in ("texts", "saves", "older-texts", "older-saves"):
        store.ask("PUT", f"/{bucket}")
    for place in ("data/train", "model", "rows", "run"):
        store.fill(f"texts/{place}", home / place)
        store.fill(f"texts/{ODD}/{place}", home / place)
