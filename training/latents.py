"""Data, latents and autoencoders against one another: whose latents they are, and whether a model is of the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from pathline.data import Dataset
from pathline.encoders.autoencoders import Autoencoder

__all__ = ["SHAPED", "alike", "autoencoder_problems", "changes_of_samples"]

_SAME = ("class", "sha256", "input_range", "scaling.mean", "scaling.std")
SHAPED = ("shape", "num_classes")  # of a data set


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
    changed = _changes_of_latents(dataset.latents_of or {}, autoencoder.manifest)
    source = _entry(dataset.latents_of or {}, "scaling.source")
    if changed:
        told = f", where {source} tells the former" if source and "scaling." in " ".join(changed) else ""
        yield (
            f"autoencoder: is another than the latents are of ({'; '.join(changed)}{told}); give the one that made "
            "them, or prepare the data anew"
        )
    channels = len(autoencoder.manifest["scaling"]["mean"])
    if channels != dataset.shape[0]:
        yield (
            f"autoencoder: has latents of {channels} channels, and the data have {dataset.shape[0]}; give the one that "
            "made them"
        )


def changes_of_samples(before: Dataset, after: Dataset, *, shaped: Sequence[str] = SHAPED) -> list[str]:
    """List in what the samples of two data sets differ, as ``num_classes 10 -> 11``, so that no model is of both.

    What one of them does not tell of the autoencoder of its latents cannot be compared.

    Args:
        before: as a trained model tells of it.
        after: the other.
        shaped: which of shape and number of classes are compared.
    """
    changed = []
    for name in (*shaped, "data_are_images"):
        then, now = getattr(before, name), getattr(after, name)
        if not alike(then, now):
            changed.append(f"{name} {then} -> {now}")
    told = after.latents_of or {}
    known = [key for key in _SAME if _entry(told, key) is not None]
    latents = _changes_of_latents(before.latents_of or {}, told, known)
    return changed + [f"latents_of.{line}" for line in latents]


def _changes_of_latents(before: Mapping[str, Any], after: Mapping[str, Any], keys: Sequence[str] = _SAME) -> list[str]:
    """List what manifests of two autoencoders tell differently of latents, as far as the first tells it."""
    pairs = [(key, _entry(before, key), _entry(after, key)) for key in keys]
    return [f"{key} {then!r} -> {now!r}" for key, then, now in pairs if then is not None and not alike(then, now)]


def _entry(manifest: Mapping[str, Any], path: str) -> Any:
    found: Any = manifest
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def alike(first: Any, second: Any, tolerance: float = 1e-6) -> bool:
    """Whether two values of JSON are the same, numbers but for the rounding of who computed them."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(alike(first[key], second[key], tolerance) for key in first)
    if isinstance(first, Sequence) and isinstance(second, Sequence) and not isinstance(first, str):
        return len(first) == len(second) and all(map(partial(alike, tolerance=tolerance), first, second))
    if isinstance(first, int | float) and isinstance(second, int | float):
        return math.isclose(first, second, rel_tol=tolerance, abs_tol=1e-9)
    return bool(first == second)
