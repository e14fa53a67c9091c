import csv
import json
import math
import sys
import threading

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicbert.config.sections import LoggersConfig
from mosaicbert.duration import Progress
from mosaicbert.errors import ConfigError, DataError
from mosaicbert.redaction import REDACTED, redact
from mosaicbert.train.loggers import Background, RunFolderLogger, build_loggers, read_rows


def at(batch):
    return Progress(batch=batch, sample=batch * 4)


def write(folder, batches, start=None, close=True, **metrics):
    logger = RunFolderLogger(folder)
    if start is not None:
        logger.start(at(start))
    for batch in batches:
        logger.log({"loss": float(batch), **metrics}, at(batch))
    if close:
        logger.close()
    return logger


def batches_of(path):
    return [row["batch"] for row in read_rows(path)]


def csv_rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_on_disk_at_once(tmp_path):
    logger = write(tmp_path, [1, 2], close=False)
    assert batches_of(tmp_path / "metrics.jsonl") == [1, 2]
    assert [row["loss"] for row in csv_rows(tmp_path)] == ["1.0", "2.0"]
    logger.close()


def test_a_resumed_run_has_no_step_twice(tmp_path):
    write(tmp_path, range(1, 9))
    write(tmp_path, range(6, 11), start=5, other=1.0)
    assert batches_of(tmp_path / "metrics.jsonl") == list(range(1, 11))
    rows = csv_rows(tmp_path)
    assert [int(row["batch"]) for row in rows] == list(range(1, 11))
    assert rows[0]["other"] == ""
    assert rows[-1]["other"] == "1.0"


def test_without_a_start_the_first_row_tells_it(tmp_path):
    write(tmp_path, range(1, 9))
    write(tmp_path, range(6, 8))
    assert batches_of(tmp_path / "metrics.jsonl") == list(range(1, 8))


def test_an_evaluation_at_the_resume_point_stays(tmp_path):
    logger = write(tmp_path, [1, 2], close=False)
    logger.log({"metrics/eval/loss": 1.0}, at(2))
    logger.log({"loss": 3.0}, at(3))
    logger.close()
    write(tmp_path, [3], start=2)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["batch"] for row in rows] == [1, 2, 2, 3]
    assert rows[2]["metrics/eval/loss"] == 1.0


def test_a_finished_run_started_again_adds_no_row(tmp_path):
    """It evaluates again where it ended, to report on it: that stands there already."""
    for start in (0, 3):
        logger = write(tmp_path, range(start + 1, 4), start=start, close=False)
        logger.log({"metrics/eval/loss": 1.0}, at(3))
        logger.close()
    assert batches_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 3]
    logger = write(tmp_path, [], start=3, close=False)
    logger.log({"metrics/eval/accuracy": 1.0}, at(3))  # another metric is news
    logger.close()
    assert batches_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 3, 3]


def test_a_new_run_moves_the_old_rows_aside(tmp_path):
    write(tmp_path, range(1, 4))
    write(tmp_path, [1], start=0)
    assert batches_of(tmp_path / "metrics.jsonl") == [1]
    assert batches_of(tmp_path / "metrics.previous.jsonl") == [1, 2, 3]


@settings(max_examples=30)  # each writes four files
@given(st.integers(min_value=1, max_value=200))
def test_a_kill_in_the_middle_of_a_row_loses_that_row_alone(tmp_path_factory, num_cut):
    folder = tmp_path_factory.mktemp("run")
    write(folder, [1, 2, 3])
    path = folder / "metrics.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: max(len(content) - num_cut, 0)])
    whole = path.read_bytes().count(b"\n")
    write(folder, [whole + 1], start=whole)
    assert batches_of(path) == [*range(1, whole + 1), whole + 1]


def test_nan_is_null_in_strict_json(tmp_path):
    logger = RunFolderLogger(tmp_path)
    logger.log({"loss": math.nan, "norm": math.inf}, at(1))
    logger.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert row["loss"] is None
    assert row["norm"] is None


def test_a_damaged_row_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"batch": 1}\nnonsense\n')
    with pytest.raises(DataError, match="line 2"):
        RunFolderLogger(tmp_path).start(at(1))


def test_build_loggers_writes_config_and_environment_without_secrets(tmp_path):
    config = {"run_name": "x", "loggers": {"comet_ml": {"api_key": "hush"}}, "tokenizer_name": "t"}
    loggers = build_loggers(None, tmp_path / "runs" / "x", "x", config, rank=0)
    assert len(loggers) == 1
    assert not (tmp_path / "runs").exists()  # before the run starts
    loggers[0].start(Progress())
    loggers[0].close()
    text = (tmp_path / "runs/x/config.yaml").read_text()
    assert "hush" not in text
    assert yaml.safe_load(text)["tokenizer_name"] == "t"
    environment = json.loads((tmp_path / "runs/x/environment.json").read_text())
    assert environment["versions"]["torch"]
    assert {"python", "commit", "gpus", "command"} <= set(environment)
    assert build_loggers(None, tmp_path / "y", "x", config, rank=1) == []
    assert not (tmp_path / "y").exists()


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (logger,) = build_loggers(None, tmp_path / "file" / "run", "x", {}, rank=0)
    with pytest.raises(DataError, match="run_folder"):
        logger.start(Progress())


@pytest.mark.parametrize(
    ("key", "hidden"),
    [
        ("api_key", True),
        ("apiKey", True),
        ("hub_token", True),
        ("token", True),
        ("aws_secret_access_key", True),
        ("password", True),
        ("tokenizer_name", False),
        ("eos_token_id", False),
        ("num_tokens", False),
        ("global_train_batch_size", False),
        ("author", False),
    ],
)
def test_what_looks_like_a_secret(key, hidden):
    assert redact({"a": [{key: "v"}]}) == {"a": [{key: REDACTED if hidden else "v"}]}


def test_passwords_in_uris_are_hidden():
    assert redact("s3://me:pass@host/x") == f"s3://me:{REDACTED}@host/x"
    assert redact("s3://bucket/a@b") == "s3://bucket/a@b"


def test_secrets_on_the_command_line_are_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "x.yaml", "loggers.wandb.api_key=hush", "seed=1"])
    (logger,) = build_loggers(None, tmp_path, "x", {}, rank=0)
    logger.start(Progress())
    logger.close()
    command = json.loads((tmp_path / "environment.json").read_text())["command"]
    assert command == ["main.py", "x.yaml", f"loggers.wandb.api_key={REDACTED}", "seed=1"]


class Tracker:
    def __init__(self, error=None):
        self.rows, self.closed, self.error = [], False, error

    def log(self, metrics, progress):
        if self.error:
            raise self.error
        self.rows.append((dict(metrics), progress.batch))

    def close(self):
        self.closed = True


def test_a_tracker_gets_all_rows_with_their_own_progress():
    tracker = Tracker()
    background = Background("x", lambda start: tracker)
    progress = at(1)
    for batch in range(1, 50):
        progress.batch = batch
        background.log({"loss": 1.0}, progress)
    background.close()
    assert [batch for _, batch in tracker.rows] == list(range(1, 50))
    assert tracker.closed


def test_a_tracker_that_fails_warns_once_and_is_given_up(caplog):
    tracker = Tracker(RuntimeError("no network"))
    background = Background("x", lambda start: tracker)
    for batch in range(20):
        background.log({}, at(batch))
    background.close()
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2
    assert "no network" in messages[0]
    assert "given up" in messages[1]


def test_a_tracker_that_cannot_be_opened_does_not_stop_anything(caplog):
    def fail(start):
        raise OSError("unreachable")

    background = Background("x", fail)
    background.log({}, at(1))
    background.close()
    assert "unreachable" in caplog.text


def test_a_tracker_that_hangs_does_not_hold_the_run_up(caplog):
    release = threading.Event()

    class Slow(Tracker):
        def log(self, metrics, progress):
            release.wait(30)

    background = Background("x", lambda start: Slow(), close_seconds=0.1)
    background.log({}, at(1))
    background.close()
    release.set()
    assert "did not finish" in caplog.text


def test_nothing_starts_without_a_row():
    background = Background("x", lambda start: pytest.fail("opened"))
    background.close()


def test_unknown_settings_and_missing_packages_are_errors(tmp_path, monkeypatch):
    config = LoggersConfig(tensorboard={"logdir": "x"})
    with pytest.raises(ConfigError, match=r'tensorboard.logdir.*"log_dir"'):
        build_loggers(config, tmp_path, "x", {}, rank=0)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"mosaicbert\[wandb\]"):
        build_loggers(LoggersConfig(wandb={}), tmp_path, "x", {}, rank=0)
