"""Averages of another length after training, from stored snapshots of two power-function averages or more.

``python -m pathline.training.posthoc RUN --length 0.13`` writes the weights of that relative width as safetensors, and
beside them a JSON file that tells how they came about. Source: arXiv:2312.02696, 3.2 and appendix C.

S snapshots of K tracks each; n counts updates.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.errors import CheckpointError, InputError, PathlineError
from pathline.core.sections import Ema
from pathline.training import checkpoints
from pathline.training.described import KEPT
from pathline.training.ema import exponent
from pathline.training.export import write_pair

__all__ = ["Profile", "Reconstruction", "main", "plan", "reconstruct", "save", "solve_weights"]

SHORTEST, LONGEST = 0.04, 0.28  # beyond them the tracks of EDM2, 0.05 and 0.10, extrapolate
FEWEST = 4  # snapshots
LARGEST_RESIDUAL = 0.25  # with 4 snapshots or more the weights are then off by at most a tenth of what averaging moves


class Profile(NamedTuple):
    """What an average weighs: update t in (0, end) in proportion to t^γ."""

    gamma: float
    end: int


class Stored(NamedTuple):
    """A snapshot, and the γ of each of its tracks."""

    path: Path
    gammas: dict[str, float]
    state: dict[str, Any]


@dataclass(frozen=True)
class Reconstruction:
    """An average as a sum of stored ones.

    Attributes:
        length: its relative width.
        weights: of each track in each snapshot, by path and name, oldest first; they sum to 1.
        residual: distance between the profile asked for and the sum's, relative to the former's norm.
        state: what the last snapshot, at which the average ends, tells of itself.
    """

    length: float
    weights: dict[Path, dict[str, float]]
    residual: float
    state: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """Read the tracks of the snapshots, one at a time, and add them up in float64.

        What is the same in every track of the last snapshot is a buffer, or never moved, and is copied.
        """
        end, tracks = list(self.weights.items())[-1]
        first, *others = (checkpoints.read_group(end, name) for name in tracks)
        copied = {key for key, value in first.items() if all(torch.equal(value, other[key]) for other in others)}
        del others  # as large as the network each
        summed = {
            key: torch.zeros_like(value, dtype=torch.float64) for key, value in first.items() if key not in copied
        }
        for path, weights in self.weights.items():
            for name, weight in weights.items():
                stored = checkpoints.read_group(path, name)
                for key, total in summed.items():
                    total.add_(stored[key], alpha=weight)
        return {key: value if key in copied else summed[key].float() for key, value in first.items()}


def solve_weights(profiles: Sequence[Profile], target: Profile) -> tuple[NDArray[np.float64], float]:
    """Return the weights, of sum 1, with which the profiles come nearest to the target, and the residual.

    Least squares in float64: the condition number grows from 10² for 4 snapshots of two tracks to 10⁵ for 32.
    """
    matrix = np.array([[_inner(a, b) for b in profiles] for a in profiles])
    against = np.array([_inner(a, target) for a in profiles])
    weights = np.linalg.lstsq(matrix, against, rcond=None)[0]
    weights /= weights.sum()
    squared = _inner(target, target)
    distance = squared - 2 * weights @ against + weights @ matrix @ weights
    return weights, math.sqrt(max(0.0, distance) / squared)


def _inner(a: Profile, b: Profile) -> float:
    """∫ of the product of two profiles, each of integral 1: (γa + 1)(γb + 1)·r^γ/((γa + γb + 1)·the later end).

    r is the earlier end over the later one, γ that of the profile with the later end.
    """
    early, late = sorted((a, b), key=lambda profile: profile.end)
    share: float = (early.end / late.end) ** late.gamma
    return (a.gamma + 1) * (b.gamma + 1) * share / ((a.gamma + b.gamma + 1) * late.end)


def plan(folder: Path, length: float, step: int | None = None) -> Reconstruction:
    """Find out how the average of a relative width comes from a run's snapshots.

    Args:
        folder: of the run; its snapshots lie in ``averages/``.
        length: relative width σ, from 0.04 to 0.28.
        step: at which it ends, that of a snapshot; None is the last.

    Raises:
        InputError: a length out of range, or a step without a snapshot.
        CheckpointError: too few snapshots, or of one track alone, or damaged.
    """
    if not SHORTEST <= length <= LONGEST:
        raise InputError(f"got length {length}, expected {SHORTEST} <= length <= {LONGEST}")
    stored = _stored(folder / "averages", step)
    profiles = [Profile(gamma, one.state["updates"]) for one in stored for gamma in one.gammas.values()]
    end = stored[-1].state
    solved, residual = solve_weights(profiles, Profile(exponent(length), end["updates"]))
    if len(stored) < FEWEST or residual > LARGEST_RESIDUAL:
        raise CheckpointError(
            f"got {len(stored)} snapshots in {folder / 'averages'}, too few for length {length}: residual "
            f"{residual:.2f}, expected at most {LARGEST_RESIDUAL} and {FEWEST} snapshots; take a length nearer to "
            "those of ema.lengths, or a later step"
        )
    numbers = iter(solved.tolist())
    weights = {one.path: {name: next(numbers) for name in one.gammas} for one in stored}
    return Reconstruction(length, weights, residual, end)


def reconstruct(folder: Path, length: float, step: int | None = None) -> dict[str, Tensor]:
    """Return the weights of the average of a relative width; arguments and errors as of ``plan``."""
    return plan(folder, length, step).tensors()


def _stored(folder: Path, step: int | None) -> list[Stored]:
    """Return the snapshots up to a step, oldest first, without those of a time before the first update."""
    paths = {int(path.name[5:]): path for path in folder.glob("step-*") if path.name[5:].isdecimal()}
    if not paths:
        raise CheckpointError(f"got no snapshot in {folder}; train with two ema.lengths and with ema.snapshot_every")
    if step not in (None, *paths):
        raise InputError(f"got step {step}, expected that of a snapshot: {', '.join(map(str, sorted(paths)))}")
    read = [_read(paths[number]) for number in sorted(paths) if step is None or number <= step]
    stored = [one for one in read if one.state["updates"]]
    if not stored or any(len(one.gammas) < 2 or one.gammas != stored[-1].gammas for one in stored):
        raise CheckpointError(
            f"got snapshots in {folder} without two lengths that are the same in all; see ema.lengths"
        )
    return stored


def _read(path: Path) -> Stored:
    """Verify a snapshot and read what it tells of itself."""
    state = checkpoints.read_state(path)
    try:
        ema = Ema.model_validate(state["configuration"]["ema"])
        state["updates"] = int(state["updates"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"got {path}, which tells no lengths or updates: {error!r}; move it elsewhere") from error
    names = [name for name in ema.names if name != "ema"]
    return Stored(path, {name: exponent(length) for name, length in zip(names, ema.lengths, strict=True)}, state)


def save(found: Reconstruction, output: Path) -> Path:
    """Write the weights, and beside them a JSON file that tells how they came about; return its path.

    Raises:
        OSError: the disk is full or read-only.
    """
    tensors = found.tensors()
    record = {
        "average": f"ema-{found.length:.3f}",
        "length": found.length,
        "step": found.state["step"],
        "updates": found.state["updates"],
        "residual": found.residual,
        "snapshots": {path.name: of_tracks for path, of_tracks in found.weights.items()},
        **{key: found.state[key] for key in KEPT if key in found.state},
    }
    return write_pair(output, tensors, record)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, or 2 for a wrong input."""
    parser = argparse.ArgumentParser(prog="posthoc", description="Average weights over another length, after training.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--length", type=float, required=True, help="relative width, from 0.04 to 0.28")
    parser.add_argument("--step", type=int, help="at which it ends, that of a snapshot; default: the last")
    parser.add_argument("--output", type=Path, metavar="FILE.safetensors", help="default: in the folder of the run")
    given = parser.parse_args(arguments)
    try:
        found = plan(given.run, given.length, given.step)
        name = f"ema-{found.length:.3f}-step-{found.state['step']:09d}.safetensors"
        output = given.output or given.run / name
        if output.suffix != ".safetensors":
            raise InputError(f"got output {output}, expected a name that ends in .safetensors")
        record = save(found, output)
    except (PathlineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{output}\n{record}\nfrom {len(found.weights)} snapshots; residual {found.residual:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
