"""Tasks in processes of this machine."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mosaicbert.executors.tasks import Event, Failure, Work
from mosaicbert.executors.worker import call, output_to

SECONDS_TO_END = 10.0


@dataclass(slots=True)
class _Slot:
    environment: Mapping[str, str]
    process: Any = None
    pipe: Connection | None = None
    key: str | None = None


class LocalProcesses:
    """An executor of one child process a slot, which lives through many tasks.

    Imports and start-up are paid once a slot. The children die with their parent, however it ends.
    """

    def __init__(
        self,
        work: Work,
        slots: Sequence[Mapping[str, str]],
        at_end: Callable[[], None] | None = None,
    ) -> None:
        """`slots`: the environment variables of each process, such as which GPU it sees.

        `at_end` is called once all processes have ended.
        """
        self._work, self._at_end = work, at_end
        self._slots = [_Slot(environment) for environment in slots]
        for slot in self._slots:  # all at once: to send a large task is to wait for its process
            self._pipe(slot)
        self._started: list[Event] = []
        self._last: dict[str, _Slot] = {}  # of each task: where it ran
        self._beside: set[str] = set()  # tasks that had others beside them, in an equal environment

    @property
    def num_free(self) -> int:
        """Slots without a task."""
        return sum(slot.key is None for slot in self._slots)

    def prepare(self, function: Callable[[], object]) -> None:
        """Call `function` in each process, such as for slow imports."""
        for slot in self._slots:
            self._pipe(slot).send(function)

    def submit(self, key: str, payload: Any, log_file: Path | None = None) -> None:
        """Hand a task to a free slot."""
        slot = next(slot for slot in self._slots if slot.key is None)
        self._beside.discard(key)
        others = {o.key for o in self._slots if o.key and o.environment == slot.environment}
        if others:
            self._beside |= others | {key}
        slot.key = key
        self._last[key] = slot
        self._started.append(Event(key, "start"))
        with contextlib.suppress(BrokenPipeError):  # it has just died: `wait` will tell
            self._pipe(slot).send((payload, log_file))

    def wait(self) -> list[Event]:
        """Word from the slots."""
        events, self._started = self._started, []
        busy = {slot.pipe: slot for slot in self._slots if slot.key and slot.pipe}
        for pipe in wait(list(busy), timeout=0.0 if events else 1.0):
            assert isinstance(pipe, Connection)
            slot = busy[pipe]
            assert slot.key is not None
            event = Event(slot.key, *_receive(slot))
            if event.kind != "progress":
                slot.key = None
            events.append(event)
        return events

    def retire(self, key: str) -> bool:
        """Close the slot of an ended task that had others beside it in an equal environment.

        The last slot of an environment stays.
        """
        if key not in self._beside:
            return False
        slot = self._last[key]
        if sum(other.environment == slot.environment for other in self._slots) > 1:
            self._slots.remove(slot)
            _stop([slot])
        return True

    def close(self) -> None:
        """End the processes with SIGTERM, which a job at work takes to save where it is."""
        _stop(self._slots)
        if self._at_end is not None:
            self._at_end()

    def _pipe(self, slot: _Slot) -> Connection:
        """To the slot's process, which is started if there is none."""
        if slot.process is None or not slot.process.is_alive():
            context = multiprocessing.get_context("spawn")  # fork would copy threads' locks
            slot.pipe, theirs = context.Pipe()
            slot.process = context.Process(target=_serve, args=(theirs, self._work), daemon=True)
            with _environment(slot.environment):  # there before the child imports anything
                slot.process.start()
            theirs.close()
        assert slot.pipe is not None
        return slot.pipe


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _receive(slot: _Slot) -> tuple[Any, Any]:
    """The next word of a slot's process: (kind, detail)."""
    assert slot.pipe is not None
    try:
        kind, detail = slot.pipe.recv()
        return kind, detail
    except (EOFError, OSError):  # OSError: it died with its word half sent
        slot.process.join()
        code, slot.process = slot.process.exitcode, None
        why = f"signal {-code}" if code < 0 else f"code {code}"
        return "failed", Failure(f"its process ended with {why}")


def _stop(slots: Sequence[_Slot]) -> None:
    """End the processes of slots; one that does not within ten seconds is killed."""
    processes = [slot.process for slot in slots if slot.process is not None]
    for process in processes:
        process.terminate()
    end = time.monotonic() + SECONDS_TO_END
    for process in processes:
        process.join(timeout=max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
    for slot in slots:
        if slot.pipe is not None:
            slot.pipe.close()


def _serve(pipe: Connection, work: Work) -> None:
    """A slot's process: take tasks from the pipe until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    while True:
        try:
            task = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        if callable(task):
            with contextlib.suppress(Exception):  # a task that needs it tells
                task()
            continue
        payload, log_file = task
        with output_to(log_file):
            message = call(work, payload, lambda word: pipe.send(("progress", word)), log_file)
        with contextlib.suppress(BrokenPipeError):
            pipe.send(message)


def _end_with(sentinel: Any) -> None:
    wait([sentinel])
    os._exit(1)  # the parent was killed: nobody waits for this task
