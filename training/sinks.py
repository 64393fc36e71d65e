"""Where rows of a log are shown: a progress bar, TensorBoard, Weights & Biases. Any of them may raise."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from pathline.core import sections
from pathline.core.checks import require

__all__ = ["Sink", "makers"]

PATIENCE = {"finish_timeout": 60.0, "finish_timeout_raises": True}  # seconds; by itself wandb waits for ever


class Sink:
    """A place besides ``metrics.jsonl`` that is told what happens. It may raise: it is left out then."""

    def advance(self) -> None:
        """Count one step."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Show the numbers of a step, which is among them."""

    def rewind(self, step: int) -> None:
        """Go back to a step."""

    def close(self) -> None:
        """Show nothing more."""


def makers(
    folder: Path, start: int, steps: int, settings: sections.Log, configuration: Mapping[str, Any]
) -> dict[str, Callable[[], Sink]]:
    """Return what makes each sink of a run, by what it is called; arguments are those of ``Log``."""
    found: dict[str, Callable[[], Sink]] = {"the progress bar": partial(_Bar, start, steps)}
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is not None:
        found["TensorBoard"] = partial(_Board, folder / "tensorboard", start)
    if settings.wandb is not None:
        found["Weights & Biases"] = partial(_WeightsAndBiases, folder, settings.wandb, configuration)
    return found


class _Bar(Sink):
    """The progress bar, on stderr."""

    def __init__(self, start: int, steps: int) -> None:
        interval = 0.5 if sys.stderr.isatty() else 30.0  # seconds; few states where they are written to a file
        self._bar = tqdm(total=steps, initial=start, desc="training", unit="step", mininterval=interval)

    def advance(self) -> None:
        self._bar.update()

    def write(self, row: Mapping[str, Any]) -> None:
        shown = {key: row[key] for key in ("loss", "images_per_second") if row.get(key) is not None}
        if shown:
            self._bar.set_postfix({key: f"{value:.4g}" for key, value in shown.items()}, refresh=False)

    def rewind(self, step: int) -> None:
        self._bar.n = self._bar.last_print_n = step
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


class _Board(Sink):
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


class _WeightsAndBiases(Sink):
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


def _is_shown(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield a row's numbers by name, the step aside, those of a list numbered; empty bins are left out."""
    for key, value in row.items():
        if isinstance(value, list):
            yield from ((f"{key}/{i}", item) for i, item in enumerate(value) if _is_shown(item))
        elif value is not None and key != "step":
            yield key, value
