"""How fast a run will be, from what was measured of runs like it."""

import math
from dataclasses import dataclass

from mosaicbert.train.hardware import Device


@dataclass(frozen=True, slots=True)
class Measured:
    """Share of an H100's peak (MFU) that one kind of model reached, and where that is recorded."""

    model: str
    compiled: bool
    mfu: float
    what: str
    fp8: bool = False

    @property
    def where(self) -> str:
        """What ran, and its record."""
        return f"{self.what}: {RECORD}"


RECORD = "benchmarks/records/2026-11-25-throughput-h100.json"
MEASURED = (
    Measured("mosaic_bert", True, 0.454, "Mosaic BERT base, 65,536 tokens a microbatch"),
    Measured(
        "mosaic_bert", True, 0.535, "Mosaic BERT base in fp8, against the peak of bf16", fp8=True
    ),
    Measured("hf_bert", True, 0.238, "HF BERT base, 512 x 128"),
    Measured("hf_bert", False, 0.139, "HF BERT base, 128 x 128"),
)
"""Sequences of 128, on an H100 80GB HBM3, bfloat16 where it says nothing else, one GPU."""

GPU = "H100 80GB HBM3"
FULL_MICROBATCH = 65_536
"""Tokens of the microbatches that were measured; a quarter of it still fills an H100."""


def measured(model_type: str, compiled: bool, fp8: bool) -> Measured | None:
    """The record that is nearest; None where nothing like it was measured."""
    kind = "hf_bert" if model_type != "mosaic_bert" else "mosaic_bert"
    rows = (m for m in MEASURED if (m.model, m.compiled, m.fp8) == (kind, compiled, fp8))
    return next(rows, None)


def tokens_per_second(row: Measured, gpu: Device, num_gpus: int, flops_per_token: float) -> float:
    """Of all GPUs together, if each reaches the measured share of its own peak."""
    return row.mfu * gpu.flops * num_gpus / flops_per_token


def caveats(row: Measured, gpu: Device, num_gpus: int, width: int, tokens: float) -> list[str]:
    """In what the planned run differs from the measured one."""
    found = []
    if gpu.name != GPU:
        found.append(f"not measured on {gpu.name}: assumes the share of peak that an H100 reached")
    if num_gpus > 1:
        found.append("not measured on several GPUs: assumes that they scale without loss")
    if width != 768:
        found.append(f"not measured at width {width}: assumes the share of peak of width 768")
    if tokens < FULL_MICROBATCH / 4 and math.isfinite(tokens):
        found.append(
            f"microbatches of {tokens:,.0f} tokens are slower than the {FULL_MICROBATCH:,} measured"
        )
    return found
