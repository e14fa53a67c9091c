"""Who does many tasks at once: processes of this machine, or a Ray cluster.

Conversion, GLUE and `predict` each give an executor one function, `work(payload, report)`, and then
one task after another; `wait` tells what has become of them. A task that raises, or whose process
dies, is an event like any other: what follows from it is the caller's affair.
"""

from mosaicbert.executors.local import LocalProcesses
from mosaicbert.executors.mps import start_service
from mosaicbert.executors.ray_tasks import RayTasks
from mosaicbert.executors.tasks import ENGINES, Event, Executor, Failure, Work, run_all

__all__ = [
    "ENGINES",
    "Event",
    "Executor",
    "Failure",
    "LocalProcesses",
    "RayTasks",
    "Work",
    "run_all",
    "start_service",
]
