"""CUDA's multi-process service (MPS): several processes at work on one GPU at the same time.

Without it processes take turns on a GPU, and kernels too small to fill one, such as those of
fine-tuning, leave most of it idle in their turn. The service is a daemon of the driver's, found as
`nvidia-cuda-mps-control`; processes that know its folder run through it.
https://docs.nvidia.com/deploy/mps
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)

CONTROL = "nvidia-cuda-mps-control"
SECONDS_TO_START, SECONDS_AFTER_WORDS = 20.0, 2.0
SECONDS_TO_END = 20.0
_GUARD = f'{CONTROL} -d; cat > /dev/null; echo quit -t 5 | {CONTROL}; rm -rf -- "$1"'
"""Waits for the end of its input, which is that of the process that started it, however it ends."""
SECONDS_TO_PROBE = 30.0
_PROBE = """
import ctypes
cuda, number, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
def ask(name, *args):
    code = getattr(cuda, name)(*args)
    if code:
        raise SystemExit(f"{name} answers {code}")
ask("cuInit", 0)
ask("cuDeviceGetCount", ctypes.byref(number))
for device in range(number.value):
    ask("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
"""
"""Whether a process can use all GPUs that it sees, without torch, whose import takes seconds."""


class MultiProcessService:
    """A service of our own, which ends with this process at the latest."""

    def __init__(self, folder: Path, guard: "subprocess.Popen[bytes]") -> None:
        self._folder, self._guard = folder, guard

    @property
    def environment(self) -> Mapping[str, str]:
        """What processes need to run through it, there before they start."""
        return _environment(self._folder)

    def close(self) -> None:
        """End it, after its processes."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        try:
            self._guard.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            log.warning("CUDA's multi-process service does not end; its folder: %s", self._folder)


def start_service(is_asked: bool = True) -> MultiProcessService | None:
    """Start it for all GPUs; None where that cannot be or another is there.

    The reason is said: as a warning if the user asked for it, else in passing.
    """
    if "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        log.info("Jobs that share a GPU run through the multi-process service that is there.")
        return None
    if shutil.which(CONTROL) is None:
        _say_without(f"there is no {CONTROL} (it comes with the driver)", is_asked)
        return None
    folder = Path(tempfile.mkdtemp(prefix="mps-"))  # a short path: sockets lie in it
    # It must see all GPUs: those that its processes see are chosen among them.
    own = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    with (folder / "out.log").open("wb") as output:
        guard = subprocess.Popen(
            ["sh", "-c", _GUARD, "sh", str(folder)],
            env=own | _environment(folder),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for us
        )
    service = MultiProcessService(folder, guard)
    if not _answers(folder):
        lines = (folder / "out.log").read_text(errors="replace").split("\n")
        service.close()
        why = next((line for line in lines if line.strip()), "it does not start")
        _say_without(why, is_asked)
        return None
    refusal = _refusal(folder)
    if refusal is not None:
        service.close()
        _say_without(f"a process cannot use its service ({refusal})", is_asked)
        return None
    log.info("Jobs that share a GPU run at the same time, by CUDA's multi-process service.")
    return service


def _answers(folder: Path) -> bool:
    """Wait until the daemon's socket is there, or until it has complained or taken too long."""
    began = time.monotonic()
    while not (folder / "control").exists():
        seconds = time.monotonic() - began
        has_spoken = (folder / "out.log").stat().st_size > 0
        if seconds > (SECONDS_AFTER_WORDS if has_spoken else SECONDS_TO_START):
            return False
        time.sleep(0.05)
    return True


def _refusal(folder: Path) -> str | None:
    """Why a process cannot compute through the service; None where it can."""
    command, env = [sys.executable, "-c", _PROBE], os.environ | _environment(folder)
    try:
        probe = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=SECONDS_TO_PROBE
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {SECONDS_TO_PROBE:.0f} s"
    lines = probe.stderr.strip().split("\n")
    return lines[-1] or f"exit code {probe.returncode}" if probe.returncode else None


def _environment(folder: Path) -> dict[str, str]:
    return {"CUDA_MPS_PIPE_DIRECTORY": str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder)}


def _say_without(why: str, is_asked: bool) -> None:
    level = logging.WARNING if is_asked else logging.INFO
    log.log(level, "cuda_mps: jobs that share a GPU take turns: %s.", why.strip().rstrip("."))
