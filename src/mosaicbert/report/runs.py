"""What a run folder holds, read from a disk or any store that fsspec knows."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import yaml

from mosaicbert.errors import DataError
from mosaicbert.redaction import redact
from mosaicbert.train.loggers import parse_rows

FILES = ("metrics.jsonl", "glue.json", "config.yaml", "environment.json")
EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}


@dataclass(frozen=True, slots=True)
class Run:
    """One run: its measurements in order, and what it was."""

    name: str
    folder: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    glue: dict[str, Any] | None = None

    def points(self, metric: str, x: str = "batch") -> list[tuple[float, float]]:
        """(x, value) of each row that has the metric; NaN where it was not finite.

        `x`: `batch`, `token` or `hours`.
        """
        found = []
        for row in self.rows:
            if metric in row:
                place = row["seconds"] / 3600 if x == "hours" else row[x]
                value = row[metric]
                found.append((float(place), math.nan if value is None else float(value)))
        return found

    def last(self, metric: str) -> float | None:
        """The newest finite value of a metric."""
        return next(
            (row[metric] for row in reversed(self.rows) if row.get(metric) is not None), None
        )

    def metrics(self, prefix: str) -> list[str]:
        """Names of the metrics that begin so, in the order they first came."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name.startswith(prefix)]


def read_run(folder: str) -> Run:
    """Read a run folder, or a folder of GLUE results.

    Secrets are blanked out, also in files that something else wrote.

    Raises:
        DataError: the folder cannot be read, holds no run, or a file of it is damaged.
    """
    texts = read_texts(folder, FILES)
    if "metrics.jsonl" not in texts and "glue.json" not in texts:
        raise DataError(
            f"{folder} is no run folder: it has neither metrics.jsonl nor glue.json."
            f"{runs_inside(folder)} Name the folder that `run_folder` in the YAML stands for, such "
            "as runs/NAME."
        )
    config = redact(_mapping(folder, "config.yaml", texts))
    return Run(
        name=str(config.get("run_name") or folder.rstrip("/").rsplit("/", 1)[-1]),
        folder=folder.rstrip("/"),
        rows=parse_rows(texts.get("metrics.jsonl", ""), f"{folder}/metrics.jsonl"),
        config=config,
        environment=redact(_mapping(folder, "environment.json", texts)),
        glue=_mapping(folder, "glue.json", texts) or None,
    )


def labels_of(runs: Sequence[Run]) -> list[str]:
    """The runs' names, with their folder's own name where several are called alike."""
    names = [run.name for run in runs]
    return [
        f"{run.name} ({run.folder.rsplit('/', 1)[-1]})" if names.count(run.name) > 1 else run.name
        for run in runs
    ]


def runs_inside(folder: str) -> str:
    """`' Runs in it: a, b.'` for a folder of run folders on this machine, else an empty string."""
    found = sorted(path.parent.name for path in Path(folder).glob("*/config.yaml"))
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return f" Runs in it: {', '.join(found[:8])}{more}." if found else ""


def open_folder(folder: str) -> tuple[Any, str]:
    """The file system of a folder or URI, and its path there.

    Raises:
        DataError: nothing here can read such URIs.
    """
    try:
        store, root = fsspec.url_to_fs(folder, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        scheme = folder.split("://")[0]
        extra = EXTRAS.get(scheme)
        advice = f" Install it: pip install 'mosaicbert[{extra}]'." if extra else ""
        raise DataError(f"{folder}: no way to {scheme}:// here ({error}).{advice}") from None
    return store, str(root).rstrip("/")


def read_texts(folder: str, names: tuple[str, ...]) -> dict[str, str]:
    """The files of a folder that there are."""
    store, root = open_folder(folder)
    found = {}
    for name in names:
        try:
            size = store.info(f"{root}/{name}")["size"]
            content = store.cat_file(f"{root}/{name}")
            if len(content) < size:
                raise ValueError(f"{len(content)} bytes of {size}")
            found[name] = content.decode()
        except FileNotFoundError:
            continue
        except Exception as error:  # each store has errors of its own
            raise DataError(
                f"{folder}/{name} cannot be read ({type(error).__name__}: {error}). "
                "Check rights and connection."
            ) from None
    return found


def _mapping(folder: str, name: str, texts: Mapping[str, str]) -> dict[str, Any]:
    try:
        text = texts.get(name, "")
        content = (
            yaml.safe_load(text) if name.endswith("yaml") else json.loads(text or "{}")
        ) or {}
        if isinstance(content, dict):
            return content
    except (yaml.YAMLError, ValueError):
        pass
    raise DataError(f"{folder}/{name} is damaged. Remove or repair it.")
