"""Sweeps: one drawing for each combination of values of some entries, measured one after the other."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pathline.core import overrides
from pathline.core.config import Configuration
from pathline.core.errors import CheckpointError, ConfigurationError, PathlineError
from pathline.metrics import results
from pathline.metrics.base import Reference
from pathline.metrics.evaluation import Evaluation
from pathline.metrics.report import measure_samples
from pathline.metrics.samples import Samples
from pathline.training import drawing, trained
from pathline.training.drawing import Written
from pathline.training.manifest import parse
from pathline.training.names import default_name
from pathline.training.record import Order, digest
from pathline.training.swept import Found
from pathline.training.workers import Workers

__all__ = ["Judges", "Sweep", "points"]

Point = dict[str, Any]
"""The swept entries with a value each."""


def points(words: Sequence[str]) -> list[Point]:
    """Return all combinations of ``entry=value,value`` words, the last entry running fastest.

    Values are those of a YAML list, with or without its brackets: ``solver.steps=5,10`` and
    ``guidance.0.interval=[0,0.5],[0.2,0.7]``; one value that is a list itself is ``[[0,0.5]]``.

    Raises:
        ConfigurationError: a word of another form, an entry that comes twice, or a value that does.
    """
    lists: dict[str, list[Any]] = {}
    for word in words:
        entry, found, text = word.partition("=")
        if not found or not entry or entry in lists:
            raise ConfigurationError(f"got {word!r} to sweep, expected entry=value,value, as solver.steps=5,10, once")
        values = overrides.parse(f"[{text}]")
        if len(values) == 1 and isinstance(values[0], list):
            values = values[0]
        if not values or any(value in values[:i] for i, value in enumerate(values)):
            raise ConfigurationError(f"got {word!r} to sweep, expected one value or more, each once")
        lists[entry] = values
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


@dataclass(frozen=True)
class Judges:
    """What measures each drawing.

    Attributes:
        asked: metrics and reference in words; results of the same are not computed again.
        evaluation: of the metrics, fresh.
    """

    asked: Mapping[str, Any]
    evaluation: Evaluation

    @classmethod
    def of(cls, metrics: Sequence[str], reference: str, device: torch.device) -> Judges:
        """Build metrics by name; raises what ``Evaluation`` and ``Reference.of`` do."""
        asked = {"metrics": list(metrics), "reference": reference}
        return cls(asked, Evaluation(metrics, Reference.of(reference), device))

    def measure(self, path: Path, record: Mapping[str, Any], version: str) -> list[Mapping[str, Any]]:
        """Return a record of each metric of some samples, and write them as ``evaluate.py`` does.

        Args:
            path: of the samples.
            record: how they were drawn.
            version: of pathline.
        """
        output = results.output_of(path)
        with suppress(OSError, CheckpointError):
            told = parse(output)
            same = told.get("samples", {}).get("samples_sha256") == record["samples_sha256"]
            if same and told.get("asked") == self.asked and told.get("version") == version:
                return list(told["metrics"])
        samples = Samples.of(path)
        evaluation = copy.deepcopy(self.evaluation)  # with its networks, and nothing taken in
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # records have them
            measured = measure_samples(evaluation, samples, samples.count, 64)
        found: list[Mapping[str, Any]] = [entry.to_json() for entry in measured]
        given = {"asked": self.asked, "count": samples.count, "shape": list(samples.shape)}
        results.write(output, found, record, version, **given)
        return found


class Sweep:
    """Drawings of one model, one for each point.

    Args:
        weights: of the model, as ``trained.find`` returns them.
        words: that hold for all drawings.
        points: swept entries with a value each.
        folder: of the drawings and of what is told of them.
        version: of pathline.
    """

    def __init__(
        self, weights: Path, words: Sequence[str], points: Sequence[Point], folder: Path, version: str
    ) -> None:
        self.weights, self.words, self.points = weights, list(words), list(points)
        self.folder, self.version = folder, version

    def check(self) -> Configuration:
        """Check that every point can be drawn, and return the configuration of the last one; nothing is drawn.

        Raises:
            ConfigurationError: one cannot, which is named; or two are the same drawing.
        """
        names: dict[str, Point] = {}
        for point in self.points:
            try:
                order = self.order(point)
            except PathlineError as error:
                raise ConfigurationError(f"at {told(point)}: {error}") from error
            if order.output.name in names:
                other = told(names[order.output.name])
                raise ConfigurationError(f"got the same drawing at {other} and at {told(point)}; leave one out")
            names[order.output.name] = point
        return order.configuration

    def order(self, point: Point) -> Order:
        """Return what is drawn at a point."""
        given = [f"{entry}={json.dumps(value)}" for entry, value in point.items()]
        configuration, parts = trained.load(self.weights, [*self.words, *given])
        if configuration.sample.output is not None:
            raise ConfigurationError(
                "sample.output: got one for a sweep, whose drawings have names of their own; use --into"
            )
        order = Order(configuration, parts, self.weights, self.folder, self.version)
        return replace(order, output=self.folder / default_name(order))

    def run(self, workers: Workers, judges: Judges | None) -> Iterator[list[Found]]:
        """Draw and measure point after point; yield after each all that was found so far."""
        found: list[Found] = []
        for point in self.points:
            order = self.order(point)
            done = workers.first(partial(drawing.written, order)) or drawing.draw(order, workers)
            records = workers.first(partial(self._measured, done, judges))
            found.append(Found(point, done.paths[0].name, done.record, records))
            yield found

    def _measured(self, done: Written, judges: Judges | None) -> list[Mapping[str, Any]]:
        return [] if judges is None else judges.measure(done.paths[0], done.record, self.version)


def told(point: Point) -> str:
    """Return a point in words, as ``solver.steps=5 guidance.0.scale=1.5``."""
    return " ".join(f"{entry}={value}" for entry, value in point.items())
