"""Checkpoints: folders of safetensors and JSON, written beside, hashed, and renamed whole.

``step-000003000/`` holds ``model.safetensors``, ``optim.safetensors``, one file for each average, as
``ema.safetensors``, and ``state.json``; ``manifest.json``, written last, has size and SHA-256 of each. A group of
tensors that is sharded over devices is a folder ``model/`` of such files. Nothing is unpickled, and nothing is read
before its hash is verified.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pathline.core.errors import CheckpointError, suggest
from pathline.training.manifest import (
    FORMAT,
    MANIFEST,
    STATE,
    SUFFIX,
    Manifest,
    check_files,
    make_folder,
    parse,
    problem,
    read_manifest,
    sync,
    write_manifest,
)

__all__ = [
    "Keep",
    "Snapshot",
    "check_tensors",
    "find",
    "finish",
    "hash_of",
    "latest",
    "path_of",
    "prune",
    "read",
    "read_group",
    "read_state",
    "set_aside_after",
    "verify",
    "write",
]

STEP = re.compile(r"step-[0-9]{9,}")
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds: named groups of tensors, and scalars fit for JSON.

    Attributes:
        tensors: by group and name.
        state: ``good``, True where it is missing, tells that no streak of skipped steps was under way.
    """

    tensors: Mapping[str, Tensors]
    state: Mapping[str, Any]


class Keep(NamedTuple):
    """Which checkpoints stay: the newest ``last``, those of steps divisible by ``every``, and the newest good one."""

    last: int
    every: int | None = None


def write(folder: Path, step: int, snapshot: Snapshot, keep: Keep) -> Path:
    """Write the checkpoint of a step and delete those that need not be kept.

    An existing valid checkpoint of the step is left as it is.

    Raises:
        OSError: the disk is full or read-only; older checkpoints are whole.
        CheckpointError: what lies on the disk has another size than what was written; older checkpoints are whole.
    """
    final = path_of(folder, step)
    if final.exists() and not problem(final):
        return final
    make_folder(folder)
    temporary = folder / f".writing-{step:09d}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, tensors in snapshot.tensors.items():
            _save(tensors, temporary / f"{name}{SUFFIX}")
        finish(temporary, final, step, snapshot.state, bool(snapshot.state.get("good", True)))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    prune(folder, keep)
    return final


def finish(temporary: Path, final: Path, step: int, state: Mapping[str, Any], good: bool) -> Path:
    """Turn a folder of tensors into the checkpoint ``final``, beside which it lies: add the state, hash, and rename.

    Args:
        temporary: holds a file ``<group>.safetensors`` or a folder ``<group>/`` for each group, all closed.
        final: its name to be; a damaged checkpoint of this name is renamed.
        step: of the checkpoint.
        state: scalars fit for JSON.
        good: whether a run may be set back to it, as no streak of skipped steps was under way.

    Raises:
        OSError: the disk is full or read-only.
        CheckpointError: what lies on the disk is not what was written, or is no checkpoint's; nothing was renamed.
    """
    head = {"format": FORMAT, "step": step, "good": good}
    (temporary / STATE).write_text(json.dumps({**head, **state, **head}, indent=1))
    write_manifest(temporary, step, good=good)
    check_files(temporary, read_manifest(temporary), hashes=False)
    if final.exists():  # damaged: kept as evidence, out of the way
        _rename_aside(final, "damaged")
    temporary.rename(final)
    sync(final.parent)
    return final


def read(path: Path) -> Snapshot:
    """Verify a checkpoint and read it into memory; one of format 1 as if it were of today's.

    Raises:
        CheckpointError: a file is missing, damaged or of another size, or the format is unknown; it is named.
    """
    state = read_state(path)
    return Snapshot({group: read_group(path, group) for group in read_manifest(path).groups}, state)


def read_state(path: Path) -> dict[str, Any]:
    """Verify a checkpoint and return its scalars; raises as ``read``."""
    manifest = verify(path)
    state = parse(path / STATE)
    if (state.get("format"), state.get("step")) != (manifest.format, manifest.step):
        raise CheckpointError(f"got {STATE} of another step or format in {path}; use another checkpoint")
    if manifest.format == 1:
        counters = {"passed": 0, "streak": 0, "rollbacks": 0, "rolled_to": 0}
        updates = manifest.step - int(state.get("skipped", 0))
        # the means of the open window of the log were kept in another way: they are left out
        rest = {"averages": {"updates": updates}, "guard": {}, "window": {"names": [], "plain": None, "records": []}}
        state = {"good": True, **state, **counters, **rest}
    return state


def read_group(path: Path, group: str) -> Tensors:
    """Return a group of tensors, whole, of a checkpoint that has been verified.

    Raises:
        CheckpointError: there is no such group.
    """
    known = read_manifest(path).groups
    if group not in known:
        raise CheckpointError(f"got no group {group!r} in {path}; {suggest(group, known)}")
    file = path / f"{group}{SUFFIX}"
    if not file.is_file():
        from pathline.training import sharded  # which is built on this module

        return sharded.read_full(path / group)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"got {file.name} in {path}, which is no safetensors file: {error}") from error


def verify(path: Path) -> Manifest:
    """Return the manifest of a checkpoint; raise CheckpointError unless all of its files are there, whole."""
    found = problem(path)
    if found:
        raise CheckpointError(f"got {found} in {path}; use another checkpoint")
    return read_manifest(path)


def hash_of(path: Path, group: str) -> str:
    """Return the SHA-256 that the manifest has of a group's file; of shards that of their names and hashes."""
    files = read_manifest(path).files
    if f"{group}{SUFFIX}" in files:
        return files[f"{group}{SUFFIX}"].sha256
    shards = {name: entry.sha256 for name, entry in sorted(files.items()) if name.startswith(f"{group}/")}
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


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


def latest(folder: Path, warn: Callable[[str], None], good: bool = False) -> Path | None:
    """Return the newest valid checkpoint, or None; each newer one that is damaged is named in a warning.

    Args:
        folder: of the checkpoints.
        warn: takes the warnings.
        good: whether to pass over those written during a streak of skipped steps.
    """
    for path in reversed(_steps(folder)):
        found = problem(path)
        if found:
            warn(f"{path} is left aside: {found}")
        elif not good or read_manifest(path).good:
            return path
    return None


def set_aside_after(folder: Path, step: int) -> None:
    """Rename the checkpoints of later steps, of a history that a resume from ``step`` leaves."""
    late = [path for path in _steps(folder) if _step(path) > step]
    for path in reversed(late):  # so that a kill in between leaves the older ones, which these came from
        _rename_aside(path, "superseded")
    if late:
        sync(folder)


def prune(folder: Path, keep: Keep) -> None:
    """Delete the valid checkpoints that need not be kept; damaged ones are evidence and stay."""
    valid = [path for path in _steps(folder) if not problem(path, hashes=False)]
    kept = valid[-keep.last :] + [path for path in valid if read_manifest(path).good][-1:]
    for path in valid:
        if path not in kept and not (keep.every and _step(path) % keep.every == 0):
            shutil.rmtree(path.rename(folder / f".deleting-{path.name}-{os.getpid()}"))  # whole, or out of sight


def path_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return folder / f"step-{step:09d}"


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


def _save(tensors: Tensors, path: Path) -> None:
    """Write a group; safetensors takes no two tensors of one storage, as tied weights are: these are copied."""
    seen: set[int] = set()
    whole = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        whole[name] = tensor.detach().clone() if storage in seen else tensor.detach().contiguous()
        seen.add(storage)
    try:
        save_file(whole, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def _rename_aside(path: Path, why: str) -> None:
    number = 1
    while (aside := path.parent / f"{why}-{path.name}-{number}").exists():
        number += 1
    path.rename(aside)


def _steps(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if path.is_dir() and STEP.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
