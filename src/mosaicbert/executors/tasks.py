"""What an executor is, and what it tells."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

ENGINES = ("local", "ray")

Work = Callable[[Any, Callable[[Any], None]], Any]
"""`work(payload, report) -> result`, importable by name; `report` sends word of progress."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a task failed."""

    text: str
    """For a person."""
    error: BaseException | None = None
    """What was raised; None where a process died."""
    out_of_memory: bool = False
    """Whether a GPU's memory ran out."""


@dataclass(frozen=True, slots=True)
class Event:
    """What has become of the task `key`: `detail` is a word of progress, a result or a Failure."""

    key: str
    kind: Literal["start", "progress", "done", "failed"]
    detail: Any = None


class Executor(Protocol):
    """Workers that each do one task at a time."""

    @property
    def num_free(self) -> int:
        """How many tasks to submit now."""
        ...

    def submit(self, key: str, payload: Any, log_file: Path | None = None) -> None:
        """Begin a task; its output goes to the end of `log_file`."""
        ...

    def wait(self) -> list[Event]:
        """What has happened, after about a second at most."""
        ...

    def retire(self, key: str) -> bool:
        """Where the ended task `key` ran beside others: do one fewer there. False: it ran alone."""
        ...

    def close(self) -> None:
        """End all workers, those in a task at once."""
        ...


def run_all(executor: Executor, tasks: Iterable[tuple[str, Any]]) -> Iterator[Event]:
    """Submit tasks `(key, payload)` as workers get free; gives every event, and ends with the last.

    `tasks` is read no faster than it is worked off.
    """
    source, left, running = iter(tasks), True, 0
    while left or running:
        while left and executor.num_free > 0:
            task = next(source, None)
            if task is None:
                left = False
                break
            executor.submit(*task)
            running += 1
        for event in executor.wait() if running else ():
            running -= event.kind in ("done", "failed")
            yield event
