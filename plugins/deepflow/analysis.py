"""Look into a trained model: ``python -m pathline.plugins.deepflow.analysis RUN_OR_CHECKPOINT [--metrics …] …``.

Measures every metric of models that applies, on held-out data: those of branches for DeepFlow, the core's for any.
Writes one picture a metric and ``analysis.json``. A file of another program brings no data: its losses are worth
nothing unless ``data.…`` names some.
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
from pathline.core.draws import Draws
from pathline.core.errors import InputError, PathlineError
from pathline.core.flow import BaseFlow, Flow
from pathline.data import Dataset
from pathline.metrics import models
from pathline.metrics.models import ModelMetric, ModelRecord
from pathline.training import sampling

__all__ = ["analyse", "main", "measure", "save_plot"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, or 2 for a wrong input."""
    parser = argparse.ArgumentParser(prog="pathline.plugins.deepflow.analysis", description=__doc__)
    parser.add_argument("model", type=Path, help="a run's folder, one checkpoint, or weights in a file")
    parser.add_argument("entries", nargs="*", metavar="entry=value", help="as sample.average=ema or data.split=train")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="by name; all that apply unless given")
    parser.add_argument("--count", type=int, default=128, help="number of samples")
    parser.add_argument("--steps", type=int, default=250, help="of the SDE solver, for feature-distance")
    parser.add_argument("--distance", default="euclidean", help="euclidean, normalised or cosine, of feature-distance")
    parser.add_argument("--bins", type=int, default=20, help="of time, for all others")
    parser.add_argument("--seed", type=int, default=0, help="of noise and times")
    parser.add_argument("--batch", type=int, default=64, help="samples at once; changes nothing but rounding")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--output", type=Path, help="folder; 'analysis' beside the model unless given")
    try:
        analyse(parser.parse_args(arguments))
    except (PathlineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def analyse(given: argparse.Namespace) -> None:
    """Measure, print a table a metric, draw and write."""
    require("matplotlib.figure", "log")  # before anything is measured
    torch.set_num_threads(given.threads)
    metrics = _build(given)
    weights = sampling.find(given.model, lambda line: print(f"warning: {line}", file=sys.stderr))
    configuration, parts = sampling.load(weights, given.entries)
    component = _held_out(configuration.data, given.entries)
    dataset = data.build(component)
    backbone = parts.backbone.to(Fabric(accelerator="auto", devices=1).device)
    flow = Flow(backbone, parts.interpolant, parts.objective.predicts)  # type: ignore[arg-type]  # checked there
    metrics = _applicable(metrics, flow, named=given.metrics is not None)
    beside = weights.resolve().parent if weights.is_file() else weights.resolve().parent.parent
    output = given.output or beside / "analysis"
    output.mkdir(parents=True, exist_ok=True)
    records = []
    for name, metric in metrics.items():
        records.append(measure(metric, flow, dataset, given.count, seed=given.seed, batch=given.batch))
        print(f"{models.table(records[-1])}\n")
        save_plot(metric, output / f"{name}.png")
    written = {
        "version": pathline.__version__,
        "model": weights.name,
        "average": configuration.sample.average,
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


def _build(given: argparse.Namespace) -> dict[str, ModelMetric]:
    """Build the metrics, each with those of the options that it has."""
    solver = {"name": "euler-maruyama", "steps": given.steps}
    options = {"solver": solver, "distance": given.distance, "bins": given.bins}
    built = {}
    for name in given.metrics or models.names():
        known = models.registry.entry(name).options()
        built[name] = models.build(name, **{key: value for key, value in options.items() if key in known})
    return built


def _applicable(metrics: Mapping[str, ModelMetric], flow: BaseFlow, *, named: bool) -> dict[str, ModelMetric]:
    """Return the metrics that are defined for a flow; one asked for by name that is not raises."""
    kept = {}
    for name, metric in metrics.items():
        try:
            metric.check(flow)
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
    asked = any(entry.startswith("data.split=") for entry in entries)
    return {**component, **({"split": "held-out"} if split and not asked else {})}


if __name__ == "__main__":
    sys.exit(main())
