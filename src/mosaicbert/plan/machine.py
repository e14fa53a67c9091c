"""What a run is planned for: a GPU of the table of known devices, or the machine at hand."""

import os
from dataclasses import dataclass

import torch

from mosaicbert.errors import ConfigError, did_you_mean
from mosaicbert.train.hardware import DEVICES, Device, find_device


@dataclass(frozen=True, slots=True)
class Machine:
    """`gpu` is None for this machine's CPU; `memory_bytes` is one device's."""

    gpu: Device | None
    count: int
    memory_bytes: float
    is_here: bool = False
    """Whether it is the machine that plans, so that steps can be measured on it."""

    @property
    def name(self) -> str:
        """Shown at the top."""
        return f"{self.count} x {self.gpu.name}" if self.gpu else "this machine's CPU"


def machine_of(gpu: str | None, count: int | None, device: str | None = None) -> Machine:
    """The machine that the words name, else this one; `device: cpu` leaves its GPUs out.

    Raises:
        ConfigError: there is no such GPU in the table, or no such number of them.
    """
    if count is not None and count < 1:
        raise ConfigError(f"--gpus {count}: there must be at least one.")
    has_gpu = torch.cuda.is_available() and device != "cpu"
    if gpu is None and not has_gpu:
        if count is not None:
            raise ConfigError(
                f"--gpus {count}: there is no GPU here to plan for. Name the kind too, as in "
                f"--gpu h100 --gpus {count}."
            )
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        return Machine(None, 1, memory, is_here=True)
    here = torch.cuda.get_device_name(0) if has_gpu else None
    name = gpu or str(here)
    known = find_device(name)
    if known is None:
        names = [device.name for device in DEVICES]
        near = did_you_mean(name.upper(), {n.split()[0] for n in names})
        raise ConfigError(f"--gpu {name}: not known.{near} There are: {', '.join(names)}.")
    if gpu is None:
        memory = float(torch.cuda.mem_get_info()[1])
        return Machine(known, count or torch.cuda.device_count(), memory, is_here=True)
    return Machine(known, count or 1, known.memory, is_here=known == find_device(here or ""))
