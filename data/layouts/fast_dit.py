"""Features of fast-DiT: a latent and a label in a .npy file each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pathline.core.errors import DataError
from pathline.data.base import Batch, registry
from pathline.data.layouts.arrays import NPY_FLOATS, NPY_INTEGERS, read_array
from pathline.data.layouts.base import LatentScaling, StoredLatents, check_label, check_options
from pathline.data.layouts.files import check_workers, hash_of_files, read_all
from pathline.data.layouts.stores import Folder, Store, few
from pathline.data.layouts.trees import check_gaps, numbered, same_keys
from pathline.data.sources.files import as_path

__all__ = ["FastDit"]

FACTOR = 0.18215  # by which its program scales what it stores
_FILES = re.compile(r"(\d+)\.npy")


@registry.register("fast-dit")
class FastDit(StoredLatents):
    """fast-DiT's folders ``…_features`` and ``…_labels``, each with the files ``0.npy``, ``1.npy``, … .

    Files are joined by their number, where that program joins by the place in a listing sorted as text. Its latents,
    (1, C, H, W), are samples of the posterior, drawn once, scaled by 0.18215 and flipped or not when they were made:
    they are taken as they are.

    Args:
        path: folder that has one folder ``…_features`` and one ``…_labels``, as ``imagenet256_features``.
        num_classes: class labels 0 … num_classes − 1; 0 for data without, whose folder of labels may be absent.
        workers: threads that read files.

    Raises:
        DataError: files that are missing, beside others, or not what they should be; names them.
        InputError: an option out of range.
        InputTypeError: an option of another type.
    """

    name, kind = "fast-dit", "latents"

    def __init__(self, path: str, *, num_classes: int = 1000, workers: int = 4) -> None:
        check_options(num_classes)
        self.num_classes, self._workers = num_classes, check_workers(workers)
        root = as_path(path)
        self._features, features = _files(root, "_features")
        self._names = list(features.values())
        partner = self._features.root.name.removesuffix("_features") + "_labels"
        if num_classes or (root / partner).is_dir():
            self._labels, labels = _files(root, "_labels" if num_classes else partner)
            same_keys(features, labels, (self._features.root.name, self._labels.root.name))
        check_gaps(features, self._features.root)
        self._check_sizes()
        channels, height, width = self._latent(self._names[0]).shape
        self.shape = (channels, height, width)
        zeros = (0.0,) * channels
        self._set_scaling(LatentScaling(zeros, (1.0,) * channels, "scaled before they were stored"))
        made = {"mean": list(zeros), "std": [1 / FACTOR] * channels, "source": "fast-DiT's extraction"}
        self.latents_of = {"input_range": [-1, 1], "scaling": made}

    def __len__(self) -> int:
        return len(self._names)

    def _check_sizes(self) -> None:
        sizes = self._features.sizes
        wrong = [name for name in self._names if sizes[name] != sizes[self._names[0]]]
        if wrong:
            raise DataError(f"got {few(wrong)} in {self._features.root} of another size than {self._names[0]}")

    def _stored(self, index: NDArray[np.int64]) -> Batch:
        files = [self._names[row] for row in index]
        values = read_all(self._latent, files, self._features.root.joinpath, self.shape, self._workers)
        if not self.num_classes:
            return {"data": values, "label": torch.zeros(len(files), dtype=torch.int64)}
        read = partial(_label, self._labels, self.num_classes)
        label = read_all(read, files, self._labels.root.joinpath, (), self._workers)
        return {"data": values, "label": label.long()}

    def _latent(self, name: str) -> NDArray[np.generic]:
        place = self._features.root / name
        values = read_array(self._features.read(name), str(place), NPY_FLOATS)
        if values.ndim == 4 and len(values) == 1:
            values = values[0]
        if values.ndim != 3 or not values.size:
            raise DataError(f"got {place} of shape {values.shape}, expected (1, C, H, W)")
        return values

    @cached_property
    def _contents(self) -> Mapping[str, Any]:
        labels = {"labels_sha256": hash_of_files(self._labels, self._names)} if self.num_classes else {}
        return {
            "sha256": hash_of_files(self._features, self._names),
            **labels,
            "sha256_of": "names and sizes of the files, and the contents of 64, spread evenly; of labels likewise",
        }


def _files(root: Path, ending: str) -> tuple[Store, dict[int, str]]:
    """Return the one folder of an ending, and its files by number."""
    found = sorted(folder for folder in root.glob(f"*{ending}") if folder.is_dir())
    if len(found) != 1:
        names = few(folder.name for folder in found) or "none"
        raise DataError(f"got {names} of the folders *{ending} in {root}, expected one; check data.path")
    store = Folder(found[0])
    return store, numbered(store, _FILES)


def _label(store: Store, num_classes: int, name: str) -> NDArray[np.int64]:
    place = str(store.root / name)
    values = read_array(store.read(name), place, NPY_INTEGERS)
    if values.size != 1:
        raise DataError(f"got {place} of shape {values.shape}, expected one label")
    return np.asarray(check_label(int(values.reshape(-1)[0]), num_classes, place))
