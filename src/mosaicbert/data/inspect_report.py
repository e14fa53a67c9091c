"""What `mosaicbert inspect` found in a data set, as text, JSON and a picture."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mosaicbert.errors import DataError

_BAR_WIDTH = 40


@dataclass
class Report:
    """What a data set holds; `faults` names each shard that is not whole."""

    folder: str
    shards: int
    samples: int
    columns: dict[str, str]
    compression: str | None
    raw_bytes: int
    stored_bytes: int
    tokenizer: str | None = None
    faults: list[str] = field(default_factory=list)
    unit: str = ""
    """What lengths are counted in."""
    total_length: int = 0
    quantiles: dict[str, int] = field(default_factory=dict)
    histogram: list[tuple[int, int, int]] = field(default_factory=list)
    """Lengths from, to (not included), and how many samples."""
    tokens: dict[str, float] = field(default_factory=dict)
    samples_per_second: float = 0.0
    megabytes_per_second: float = 0.0
    first_samples: list[dict[str, Any]] = field(default_factory=list)
    masked_examples: list[dict[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    def to_text(self) -> str:
        """The report for people."""
        columns = ", ".join(f"{name} ({kind})" for name, kind in self.columns.items())
        lines = [
            f"{self.folder}: {self.samples:,} samples in {self.shards:,} shards, "
            f"{self.stored_bytes / 1e6:,.1f} MB"
            + (
                f" of {self.compression} ({self.raw_bytes / 1e6:,.1f} MB raw)"
                * bool(self.compression)
            ),
            f"  columns: {columns}",
            f"  checked: {len(self.faults)} faults; read {self.samples_per_second:,.0f} samples/s, "
            f"{self.megabytes_per_second:,.0f} MB/s",
        ]
        lines += [f"  FAULT: {fault}" for fault in self.faults]
        if self.quantiles:
            listed = ", ".join(f"{name} {value:,}" for name, value in self.quantiles.items())
            lines.append(f"  {self.unit}: {self.total_length:,} in all; a sample: {listed}")
            most = max(count for _, _, count in self.histogram)
            lines += [
                f"  {low:>8,} .. {high - 1:<8,} {count:>10,} "
                + "#" * round(_BAR_WIDTH * count / most)
                for low, high, count in self.histogram
            ]
        if self.tokens:
            listed = ", ".join(f"{name} {value:,.4g}" for name, value in self.tokens.items())
            lines.append(f"  {self.tokenizer}: {listed}")
        for number, sample in enumerate(self.first_samples):
            for name, value in sample.items():
                lines.append(f"  sample {number}, {name}: {_short(value)}")
        for number, example in enumerate(self.masked_examples):
            lines += [f"  example {number}, {name}: {text}" for name, text in example.items()]
        return "\n".join(lines)


def _short(value: Any, width: int = 200) -> str:
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    return text if len(text) <= width else text[: width - 3] + "..."


def draw_lengths(reports: Sequence[Report], path: Path) -> None:
    """Draw the lengths of the samples, a line for each data set.

    Raises:
        DataError: the file cannot be written, or is no kind of picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, report in enumerate(reports):
        edges = [max(low, 0.5) for low, _, _ in report.histogram]
        edges += [2 * low for low, _, _ in report.histogram[-1:]]
        shares = [count / max(report.samples, 1) for _, _, count in report.histogram]
        label = f"{report.folder} ({report.samples:,} samples)"
        axes.stairs(shares, edges, label=label, linestyle=("-", "--", ":")[number % 3])
        axes.set_xlabel(f"length of a sample ({report.unit})")
    axes.set_xscale("log", base=2)
    axes.set_ylabel("share of samples")
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise DataError(f"--picture {path} cannot be written: {error}") from error
