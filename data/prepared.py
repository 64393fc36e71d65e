"""Data that ``python -m pathline.data.prepare`` has packed: read in place, batch by batch, as the manifest says.

N samples; C, h, w the shape of a latent; T tokens of width D.
"""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.draws import BoundDraws
from pathline.core.errors import DataError, InputError, InputTypeError
from pathline.data.base import Batch, Dataset, Indices, as_indices, registry
from pathline.data.prepare.columns import FEATURES, FLIPPED
from pathline.data.prepare.files import Files
from pathline.data.prepare.manifest import Features, read_manifest
from pathline.data.prepare.statistics import Spread
from pathline.data.visits import FLIPS, NOISE, flips, posterior_noise

__all__ = ["Prepared"]

PLACES = "places"  # of what was loaded: where each sample's rows lie, if they come in the order of several shards


@registry.register("prepared")
class Prepared(Dataset):
    """A folder of prepared data: latents scaled to model space, or images in [−1, 1].

    At a visit of training a latent is drawn from its posterior, and encoded from the image or its mirror image, as
    chance has it; with it go its image and its features. ``batch`` gives the posterior's mean, and mirrors nothing.

    Args:
        path: of the folder.
        flip: whether half of the visits are of mirror images; None where the folder was prepared with --flip. Pixels
            can be mirrored in any case, latents only if those of mirror images are stored.
        posterior: ``draw`` a latent at each visit, or take its ``mean``; without effect where none is stored.
        images: whether batches have an ``image`` beside latents, uint8, for encoders to align to.
        verify: whether all files are read once and compared with their hashes.

    Attributes:
        told: the manifest.

    Raises:
        DataError: a manifest that cannot be read or contradicts itself, or shards that it does not describe.
        InputError: an option that the folder has nothing for.
        InputTypeError: an option of another type.
    """

    def __init__(
        self,
        path: str,
        *,
        flip: bool | None = None,
        posterior: Literal["draw", "mean"] = "draw",
        images: bool = False,
        verify: bool = False,
    ) -> None:
        if not isinstance(path, str | Path):
            raise InputTypeError(f"got path {path!r}, expected a text")
        self.path = Path(path).expanduser()
        self.told = told = read_manifest(self.path)
        self.flip = told.request.flip if flip is None else flip
        self._check_options(posterior, images)
        self.files = Files(self.path, told, verify=verify)
        self.data_are_images, self.images = told.latent_kind == "images", images
        self.draws_posterior = told.latent_kind == "moments" and posterior == "draw"
        channels, height, width = told.shape
        self.shape, self.num_classes = (channels, height, width), len(told.class_names)
        self.latents_of = told.request.autoencoder
        centre, unit = ([0.0] * channels, [1.0] * channels) if told.scaling is None else told.scaling
        self._centre, self._unit = (torch.tensor(values)[:, None, None] for values in (centre, unit))
        self._features: list[str] = []

    def _check_options(self, posterior: str, images: bool) -> None:
        told = self.told
        if not all(isinstance(value, bool) for value in (self.flip, images)) or posterior not in ("draw", "mean"):
            raise InputTypeError(
                f"got flip {self.flip!r}, posterior {posterior!r}, images {images!r}; expected true or false, draw or "
                "mean, true or false"
            )
        if self.flip and told.latent_kind != "images" and told.main + FLIPPED not in told.columns:
            raise InputError(
                f"got flip for {self.path}, in which no latents of mirror images are stored; prepare the data with "
                "--flip, or set flip=false"
            )
        if images and (told.latent_kind == "images" or "images" not in told.columns):
            has = "whose data are images" if told.latent_kind == "images" else "which has latents alone"
            raise InputError(f"got images for {self.path}, {has}; leave it out, or prepare the data with --images")

    def __len__(self) -> int:
        return self.told.count

    def batch(self, indices: Indices) -> Batch:
        """Return data (N, C, h, w), of posteriors the mean, labels and indices, and what else was asked for."""
        return self._finished(self._stored(indices, None))

    def load(self, indices: Indices, draws: BoundDraws) -> Batch:
        """Return rows as they are stored, each of an image or its mirror image, and the noise of posteriors.

        The noise is drawn here, and not in ``finish``: a thread then does it ahead of training.
        """
        stored = self._stored(indices, flips(draws).numpy() if self.flip else None)
        return {**stored, NOISE: posterior_noise(draws, self.shape)} if self.draws_posterior else stored

    def finish(self, loaded: Batch, draws: BoundDraws) -> Batch:
        """Bring rows into order, draw latents as mean + std·noise and scale them, or bring images to [−1, 1]."""
        del draws
        return self._finished(loaded)

    def _stored(self, indices: Indices, flipped: NDArray[np.bool_] | None) -> Batch:
        index = as_indices(indices, len(self))
        found = self.files.find(index.numpy(), flipped)
        stored = {"label": self.files.labels.index_select(0, index), "index": index}
        stored |= {name: self.files.gather(column, found) for name, column in self._columns.items()}
        if flipped is not None and (self.data_are_images or self.images):
            stored[FLIPS] = torch.from_numpy(flipped)
        return stored if found.places is None else {**stored, PLACES: found.places}

    @property
    def _columns(self) -> dict[str, str]:
        """The columns that batches are made of, by their names there."""
        images = {"image": "images"} if self.images else {}
        return {"data": self.told.main, **images, **{name: name for name in self._features}}

    def _finished(self, stored: Batch) -> Batch:
        batch = {name: values for name, values in stored.items() if name not in (NOISE, FLIPS, PLACES)}
        if PLACES in stored:
            batch |= {name: batch[name].index_select(0, stored[PLACES]) for name in self._columns}
        for name in ("data", "image") if FLIPS in stored else ():
            if name in batch and batch[name].dtype == torch.uint8:
                batch[name] = torch.where(stored[FLIPS][:, None, None, None], batch[name].flip(3), batch[name])
        return {**batch, "data": self._in_model_space(batch["data"], stored.get(NOISE))}

    def _in_model_space(self, data: Tensor, noise: Tensor | None) -> Tensor:
        if self.data_are_images:
            return data.float() / 127.5 - 1
        values = data.float()
        if self.told.latent_kind == "moments":
            mean, std = values.chunk(2, dim=1)
            values = mean if noise is None else mean + std * noise
        if self._centre.device != data.device:  # sent once, since the host waits for it
            self._centre, self._unit = self._centre.to(data.device), self._unit.to(data.device)
        return (values - self._centre) / self._unit

    def bring_features(self, name: str) -> tuple[str, Features]:
        """Let batches have the stored tokens of an encoder, (N, T, D).

        Returns:
            Their name in batches, and what made them.

        Raises:
            DataError: none are stored, or none of mirror images, which this data set gives.
        """
        column = FEATURES + name
        if name not in self.told.request.encoders:
            known = ", ".join(sorted(self.told.request.encoders)) or "none"
            raise DataError(
                f"got {self.path} without features of {name}, in which there are: {known}; prepare the data with "
                f"--encoder {name}"
            )
        if self.flip and column + FLIPPED not in self.told.columns:
            raise DataError(
                f"got {self.path} without features of mirror images, which the data set gives; prepare the data with "
                "--flip, or set flip=false"
            )
        if column not in self._features:
            self._features.append(column)
        return column, self.told.request.encoders[name]

    @property
    def statistics(self) -> dict[str, Any]:
        """Mean and standard deviation of each channel at visits, and the range of means; from the manifest.

        The variance of a drawn latent is that of the posterior means and the mean of the posterior variances.
        """
        channels, names = self.shape[0], [self.told.main]
        if self.flip and not self.data_are_images:
            names.append(self.told.main + FLIPPED)
        spread = reduce(Spread.merged, (Spread.from_channels(self.told.statistics[name]) for name in names))
        mean, squares, low, high = (
            np.array(values) for values in (spread.mean, spread.squares, spread.low, spread.high)
        )
        variance = squares[:channels] / max(spread.count - 1, 1)
        if self.draws_posterior:
            variance += squares[channels:] / spread.count + mean[channels:] ** 2
        centre, unit = (values.flatten().double().cpu().numpy() for values in (self._centre, self._unit))
        scaled = [(values[:channels] - centre) / unit for values in (mean, low, high)]
        return {
            "mean": scaled[0].tolist(),
            "std": (np.sqrt(variance) / unit).tolist(),
            "range": [float(scaled[1].min()), float(scaled[2].max())],
        }

    @property
    def manifest(self) -> dict[str, Any]:
        """Name, kind, count, shape, classes and resolution; the hash stands for the folder's manifest, and all data."""
        return {
            "name": "prepared",
            "kind": self.told.latent_kind,
            "count": len(self),
            "shape": list(self.shape),
            "num_classes": self.num_classes,
            "resolution": self.told.request.resolution,
            "sha256": self.told.sha256,
        }
