"""What is written down of skipped steps: which samples, at which times."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pathline.training.log import warn
from pathline.training.window import Skipped

__all__ = ["FILE", "cut", "describe", "read", "write"]

FILE = "incidents.jsonl"


def describe(
    skipped: Skipped,
    batch: int,
    gather: Callable[[Tensor], Tensor],
    indices: Callable[[Sequence[int]], Sequence[int]],
) -> dict[str, Any]:
    """Return an entry for a skipped step, fit for JSON; every process must call this.

    It names the samples whose data or losses were not finite or, if all were, all of the batch. ``batch`` is the
    batch's number in the training stream, which unlike the step does not repeat after a roll-back.

    Args:
        skipped: of this process.
        batch: number of its batch, counted from 1.
        gather: brings the rows of all processes together.
        indices: of the samples at positions of the training stream.
    """
    table = gather(skipped.samples)
    wrong = (table[:, 1] == 0) | (table[:, 2] == 0)
    chosen = table[wrong] if bool(wrong.any()) else table
    positions = [int(position) for position in chosen[:, 0].tolist()]
    return {
        "step": skipped.step,
        "batch": batch,
        "reason": skipped.reason,
        "positions": positions,
        "samples": [int(index) for index in indices(positions)],
        "losses": [_number(value) for value in chosen[:, 3].tolist()],
        "times": [_number(value) for value in chosen[:, 4].tolist()],
    }


def write(folder: Path, entry: dict[str, Any]) -> None:
    """Add an entry to a run's ``incidents.jsonl``; where that is impossible, say so and go on."""
    try:
        with (folder / FILE).open("a") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        warn(f"{FILE} lacks {entry['reason']} at step {entry['step']}: {error}")


def cut(folder: Path, batch: int) -> None:
    """Leave out the entries of batches after this one, which are going to be seen again."""
    path, kept = folder / FILE, [entry for entry in read(folder) if entry["batch"] <= batch]
    if path.exists():
        beside = path.with_name(f".{FILE}.partial")
        beside.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        beside.replace(path)


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of a run's ``incidents.jsonl``; a last one cut short by a kill is left out."""
    path = folder / FILE
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _number(value: float) -> float | str | None:
    """Return a number fit for JSON: NaN as None, infinities by name."""
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)
