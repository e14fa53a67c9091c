"""What the rooms hand to one another: a `Batch` of token ids, and the `Step` one rank takes.

Every room may import this module; it imports none of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position (or a row) that carries no loss, as in torch and Hugging Face."""


@dataclass(slots=True)
class Batch:
    """One microbatch: packed without padding (Mosaic BERT), or padded (the HF BERT baseline).

    Packed: `input_ids (total_nnz,)` with sequence i at `cu_seqlens[i]:cu_seqlens[i + 1]`. Every
    position belongs to a sequence: what fills a static shape up is cut into sequences of pad
    tokens, none longer than `max_seqlen`, and sequences of length 0 may follow.
    Padded: `input_ids (batch, seq)` with `attention_mask (batch, seq)`; `cu_seqlens` is None.

    Targets. Masked language modelling: `target_positions (num_target_rows,)` indexes the flattened
    `input_ids`, `labels (num_target_rows,)` are the true ids there (`IGNORE_INDEX` on rows that
    only fill the shape up; they point at position 0). Sequence classification: `labels
    (batch,)` int64, or float32 for regression (NaN fills up), or `(batch, num_labels)` float32 for
    multi-label (NaN rows fill up); `target_positions` is None. Token classification:
    `labels` of the shape of `input_ids`; `target_positions` is None.

    The `num_*` fields are host integers, so that nobody waits for the device to learn them:
    real targets, real (not pad) tokens and real samples.
    """

    input_ids: Tensor
    labels: Tensor
    num_targets: int
    num_tokens: int
    num_samples: int
    max_seqlen: int
    cu_seqlens: Tensor | None = None  # (batch + 1,) int32
    attention_mask: Tensor | None = None  # (batch, seq) int64, 1 for real tokens
    token_type_ids: Tensor | None = None  # shape of input_ids
    target_positions: Tensor | None = None  # (num_target_rows,) int64

    @property
    def is_packed(self) -> bool:
        """Whether the batch is in packed form."""
        return self.cu_seqlens is not None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by field name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device, non_blocking: bool = True) -> "Batch":
        """The same batch with its tensors on `device`."""
        moved = {
            name: t.to(device, non_blocking=non_blocking) for name, t in self.tensors().items()
        }
        return replace(self, **moved)  # type: ignore[arg-type]

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (what torch's DataLoader calls)."""
        pinned = {name: t.pin_memory() for name, t in self.tensors().items()}
        return replace(self, **pinned)  # type: ignore[arg-type]


@dataclass(slots=True)
class Step:
    """One rank's share of one optimizer step (or of one evaluation batch).

    `num_samples` counts the whole global batch; `epoch` and `sample_in_epoch` say where the
    batch AFTER this one starts: the position a resumed run goes on from.
    """

    microbatches: list[Batch]
    num_samples: int
    epoch: int
    sample_in_epoch: int

    def pin_memory(self) -> "Step":
        """The same step in page-locked memory (what torch's DataLoader calls)."""
        return replace(self, microbatches=[batch.pin_memory() for batch in self.microbatches])


@dataclass(slots=True)
class LossOutput:
    """`loss_sum`: float32 scalar, summed over the batch's targets; the caller divides.

    `logits`, where asked for: `(num_target_rows, vocab)`, `(batch, num_labels)` or
    `(*input_ids.shape, num_labels)`, rows in the order of `Batch.labels`.
    """

    loss_sum: Tensor
    logits: Tensor | None = None


class Trainable(Protocol):
    """What the trainer asks of a model, besides being a `torch.nn.Module`."""

    def loss(self, batch: Batch, return_logits: bool = False) -> LossOutput:
        """The summed loss of one microbatch."""
        ...

    def flops_per_token(self, seq_len: float) -> float:
        """FLOPs of forward + backward for one real token in sequences of `seq_len` tokens."""
        ...


class Loader(Protocol):
    """An epoch of steps, from any sample on, the same on every number of ranks."""

    num_samples: int
    """Samples in one epoch, over all ranks."""

    def steps_in_epoch(self, epoch: int, sample_in_epoch: int = 0) -> int:
        """How many steps are left of `epoch` from that sample on."""
        ...

    def steps(self, epoch: int, sample_in_epoch: int = 0) -> Iterator[Step]:
        """The shares that fall to this rank of one epoch's global batches, in order."""
        ...
