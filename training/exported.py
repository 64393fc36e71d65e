"""Exported weights, read back: a safetensors file and the JSON file beside it that tells what model they are of."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pathline.core.config import Configuration, resolve
from pathline.core.errors import CheckpointError
from pathline.training.manifest import parse

__all__ = ["digest", "load_exported", "read_record", "read_weights"]


def load_exported(path: Path) -> tuple[Configuration, dict[str, Tensor]]:
    """Read weights and the configuration of their model, of which ``backbone`` builds the network.

    Args:
        path: of the weights; the JSON file lies beside them.

    Raises:
        CheckpointError: a file is missing, damaged, or not of the other one.
        ConfigurationError: it names what is not installed here.
    """
    return resolve(read_record(path)["configuration"]), read_weights(path)


def read_record(path: Path) -> dict[str, Any]:
    """Read the JSON file beside weights: the configuration, and what else is told of their model.

    Raises:
        CheckpointError: a file is missing, or the JSON file damaged or of something else.
    """
    beside = path.with_suffix(".json")
    for file in (path, beside):
        if not file.is_file():
            raise CheckpointError(f"got no file {file}; weights and the JSON file beside them belong together")
    record = parse(beside)
    if not isinstance(record.get("configuration"), dict) or "sha256" not in record:
        raise CheckpointError(f"got {beside}, which does not tell of weights; give the one that was exported with them")
    return record


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; where a JSON file beside it has its hash, that is verified before.

    Raises:
        CheckpointError: it has another hash, or is no such file.
    """
    beside = path.with_suffix(".json")
    told = parse(beside).get("sha256") if beside.is_file() else None
    if told is not None and digest(path) != told:
        raise CheckpointError(f"got {path} with other contents than {beside.name} tells; export it again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"got {path}, which is no safetensors file: {error}") from error


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
