"""How the kernels become torch operators, so that torch.compile keeps one graph."""

import os
from collections.abc import Callable
from typing import Any

import torch
import triton


def kernel_op(name: str) -> Callable[..., Any]:
    """Decorator: a functional operator `mosaicbert::name` whose body launches Triton kernels.

    The compiler sees into it and launches the kernels itself; in Triton's interpreter there is
    nothing for it to launch, so there the operator is opaque.
    """
    if triton.knobs.runtime.interpret or os.environ.get("EXP_OPS") == "custom":
        return torch.library.custom_op(f"mosaicbert::{name}", mutates_args=())
    return torch.library.triton_op(f"mosaicbert::{name}", mutates_args=())


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **config: Any) -> None:
    """`kernel[grid](*args, **config)`, from inside a `kernel_op`."""
    if not triton.knobs.runtime.interpret and os.environ.get("EXP_OPS") != "custom":
        kernel = torch.library.wrap_triton(kernel)
    kernel[grid](*args, **config)
