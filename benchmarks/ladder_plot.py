"""The picture of the ladder: held-out loss against steps and against seconds, mean ± standard error over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

COLOURS = ("#222222", "#1b7f4d", "#b8860b", "#7a4fb5", "#c0392b")


def draw(found: Mapping[str, Sequence[Mapping[str, Any]]], costs: Mapping[str, float], picture: Path) -> None:
    """Draw the runs of each rung.

    Args:
        found: rung -> its runs.
        costs: rung -> seconds of a step.
        picture: file to write.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for number, (name, runs) in enumerate(found.items()):
        steps = [point["step"] for point in runs[0]["curve"]]
        columns = list(zip(*([point["loss"] for point in run["curve"]] for run in runs), strict=True))
        mean = [statistics.fmean(column) for column in columns]
        error = [statistics.stdev(column) / len(column) ** 0.5 if len(column) > 1 else 0.0 for column in columns]
        low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
        colour = COLOURS[number % len(COLOURS)]
        for axes, scale in ((left, 1.0), (right, costs[name])):
            across = [step * scale for step in steps]
            axes.plot(across, mean, color=colour, lw=1.4, label=name)
            axes.fill_between(across, low, high, color=colour, alpha=0.15, lw=0)
    left.set_ylabel("velocity loss on held-out images")
    left.set_xlabel("steps")
    right.set_xlabel("seconds of training")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis, subs in ((axes.xaxis, (1, 2, 5)), (axes.yaxis, (1, 2, 3, 4, 5, 6, 8))):
            axis.set_major_locator(LogLocator(subs=subs))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25, lw=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    print(f"wrote {picture}")
