"""What a run writes down: JSON lines, TensorBoard where installed, and a progress bar."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

__all__ = ["Log", "mean_over_last_steps", "read_rows"]


class Log:
    """The log of a run, kept by the first process alone.

    Args:
        folder: of the run, made if it is missing; rows go to ``metrics.jsonl`` in it.
        start: step restored; rows after it, of a run that got further, are moved to ``metrics.superseded.jsonl``.
        steps: length of the run, for the progress bar.
    """

    def __init__(self, folder: Path, start: int, steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        _cut(self._path, start)
        self._file = self._path.open("a")
        self._board = _tensorboard(folder / "tensorboard", start)
        self._bar = tqdm(total=steps, initial=start, desc="training", unit="step", mininterval=_interval())

    def advance(self) -> None:
        """Count one step on the progress bar."""
        self._bar.update()

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row of numbers and lists of them; ``step`` is among its entries."""
        finite = {key: _finite(value) for key, value in row.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        self._bar.set_postfix(
            {key: f"{row[key]:.4g}" for key in ("loss", "images_per_second") if key in row}, refresh=False
        )
        if self._board is not None:
            for key, value in _scalars(row):
                self._board.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Close files and the progress bar."""
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's ``metrics.jsonl``; what was not finite is None."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def mean_over_last_steps(rows: list[dict[str, Any]], name: str, steps: int) -> tuple[float, int]:
    """Return the mean of an entry over the newest rows that cover ``steps`` steps, and the steps covered."""
    total, covered = 0.0, 0
    for row in reversed(rows):
        value = float("nan") if row[name] is None else row[name]
        total, covered = total + value * row["window"], covered + int(row["window"])
        if covered >= steps:
            break
    return total / max(1, covered), covered


def _finite(value: Any) -> Any:
    """Put None, JSON's null, in the place of what is not finite."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def _scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield a row's numbers by name, those of a list numbered; empty bins are left out."""
    for key, value in row.items():
        if isinstance(value, list):
            yield from ((f"{key}/{i}", item) for i, item in enumerate(value) if math.isfinite(item))
        else:
            yield key, value


def _interval() -> float:
    """Seconds between two states of the progress bar: few where it is written to a file."""
    return 0.5 if sys.stderr.isatty() else 30.0


def _cut(path: Path, step: int) -> None:
    """Keep rows up to ``step``; set the others aside."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    late = [line for line in lines if _step(line) > step]
    if late:
        with path.with_suffix(".superseded.jsonl").open("a") as file:
            file.writelines(late)
        path.write_text("".join(line for line in lines if _step(line) <= step))


def _step(line: str) -> float:
    """Step of a row; a row cut short by a kill counts as late."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")


def _tensorboard(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start + 1)
