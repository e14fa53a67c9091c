"""Whose checkpoints a save folder holds: `job.json` there, locally or in a store, names the job.

Jobs of several runs may have the same save folder, and the same job other settings later.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mosaicbert.errors import ConfigError
from mosaicbert.glue_suite.planning import GlueJob

if TYPE_CHECKING:
    from mosaicbert.train.store import SaveFolder

log = logging.getLogger(__name__)

NOTE = "job.json"


def claim_folder(job: GlueJob) -> None:
    """See to it that the job goes on from checkpoints of its own only.

    Those of another job are removed, unless they were to be kept, or nobody knows whose they are.

    Raises:
        ConfigError: there are such.
    """
    folder = _folder(job)
    if folder is None:
        return
    owner = _owner(folder)
    if owner.get("digest") != job.digest and folder.newest() is not None:
        if owner.get("is_kept", True):
            raise ConfigError(
                f"{folder.path} holds the checkpoint of a job with other settings. Remove it, or "
                "give this run another base_run_name or save_finetune_checkpoint_folder."
            )
        log.info("The settings are others than before: %s is removed.", folder.path)
        folder.clear()
    mine = {"digest": job.digest, "name": job.config.run_name, "is_kept": job.keep_checkpoint}
    if owner != mine:
        folder.write_note(NOTE, json.dumps(mine))


def has_checkpoint(job: GlueJob) -> bool:
    """Whether the job's save folder holds a checkpoint of its own."""
    folder = _folder(job)
    if folder is None or _owner(folder).get("digest") != job.digest:
        return False
    return folder.newest() is not None


def drop_checkpoints(job: GlueJob) -> None:
    """Remove the job's save folder, unless another job has it by now."""
    folder = _folder(job)
    if folder is None:
        return
    owner = _owner(folder)
    if owner.get("digest") != job.digest and (owner or folder.newest() is not None):
        return  # without both it is what a kill left of a removal
    folder.clear()
    if folder.is_local:
        for parent in list(Path(folder.root).parents)[:2]:  # the task's, and the run's
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def _folder(job: GlueJob) -> "SaveFolder | None":
    from mosaicbert.train.store import SaveFolder

    path = job.config.save_folder
    return SaveFolder(path.replace("{run_name}", job.config.run_name)) if path else None


def _owner(folder: "SaveFolder") -> dict[str, Any]:
    """What the last job that claimed the folder wrote there; empty where that is not known."""
    try:
        found = json.loads(folder.read_note(NOTE))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
