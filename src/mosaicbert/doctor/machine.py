"""Looks at the machine: packages, GPUs, compiler, threads, memory, limits, network."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from mosaicbert.doctor.check import GB, SECONDS, Check, within
from mosaicbert.models import kernels
from mosaicbert.train.hardware import find_device

HUB = "huggingface.co"
LEAST_TRITON = "3.6"


def check_packages() -> Iterator[Check]:
    """Python and every package that this one needs, in the versions it needs."""
    yield Check("python", "ok", f"{platform.python_version()} ({sys.executable})")
    if not Path(importlib.util.cache_from_source(torch.__file__)).exists():
        yield Check(
            "bytecode", "warning", "Python keeps none of torch: each start compiles its sources "
            "anew, which takes seconds", "unset PYTHONDONTWRITEBYTECODE, or run once: "
            f"python -m compileall -q {Path(torch.__file__).parents[1]}",
        )  # fmt: skip
    wrong = []
    try:
        needs = importlib.metadata.requires("mosaicbert") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            "mosaicbert", "warning", "runs from its sources: the packages it needs are not checked",
            "pip install -e . where the sources lie",
        )  # fmt: skip
        return
    for text in needs:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append((need, "is missing"))
            continue
        if not need.specifier.contains(version, prereleases=True):
            wrong.append((need, f"is {version}"))
        elif need.name in ("torch", "transformers"):
            yield Check(need.name, "ok", version)
    for need, what in wrong:
        words = f"{need.name}{need.specifier}"
        yield Check(need.name, "problem", f"{what}; {words} is needed", f"pip install '{words}'")


def check_gpus() -> Iterator[Check]:
    """Driver, CUDA, each GPU; a GPU that torch cannot use."""
    driver = _nvidia_smi()
    if not torch.cuda.is_available():
        if driver is None:
            yield Check("gpu", "note", "none: runs go to the CPU, which is slow")
        elif torch.version.cuda is None:
            yield Check(
                "gpu", "problem", f"driver {driver}, but this torch is built without CUDA",
                "install torch with CUDA: see the selector on pytorch.org",
            )  # fmt: skip
        else:
            yield Check(
                "gpu", "problem", f"torch cannot use the GPU (driver {driver}, torch built for "
                f"CUDA {torch.version.cuda})", "update the driver, or install a torch built for an "
                "older CUDA; in a container, start it with --gpus all",
            )  # fmt: skip
        return
    built_for = torch.version.cuda or f"ROCm {torch.version.hip}"
    yield Check("cuda", "ok", f"{built_for}, driver {driver or 'unknown'}")
    count = torch.cuda.device_count()
    for index in range(count):
        yield _check_gpu(index)
    if count > 1 and not torch.distributed.is_nccl_available():
        yield Check("nccl", "problem", f"{count} GPUs, but this torch is built without NCCL",
                    "install torch from pytorch.org, or use one GPU: --nproc 1")  # fmt: skip


def _check_gpu(index: int) -> Check:
    """Whether one GPU works, is free, and is one whose peak is known."""
    try:
        name = torch.cuda.get_device_name(index)
        free, total = torch.cuda.mem_get_info(index)
        torch.zeros(1, device=_device(index)).add_(1).item()
    except RuntimeError as error:  # torch's own for all that CUDA says
        fault = str(error).strip().splitlines()[0]
        return Check("gpu", "problem", f"{index}: torch sees it but cannot use it: {fault}",
                     "see nvidia-smi: it may be full, in exclusive use, or too old or too new for "
                     "this torch (pytorch.org has others); CUDA_VISIBLE_DEVICES leaves it out",
                     )  # fmt: skip
    known = "" if find_device(name) else "; its peak is not known, so there is no MFU"
    text = f"{index}: {name}, {free / GB:.0f} of {total / GB:.0f} GB free{known}"
    if free < total / 2:
        return Check("gpu", "warning", text, "others use it: see nvidia-smi")
    return Check("gpu", "ok", text)


def _device(index: int) -> torch.device:
    return torch.device("cuda", index)


def check_compiler() -> Iterator[Check]:
    """Triton, and the C compiler that it and torch.compile call."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objection = kernels.why_not(device)
    if objection is None:
        yield _check_triton()
    elif device.type == "cuda" and "not installed" in objection:
        yield Check("kernels", "warning", objection, "pip install triton: much faster on a GPU")
    else:
        yield Check("kernels", "note", f"none: {objection}")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    has_compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if has_compiler and device.type == "cuda" and not headers.exists():
        yield Check("compiler", "problem", f"{headers} is missing, which Triton compiles with",
                    "apt-get install python3-dev (of this Python), or set compile: false and "
                    "MOSAICBERT_ATTENTION=sdpa")  # fmt: skip
    elif has_compiler:
        yield Check("compiler", "ok", "there is a C compiler for torch.compile")
    elif device.type == "cuda":
        yield Check("compiler", "problem", "no C compiler, which torch.compile and Triton call",
                    "apt-get install gcc, or set compile: false")  # fmt: skip
    else:
        yield Check("compiler", "note", "no C compiler: compile: true would fail")


def _check_triton() -> Check:
    """Whether the release of Triton is one that the kernels are made for."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # some builds of torch bring it by other names
        version = str(importlib.import_module("triton").__version__)
    if Version(version) < Version(LEAST_TRITON):
        least = f"triton>={LEAST_TRITON}"
        return Check("kernels", "warning", f"Triton {version}; the kernels need {least}",
                     f"pip install '{least}', or a torch that brings it")  # fmt: skip
    text = f"Triton {version}: attention, GeGLU and LayerNorm are fused"
    return Check("kernels", "ok", text)


def check_threads() -> Iterator[Check]:
    """Whether OpenMP's threads will wait for one another."""
    cores, limit = len(os.sched_getaffinity(0)), _cpu_limit()
    load = os.getloadavg()[0]
    threads, spin = os.environ.get("OMP_NUM_THREADS"), os.environ.get("GOMP_SPINCOUNT")
    text = f"{cores} cores, load {load:.1f}, OMP_NUM_THREADS {threads or 'not set'}"
    if limit is not None and limit < cores and int(threads or cores) > limit:
        count = max(1, int(limit))
        yield Check("threads", "warning", f"{text}; this container may use {limit:g} of them",
                    f"export OMP_NUM_THREADS={count}")  # fmt: skip
    elif load > cores and not (spin == "0" or threads == "1"):
        yield Check(
            "threads", "warning", f"{text}: others use the CPU too, and threads that wait for one "
            "another in a loop can make a step many times slower",
            "export GOMP_SPINCOUNT=0 OMP_NUM_THREADS=1 (or fewer threads than idle cores)",
        )  # fmt: skip
    else:
        yield Check("threads", "ok", text)


def check_memory() -> Iterator[Check]:
    """Memory of the machine."""
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = (page * os.sysconf(n) for n in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    text = f"{free / GB:.1f} of {total / GB:.1f} GB free"
    if free < 2 * GB:
        yield Check("memory", "warning", text, "end other processes, or lower num_workers")
    else:
        yield Check("memory", "ok", text)


def check_shared_memory() -> Iterator[Check]:
    """/dev/shm, through which loader workers hand batches over."""
    path = Path("/dev/shm")
    if not path.is_dir():
        yield Check("/dev/shm", "warning", "missing", "set num_workers: 0 in the loaders")
        return
    usage = shutil.disk_usage(path)
    text = f"{usage.free / GB:.2f} of {usage.total / GB:.2f} GB free"
    if usage.free < 0.2 * GB:
        yield Check("/dev/shm", "warning", f"{text}: loader workers may die of a bus error",
                    "start the container with --shm-size=8g, or set num_workers: 0")  # fmt: skip
    else:
        yield Check("/dev/shm", "ok", text)


def check_limits() -> Iterator[Check]:
    """Open files and processes that this user may have."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < 1024:
        yield Check("ulimit -n", "warning", f"{files} open files: too few for many shards",
                    "ulimit -n 65536")  # fmt: skip
    else:
        yield Check("ulimit -n", "ok", "no limit" if files < 0 else f"{files:,} open files")
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if processes != resource.RLIM_INFINITY and processes < 512:
        yield Check("ulimit -u", "warning", f"{processes} processes and threads", "ulimit -u 4096")


def check_hub() -> Iterator[Check]:
    """Whether the hub answers; needed for names that are not bundled, and for hub data sets."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Check("hub", "note", "HF_HUB_OFFLINE is set: only what is bundled or cached")
        return
    host = os.environ.get("HF_ENDPOINT", HUB).split("://")[-1].split("/")[0]
    name, _, port = host.partition(":")
    try:
        within(SECONDS, lambda: socket.create_connection((name, int(port or 443)), SECONDS).close())
        yield Check("hub", "ok", f"{host} answers")
    except (OSError, ValueError) as error:
        yield Check(
            "hub", "note", f"{host} does not answer ({error}): only what is bundled or cached",
            "name folders in place of hub names; HF_HUB_OFFLINE=1 saves waiting",
        )  # fmt: skip


def _nvidia_smi() -> str | None:
    """The driver's version, where there is a driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def _cpu_limit() -> float | None:
    """Cores that the container's control group allows."""
    for line in _lines("/sys/fs/cgroup/cpu.max"):
        quota, _, period = line.partition(" ")
        if quota != "max":
            return int(quota) / int(period)
    return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
