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

import pathline
from pathline.core.errors import (
    ConfigurationError,
    DataError,
    InputError,
    PathlineError,
    ProcessError,
)
from pathline.metrics import Real, Record, Reference, comparison, models, results
from pathline.metrics.evaluation import Evaluation
from pathline.metrics.report import Judge, measure_model, measure_samples, summary, table
from pathline.metrics.samples import Samples
from pathline.training import sampling
from pathline.training.manifest import STATE, SUFFIX
from pathline.training.measuring import Unseen, device_of, measure_in_all, workers_for
from pathline.training.options import are_of_models, options_of, with_options
from pathline.training.workers import Told

BATCH, SEED = 64, 0
ADM = ("fid", "sfid", "inception-score", "precision-recall")  # what a table of ImageNet holds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 2 for a wrong input, 70 for a lost process, 130 if interrupted."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if words[:1] == ["compare"]:
            _compare(_compare_parser().parse_args(words[1:]))
        else:
            _measure(_parser().parse_intermixed_args(words))
    except KeyboardInterrupt:
        print("stopped: what was not finished is not written", file=sys.stderr)
        return 130
    except Told:  # the first process says what
        return 2
    except (PathlineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 70 if isinstance(error, ProcessError) else 2
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
    parser.add_argument("--batch", type=int, help="samples at once; else 64")
    parser.add_argument("--device", help="as cuda:1; else the first GPU, or the processor")
    parser.add_argument("--devices", type=int, help="processes on as many devices, each of which sees a share")
    parser.add_argument("--output", type=Path, help="file of the results; else *.metrics.json beside the samples")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    return parser


def _compare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evaluate.py compare", description="Put results in one table.")
    parser.add_argument(
        "results",
        nargs="+",
        help="files that evaluate.py wrote, *.metrics.json; or RUN/evaluations.jsonl:STEP:AVERAGE of a training run",
    )
    parser.add_argument("--markdown", action="store_true", help="a table of Markdown")
    return parser


def _compare(given: argparse.Namespace) -> None:
    """Print a table, and on stderr what sets the results apart."""
    read = [result for place in given.results for result in results.read(place)]
    print(comparison.markdown(read) if given.markdown else comparison.table(read), flush=True)
    for line in comparison.differences(read):
        _warn(line)


def _measure(given: argparse.Namespace) -> None:
    """Measure what is named, print tables, and write ``….metrics.json`` beside it."""
    cpu = time.process_time()
    names = None if given.metrics is None else [name for name in given.metrics.split(",") if name]
    of_models = bool(names) and are_of_models(names or ())
    _check_words(given, of_models)
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore", module="pathline.metrics.frechet")  # records have it, and are told with the file
    if of_models:
        _measure_models(given, names or ())
    elif not _measure_samples(given, names):
        return
    print(f"\nmeasured in {time.process_time() - cpu:.1f} CPU s")


def _check_words(given: argparse.Namespace, of_models: bool) -> None:
    """Refuse numbers out of range, and options that would change nothing."""
    for name in ("count", "batch", "devices", "threads"):
        number = getattr(given, name)
        if number is not None and number < 1:
            raise ConfigurationError(f"got {name} {number}, expected 1 or more")
    idle = {"reference": "samples", "devices": "samples"} if of_models else {}
    if given.metrics is None and given.reference in (None, "digits"):
        idle = dict.fromkeys(("option", "device", "devices", "batch"), "metrics that --metrics names")
    for name, whose in idle.items():
        if getattr(given, name) not in (None, []):
            raise ConfigurationError(f"got --{name}, which is of {whose}; leave it out")
    if (given.devices or 1) > 1 and given.device not in (None, "cpu", "cuda"):
        raise ConfigurationError(f"got --device {given.device} for {given.devices} devices; give cpu, cuda or none")
    if given.output is None:
        return
    if not given.output.name.endswith(results.ENDING) or not given.output.absolute().parent.is_dir():
        raise ConfigurationError(
            f"got --output {given.output}, expected a name that ends in {results.ENDING} in a folder that is there"
        )
    if len(given.samples) > 1 and not of_models:
        raise ConfigurationError(f"got --output for {len(given.samples)} files; call one after the other")


# --- samples ---------------------------------------------------------------------------------------------------------


def _measure_samples(given: argparse.Namespace, names: Sequence[str] | None) -> bool:
    """Measure samples; return whether this is the first process, which tells of them."""
    read = [_opened(Path(name), given.count) for name in given.samples]
    named = given.reference or ("digits" if names is None else None)
    reference = None if named is None else Reference.of(named)
    for samples in read:
        _check(reference, samples)
    if names is None and isinstance(reference, Real):
        _judge(reference, read, given)
        return True
    asked = names or ADM
    options, batch = options_of(given.option, asked), given.batch or BATCH
    built, fewest = with_options(asked, options), min(given.count or samples.count for samples in read)
    workers = workers_for(given.devices, given.device, fewest)
    device = device_of(given.device) if workers is None else workers.device

    def make() -> Evaluation:
        return Evaluation(built, reference, device, features=options)

    evaluation = make() if workers is None else workers.every(make)
    for samples in read:
        count, fresh = given.count or samples.count, evaluation.fresh()
        if workers is None:
            _report(samples, measure_samples(fresh, samples, count, batch), given.output)
        elif found := measure_in_all(fresh, samples, count, batch, workers):
            _report(samples, found, given.output)
    return workers is None or workers.rank == 0


def _opened(path: Path, count: int | None) -> Samples:
    """Open samples; raises ConfigurationError for a model, and for more samples than there are."""
    if path.suffix == SUFFIX or (path / "checkpoints").is_dir() or (path / STATE).is_file():
        raise ConfigurationError(f"got {path}, a model; give --metrics loss-by-time, or another one of models")
    samples = Samples.of(path)
    if count is not None and count > samples.count:
        raise ConfigurationError(f"got count {count}, expected 1 to {samples.count} of {path}")
    return samples


def _judge(real: Real, read: Sequence[Samples], given: argparse.Namespace) -> None:
    """Measure by all that a small labelled set allows, on as many samples as it has training images."""
    most = len(real.training)
    if given.count is not None and given.count > most:
        raise ConfigurationError(f"got count {given.count}, expected at most {most}, as there are training images")
    judge = Judge.of(real)
    print(f"classifier digits-cnn: {judge.accuracy:.3f} of the held-out images right")
    for samples in read:
        first = min(given.count or samples.count, most)
        pieces = list(samples.batches(first, first))
        labels = torch.cat([y for _, y in pieces if y is not None]) if samples.labelled else None
        try:
            records = judge.report(torch.cat([x for x, _ in pieces]).float() / 127.5 - 1, labels)
        except InputError as error:
            raise DataError(f"{error}; in {samples.path}") from error
        _report(samples, records, given.output, classifier_accuracy=judge.accuracy)


def _report(samples: Samples, records: Sequence[Record], output: Path | None, **more: Any) -> None:
    """Print and write the results of a file."""
    first = f"the first {records[0].count} of {samples.count} samples"
    print(f"\n{samples.path}: {first}{_how(samples)}\n{table(records)}", flush=True)
    for record in records:
        for words in record.warnings:
            _warn(f"{samples.path}: {record.metric}: {words}")
    results.add(
        output or results.output_of(samples.path),
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


# --- models ----------------------------------------------------------------------------------------------------------


def _measure_models(given: argparse.Namespace, names: Sequence[str]) -> None:
    """Measure one model on data that it has not seen, where its data set has such; else on what it was trained on."""
    path = sampling.find(Path(given.samples[0]), _warn)
    unseen = Unseen.of(path, given.samples[1:], device_of(given.device))
    flow, dataset = unseen.flow, unseen.dataset
    options = options_of(given.option, names)
    built = [models.build(name, **options.get(name, {})) for name in names]
    for metric in built:
        metric.check(flow)
    found = []
    for metric in built:
        count = given.count or min(128, len(dataset))
        found.append(measure_model(metric, flow, dataset, count, seed=SEED, batch=given.batch or BATCH))
        print(f"{models.table(found[-1])}\n", flush=True)
    seen = {**dataset.manifest, "draws": f"seed {SEED}"}
    beside = path.parent.parent / f"{path.name}{results.ENDING}" if path.is_dir() else results.output_of(path)
    output = given.output or beside
    results.add(
        output,
        [summary(record, seen).to_json() for record in found],
        {**unseen.known, "seed": SEED},
        pathline.__version__,
        by_time=[record.to_json() for record in found],
    )
    print(f"measured on the data {unseen.known['data']}; wrote {output}")


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


if __name__ == "__main__":  # run again under the package's name, so that no class lives in __main__
    from pathline.evaluate import main as package_main

    sys.exit(package_main())
