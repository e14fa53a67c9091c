"""Gradients summed over ranks while the backward pass still runs."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mosaicbert.train.distributed import Ranks

BUCKET_BYTES = 32 * 2**20


@dataclass(slots=True)
class _Bucket:
    params: list[nn.Parameter]
    flat: Tensor  # all gradients of the bucket, one after the other
    views: list[Tensor]  # the same memory, in the parameters' shapes
    waiting_for: set[int] = field(default_factory=set)
    work: Any = None


class GradientReducer:
    """Sums each parameter's gradient over all ranks, bucket by bucket, once a step.

    What torch's DDP does, but for three things that this trainer needs:
    - A rank that runs out of memory in the middle of its backward pass still takes part in every
      exchange (`finish`), so the others do not hang and all can take the step anew.
    - A rank may have no microbatch at all, and a parameter no gradient: they count as zeros.
    - Gradients are summed, not averaged: the loss is divided by global counts already.

    Buckets are sent in one fixed order on all ranks, the last layers' first. With one rank it
    does nothing.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], ranks: Ranks, dtype: torch.dtype | None = None
    ) -> None:
        """`dtype`: type of number to exchange; default: that of the parameters."""
        self.ranks = ranks
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[int, _Bucket] = {}
        self._next = 0
        self._armed = False
        if ranks.world_size == 1:
            return
        for members in _cut(list(params)):
            sizes = [p.numel() for p in members]
            kind = dtype or members[0].dtype
            flat = torch.empty(sum(sizes), dtype=kind, device=members[0].device)
            parts = zip(torch.split(flat, sizes), members, strict=True)
            bucket = _Bucket(members, flat, [part.view(p.shape) for part, p in parts])
            self._buckets.append(bucket)
            for p in members:
                self._bucket_of[id(p)] = bucket
                p.register_post_accumulate_grad_hook(self._ready)  # type: ignore[no-untyped-call]

    def arm(self) -> None:
        """Before the last backward pass of a step: gradients go out as they are ready."""
        self._armed = True
        self._next = 0
        for bucket in self._buckets:
            bucket.waiting_for = {id(p) for p in bucket.params}

    def finish(self) -> None:
        """After it, whole or broken off: send what is left, wait, put the sums into `.grad`."""
        if not self._armed:
            self.arm()
        self._armed = False
        while self._next < len(self._buckets):
            self._send()
        for bucket in self._buckets:
            with self.ranks.contact():
                bucket.work.wait()
            for p, view in zip(bucket.params, bucket.views, strict=True):
                p.grad = view.to(p.dtype)  # no copy where the type is the same

    def _ready(self, p: Tensor) -> None:
        if not self._armed:
            return
        self._bucket_of[id(p)].waiting_for.discard(id(p))
        while self._next < len(self._buckets) and not self._buckets[self._next].waiting_for:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        pairs = list(zip(bucket.params, bucket.views, strict=True))
        there = [(view, p.grad) for p, view in pairs if p.grad is not None]
        if len(there) < len(pairs):
            bucket.flat.zero_()
        if there:
            torch._foreach_copy_([view for view, _ in there], [grad for _, grad in there])
        with self.ranks.contact():
            bucket.work = dist.all_reduce(bucket.flat, async_op=True)


def _cut(params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters from last to first in buckets of one type and about `BUCKET_BYTES`."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for p in reversed(params):
        size = p.numel() * p.element_size()
        if not buckets or size > room or p.dtype != buckets[-1][0].dtype:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(p)
        room -= size
    return buckets
