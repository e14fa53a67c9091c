"""When and whence a run's state is saved, resumed and rewound."""

import logging
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mosaicbert.config.jobs import TrainerConfig
from mosaicbert.duration import Progress
from mosaicbert.errors import ConfigError, TrainingError
from mosaicbert.redaction import redact
from mosaicbert.train.best import Best
from mosaicbert.train.checkpoint import Checkpoint, load_model, load_optimizer, take_snapshot
from mosaicbert.train.distributed import Ranks
from mosaicbert.train.record import Monitor
from mosaicbert.train.store import SaveFolder, check_save_folder, check_writable, locate
from mosaicbert.train.writer import CheckpointWriter

log = logging.getLogger(__name__)

NOT_OF_THE_RUN = {"loggers", "callbacks", "load_path", "autoresume", "run_folder"}
"""Settings that a checkpoint does not note: they do not change what is computed."""


class Saving:
    """Checkpoints of one run. Rank 0 reads and writes them; the others get what it read.

    So a folder on the first machine's own disk is enough for a run on many.
    """

    def __init__(
        self,
        config: TrainerConfig,
        ranks: Ranks,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        write_assets: Callable[[Path], None] | None,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.newest: str | None = None
        """The last checkpoint loaded or written: path or URI."""
        self.saved_at = -1
        """Batch of the last save."""
        self.owes_evaluation = False
        """Whether one is due at the step at hand; noted for a run that is stopped before it."""
        self.best: Best | None = None
        self._resumed: dict[str, Any] = {}
        self._stateful: dict[str, Any] = {}
        self._told_at = -1
        self._write_assets = write_assets
        self._writer: CheckpointWriter | None = None

    def start(self) -> Progress:
        """Resume where the configuration says so, on all ranks; else make all ranks equal.

        Raises:
            ConfigError: the save folder is another run's.
            CheckpointError: there is no such checkpoint, or it does not fit.
        """
        self.ranks.from_first(self._recover)
        source = self.ranks.from_first(self._source)
        if source is None:
            self.ranks.broadcast_(list(self.model.state_dict().values()))
            checkpoint = None
        else:
            checkpoint = self._load(source)
            self.saved_at = checkpoint.progress.batch
            self._resumed = checkpoint.state
            self.owes_evaluation = bool(checkpoint.state.get("owes_evaluation"))
            self._tell_changes(checkpoint)
        run_id = checkpoint.state["run_id"] if checkpoint else None
        self.ranks.from_first(lambda: self._open(run_id))
        return checkpoint.progress if checkpoint else Progress()

    @property
    def leaves(self) -> str:
        """What a run that is stopped leaves, in words."""
        if self.config.save_folder is None:
            return "no checkpoint (save_folder names no place for one)"
        if self.config.save_num_checkpoints_to_keep == 0:
            return "no checkpoint (save_num_checkpoints_to_keep: 0)"
        return "a checkpoint"

    def follow(self, best: Best) -> None:
        """Note the evaluations in each checkpoint from now on; go on from those of the past."""
        self.best = best
        best.evaluations[:] = self._resumed.get("evaluations", [])
        if best.keep and best.evaluations and self._writer is not None:
            self._writer.kept = best.best["checkpoint"]

    def watch(self, monitors: Sequence[Monitor]) -> None:
        """Note the state of monitors that have one from now on; go on from that of the past."""
        self._stateful = {type(m).__name__: m for m in monitors if hasattr(m, "state_dict")}
        for name, state in self._resumed.get("monitors", {}).items():
            if name in self._stateful:
                self._stateful[name].load_state_dict(state)

    @property
    def kept(self) -> str | None:
        """The checkpoint of the best evaluation, on all ranks."""
        return self.ranks.from_first(
            lambda: (
                self._writer.folder.uri(self._writer.kept)
                if self._writer and self._writer.kept
                else None
            )
        )

    def save(self, progress: Progress, keep: bool = False) -> None:
        """Begin to write a checkpoint; rank 0 waits for the copy to the host only.

        `keep`: from now on this one stays, in place of the one kept before. Where it is there
        already, its state is written again, to tell of the evaluation that it stays for.
        """
        if self._writer is not None and (keep or self.saved_at != progress.batch):
            name = f"ep{progress.epoch}-ba{progress.batch}"
            only_state = keep and self._newest_after_writing() == self._writer.folder.uri(name)
            if keep:
                self._writer.kept = name
            state = {
                "run_id": self._writer.run_id,
                "run_name": self.config.run_name,
                "optimizer": self.config.optimizer.name,
                "scaler": self.scaler.state_dict(),
                "world_size": self.ranks.world_size,
                "torch": str(torch.__version__),
                "config": self._settings(),
                "owes_evaluation": self.owes_evaluation,
                "evaluations": self.best.evaluations if self.best else [],
                "monitors": {name: m.state_dict() for name, m in self._stateful.items()},
            }
            snapshot = take_snapshot(self.model, self.optimizer, progress, state)
            self._writer.save(snapshot, only_state)
        self.saved_at = progress.batch

    def written_batch(self) -> int | None:
        """Batch of a checkpoint that has become whole since the last call, on rank 0."""
        name = self._writer.newest if self._writer else None
        if self._writer is None or name is None:
            return None
        self.newest = self._writer.folder.uri(name)
        batch = int(name.rpartition("-ba")[2])
        if batch == self._told_at:
            return None
        self._told_at = batch
        return batch

    def rewind(self) -> None:
        """Take weights, optimizer and loss scale back to the newest checkpoint."""
        newest = self.ranks.from_first(self._newest_after_writing)
        if newest is None:
            raise TrainingError(
                "There is no checkpoint yet to rewind to. Set save_folder and a shorter "
                "save_interval, or let callbacks.health_checker skip in place of rewind."
            )
        self._load(newest)

    def close(self) -> str | None:
        """Wait until all is written; the newest checkpoint, on all ranks."""
        return self.ranks.from_first(self._close)

    def _close(self) -> str | None:
        newest = self._newest_after_writing()
        if self._writer is not None:  # a call that was killed may have left one too many
            self._writer.link_kept()
            self._writer.remove_old()
        return newest

    def _newest_after_writing(self) -> str | None:
        if self._writer is not None:
            self._writer.wait()
            if self._writer.newest is not None:
                self.newest = self._writer.folder.uri(self._writer.newest)
        return self.newest

    def _named(self, path: str) -> str:
        return path.replace("{run_name}", self.config.run_name)

    def _recover(self) -> None:
        if self.config.save_folder is not None:
            folder = SaveFolder(self._named(self.config.save_folder))
            if self.config.save_num_checkpoints_to_keep:
                check_writable(folder)
            folder.recover()

    def _source(self) -> str | None:
        """The checkpoint to resume from, if any: `autoresume` comes before `load_path`."""
        config = self.config
        if config.autoresume:
            if config.save_folder is None:
                raise ConfigError("autoresume: true needs a save_folder to go on from.")
            folder = SaveFolder(self._named(config.save_folder))
            newest = folder.newest()
            if newest is not None:
                return folder.uri(newest)
        if config.load_path is None or config.load_weights_only:
            return None
        folder, name = locate(self._named(config.load_path))
        return folder.uri(name)

    def _load(self, source: str) -> Checkpoint:
        read: list[Checkpoint] = []

        def read_state() -> dict[str, Any]:
            folder, name = locate(source)
            read.append(folder.read(name))
            self._check_optimizer(read[0], source)
            return read[0].state

        state = self.ranks.from_first(read_state)
        checkpoint = read[0] if read else Checkpoint({}, {}, state)
        checkpoint.model = self.ranks.broadcast_tensors(checkpoint.model)
        checkpoint.optimizer = self.ranks.broadcast_tensors(checkpoint.optimizer)
        load_model(self.model, checkpoint.model, source)
        load_optimizer(self.model, self.optimizer, checkpoint.optimizer, source)
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.newest = source
        log.info("Resumed from %s.", source)
        return checkpoint

    def _check_optimizer(self, checkpoint: Checkpoint, source: str) -> None:
        theirs, ours = checkpoint.state["optimizer"], self.config.optimizer.name
        adams = {"adamw", "decoupled_adamw"}
        if theirs != ours and not {theirs, ours} <= adams:
            raise ConfigError(
                f"optimizer.name: {ours}, but {source} is of a run with {theirs}. Use that "
                "optimizer, or set load_weights_only: true to start a fresh one."
            )

    def _open(self, run_id: str | None) -> None:
        keep = self.config.save_num_checkpoints_to_keep
        if self.config.save_folder is None:
            log.info("save_folder is not set: no checkpoints are written.")
            return
        if keep == 0:
            log.info("save_num_checkpoints_to_keep: 0: no checkpoints are written.")
            return
        folder = SaveFolder(self._named(self.config.save_folder))
        check_save_folder(folder, run_id, self.config.save_overwrite)
        self._writer = CheckpointWriter(
            folder, run_id or uuid.uuid4().hex, keep, self._write_assets
        )

    def _settings(self) -> dict[str, Any]:
        settings = self.config.model_dump(mode="json", by_alias=True, exclude=NOT_OF_THE_RUN)
        return dict(redact(settings))

    def _tell_changes(self, checkpoint: Checkpoint) -> None:
        before, now = checkpoint.state["config"], self._settings()
        changed = [key for key in now if now[key] != before.get(key)]
        if changed and self.ranks.is_first:
            log.info("Settings that changed since that checkpoint: %s.", ", ".join(changed))
