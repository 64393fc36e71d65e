"""Measure samples, or a model: ``python evaluate.py SAMPLES.npz [MORE …] [--metrics fid,kid --reference REFERENCE]``.

``python evaluate.py RUN --metrics loss-by-time`` measures a trained model on data that it has not seen, and
``python evaluate.py compare A.metrics.json B.metrics.json …`` puts results in one table.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

import pathline
from pathline import data, metrics
from pathline.core.errors import ConfigurationError, DataError, PathlineError, UnknownNameError, suggest
from pathline.core.flow import Flow
from pathline.metrics import Real, Record, Reference, models, results
from pathline.metrics.evaluation import Evaluation, component
from pathline.metrics.options import options_of, with_options
from pathline.metrics.report import Judge, measure_model, measure_samples, summary, table
from pathline.metrics.results import Result
from pathline.metrics.samples import Samples
from pathline.training import sampling
from pathline.training.released import ReleasedConfiguration
from pathline.training.trained import average_of, identity

ADM = ("fid", "sfid", "inception-score", "precision-recall")  # what a table of ImageNet holds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, or 2 for a wrong input."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if words[:1] == ["compare"]:
            _compare(_compare_parser().parse_args(words[1:]))
        else:
            _measure(_parser().parse_intermixed_args(words))
    except (PathlineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Measure samples against real images, or a model on data.",
        epilog="evaluate.py compare A.metrics.json B.metrics.json … [--markdown] puts results in one table",
    )
    parser.add_argument(
        "samples",
        nargs="+",
        help=".npz of sample.py or ADM, its folder of shards, or of images; or a run, a checkpoint",
    )
    parser.add_argument(
        "--metrics", metavar="NAME,NAME", help="as fid,kid or fd:vit_large_patch14_dinov2.lvd142m; or of models"
    )
    parser.add_argument(
        "--reference",
        "--data",
        help="a data set by name, statistics (.npz of ADM or .safetensors), images in a folder or .npz; without "
        "metrics digits",
    )
    parser.add_argument(
        "--option",
        metavar="NAME.OPTION=VALUE",
        action="append",
        default=[],
        help="of a metric or a feature space, as kid.subsets=50 or inception.weights=FILE; may be repeated",
    )
    parser.add_argument("--count", type=int, help="number of samples, the first; else all, of models 128")
    parser.add_argument("--batch", type=int, default=64, help="samples at once")
    parser.add_argument("--device", help="as cuda:1; else the first GPU, or the processor")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    return parser


def _compare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evaluate.py compare", description="Put results in one table.")
    parser.add_argument("results", nargs="+", type=Path, help="files that evaluate.py wrote, *.metrics.json")
    parser.add_argument("--markdown", action="store_true", help="a table of Markdown")
    return parser


def _compare(given: argparse.Namespace) -> None:
    """Print a table, and on stderr what sets the results apart."""
    read = [Result.read(path) for path in given.results]
    print(results.markdown(read) if given.markdown else results.table(read), flush=True)
    for line in results.differences(read):
        _warn(line)


def _measure(given: argparse.Namespace) -> None:
    """Measure what is named, print tables, and write ``….metrics.json`` beside it."""
    cpu = time.process_time()
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore", module="pathline.metrics.frechet")  # records have it, and are told with the file
    names = None if given.metrics is None else [name for name in given.metrics.split(",") if name]
    if given.batch < 1 or (given.count is not None and given.count < 1):
        raise ConfigurationError(f"got count {given.count} and batch {given.batch}, expected 1 or more")
    if names and _are_of_models(names):
        _measure_models(given, names)
    else:
        _measure_samples(given, names)
    print(f"\nmeasured in {time.process_time() - cpu:.1f} CPU s")


def _are_of_models(names: Sequence[str]) -> bool:
    """Whether metrics are of models, not of samples.

    Raises:
        UnknownNameError: one is neither.
        ConfigurationError: some are, others not.
    """
    of_models, of_samples = set(models.registry.names()), set(metrics.names())
    bare = [component(name)["name"] for name in names]
    unknown = [name for name in bare if name not in of_models | of_samples | metrics.registry.aliases().keys()]
    if unknown:
        raise UnknownNameError(f"unknown metric {unknown[0]!r}; {suggest(unknown[0], of_models | of_samples)}")
    told = [name for name in bare if name in of_models]
    if told and len(told) < len(bare):
        raise ConfigurationError(f"got {', '.join(told)} of models beside metrics of samples; call one after the other")
    return bool(told)


# --- samples ---------------------------------------------------------------------------------------------------------


def _measure_samples(given: argparse.Namespace, names: Sequence[str] | None) -> None:
    read = [Samples.of(Path(name)) for name in given.samples]
    named = given.reference or ("digits" if names is None else None)
    reference = None if named is None else Reference.of(named)
    for samples in read:
        _check(reference, samples)
    if names is None and isinstance(reference, Real):
        _judge(reference, read, given.count)
        return
    asked = names or ADM
    options = options_of(given.option, asked)
    evaluation = Evaluation(with_options(asked, options), reference, _device(given), features=options)
    for samples in read:
        records = measure_samples(evaluation.fresh(), samples, given.count or samples.count, given.batch)
        _report(samples, records)


def _judge(real: Real, read: Sequence[Samples], count: int | None) -> None:
    """Measure by all that a small labelled set allows, on as many samples as it has training images."""
    judge = Judge.of(real)
    print(f"classifier digits-cnn: {judge.accuracy:.3f} of the held-out images right")
    for samples in read:
        first = min(count or samples.count, samples.count, len(real.training))
        pieces = list(samples.batches(first, first))
        labels = torch.cat([y for _, y in pieces if y is not None]) if samples.labelled else None
        records = judge.report(torch.cat([x for x, _ in pieces]).float() / 127.5 - 1, labels)
        _report(samples, records, classifier_accuracy=judge.accuracy)


def _report(samples: Samples, records: Sequence[Record], **more: Any) -> None:
    """Print and write the results of a file."""
    first = f"the first {records[0].count} of {samples.count} samples"
    print(f"\n{samples.path}: {first}{_how(samples)}\n{table(records)}", flush=True)
    for record in records:
        for words in record.warnings:
            _warn(f"{samples.path}: {record.metric}: {words}")
    results.write(
        results.output_of(samples.path),
        [record.to_json() for record in records],
        samples.record,
        pathline.__version__,
        count=samples.count,
        shape=list(samples.shape),
        **more,
    )


def _check(reference: Reference | None, samples: Samples) -> None:
    """Check samples against the reference, beside a small set all of their labels; a DataError names the file."""
    if reference is None:
        return
    for images, labels in samples.batches(256, None if isinstance(reference, Real) else 1):
        try:
            reference.check({"data": images} if labels is None else {"data": images, "label": labels})
        except PathlineError as error:
            raise DataError(f"{error}; in {samples.path}") from error


def _how(samples: Samples) -> str:
    """Say which solver drew the samples, as far as their record tells."""
    solver = samples.record.get("solver")
    name = solver.get("name") if isinstance(solver, dict) else solver
    words = {"": name, "NFE ": samples.record.get("nfe")}
    return "".join(f", {unit}{word}" for unit, word in words.items() if word is not None)


def _device(given: argparse.Namespace) -> torch.device:
    if given.device is None:
        return Fabric(accelerator="auto", devices=1).device
    try:
        return torch.empty(0, device=given.device).device
    except (RuntimeError, AssertionError) as error:  # the second is torch's word for a build without CUDA
        raise ConfigurationError(f"got device {given.device!r}, which is not here; leave it out, or use cpu") from error


# --- models ----------------------------------------------------------------------------------------------------------


def _measure_models(given: argparse.Namespace, names: Sequence[str]) -> None:
    """Measure one model on data that it has not seen, where its data set has such; else on what it was trained on."""
    path = sampling.find(Path(given.samples[0]), _warn)
    words = given.samples[1:]
    configuration, parts = sampling.load(path, words)
    entry, chosen = configuration.data, any(word.startswith("data.split=") for word in words)
    if "split" in data.registry.entry(entry["name"]).options() and not chosen:
        entry = {**entry, "split": "held-out"}
    dataset, backbone = data.build(entry), parts.backbone.to(_device(given))
    flow = Flow(backbone, parts.interpolant, parts.objective.predicts)  # type: ignore[arg-type]  # checked there
    options = options_of(given.option, names)
    built = [models.build(name, **options.get(name, {})) for name in names]
    for metric in built:
        metric.check(flow)
    found = []
    for metric in built:
        found.append(measure_model(metric, flow, dataset, given.count or min(128, len(dataset)), batch=given.batch))
        print(f"{models.table(found[-1])}\n", flush=True)
    known = {"checkpoint": _identity(path, configuration), "data": entry, "seed": 0}
    output = path.parent.parent / f"{path.name}{results.ENDING}" if path.is_dir() else results.output_of(path)
    results.write(
        output,
        [summary(record).to_json() for record in found],
        {**known, "configuration": configuration.model_dump(mode="json")},
        pathline.__version__,
        by_time=[record.to_json() for record in found],
    )
    print(f"measured on the data {entry}; wrote {output}")


def _identity(path: Path, configuration: Any) -> Any:
    if isinstance(configuration, ReleasedConfiguration):
        return configuration.weights.model_dump(mode="json")
    return identity(path, average_of(configuration))


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


if __name__ == "__main__":  # run again under the package's name, so that no class lives in __main__
    from pathline.evaluate import main as package_main

    sys.exit(package_main())
