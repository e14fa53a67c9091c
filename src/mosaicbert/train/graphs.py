"""The forward and backward pass of a microbatch as one CUDA graph for each shape.

A microbatch of BERT base is some 900 kernels, whose launches keep the host busy for 80 ms whatever
their size (docs/log.md); a graph is one launch. Shapes on a grid (`data/packing.py`) make a
handful of graphs serve a whole run.
"""

import logging
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mosaicbert.batch import Batch

log = logging.getLogger(__name__)

MAX_GRAPHS = 64
"""Shapes beyond these are launched kernel by kernel."""
MAX_SEEN = 4096
"""Shapes seen once that are remembered: where there are more, hardly one comes twice."""


@dataclass(slots=True)
class _Captured:
    inputs: Batch  # on the device; a replay reads it
    graph: Any  # torch.cuda.CUDAGraph
    loss: Tensor  # what a replay leaves


class MicrobatchGraphs:
    """Takes microbatches through `run`: a shape's first as it is, the others by a graph.

    The first microbatch of a shape compiles and loads what it needs; the second is recorded, and
    it and all later ones are replayed. Gradients are added to the same tensors from start to end,
    which `zero_grad` clears, because a graph knows them by address. All graphs work in one pool of
    memory: only one runs at a time, and none leaves anything but gradients and a loss behind. That
    pool is kept beside what a shape's first microbatch takes, so activations take twice their
    memory; `release` gives it back.

    Args:
        run: forward and backward pass of a batch on the device, over a number of targets that is a
            scalar there; adds to the gradients, returns the loss.
        params: all that may get a gradient.
        device: a GPU.
    """

    def __init__(
        self,
        run: Callable[[Batch, Tensor], Tensor],
        params: Iterable[nn.Parameter],
        device: torch.device,
    ) -> None:
        self._run = run
        self._params = list(params)
        self._device = device
        self._num_targets = torch.ones((), device=device)
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, _Captured] = {}
        self._grads: dict[int, Tensor] = {}  # by index of the parameter
        self._pool: Any = None
        self._is_broken = False

    def __len__(self) -> int:
        return len(self._graphs)

    def release(self) -> None:
        """Give all memory back; from here on kernels are launched one by one."""
        self._is_broken = True
        self._graphs.clear()
        self._pool = None
        torch.cuda.empty_cache()

    def zero_grad(self) -> None:
        """Clear all gradients; those of the graphs stay where they are."""
        for index, param in enumerate(self._params):
            param.grad = self._grads.get(index)
        if self._grads:
            torch._foreach_zero_(list(self._grads.values()))

    def __call__(self, batch: Batch, num_targets: int) -> Tensor:
        """Add the gradients of the mean loss of `batch`, which is on the host; that loss.

        The returned tensor is overwritten by the next batch of this shape.
        """
        self._num_targets.fill_(num_targets)
        key = _shape(batch)
        captured = self._graphs.get(key)
        if captured is None and self._may_capture(key):
            captured = self._capture(key, batch)
        if captured is None:
            if len(self._seen) < MAX_SEEN:
                self._seen.add(key)
            loss = self._run(batch.to(self._device), self._num_targets)
            self._keep_gradients()
            return loss
        inputs = captured.inputs.tensors()
        for name, values in batch.tensors().items():
            inputs[name].copy_(values, non_blocking=True)
        captured.graph.replay()
        return captured.loss

    def _may_capture(self, key: Hashable) -> bool:
        return key in self._seen and len(self._graphs) < MAX_GRAPHS and not self._is_broken

    def _keep_gradients(self) -> None:
        for index, param in enumerate(self._params):
            if param.grad is not None:
                self._grads[index] = param.grad

    def _capture(self, key: Hashable, batch: Batch) -> _Captured | None:
        """Record the passes over a batch of this shape; None, said once, where that fails."""
        inputs = batch.to(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (pinned memory, loggers) may go on with what a capture forbids.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                loss = self._run(inputs, self._num_targets)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._is_broken = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("CUDA graphs are off, kernels are launched one by one: %s", reason)
            return None
        self._pool = graph.pool()
        captured = self._graphs[key] = _Captured(inputs, graph, loss)
        return captured


def _shape(batch: Batch) -> Hashable:
    """All that the kernels of a batch depend on but the values in it."""
    sizes = {name: (tuple(t.shape), t.dtype) for name, t in batch.tensors().items()}
    return batch.max_seqlen, tuple(sorted(sizes.items(), key=lambda item: item[0]))
