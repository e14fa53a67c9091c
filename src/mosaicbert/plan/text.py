"""A plan as lines of text of at most 80 columns."""

import textwrap
from typing import Any

from mosaicbert.train.console import clock

WIDTH = 80
NAME = 14


def lines(found: dict[str, Any]) -> list[str]:
    """The plan, problems and their remedies last."""
    memory, microbatch = found["memory"], found["microbatch"]
    rows = [
        ("parameters", f"{found['parameters']:,} (vocabulary {found['vocab_size']:,})"),
        ("FLOPs", f"{_count(found['flops_per_token'])} a token, forward and backward"),
        *_work(found),
        (
            "memory",
            f"{_size(memory['total'])} of {_size(memory['available'])} for a microbatch of "
            f"{microbatch['samples']:,} ({microbatch['tokens']:,} tokens)",
        ),
        *[(f"  {part}", _size(memory[part])) for part in _PARTS],
        ("largest fit", f"a microbatch of {microbatch['most']:,} samples"),
        *_speed(found),
        *_disk(found),
    ]
    text = [f"{found['run_name']}: plan for {found['machine']}"]
    for name, value in rows:
        text += _wrap(f"  {name:<{NAME}}{value}", NAME + 2)
    for note in found["notes"]:
        text += _wrap(f"  Note: {note}", 4)
    for problem in found["problems"]:
        text += _wrap(f"  WILL NOT RUN: {problem}", 4)
    return text


_PARTS = ("weights", "gradients", "optimizer", "activations")


def _work(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if "samples" in found:
        words = f"{found['steps']:,} steps, {found['samples']:,.0f} samples, "
        rows.append(("work", f"{words}{_count(found['tokens'])} tokens at most"))
    if "data" in found:
        data = found["data"]
        words = f"{data['samples']:,} samples, {_size(data['raw_bytes'])}"
        if "epochs" in found:
            words += f": {found['epochs']:.2f} epochs"
        download = data["download_bytes"]
        rows.append(("data", words))
        rows.append(("download", f"{_size(download)}, once" if download else "none: all here"))
    return rows


def _speed(found: dict[str, Any]) -> list[tuple[str, str]]:
    if "speed" not in found:
        return []
    speed = found["speed"]
    mfu = f", MFU {speed['mfu']:.1%}" if "mfu" in speed else ""
    rows = [("speed", f"{_count(speed['tokens_per_second'])} tokens/s{mfu} ({speed['source']})")]
    if "seconds" in found:
        cost = f", {found['cost']:,.2f} in all" if "cost" in found else ""
        rows.append(("time", f"{clock(found['seconds'])}{cost}, without evaluations and start"))
    return rows


def _disk(found: dict[str, Any]) -> list[tuple[str, str]]:
    checkpoint = found["checkpoint"]
    words = _size(checkpoint["bytes"])
    if checkpoint.get("kept"):
        all_bytes = checkpoint["bytes"] * checkpoint["kept"]
        words += f" each; {checkpoint['saves']:,} written, {checkpoint['kept']:,} kept: "
        words += _size(all_bytes)
    return [("checkpoint", words)]


def _wrap(text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def _size(value: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value / 1e3:.1f} kB"


def _count(value: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.1f}{unit}"
    return f"{value:.0f}"
