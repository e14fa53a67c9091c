"""What a look at one thing gives, and how long it may take."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")
State = Literal["ok", "note", "warning", "problem"]
SECONDS = 5.0
"""The longest wait for a network."""
GB = 1e9


@dataclass(frozen=True, slots=True)
class Check:
    """What one look found. `problem`: a run will stop; `warning`: it will be slow or may stop."""

    name: str
    state: State
    text: str
    remedy: str = ""


def within(seconds: float, action: Callable[[], T]) -> T:
    """The result of `action`, or a TimeoutError: clients of stores may try for minutes."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(action())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return done[0]
