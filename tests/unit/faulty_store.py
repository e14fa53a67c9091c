"""A store in memory whose faults are made to order, and a data set in it."""

import time
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar

from fsspec import AbstractFileSystem

from mosaicbert.config.sections import DatasetConfig
from mosaicbert.data.folders import open_folder, streams_of
from mosaicbert.data.mds import MDSWriter
from mosaicbert.data.stream import ShardFolder, ShardSet


class FaultyFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """A store in memory that counts reads and, on request, fails them."""

    protocol = "faulty"
    cachable = False
    files: ClassVar[dict[str, bytes]] = {}
    reads: ClassVar[Counter[str]] = Counter()
    faults: ClassVar[dict[str, list[Any]]] = {}

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        return self.answer(path)

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        Path(lpath).write_bytes(self.answer(rpath))

    def glob(self, path: str, maxdepth: Any = None, **kwargs: Any) -> list[str]:
        return [name for name in self.files if fnmatch(name, self._strip_protocol(path))]

    def answer(self, path: str) -> bytes:
        name = path.rsplit("/", 1)[-1]
        self.reads[name] += 1
        if (content := self.files.get(self._strip_protocol(path))) is None:
            raise FileNotFoundError(path)
        faults = self.faults.get(name, [])
        fault = faults.pop(0) if faults else None
        if isinstance(fault, Exception):
            raise fault
        return fault(content) if fault else content


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    return bytes([*content[:-1], content[-1] ^ 1])


def hang(content: bytes) -> bytes:
    time.sleep(1)
    return content


def upload(folder: Path, compression: str | None = None, num_samples: int = 40) -> str:
    """A data set of five shards or so, in the store."""
    with MDSWriter(
        folder / "made", {"text": "str"}, size_limit=900, compression=compression
    ) as writer:
        for i in range(num_samples):
            writer.write({"text": f"text number {i:04d} " + "x" * 60})
    for path in (folder / "made").glob("[!.]*"):
        FaultyFileSystem.files[f"bucket/data/train/{path.name}"] = path.read_bytes()
    return "faulty://bucket/data"


def folder_of(remote: str | None, local: Path | None, **settings: Any) -> ShardFolder:
    config = DatasetConfig(
        **{
            "remote": remote,
            "local": local and str(local),
            "split": "train",
            "download_timeout": 5.0,
            **settings,
        }
    )
    ((name, stream),) = streams_of(config).items()
    return open_folder(config, name, stream)


def read_all(shards: ShardSet) -> list[str]:
    return [
        shards.open(number)[i]["text"]
        for number, info in enumerate(shards.infos)
        for i in range(info.samples)
    ]


EXPECTED = [f"text number {i:04d} " + "x" * 60 for i in range(40)]


def litter(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".*")]
