"""What a run reads and writes: the data set, downloads, checkpoints."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mosaicbert.config import TrainerConfig
from mosaicbert.config.sections import DatasetConfig, StreamConfig
from mosaicbert.data.download import Patience, read_bytes
from mosaicbert.data.mds_index import parse_index
from mosaicbert.errors import DataError

PATIENCE = Patience(retries=0, timeout_seconds=10.0)


@dataclass(frozen=True, slots=True)
class DataSize:
    """What the indexes of a data set say. Bytes as stored in the remote folder, and raw."""

    samples: int
    raw_bytes: int
    stored_bytes: int
    here: bool
    """Whether all of it lies in the local folder already."""


def data_size(dataset: DatasetConfig) -> DataSize:
    """Read the index of each stream, in the local folder or else in the remote one.

    Raises:
        DataError: an index is in neither, or the store does not answer in time.
    """
    streams: Sequence[StreamConfig | DatasetConfig]
    streams = list((dataset.streams or {}).values()) or [dataset]
    samples = raw = stored = 0
    here = True
    for stream in streams:
        split = stream.split or dataset.split
        local = _join(stream.local or dataset.local, split)
        remote = _join(stream.remote or dataset.remote, split)
        is_here = local is not None and (Path(local) / "index.json").is_file()
        folder = local if is_here else remote
        if folder is None:
            raise DataError(
                f"there is no data in {local} and no remote folder: make it with "
                "`mosaicbert convert`, or set data_remote"
            )
        index = f"{folder}/index.json"
        shards = parse_index(read_bytes(index, PATIENCE), index)
        samples += sum(shard.samples for shard in shards)
        raw += sum(shard.raw_bytes for shard in shards)
        stored += sum(shard.zip_bytes or shard.raw_bytes for shard in shards)
        here = here and is_here and all((Path(folder) / s.raw_basename).exists() for s in shards)
    return DataSize(samples, raw, stored, here)


def _join(folder: str | None, split: str | None) -> str | None:
    return folder if folder is None or not split else f"{folder.rstrip('/')}/{split}"


def free_bytes(folder: str | None) -> int | None:
    """Free space where a local folder lies or will lie; None for URIs and no folder."""
    if folder is None or "://" in folder:
        return None
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def checkpoints_kept(config: TrainerConfig, num_saves: float) -> int:
    """How many checkpoints lie in the save folder at the end; one more while one is written."""
    if config.save_folder is None:
        return 0
    limit = config.save_num_checkpoints_to_keep
    return max(1, round(num_saves)) if limit < 0 else max(1, min(limit, round(num_saves)))
