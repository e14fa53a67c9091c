"""What known devices can do at most: the denominators of MFU and of time estimates.

Figures are the vendors' own, per device as torch sees it: dense (no sparsity) bf16 matrix products
accumulated in fp32, boost clock; memory and its bandwidth. Where a data sheet prints the figure
with 2:4 sparsity only, half of it stands here. V100 and T4 have no bf16: fp16 stands in.

Sources: NVIDIA data sheets of the named products (A100, A30, A10, A40, V100, T4, L4, L40, L40S,
H100, H200, GH200, Blackwell/HGX B200, RTX A6000, RTX 6000 Ada, RTX PRO 6000), NVIDIA's white papers
"Ampere GA102", "Ada GPU architecture" and "RTX Blackwell GPU architecture" for GeForce (tables of
peak BF16 tensor TFLOPS with FP32 accumulate), AWS's page of G5 for A10G, AMD's data sheets (MI).
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of device. `flops` in FLOP/s, `bandwidth` in bytes/s, `memory` in bytes."""

    name: str
    flops: float
    bandwidth: float
    memory: float


def _row(name: str, tflops: float, gb_per_second: float, gigabytes: float) -> Device:
    return Device(name, tflops * 1e12, gb_per_second * 1e9, gigabytes * 1e9)


# The words of a row's name must all be in the name that torch gives; the longest such row counts.
DEVICES = (
    _row("GB300", 2500, 8000, 288),
    _row("GB200", 2500, 8000, 192),
    _row("B300", 2250, 8000, 288),
    _row("B200", 2250, 8000, 192),
    _row("GH200 480GB", 989.4, 4000, 96),
    _row("GH200 144G", 989.4, 4900, 144),
    _row("H200", 989.4, 4800, 141),
    _row("H200 NVL", 835.5, 4800, 141),
    _row("H100 80GB HBM3", 989.4, 3350, 80),
    _row("H100 NVL", 835.5, 3900, 94),
    _row("H100 PCIe", 756.5, 2000, 80),
    _row("A100 SXM4 80GB", 312, 2039, 80),
    _row("A100 80GB PCIe", 312, 1935, 80),
    _row("A100 SXM4 40GB", 312, 1555, 40),
    _row("A100 PCIE 40GB", 312, 1555, 40),
    _row("A30", 165, 933, 24),
    _row("A40", 149.7, 696, 48),
    _row("A10", 125, 600, 24),
    _row("A10G", 70, 600, 24),
    _row("L4", 121, 300, 24),
    _row("L40", 181, 864, 48),
    _row("L40S", 362, 864, 48),
    _row("V100 SXM2 16GB", 125, 900, 16),
    _row("V100 SXM2 32GB", 125, 900, 32),
    _row("V100 PCIE 16GB", 112, 900, 16),
    _row("V100 PCIE 32GB", 112, 900, 32),
    _row("T4", 65, 320, 16),
    _row("RTX A6000", 154.8, 768, 48),
    _row("RTX 6000 Ada", 364.2, 960, 48),
    _row("RTX PRO 6000 Blackwell", 503.8, 1792, 96),
    _row("RTX 3080", 59.5, 760, 10),
    _row("RTX 3090", 71, 936, 24),
    _row("RTX 3090 Ti", 80, 1008, 24),
    _row("RTX 4080", 97.5, 717, 16),
    _row("RTX 4080 SUPER", 104.4, 736, 16),
    _row("RTX 4090", 165.2, 1008, 24),
    _row("RTX 5080", 112.6, 960, 16),
    _row("RTX 5090", 209.5, 1792, 32),
    _row("AMD Instinct MI300X", 1307.4, 5300, 192),
    _row("AMD Instinct MI325X", 1307.4, 6000, 256),
)

# Same numbers on the box, other chips or a part of one: no figure is better than a wrong one.
_OTHER_CHIPS = {"laptop", "mobile", "mig", "d", "max", "q", "vf"}


def _words(name: str) -> set[str]:
    return set(re.split(r"[\s\-_/]+", name.lower()))


def find_device(name: str) -> Device | None:
    """The row for a name such as `torch.cuda.get_device_name` gives, or None for an unknown one.

    The start of a row's name ("H100", "A100") means the first such row. A slice of a device (MIG)
    and laptop variants count as unknown.
    """
    words = _words(name)
    if words & _OTHER_CHIPS:
        return None
    found = [device for device in DEVICES if _words(device.name) <= words]
    if found:
        return max(found, key=lambda device: len(_words(device.name)))
    short = name.strip().lower()
    return next((d for d in DEVICES if short and d.name.lower().startswith(short + " ")), None)
