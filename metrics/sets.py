"""References that are images: streamed once through each feature space.

N images of the set, K whose features are kept, D features.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pathline.core.draws import Draws
from pathline.core.errors import DataError
from pathline.data import Dataset
from pathline.encoders.sources import images_of
from pathline.metrics.features import Features
from pathline.metrics.moments import Moments, Statistics
from pathline.metrics.real import Reference
from pathline.metrics.samples import Samples

__all__ = ["KEPT", "Collected", "ImageReference", "collect"]

KEPT = 10_000  # images whose features are kept for precision and recall, and for kernel distances: ADM's number
_BATCH = 64


@dataclass(frozen=True)
class Collected:
    """What a feature space makes of a set.

    Attributes:
        moments: of each output that distances are computed of.
        vectors: the output ``features`` of K images, (K, D) in float32: the first K of a permutation of the set.
    """

    moments: Mapping[str, Moments]
    vectors: Tensor


def collect(features: Features, batches: Iterator[Tensor], count: int, kept: int, seed: int = 0) -> Collected:
    """Stream N images (n, C, H, W) through a feature space, once.

    Args:
        features: the space.
        batches: of all images, in their order.
        count: N.
        kept: K, or all where there are fewer.
        seed: of the permutation that they are the first of.

    Raises:
        DataError: another number of images.
    """
    kept = min(kept, count)
    place = torch.empty(count, dtype=torch.int64)  # of each image in the permutation
    place[torch.from_numpy(Draws(seed).permutation("reference vectors", count))] = torch.arange(count)
    moments = {output: Moments() for output in features.sizes if output != "logits"}
    vectors, first = torch.empty(kept, features.sizes["features"]), 0
    for images in batches:
        places = place[first : first + len(images)]
        first += len(images)
        if first > count:
            break
        found = features.outputs(images)
        for output, moment in moments.items():
            moment.update(found[output])
        rows = found["features"].cpu().to(vectors)
        vectors[places[places < kept]] = rows[places < kept]
    if first != count:
        raise DataError(f"got {'more' if first > count else first} images, expected {count}; the set has changed")
    return Collected(moments, vectors)


class ImageReference(Reference):
    """Images of a data set, of a file or of a folder, streamed through a feature space when first asked for.

    Args:
        manifest: what they are.
        shape: (C, H, W) of one.
        count: N.
        batches: gives all images from the first on, whenever it is called.
        num_classes: number of their labels; None where there are none.
        hashed: whether the manifest gets the SHA-256 of the images, which are levels, one after the other.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        shape: tuple[int, int, int],
        count: int,
        batches: Callable[[], Iterator[Tensor]],
        num_classes: int | None = None,
        *,
        hashed: bool = False,
    ) -> None:
        self.shape, self.count, self.num_classes = shape, count, num_classes
        self._manifest, self._batches, self._hashed = dict(manifest), batches, hashed
        self._seen: list[tuple[Features, int, Collected]] = []

    @classmethod
    def of_data(cls, dataset: Dataset) -> ImageReference:
        """Take the images of a data set: its ``data``, or the ``image`` beside latents.

        Raises:
            DataError: data that come without images.
        """
        first = images_of(dataset.batch([0]), dataset)

        def batches() -> Iterator[Tensor]:
            for start in range(0, len(dataset), _BATCH):
                indices = range(start, min(start + _BATCH, len(dataset)))
                yield images_of(dataset.batch(indices), dataset)

        manifest = {"kind": "data set", **dataset.manifest}
        channels, height, width = first.shape[1:]
        return cls(manifest, (channels, height, width), len(dataset), batches, dataset.num_classes or None)

    @classmethod
    def of_samples(cls, samples: Samples) -> ImageReference:
        """Take images on disk: an ``.npz`` with ``arr_0``, a folder of shards or a folder of images of one size."""
        manifest = {"kind": "images", "path": samples.path.name, "count": samples.count, "shape": list(samples.shape)}
        return cls(
            manifest,
            samples.shape,
            samples.count,
            lambda: (images for images, _ in samples.batches(_BATCH)),
            hashed=True,
        )

    @property
    def manifest(self) -> Mapping[str, Any]:  # type: ignore[override]  # its hash is known after a pass
        """What the images are; where they are hashed and nobody has gone through them yet, this does."""
        if self._hashed and "sha256" not in self._manifest:
            deque(self.batches(), maxlen=0)
        return self._manifest

    def batches(self) -> Iterator[Tensor]:
        """Yield all images, (n, C, H, W).

        Raises:
            DataError: other images than before.
        """
        seen = hashlib.sha256()
        for images in self._batches():
            if self._hashed:
                seen.update(images.contiguous().numpy().data)
            yield images
        if self._hashed and self._manifest.setdefault("sha256", seen.hexdigest()) != seen.hexdigest():
            raise DataError(f"got other images in {self._manifest.get('path')} than before; the set has changed")

    def prepare(self, features: Features, output: str, vectors: int = 0) -> None:
        """See ``Reference``."""
        if vectors > self.count:
            raise DataError(f"got a reference of {self.count} images, expected at least {vectors}; give more")

    def statistics(self, features: Features, output: str) -> Statistics:
        """See ``Reference``."""
        return self._collected(features, 0).moments[output].statistics

    def vectors(self, features: Features, output: str, count: int | None = None) -> Tensor:
        """See ``Reference``; of the first ``count`` images of a permutation."""
        if output != "features":
            raise DataError(f"got {output} of single images asked for; only the output features is kept")
        wanted = self.count if count is None else min(count, self.count)
        return self._collected(features, wanted).vectors[:wanted]

    def _collected(self, features: Features, kept: int) -> Collected:
        for space, held, found in self._seen:
            if space is features and held >= kept:
                return found
        kept = max(kept, min(KEPT, self.count))
        found = collect(features, self.batches(), self.count, kept)
        self._seen = [entry for entry in self._seen if entry[0] is not features] + [(features, kept, found)]
        return found
