"""Charts as inline SVG: text, so that a report is one file; CSS variables, so that it is readable light and dark."""

import dataclasses
import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 560, 280
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 14, 40  # margins in user units: room for tick labels and axis titles
SMOOTH_FROM = 24  # curves with at least so many points get a running mean over a faint line of the raw ones


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve: `y` over `x`; `colour` indexes the palette of the page (--c0 .. --c7)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar with its interval, in [0, 1]; `strong` marks what the page is about."""

    name: str
    value: float
    low: float
    high: float
    note: str = ""
    colour: int = 0
    strong: bool = False


def line_chart(series: Sequence[Series], x_label: str, y_label: str, percent: bool = False, markers: bool = False,
               zero: bool = False, log: bool = False) -> str:
    """Curves over a shared x axis with a legend; "" where no series has a finite point.

    Args:
      series: the curves; points that are not finite are left out.
      x_label, y_label: axis titles.
      percent: y is a share of one and is labelled in percent.
      markers: draws each point (for few points) and no running mean.
      zero: the y axis starts at zero.
      log: the y axis is logarithmic (every y must be positive).
    """
    series = [s for s in (_finite(s) for s in series) if len(s.x)]
    if not series:
        return ""
    transform = math.log10 if log else float
    ys = [transform(y) for s in series for y in s.y]
    xs = [x for s in series for x in s.x]
    low, high = min([*ys, 0.0] if zero and not log else ys), max(ys)
    if high - low < 1e-9 * max(1.0, abs(high)):  # a flat curve: put it in the middle of something
        low, high = low - 0.1, high + 0.1
    y_ticks = _log_ticks(low, high) if log else nice_ticks(low, high)
    x_ticks = nice_ticks(min(xs), max(xs), 6, inside=True)
    if all(float(x).is_integer() for x in xs):
        x_ticks = [tick for tick in x_ticks if float(tick).is_integer()]
    x_span = min(xs), max(max(xs), min(xs) + 1e-9)
    y_span = min(y_ticks[0], low), max(y_ticks[-1], high)

    def at(x: float, y: float) -> tuple[float, float]:
        return (LEFT + (x - x_span[0]) / (x_span[1] - x_span[0]) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (transform(y) - y_span[0]) / (y_span[1] - y_span[0]) * (HEIGHT - TOP - BOTTOM))

    parts = []
    for tick in y_ticks:
        value = 10**tick if log else tick
        _, y = at(x_span[0], value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value, percent)}</text>')
    for tick in x_ticks:
        x, _ = at(tick, 10**y_span[0] if log else y_span[0])
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_number(tick)}</text>')
    for one in series:
        parts.append(_curve(one, at, markers, percent))
    parts.append(_axis_titles(x_label, y_label))
    return _svg(WIDTH, HEIGHT, parts, f"{y_label} over {x_label}") + legend(
        [(s.name, s.colour) for s in series] if len(series) > 1 else [])


def _curve(one: Series, at, markers: bool, percent: bool) -> str:
    style = f'style="stroke:var(--c{one.colour})"'
    points = [at(x, y) for x, y in zip(one.x, one.y, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    if markers:
        dots = "".join(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" style="fill:var(--c{one.colour})">'
            f"<title>{html.escape(one.name)}: {_number(x)} → {_number(y, percent)}</title></circle>"
            for (px, py), x, y in zip(points, one.x, one.y, strict=True))
        return f'<polyline class="curve" points="{path}" {style}/>{dots}'
    if len(points) < SMOOTH_FROM:
        return f'<polyline class="curve" points="{path}" {style}/>'
    smooth = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in zip(one.x, running_mean(one.y), strict=True))
    return (f'<polyline class="raw" points="{path}" {style}/>'
            f'<polyline class="curve" points="{smooth}" {style}/>')


def interval_bars(bars: Sequence[Bar]) -> str:
    """Horizontal bars of rates with their intervals as whiskers; "" where there are none."""
    if not bars:
        return ""
    label, row, width, right = 190, 30, 1080, 170
    top = min(1.0, max(0.1, math.ceil(max(bar.high for bar in bars) * 10) / 10))
    height = row * len(bars) + 34
    plot = width - label - right

    def x_of(rate: float) -> float:
        return label + min(rate, top) / top * plot

    parts = []
    for tick in nice_ticks(0.0, top, 6, inside=True):
        x = x_of(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 28}"/>'
                     f'<text x="{x:.1f}" y="{height - 12}" text-anchor="middle">{_number(tick, True)}</text>')
    for index, bar in enumerate(bars):
        middle = 4 + row * index + row / 2
        weight = ' class="strong"' if bar.strong else ""
        parts.append(
            f'<g><title>{html.escape(bar.name)}: {bar.value:.1%}, 95 % interval {bar.low:.1%} to {bar.high:.1%}</title>'
            f'<text x="{label - 10}" y="{middle + 4:.1f}" text-anchor="end"{weight}>{html.escape(bar.name)}</text>'
            f'<rect class="bar" x="{label}" y="{middle - 9:.1f}" rx="2" height="18" '
            f'width="{max(x_of(bar.value) - label, 1):.1f}" style="fill:var(--c{bar.colour})"/>'
            f'<path class="whisker" d="M{x_of(bar.low):.1f} {middle:.1f}H{x_of(bar.high):.1f}'
            f'M{x_of(bar.low):.1f} {middle - 5:.1f}v10M{x_of(bar.high):.1f} {middle - 5:.1f}v10"/>'
            f'<text x="{x_of(bar.high) + 9:.1f}" y="{middle + 4:.1f}"{weight}>{bar.value:.1%}'
            f'<tspan class="note" dx="7">{html.escape(bar.note)}</tspan></text></g>')
    return _svg(width, height, parts, "rates with 95 % intervals")


def yield_bars(rows: Sequence[tuple[str, int, int]]) -> str:
    """Horizontal bars of (name, tried, kept): the tried part faint, the kept part full."""
    rows = [row for row in rows if row[1]]
    if not rows:
        return ""
    label, row_height, width, right = 190, 20, 560, 96
    most = max(tried for _, tried, _ in rows)
    parts = []
    for index, (name, tried, kept) in enumerate(rows):
        middle = row_height * index + row_height / 2
        scale = (width - label - right) / most
        parts.append(
            f'<g><title>{html.escape(name)}: {kept} of {tried} candidates kept</title>'
            f'<text x="{label - 8}" y="{middle + 4:.1f}" text-anchor="end">{html.escape(name)}</text>'
            f'<rect class="faint" x="{label}" y="{middle - 6:.1f}" height="12" width="{max(tried * scale, 1):.1f}"/>'
            f'<rect x="{label}" y="{middle - 6:.1f}" height="12" width="{kept * scale:.1f}" style="fill:var(--c2)"/>'
            f'<text x="{label + tried * scale + 6:.1f}" y="{middle + 4:.1f}">{kept}/{tried}'
            f'<tspan class="note" dx="5">{kept / tried:.0%}</tspan></text></g>')
    return _svg(width, row_height * len(rows) + 4, parts, "kept of tried candidates")


def time_strip(parts_seconds: Sequence[tuple[str, float]]) -> str:
    """One strip whose pieces are as wide as the stages took, with a legend that names their minutes."""
    total = sum(seconds for _, seconds in parts_seconds)
    if total <= 0:
        return ""
    parts, x = [], 0.0
    for index, (name, seconds) in enumerate(parts_seconds):
        width = seconds / total * 1000
        parts.append(f'<rect x="{x:.1f}" y="0" height="26" width="{max(width - 1.5, 0.5):.1f}" '
                     f'style="fill:var(--c{index % 8})"><title>{html.escape(name)}: {seconds:.1f} s</title></rect>')
        x += width
    names = [(f"{name} {format_seconds(seconds)}", index % 8) for index, (name, seconds) in enumerate(parts_seconds)]
    return _svg(1000, 26, parts, "time of each stage") + legend(names)


def legend(entries: Sequence[tuple[str, int]]) -> str:
    """Names beside their colours; "" for none."""
    if not entries:
        return ""
    items = "".join(f'<span><i style="background:var(--c{colour})"></i>{html.escape(name)}</span>'
                    for name, colour in entries)
    return f'<div class="legend">{items}</div>'


def format_seconds(seconds: float) -> str:
    """12.3 s, 4 min 05 s or 1 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def nice_ticks(low: float, high: float, about: int = 5, inside: bool = False) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) that span low..high, or lie within it where `inside`."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    slack = 1e-9 * span / step
    first = math.ceil(low / step - slack) if inside else math.floor(low / step + slack)
    last = math.floor(high / step + slack) if inside else math.ceil(high / step - slack)
    return [round(index * step, 12) for index in range(first, last + 1)]


def running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over about an eighth of the curve; the window shrinks at the ends so that they stay true."""
    half = max(1, len(values) // 16)
    means = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        window = values[index - reach: index + reach + 1]
        means.append(sum(window) / len(window))
    return means


def _finite(series: Series) -> Series:
    pairs = [(x, y) for x, y in zip(series.x, series.y, strict=True)
             if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)]
    return dataclasses.replace(series, x=[x for x, _ in pairs], y=[y for _, y in pairs])


def _log_ticks(low: float, high: float) -> list[float]:
    """log10 of 1, 2 and 5 times powers of ten that span 10^low .. 10^high."""
    grid = [math.log10(factor) + power for power in range(math.floor(low) - 1, math.ceil(high) + 1)
            for factor in (1, 2, 5)]
    first = max([tick for tick in grid if tick <= low + 1e-9], default=grid[0])
    last = min([tick for tick in grid if tick >= high - 1e-9], default=grid[-1])
    return [tick for tick in grid if first <= tick <= last]


def _number(value: float, percent: bool = False) -> str:
    if percent:
        return f"{value * 100:.0f} %" if abs(value * 100 - round(value * 100)) < 1e-6 else f"{value * 100:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _axis_titles(x_label: str, y_label: str) -> str:
    return (f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 5}" text-anchor="middle">'
            f'{html.escape(x_label)}</text>'
            f'<text class="axis" transform="translate(12 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" '
            f'text-anchor="middle">{html.escape(y_label)}</text>')


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    return (f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{html.escape(label)}">'
            f'{"".join(parts)}</svg>')
