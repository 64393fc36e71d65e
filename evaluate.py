"""Measure samples: ``python evaluate.py SAMPLES.npz [MORE.npz …] [--data digits]``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pathline
from pathline.core.errors import DataError, PathlineError
from pathline.metrics import Real
from pathline.metrics.report import Judge, table
from pathline.metrics.samples import read_record, read_samples


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, or 2 for a wrong input."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Measure samples against real images.")
    parser.add_argument("samples", nargs="+", type=Path, help="files written by sample.py")
    parser.add_argument("--data", default="digits", help="data set by name; its halves are train and held-out")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    try:
        evaluate(given.samples, given.data)
    except (PathlineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate(paths: Sequence[Path], data: str) -> None:
    """Measure each file, print a table, and write ``<samples>.metrics.json`` beside it."""
    cpu = time.process_time()
    read = [(path, *read_samples(path), read_record(path)) for path in paths]
    real = Real.of(data)
    for path, images, labels, _ in read:
        check(real, path, images, labels)
    judge = Judge.of(real)
    print(f"classifier digits-cnn: {judge.accuracy:.3f} of the held-out images right")
    for path, images, labels, record in read:
        records = judge.report(images, labels)
        print(f"\n{path}: the first {records[0].count} of {len(images)} samples{how(record)}\n{table(records)}")
        result: dict[str, Any] = {
            "version": pathline.__version__,
            "classifier_accuracy": judge.accuracy,
            "metrics": [entry.to_json() for entry in records],
            "samples": record,
        }
        path.with_suffix(".metrics.json").write_text(json.dumps(result, indent=1))
    print(f"\nmeasured in {time.process_time() - cpu:.1f} CPU s")


def check(real: Real, path: Path, images: Tensor, labels: Tensor | None) -> None:
    """Check samples against the data; a DataError names the file."""
    try:
        real.check({"data": images} if labels is None else {"data": images, "label": labels})
    except PathlineError as error:
        raise DataError(f"{error}; in {path}") from error


def how(record: dict[str, Any]) -> str:
    """Say which solver drew the samples, as far as their record tells."""
    solver = record.get("solver")
    name = solver.get("name") if isinstance(solver, dict) else solver
    words = {"": name, "NFE ": record.get("nfe")}
    return "".join(f", {unit}{word}" for unit, word in words.items() if word is not None)


if __name__ == "__main__":  # run again under the package's name, so that no class lives in __main__
    from pathline.evaluate import main as package_main

    sys.exit(package_main())
