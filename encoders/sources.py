"""Where training takes encoder tokens from: an encoder that runs beside it, or a file of what one gave.

N images, T tokens on a grid of rows and columns, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathline.core.draws import send
from pathline.core.errors import DataError
from pathline.data.base import Batch, Dataset
from pathline.data.features import FeatureFile, encoder_changes
from pathline.data.prepare.manifest import read_manifest
from pathline.data.prepared import Prepared
from pathline.encoders.base import Encoder
from pathline.encoders.networks import hash_of_file, hash_of_tensors

__all__ = ["Cached", "Computed", "Source", "hash_of_images", "images_of"]

_PROBED = 64  # samples whose images are compared with those that features were made of
_SLACK = 1e-3  # of values in [−1, 1], for the rounding of what made them


class Source(ABC):
    """Encoder tokens of a data set's batches.

    Attributes:
        dim: D.
        grid: rows and columns of the tokens.
        manifest: which encoder it is, with hashes; a resumed run must find the same.
    """

    dim: int
    grid: tuple[int, int]
    manifest: Mapping[str, Any]

    @abstractmethod
    def tokens(self, batch: Batch, device: torch.device) -> Tensor:
        """Return the tokens of a batch, (N, T, D) on a device."""

    def to(self, device: torch.device) -> None:
        """Move to the device of training what there is to move."""
        return


class Computed(Source):
    """An encoder that runs on each batch.

    Args:
        encoder: built.
        dataset: whose first image it is tried on, by its shape and range.

    Raises:
        DataError: the data have no images, or floats outside [−1, 1].
        InputError: images that the encoder does not take.
    """

    def __init__(self, encoder: Encoder, dataset: Dataset) -> None:
        first = images_of(dataset.batch([0]), dataset)
        encoder.check(first)
        _check_range(first)
        self.encoder, self.dataset = encoder, dataset
        self.dim, self.grid, self.manifest = encoder.dim, encoder.grid, encoder.manifest

    def tokens(self, batch: Batch, device: torch.device) -> Tensor:
        """Return the tokens of a batch's images, (N, T, D), without gradients."""
        with torch.no_grad():
            found: Tensor = self.encoder(send(images_of(batch, self.dataset), device))
        return found

    def to(self, device: torch.device) -> None:
        """Move the encoder to a device."""
        self.encoder.to(device)


class Cached(Source):
    """Stored tokens: a file that ``python -m pathline.encoders.cache`` wrote, or the folder of prepared data itself.

    Args:
        path: of the file; or of the folder, which must be the data set's own and hold this encoder's features.
        component: the encoder's entry in the configuration; weights that it names are compared by their hash.
        dataset: whose features they must be, by its manifest and, if it has images, by those of 64 samples.

    Raises:
        DataError: no such file, a damaged one, or one of other data or of another encoder, weights or resolution; or
            a file, which knows no mirror images, for data that give some.
        WeightsError: the entry names weights that are not there.
    """

    def __init__(self, path: Path, component: Mapping[str, Any], dataset: Dataset) -> None:
        weights = component.get("weights")
        used = None if weights is None else hash_of_file(Path(weights))
        if path.is_dir():
            self._take_prepared(path, component, used, dataset)
        else:
            self._take_file(path, component, used, dataset)

    def _take_file(self, path: Path, component: Mapping[str, Any], weights: str | None, dataset: Dataset) -> None:
        file = FeatureFile(path)
        if getattr(dataset, "flip", False):
            raise DataError(
                f"got {path}, features without those of mirror images, for data that give some; set flip=false, or "
                "store features of both by python -m pathline.data.prepare --flip --encoder"
            )
        file.check(component, weights, dataset.manifest, hash_of_images(dataset))
        told = file.encoder
        rows, columns = told["grid"]
        self.dim, self.grid = file.shape[2], (rows, columns)
        self.manifest = {**told, "cache": file.sha256}
        self._rows: Callable[[Batch], Tensor] = lambda batch: file.rows(batch["index"])

    def _take_prepared(self, path: Path, component: Mapping[str, Any], weights: str | None, dataset: Dataset) -> None:
        if not isinstance(dataset, Prepared) or read_manifest(path).sha256 != dataset.told.sha256:
            raise DataError(
                f"got the folder {path} of features for data that are not its own; set data to {{name: prepared, path: "
                f"{path}}}, or make a file of features by python -m pathline.encoders.cache"
            )
        column, made = dataset.bring_features(component["name"])
        changed = encoder_changes(made.component, made.encoder, component, weights)
        if changed:
            raise DataError(
                f"got {path} with features of another {component['name']} ({'; '.join(changed)}); set its entry to "
                "what made them, or prepare the data again"
            )
        told = made.encoder
        (_, self.dim), (rows, columns) = dataset.told.columns[column].shape, told["grid"]
        self.grid, self.manifest = (rows, columns), {**told, "cache": dataset.told.sha256}
        self._rows = lambda batch: batch[column]

    def tokens(self, batch: Batch, device: torch.device) -> Tensor:
        """Return the stored tokens of a batch's samples, (N, T, D), in float32."""
        return send(self._rows(batch), device).float()


def images_of(batch: Batch, dataset: Dataset) -> Tensor:
    """Return the images of a data set's batch: its ``image``, or its ``data`` if these are images.

    Raises:
        DataError: neither, as with latents that come without their images, or data of two channels or more than three.
    """
    images = batch.get("image", batch["data"] if dataset.data_are_images else None)
    if images is None or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(
            f"got data of shape {tuple(batch['data'].shape[1:])} without images, which an encoder needs; use a data "
            "set whose batches have an image beside latents, or features that were computed before (cache: PATH)"
        )
    return images


def hash_of_images(dataset: Dataset) -> str | None:
    """Return the SHA-256 of the images of up to 64 samples, spread evenly from the first to the last.

    Returns:
        None for data without images.
    """
    last = len(dataset) - 1
    batch = dataset.batch(sorted({number * last // (_PROBED - 1) for number in range(_PROBED)}))
    if "image" not in batch and not dataset.data_are_images:
        return None
    return hash_of_tensors({"images": images_of(batch, dataset)})


def _check_range(images: Tensor) -> None:
    """Check that floats are in [−1, 1]: others would be encoded as something else, without a word."""
    largest = float(images.abs().max()) if images.is_floating_point() else 0.0
    if largest > 1 + _SLACK:
        raise DataError(
            f"got floats of up to {largest:.4g} for images, expected values in [−1, 1], or uint8 from 0 to 255; scale "
            "them, or set the data set's data_are_images to false where they are none"
        )
