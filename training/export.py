"""Weights to be shared: one safetensors file, and beside it a JSON file that tells what model they are of.

``python -m pathline.training.export RUN_OR_CHECKPOINT [--average ema-0.050] [--output model.safetensors]`` writes them;
with ``--whole`` it writes, of a checkpoint in shards, the same with one file a group.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pathline import __version__
from pathline.core.config import resolve
from pathline.core.errors import CheckpointError, InputError, PathlineError, suggest
from pathline.training import checkpoints
from pathline.training.described import KEPT
from pathline.training.exported import digest
from pathline.training.manifest import SUFFIX, make_folder, read_manifest, sync

__all__ = ["export", "main", "make_whole", "write_pair"]


def export(checkpoint: Path, average: str | None = None, output: Path | None = None) -> Path:
    """Write weights of a checkpoint, and beside them a JSON file: what ``KEPT`` names, version and hash.

    Args:
        checkpoint: its folder.
        average: as ``ema-0.050``, or ``model`` for the weights that were trained; None is the first average.
        output: ends in ``.safetensors``; what is there is replaced. None is a file in the run's folder.

    Returns:
        path of the weights.

    Raises:
        CheckpointError: it is damaged, or has no such average.
        InputError: the output has another ending.
        OSError: the disk is full or read-only.
    """
    state = checkpoints.read_state(checkpoint)
    average = average or resolve(state["configuration"]).ema.names[0]
    names = [name for name in read_manifest(checkpoint).groups if name != "optim"]
    if average not in names:
        raise CheckpointError(f"got no weights {average!r} in {checkpoint}; {suggest(average, names)}")
    path = output or _run_of(checkpoint) / f"{average}-{checkpoint.resolve().name}{SUFFIX}"
    if path.suffix != SUFFIX:
        raise InputError(f"got output {path}, expected a name that ends in {SUFFIX}")
    record = {"average": average, "step": state["step"], **{key: state[key] for key in KEPT if key in state}}
    write_pair(path, checkpoints.read_group(checkpoint, average), record)
    return path


def write_pair(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Path:
    """Write weights and the JSON file beside them, which tells version, hash and ``record``; return the latter's path.

    What is there is replaced only after both lie on the disk. A process that is killed between the two leaves weights
    of another hash than the JSON file tells, which are refused.

    Raises:
        OSError: the disk is full or read-only; what was there still is.
    """
    beside = path.with_suffix(".json")
    make_folder(path.parent.absolute())
    weights, told = (final.with_name(f".{final.name}-{os.getpid()}") for final in (path, beside))
    try:
        _save(tensors, weights)
        told.write_text(json.dumps({"version": __version__, "sha256": digest(weights), **record}, indent=1))
        weights.chmod(stat.S_IMODE(told.stat().st_mode))  # safetensors lets the owner alone read
        sync(told)
        weights.replace(path)
        told.replace(beside)
    finally:
        weights.unlink(missing_ok=True)
        told.unlink(missing_ok=True)
    return beside


def make_whole(checkpoint: Path, folder: Path | None = None) -> Path:
    """Write a checkpoint again, every group in one file; return its path.

    Args:
        checkpoint: its folder.
        folder: where the new one's folder lies; None is ``whole`` in the run's folder.

    Raises:
        CheckpointError: it is damaged, or there is one of this step already.
        OSError: the disk is full or read-only.
    """
    state = checkpoints.read_state(checkpoint)
    final = checkpoints.path_of(folder or _run_of(checkpoint) / "whole", state["step"])
    if final.exists():
        raise CheckpointError(f"got {final}, which is there already; give another folder by --output")
    make_folder(final.parent.absolute())
    temporary = final.with_name(f".writing-{final.name}-{os.getpid()}")
    try:
        temporary.mkdir()
        for group in read_manifest(checkpoint).groups:
            _save(checkpoints.read_group(checkpoint, group), temporary / f"{group}{SUFFIX}")
        return checkpoints.finish(temporary, final, state["step"], state, bool(state["good"]))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _run_of(checkpoint: Path) -> Path:
    return checkpoint.resolve().parent.parent


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    sync(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, or 2 for a wrong input."""
    parser = argparse.ArgumentParser(prog="export", description="Write the weights of a trained model, to be shared.")
    parser.add_argument("model", type=Path, help="a run's folder, or one checkpoint")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--average", help="as ema-0.050, or model for the trained weights; default: the first average")
    what.add_argument("--whole", action="store_true", help="write a whole checkpoint instead, one file a group")
    parser.add_argument(
        "--output", type=Path, help="a .safetensors file, or with --whole a folder; default: in the run"
    )
    given = parser.parse_args(arguments)
    try:
        checkpoint = checkpoints.find(given.model, lambda line: print(f"warning: {line}", file=sys.stderr))
        if given.whole:
            print(make_whole(checkpoint, given.output))
        else:
            path = export(checkpoint, given.average, given.output)
            print(f"{path}\n{path.with_suffix('.json')}")
    except (PathlineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
