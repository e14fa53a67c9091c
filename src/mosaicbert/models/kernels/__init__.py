"""Triton kernels: ALiBi attention, GeGLU, residual + dropout + LayerNorm.

Each module imports triton at its top, so import one only where `why_not` has no objection.
`TRITON_INTERPRET=1`, set before triton is first imported, runs them on the CPU (slowly: tests).
"""

from importlib.util import find_spec

import torch


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`; None if they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        return f"the device is {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None
