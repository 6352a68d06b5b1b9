"""Charts as inline SVG, coloured by the page's style sheet: light and dark need no second drawing.

Plain shapes and text of the page's own font: a chart is some kilobytes, and its words stay words.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from train.report.chart import Axis, Chart, Estimates, Line, plain
from train.report.text import safe
from train.report.ticks import log_ticks, round_ticks

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 26, 42
COLORS, DASHES = 7, 3
"""As many as the style sheet has; once all colours are taken they come again, dashed."""
MARKED = 12
"""Lines of at most so many points have a dot at each."""
ROW, TOP_OF_ROWS = 26, 4


class Scale(NamedTuple):
    """From values to places on the canvas."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        """The place; values out of the range lie outside of the canvas, which cuts them off."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        part = (value - low) / (high - low)
        return self.start + max(-9.0, min(9.0, part)) * (self.end - self.start)


def series_class(mixer: int) -> str:
    """The style of everything that belongs to a mixer."""
    return f"s{mixer % COLORS} d{mixer // COLORS % DASHES}"


def draw(chart: Chart, names: Sequence[str], key: str) -> str:
    """The picture of a chart.

    Args:
        chart: at least one line with a point.
        names: of the mixers.
        key: unique on the page.
    """
    x = _scale(chart.x, [x for line in chart.lines for x, _ in line.points], LEFT, WIDTH - RIGHT)
    values = [y for line in chart.lines for _, y in line.points]
    values += [y for line in chart.lines for _, *ends in line.band for y in ends]
    values += [] if chart.level is None else [chart.level]
    y = _scale(chart.y, values, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<clipPath id="{key}-clip"><rect x="{LEFT}" y="{TOP - 4}" '
        f'width="{WIDTH - LEFT - RIGHT + 6}" height="{HEIGHT - TOP - BOTTOM + 4}"/></clipPath>',
        *_x_axis(chart.x, x, TOP, HEIGHT - BOTTOM),
        *_y_axis(chart.y, y),
        f'<g clip-path="url(#{key}-clip)">',
    ]
    if chart.level is not None:
        parts.append(f'<path class="level" d="M{LEFT} {y(chart.level):.1f}H{WIDTH - RIGHT}"/>')
    for line in sorted(chart.lines, key=lambda line: not line.faint):
        parts += _line(line, names[line.mixer], x, y, chart)
    return _svg([*parts, "</g>"], chart.title, _description(chart, names), key, HEIGHT)


def draw_estimates(found: Estimates, names: Sequence[str], key: str) -> str:
    """A dot and a bar for each mixer, the best on top."""
    rows = sorted(found.rows, key=lambda row: row[1])
    height = TOP_OF_ROWS + ROW * len(rows) + BOTTOM
    left = 16 + 7 * min(22, max(len(names[mixer]) for mixer, *_ in rows))
    ends = [mean + sign * margin for _, mean, margin in rows for sign in (-1, 1)]
    axis = Axis(found.label, plain)
    x = _scale(axis, ends, left, WIDTH - 24, pad=0.08)
    parts = _x_axis(axis, x, TOP_OF_ROWS, height - BOTTOM)
    for place, (mixer, mean, margin) in enumerate(rows):
        at, middle = TOP_OF_ROWS + ROW * (place + 0.5), x(mean)
        low, high = x(mean - margin), x(mean + margin)
        name, style = names[mixer], series_class(mixer)
        shown = name if len(name) <= 22 else f"{name[:21]}…"
        said = f"{name}: {mean:.3f}" + (f" ± {margin:.3f}" if margin else "")
        parts.append(
            f'<text class="name" x="{left - 10}" y="{at + 4:.1f}">{safe(shown)}</text>'
            f'<g class="{style}"><title>{safe(said)}</title>'
            f'<path class="bar" d="M{low:.1f} {at:.1f}H{high:.1f}"/>'
            f'<circle r="4.5" cx="{middle:.1f}" cy="{at:.1f}"/></g>'
        )
    told = "; ".join(f"{names[mixer]} {mean:.3f}" for mixer, mean, _ in rows)
    return _svg(parts, found.title, f"{told}.", key, height)


def _svg(parts: Sequence[str], title: str, description: str, key: str, height: float) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="{key}-t {key}-d">'
        f'<title id="{key}-t">{safe(title)}</title><desc id="{key}-d">{safe(description)}'
        f"</desc>{''.join(parts)}</svg>"
    )


def _description(chart: Chart, names: Sequence[str]) -> str:
    """Where each mixer's line ends, for those who cannot see it."""
    last = {line.mixer: line.points[-1] for line in chart.lines if line.points and not line.faint}
    told = [
        f"{names[mixer]} ends at {chart.y.text(y)}, {chart.x.text(x)}"
        for mixer, (x, y) in last.items()
    ]
    return f"{chart.y.label} against {chart.x.label}. {'; '.join(told)}."


def _scale(
    axis: Axis, values: Sequence[float], start: float, end: float, pad: float = 0.04
) -> Scale:
    low, high = axis.limits or (min(values), max(values))
    if axis.log:
        low, high = low / 1.15, high * 1.15
        return Scale(low, high, start, end, log=True)
    if axis.limits is None:
        extra = pad * (high - low) or 0.02 * abs(high) or 1.0
        from_zero = start < end and 0 <= low < 0.2 * high
        low, high = (0.0 if from_zero else low - extra), high + extra
    return Scale(low, high, start, end, log=False)


def _x_axis(axis: Axis, scale: Scale, top: float, base: float) -> list[str]:
    parts = [f'<path class="axis" d="M{scale.start:g} {base:g}H{scale.end:g}"/>']
    ticks = list(axis.ticks) or round_ticks(scale.low, scale.high)
    room = (scale.end - scale.start) / max(1, max(len(axis.text(tick)) for tick in ticks) + 2)
    for tick in _thin(ticks, int(room / 7), scale):
        at = scale(tick)
        parts.append(
            f'<path class="grid" d="M{at:.1f} {top:g}V{base:g}"/>'
            f'<text class="tick" x="{at:.1f}" y="{base + 16:g}">{safe(axis.text(tick))}</text>'
        )
    middle = (scale.start + scale.end) / 2
    parts.append(f'<text class="x" x="{middle:g}" y="{base + 36:g}">{safe(axis.label)}</text>')
    return parts


def _y_axis(axis: Axis, scale: Scale) -> list[str]:
    ticks = (log_ticks if axis.log else round_ticks)(scale.low, scale.high)
    parts = [f'<text class="y" x="2" y="12">{safe(axis.label)}</text>']
    for tick in ticks:
        at = scale(tick)
        parts.append(
            f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
            f'<text class="side" x="{LEFT - 7}" y="{at + 4:.1f}">{safe(axis.text(tick))}</text>'
        )
    return parts


def _line(line: Line, name: str, x: Scale, y: Scale, chart: Chart) -> list[str]:
    style = series_class(line.mixer)
    style += " faint" if line.faint else " many" if line.one_of_many else ""
    parts = [f'<g class="{style}"><title>{safe(name)}</title>']
    if len(line.band) > 1:
        edge = [(a, high) for a, _, high in line.band]
        edge += [(a, low) for a, low, _ in reversed(line.band)]
        parts.append(f'<path class="band" d="{_path(edge, x, y)}Z"/>')
    parts.append(f'<path class="line" d="{_path(line.points, x, y)}"/>')
    plain = line.faint or line.one_of_many or len(line.points) > MARKED
    few = [] if plain else line.points
    for a, b in few:
        said = f"{name}: {chart.y.text(b)} at {chart.x.text(a)}"
        parts.append(
            f'<circle r="3" cx="{x(a):.1f}" cy="{y(b):.1f}"><title>{safe(said)}</title></circle>'
        )
    if line.end:
        a, b = x(line.points[-1][0]), min(max(y(line.points[-1][1]), TOP + 4), HEIGHT - BOTTOM - 4)
        parts.append(
            f'<path class="end" d="M{a - 5:.1f} {b - 5:.1f}l10 10m0 -10l-10 10">'
            f"<title>{safe(f'{name} {line.end}')}</title></path>"
        )
    return [*parts, "</g>"]


def _path(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)


def _thin(ticks: Sequence[float], most: int, scale: Scale) -> list[float]:
    """At most so many, the last always, and none on top of another."""
    every = math.ceil(len(ticks) / max(2, most))
    kept: list[float] = []
    for tick in list(ticks)[::-1][::every]:
        if not kept or abs(scale(tick) - scale(kept[-1])) > 30:
            kept.append(tick)
    return kept
