"""What a run ran on: versions, hardware, commit."""

import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mosaicbert.redaction import redact


def _redact_word(word: str) -> str:
    """A word of the command line: `loggers.comet_ml.api_key=...` is a setting too."""
    key, equals, value = word.partition("=")
    return key + equals + redact(value, key.rpartition(".")[2]) if equals else str(redact(word))


def describe_environment() -> dict[str, Any]:
    """Versions, hardware, commit and command line of this process."""
    gpus = range(torch.cuda.device_count())
    packages = ("mosaicbert", "torch", "transformers", "numpy", "triton")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [_redact_word(word) for word in sys.argv],
        "commit": commit_of(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in packages},
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
        "gpu_memory_bytes": [torch.cuda.get_device_properties(i).total_memory for i in gpus],
        "cpu_threads": torch.get_num_threads(),
    }


def commit_of(folder: Path) -> str | None:
    """The git commit that `folder` is at, with `-dirty` for changes; None outside of git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
