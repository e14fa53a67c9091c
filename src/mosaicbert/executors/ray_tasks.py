"""Tasks on a Ray cluster."""

import importlib
import logging
from pathlib import Path
from typing import Any

from mosaicbert.errors import ConfigError
from mosaicbert.executors.tasks import Event, Failure, Work
from mosaicbert.executors.worker import call, output_to

log = logging.getLogger(__name__)

RETRIES = 3
"""How often Ray does a task again whose machine or process died."""


class RayTasks:
    """An executor on the Ray cluster that `RAY_ADDRESS` names, or on a local one.

    Ray does a task again, up to three times, when the machine or process that had it dies. Files
    must have the same paths on all machines.
    """

    def __init__(self, work: Work, *, num_gpus: float = 0.0, or_cpu: bool = False) -> None:
        """`num_gpus`: a task's share of a GPU; where it is 0 a task takes a CPU.

        `or_cpu`: take CPUs where the cluster has no GPU.

        Raises:
            ConfigError: Ray is not installed, or the cluster has no GPU.
        """
        try:
            self._ray = importlib.import_module("ray")
            queue = importlib.import_module("ray.util.queue")
        except ImportError as error:
            raise ConfigError(
                "--engine ray needs an extra: pip install 'mosaicbert[ray]'"
            ) from error
        self._is_ours = not self._ray.is_initialized()
        if self._is_ours:
            self._ray.init(log_to_driver=False)
        resources = self._ray.cluster_resources()
        if num_gpus and not resources.get("GPU"):
            if not or_cpu:
                self.close()
                raise ConfigError("The Ray cluster has no GPU. Set the device to cpu.")
            log.info("The Ray cluster has no GPU: its CPUs are used.")
            num_gpus = 0.0
        total = resources.get("GPU", 0) / num_gpus if num_gpus else resources.get("CPU", 1)
        self._size = max(1, int(total))
        self._words = queue.Queue(actor_options={"num_cpus": 0})
        self._remote = self._ray.remote(
            num_cpus=0 if num_gpus else 1, num_gpus=num_gpus, max_retries=RETRIES
        )(_ray_task)
        self._work = work
        self._running: dict[Any, str] = {}

    @property
    def num_free(self) -> int:
        """Twice as many as the cluster does at once: none waits for this process."""
        return 2 * self._size - len(self._running)

    def submit(self, key: str, payload: Any, log_file: Path | None = None) -> None:
        """Give Ray a task."""
        ref = self._remote.remote(self._work, self._words, key, payload, log_file)
        self._running[ref] = key

    def wait(self) -> list[Event]:
        """Words of progress, and tasks that have ended."""
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=0.5)
        words = self._words.get_nowait_batch(self._words.qsize())
        events = [Event(*word) for word in words]
        for ref in done:
            key = self._running.pop(ref)
            try:
                events.append(Event(key, *self._ray.get(ref)))
            except self._ray.exceptions.RayError as error:
                told = str(error).strip().splitlines()[0]
                events.append(Event(key, "failed", Failure(f"Ray gave it up: {told}")))
        return events

    def retire(self, key: str) -> bool:
        """Never: what runs beside it is the cluster's affair."""
        return False

    def close(self) -> None:
        """Cancel what is running, and leave the cluster if this class joined it."""
        for ref in getattr(self, "_running", {}):
            self._ray.cancel(ref, force=True)
        if self._is_ours:
            self._ray.shutdown()


def _ray_task(
    work: Work, words: Any, key: str, payload: Any, log_file: Path | None
) -> tuple[str, Any]:
    words.put((key, "start"))
    with output_to(log_file):
        return call(work, payload, lambda word: words.put((key, "progress", word)), log_file)
