"""How the kernels become torch operators, so that torch.compile keeps one graph."""

from collections.abc import Callable
from typing import Any

import torch
import triton


def kernel_op(name: str) -> Callable[..., Any]:
    """Decorator: a functional operator `mosaicbert::name` whose body launches Triton kernels.

    The compiler sees into it and launches the kernels itself, in less than half of the host time
    of an opaque operator. In Triton's interpreter it has nothing to launch: opaque there.
    """
    if triton.knobs.runtime.interpret:
        return torch.library.custom_op(f"mosaicbert::{name}", mutates_args=())
    return torch.library.triton_op(f"mosaicbert::{name}", mutates_args=())


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **config: Any) -> None:
    """`kernel[grid](*args, **config)`, from inside a `kernel_op`."""
    if not triton.knobs.runtime.interpret:
        kernel = torch.library.wrap_triton(kernel)
    kernel[grid](*args, **config)
