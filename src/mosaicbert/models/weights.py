"""Tensors out of files and folders: safetensors, torch's pickles (restricted), Composer's."""

import json
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mosaicbert.errors import CheckpointError
from mosaicbert.retrying import retried

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = tuple(f"{name}.index.json" for name in WEIGHT_FILES)
LATEST = "latest"
"""File of a save folder that names its newest checkpoint."""
TRAINER_STATE = ("composer", "torchmetrics", "numpy", "datetime", "collections", "_codecs", "torch")
"""Modules whose objects a Composer checkpoint holds beside the weights."""
PLAIN_TYPES = {f"builtins.{kind}" for kind in ("list", "dict", "set", "int", "float", "str")}


@contextmanager
def local_copy(path: str | Path) -> Iterator[Path]:
    """`path` itself if it is here, else a temporary copy of what loading needs."""
    text = str(path)
    if "://" not in text:
        local = Path(text).expanduser()
        if local.name == LATEST and local.is_file():  # means its save folder
            local = local.parent
        yield local if local.exists() else _from_hub(text)
        return
    try:
        scratch = tempfile.TemporaryDirectory(prefix="mosaicbert-")
    except OSError as error:
        raise CheckpointError(f"{text} cannot be copied here: {error}") from error
    with scratch as folder:
        try:
            found = retried(text, lambda: _fetch(text, Path(folder)))
        except CheckpointError:
            raise
        except Exception as error:  # every store's client has its own kinds
            raise CheckpointError(f"{text} cannot be copied here: {error}") from error
        yield found


def _kind(files: Any, path: str) -> str:
    """`file`, `directory`, or an empty string for nothing. Raises what the store raises."""
    try:
        return str(files.info(path)["type"])
    except FileNotFoundError:
        return ""


def _copy(files: Any, source: str, target: Path) -> None:
    size = files.info(source)["size"]
    files.get_file(source, str(target))
    if size is not None and (found := target.stat().st_size) != size:
        raise OSError(f"{source} came as {found} bytes of {size}")


def _fetch(uri: str, folder: Path) -> Path:
    files, root = url_to_fs(uri, use_listings_cache=False)
    kind = _kind(files, root)
    if kind == "file" and Path(root).name == LATEST:
        root, kind = str(Path(root).parent), "directory"
    if kind == "file":
        target = folder / Path(root).name
        _copy(files, root, target)
        return target
    if kind != "directory":
        raise FileNotFoundError(f"{uri} does not exist.")
    if _kind(files, f"{root}/{LATEST}") == "file":
        named = files.cat_file(f"{root}/{LATEST}").decode(errors="replace").strip()
        if named in ("", ".", "..") or "/" in named:
            raise CheckpointError(f"{LATEST} of {uri} names {named!r}, no folder beside it.")
        root = f"{root}/{named}"
    for entry in files.ls(root, detail=False):
        name = Path(entry).name
        wanted = name.endswith((".json", ".safetensors", ".bin", ".pt", ".txt"))
        if wanted and name != "optimizer.safetensors":
            _copy(files, str(entry), folder / name)
    return folder


def _from_hub(name: str) -> Path:
    """A folder of the hub's cache, filled where the network allows."""
    missing = f"{name} does not exist here"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{missing}. Give a checkpoint's file or folder.")
    from huggingface_hub import snapshot_download

    try:
        files = ["*.json", "*.txt", "*.safetensors", "pytorch_model*.bin"]
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the hub's client raises every kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{missing}, and as a name on the hub it cannot be fetched: {reason}"
        ) from error


def read_folder_or_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors under the names they were saved with, and the configuration beside them."""
    if path.is_dir():
        return _read_folder(path)
    if _is_safetensors(path):
        return _read_safetensors(path), None
    return _from_pickle(path)


def _is_safetensors(path: Path) -> bool:
    """By its name, or its first bytes: the length of a header of JSON, and that one's brace."""
    if path.suffix == ".safetensors":
        return True
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return start[8:] == b"{" and start[:2] not in (b"PK", b"\x80\x02")  # torch's two formats


def checkpoint_folder(path: Path) -> Path:
    """Where the files of a checkpoint lie: a file's folder; of a save folder, its newest one.

    Raises:
        CheckpointError: the file `latest` of a save folder names nothing.
    """
    if path.is_file():
        return path.parent
    latest = path / LATEST
    if not latest.is_file():
        return path
    newest = path / latest.read_text(encoding="utf-8", errors="replace").strip()
    if newest.parent != path or not newest.is_dir():
        raise CheckpointError(f"{latest} names {newest.name!r}, which is no folder beside it.")
    return newest


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    folder = checkpoint_folder(folder)
    config = folder / "config.json"
    found = _read_json(config) if config.is_file() else None
    for name in INDEX_FILES:
        if (folder / name).is_file():
            weights: dict[str, Tensor] = {}
            for shard in _shard_names(folder / name):
                weights |= read_folder_or_file(folder / shard)[0]
            return weights, found
    files = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not files:  # Composer's save folder, or a folder with nothing but the weights
        files = sorted(folder.glob("latest-rank0*")) or [
            file for file in sorted(folder.iterdir()) if file.suffix in (".pt", ".safetensors")
        ]
    if len(files) == 0 or (len(files) > 1 and files[0].name not in WEIGHT_FILES):
        names = ", ".join(file.name for file in files)
        raise CheckpointError(
            f"{folder} holds {f'several checkpoints ({names})' if files else 'no checkpoint'}: "
            f"give one file, or a folder with {' or '.join(WEIGHT_FILES)}, or with a file "
            f"{LATEST!r} that names one."
        )
    weights, inside = read_folder_or_file(files[0])
    return weights, found or inside


def _shard_names(index: Path) -> list[str]:
    """The files that an index of Hugging Face's names: all of them beside it."""
    named = _read_json(index).get("weight_map")
    names: list[Any] = list(named.values()) if isinstance(named, dict) else [None]
    beside = {path.name for path in index.parent.iterdir() if path.is_file()}
    for name in names:
        if not isinstance(name, str) or name not in beside:
            raise CheckpointError(f"{index} names {name!r:.100}, which is no file beside it.")
    return sorted(set(names))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    return tensors


# --- pickles --------------------------------------------------------------------------------------


class _Inert:
    """Stands in for an object of a trainer's state: takes anything, does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def __hash__(self) -> int:
        return id(self)

    def append(self, item: object) -> None:
        """For pickles of lists."""

    def extend(self, items: object) -> None:
        """For pickles of lists."""


def _from_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """A bare state dict, or the model and its configuration out of a Composer checkpoint."""
    content = _unpickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict.")
    state = content.get("state")
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        weights = state["model"]
        where = state.get("integrations", {})
        for key in ("huggingface", "model", "config", "content"):
            where = where.get(key, {}) if isinstance(where, Mapping) else {}
        config = dict(where) if isinstance(where, Mapping) and where else None
    else:
        weights, config = content, None
        for key in ("state_dict", "model"):
            if isinstance(content.get(key), Mapping):
                weights = content[key]
    whole = all(isinstance(n, str) and isinstance(t, Tensor) for n, t in weights.items())
    if not weights or not whole:
        raise CheckpointError(
            f"{path} holds no state dict: its keys are {', '.join(map(str, list(content)[:8]))}."
        )
    return dict(weights), config


def _unpickle(path: Path) -> Any:
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty.")
    try:
        is_zip = zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:  # it looks like one, but of several disks
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not is_zip:
        return _restricted_load(path, mmap=False)  # torch's format before 1.6, or no pickle at all
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception as error:  # torch raises every kind
        raise CheckpointError(f"{path} is damaged: {error}") from error
    refused = [
        name
        for name in unknown
        if name.split(".")[0] not in TRAINER_STATE and name not in PLAIN_TYPES
    ]
    if refused:
        calls = f"{', '.join(refused[:5])}{' and others' if len(refused) > 5 else ''}"
        raise CheckpointError(
            f"{path} holds code, not only tensors: it would call {calls}. Nothing of it was run. "
            "Save the model's state_dict() alone."
        )
    _check_sums(path)
    # torch's loader fills lists and dicts only
    containers = {"collections.deque": _no_list, "collections.defaultdict": _no_dict}
    stubs: list[Any] = [
        (containers.get(name) or type("_Inert", (_Inert,), {}), name) for name in unknown
    ]
    with torch.serialization.safe_globals(stubs):
        return _restricted_load(path, mmap=True)


def _no_list(*args: object) -> list[object]:
    return []


def _no_dict(*args: object) -> dict[object, object]:
    return {}


def _check_sums(path: Path) -> None:
    """Torch does not look at the checksums that its files have."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} differs.")


def _restricted_load(path: Path, mmap: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise CheckpointError(
            f"{path} is no checkpoint, or holds code; nothing of it was run ({reason})."
        ) from error
    except Exception as error:  # torch raises every kind
        reason = str(error).split("\n")[0].split(". ")[0]
        if isinstance(error, EOFError):
            reason = "it ends too early"
        elif isinstance(error, KeyError | IndexError):
            reason = "it does not begin as torch's files do"
        raise CheckpointError(f"{path} is damaged or no checkpoint: {reason}.") from error
