"""Sweeps: one drawing for each combination of values of some entries, measured one after the other."""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pathline.core import overrides
from pathline.core.config import Configuration
from pathline.core.errors import CheckpointError, ConfigurationError, DataError, PathlineError
from pathline.metrics import results
from pathline.metrics.base import Reference
from pathline.metrics.evaluation import Evaluation
from pathline.metrics.report import measure_samples
from pathline.metrics.samples import Samples
from pathline.training import drawing
from pathline.training.drawing import Written
from pathline.training.manifest import parse
from pathline.training.names import default_name
from pathline.training.options import options_of, with_options
from pathline.training.pictures import levels
from pathline.training.record import Order, digest
from pathline.training.swept import Found
from pathline.training.trained import Loader
from pathline.training.workers import Workers, settle

__all__ = ["Judges", "Sweep", "points"]

Point = dict[str, Any]
"""The swept entries with a value each."""
_OF_ALL = ("sample.devices", "train.accelerator", "train.threads")  # processes start once


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
        if entry in _OF_ALL:
            raise ConfigurationError(f"got {entry} to sweep, which is one for all drawings; give it as a word")
        try:
            json.dumps(values, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"got {word!r} to sweep, expected numbers or words ({error})") from error
        lists[entry] = values
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


@dataclass(frozen=True)
class Judges:
    """What measures each drawing.

    Attributes:
        asked: metrics, options and reference in words, and what these are; results of the same are not computed again.
        evaluation: of the metrics, fresh.
    """

    asked: Mapping[str, Any]
    evaluation: Evaluation

    @classmethod
    def of(cls, metrics: Sequence[str], reference: str, device: torch.device, words: Sequence[str] = ()) -> Judges:
        """Build metrics by name, with options by words; raises what ``Evaluation`` and ``Reference.of`` do."""
        options, compared = options_of(words, metrics), Reference.of(reference)
        evaluation = Evaluation(with_options(metrics, options), compared, device, features=options)
        spaces = [metric.features.manifest for metric in evaluation.metrics if metric.features is not None]
        found = {"reference": compared.manifest, "contents": _contents(Path(reference)), "features": spaces}
        asked = {"metrics": list(metrics), "options": options, "reference": reference, "found": found}
        return cls(json.loads(json.dumps(asked, default=str)), evaluation)

    def check(self, order: Order) -> None:
        """Check, before anything is drawn, that samples can be measured.

        Raises:
            ConfigurationError: they are latents.
            InputError, DataError: too few, or not of the reference's kind.
        """
        parts, wanted = order.parts, order.configuration.sample
        if not parts.can_draw:
            raise ConfigurationError(
                "got metrics for samples that are latents, expected images; set autoencoder, or leave --metrics out"
            )
        self.evaluation.expects(wanted.count, labelled=order.labelled)
        if self.evaluation.reference is None:
            return
        blank = parts.images(torch.zeros(1, *parts.dataset.shape, device=self.evaluation.device))
        assert blank is not None  # as can_draw says
        labels = order.labels(range(wanted.count)) if order.labelled else None
        batch = {"data": levels(blank).cpu()}
        self.evaluation.reference.check(batch if labels is None else {**batch, "label": labels.max()[None]})

    def measure(self, path: Path, record: Mapping[str, Any], version: str) -> list[Mapping[str, Any]]:
        """Return a record of each metric of some samples, and write them as ``evaluate.py`` does.

        Args:
            path: of the samples.
            record: how they were drawn.
            version: of pathline.
        """
        output = results.output_of(path)
        if (stored := self._stored(output, record, version)) is not None:
            return stored
        samples = Samples.of(path)
        evaluation = self.evaluation.fresh()
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # records have them
            measured = measure_samples(evaluation, samples, samples.count, 64)
        found: list[Mapping[str, Any]] = [entry.to_json() for entry in measured]
        given = {"asked": self.asked, "count": samples.count, "shape": list(samples.shape)}
        results.write(output, found, record, version, **given)
        return found

    def _stored(self, output: Path, record: Mapping[str, Any], version: str) -> list[Mapping[str, Any]] | None:
        """Return what was measured of the same samples by the same; None if there is nothing, or what is damaged."""
        try:
            told, known = parse(output), results.Result.read(output)
        except (OSError, CheckpointError, DataError):
            return None
        same = known.drawn.get("samples_sha256") == record["samples_sha256"]
        same = same and told.get("asked") == self.asked and told.get("version") == version
        return list(known.records) if same else None


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
        self._loader = Loader(weights)
        self.folder, self.version = folder, version

    def check(self, judges: Judges | None = None) -> Configuration:
        """Check that every point can be drawn and measured, and return the configuration of the last one.

        Raises:
            ConfigurationError: one cannot, which is named; or two are the same drawing.
        """
        seen: dict[str, Point] = {}
        for point in self.points:
            try:
                order = self.order(point)
                drawing.check_devices(order.configuration.sample, order.configuration.sample.devices)
                if judges is not None:
                    judges.check(order)
            except PathlineError as error:
                raise ConfigurationError(f"at {told(point)}: {error}") from error
            drawn = digest(order.request)
            if drawn in seen:
                raise ConfigurationError(
                    f"got the same drawing at {told(seen[drawn])} and at {told(point)}; leave one out"
                )
            seen[drawn] = point
        return order.configuration

    def order(self, point: Point) -> Order:
        """Return what is drawn at a point."""
        given = [f"{entry}={json.dumps(value)}" for entry, value in point.items()]
        configuration, parts = self._loader.load([*self.words, *given])
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
            settle(order.configuration)
            done = workers.first(partial(drawing.written, order)) or drawing.draw(order, workers)
            records = workers.first(partial(self._measured, done, judges))
            found.append(Found(point, done.paths[0].name, done.record, records))
            yield found

    def _measured(self, done: Written, judges: Judges | None) -> list[Mapping[str, Any]]:
        return [] if judges is None else judges.measure(done.paths[0], done.record, self.version)


def _contents(path: Path) -> str | None:
    """Return what tells a file from others by its contents: a hash; of a folder that of sizes and times."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        return None
    found = sorted((str(file.relative_to(path)), file.stat()) for file in path.rglob("*") if file.is_file())
    return digest({name: [stat.st_size, stat.st_mtime_ns] for name, stat in found})


def told(point: Point) -> str:
    """Return a point in words, as ``solver.steps=5 guidance.0.scale=1.5``."""
    return " ".join(f"{entry}={value}" for entry, value in point.items())
