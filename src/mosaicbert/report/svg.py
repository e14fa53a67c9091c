"""Charts as SVG, drawn by hand: milliseconds each, and their colours are the page's CSS.

At the end of every run a report is made, which may not take a second; a plotting library needs
longer to be imported.
"""

import math
from html import escape

from mosaicbert.report.charts import Chart, Line

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 38
NUM_COLORS = 8


def draw(chart: Chart) -> str:
    """The chart as an `<svg>` element; its text is escaped."""
    if chart.categories:
        return _draw_bars(chart)
    points = [(x, y) for line in chart.lines for x, y in line.points if math.isfinite(y)]
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points), 5)
    low, high = min(y for _, y in points), max(y for _, y in points)
    y_ticks = ticks(0.0 if 0 < low < 0.4 * high else low, high, 5)
    frame = _Frame(x_ticks, y_ticks)
    parts = [*frame.grid(chart), *(_path(line, frame) for line in chart.lines)]
    return _svg(chart, parts)


class _Frame:
    """From values to places in the picture."""

    def __init__(self, x_ticks: list[float], y_ticks: list[float]) -> None:
        self.x_ticks, self.y_ticks = x_ticks, y_ticks

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def grid(self, chart: Chart) -> list[str]:
        """Lines and numbers of both axes."""
        parts = []
        for value, text in zip(self.y_ticks, labels(self.y_ticks, chart.percent), strict=True):
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(_text(LEFT - 6, y + 4, text, "end"))
        if not chart.categories:
            for value, text in zip(self.x_ticks, labels(self.x_ticks), strict=True):
                last = value == self.x_ticks[-1]
                parts.append(
                    _text(self.x(value), HEIGHT - BOTTOM + 16, text, "end" if last else "middle")
                )
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(_text(middle, HEIGHT - 4, chart.x_label, "middle"))
        return parts


def _path(line: Line, frame: _Frame) -> str:
    """A polyline with gaps at NaN; a dot for each mark and for a point without neighbours."""
    color = f"c{line.run % NUM_COLORS}"
    commands, dots = [], []
    pen_down = False
    for index, (x, y) in enumerate(line.points):
        if not math.isfinite(y):
            pen_down = False
            continue
        place = f"{frame.x(x):.1f} {frame.y(y):.1f}"
        commands.append(f"{'L' if pen_down else 'M'}{place}")
        after = line.points[index + 1][1] if index + 1 < len(line.points) else math.nan
        if line.marks or not (pen_down or math.isfinite(after)):
            cx, cy = place.split()
            dots.append(f'<circle class="{color}" cx="{cx}" cy="{cy}" r="2.6"/>')
        pen_down = True
    kind = "marked" if line.marks else "line"
    return f'<path class="{kind} {color}" d="{"".join(commands)}"/>{"".join(dots)}'


def _draw_bars(chart: Chart) -> str:
    values = [y for line in chart.lines for _, y in line.points if math.isfinite(y)]
    count, group = len(chart.categories), len(chart.lines)
    frame = _Frame([0.0, float(count)], ticks(min(0.0, *values), 100.0, 5))
    parts = frame.grid(chart)
    width = 0.8 / group
    for place, line in enumerate(chart.lines):
        for x, y in line.points:
            if math.isfinite(y):
                left = frame.x(x + 0.1 + place * width)
                right = frame.x(x + 0.1 + (place + 1) * width)
                top, bottom = sorted((frame.y(y), frame.y(0.0)))
                parts.append(
                    f'<rect class="c{line.run % NUM_COLORS}" x="{left:.1f}" y="{top:.1f}" '
                    f'width="{right - left - 1:.1f}" height="{bottom - top:.1f}">'
                    f"<title>{escape(chart.categories[int(x)])}: {y:.1f}</title></rect>"
                )
    for index, name in enumerate(chart.categories):
        parts.append(_text(frame.x(index + 0.5), HEIGHT - BOTTOM + 16, name, "middle"))
    return _svg(chart, parts)


def _svg(chart: Chart, parts: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers whose first and last enclose `low` and `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # no numbers lie between
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, low + spread
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def labels(values: list[float], percent: bool = False) -> list[str]:
    """The numbers of an axis, in one unit and with as many digits as tell them apart."""
    if percent:
        values = [100 * value for value in values]
    largest = max(abs(value) for value in values)
    scale, letter = next((u[1:] for u in _UNITS if largest >= u[0]), (1.0, ""))
    scaled = [value / scale for value in values]
    gap = scaled[1] - scaled[0]
    digits = next((d for d in range(5) if abs(gap - round(gap, d)) < 1e-6 * gap), None)
    if digits is None:  # a learning rate, such as 5e-06
        return [f"{value:.2g}" for value in values]
    unit = letter + "%" * percent
    return [f"{value:.{digits}f}{unit}" if value else "0" for value in scaled]


_UNITS = ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
