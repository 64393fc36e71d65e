"""Draw samples: ``python sample.py RUN_OR_CHECKPOINT [solver.name=heun] [sample.count=1000] …``.

Weights that other programs released are sampled from their file: ``python sample.py released.pt weights.family=sit …``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning_fabric import Fabric

import pathline
from pathline.core.errors import PathlineError
from pathline.training import drawing, trained
from pathline.training.names import default_name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, or 2 for a wrong input."""
    parser = argparse.ArgumentParser(prog="sample.py", description="Draw samples from a trained model.")
    parser.add_argument("model", help="a run's folder, a checkpoint, exported weights, or a released file (.pt)")
    parser.add_argument("entries", nargs="*", metavar="entry=value", help="as solver.name=heun or guidance.0.scale=1.5")
    given = parser.parse_args(arguments)
    try:
        sample(Path(given.model), given.entries)
    except (PathlineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def sample(model: Path, entries: Sequence[str]) -> None:
    """Draw, write, and print what it cost."""
    cpu = time.process_time()
    weights = trained.find(model, lambda line: print(f"warning: {line}", file=sys.stderr))
    configuration, parts = trained.load(weights, entries)
    if configuration.train.threads is not None:
        torch.set_num_threads(configuration.train.threads)
    device = Fabric(accelerator="auto", devices=1).device  # whatever it was trained on
    drawn = drawing.draw(configuration, parts, device)
    beside = weights.resolve().parent if weights.is_file() else weights.resolve().parent.parent
    output = Path(configuration.sample.output or beside / default_name(configuration))
    written = drawing.save(drawn, configuration, weights, output, pathline.__version__)
    blocks = "" if drawn.block_evaluations is None else f", {drawn.block_evaluations} transformer blocks"
    print(
        f"{len(drawn.x):,} samples by {configuration.solver['name']}, NFE {drawn.nfe}{blocks} each, in "
        f"{drawn.seconds:.1f} s "
        f"({time.process_time() - cpu:.1f} CPU s with loading and writing)"
    )
    print("wrote " + ", ".join(map(str, written)))


if __name__ == "__main__":  # run again under the package's name, so that no class lives in __main__
    from pathline.sample import main as package_main

    sys.exit(package_main())
