"""A request to stop, from the user or the machine, that waits for the end of the step."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)


class StopSignals:
    """While entered, SIGTERM and the first SIGINT only set `received`; a second SIGINT interrupts.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self, leaves: str) -> None:
        """`leaves`: what there will be of the run, such as `a checkpoint`."""
        self.leaves = leaves
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        log.warning("%s: the run ends after this step, with %s.", self.received.name, self.leaves)

    def leave(self) -> None:
        """End the process in the way the signal asks for; other ranks' signals count as SIGTERM."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)
