"""What a worker does with a task, be it a process here or Ray's."""

import contextlib
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mosaicbert.errors import MosaicBertError
from mosaicbert.executors.tasks import Failure, Work


def call(
    work: Work, payload: Any, report: Callable[[Any], None], log_file: Path | None
) -> tuple[str, Any]:
    """Do a task: ("done", result) or ("failed", Failure)."""
    try:
        return "done", work(payload, report)
    except MosaicBertError as error:
        print(f"mosaicbert: {error}", file=sys.stderr)
        return "failed", Failure(str(error), _picklable(error), _is_out_of_memory(error))
    except Exception as error:
        traceback.print_exc()
        where = f" (traceback in {log_file})" if log_file else ""
        error.add_note(f"in a worker process:\n{traceback.format_exc()}")
        text = f"{type(error).__name__}: {error}{where}"
        return "failed", Failure(text, _picklable(error), _is_out_of_memory(error))


def _picklable(error: Exception) -> Exception:
    """The error itself, or one that says the same where it cannot travel."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _is_out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported here
            return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def output_to(log_file: Path | None) -> Iterator[None]:
    """Send this process's output, also that of libraries in C, to the end of a file."""
    if log_file is None:
        yield
        return
    log_file.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    before = [os.dup(1), os.dup(2)]
    file = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    try:
        yield
    finally:
        _flush()
        for number, copy in enumerate(before, 1):
            os.dup2(copy, number)
            os.close(copy)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
