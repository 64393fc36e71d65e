"""What a trained model tells of itself and of its data, so that samples are drawn without the data at hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pathline.core.config import Configuration, resolve
from pathline.core.errors import CheckpointError, DataError
from pathline.core.sections import Natural, Positive
from pathline.data import Batch, Dataset
from pathline.data.base import Indices
from pathline.training import checkpoints
from pathline.training.exported import read_record

__all__ = ["KEPT", "Described", "Trained", "read_trained", "samples_of"]

KEPT = ("configuration", "data", "statistics", "samples")
"""Of a checkpoint's state, what is written beside exported weights."""


class _Samples(BaseModel):
    """What of a data set decides over samples of a model of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    shape: tuple[Positive, Positive, Positive]
    num_classes: Natural
    data_are_images: bool = Field(strict=True)
    latents_of: dict[str, Any] | None


def samples_of(dataset: Dataset) -> dict[str, Any]:
    """Return what ``Described`` needs of a data set; fit for JSON."""
    told = None if dataset.latents_of is None else dict(dataset.latents_of)
    return {
        "shape": list(dataset.shape),
        "num_classes": dataset.num_classes,
        "data_are_images": dataset.data_are_images,
        "latents_of": told,
    }


class Described(Dataset):
    """A data set as a trained model tells of it: its samples' shape and kind, and no sample.

    Args:
        state: of a checkpoint, or of the file beside exported weights.
        where: that is, for errors.

    Raises:
        CheckpointError: what it tells cannot be.
    """

    def __init__(self, state: Mapping[str, Any], where: Path | None = None) -> None:
        try:
            told = _Samples.model_validate(state["samples"])
        except (ValidationError, KeyError) as error:
            raise CheckpointError(
                f"got {where or 'a trained model'}, which tells of samples which cannot be ({error}); use another one"
            ) from error
        self.shape, self.num_classes = told.shape, told.num_classes
        self.data_are_images, self.latents_of = told.data_are_images, told.latents_of
        self._manifest, self._statistics = dict(state.get("data") or {}), dict(state.get("statistics") or {})

    def __len__(self) -> int:
        return int(self._manifest.get("count", 0))

    def batch(self, indices: Indices) -> Batch:
        """Refuse: there are no samples; raises DataError."""
        del indices
        raise DataError("got a data set of which only a trained model tells; build the one that it was trained on")

    @property
    def statistics(self) -> dict[str, Any]:
        """See ``Dataset``."""
        return self._statistics

    @property
    def manifest(self) -> dict[str, Any]:
        """See ``Dataset``."""
        return self._manifest


class Trained(NamedTuple):
    """A trained model without its weights.

    Attributes:
        configuration: that it was trained with.
        data: as it tells of them; None of older ones, which do not.
    """

    configuration: Configuration
    data: Described | None


def read_trained(path: Path) -> Trained:
    """Return what a checkpoint, verified, or the file beside exported weights tells.

    Raises:
        CheckpointError: damaged, or not there.
        ConfigurationError: it names what is not installed here.
    """
    state = read_record(path) if path.is_file() else checkpoints.read_state(path)
    return Trained(resolve(state["configuration"]), Described(state, path) if "samples" in state else None)
