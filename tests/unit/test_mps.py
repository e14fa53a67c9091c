"""CUDA's multi-process service, with a script in the place of the driver's daemon."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mosaicbert.config import GlueConfig
from mosaicbert.executors import mps, start_service
from mosaicbert.executors.mps import CONTROL
from mosaicbert.glue_suite import workers

DAEMON = """#!/bin/sh
if [ "$1" = -d ]; then
    echo "start ${CUDA_VISIBLE_DEVICES:-all}" >> "$SEEN"
    touch "$CUDA_MPS_PIPE_DIRECTORY/control"
else
    read words
    echo "$words" >> "$SEEN"
fi
"""


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """What the daemon was told, line by line."""
    monkeypatch.setattr(mps, "_PROBE", "")
    return install(DAEMON, tmp_path, monkeypatch)


def install(script, tmp_path, monkeypatch):
    program = tmp_path / CONTROL
    program.write_text(script)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "seen"


def folders(tmp_path):
    return list(tmp_path.glob("mps-*"))


def test_it_runs_for_all_gpus_and_leaves_nothing(seen, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    service = start_service()
    (folder,) = folders(tmp_path)
    assert service.environment["CUDA_MPS_PIPE_DIRECTORY"] == str(folder)
    assert seen.read_text() == "start all\n"
    service.close()
    assert seen.read_text() == "start all\nquit -t 5\n"
    assert not folders(tmp_path)


def test_it_ends_with_the_process_that_started_it(seen, tmp_path):
    code = "import time, mosaicbert.executors.mps as m; m._PROBE = ''; s = m.start_service(); "
    code += "time.sleep(60)"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    wait_for(lambda: seen.exists())
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: "quit" in seen.read_text())
    wait_for(lambda: not folders(tmp_path))


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_none_where_there_is_no_daemon(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert start_service() is None
    assert "take turns: there is no nvidia-cuda-mps-control" in caplog.text


@pytest.mark.parametrize(
    ("probe", "why"),
    [
        ("raise SystemExit('cuInit answers 805')", "(cuInit answers 805)"),
        ("import time; time.sleep(60)", "(no answer in 1 s)"),
        ("import ctypes; ctypes.CDLL('libcuda-of-nowhere.so')", "libcuda-of-nowhere.so"),
    ],
)
def test_none_where_a_process_cannot_use_it(probe, why, seen, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(mps, "_PROBE", probe)
    if "sleep" in probe:
        monkeypatch.setattr(mps, "SECONDS_TO_PROBE", 1.0)
    assert start_service() is None
    assert "take turns: a process cannot use its service" in caplog.text
    assert why in caplog.text
    assert "quit" in seen.read_text()
    assert not folders(tmp_path)


def test_none_where_another_service_is(seen, monkeypatch):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/run/mps")
    assert start_service() is None
    assert not seen.exists()


def test_without_it_is_no_warning_where_nobody_asked(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level("INFO", "mosaicbert"):
        assert start_service(is_asked=False) is None
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "take turns" in record.getMessage()


def test_none_where_the_daemon_fails(tmp_path, monkeypatch, caplog):
    script = "#!/bin/sh\necho 'Cannot find MPS control daemon process' >&2\nexit 1\n"
    install(script, tmp_path, monkeypatch)
    assert start_service() is None
    assert "take turns: Cannot find MPS control daemon process." in caplog.text
    assert not folders(tmp_path)


@pytest.mark.parametrize(
    ("per_gpu", "asked"), [(2, True), (2, None), (2, False), (1, True), (1, None)]
)
def test_jobs_that_share_a_gpu_run_through_it(per_gpu, asked, seen, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    started = []

    class Workers:
        def __init__(self, work, slots, at_end=None):
            started.append((slots, at_end))

        def prepare(self, function):
            pass

    monkeypatch.setattr(workers, "LocalProcesses", Workers)
    config = {
        "parallel": True,
        "jobs_per_gpu": per_gpu,
        "cuda_mps": asked,
        "model": {"name": "hf_bert"},
        "scheduler": {"name": "linear_decay_with_warmup"},
        "tasks": {"rte": {}},
    }
    workers.build_executor(GlueConfig.model_validate(config), [None] * 4, "local")
    ((slots, at_end),) = started
    shared = per_gpu == 2 and asked is not False
    assert {"CUDA_MPS_PIPE_DIRECTORY" in slot for slot in slots} == {shared}
    assert seen.exists() == shared
    if shared:
        at_end()
        assert "quit" in seen.read_text()
