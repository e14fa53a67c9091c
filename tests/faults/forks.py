"""Commands of the package in processes forked off this one, so that imports are paid for once.

A command's processes are a group of their own: rank 0 leads it, and what it starts belongs to it.
The program that imports this must have no threads of its own.
"""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import util
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ["GOMP_SPINCOUNT"] = "0"

MODULES = (
    "torch",
    "torch._dynamo",
    "torch.distributed",
    "sklearn.metrics",
    "mosaicbert",
    "mosaicbert.data.convert",
    "mosaicbert.pretraining",
    "mosaicbert.glue_suite.jobs",
    "mosaicbert.glue_suite.live",
    "mosaicbert.finetuning",
    "mosaicbert.predict.files",
    "mosaicbert.models.export",
    "matplotlib.figure",
)
GROUP_ENDS_SECONDS = 30.0


def warm_up(more: Sequence[str] = ()) -> None:
    """Import what the commands need."""
    for name in (*MODULES, *more):
        importlib.import_module(name)


@dataclass
class Running:
    """A command at work."""

    pid: int
    log: Path
    began: float = field(default_factory=time.monotonic)
    code: int | None = None

    def poll(self) -> int | None:
        """The exit code (negative: the signal), once the leader has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, seconds: float, stop: Callable[[], bool] = lambda: False) -> int | None:
        """Wait for the leader's end, for `stop()`, or so long; the exit code if it has ended."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline and not stop():
            time.sleep(0.001)
        return self.code

    def kill(self) -> bool:
        """Kill -9 the whole group; False if its leader had ended before."""
        alive = self.poll() is None
        self.signal_group(signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.001)
        return alive

    def signal_group(self, number: int) -> None:
        """Signal every process of the group that is there."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def group_is_gone(self, seconds: float = GROUP_ENDS_SECONDS) -> bool:
        """Whether all processes of the group end by themselves within so long."""
        deadline = time.monotonic() + seconds
        while members(self.pid):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def said(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace")


def members(group: int) -> list[int]:
    """The processes of a group that are alive (not only waiting to be reaped)."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                stat = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(stat[2]) == group and stat[0] not in "ZX":
                found.append(int(name))
    return found


def start(
    words: Sequence[str],
    cwd: Path,
    *,
    ranks: int = 1,
    setup: Callable[[], None] | None = None,
    environ: dict[str, str] | None = None,
    log: Path | None = None,
) -> Running:
    """Start `mosaicbert WORDS` in `cwd`, as so many ranks.

    Its output goes to `log`, by default `log.txt` there.

    `setup` is called in each process before the command. The process ids of ranks above 0 are in
    files `rank1.pid` and so on.
    """
    sys.stdout.flush()
    for path in cwd.glob("rank*.pid"):
        path.unlink()  # of an earlier command: another process may have that id by now
    log = log or cwd / "log.txt"
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setsid()
            os.write(tell, b"x")
            code = _child(words, cwd, log, ranks, setup, environ or {})
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.read(ready, 1)
    os.close(ready)
    os.close(tell)
    return Running(pid, log)


def _child(
    words: Sequence[str],
    cwd: Path,
    log: Path,
    ranks: int,
    setup: Callable[[], None] | None,
    environ: dict[str, str],
) -> int:
    os.chdir(cwd)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ |= environ
    sys.argv = ["mosaicbert", *words]
    # New children are forked too: what "spawn" protects from, threads, is not here yet.
    context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: context("fork")  # type: ignore[assignment]
    others = _become_ranks(ranks, cwd) if ranks > 1 else []
    code = _run(words, setup)
    for pid in others:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) or code
    return code


def _become_ranks(ranks: int, cwd: Path) -> list[int]:
    """Fork the other ranks; rank 0 gets their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    others = []
    for rank in range(1, ranks):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return []
        part = cwd / f".rank{rank}.pid"
        part.write_text(str(pid))
        part.replace(cwd / f"rank{rank}.pid")
        others.append(pid)
    return others


def _run(words: Sequence[str], setup: Callable[[], None] | None) -> int:
    """The command, and what Python does at its end."""
    from mosaicbert.cli import main

    code: int
    try:
        if setup is not None:
            setup()
        code = main(list(words))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for a checkpoint being written
    util._exit_function()  # ends helpers of multiprocessing
    sys.stdout.flush()
    sys.stderr.flush()
    return code
