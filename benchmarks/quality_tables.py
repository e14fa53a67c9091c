"""What `time_to_quality.py` says of its runs: tables of 80 columns, pictures of curves and GLUE."""

import statistics
from pathlib import Path
from typing import Any

GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "rte")
"""The tasks that are complete in offline copies of GLUE."""


def seconds_to(curve: list[dict[str, Any]], loss: float) -> float | None:
    """When the curve first reaches `loss`, on straight lines between its points; None: never.

    The first point's own time where it is below already: an upper bound.
    """
    before = None
    for point in curve:
        if point["loss"] <= loss:
            if before is None:
                return float(point["seconds"])
            share = (before["loss"] - loss) / (before["loss"] - point["loss"])
            return float(before["seconds"] + share * (point["seconds"] - before["seconds"]))
        before = point
    return None


def table(runs: list[dict[str, Any]]) -> str:
    """At most 80 columns; runs of one name and budget in one line, `+-` half their range."""
    lines = [
        f"{'recipe':25} {'s':>5} n {'val loss':>8} {'+-':>5} {'acc':>5} {'train':>5}"
        f" {'ktok/s':>6} {'Mtok':>5} {'ep':>2}  G"
    ]
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in runs:
        if "error" in run:
            lines.append(f"{run['name'][:25]:25} {run['error']}"[:80])
        else:
            groups.setdefault((run["name"], run["budget"]), []).append(run)

    def mean(rows: list[dict[str, Any]], name: str) -> float:
        return statistics.fmean(row[name] for row in rows)

    for (name, _), rows in sorted(groups.items(), key=lambda item: mean(item[1], "loss")):
        losses = [row["loss"] for row in rows]
        spread = f"{(max(losses) - min(losses)) / 2:.3f}" if len(rows) > 1 else ""
        lines.append(
            f"{name[:25]:25} {mean(rows, 'seconds'):5.0f} {len(rows)} {mean(rows, 'loss'):8.4f}"
            f" {spread:>5} {mean(rows, 'accuracy'):5.3f} {mean(rows, 'train_loss'):5.2f}"
            f" {mean(rows, 'tokens_per_second') / 1e3:6.0f} {mean(rows, 'tokens') / 1e6:5.0f}"
            f" {mean(rows, 'epoch'):2.0f} {sum(row['graphs'] for row in rows):2}"
        )
    scored = [run for run in runs if "glue" in run]
    if scored:
        lines.append(
            f"\n{'GLUE, pre-training seed':27}{'mean':>8}" + "".join(f"{t:>8}" for t in GLUE_TASKS)
        )
    for run in scored:
        tasks = "".join(f"{run['glue']['tasks'][name]:8.2f}" for name in GLUE_TASKS)
        lines.append(f"{run['name'][:22]:22}{run['seed']:4} {run['glue']['mean']:8.2f}{tasks}")
    return "\n".join(lines)


def reached(runs: list[dict[str, Any]], loss: float, title: str) -> str:
    """When each run reaches `loss`."""
    lines = [f"\nSeconds to {title}, {loss:.4f}:"]
    for run in runs:
        seconds = seconds_to(run["curve"], loss)
        text = "not within" if seconds is None else f"{seconds:7.1f} of"
        lines.append(f"{run['name'][:40]:40} seed {run['seed']:<6} {text} {run['seconds']:.0f} s")
    return "\n".join(lines)


def compare(runs: list[dict[str, Any]], a: str, b: str) -> str:
    """When A's runs reach the mean of the last losses of B's longest runs."""
    longest = max((run["budget"] for run in runs if run["name"] == b), default=None)
    others = [run for run in runs if run["name"] == b and run["budget"] == longest]
    if not others:
        return f"\n--compare: there is no run of {b!r}."
    loss = statistics.fmean(run["loss"] for run in others)
    seconds = statistics.fmean(run["seconds"] for run in others)
    title = f"the loss of {b!r} after {seconds:.0f} s (n = {len(others)})"
    return reached([run for run in runs if run["name"] == a], loss, title)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Loss against seconds and against tokens; a colour a recipe, a line a run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    by_seconds, by_tokens = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(run["name"] for run in runs))
    several_devices = len({run["device"] for run in runs}) > 1
    for run in runs:
        device = run["device"].removeprefix("NVIDIA ").split()[0]
        label = f"{run['name']}, {device}" if several_devices else run["name"]
        losses = [point["loss"] for point in run["curve"]]
        color = f"C{names.index(run['name']) % 10}"
        style = ("-", "--", ":", "-.")[names.index(run["name"]) // 10 % 4]
        for axes, unit, scale in ((by_seconds, "seconds", 1.0), (by_tokens, "token", 1e-6)):
            at = [point[unit] * scale for point in run["curve"]]
            axes.plot(at, losses, style, color=color, marker=".", label=label)
    by_seconds.set(xlabel="seconds of training", ylabel="validation MLM loss, 15 % masked")
    by_tokens.set(xlabel="million tokens")
    for axes in (by_seconds, by_tokens):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
    handles, labels = by_seconds.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_glue(runs: list[dict[str, Any]], path: Path) -> None:
    """Bars of the tasks of those runs that have been fine-tuned, and of their mean."""
    from matplotlib.figure import Figure

    scored = [run for run in runs if "glue" in run]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(scored)
    for place, run in enumerate(scored):
        glue = run["glue"]
        heights = [*(glue["tasks"][name] for name in GLUE_TASKS), glue["mean"]]
        at = [task + (place - (len(scored) - 1) / 2) * width for task in range(len(heights))]
        label = f"{run['name']}, {run['seconds']:.0f} s of pre-training"
        bars = axes.bar(at, heights, width * 0.95, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(GLUE_TASKS) + 1), [*GLUE_TASKS, "mean"])
    axes.set(ylabel="score", ylim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(scored), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
