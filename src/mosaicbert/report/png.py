"""The charts as PNG files, for papers and chats."""

from collections.abc import Sequence
from pathlib import Path

from mosaicbert.report.charts import Chart
from mosaicbert.report.page import COLORS
from mosaicbert.report.runs import Run, labels_of


def write_pngs(charts: Sequence[Chart], runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw each chart into `folder`; gives the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for chart in charts:
        path = folder / f"{chart.name.replace('/', '-')}.png"
        _draw(chart, runs, path)
        paths.append(path)
    return paths


def _draw(chart: Chart, runs: Sequence[Run], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for place, line in enumerate(chart.lines):
        color = COLORS[line.run % len(COLORS)]
        label = plain(labels_of(runs)[line.run]) + (": validation" if line.marks else "")
        x, y = [x for x, _ in line.points], [y for _, y in line.points]
        if chart.categories:
            width = 0.8 / len(chart.lines)
            places = [at - 0.4 + (place + 0.5) * width for at in x]
            axes.bar(places, y, width=width, color=color, label=label)
        else:
            style = "o--" if line.marks else "-"
            axes.plot(x, y, style, color=color, label=label, linewidth=1.2, markersize=3)
    axes.set_title(chart.title, fontsize=10)
    axes.set_xlabel(chart.x_label)
    if chart.categories:
        axes.set_xticks(range(len(chart.categories)), chart.categories)
    elif chart.x_label != "hours":  # 0.005 of them is no "5m"
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if chart.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(chart.lines) > 1:
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def plain(name: str) -> str:
    """A run's name as a legend shows it: no formulas, and never hidden by an underscore."""
    return name.replace("$", r"\$").lstrip("_") or "run"
