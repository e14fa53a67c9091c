"""The report's page: one HTML text without scripts, that loads nothing from anywhere."""

import json
from collections.abc import Sequence
from html import escape

import yaml

from mosaicbert.report import facts
from mosaicbert.report.charts import Chart, charts_of
from mosaicbert.report.runs import Run, labels_of
from mosaicbert.report.svg import NUM_COLORS, draw

COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#64748b")
"""One for each run; told apart also by most of those who see few colours, and in print."""

STYLE = """
:root { --ink: #1f2937; --dim: #6b7280; --paper: #fff; --card: #f9fafb; --rule: #e5e7eb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --dim: #9ca3af; --paper: #111827;
  --card: #1f2937; --rule: #374151; } }
@media print { :root { --ink: #000; --dim: #444; --paper: #fff; --card: #fff; --rule: #ccc; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .2rem 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 1.8rem 0 .6rem; }
figure { margin: 0; padding: .6rem .6rem .2rem; background: var(--card);
  border: 1px solid var(--rule); border-radius: .5rem; break-inside: avoid; }
figcaption { font-weight: 600; font-size: .95rem; }
.charts { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
th { font-weight: 600; } tbody th { font-weight: 400; color: var(--dim); }
td { overflow-wrap: anywhere; min-width: 6rem; }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; }
ul.legend li { overflow-wrap: anywhere; }
ul.legend i, th i { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%;
  margin-right: .4rem; vertical-align: -1px; print-color-adjust: exact; }
pre { overflow-x: auto; font-size: .8rem; background: var(--card); padding: .8rem;
  border: 1px solid var(--rule); border-radius: .5rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .3rem 0; }
footer, .note { color: var(--dim); font-size: .85rem; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--dim); font-size: 11px; font-family: system-ui, sans-serif; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .line { fill: none; stroke-width: 1.6; }
svg .marked { fill: none; stroke-width: 1; stroke-dasharray: 3 2; }
@media print { body { padding: 0; font-size: 11px; max-width: none; }
  .charts { grid-template-columns: 1fr 1fr; }
  pre { columns: 2; font-size: 8px; line-height: 1.3; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""


def build_page(runs: Sequence[Run], title: str | None = None) -> str:
    """The report of one run or of several beside each other; every text is escaped."""
    charts = charts_of(runs)
    heading = title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared")
    parts = [f"<h1>{escape(heading)}</h1>", _legend(runs)]
    parts.append(_table([facts.summary(run) for run in runs], runs))
    if any(run.rows for run in runs):
        parts.append("<h2>Curves</h2>")
        parts.append(
            '<p class="note">Lines: training. Dots: validation. Long runs show means of '
            "neighbouring steps; a gap is a value that was not finite.</p>"
        )
        parts.append(_charts([chart for chart in charts if not chart.categories]))
    if any(run.glue for run in runs):
        parts.append("<h2>GLUE</h2>")
        parts.append(
            '<p class="note">Points on the validation sets: mean ± standard deviation '
            "(seeds). In brackets: not part of the mean.</p>"
        )
        parts.append(_charts([chart for chart in charts if chart.categories]))
        with_glue = [index for index, run in enumerate(runs) if run.glue]
        rows = facts.glue_rows([runs[index] for index in with_glue])
        parts.append(_rows_table(rows, runs, with_glue))
    if len(runs) > 1 and (rows := facts.differences(runs)):
        parts += ["<h2>Where the configurations differ</h2>", _rows_table(rows, runs)]
    parts.append("<h2>Configuration and environment</h2>")
    parts += [_details(run) for run in runs]
    parts.append("<footer>Made by mosaicbert report. Secrets are blanked out.</footer>")
    return _document(heading, "\n".join(part for part in parts if part))


def _document(title: str, body: str) -> str:
    colors = "\n".join(
        f"svg .c{i} {{ stroke: {color}; }} svg circle.c{i}, svg rect.c{i} {{ fill: {color}; "
        f"stroke: none; }} i.c{i} {{ background: {color}; }}"
        for i, color in enumerate(COLORS)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}{colors}\n</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _legend(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    items = [
        f'<li><i class="c{index % NUM_COLORS}"></i>{escape(run.name)} '
        f'<span class="note">{escape(run.folder)}</span></li>'
        for index, run in enumerate(runs)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _charts(charts: Sequence[Chart]) -> str:
    figures = [
        f"<figure><figcaption>{escape(chart.title)}</figcaption>{draw(chart)}</figure>"
        for chart in charts
    ]
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _table(columns: Sequence[dict[str, str]], runs: Sequence[Run]) -> str:
    return _rows_table(facts.table(columns), runs)


def _rows_table(
    rows: Sequence[tuple[str, list[str]]], runs: Sequence[Run], columns: Sequence[int] | None = None
) -> str:
    """A row for each name; `columns`: the numbers of the runs whose cells these are."""
    head = ""
    if len(runs) > 1:
        names = labels_of(runs)
        cells = "".join(
            f'<th><i class="c{i % NUM_COLORS}"></i>{escape(names[i])}</th>'
            for i in (range(len(runs)) if columns is None else columns)
        )
        head = f"<thead><tr><td></td>{cells}</tr></thead>"
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        f"{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _details(run: Run) -> str:
    """The whole configuration and environment, folded up."""
    config = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else ""
    environment = json.dumps(run.environment, indent=1) if run.environment else ""
    parts = []
    for name, text in (("configuration", config), ("environment", environment)):
        if text:
            parts.append(
                f"<details><summary>{escape(run.name)}: {name}</summary>"
                f"<pre>{escape(text)}</pre></details>"
            )
    return "".join(parts)
