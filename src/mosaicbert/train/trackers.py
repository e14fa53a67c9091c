"""Experiment trackers: Weights & Biases, TensorBoard, Comet, MLflow, Trackio.

Packages are imported only when a YAML names them. Each `_open_*` is called in the tracker's own
thread with the progress at its first row; settings are checked before, in the main one.
"""

import importlib
import inspect
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from mosaicbert.config.sections import LoggersConfig
from mosaicbert.duration import Progress
from mosaicbert.errors import ConfigError, did_you_mean
from mosaicbert.train.record import Logger

log = logging.getLogger(__name__)

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """What a tracker is told of a run; `config` holds no secrets."""

    name: str
    folder: Path | None
    config: dict[str, Any]


@dataclass(slots=True)
class Tracker:
    """A logger made of two functions of a library."""

    write: Callable[[Mapping[str, float], Progress], Any]
    finish: Callable[[], Any]

    def log(self, metrics: Mapping[str, float], progress: Progress) -> None:
        """Hand one row to the library."""
        self.write(metrics, progress)

    def close(self) -> None:
        """Let the library finish."""
        self.finish()


def build_trackers(
    config: LoggersConfig | None, run: Run
) -> dict[str, Callable[[Progress], Logger]]:
    """For each tracker of `loggers`, what opens it.

    Raises:
        ConfigError: its package is missing, or it does not know a setting.
    """
    found: dict[str, Callable[[Progress], Logger]] = {}
    for name, (package, extra, settings_of, open_tracker) in _TRACKERS.items():
        settings = getattr(config, name, None)
        if settings is None:
            continue
        try:
            library = importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"loggers.{name} needs a package that is not there ({error}). Install it with "
                f"pip install 'mosaicbert[{extra}]', or leave the logger out."
            ) from None
        for key in settings:
            if key not in (known := settings_of(library)):
                raise ConfigError(
                    f"loggers.{name}.{key}: unknown setting.{did_you_mean(key, known)} "
                    f"There are: {', '.join(known)}."
                )
        found[name] = partial(open_tracker, library, dict(settings), run)
    return found


def _parameters(function: str) -> Callable[[ModuleType], list[str]]:
    return lambda library: list(inspect.signature(getattr(library, function)).parameters)


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` as `("a.b", 1)`."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _open_wandb(wandb: ModuleType, settings: Settings, run: Run, start: Progress) -> Logger:
    settings = {"name": run.name, "config": run.config} | settings
    if run.folder is not None:
        settings.setdefault("dir", str(run.folder))
        settings.setdefault("id", _own_id(run.folder / "wandb-run-id", 12, start))
        settings.setdefault("resume", "allow")
    opened = wandb.init(**settings)
    return Tracker(lambda metrics, at: opened.log(dict(metrics), step=at.batch), opened.finish)


def _own_id(path: Path, length: int, start: Progress) -> str:
    """The id under which a resumed run goes on in the tracker."""
    if not _goes_on(start) or not path.exists():
        path.write_text(uuid.uuid4().hex[:length])
    return path.read_text()


def _goes_on(start: Progress) -> bool:
    return start.batch > 1


def _open_tensorboard(library: ModuleType, settings: Settings, run: Run, start: Progress) -> Logger:
    folder = settings.get("log_dir") or (run.folder or Path("runs") / run.name) / "tensorboard"
    # What an earlier attempt wrote beyond the resume point is to be forgotten.
    writer = library.SummaryWriter(str(folder), purge_step=start.batch)

    def write(metrics: Mapping[str, float], progress: Progress) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, progress.batch)
        writer.flush()

    return Tracker(write, writer.close)


def _open_comet(comet_ml: ModuleType, settings: Settings, run: Run, start: Progress) -> Logger:
    folder = {} if run.folder is None else {"offline_directory": str(run.folder / "comet")}
    extra = settings.pop("experiment_config", None) or {}
    if run.folder is not None:  # with a key of before, Comet goes on with that experiment
        key = _own_id(run.folder / "comet-experiment-key", 32, start)
        settings.setdefault("experiment_key", key)
    config = comet_ml.ExperimentConfig(**{"name": run.name, **folder, **extra})
    experiment = comet_ml.start(**settings, experiment_config=config)
    experiment.log_parameters(dict(flatten(run.config)))

    def write(metrics: Mapping[str, float], progress: Progress) -> None:
        experiment.log_metrics(dict(metrics), step=progress.batch, epoch=progress.epoch)

    return Tracker(write, experiment.end)


def _mlflow_uri(settings: Settings, run: Run) -> str:
    """As configured, else as `MLFLOW_TRACKING_URI` says, else files in the run folder."""
    folder = (run.folder or Path("runs") / run.name) / "mlruns"
    uri = settings.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI")
    uri = str(uri or folder.resolve().as_uri())
    if uri.startswith("file:"):
        # MLflow wants a database, but mlflow-skinny has no driver for one.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    return uri


MLFLOW_ID = "mlflow-run-id"
_MLFLOW_SETTINGS = ["tracking_uri", "experiment_name", "run_name", "tags"]


def _open_mlflow(mlflow: ModuleType, settings: Settings, run: Run, start: Progress) -> Logger:
    # The client is told everything by hand: the module's active run belongs to a thread.
    client = mlflow.MlflowClient(_mlflow_uri(settings, run))
    name = settings.get("experiment_name") or "mosaicbert"
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name)
    run_id = _mlflow_run_of_before(client, run, start)
    if run_id is None:
        opened = client.create_run(
            experiment, run_name=settings.get("run_name") or run.name, tags=settings.get("tags")
        )
        run_id = opened.info.run_id
        for key, value in flatten(run.config):
            client.log_param(run_id, key, str(value)[:500])
        if run.folder is not None:
            (run.folder / MLFLOW_ID).write_text(run_id)

    def write(metrics: Mapping[str, float], progress: Progress) -> None:
        now = int(time.time() * 1000)
        client.log_batch(
            run_id,
            [
                mlflow.entities.Metric(key, value, now, progress.batch)
                for key, value in metrics.items()
            ],
        )

    return Tracker(write, lambda: client.set_terminated(run_id))


def _mlflow_run_of_before(client: Any, run: Run, start: Progress) -> str | None:
    """The id of the run that a resumed one goes on with, set to running; None: it is gone."""
    path = None if run.folder is None else run.folder / MLFLOW_ID
    if path is None or not path.exists() or not _goes_on(start):
        return None
    run_id = path.read_text()
    try:
        client.update_run(run_id, status="RUNNING")
    except Exception as error:  # deleted, or of another server; its stores raise every kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.info("MLflow: run %s cannot go on, a new one is opened: %s", run_id, reason)
        return None
    return run_id


def _open_trackio(trackio: ModuleType, settings: Settings, run: Run, start: Progress) -> Logger:
    defaults = {"project": "mosaicbert", "name": run.name, "config": run.config, "embed": False}
    defaults["resume"] = "allow" if _goes_on(start) else "never"
    opened = trackio.init(**{**defaults, **settings})
    return Tracker(lambda metrics, at: opened.log(dict(metrics), step=at.batch), opened.finish)


_TRACKERS = {
    "wandb": ("wandb", "wandb", _parameters("init"), _open_wandb),
    "tensorboard": ("torch.utils.tensorboard", "", lambda _: ["log_dir"], _open_tensorboard),
    "comet_ml": ("comet_ml", "comet", _parameters("start"), _open_comet),
    "mlflow": ("mlflow", "mlflow", lambda _: _MLFLOW_SETTINGS, _open_mlflow),
    "trackio": ("trackio", "trackio", _parameters("init"), _open_trackio),
}
"""Package, extra of ours that brings it, its settings, and what opens it."""
