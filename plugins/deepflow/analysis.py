"""Look into a trained model: ``python -m pathline.plugins.deepflow.analysis RUN_OR_CHECKPOINT [--metrics …] …``.

Measures every metric of models that applies, on held-out data: those of branches for DeepFlow, the core's for any.
Writes one picture a metric and ``analysis.json``. A file of another program brings no data: unless ``data.name=…``
gives some, only what needs none is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

import pathline
from pathline import data
from pathline.core.checks import require
from pathline.core.config import Configuration
from pathline.core.draws import Draws
from pathline.core.errors import ConfigurationError, InputError, PathlineError
from pathline.core.flow import BaseFlow, Flow
from pathline.data import Dataset
from pathline.metrics import models
from pathline.metrics.feature_distance import FeatureDistance
from pathline.metrics.models import ModelMetric, ModelRecord
from pathline.training import checkpoints, sampling
from pathline.training.exported import digest
from pathline.training.released import ReleasedConfiguration

__all__ = ["analyse", "main", "measure", "save_plot"]

MOST_THREADS = 1024  # as train.threads
INSTEAD = {  # entries, or sections of them, that nothing here reads
    "guidance": "leave it out: metrics look at the model alone",
    "solver": "feature-distance samples by 'euler-maruyama': use --steps",
    "sample": "of this section give sample.average alone: samples have the data's labels",
    "sample.count": "use --count",
    "sample.seed": "use --seed",
    "sample.batch": "use --batch",
    "sample.output": "use --output",
    "train.threads": "use --threads",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, or 2 for a wrong input."""
    parser = argparse.ArgumentParser(prog="pathline.plugins.deepflow.analysis", description=__doc__)
    parser.add_argument("model", type=Path, help="a run's folder, one checkpoint, or weights in a file")
    parser.add_argument("entries", nargs="*", metavar="entry=value", help="as sample.average=ema or data.split=train")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="by name, after all entries; else all that apply")
    parser.add_argument("--count", type=int, default=128, help="number of samples")
    parser.add_argument("--steps", type=int, default=250, help="of the SDE solver, for feature-distance")
    parser.add_argument("--distance", default="euclidean", help="euclidean, normalised or cosine, of feature-distance")
    parser.add_argument("--bins", type=int, default=20, help="of time, for all others")
    parser.add_argument("--seed", type=int, default=0, help="of noise and times")
    parser.add_argument("--batch", type=int, default=64, help="samples at once; changes nothing but rounding")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--output", type=Path, help="folder; else 'analysis-…' of the model's name beside it")
    try:
        analyse(parser.parse_intermixed_args(arguments))
    except (PathlineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def analyse(given: argparse.Namespace) -> None:
    """Measure, print a table a metric, draw and write."""
    require("matplotlib.figure", "log")  # before anything is measured
    _check(given)
    torch.set_num_threads(given.threads)
    metrics = _build(given)
    weights = sampling.find(given.model, lambda line: print(f"warning: {line}", file=sys.stderr))
    configuration, parts = sampling.load(weights, given.entries)
    component = _held_out(configuration.data, given.entries)
    dataset = data.build(component)
    backbone = parts.backbone.to(Fabric(accelerator="auto", devices=1).device)
    flow = Flow(backbone, parts.interpolant, parts.objective.predicts)  # type: ignore[arg-type]  # checked there
    bare = isinstance(configuration, ReleasedConfiguration) and not _gives(given.entries, "data.name")
    metrics = _applicable(metrics, flow, named=given.metrics is not None, bare=bare)
    output = given.output or _folder(weights, configuration.sample.average)
    output.mkdir(parents=True, exist_ok=True)
    records = []
    for name, metric in metrics.items():
        records.append(measure(metric, flow, dataset, given.count, seed=given.seed, batch=given.batch))
        print(f"{models.table(records[-1])}\n")
        save_plot(metric, output / f"{name}.png")
    written = {
        "version": pathline.__version__,
        "weights": _identity(weights, configuration),
        "entries": given.entries,
        "data": component,
        "seed": given.seed,
        "metrics": [record.to_json() for record in records],
    }
    (output / "analysis.json").write_text(json.dumps(written, indent=1))
    print(
        f"measured on the data {component}; wrote {output / 'analysis.json'} and "
        + ", ".join(f"{name}.png" for name in metrics)
    )


def measure(
    metric: ModelMetric, flow: BaseFlow, dataset: Dataset, count: int, *, seed: int = 0, batch: int = 64
) -> ModelRecord:
    """Measure a flow on the first samples of a data set.

    Args:
        count: number of samples, from 2 to all.
        seed: with a sample's number fixes what is drawn for it.
        batch: samples at once, 1 or more.

    Raises:
        InputError: a number out of range, or a flow or data that do not fit the metric.
    """
    if not 2 <= count <= len(dataset) or batch < 1:
        raise InputError(
            f"got count {count} and batch {batch}, expected 2 to {len(dataset)} samples, 1 or more at once"
        )
    for first in range(0, count, batch):
        ids = range(first, min(first + batch, count))
        metric.update(flow, dataset.batch(ids), Draws(seed).at(ids))
    return metric.compute()


def save_plot(metric: ModelMetric, path: Path) -> None:
    """Draw a metric's rows into a PNG.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    require("matplotlib.figure", "log")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"text.usetex": False, "font.size": 9.0}):
        figure = Figure(figsize=(6.4, 4.0), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        metric.plot(figure.add_subplot())
        figure.savefig(path, format="png")


def _check(given: argparse.Namespace) -> None:
    """Raise an error for a number of threads that cannot be, and for entries that would have no effect."""
    if not 1 <= given.threads <= MOST_THREADS:
        raise InputError(f"got threads {given.threads}, expected 1 to {MOST_THREADS}")
    for entry in given.entries:
        name = entry.partition("=")[0]
        instead = INSTEAD.get(name, INSTEAD.get(name.partition(".")[0]))
        if instead is not None and name != "sample.average":
            raise ConfigurationError(f"got {entry!r}, which an analysis does not read; {instead}")


def _gives(entries: Sequence[str], name: str) -> bool:
    return any(entry.partition("=")[0] == name for entry in entries)


def _folder(weights: Path, average: str | None) -> Path:
    """Return a folder beside the model, of its name, so that one analysis does not replace another."""
    path = weights.resolve()
    beside = path.parent if path.is_file() else path.parent.parent
    return beside / "-".join(word for word in ("analysis", path.name, average) if word is not None)


def _identity(weights: Path, configuration: Configuration) -> dict[str, Any]:
    """Return which weights they are: of another program as its file was read, else name, average and hash."""
    if isinstance(configuration, ReleasedConfiguration):
        return configuration.weights.model_dump(mode="json")
    if weights.is_file():
        return {"file": weights.name, "sha256": digest(weights)}
    average = configuration.sample.average or configuration.ema.names[0]
    return {"checkpoint": weights.name, "average": average, "sha256": checkpoints.hash_of(weights, average)}


def _build(given: argparse.Namespace) -> dict[str, ModelMetric]:
    """Build the metrics, each with those of the options that it has."""
    solver = {"name": "euler-maruyama", "steps": given.steps}
    options = {"solver": solver, "distance": given.distance, "bins": given.bins}
    built = {}
    every = [entry.name for entry in models.registry if getattr(entry.factory, "by_time", True)]
    for name in given.metrics or every:
        known = models.registry.entry(name).options()
        built[name] = models.build(name, **{key: value for key, value in options.items() if key in known})
    return built


def _applicable(
    metrics: Mapping[str, ModelMetric], flow: BaseFlow, *, named: bool, bare: bool
) -> dict[str, ModelMetric]:
    """Return the metrics that are defined for a flow, ``bare`` without data; one asked for by name that is not raises.

    Without data distances of features alone are: of data they take no more than shape and labels.
    """
    kept = {}
    for name, metric in metrics.items():
        try:
            metric.check(flow)
            if bare and not isinstance(metric, FeatureDistance):
                raise InputError("got a file of another program, which brings no data; give some by data.name=…")
        except InputError as error:
            if named:
                raise InputError(f"metric {name}: {error}") from error
            print(f"left out {name}: {error}\n")
        else:
            kept[name] = metric
    if not kept:
        raise InputError(f"got a {type(flow.backbone).__name__}, which no metric of a model is defined for")
    return kept


def _held_out(component: Mapping[str, Any], entries: Sequence[str]) -> dict[str, Any]:
    """Return the data set's entry, with its held-out part where there is one and none was asked for."""
    split = "split" in data.registry.entry(component["name"]).options()
    return {**component, **({"split": "held-out"} if split and not _gives(entries, "data.split") else {})}


if __name__ == "__main__":
    sys.exit(main())
