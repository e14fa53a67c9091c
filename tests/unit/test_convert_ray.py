"""`--engine ray`, where Ray (extra `ray`) is installed: a local cluster that loses a process."""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mosaicbert.data import convert, convert_engines
from mosaicbert.errors import DataError

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    return convert.main(parser.parse_args([str(word) for word in ("--quiet", *words)]))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_killed_process_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.txt").write_text("".join(f"document {i}\n" for i in range(5000)))
    words = ["--dataset", tmp_path / "own.txt", "--size_limit", 8000]
    run(*words, "--out_root", tmp_path / "local", "--num_workers", 1)
    work, killed = convert_engines.work, tmp_path / "killed"

    def work_or_die(task: convert_engines.Task, report: Any) -> None:
        if task[2].index == 3 and not killed.exists():
            killed.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        work(task, report)

    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(convert_engines, "work", work_or_die)
            run(*words, "--out_root", tmp_path / "ray", "--engine", "ray")
        assert killed.exists()
        assert files(tmp_path / "ray") == files(tmp_path / "local")

        (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\n")
        with pytest.raises(DataError, match=r"bad\.txt, line 2: not UTF-8"):
            run("--dataset", tmp_path / "bad.txt", "--out_root", tmp_path / "o", "--engine", "ray")
        assert files(tmp_path / "o") == {}
    finally:
        ray.shutdown()
