"""Each tracker against its own library, without a network; skipped where it is not installed."""

import importlib.util
import sqlite3
import time
import warnings

import pytest

from mosaicbert.config.sections import LoggersConfig
from mosaicbert.duration import Progress
from mosaicbert.train.loggers import build_loggers
from mosaicbert.train.trackers import flatten

# What third parties warn of is not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")


def needs(package):
    there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not there, reason=f"{package} is not installed")


def run(settings, folder, batches=(1, 2, 3)):
    """Log a falling loss through a tracker; returns what went wrong."""
    config = {"optimizer": {"lr": 0.001}, "api_key": "hush"}
    _, tracker = build_loggers(LoggersConfig(**settings), folder, "my-run", config, rank=0)
    for batch in batches:
        metrics = {"loss/train/total": 10.0 - batch, "lr": 0.1}
        tracker.log(metrics, Progress(batch=batch, epoch=0))
        tracker.log({"metrics/eval/accuracy": 0.5}, Progress(batch=batch, epoch=0))
    tracker.close()


def test_flatten():
    assert dict(flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None})) == {
        "a.b": 1,
        "a.c.d": [2],
        "e": None,
    }


def tensorboard_values(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard(tmp_path, caplog):
    run({"tensorboard": {}}, tmp_path)
    assert not caplog.records
    values = tensorboard_values(tmp_path / "tensorboard", "loss/train/total")
    assert values == [(1, 9.0), (2, 8.0), (3, 7.0)]


def test_tensorboard_forgets_what_a_resumed_run_repeats(tmp_path):
    run({"tensorboard": {}}, tmp_path, batches=(1, 2, 3))
    run({"tensorboard": {}}, tmp_path, batches=(3, 4))
    steps = [step for step, _ in tensorboard_values(tmp_path / "tensorboard", "lr")]
    assert steps == [1, 2, 3, 4]


@needs("wandb")
def test_wandb(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    run({"wandb": {"project": "test", "mode": "offline"}}, tmp_path)
    assert not caplog.records
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30
    while b"loss/train/total" not in (content := record.read_bytes()):  # its service writes late
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert b"hush" not in content
    run_id = (tmp_path / "wandb-run-id").read_text()
    assert run_id in record.name
    run({"wandb": {"project": "test", "mode": "offline"}}, tmp_path, batches=(3,))
    assert (tmp_path / "wandb-run-id").read_text() == run_id


@needs("comet_ml")
def test_comet(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("COMET_LOGGING_CONSOLE", "ERROR")
    run({"comet_ml": {"online": False, "project": "test"}}, tmp_path)
    assert not [r for r in caplog.records if r.name.startswith("mosaicbert")]
    assert list(tmp_path.glob("comet/*.zip"))
    key = (tmp_path / "comet-experiment-key").read_text()
    run({"comet_ml": {"online": False, "project": "test"}}, tmp_path, batches=(3, 4))
    assert not [r for r in caplog.records if r.name.startswith("mosaicbert")]
    assert (tmp_path / "comet-experiment-key").read_text() == key
    assert all(key in path.name for path in tmp_path.glob("comet/*.zip"))
    run({"comet_ml": {"online": False, "project": "test"}}, tmp_path)
    assert (tmp_path / "comet-experiment-key").read_text() != key


@needs("mlflow")
@pytest.mark.parametrize("named", [False, True])
def test_mlflow(named, tmp_path, caplog, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")  # so that what is set here goes again
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    uri = (tmp_path / ("elsewhere" if named else "mlruns")).as_uri()
    settings = {"experiment_name": "test"} | ({"tracking_uri": uri} if named else {})
    run({"mlflow": settings}, tmp_path)
    assert not [r for r in caplog.records if r.name.startswith("mosaicbert")]
    import mlflow

    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("test")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss/train/total")
    assert [(m.step, m.value) for m in history] == [(1, 9.0), (2, 8.0), (3, 7.0)]
    assert found.data.params["optimizer.lr"] == "0.001"
    assert found.data.params["api_key"] == "***"
    assert found.info.run_name == "my-run"
    run({"mlflow": settings}, tmp_path, batches=(3, 4))  # a resumed run goes on with it
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss/train/total")
    assert [m.step for m in history] == [1, 2, 3, 3, 4]
    assert found.info.status == "FINISHED"
    client.delete_run(found.info.run_id)
    with caplog.at_level("INFO", logger="mosaicbert"):
        run({"mlflow": settings}, tmp_path, batches=(5,))  # and where it is gone, with a new one
    assert f"run {found.info.run_id} cannot go on, a new one is opened" in caplog.text
    caplog.clear()
    (other,) = client.search_runs([experiment.experiment_id])
    assert other.info.run_id != found.info.run_id
    run({"mlflow": settings}, tmp_path)  # the same folder from the start: a new one
    assert len(client.search_runs([experiment.experiment_id])) == 2
    assert not [r for r in caplog.records if r.name.startswith("mosaicbert")]


@needs("trackio")
def test_trackio(tmp_path, caplog, monkeypatch):
    import trackio.utils

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import trackio.sqlite_storage as storage
    for module in (trackio.utils, storage):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    run({"trackio": {"project": "test"}}, tmp_path)
    assert not [r for r in caplog.records if r.name.startswith("mosaicbert")]
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics order by step").fetchall()
    assert any("loss/train/total" in str(row) for row in rows)
    run({"trackio": {"project": "test"}}, tmp_path, batches=(3, 4))
    assert not [r for r in caplog.records if r.name.startswith("mosaicbert")]
    with sqlite3.connect(database) as connection:
        names = connection.execute("select distinct run_name from metrics").fetchall()
    assert names == [("my-run",)]
