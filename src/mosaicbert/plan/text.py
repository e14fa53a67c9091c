"""A plan as lines of text of at most 80 columns."""

import textwrap
from typing import Any

from mosaicbert.train.console import clock

WIDTH = 80
NAME = 14


def lines(found: dict[str, Any]) -> list[str]:
    """The plan, problems and their remedies last."""
    rows = [
        ("parameters", f"{found['parameters']:,} (vocabulary {found['vocab_size']:,})"),
        ("FLOPs", f"{_count(found['flops_per_token'])} a token, forward and backward"),
        *_work(found),
        *_memory(found),
        *_speed(found),
        *_disk(found),
    ]
    text = [f"{found['run_name']}: plan for {found['machine']}"]
    for name, value in rows:
        text += _wrap(f"  {name:<{NAME}}{value}", NAME + 2)
    text += _tasks(found)
    for note in found["notes"]:
        text += _wrap(f"  Note: {note}", 4)
    for problem in found["problems"]:
        text += _wrap(f"  WILL NOT RUN: {problem}", 4)
    return text


_PARTS = ("weights", "gradients", "optimizer", "activations", "process")


def _memory(found: dict[str, Any]) -> list[tuple[str, str]]:
    memory, microbatch = found["memory"], found["microbatch"]
    of_task = " (the largest task's)" if "tasks" in found else ""
    rows = [
        (
            "memory",
            f"{_size(memory['total'])} of {_size(memory['available'])} for a microbatch of "
            f"{microbatch['samples']:,} ({microbatch['tokens']:,} tokens){of_task}",
        ),
        *[(f"  {part}", _size(memory[part])) for part in _PARTS if part in memory],
    ]
    if "measured" in found:
        rows.append(("  measured", f"{_size(found['measured']['peak_bytes'])} at the peak"))
    return [*rows, ("largest fit", f"a microbatch of {microbatch['most']:,} samples")]


def _work(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if "samples" in found:
        jobs = f"{found['jobs']} jobs, " if "jobs" in found else ""
        words = f"{jobs}{found['steps']:,} steps, {found['samples']:,.0f} samples"
        rows.append(("work", f"{words}, {_count(found['tokens'])} tokens"))
    if "data" in found:
        data = found["data"]
        words = f"{data['samples']:,} samples"
        if "raw_bytes" in data:
            words += f", {_size(data['raw_bytes'])}"
        words += f" of {found['tokens_per_sample']:.0f} tokens"
        if "epochs" in found:
            words += f": {found['epochs']:.2f} epochs"
        download = data["download_bytes"]
        rows.append(("data", words))
        rows.append(("download", f"{_size(download)}, once" if download else "none: all here"))
    return rows


def _speed(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if "speed" in found:
        speed = found["speed"]
        mfu = f", MFU {speed['mfu']:.1%}" if "mfu" in speed else ""
        rate = _count(speed["tokens_per_second"])
        rows.append(("speed", f"{rate} tokens/s{mfu} ({speed['source']})"))
    if "seconds" in found:
        parts = [f"{clock(found['seconds'])} of training"]
        if found.get("evaluation_seconds"):
            said = f"{clock(found['evaluation_seconds'])} for {found['evaluations']:,} evaluations"
            parts.append(said)
        start = found.get("measured", {}).get("start_seconds")
        parts.append(f"{clock(start)} to start" if start else "without the start")
        cost = f"; {found['cost']:,.2f} in all" if "cost" in found else ""
        rows.append(("time", ", ".join(parts) + cost))
    return rows


def _tasks(found: dict[str, Any]) -> list[str]:
    """A line for each task of GLUE."""
    if "tasks" not in found:
        return []
    text = [f"  {'task':<6}{'jobs':>6}{'examples':>10}{'tokens':>8}{'steps':>9}{'memory':>10}"
            f"{'a job':>9}"]  # fmt: skip
    for row in found["tasks"]:
        cells = [row["samples"], round(row["tokens_per_sample"]), row["steps"]]
        numbers = ["-" if value is None else f"{value:,}" for value in cells]
        seconds = "-" if row["seconds"] is None else clock(row["seconds"])
        text.append(
            f"  {row['task']:<6}{row['jobs']:>6}{numbers[0]:>10}{numbers[1]:>8}{numbers[2]:>9}"
            f"{_size(row['memory_bytes']):>10}{seconds:>9}"
        )
    return text


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
