"""Starts the processes of one machine, shows the first error first and alone, leaves no orphans.

Rank 0 of the machine keeps the terminal's stdout; its stderr passes through here a moment late, so
that a death elsewhere is noticed before the errors that follow from it are shown. What the others
print is kept back, and shown only of the one that failed first.
"""

import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import IO

from mosaicbert.errors import TrainingError
from mosaicbert.launch.nodes import NodeWatch

DRAIN_SECONDS = 0.5
"""How long to read on what a process that has ended left in its pipe."""
POLL_SECONDS = 0.02
STDERR_DELAY_SECONDS = 0.3
GATHER_SECONDS = (0.5, 5.0)
"""How long to wait after a death for others, before one of them is named as the first; longer
where all that died so far say that another rank is to blame."""
STOP_SECONDS = 10.0
"""How long the other processes have to end after a failure, before they are killed."""
KEPT_BYTES = 256 * 1024
TRACEBACK = b"Traceback (most recent call last)"
FOLLOWS_FROM_ANOTHER = b"lost contact with another rank"
"""What `train.distributed` says of an exchange that failed."""
_LIBC = ctypes.CDLL(None)


class Child:
    """One process, with a thread that takes in what it prints."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], is_first: bool) -> None:
        self.rank = int(environ["RANK"])
        self.process = subprocess.Popen(
            command,
            env=dict(environ),
            stdout=None if is_first else subprocess.PIPE,
            stderr=subprocess.PIPE if is_first else subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches us alone, and a session can be killed whole
            preexec_fn=_die_with_parent,
        )
        self.chunks: deque[tuple[float, bytes]] = deque()
        self.ended_at = 0.0
        self._lock = threading.Lock()
        stream = self.process.stderr if is_first else self.process.stdout
        assert stream is not None
        self._thread = threading.Thread(target=self._take_in, args=(stream,), daemon=True)

    def start_reading(self) -> None:
        """Start the thread; after all processes are there, for threads and forks do not mix."""
        self._thread.start()

    def _take_in(self, stream: IO[bytes]) -> None:
        kept = 0
        while chunk := os.read(stream.fileno(), 65536):
            with self._lock:
                self.chunks.append((time.monotonic(), chunk))
                kept += len(chunk)
                while kept > KEPT_BYTES and len(self.chunks) > 1:
                    kept -= len(self.chunks.popleft()[1])

    def take_in_the_rest(self) -> None:
        """Of a process that has ended; what it started may hold the pipe open, so not for long."""
        self._thread.join(DRAIN_SECONDS)

    def poll(self) -> int | None:
        """The exit code, as a shell counts it, once the process has ended."""
        code = self.process.poll()
        if code is not None and not self.ended_at:
            self.ended_at = time.monotonic() - POLL_SECONDS
        return code if code is None or code >= 0 else 128 - code

    def output(self, since: float = 0.0, until: float = float("inf")) -> bytes:
        """What it printed in an interval of the monotonic clock."""
        with self._lock:
            return b"".join(chunk for at, chunk in self.chunks if since < at <= until)

    @property
    def blames_another(self) -> bool:
        """Whether it says that another rank is the cause."""
        return FOLLOWS_FROM_ANOTHER in self.output()

    def failed_at(self) -> tuple[bool, float]:
        """Sorts failures, causes before what follows from them: by when the traceback came."""
        with self._lock:
            times = [at for at, chunk in self.chunks if TRACEBACK in chunk]
        return self.blames_another, times[-1] if times else self.ended_at

    def send(self, number: int) -> None:
        """Signal the process, if it is still there."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)

    def kill_all(self) -> None:
        """Kill the process and whatever it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _die_with_parent() -> None:
    """Runs in the new process before its program does, so it must not load anything."""
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Supervisor:
    """The processes of one machine from start to end."""

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        self.children: list[Child] = []
        self.received: signal.Signals | None = None
        self._shown_until = 0.0
        try:
            for index, environ in enumerate(environments):
                self.children.append(Child(command, environ, is_first=index == 0))
        except BaseException:
            self.kill()
            raise
        for child in self.children:
            child.start_reading()

    def wait(self, watch: NodeWatch | None) -> int:
        """Wait for all to end well, or for the first that does not; returns the exit code.

        Raises:
            TrainingError: `watch` says that another machine is in trouble.
        """
        while True:
            codes = [child.poll() for child in self.children]
            if any(codes):
                break
            if None not in codes:
                self._relay(time.monotonic())
                return 0
            if watch is not None and (trouble := watch.trouble()):
                watch.end(trouble)  # machine 0 tells the others on
                self._stop_others()
                raise TrainingError(trouble)
            self._relay(time.monotonic() - STDERR_DELAY_SECONDS)
            time.sleep(POLL_SECONDS)
        if self.received is not None:  # asked for: the others end likewise
            self._wait_for_all(math.inf)
            self._relay(time.monotonic())
            return max(child.poll() or 0 for child in self.children)
        first = self._first_failure()
        self._show_failure(first)
        if watch is not None:
            watch.end(f"rank {first.rank} failed with exit code {first.poll()}")
        self._stop_others()
        return first.poll() or 1

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on; the second one kills."""
        if self.received is not None:
            self.kill()
        self.received = signal.Signals(number)
        for child in self.children:
            child.send(number)

    def kill(self) -> None:
        """Kill every process and whatever it started."""
        for child in self.children:
            child.kill_all()

    def _first_failure(self) -> Child:
        """The process that failed first, of those that fail within a moment."""
        began = time.monotonic()
        while True:
            failed = [child for child in self.children if child.poll()]
            elapsed = time.monotonic() - began
            known = any(not child.blames_another for child in failed)
            if elapsed > GATHER_SECONDS[0 if known else 1] or len(failed) == len(self.children):
                break
            time.sleep(POLL_SECONDS)
        for child in failed:
            child.take_in_the_rest()
        first = min(failed, key=Child.failed_at)
        if first.poll() == 2 and self.children[0].poll() == 2:
            return self.children[0]  # the user's mistake, the same for all
        return first

    def _relay(self, until: float) -> None:
        """Pass on what rank 0 of this machine wrote to stderr, up to a moment.

        What blames another rank waits until that rank is known.
        """
        text = self.children[0].output(self._shown_until, until)
        if text and (FOLLOWS_FROM_ANOTHER not in text or self.children[0].poll() is not None):
            _show(text)
            self._shown_until = until

    def _show_failure(self, first: Child) -> None:
        code = first.poll() or 1
        if first is self.children[0]:
            self._relay(time.monotonic())
        else:
            _show(_error_of(first, code))
        if code > 128:
            _show(f"Rank {first.rank} was ended by {_signal_name(code - 128)}.\n".encode())

    def _stop_others(self) -> None:
        for child in self.children:
            child.send(signal.SIGTERM)
        self._wait_for_all(STOP_SECONDS)

    def _wait_for_all(self, seconds: float) -> None:
        began = time.monotonic()
        while any(child.poll() is None for child in self.children):
            if time.monotonic() - began > seconds:
                return
            time.sleep(POLL_SECONDS)


def _error_of(child: Child, code: int) -> bytes:
    """The end of what a process printed: from its traceback on, or its last lines."""
    text = child.output().rstrip()
    if not text:
        return b""
    at = text.find(TRACEBACK) if TRACEBACK in text else text.rfind(b"mosaicbert: ")
    lines = text[at:] if at >= 0 else b"\n".join(text.split(b"\n")[-20:])
    head = b"" if code == 2 else f"Rank {child.rank} failed first:\n".encode()
    return head + lines + b"\n"


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return name + (" (out of memory?)" if number == signal.SIGKILL else "")


def _show(text: bytes) -> None:
    sys.stderr.write(text.decode(errors="replace"))
    sys.stderr.flush()


def supervise(
    command: Sequence[str], environments: Sequence[Mapping[str, str]], *, num_nodes: int = 1
) -> int:
    """Run `command` once for each environment, until all end well or one does not.

    SIGTERM and SIGINT are passed on; a second one kills. The processes die with this one.

    Returns:
        0, or the exit code of the process that failed first (128 + N for signal N).

    Raises:
        TrainingError: another machine of the run has failed or gone.
    """
    supervisor = Supervisor(command, environments)
    watched = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, supervisor.handle) for number in watched}
    watch = NodeWatch(environments[0], num_nodes) if num_nodes > 1 else None
    try:
        return supervisor.wait(watch)
    finally:
        supervisor.kill()
        if watch is not None:
            watch.end()
        for number, handler in before.items():
            signal.signal(number, handler)
