"""What a run writes down: JSON lines, TensorBoard, Weights & Biases, a progress bar. None of them can stop training."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from pathline.core import sections
from pathline.core.checks import require

__all__ = ["Log", "check_sinks", "mean_over_last_steps", "read_rows", "warn"]

KEPT = 1000  # rows that wait in memory while their file cannot be written
DEFAULTS = sections.Log()
PATIENCE = {"finish_timeout": 60.0, "finish_timeout_raises": True}  # seconds; by itself wandb waits for ever
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
        self._rows = _Rows(folder / "metrics.jsonl", start)
        makers: dict[str, Callable[[], _Sink]] = {"the progress bar": partial(_Bar, start, steps)}
        if settings.tensorboard and importlib.util.find_spec("tensorboard") is not None:
            makers["TensorBoard"] = partial(_Board, folder / "tensorboard", start)
        if settings.wandb is not None:
            makers["Weights & Biases"] = partial(_WeightsAndBiases, folder, settings.wandb, configuration or {})
        self._sinks: dict[str, _Sink] = {}
        for name, make in makers.items():
            try:
                self._sinks[name] = make()
            except Exception as error:  # whatever another package raises
                self._drop(name, error)

    def advance(self) -> None:
        """Count one step on the progress bar."""
        self._tell("advance")

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row of numbers and lists of them; ``step`` is among its entries."""
        finite = {key: _finite(value) for key, value in row.items()}
        self._rows.write(json.dumps(finite).encode() + b"\n")
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


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's ``metrics.jsonl``, but for one cut short by a kill; what was not finite is None."""
    path = folder / "metrics.jsonl"
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


class _Rows:
    """The lines of ``metrics.jsonl``. What cannot be written waits, and is tried again with every row."""

    def __init__(self, path: Path, start: int) -> None:
        self._path, self._lost, self._warned = path, 0, False
        self._waiting: deque[bytes] = deque(maxlen=KEPT)
        self._late: int | None = None  # the step after which lines are still to be cut
        _cut(path, start)
        path.open("ab").close()

    def write(self, line: bytes) -> None:
        self._lost += len(self._waiting) == KEPT
        self._waiting.append(line)
        self._flush()

    def rewind(self, step: int) -> None:
        self._flush()
        self._waiting = deque((line for line in self._waiting if _step(line) <= step), KEPT)
        self._late = step if self._late is None else min(step, self._late)
        self._flush()

    def close(self) -> None:
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


class _Sink:
    """A place besides ``metrics.jsonl`` that is told what happens. It may raise: it is left out then."""

    def advance(self) -> None: ...
    def write(self, row: Mapping[str, Any]) -> None: ...
    def rewind(self, step: int) -> None: ...
    def close(self) -> None: ...


class _Bar(_Sink):
    """The progress bar, on stderr."""

    def __init__(self, start: int, steps: int) -> None:
        interval = 0.5 if sys.stderr.isatty() else 30.0  # seconds; few states where they are written to a file
        self._bar = tqdm(total=steps, initial=start, desc="training", unit="step", mininterval=interval)

    def advance(self) -> None:
        self._bar.update()

    def write(self, row: Mapping[str, Any]) -> None:
        shown = {key: row[key] for key in ("loss", "images_per_second") if row.get(key) is not None}
        self._bar.set_postfix({key: f"{value:.4g}" for key, value in shown.items()}, refresh=False)

    def rewind(self, step: int) -> None:
        self._bar.n = self._bar.last_print_n = step
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


class _Board(_Sink):
    """TensorBoard."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a slow import of an optional package

        self._writer: Any = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        for key, value in _scalars(row):
            self._writer.add_scalar(key, value, row["step"])
        self._writer.flush()

    def rewind(self, step: int) -> None:
        events = require("tensorboard.compat.proto.event_pb2", "log")
        began = events.SessionLog(status=events.SessionLog.START)  # readers forget what has its step or a later one
        self._writer.file_writer.add_event(events.Event(session_log=began), step + 1)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases(_Sink):
    """Weights & Biases; the run's folder notes its name there, under which a resumed run goes on."""

    def __init__(self, folder: Path, project: str, configuration: Mapping[str, Any]) -> None:
        note = folder / "wandb.txt"
        self._run: Any = require("wandb", "wandb").init(
            project=project,
            dir=str(folder),
            name=folder.name,
            id=note.read_text().strip() if note.exists() else None,
            resume="allow",
            config=dict(configuration),
            allow_val_change=True,
            settings=PATIENCE,
        )
        note.write_text(f"{self._run.id}\n")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log({"step": row["step"], **dict(_scalars(row))})

    def close(self) -> None:
        self._run.finish()


def _finite(value: Any) -> Any:
    """Put None, JSON's null, in the place of what is not finite."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if value is not None and math.isfinite(value) else None


def _scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield a row's numbers by name, the step aside, those of a list numbered; empty bins are left out."""
    for key, value in row.items():
        if isinstance(value, list):
            yield from ((f"{key}/{i}", item) for i, item in enumerate(value) if _finite(item) is not None)
        elif value is not None and key != "step":
            yield key, value


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
    with suppress(OSError, ValueError):  # stderr may be the very pipe that broke
        print(f"\nwarning: {line}", file=sys.stderr, flush=True)  # below the progress bar
