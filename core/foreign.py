"""Files of weights that other programs wrote, read without running anything that is in them."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pathline.core.errors import WeightsError, suggest

__all__ = ["PICKLED", "read", "read_named"]

PICKLED = (".pt", ".pth", ".ckpt", ".bin")
AVERAGE = "ema"
_ANYWHERE = frozenset({"_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_AVERAGES = ("ema_model", "ema")
_LEADING = (*_AVERAGES, "module", "model", "online_model", "net", "network")


def read(path: str | PathLike[str], *, key: str | None = None) -> dict[str, Tensor]:
    """Read the weights of a file that another program wrote; names that wrappers add are taken off.

    ``.pt``, ``.pth``, ``.ckpt`` and ``.bin`` are read by ``torch.load`` for tensors and plain containers alone, beside
    which an ``argparse.Namespace`` may stand; ``.safetensors`` as it is.

    Args:
        path: of the file.
        key: which of several weights in it, as ``model``. None takes the average, ``ema``, or the only ones there are.

    Returns:
        tensors by name, on the host.

    Raises:
        WeightsError: no such file, of another ending, truncated or damaged, with other objects in it than these, or
            without such weights; the file and the reason are named.
    """
    return read_named(Path(path), key)[1]


def read_named(path: Path, key: str | None) -> tuple[str | None, dict[str, Tensor]]:
    """Return what ``read`` does, behind the key under which it was found; None for a file of weights alone."""
    if not path.is_file():
        raise WeightsError(f"got no file at {path}, expected weights")
    if path.suffix not in (*PICKLED, ".safetensors"):
        raise WeightsError(f"got {path}, expected a name that ends in {', '.join(PICKLED)} or .safetensors")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except Exception as error:  # what a damaged file raises is not listed anywhere
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise WeightsError(f"got {path}, which cannot be read as weights alone: {reason}") from error
    found, wrapped = _chosen(content, key, path)
    state = _unwrapped(wrapped, key, path)
    _check_tensors(state, path)
    return found, {name: tensor.detach() for name, tensor in state.items()}


def _unpickled(path: Path) -> Any:
    """Load a pickle with one class allowed beside tensors, whatever other libraries have allowed."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    finally:
        torch.serialization.add_safe_globals(others)


def _chosen(content: Any, key: str | None, path: Path) -> tuple[str | None, dict[str, Any]]:
    """Return the weights wanted of a file's content, and their key there: itself (None), or one of its entries."""
    if not isinstance(content, Mapping) or not content or not all(isinstance(name, str) for name in content):
        raise WeightsError(f"got {path} with a {type(content).__name__} in it, expected weights by name")
    if any(isinstance(value, Tensor) for value in content.values()):
        return None, dict(content)
    groups = [name for name, value in content.items() if _is_state(value)]
    if key is None and AVERAGE not in content and len(groups) == 1:
        return groups[0], dict(content[groups[0]])
    name = AVERAGE if key is None else key
    if name not in content:
        hint = f"{suggest(name, groups)}; name one by weights.key" if groups else f"only {', '.join(content)}"
        raise WeightsError(f"got {path} without weights {name!r}: {hint}")
    if not isinstance(content[name], Mapping) or not content[name]:
        raise WeightsError(f"got {path} with a {type(content[name]).__name__} under {name!r}, expected weights by name")
    return name, dict(content[name])


def _is_state(value: Any) -> bool:
    """Whether a value looks like weights: names, and tensors among what they name."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(item, Tensor) for item in value.values())
    )


def _unwrapped(state: Mapping[str, Any], key: str | None, path: Path) -> dict[str, Any]:
    """Take off the names that wrappers add, as long as there are any; of an average beside its model one is chosen.

    Raises:
        WeightsError: two entries get one name.
    """
    if not all(isinstance(name, str) for name in state):
        raise WeightsError(f"got {path} with names that are no text, expected weights by name")
    named = [
        (".".join(word for word in name.split(".") if word not in _ANYWHERE), value) for name, value in state.items()
    ]
    while True:
        tops = {name.partition(".")[0] for name, value in named if not _is_counter(name, value)}
        if not tops or not tops <= {*_LEADING}:
            break
        top = _preferred(tops, key)
        named = [(name[len(top) + 1 :], value) for name, value in named if name.startswith(f"{top}.")]
    result = dict(named)
    if len(result) < len(named):
        raise WeightsError(f"got {path} in which two entries have one name without those of wrappers; check the file")
    return result


def _preferred(tops: set[str], key: str | None) -> str:
    """Return which of several wrappers to read: the one named, else the average, else the model."""
    return next(top for top in (key, *_LEADING) if top in tops)


def _is_counter(name: str, value: Any) -> bool:
    """Whether an entry counts steps or updates beside the weights, as averages of weights do."""
    return "." not in name and isinstance(value, Tensor) and value.numel() == 1


def _check_tensors(state: Mapping[str, Any], path: Path) -> None:
    """Raise WeightsError unless every entry is a plain tensor that holds as many values as it says."""
    if not state:
        raise WeightsError(f"got {path} without any weights")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise WeightsError(f"got {path} with a {type(value).__name__} for {name}, expected a tensor")
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu" or value.is_complex():
            raise WeightsError(f"got {path} with {name} of type {value.dtype}, {value.layout}; expected plain values")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise WeightsError(f"got {path} with {name} of shape {tuple(value.shape)}, more than the file holds of it")
