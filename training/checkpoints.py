"""Checkpoints: folders of safetensors and JSON, written beside, hashed, and renamed whole.

``step-000003000/`` holds ``model.safetensors``, ``ema.safetensors``, ``optim.safetensors``, ``state.json`` and, written
last, ``manifest.json`` with size and SHA-256 of each. Nothing is unpickled, and nothing is read before its hash is
verified.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from pathline.core.errors import CheckpointError

__all__ = ["Snapshot", "check_tensors", "find", "latest", "read", "set_aside_after", "verify", "write"]

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds: named groups of tensors, and scalars fit for JSON."""

    tensors: Mapping[str, Tensors]
    state: Mapping[str, Any]


def write(folder: Path, step: int, snapshot: Snapshot, keep: int) -> Path:
    """Write the checkpoint of a step and delete all but the newest ``keep``.

    An existing valid checkpoint of the step is left as it is.

    Raises:
        OSError: the disk is full or read-only; older checkpoints are whole.
    """
    final = folder / f"step-{step:09d}"
    if final.exists() and not _problem(final):
        return final
    temporary = folder / f".writing-{step:09d}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, tensors in snapshot.tensors.items():
            save_file(
                {key: value.detach().contiguous() for key, value in tensors.items()}, temporary / f"{name}.safetensors"
            )
        state = {"format": FORMAT, "step": step, **snapshot.state}
        (temporary / STATE).write_text(json.dumps(state, indent=1))
        files = {path.name: _describe(path) for path in sorted(temporary.iterdir())}
        for name in files:
            _sync(temporary / name)
        (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1))
        _sync(temporary / MANIFEST)
        _sync(temporary)
        if final.exists():  # damaged: kept as evidence, out of the way
            _rename_aside(final, "damaged")
        temporary.rename(final)
        _sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(folder, keep)
    return final


def read(path: Path) -> Snapshot:
    """Verify a checkpoint and read it into memory.

    Raises:
        CheckpointError: a file is missing, damaged or of another size, or the format is unknown; it is named.
    """
    verify(path)
    state = json.loads((path / STATE).read_text())
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return Snapshot(tensors, state)


def verify(path: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there, whole."""
    problem = _problem(path)
    if problem:
        raise CheckpointError(f"got {problem} in {path}; use another checkpoint")


def find(path: Path, warn: Callable[[str], None] = warnings.warn) -> Path:
    """Return the checkpoint that a path means: itself, or the newest valid one of a run's folder.

    Raises:
        CheckpointError: there is none.
    """
    if (path / STATE).exists() or (path / MANIFEST).exists():
        return path
    found = latest(path / "checkpoints", warn)
    if found is None:
        raise CheckpointError(f"got {path}, which holds no valid checkpoint; give a run's folder or a checkpoint in it")
    return found


def latest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest valid checkpoint, or None; each newer one that is damaged is named in a warning."""
    for path in reversed(_steps(folder)):
        problem = _problem(path)
        if not problem:
            return path
        warn(f"{path} is left aside: {problem}")
    return None


def set_aside_after(folder: Path, step: int) -> None:
    """Rename the checkpoints of later steps, of a history that a resume from ``step`` leaves."""
    for path in _steps(folder):
        if int(path.name[5:]) > step:
            _rename_aside(path, "superseded")


def check_tensors(ours: Tensors, theirs: Tensors, what: str) -> None:
    """Raise CheckpointError unless names, shapes and types agree; nothing is written."""
    missing, unexpected = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    changed = [
        f"{key} is {tuple(theirs[key].shape)} {theirs[key].dtype}, expected {tuple(value.shape)} {value.dtype}"
        for key, value in ours.items()
        if key in theirs and (theirs[key].shape, theirs[key].dtype) != (value.shape, value.dtype)
    ]
    lists = (("missing", missing), ("unexpected", unexpected))
    listed = [f"{word} {', '.join(keys[:4])}" for word, keys in lists if keys]
    if missing or unexpected or changed:
        raise CheckpointError(f"got {what} that do not fit the network: {'; '.join(listed + changed[:4])}")


def _rename_aside(path: Path, why: str) -> None:
    number = len(list(path.parent.glob(f"{why}-{path.name}-*"))) + 1
    path.rename(path.parent / f"{why}-{path.name}-{number}")


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal())


def _prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` valid checkpoints; damaged ones are evidence and stay."""
    valid = [path for path in _steps(folder) if not _problem(path, hashes=False)]
    for path in valid[:-keep]:
        shutil.rmtree(path)


def _problem(path: Path, *, hashes: bool = True) -> str | None:
    """Say what is wrong with a checkpoint; None if nothing is."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, of which version {FORMAT} is known"
        files: dict[str, dict[str, Any]] = manifest["files"]
        if f"step-{manifest['step']:09d}" != path.name:
            return f"the manifest of step {manifest['step']}"
        if not {"model.safetensors", "ema.safetensors", "optim.safetensors", STATE} <= files.keys():
            return f"a manifest that names only {', '.join(sorted(files))}"
        for name, wanted in files.items():
            if Path(name).name != name:
                return f"a manifest that names {name!r}"
            file = path / name
            if not file.is_file():
                return f"no file {name}"
            if file.stat().st_size != wanted["bytes"]:
                return f"{name} of {file.stat().st_size} bytes, expected {wanted['bytes']}"
            if hashes and _hash(file) != wanted["sha256"]:
                return f"{name} with other contents than its hash"
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"a {MANIFEST} that cannot be read"
    return None


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _hash(path)}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
