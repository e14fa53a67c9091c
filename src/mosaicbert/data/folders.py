"""From the `dataset` section of a YAML to the folders of shards that it names."""

import logging
import re
from pathlib import Path

import fsspec

from mosaicbert.config.sections import DatasetConfig, StreamConfig
from mosaicbert.data.convert_samples import TOKENIZATION
from mosaicbert.data.download import Patience, read_bytes, tidy
from mosaicbert.data.mds import INDEX, ShardInfo, parse_index, read_index, write_index
from mosaicbert.data.mds_files import write_whole
from mosaicbert.data.stream import ShardFolder
from mosaicbert.errors import ConfigError, DataError, did_you_mean

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?b?)")

log = logging.getLogger(__name__)


def streams_of(config: DatasetConfig) -> dict[str, StreamConfig]:
    """The streams by name; a data set without `streams` is one, named `dataset`.

    What a stream leaves out, it takes from the data set.
    """
    if config.streams is not None and not config.streams:
        raise ConfigError("dataset.streams is empty: name a stream, or leave the key out.")
    streams = config.streams or {"dataset": StreamConfig()}
    return {
        name: stream.model_copy(
            update={
                key: getattr(config, key)
                for key in ("local", "remote", "split")
                if getattr(stream, key) is None
            }
        )
        for name, stream in streams.items()
    }


def open_folder(config: DatasetConfig, name: str, stream: StreamConfig) -> ShardFolder:
    """The shards of one stream, as its index lists them.

    Raises:
        ConfigError: neither `local` nor `remote` is given, or not enough of them.
        DataError: there is no data set; names folder and split, and the splits there are.
    """
    split = stream.split or ""
    local, remote = _without_scheme(stream.local), _without_scheme(stream.remote)
    if local is None and remote is None:
        where = "`dataset`" if name == "dataset" else f"streams.{name}"
        raise ConfigError(
            f"Where is the text? Give {where} `local`, `remote` or both (in most YAMLs by the keys "
            "data_local and data_remote)."
        )
    if local is None and "://" in str(remote):
        raise ConfigError(f"{name}: give `local`, the folder that {remote} is copied to.")
    if local is None or (remote is not None and Path(local).resolve() == Path(remote).resolve()):
        local, remote = local or remote, None  # a local folder is read where it lies
    folder = Path(str(local)) / split
    patience = Patience(config.download_retry, config.download_timeout)
    if remote is None:
        if not (folder / INDEX).is_file():
            raise DataError(_no_data_set(Path(str(local)), split))
        return ShardFolder(folder, None, tuple(read_index(folder / INDEX)), patience)
    uri = f"{remote.rstrip('/')}/{split}".rstrip("/")
    shards = _remote_index(uri, folder, patience)
    if "text" not in shards[0].column_names:
        _copy_tokenization(uri, folder, patience)
    return ShardFolder(folder, uri, tuple(shards), patience, bool(config.keep_zip))


def _remote_index(uri: str, folder: Path, patience: Patience) -> list[ShardInfo]:
    """The index of the store, copied to the local folder; that copy where the store is away."""
    cached = folder / INDEX
    try:
        content = read_bytes(f"{uri}/{INDEX}", patience)
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DataError(
                f"{uri} has no {INDEX}, so it is no data set.{_splits_beside(uri)} Check remote "
                "and split."
            ) from error
        if not cached.is_file():
            raise
        log.warning("%s Going on with the index in %s.", error, folder)
        return read_index(cached)
    shards = parse_index(content, f"{uri}/{INDEX}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made ({error.strerror}): choose another.") from error
    tidy(folder)
    if not cached.is_file():
        write_index(folder, shards)
    elif read_index(cached) != shards:
        raise DataError(
            f"{folder} holds another data set than {uri}. Choose another local folder, or remove "
            "this one if nothing else reads it."
        )
    return shards


def _copy_tokenization(uri: str, folder: Path, patience: Patience) -> None:
    """The note of which tokenizer made the ids, where there is one."""
    if (folder / TOKENIZATION).exists():
        return
    try:
        content = read_bytes(f"{uri}/{TOKENIZATION}", patience)
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return  # a data set that another tool made
        raise
    with write_whole(folder / TOKENIZATION) as file:
        file.write(content)


def parse_bytes(text: int | str | None, key: str) -> int | None:
    """`50gb` as a number of bytes.

    Raises:
        ConfigError: another form.
    """
    if text is None or isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise ConfigError(f"{key}: {text!r} is no size. Write bytes, or such as 500mb or 50gb.")
    unit = match[2] if match[2].endswith("b") or not match[2] else f"{match[2]}b"
    return int(float(match[1]) * _UNITS[unit])


def _without_scheme(path: str | None) -> str | None:
    """A local path of a `file://` URI; others as they are. An empty string counts as none."""
    return path.removeprefix("file://") if path else None


def _no_data_set(local: Path, split: str) -> str:
    folder = local / split
    if not local.is_dir():
        return (
            f"There is no folder {local} (key `local` of a `dataset`, in most YAMLs data_local). "
            "Make a data set with `mosaicbert convert`, or name the folder of one."
        )
    splits = sorted(child.parent.name for child in local.glob(f"*/{INDEX}"))
    there = f" Splits there: {', '.join(splits)}." if splits else ""
    lacks = "has no index.json, so it is no data set" if folder.is_dir() else "is not there"
    return (
        f'{folder} {lacks} (local "{local}", split "{split}").{there}'
        f"{did_you_mean(split, splits)} Make one with `mosaicbert convert`."
    )


def _splits_beside(uri: str) -> str:
    """The other splits in the store, where it can list them."""
    parent = uri.rsplit("/", 1)[0]
    try:
        filesystem, path = fsspec.core.url_to_fs(parent)
        names = sorted(
            str(found).rsplit("/", 2)[-2] for found in filesystem.glob(f"{path}/*/{INDEX}")
        )
    except Exception as error:  # every store's client has its own kinds
        log.debug("%s: %s", parent, error)
        return ""
    return f" Splits there: {', '.join(names)}." if names else ""
