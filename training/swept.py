"""What a sweep found: a table, ``sweep.json``, ``sweep.csv`` and ``sweep.png``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathline.training.stored import write_text

if TYPE_CHECKING:  # an optional package
    from matplotlib.axes import Axes

__all__ = ["Found", "save", "save_plot", "table"]

FORMAT = 1
NFE = "NFE"
COLOURS = ["#0b5394", "#e07b39", "#3a9d5d", "#a64d79", "#8a6d3b", "#5b7083", "#c2a500", "#1aa0a6"]


@dataclass(frozen=True)
class Found:
    """A drawing of a sweep.

    Attributes:
        point: the swept entries with the values they had.
        file: name of the samples' file.
        record: how they were drawn.
        metrics: records, as ``Record.to_json`` gives them.
    """

    point: Mapping[str, Any]
    file: str
    record: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]

    @property
    def figures(self) -> dict[str, float]:
        """Every measured value by metric and name."""
        return {
            f"{entry['metric']}, {name}": float(value)
            for entry in self.metrics
            for name, value in entry["values"].items()
        }

    @property
    def warnings(self) -> list[str]:
        """What the metrics warn of."""
        return [f"{entry['metric']}: {words}" for entry in self.metrics for words in entry.get("warnings", ())]

    @property
    def row(self) -> dict[str, Any]:
        """The drawing in a table: swept entries, what it cost, and every measured value."""
        cost = {NFE: self.record["nfe"], "blocks": self.record["block_evaluations"], "seconds": self.record["seconds"]}
        return {**self.point, **cost, **self.figures}


def save(found: Sequence[Found], folder: Path) -> list[Path]:
    """Write the files of a sweep, in the place of older ones; return their paths.

    Returns:
        Without ``sweep.png`` where matplotlib is missing, or there is nothing to draw.
    """
    listed = [{**vars(entry), "metrics": list(entry.metrics), "record": dict(entry.record)} for entry in found]
    paths = [folder / "sweep.json", folder / "sweep.csv"]
    write_text(paths[0], json.dumps({"format": FORMAT, "drawings": listed}, indent=1))
    write_text(paths[1], _csv([entry.row for entry in found]))
    return paths + save_plot(found, folder / "sweep.png")


def table(found: Sequence[Found]) -> str:
    """Lay a sweep out as lines, one a drawing."""
    rows = [entry.row for entry in found]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    heads = [name.split(", ") for name in columns]
    height = max(map(len, heads))
    lines = [*zip(*([""] * (height - len(head)) + head for head in heads), strict=True)]
    lines += [tuple(_cell(row.get(name)) for name in columns) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# --- the plot --------------------------------------------------------------------------------------------------------


def save_plot(found: Sequence[Found], path: Path) -> list[Path]:
    """Draw every measured value against the network calls, or what else was swept first; one line a value of the rest.

    Returns:
        The picture, or nothing where matplotlib is missing or nothing was measured.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        return []
    panels = list(dict.fromkeys(name for entry in found for name in entry.figures))
    if not panels:
        return []
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches
    figure = Figure(figsize=(4.0 * columns, 3.2 * height), dpi=100, layout=layout)
    FigureCanvasAgg(figure)
    for place, name in enumerate(panels, start=1):
        _draw(figure.add_subplot(height, columns, place), name, found)
    beside = path.with_name(f".{path.name}.partial")
    figure.savefig(beside, format="png")
    beside.replace(path)
    return [path]


def _draw(axes: Axes, name: str, found: Sequence[Found]) -> None:
    """Draw one value."""
    from matplotlib.ticker import MaxNLocator

    along = _along(found)
    in_words = any(isinstance(_place(entry, along), str) for entry in found)
    lines: dict[str, list[tuple[Any, float]]] = {}
    for entry in found:
        if name in entry.figures:
            others = {key: value for key, value in entry.point.items() if key not in _told_by(along)}
            label = ", ".join(f"{key} {_cell(value)}" for key, value in others.items())
            place = _place(entry, along)
            lines.setdefault(label, []).append((str(place) if in_words else place, entry.figures[name]))
    for number, (label, line) in enumerate(lines.items()):
        x, y = zip(*(line if in_words else sorted(line)), strict=True)
        axes.plot(x, y, "o-", color=COLOURS[number % len(COLOURS)], markersize=4, linewidth=1.3, label=label)
    metric, _, figure = name.rpartition(", ")
    axes.set_title(figure, loc="left", fontweight="bold")
    axes.set_title(metric, loc="right", fontsize="small", color="0.4")
    axes.set_xlabel("network calls (NFE)" if along == NFE else along, color="0.4")
    values = [value for line in lines.values() for _, value in line]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    if all(isinstance(x, int) for line in lines.values() for x, _ in line):
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(lines) > 1:
        axes.legend(fontsize=7, framealpha=0.7, edgecolor="none")
    axes.tick_params(colors="0.4")
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color("0.7")


def _along(found: Sequence[Found]) -> str:
    """Return what a plot runs along: network calls where steps were swept, else the first swept entry."""
    entries = list(found[0].point)
    return NFE if "solver.steps" in entries or not entries else entries[0]


def _told_by(along: str) -> tuple[str, ...]:
    return ("solver.steps",) if along == NFE else (along,)


def _place(entry: Found, along: str) -> Any:
    """Return where a drawing lies along a plot: a number, or words."""
    value = entry.record["nfe"] if along == NFE else entry.point[along]
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
