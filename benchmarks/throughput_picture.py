"""Tokens a second of the rows of a record of `throughput.py`, as bars.

python benchmarks/throughput_picture.py RECORD.json PICTURE.png "ROW=label" ...
"""

import json
import sys
from pathlib import Path


def main() -> int:
    """Draw the named rows, the first on top."""
    from matplotlib.figure import Figure

    record, picture, *wanted = sys.argv[1:]
    rows = {row["name"]: row for row in json.loads(Path(record).read_text())["rows"]}
    names, labels = zip(*(word.split("=", 1) for word in reversed(wanted)), strict=True)
    rates = [rows[name]["tokens_per_second"] / 1e3 for name in names]
    ours = [rows[name]["model"].startswith("mosaic") for name in names]
    figure = Figure(figsize=(8, 0.42 * len(names) + 0.9), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(labels, rates, color=["#08519c" if mine else "#9ecae1" for mine in ours])
    axes.bar_label(bars, fmt="%.0fk", padding=3, fontsize=9)
    axes.set_xlabel("thousand real tokens a second, forward, backward and update, one H100")
    axes.set_xlim(0, max(rates) * 1.1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
