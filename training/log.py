"""What a run writes down: JSON lines, TensorBoard, Weights & Biases, a progress bar. None of them can stop training."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pathline.core import sections
from pathline.core.checks import require
from pathline.training.sinks import Sink, makers

__all__ = ["Log", "Rows", "check_sinks", "encoded", "mean_over_last_steps", "read_rows", "tell", "warn"]

KEPT = 1000  # rows that wait in memory while their file cannot be written
DEFAULTS = sections.Log()
Configured = Mapping[str, Any] | None


def check_sinks(settings: sections.Log) -> None:
    """Check that what the log is to be written to is installed.

    Raises:
        MissingPackageError: Weights & Biases is missing.
    """
    if settings.wandb is not None:
        require("wandb", "wandb")


class Log:
    """The log of a run, kept by the first process alone.

    Args:
        folder: of the run, made if it is missing; rows go to ``metrics.jsonl`` in it.
        start: step restored; rows after it, of a run that got further, are moved to ``metrics.superseded.jsonl``.
        steps: length of the run, for the progress bar.
        settings: where else rows go.
        configuration: of the run, for Weights & Biases to show.

    Raises:
        OSError: the folder cannot be written at the start; later on nothing is raised.
    """

    def __init__(
        self, folder: Path, start: int, steps: int, settings: sections.Log = DEFAULTS, configuration: Configured = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._rows = Rows(folder / "metrics.jsonl", start)
        self._sinks: dict[str, Sink] = {}
        for name, make in makers(folder, start, steps, settings, configuration or {}).items():
            try:
                self._sinks[name] = make()
            except Exception as error:  # whatever another package raises
                self._drop(name, error)

    def advance(self) -> None:
        """Count one step on the progress bar."""
        self._tell("advance")

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row of numbers and lists of them; ``step`` is among its entries."""
        self._rows.write(encoded(row))
        self._tell("write", row)

    def show(self, row: Mapping[str, Any]) -> None:
        """Show numbers of a step, as ``write`` takes them, where rows go besides ``metrics.jsonl``."""
        self._tell("write", row)

    def rewind(self, step: int) -> None:
        """Go back to a step and set later rows aside; Weights & Biases cannot, and draws the new ones over them."""
        self._rows.rewind(step)
        self._tell("rewind", step)

    def close(self) -> None:
        """Close files and the progress bar."""
        self._rows.close()
        self._tell("close")

    def _tell(self, action: str, *arguments: Any) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                getattr(sink, action)(*arguments)
            except Exception as error:  # whatever another package raises
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        warn(f"{name} failed and is left out from here on; training goes on ({type(error).__name__}: {error})")
        with suppress(Exception):  # it is broken already, or was never made
            self._sinks.pop(name).close()


def read_rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Return the rows of a file of a run, but for one cut short by a kill; what was not finite is None."""
    path = folder / name
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step(line) < math.inf]


def mean_over_last_steps(rows: list[dict[str, Any]], name: str, steps: int) -> tuple[float, int]:
    """Return the mean of an entry over the newest rows that cover ``steps`` steps, and the steps covered."""
    total, covered = 0.0, 0
    for row in reversed(rows):
        value = float("nan") if row[name] is None else row[name]
        total, covered = total + value * row["window"], covered + int(row["window"])
        if covered >= steps:
            break
    return total / max(1, covered), covered


class Rows:
    """Lines of a file, each with its step. What cannot be written waits, and is tried again with every row.

    Args:
        path: of the file.
        start: step restored; later lines are set aside, in ``….superseded.jsonl``.

    Raises:
        OSError: the file cannot be written at the start; later on nothing is raised.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._path, self._lost, self._warned = path, 0, False
        self._waiting: deque[bytes] = deque(maxlen=KEPT)
        self._late: int | None = None  # the step after which lines are still to be cut
        _cut(path, start)
        path.open("ab").close()

    def write(self, *lines: bytes) -> None:
        """Append lines, as ``encoded`` makes them, all at once."""
        for line in lines:
            self._lost += len(self._waiting) == KEPT
            self._waiting.append(line)
        self._flush()

    def rewind(self, step: int) -> None:
        """Set lines of later steps aside."""
        self._flush()
        self._waiting = deque((line for line in self._waiting if _step(line) <= step), KEPT)
        self._late = step if self._late is None else min(step, self._late)
        self._flush()

    def close(self) -> None:
        """Write what waits, for the last time."""
        self._flush()
        if lost := self._lost + len(self._waiting):
            warn(f"{lost} rows of {self._path} could not be written and are lost")

    def _flush(self) -> None:
        try:
            if self._late is not None:
                _cut(self._path, self._late)
                self._late = None
            if self._waiting:
                _append(self._path, b"".join(self._waiting))
                self._waiting.clear()
        except OSError as error:
            if not self._warned:
                warn(f"{self._path} cannot be written ({error}); rows wait in memory, training goes on")
            self._warned = True


def encoded(row: Mapping[str, Any]) -> bytes:
    """Return a row as a line of JSON; what is not finite is null."""
    return json.dumps(_finite(row)).encode() + b"\n"


def _finite(value: Any) -> Any:
    """Put None, JSON's null, in the place of what is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append(path: Path, content: bytes) -> None:
    """Append all of the content, or raise OSError with the file as it was."""
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise


def _cut(path: Path, step: int) -> None:
    """Keep lines up to ``step``; append the others to the superseded ones. The file changes at once or not at all."""
    content = path.read_bytes() if path.exists() else b""
    lines = content.splitlines()
    late = [line for line in lines if _step(line) > step]
    if not late and (not content or content.endswith(b"\n")):
        return
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("wb") as file:
        file.writelines(line + b"\n" for line in lines if _step(line) <= step)
        file.flush()
        os.fsync(file.fileno())
    if late:
        _append(path.with_suffix(".superseded.jsonl"), b"".join(line + b"\n" for line in late))
    beside.replace(path)


def _step(line: bytes) -> float:
    """Step of a row; a row cut short by a kill counts as late."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def warn(line: str) -> None:
    """Print a warning to stderr, if anybody still hears it; whether or not, nothing is raised."""
    tell(f"warning: {line}")


def tell(line: str) -> None:
    """Print a line to stderr, below the progress bar, as ``warn`` does."""
    with suppress(OSError, ValueError):  # stderr may be the very pipe that broke
        print(f"\n{line}", file=sys.stderr, flush=True)
