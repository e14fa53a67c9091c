"""Where checkpoints lie: a save folder, local or any fsspec URI.

A save folder holds checkpoint folders and `latest`, a text file with the name of the newest.
A local checkpoint is written aside and renamed; a remote one is uploaded with `state.json` last.
`latest` moves after that. So a kill at any moment leaves the older checkpoint or the new one.
"""

import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mosaicbert.errors import CheckpointError, ConfigError
from mosaicbert.retrying import retried
from mosaicbert.train.checkpoint import (
    STATE_FILE,
    Checkpoint,
    read_folder,
    sync_to_disk,
    write_folder,
)

log = logging.getLogger(__name__)

LATEST = "latest"
BEST = "best"
PART = ".part-"
ASIDE = ".part-old-"
NAME = re.compile(r"ep(\d+)-ba(\d+)")
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}

WriteAssets = Callable[[Path], None]
T = TypeVar("T")


class SaveFolder:
    """A folder of checkpoints, at a local path or a URI."""

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/")
        try:
            self.fs, root = fsspec.core.url_to_fs(self.path, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            scheme = self.path.split("://")[0]
            extra = EXTRAS.get(scheme)
            advice = f" Install it: pip install 'mosaicbert[{extra}]'." if extra else ""
            raise ConfigError(
                f"{self.path}: no way to {scheme}:// here ({error}).{advice}"
            ) from None
        self.root = str(root).rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def uri(self, name: str) -> str:
        """Path or URI of one checkpoint."""
        return f"{self.path}/{name}"

    def names(self) -> list[str]:
        """Whole checkpoints, oldest first."""
        return self._talk("listed", self._whole) or []

    def _whole(self) -> list[str]:
        entries = [str(path).rstrip("/").rsplit("/", 1)[-1] for path in self._list()]
        found = [name for name in entries if NAME.fullmatch(name)]
        whole = [name for name in found if self.fs.exists(f"{self.root}/{name}/{STATE_FILE}")]
        return sorted(whole, key=_batch)

    def _talk(self, what: str, action: Callable[[], T]) -> T | None:
        """What the store answers, tried again where it is remote; None where nothing is there.

        Raises:
            CheckpointError: it does not answer.
        """
        try:
            return action() if self.is_local else retried(self.path, action)
        except FileNotFoundError:
            return None
        except Exception as error:  # every store's client has its own kinds
            raise CheckpointError(
                f"{self.path} cannot be {what} ({error!r}). Check rights and connection."
            ) from error

    def newest(self) -> str | None:
        """The checkpoint `latest` names; without one, that of the highest batch."""
        names, latest = self.names(), self._latest()
        if latest in names:
            return latest
        if latest and names:
            log.warning("%s names %s, which is not whole: %s it is.", LATEST, latest, names[-1])
        return names[-1] if names else None

    def _latest(self) -> str:
        return self.read_note(LATEST)

    def read_note(self, name: str) -> str:
        """A small text beside the checkpoints; empty where there is none."""
        content = self._talk("read", lambda: self.fs.cat_file(f"{self.root}/{name}"))
        return str((content or b"").decode(errors="replace")).strip()

    def write_note(self, name: str, text: str) -> None:
        """Write a small text beside the checkpoints, in one go."""
        with self._saying_what_fails():
            if self.is_local:
                Path(self.root).mkdir(parents=True, exist_ok=True)
            self._put(name, text)

    def _point_to(self, name: str) -> None:
        """Let `latest` name a checkpoint, in one go."""
        self._put(LATEST, name + "\n" if self.is_local else name)

    def _put(self, path: str, text: str) -> None:
        """Write a text file, or replace it, in one go."""
        if not self.is_local:
            key = f"{self.root}/{path}"
            retried(self.uri(path), lambda: self.fs.pipe_file(key, text.encode()))
            return
        target = Path(self.root) / path
        part = Path(self.root) / f"{PART}{target.name}"
        part.write_text(text, encoding="utf-8")
        sync_to_disk([part])
        os.replace(part, target)
        sync_to_disk([target.parent])

    def clear(self) -> None:
        """Remove the folder with all in it, the checkpoints before the notes on them."""
        with self._saying_what_fails():
            for name in self.names():
                self.remove(name)
            if self.fs.exists(self.root):
                self.fs.rm(self.root, recursive=True)

    def run_of(self, name: str) -> str | None:
        """Identity of the run that wrote a checkpoint."""
        text = self._talk("read", lambda: self.fs.cat_file(f"{self.root}/{name}/{STATE_FILE}"))
        try:
            return str(json.loads(text or "")["run_id"])
        except (ValueError, KeyError):
            return None

    def read(self, name: str) -> Checkpoint:
        """Read a checkpoint, downloading it first where it is remote."""
        with self._on_disk(name) as folder:
            return read_folder(folder)

    def write(self, checkpoint: Checkpoint, write_assets: WriteAssets | None) -> None:
        """Add a checkpoint, or replace the one of its name; then move `latest`."""
        if self.is_local:
            self._write_here(checkpoint, write_assets)
        else:
            self._upload(checkpoint, write_assets)

    def write_state(self, checkpoint: Checkpoint) -> None:
        """Replace the state alone of a checkpoint that is whole; then move `latest`."""
        self._put(f"{checkpoint.name}/{STATE_FILE}", checkpoint.state_text)
        self._point_to(checkpoint.name)

    def link(self, alias: str, name: str) -> None:
        """Let `alias` lead to a checkpoint that is there; object stores know no links."""
        root, link = Path(self.root), Path(self.root) / alias
        there = self.is_local and (root / name).exists()
        if there and not (link.is_symlink() and os.readlink(link) == name):
            with self._saying_what_fails():
                part = root / f"{PART}{alias}"
                part.unlink(missing_ok=True)
                part.symlink_to(name)
                os.replace(part, link)

    def remove(self, name: str) -> None:
        """Remove a checkpoint; one that is half removed does not count as whole."""
        if self.is_local:  # what a kill leaves of it then is cleared away by `recover`
            gone = Path(self.root) / f"{PART}gone-{name}"
            os.rename(Path(self.root) / name, gone)
            shutil.rmtree(gone)
            return
        folder = f"{self.root}/{name}"
        if self.fs.exists(f"{folder}/{STATE_FILE}"):
            self.fs.rm_file(f"{folder}/{STATE_FILE}")
        self.fs.rm(folder, recursive=True)

    def recover(self) -> None:
        """Clear away what a killed run left half-written, and put back what it had set aside.

        A kill between a checkpoint and its `latest` leaves a pointer that names nothing: it is set.
        """
        if self.is_local:
            with self._saying_what_fails():
                self._tidy()
        newest = self.newest()
        if newest is not None and newest != self._latest():
            with self._saying_what_fails():
                self._point_to(newest)

    @contextmanager
    def _saying_what_fails(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every store's client has its own kinds
            raise CheckpointError(
                f"{self.path} cannot be written ({error!r}). Check space, rights and connection."
            ) from error

    def _tidy(self) -> None:
        root = Path(self.root)
        for path in root.glob(f"{ASIDE}*"):
            name = path.name.removeprefix(ASIDE)
            if not (root / name).exists():
                os.rename(path, root / name)
        for path in root.glob(f"{PART}*"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _list(self) -> list[str]:
        return list(self.fs.ls(self.root, detail=False))

    @contextmanager
    def _on_disk(self, name: str) -> Iterator[Path]:
        if self.is_local:
            yield Path(self.root) / name
            return
        with scratch_folder() as folder:
            try:
                retried(self.uri(name), lambda: self._download(name, folder))
            except Exception as error:
                raise CheckpointError(f"{self.uri(name)} cannot be read ({error!r}).") from error
            yield folder

    def _download(self, name: str, folder: Path) -> None:
        source = f"{self.root}/{name}"
        sizes = {path: entry["size"] for path, entry in self.fs.find(source, detail=True).items()}
        if not sizes:
            raise FileNotFoundError(f"{name} is not there")
        self.fs.get(f"{source}/", f"{folder}/", recursive=True)
        for path, size in sizes.items():
            local = folder / str(path).rpartition(f"{name}/")[2]
            found = local.stat().st_size if local.exists() else 0
            if found != size:
                raise OSError(f"{path} came as {found} bytes of {size}")

    def _write_here(self, checkpoint: Checkpoint, write_assets: WriteAssets | None) -> None:
        root, name = Path(self.root), checkpoint.name
        part, old = root / f"{PART}{name}", root / f"{ASIDE}{name}"
        for path in (part, old):
            shutil.rmtree(path, ignore_errors=True)
        part.mkdir(parents=True)
        write_folder(checkpoint, part, write_assets)
        if (root / name).exists():
            os.rename(root / name, old)
        os.rename(part, root / name)
        sync_to_disk([root])
        self._point_to(name)
        shutil.rmtree(old, ignore_errors=True)

    def _upload(self, checkpoint: Checkpoint, write_assets: WriteAssets | None) -> None:
        target = f"{self.root}/{checkpoint.name}"
        with scratch_folder() as folder:
            write_folder(checkpoint, folder, write_assets)
            if retried(target, lambda: self.fs.exists(f"{target}/{STATE_FILE}")):
                retried(target, lambda: self.remove(checkpoint.name))
            files = [path for path in folder.rglob("*") if path.is_file()]
            for path in sorted(files, key=lambda path: (path.name == STATE_FILE, path)):
                key = f"{target}/{path.relative_to(folder)}"
                put = partial(self.fs.put_file, str(path), key)
                retried(f"The upload of {key}", put)
        self._point_to(checkpoint.name)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, held by a lock; clears away those whose holders were killed."""
    prefix = f"mosaicbert-checkpoint-{os.getuid()}-"
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError), _locked(path):
            if path.stat().st_uid == os.getuid():
                shutil.rmtree(path, ignore_errors=True)
    with ExitStack() as held:
        while True:
            new = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
            folder = Path(held.enter_context(new))
            with suppress(OSError):
                held.enter_context(_locked(folder))
                if folder.exists():  # nobody cleared it away before it was locked
                    break
        yield folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _batch(name: str) -> int:
    match = NAME.fullmatch(name)
    assert match
    return int(match[2])


def locate(path: str) -> tuple[SaveFolder, str]:
    """The checkpoint `path` means: itself, or the newest of a save folder (or its `latest`).

    Raises:
        CheckpointError: there is none.
    """
    parent, _, last = path.rstrip("/").rpartition("/")
    if last == LATEST or NAME.fullmatch(last):
        folder = SaveFolder(parent or ("/" if path.startswith("/") else "."))
        name = folder.newest() if last == LATEST else last
        if name in folder.names():
            return folder, name
    else:
        folder = SaveFolder(path)
        name = folder.newest()
        if name is not None:
            return folder, name
    raise CheckpointError(
        f"load_path: there is no checkpoint of a run at {path}. Name a folder such as "
        "SAVE_FOLDER/ep0-ba1000, or a save_folder for its newest. To start from other weights, set "
        "model.pretrained_checkpoint, or load_weights_only: true."
    )


def check_save_folder(folder: SaveFolder, run_id: str | None, overwrite: bool) -> None:
    """Refuse a save folder with another run's checkpoints, unless it may be overwritten.

    `run_id`: of the run that is being resumed, if any.
    """
    newest = folder.newest()
    if newest is None or overwrite or (run_id and folder.run_of(newest) == run_id):
        return
    raise ConfigError(
        f"save_folder: {folder.path} holds another run's checkpoints (such as {newest}). Set "
        "autoresume: true to go on with that run, save_overwrite: true to write over it, or "
        "choose another run_name or save_folder."
    )


def check_writable(folder: SaveFolder) -> None:
    """Tell of a folder here that cannot be written before hours of training, not after them."""
    if not folder.is_local:
        return
    path = Path(folder.root).absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        what = "may not be written by this user" if path.is_dir() else "is a file"
        raise ConfigError(
            f"save_folder: {folder.path} cannot be made: {path} {what}. Name another folder."
        )
