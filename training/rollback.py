"""Leaving a history of a run: what belongs to later steps is set aside, and what went wrong is written down."""

from __future__ import annotations

import json
from pathlib import Path

from pathline.training import checkpoints, incidents
from pathline.training.log import warn
from pathline.training.state import State

__all__ = ["dump", "leave_history_after", "newest_good"]


def leave_history_after(folder: Path, step: int) -> None:
    """Rename checkpoints and stored averages of steps after this one."""
    for name in ("checkpoints", "averages"):
        checkpoints.set_aside_after(folder / name, step)


def newest_good(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run before which no streak of skipped steps was under way, or None."""
    return checkpoints.latest(folder / "checkpoints", warn, good=True)


def dump(folder: Path, state: State) -> Path:
    """Write down what is known of the steps that were skipped last; return the file."""
    path = folder / f"diverged-step-{state.step:09d}.json"
    numbers = {name: getattr(state, name) for name in ("step", "passed", "streak", "skipped", "rollbacks")}
    known = incidents.read(folder)[-state.streak :]
    try:
        path.write_text(json.dumps({**numbers, "guard": state.guard.state(), "incidents": known}, indent=1))
    except OSError as error:  # that the run has diverged matters more
        warn(f"{path} could not be written: {error}")
    return path
