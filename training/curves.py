"""A picture of a run's log: ``curves.png``.

R rows of the log.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pathline.training.log import read_rows

if TYPE_CHECKING:  # an optional package
    from matplotlib.axes import Axes

__all__ = [
    "BY_TIME",
    "COUNTS",
    "EXACT",
    "FEW",
    "LOGARITHMIC",
    "Numbers",
    "Panels",
    "panels_of",
    "running_mean",
    "save_curves",
    "series",
]

Numbers = NDArray[np.float64]
Panels = dict[str, dict[str, Numbers]]

LOSS, BY_TIME, NORM, COUNTS = "loss", "loss by time t", "gradient norm", "skipped and failed"
SHARES = {
    "data_wait_share": "time waiting for data",
    "checkpoint_share": "time waiting for checkpoints",
    "model_flops_utilisation": "model FLOPs utilisation",
}
FAILED = {"skipped": "skipped steps", "passed": "batches passed over", "failed_saves": "failed saves"}
ALONE = {"lr": "learning rate", "images_per_second": "images per second", "memory_gib": "memory, GiB"}
EXACT = {ALONE["lr"], ALONE["memory_gib"]}
LOGARITHMIC = {LOSS, BY_TIME, NORM}  # where they span much
KNOWN = {"step", "window", "loss", "loss_by_time", "gradient_norm", *SHARES, *FAILED, *ALONE}
COLOURS = ["#0b5394", "#e07b39", "#3a9d5d", "#a64d79", "#8a6d3b", "#5b7083", "#c2a500", "#1aa0a6"]
FEW = 40  # rows that are drawn as points joined by lines; of more of them a running mean is drawn


def save_curves(folder: Path) -> Path | None:
    """Draw a run's ``metrics.jsonl`` into ``curves.png`` beside it, in the place of an older one.

    A picture is no reason for a run to fail: what goes wrong is said on stderr.

    Returns:
        The picture, or None where there is nothing to draw, matplotlib is missing, or it went wrong.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        return None
    try:
        rows = read_rows(folder)
        panels = panels_of(rows)
        if not panels:
            return None
        with rc_context({"text.usetex": False, "font.size": 9.0}):
            return _save(folder / "curves.png", series(rows, "step"), panels)
    except Exception as error:  # whatever another package raises
        print(f"warning: no curves.png ({type(error).__name__}: {error})", file=sys.stderr)
        return None


def panels_of(rows: list[dict[str, Any]]) -> Panels:
    """Return what is drawn: title -> name of a line -> (R,); what has no finite number is left out."""
    newest = rows[-1] if rows else {}
    terms = [name for name, value in newest.items() if name not in KNOWN and not isinstance(value, list)]
    panels = {
        LOSS: {name: series(rows, name) for name in ("loss", *terms)},
        BY_TIME: _by_time(rows),
        NORM: {"": series(rows, "gradient_norm")},
        **{title: {"": series(rows, name)} for name, title in ALONE.items()},
        "shares of time and of the peak": {label: series(rows, name) for name, label in SHARES.items()},
        COUNTS: {label: series(rows, name) for name, label in FAILED.items()},
    }
    finite = {title: {k: v for k, v in lines.items() if np.isfinite(v).any()} for title, lines in panels.items()}
    return {title: lines for title, lines in finite.items() if lines}


def series(rows: list[dict[str, Any]], name: str) -> Numbers:
    """Return an entry of all rows, (R,), NaN where there is none."""
    return np.array([math.nan if row.get(name) is None else row[name] for row in rows], dtype=np.float64)


def _by_time(rows: list[dict[str, Any]]) -> dict[str, Numbers]:
    """Return the loss over bins of t by the bins' bounds; rows with another number of bins than the newest are NaN."""
    bins = next((len(row["loss_by_time"]) for row in reversed(rows) if row.get("loss_by_time")), 0)
    lists = [row.get("loss_by_time") or [] for row in rows]
    table = [values if len(values) == bins else [None] * bins for values in lists]
    return {f"{i / bins:.2g}–{(i + 1) / bins:.2g}": np.array([row[i] for row in table], float) for i in range(bins)}


def _save(path: Path, steps: Numbers, panels: Panels) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = math.ceil(len(panels) / 2)
    height = math.ceil(len(panels) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches
    figure = Figure(figsize=(4.0 * columns, 3.0 * height), dpi=100, layout=layout)
    FigureCanvasAgg(figure)
    for place, (title, lines) in enumerate(panels.items(), start=1):
        _draw(figure.add_subplot(height, columns, place), title, steps, lines)
    beside = path.with_name(f".{path.name}.partial")
    figure.savefig(beside, format="png")
    beside.replace(path)
    return path


def _draw(axis: Axes, title: str, steps: Numbers, lines: dict[str, Numbers]) -> None:
    """Draw one panel."""
    from matplotlib import colormaps
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_title(title, loc="left", fontweight="bold")
    for i, (label, values) in enumerate(lines.items()):
        colour = colormaps["viridis"](i / max(1, len(lines) - 1)) if title == BY_TIME else COLOURS[i % len(COLOURS)]
        _draw_line(axis, title, steps, values, colour, label)
    if len(lines) > 1:
        place: Literal["upper left", "upper right"] = "upper left" if title == COUNTS else "upper right"
        # matplotlib's search for the best place takes long
        axis.legend(loc=place, fontsize=7, framealpha=0.7, edgecolor="none", ncols=2 if len(lines) > 4 else 1)
    else:
        (values,) = lines.values()
        axis.set_title(f"{values[np.isfinite(values)][-1]:.4g}", loc="right", color="0.4")
    _scale(axis, title, np.concatenate(list(lines.values())))
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel("step", color="0.4")
    axis.tick_params(colors="0.4")
    axis.grid(color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["bottom", "left"]].set_color("0.7")


def _draw_line(axis: Axes, title: str, steps: Numbers, values: Numbers, colour: Any, label: str) -> None:
    """Draw what is exact or few as it is, of the rest the running mean over a fortieth of it, on the raw line."""
    if title == COUNTS:
        axis.step(steps, values, where="post", color=colour, label=label, marker="." if len(steps) == 1 else "")
    elif len(steps) <= FEW or title in EXACT:
        marker = "o" if len(steps) <= FEW else ""
        axis.plot(steps, values, color=colour, label=label, linewidth=1.3, marker=marker, markersize=2.5)
    else:
        if title != BY_TIME:
            axis.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
        axis.plot(steps, running_mean(values, len(steps) // FEW), color=colour, label=label, linewidth=1.3)


def running_mean(values: Numbers, width: int) -> Numbers:
    """Return means of the finite values among ``width`` before and after, (R,); NaN where none is finite.

    Near the start as few on either side as there are before, so that the first steps' fall is not flattened.
    """
    finite = np.isfinite(values)
    parts = (np.where(finite, values, 0.0), finite.astype(np.float64))
    # no difference of running sums, in which a single huge value would drown all that follow
    sums, counts = (np.convolve(x, np.ones(2 * width + 1))[width : width + len(x)] for x in parts)
    sums[:width], counts[:width] = (np.cumsum(x)[: 2 * width : 2] for x in parts)
    means = np.full(len(values), math.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means


def _scale(axis: Axes, title: str, values: Numbers) -> None:
    """Start from 0, but for losses and norms, which are drawn by their logarithm where they span much."""
    from matplotlib.ticker import LogLocator, NullFormatter

    values, room = values[np.isfinite(values)], 1.05 if axis.get_legend() is None else 1.5
    if title not in LOGARITHMIC:
        axis.set_ylim(0, max(room * values.max(), 1.0 if title == COUNTS else 0.0) or None)
    elif values.min() > 0 and values.max() > 20 * values.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter("{x:g}")
