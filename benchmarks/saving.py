"""What a checkpoint costs beside training: ``python benchmarks/saving.py``; ``--record`` adds the table to RESULTS.md.

The loop waits while the state is copied to the host; a thread then writes, forces to the disk and hashes the copy. A
plain ``torch.save`` of the same tensors to the same disk stands beside.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from bare import RESULTS, Case, Enough, configured, device_name, driven, parts_of, table

from pathline.training import Trainer, checkpoints, manifest
from pathline.training.checkpoints import Keep


class Saves(NamedTuple):
    """What saving costs, in seconds, and the bytes saved."""

    bytes: int
    first_stall: float
    stall: float
    write: float
    fsync: float
    hash: float
    whole: float
    step: float
    step_beside: float
    alone: float
    plain: float
    plain_fsync: float

    def cells(self) -> dict[str, str]:
        """Return the row of the table."""
        beside = f"{self.step_beside * 1e3:.0f} ({self.step_beside / self.step - 1:+.0%})"
        seconds = ("first_stall", "stall", "write", "fsync", "hash", "whole", "alone", "plain", "plain_fsync")
        named = {name.replace("_", " ") + " s": f"{getattr(self, name):.2f}" for name in seconds}
        return {
            "MB": f"{self.bytes / 1e6:.0f}",
            **named,
            "ms a step": f"{self.step * 1e3:.0f}",
            "while writing": beside,
        }


def saves(device: str, width: int, repetitions: int) -> Saves:
    """Save a run of SiT's width and 12 blocks several times between and during its steps, and as ``torch.save`` does.

    Medians, of the saves after the first, which also makes the copy on the host; of what the thread does, means.
    """
    case = Case("", "sit", width, 12, 4, 4, 1, 1)
    with tempfile.TemporaryDirectory() as name:
        c = configured(case, Path(name), device, "fp32", False)
        trainer = Trainer(c, parts=parts_of(c))
        size, found = trainer.state.bytes, _timed_saves(trainer, repetitions)
        snapshot, path, plain = trainer.state.snapshot(), Path(name, "plain.pt"), []
        for number in range(repetitions):
            start = time.perf_counter()
            checkpoints.write(Path(name, "alone"), number, snapshot, Keep(1))
            began = time.perf_counter()
            torch.save(dict(snapshot.tensors), path)
            written = time.perf_counter()
            manifest.sync(path)
            plain.append((began - start, written - began, time.perf_counter() - began))
            path.unlink()
    return Saves(size, *found, *(statistics.median(column) for column in zip(*plain, strict=True)))


def _timed_saves(trainer: Trainer, repetitions: int) -> list[float]:
    """Return the entries of ``Saves`` from the first stall to a step beside a save."""
    stalls, steps, beside = [], [], []
    spent: dict[str, list[float]] = {"write": [], "fsync": [], "hash": [], "whole": []}
    began = time.perf_counter()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*inputs, **options)
            finally:
                spent[name].append(time.perf_counter() - start)

        return run

    def before(at: int) -> None:
        nonlocal began
        writer: Any = trainer._writer
        writing = writer._thread is not None and writer._thread.is_alive()
        if at:
            (beside if writing else steps).append(time.perf_counter() - began)
        if not writing and at % 6 == 5:  # a few steps with nothing else to do
            if len(stalls) == repetitions + 1:
                raise Enough
            start = time.perf_counter()
            trainer._save(last=False)
            stalls.append(time.perf_counter() - start)
        began = time.perf_counter()

    with ExitStack() as patches:
        for name, place, function in (
            ("write", checkpoints, "_save"),
            ("fsync", manifest, "sync"),
            ("hash", manifest, "_hash"),
            ("whole", checkpoints, "write"),
        ):
            patches.enter_context(patch.object(place, function, timed(name, getattr(place, function))))
        with driven(before):
            trainer.run()
    each = [sum(values) / len(spent["whole"]) for values in spent.values()]
    medians = [statistics.median(values) for values in (steps[1:], beside or [math.nan])]
    return [stalls[0], statistics.median(stalls[1:]), *each, *medians]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The cost of a checkpoint, beside training and torch.save.")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--width", type=int, default=384, help="of SiT's 12 blocks; 384 is 520 MB")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--record", action="store_true", default=cuda, help="add the table to RESULTS.md")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells = saves(given.device, given.width, given.repetitions).cells()
    title = f"## {device_name(given.device)}, torch {torch.__version__}, {date.today().isoformat()}: a checkpoint"
    text = f"{title}\n\n{table([cells])}\n"
    print(text)
    if given.record:
        with RESULTS.open("a") as file:
            file.write(f"\n{text}")


if __name__ == "__main__":
    sys.exit(main())
