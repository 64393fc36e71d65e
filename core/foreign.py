"""Files of weights that other programs wrote, read without running anything that is in them."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pathline.core.errors import WeightsError, suggest

__all__ = ["PICKLED", "read", "read_named", "unwrapped"]

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
        key: which of several weights in it, as ``model``: an entry of the file, or what a wrapper calls them within the
            only entry. None takes the average, ``ema``, or the only ones there are.

    Returns:
        tensors by name, on the host; copies, so that the file may be written anew.

    Raises:
        WeightsError: no such file, of another ending, truncated or damaged, with other objects in it than these, or
            without such weights; the file and the reason are named.
    """
    return deepcopy(read_named(Path(path), key)[1])  # as one, so that what is shared is copied once


def read_named(path: Path, key: str | None) -> tuple[str | None, dict[str, Tensor]]:
    """Return what ``read`` does, behind the key under which it was found; None for a file of weights alone.

    The tensors are the file's own pages: they may not be used any more once it has been rewritten.
    """
    if not path.is_file():
        raise WeightsError(f"got no file at {path}, expected weights")
    suffix = path.suffix.lower()
    if suffix not in (*PICKLED, ".safetensors"):
        raise WeightsError(f"got {path}, expected a name that ends in {', '.join(PICKLED)} or .safetensors")
    try:
        content = load_file(path) if suffix == ".safetensors" else _unpickled(path)
    except Exception as error:  # what a damaged file raises is not listed anywhere
        reason = _reason(error) if path.stat().st_size else "it is empty"
        raise WeightsError(f"got {path}, which cannot be read as weights alone: {reason}") from error
    found, wrapped = _chosen(content, key, path)
    state, taken_off = _unwrapped(wrapped, key, path)
    if key not in (None, found, *taken_off):
        raise WeightsError(
            f"got {path} without weights {key!r}, as an entry or a wrapper of names; "
            f"{suggest(str(key), {*taken_off, *([found] if found else [])})}; leave weights.key out for the others"
        )
    _check_tensors(state, path)
    return found if key is None else key, {name: tensor.detach() for name, tensor in state.items()}


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off the names that wrappers add, as ``module.``; of an average beside its model the average is taken.

    Raises:
        WeightsError: two entries get one name.
    """
    return _unwrapped(state, None, "weights")[0]


def _reason(error: Exception) -> str:
    """Say in one line why a file cannot be read, without torch's advice to run what is in it."""
    text = str(error).strip()
    if found := re.search(r"GLOBAL (\S+)", text):
        return f"it holds {found[1]}, which is not read"
    found = re.search(r"WeightsUnpickler error:\s*([^\n]+)", text)
    return (found[1] if found else f"{type(error).__name__}: {text}".split("\n")[0])[:300]


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
    groups = [name for name, value in content.items() if _is_state(value)]
    tensors = [name for name, value in content.items() if isinstance(value, Tensor)]
    if tensors and (not groups or any("." in name for name in tensors)):  # else they stand beside weights, as a step
        return None, dict(content)
    name = AVERAGE if key is None else key
    if not _may_be_state(content.get(name)):
        if len(groups) != 1:
            hint = f"{suggest(name, groups)}; name one by weights.key" if groups else f"only {', '.join(content)}"
            raise WeightsError(f"got {path} without weights {name!r}: {hint}")
        name = groups[0]
    if not isinstance(content[name], Mapping) or not content[name]:
        raise WeightsError(f"got {path} with a {type(content[name]).__name__} under {name!r}, expected weights by name")
    return name, dict(content[name])


def _may_be_state(value: Any) -> bool:
    """Whether a value is more than a number or a word, as the decay of an average is."""
    return value is not None and not isinstance(value, int | float | str | Tensor)


def _is_state(value: Any) -> bool:
    """Whether a value looks like weights: names, and tensors among what they name."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(item, Tensor) for item in value.values())
    )


def _unwrapped(state: Mapping[str, Any], key: str | None, place: object) -> tuple[dict[str, Any], list[str]]:
    """Take off the names that wrappers add, as long as there are any, and return them as well.

    Of several wrappers, as an average beside its model, the one that ``key`` names is chosen, else the average.

    Raises:
        WeightsError: two entries get one name.
    """
    if not all(isinstance(name, str) for name in state):
        raise WeightsError(f"got {place} with names that are no text, expected weights by name")
    named = [
        (".".join(word for word in name.split(".") if word not in _ANYWHERE), value) for name, value in state.items()
    ]
    taken_off: list[str] = []
    while True:
        tops = {name.partition(".")[0] for name, value in named if not _is_counter(name, value)}
        if not tops or not (tops <= {*_LEADING} or key in tops & {*_LEADING}):
            break
        top = next(top for top in (key, *_LEADING) if top in tops)
        named = [(name[len(top) + 1 :], value) for name, value in named if name.startswith(f"{top}.")]
        taken_off.append(top)
    result = dict(named)
    if len(result) < len(named):
        raise WeightsError(f"got {place} in which two entries have one name without those of wrappers; check the file")
    return result, taken_off


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
    held = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    told = sum(value.numel() * value.element_size() for value in state.values())
    if told > 2 * sum(held.values()):  # a weight may stand there under two names
        raise WeightsError(f"got {path} with {told:,} bytes in its entries, which share {sum(held.values()):,}")
