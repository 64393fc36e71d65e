"""The tree of REPA (arXiv:2410.06940) and DeepFlow (arXiv:2503.14494): images beside moments of their latents."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.errors import DataError, InputTypeError
from pathline.data.base import Batch, registry
from pathline.data.layouts.base import LatentScaling, StoredLatents, check_options
from pathline.data.layouts.files import check_workers, hash_of_files, read_all
from pathline.data.layouts.stores import Store, few, store_at
from pathline.data.layouts.trees import (
    IMAGE_FILES,
    MOMENT_FILES,
    check_gaps,
    labels_of,
    numbered,
    read_image,
    read_moments,
    same_keys,
)
from pathline.data.sources.files import as_path

__all__ = ["MomentTree", "Repa"]


class MomentTree(StoredLatents):
    """Moments in numbered files of one store.

    Args:
        store: where they lie.
        num_classes: class labels 0 … num_classes − 1; 0 for data without.
        workers: threads that read files.

    Raises:
        DataError: files or labels that are missing, beside others, or of another size; names them.
    """

    kind = "moments"

    def __init__(self, store: Store, num_classes: int, workers: int) -> None:
        self.num_classes, self.workers, self._store = num_classes, check_workers(workers), store
        self._names = numbered(store, MOMENT_FILES)
        self._files = list(self._names.values())
        sizes = {store.sizes[name] for name in self._files}
        first = read_moments(store, self._files[0])
        self._moments_shape = first.shape
        if len(sizes) > 1:
            wrong = [name for name in self._files if store.sizes[name] != store.sizes[self._files[0]]]
            raise DataError(
                f"got {few(wrong)} in {store.root} of another size than {self._files[0]}; they are truncated or of "
                "other images: make them anew"
            )
        self._labels = labels_of(store, self._files, num_classes)
        check_gaps(self._names, store.root)
        channels, height, width = first.shape
        self.shape = (channels // 2, height, width)

    def __len__(self) -> int:
        return len(self._files)

    def _stored(self, index: NDArray[np.int64]) -> Batch:
        files = [self._files[row] for row in index]
        read = partial(read_moments, self._store)
        values = read_all(read, files, self._store.root.joinpath, self._moments_shape, self.workers)
        return {"data": values, "label": self._labels[torch.from_numpy(index)]}

    @cached_property
    def _contents(self) -> Mapping[str, Any]:
        return {
            "sha256": hash_of_files(self._store, self._files, self._labels if self.num_classes else None),
            "sha256_of": "names and sizes of the files of moments, the contents of 64, spread evenly, and labels",
        }


@registry.register("repa")
class Repa(MomentTree):
    """REPA's and DeepFlow's tree: ``images/00000/img00000000.png`` and ``vae-sd/00000/img-mean-std-00000000.npy``.

    Files are joined by the number in their names, where those programs join by the place in a sorted listing: a file
    without its partner is an error, and so is one of another name. ``images`` may be absent unless it is asked for.
    Labels are those of ``vae-sd/dataset.json``, or the sorted names of class folders. The moments are unscaled; a
    sample of the posterior is drawn at each visit, as REPA does. The tree holds no flipped copies, and a flipped latent
    is none of a flipped image, so that there are no flips.

    Args:
        path: folder of ``images`` and ``vae-sd``.
        num_classes: class labels 0 … num_classes − 1; 0 for data without labels.
        scale: factor of the drawn latents; 0.18215 is that of Stable Diffusion's first autoencoders (arXiv:2112.10752).
        images: whether batches have an ``image`` as well, uint8, for encoders to align to.
        workers: threads that read files.

    Raises:
        DataError: files or labels that are missing, beside others, or not what they should be; names them.
        InputError: an option out of range.
        InputTypeError: an option of another type.
    """

    name = "repa"

    def __init__(
        self, path: str, *, num_classes: int = 1000, scale: float = 0.18215, images: bool = False, workers: int = 4
    ) -> None:
        check_options(num_classes, scale=scale)
        if not isinstance(images, bool):
            raise InputTypeError(f"got images {images!r}, expected true or false")
        root = as_path(path)
        super().__init__(store_at(root / "vae-sd"), num_classes, workers)
        self._set_scaling(LatentScaling.by(scale, self.shape[0], "option scale"), input_range=[-1, 1])
        self.images = images
        self._pictures = store_at(root / "images") if images or (root / "images").exists() else None
        if self._pictures is not None:
            pictures = numbered(self._pictures, IMAGE_FILES)
            same_keys(self._names, pictures, ("vae-sd", "images"))
            self._picture_files = [pictures[number] for number in self._names]
            self._image_shape = read_image(self._pictures, self._picture_files[0]).shape
            self._check_sides(self._pictures.root / self._picture_files[0])

    def _check_sides(self, first: Path) -> None:
        """Check that images may be those of the latents; each is held to the first one's shape when it is read."""
        (height, width), (_, h, w) = self._image_shape[1:], self.shape
        if height != width or h != w or height % h:
            raise DataError(
                f"got {first} of {width} x {height} pixels beside latents of {w} x {h}, expected squares, of a whole "
                "number of pixels along a side of a latent's; make the latents of these images"
            )

    def _stored(self, index: NDArray[np.int64]) -> Batch:
        batch = super()._stored(index)
        return {**batch, "image": self._image(index)} if self.images else batch

    def _image(self, index: NDArray[np.int64]) -> Tensor:
        assert self._pictures is not None  # they were asked for
        files = [self._picture_files[row] for row in index]
        read = partial(read_image, self._pictures)
        return read_all(read, files, self._pictures.root.joinpath, self._image_shape, self.workers)
