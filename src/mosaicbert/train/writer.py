"""The thread that fills a save folder, and takes old checkpoints away."""

import logging
import threading

from mosaicbert.errors import CheckpointError, MosaicBertError
from mosaicbert.retrying import retried
from mosaicbert.train.checkpoint import Checkpoint
from mosaicbert.train.store import BEST, SaveFolder, WriteAssets

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, one at a time. For rank 0.

    An error surfaces at the next `save` or at `wait`. Of this run's checkpoints the newest `keep`
    stay (-1: all).
    """

    def __init__(
        self, folder: SaveFolder, run_id: str, keep: int, write_assets: WriteAssets | None
    ) -> None:
        self.folder = folder
        self.run_id = run_id
        self.keep = keep
        self.newest: str | None = None
        """Name of the last checkpoint that is whole."""
        self.kept: str | None = None
        """Name of one that stays, whatever `keep` says; `best` in a local folder links to it."""
        self._write_assets = write_assets
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, checkpoint: Checkpoint, only_state: bool = False) -> None:
        """Begin to write; waits only for a checkpoint that is still being written.

        `only_state`: it is there already, and new in its state alone.
        """
        self.wait()
        # Not a daemon: a run that ends in an error still completes its last checkpoint.
        self._thread = threading.Thread(
            target=self._work,
            args=(checkpoint, only_state),
            name=f"checkpoint-{checkpoint.name}",
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            CheckpointError: writing failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self, checkpoint: Checkpoint, only_state: bool) -> None:
        try:
            if only_state:
                self.folder.write_state(checkpoint)
            else:
                self.folder.write(checkpoint, self._write_assets)
            self.newest = checkpoint.name
            self.link_kept()
            self.remove_old()
        except MosaicBertError as error:
            self._error = error
        except Exception as error:
            self._error = CheckpointError(
                f"{self.folder.uri(checkpoint.name)} cannot be written ({error!r}). Check space, "
                "rights and connection; with autoresume: true the run goes on from the one before."
            )
            self._error.__cause__ = error

    def link_kept(self) -> None:
        """Let `best` lead to the one that stays."""
        if self.kept:
            self.folder.link(BEST, self.kept)

    def remove_old(self) -> None:
        """Remove this run's checkpoints beyond the newest `keep`."""
        if self.keep > 0:
            own = [name for name in self.folder.names() if self._is_own(name)]
            for name in own[: -self.keep]:
                if name not in (self.newest, self.kept):
                    self._remove(name)

    def _remove(self, name: str) -> None:
        """Take an old checkpoint away; one that does not go is told of and never stops the run."""
        try:
            if self.folder.is_local:
                self.folder.remove(name)
            else:
                retried(self.folder.uri(name), lambda: self.folder.remove(name))
        except Exception as error:  # every store's client has its own kinds
            log.warning("%s cannot be removed (%r).", self.folder.uri(name), error)

    def _is_own(self, name: str) -> bool:
        return self.folder.run_of(name) == self.run_id
