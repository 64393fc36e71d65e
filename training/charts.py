"""Lines over steps as inline SVG, coloured by the style sheet of the page that they are put into.

R rows of a log.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import NamedTuple

import numpy as np

from pathline.training.curves import BY_TIME, COUNTS, EXACT, FEW, LOGARITHMIC, Numbers, running_mean

__all__ = ["COLOURS", "chart"]

COLOURS = 8  # classes c0 … of the style sheet, for lines one after the other
WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 8, 22  # margins, for numbers
MOST = 12  # lines of a chart; of more of them some are left out, evenly
BUCKETS = 150  # along a line; of more rows the least and the largest of each are drawn
LARGEST = 1e290  # beyond which values are drawn at the edge: differences stay finite


class _Axis(NamedTuple):
    """A range of values, and where their ends are drawn."""

    low: float
    high: float
    first: float
    last: float
    logarithmic: bool = False

    def place(self, values: Numbers) -> Numbers:
        """Return where values are drawn."""
        low, high = self._of(np.array([self.low, self.high]))
        shares = (self._of(values) - low) / (high - low)
        placed: Numbers = self.first + shares * (self.last - self.first)
        return placed

    def ticks(self) -> list[float]:
        """Return round values within the range, five or so."""
        if self.logarithmic and self.high / self.low >= 10:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            if last - first < 2:
                found = [digit * 10.0**decade for decade in range(first - 1, last + 1) for digit in (1, 2, 5)]
            else:
                found = [10.0**decade for decade in range(first, last + 1, math.ceil((last - first + 1) / 6))]
        else:
            rough = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(rough))
            step = next(unit * digit for digit in (1, 2, 5, 10) if unit * digit >= rough * 0.8)
            found = [step * number for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [value for value in found if self.low <= value <= self.high]

    def _of(self, values: Numbers) -> Numbers:
        return np.log(values) if self.logarithmic else values


def chart(title: str, steps: Numbers, lines: Mapping[str, Numbers]) -> str:
    """Return a figure of lines over steps, with a legend for more than one.

    Many rows are drawn by a running mean on the line itself, thinned out, as ``curves.png`` does.

    Args:
        title: of the figure, which also tells how it is scaled, as that of a panel in ``curves``.
        steps: (R,).
        lines: name -> (R,) values, NaN for none; at least one is finite.
    """
    chosen = _some(lines)
    clipped = {name: np.where(np.isfinite(v), np.clip(v, -LARGEST, LARGEST), math.nan) for name, v in chosen.items()}
    across, up = _across(steps), _up(title, np.concatenate(list(clipped.values())))
    drawn = []
    for number, (name, values) in enumerate(clipped.items()):
        drawn += _line(title, name, across, up, steps, values, _colour(title, number, len(clipped)))
    told = f"{title} over steps {_short(float(steps[0]))} to {_short(float(steps[-1]))}. {_words(clipped)}"
    picture = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(told)}">'
        f"{_grid(across, up)}{''.join(drawn)}</svg>"
    )
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3>{_latest(clipped)}</figcaption>'
        f"{picture}{_legend(title, clipped)}</figure>"
    )


def _some(lines: Mapping[str, Numbers]) -> dict[str, Numbers]:
    names = list(lines)
    if len(names) > MOST:
        names = [names[round(place)] for place in np.linspace(0, len(names) - 1, MOST)]
    return {name: lines[name] for name in names}


def _colour(title: str, number: int, count: int) -> str:
    """Return the attributes that give a line its colour; bins of t go from violet to orange."""
    if title != BY_TIME:
        return f'class="c{number % COLOURS}"'
    return f'style="--c:hsl({(265 + 125 * number / max(1, count - 1)) % 360:.0f} 62% 58%)"'


def _across(steps: Numbers) -> _Axis:
    low, high = float(steps.min()), float(steps.max())
    room = 0.5 if low == high else 0.0
    return _Axis(low - room, high + room, LEFT, WIDTH - RIGHT)


def _up(title: str, values: Numbers) -> _Axis:
    """Start from 0, but for losses and norms, which are drawn by their logarithm where they span much."""
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    ends = HEIGHT - BOTTOM, TOP
    if title not in LOGARITHMIC:
        least = 1.0 if title == COUNTS else 0.0
        return _Axis(min(low, 0.0), max(1.05 * high, least) or 1.0, *ends)
    if low > 0 and high > 20 * low:
        return _Axis(low / 1.05, high * 1.05, *ends, logarithmic=True)
    room = 0.05 * (high - low) or abs(high) or 1.0
    return _Axis(low - room, high + room, *ends)


def _line(title: str, name: str, across: _Axis, up: _Axis, steps: Numbers, values: Numbers, colour: str) -> list[str]:
    """Draw what is exact or few as it is, of the rest the running mean over a fortieth of it, on the raw line."""
    words = f"<title>{escape(name)}</title>" if name else ""

    def path(kind: str, drawn: Numbers, *, stairs: bool = False) -> str:
        track = _track(across, up, steps, drawn, stairs=stairs)
        return f'<g {colour}><path class="{kind}" d="{track}">{words}</path></g>'

    if title == COUNTS:
        return [path("line", values, stairs=True)]
    if len(steps) <= FEW or title in EXACT:
        dots = _dots(across, up, steps, values) if len(steps) <= FEW else ""
        return [path("line", values), f"<g {colour}>{dots}</g>"]
    raw = [] if title == BY_TIME else [path("raw", values)]
    return [*raw, path("line", running_mean(values, len(steps) // FEW))]


def _track(across: _Axis, up: _Axis, steps: Numbers, values: Numbers, *, stairs: bool) -> str:
    """Return the path of a line, interrupted where there is no value."""
    parts, pen_down, before = [], False, ""
    xs, ys = across.place(steps), up.place(values)
    for place in _kept(values):
        if not math.isfinite(ys[place]):
            pen_down = False
            continue
        x, y = f"{xs[place]:.1f}", f"{ys[place]:.1f}"
        corner = f"L{x} {before}" if stairs and pen_down else ""
        parts.append(f"{corner}{'L' if pen_down else 'M'}{x} {y}")
        pen_down, before = True, y
    return "".join(parts)


def _kept(values: Numbers) -> list[int]:
    """Return the places of what is drawn: all, or the least and the largest of each bucket, and a gap where it is."""
    if len(values) <= 2 * BUCKETS:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    for bucket in np.array_split(np.arange(len(values)), BUCKETS):
        finite = bucket[np.isfinite(values[bucket])]
        chosen = (finite[values[finite].argmin()], finite[values[finite].argmax()]) if len(finite) else bucket[:1]
        kept.update(int(place) for place in chosen)
    return sorted(kept)


def _dots(across: _Axis, up: _Axis, steps: Numbers, values: Numbers) -> str:
    places = np.flatnonzero(np.isfinite(values))
    rows = zip(across.place(steps[places]), up.place(values[places]), strict=True)
    return "".join(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in rows)


def _grid(across: _Axis, up: _Axis) -> str:
    parts = []
    for value, y in _marks(up):
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{value:.4g}</text>')
    for value, x in _marks(across):
        if value == int(value):
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{_short(value)}</text>')
    return "".join(parts)


def _marks(axis: _Axis) -> list[tuple[float, float]]:
    ticks = axis.ticks()
    return list(zip(ticks, axis.place(np.array(ticks)).tolist(), strict=True))


def _short(step: float) -> str:
    """Return a step with at most four digits: 300, 1.25k, 2M."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if abs(step) >= unit:
            return f"{step / unit:.4g}{name}"
    return f"{step:.4g}"


def _last(values: Numbers) -> float:
    return float(values[np.isfinite(values)][-1])


def _words(lines: Mapping[str, Numbers]) -> str:
    """Tell in words where lines begin and end."""

    def told(name: str, values: Numbers) -> str:
        finite = values[np.isfinite(values)]
        return f"{name}{': ' if name else ''}from {finite[0]:.4g} to {finite[-1]:.4g}"

    return "; ".join(told(name, values) for name, values in lines.items() if np.isfinite(values).any()) + "."


def _latest(lines: Mapping[str, Numbers]) -> str:
    (values, *others) = lines.values()
    return "" if others else f'<span class="latest">latest {_last(values):.4g}</span>'


def _legend(title: str, lines: Mapping[str, Numbers]) -> str:
    if len(lines) == 1:
        return ""
    rows = []
    for number, (name, values) in enumerate(lines.items()):
        last = f" {_last(values):.4g}" if np.isfinite(values).any() else ""
        colour = _colour(title, number, len(lines))
        rows.append(f'<li {colour}><i class="mark"></i>{escape(name)}<b>{last}</b></li>')
    return f'<ul class="legend">{"".join(rows)}</ul>'
