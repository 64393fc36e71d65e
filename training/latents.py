"""The autoencoder of a run, which turns samples into images, against the one that the latents are of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pathline.data import Dataset
from pathline.encoders.autoencoders import Autoencoder

__all__ = ["autoencoder_problems"]

_SAME = ("class", "sha256", "input_range", "scaling.mean", "scaling.std")


def autoencoder_problems(autoencoder: Autoencoder, dataset: Dataset) -> Iterator[str]:
    """Yield why an autoencoder does not decode what a model of a data set makes.

    What the data do not tell of the autoencoder of their latents cannot be compared.
    """
    if dataset.data_are_images:
        yield (
            "autoencoder: got one for data that are pixels; make latents of them by python -m pathline.data.prepare, "
            "or leave it out"
        )
        return
    told = dataset.latents_of or {}
    changed = [
        f"{key} {_entry(told, key)!r} -> {_entry(autoencoder.manifest, key)!r}"
        for key in _SAME
        if _entry(told, key) is not None and not _equal(_entry(told, key), _entry(autoencoder.manifest, key))
    ]
    if changed:
        yield (
            f"autoencoder: is another than the latents are of ({'; '.join(changed)}); give the one that made them, or "
            "prepare the data anew"
        )
    channels = len(autoencoder.manifest["scaling"]["mean"])
    if channels != dataset.shape[0]:
        yield (
            f"autoencoder: has latents of {channels} channels, and the data have {dataset.shape[0]}; give the one that "
            "made them"
        )


def _entry(manifest: Mapping[str, Any], path: str) -> Any:
    found: Any = manifest
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _equal(first: Any, second: Any) -> bool:
    """Whether two entries are the same, numbers but for the rounding of who computed them."""
    if isinstance(first, Sequence) and isinstance(second, Sequence) and not isinstance(first, str):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, int | float) and isinstance(second, int | float):
        return math.isclose(first, second, rel_tol=1e-6, abs_tol=1e-9)
    return bool(first == second)
