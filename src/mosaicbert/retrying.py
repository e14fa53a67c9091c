"""Talks with a store that are tried again where they fail."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

WAITS = (1.0, 5.0, 20.0)
"""Seconds before each further try."""
HOPELESS = (FileNotFoundError, PermissionError, ImportError)

log = logging.getLogger(__name__)


def retried(what: str, action: Callable[[], T]) -> T:
    """The result of `action`, tried again after each of `WAITS`; `what` names it in the log.

    Raises whatever the last try raised; what no further try mends, at once.
    """
    for wait in WAITS:
        try:
            return action()
        except HOPELESS:
            raise
        except Exception as error:  # every store's client has its own kinds
            log.warning("%s failed (%r); next try in %g s.", what, error, wait)
            time.sleep(wait)
    return action()
