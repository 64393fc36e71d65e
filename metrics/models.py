"""What a metric of a model is: it takes a flow on batches of data, merges with another of its kind, computes a record.

N samples; S the shape of one; P points in time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from pathline.core.checks import check_finite
from pathline.core.draws import BoundDraws
from pathline.core.errors import InputError, InputTypeError
from pathline.core.flow import BaseFlow
from pathline.core.registry import Registry

if TYPE_CHECKING:  # an optional package
    from matplotlib.axes import Axes

__all__ = [
    "Averages",
    "Measured",
    "ModelMetric",
    "ModelRecord",
    "Row",
    "build",
    "names",
    "register",
    "registry",
    "table",
]

COLOURS = ["#0b5394", "#e07b39", "#3a9d5d", "#a64d79", "#8a6d3b", "#5b7083", "#c2a500", "#1aa0a6"]
SHOWN = 5  # times that the printed table shows


@dataclass(frozen=True)
class Row:
    """One line of a record's table, each figure a mean over samples with its standard error.

    Attributes:
        mean: over the times.
        error: standard error of ``mean``.
        means: at each time, P of them.
        errors: their standard errors.
    """

    name: str
    mean: float
    error: float
    means: tuple[float, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True)
class ModelRecord:
    """A result with its evidence.

    Attributes:
        metric: what was measured, with its options.
        about: what the figures say.
        unit: of every figure.
        count: number of samples, two or more.
        times: t of the columns, P of them.
        rows: the table.
    """

    metric: str
    about: str
    unit: str
    count: int
    times: tuple[float, ...]
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the record fit for JSON."""
        return asdict(self)

    def row(self, name: str) -> Row:
        """Return a row by name; raises InputError if there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise InputError(f"got row {name!r}, expected one of {', '.join(row.name for row in self.rows)}")


class Measured(NamedTuple):
    """What a metric sees in one batch.

    Attributes:
        times: (P,), the same in every batch.
        rows: name -> (N, P).
    """

    times: Tensor
    rows: Mapping[str, Tensor]


class Averages:
    """Count, mean and scatter of each entry of (N, …) values, merged chunk by chunk in float64; N > 0.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """

    def __init__(self, values: Tensor) -> None:
        values = values.double()
        self.count, self.mean = len(values), values.mean(0)
        self.scatter = (values - self.mean).square().sum(0)

    def merge(self, other: Averages) -> None:
        """Take in what ``other`` has taken in."""
        total, shift = self.count + other.count, other.mean - self.mean
        self.scatter = self.scatter + other.scatter + shift.square() * (self.count * other.count / total)
        self.mean = self.mean + shift * (other.count / total)
        self.count = total

    @property
    def error(self) -> Tensor:
        """Standard error of the mean; needs two samples or more."""
        return (self.scatter / (self.count - 1) / self.count).sqrt()


class ModelMetric(ABC):
    """A figure of merit of a flow, by time, averaged over samples.

    Every sample counts alike and is measured at draws of its own, so that the size of batches changes nothing but
    rounding.

    Attributes:
        metric: what is measured, with its options; see ``ModelRecord``, as for the other two.
        title: what stands above the plot.
        ordered: whether the rows follow an order, as layers do; they are then coloured along it.
        by_time: whether times are what it is measured at; an analysis takes any other only where it is named.
    """

    metric: str
    about: str
    unit: str
    title: ClassVar[str]
    ordered: ClassVar[bool] = False
    by_time: ClassVar[bool] = True

    def __init__(self) -> None:
        self._times, self._names = torch.zeros(0), ()
        self._cells: Averages | None = None  # (R, P), R rows
        self._rows: Averages | None = None  # (R,): of each sample's mean over the times

    _names: tuple[str, ...]

    @property
    def count(self) -> int:
        """Samples taken in so far."""
        return self._cells.count if self._cells else 0

    @abstractmethod
    def check(self, flow: BaseFlow) -> None:
        """Raise InputError for a flow that this metric is not defined for."""

    @abstractmethod
    def measure(self, flow: BaseFlow, data: Tensor, conditions: Mapping[str, Any], draws: BoundDraws) -> Measured:
        """Measure a checked batch; called without gradients."""

    def update(self, flow: BaseFlow, batch: Mapping[str, Tensor], draws: BoundDraws) -> None:
        """Take a batch in.

        Args:
            flow: its backbone in evaluation mode; the same in every call.
            batch: ``data`` (N, *S), and ``label`` (N,) for a backbone with classes.
            draws: of everything random, bound to the N samples' ids.

        Raises:
            InputError: a flow that the metric is not defined for, or a batch that does not fit it.
            InputTypeError: data that are not floating point.
        """
        self.check(flow)
        if "data" not in batch:
            raise InputError(f"got a batch of {', '.join(batch) or 'nothing'}, expected data and, for classes, label")
        data = batch["data"]
        if not data.is_floating_point():
            raise InputTypeError(f"got data of type {data.dtype}, expected floating point; levels a are a/127.5 - 1")
        if not len(data) or len(draws) != len(data):
            raise InputError(f"got {len(data)} samples beside draws for {len(draws)}; bind one sample id a sample")
        conditions = {"label": batch["label"]} if getattr(flow.backbone, "num_classes", 0) and "label" in batch else {}
        flow.check(data, conditions)
        device = next(flow.backbone.parameters(), data).device
        sent = {name: value.to(device) for name, value in conditions.items()}
        with torch.no_grad():
            self._add(*self.measure(flow, data.to(device), sent, draws))

    def _add(self, times: Tensor, rows: Mapping[str, Tensor]) -> None:
        values = torch.stack([row.cpu().double() for row in rows.values()], dim=1)
        check_finite(values, f"what {self.metric} measured")
        self._combine(times.cpu().double(), tuple(rows), Averages(values), Averages(values.mean(2)))

    def merge(self, other: Self) -> None:
        """Take in what another metric of the same kind and options has taken in.

        Raises:
            InputError: it was measured with other options, at other times or of another network.
        """
        if other.metric != self.metric:
            raise InputError(f"got {other.metric!r} to merge into {self.metric!r}; build both with the same options")
        if other._cells and other._rows:
            self._combine(other._times, other._names, other._cells, other._rows)

    def _combine(self, times: Tensor, names: tuple[str, ...], cells: Averages, rows: Averages) -> None:
        if not self._cells or not self._rows:
            self._times, self._names, self._cells, self._rows = times, names, cells, rows
            return
        if names != self._names or not torch.equal(times, self._times):
            raise InputError(
                f"got rows {', '.join(names)} at {len(times)} times after {', '.join(self._names)} at "
                f"{len(self._times)}; measure one network, with a solver of fixed steps"
            )
        self._cells.merge(cells)
        self._rows.merge(rows)

    def compute(self) -> ModelRecord:
        """Return the record; raises InputError below two samples, which have no standard error."""
        if not self._cells or not self._rows or self.count < 2:
            raise InputError(f"got {self.count} samples, expected at least 2 for a standard error; give more")
        columns = zip(
            self._names,
            self._rows.mean.tolist(),
            self._rows.error.tolist(),
            map(tuple, self._cells.mean.tolist()),
            map(tuple, self._cells.error.tolist()),
            strict=True,
        )
        rows = tuple(Row(*column) for column in columns)
        return ModelRecord(self.metric, self.about, self.unit, self.count, tuple(self._times.tolist()), rows)

    def plot(self, axes: Axes) -> None:
        """Draw every row by time, with a band of one standard error; t runs from data to noise."""
        from matplotlib import colormaps

        record = self.compute()
        for i, row in enumerate(record.rows):
            along = colormaps["viridis"](0.9 * i / max(1, len(record.rows) - 1))  # its end is too pale for a line
            colour = along if self.ordered else COLOURS[i % len(COLOURS)]
            style = "-" if self.ordered or i % 2 == 0 else "--"  # rows may lie on one another
            low, high = ([m + sign * e for m, e in zip(row.means, row.errors, strict=True)] for sign in (-1, 1))
            label = f"{row.name} ({row.mean:.3g})"
            axes.plot(record.times, row.means, color=colour, linewidth=1.3, linestyle=style, label=label)
            axes.fill_between(record.times, low, high, color=colour, alpha=0.2, linewidth=0)
        values = [mean for row in record.rows for mean in row.means]
        if min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        axes.set_title(self.title, loc="left", fontweight="bold")
        axes.set_title(f"{record.count} samples", loc="right", fontsize="small", color="0.4")
        axes.set_xlabel("t (0 is data, 1 is noise)", color="0.4")
        axes.set_ylabel(self.unit, color="0.4")
        axes.set_xlim(0, 1)
        columns = 1 + len(record.rows) // 10
        axes.legend(title="mean over t", fontsize=7, title_fontsize=7, ncols=columns, framealpha=0.7, edgecolor="none")
        axes.tick_params(colors="0.4")
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color("0.7")


registry: Registry[ModelMetric] = Registry("metric of a model", "metrics.models", ModelMetric)
register, build, names = registry.register, registry.build, registry.names


def table(record: ModelRecord) -> str:
    """Lay a record out as lines: each row's mean over the times with its standard error, and its means at a few."""
    last, shown = len(record.times) - 1, min(SHOWN, len(record.times))
    picked = sorted({round(i * last / max(1, shown - 1)) for i in range(shown)}, key=lambda i: record.times[i])
    lines = [("", "mean over t", *(f"t = {record.times[i]:.3g}" for i in picked))]
    for row in record.rows:
        lines.append((row.name, f"{row.mean:.4g} ± {row.error:.2g}", *(f"{row.means[i]:.4g}" for i in picked)))
    return f"{record.metric}: {record.count} samples\n{record.about} ({record.unit})\n{_aligned(lines)}"


def _aligned(lines: Iterable[tuple[str, ...]]) -> str:
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
