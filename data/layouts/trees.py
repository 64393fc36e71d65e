"""The trees that EDM2's tool writes and REPA's and DeepFlow's programs read: numbered files, with dataset.json.

``00000/img-mean-std-00000000.npy``: an autoencoder's moments, float32 (2C, H, W), mean and standard deviation.
``00000/img00000000.png``: an image. The number in a name, not its place in the listing, joins what belongs together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.errors import DataError
from pathline.data.decode import decode
from pathline.data.layouts.arrays import NPY_FLOATS, read_array
from pathline.data.layouts.base import check_deviations, check_label
from pathline.data.layouts.stores import Store, few, missing_below
from pathline.data.sources.keys import TABLE, entries_of, of_folders

__all__ = [
    "IMAGE_FILES",
    "MOMENT_FILES",
    "check_gaps",
    "labels_of",
    "numbered",
    "read_image",
    "read_moments",
    "same_keys",
]

MOMENT_FILES = re.compile(r"(?:.*/)?img-mean-std-(\d{8})\.npy")
IMAGE_FILES = re.compile(r"(?:.*/)?img(\d{8})\.png")
_BYTES_A_LABEL = 1024  # of dataset.json, for one file's name and number


def numbered(store: Store, pattern: re.Pattern[str]) -> dict[int, str]:
    """Return the files of a store by the number in their names, sorted by it; dataset.json is none of them.

    Raises:
        DataError: no file, two of one number, or a file of another name; names the files.
    """
    found: dict[int, str] = {}
    strays = []
    for name in store.sizes:
        match = pattern.fullmatch(name)
        if match is None:
            strays += [] if name == TABLE else [name]
        elif found.setdefault(int(match[1]), name) != name:
            raise DataError(f"got {name} beside {found[int(match[1])]} in {store.root}, expected each number once")
    wanted = pattern.pattern.removeprefix("(?:.*/)?")
    if strays:
        raise DataError(f"got {few(strays)} in {store.root}, expected files {wanted} alone; move them elsewhere")
    if not found:
        raise DataError(f"got no files in {store.root}, expected {wanted}; check data.path")
    return dict(sorted(found.items()))


def check_gaps(found: Mapping[int, str], place: Path) -> None:
    """Check that files are numbered 0, 1, … without a gap, as their programs do.

    Raises:
        DataError: they are not; names the first numbers that are missing.
    """
    if missing := missing_below(found):
        count = max(found) + 1
        named = ", ".join(map(str, missing)) + ", …" * (count - len(found) > len(missing))
        raise DataError(
            f"got {len(found)} files in {place} with numbers up to {max(found)}, expected {count}; make {named} anew"
        )


def same_keys(first: Mapping[int, str], second: Mapping[int, str], places: tuple[str, str]) -> None:
    """Check that two sets of files have the same numbers.

    Args:
        first: file by number.
        second: the same.
        places: where each lies, for errors.

    Raises:
        DataError: they have not; names the files without a partner, of both.
    """
    alone = [
        f"{few(files[number] for number in files.keys() - others.keys())} in {place}"
        for files, others, place in ((first, second, places[0]), (second, first, places[1]))
        if files.keys() - others.keys()
    ]
    if alone:
        raise DataError(f"got files without a partner of their number: {', and '.join(alone)}; make what is missing")


def labels_of(store: Store, files: Iterable[str], num_classes: int) -> Tensor:
    """Return the labels (N,) of files, from dataset.json or, without one, from the sorted names of class folders.

    Without classes dataset.json, if there is one, has to tell of the same files nevertheless.

    Raises:
        DataError: labels that are missing, null, there twice, of files that are not there, or out of range; another
            number of class folders than of classes, or an empty one. Names the files.
    """
    names = list(files)
    if TABLE in store.sizes:
        return _of_table(store, names, num_classes)
    if not num_classes:
        return torch.zeros(len(names), dtype=torch.int64)
    keys = sorted(names)
    # folders that only count files, as 00000, are no classes
    counting = any("/" not in key or re.fullmatch(r"\d{5}/.*", key) for key in keys)
    if counting:
        raise DataError(f"got no {TABLE} in {store.root}, nor a folder a class; add it, or set num_classes=0")
    labels, classes = of_folders(keys, str(store.root), store.folders)
    if len(classes) != num_classes:
        raise DataError(
            f"got {len(classes)} class folders in {store.root} for num_classes {num_classes}, expected one a class: "
            "folders may be missing; set num_classes if none is"
        )
    given = dict(zip(keys, labels or [], strict=True))
    return torch.tensor([given[name] for name in names])


def _of_table(store: Store, names: Sequence[str], num_classes: int) -> Tensor:
    place = store.root / TABLE
    if store.sizes[TABLE] > _BYTES_A_LABEL * (len(names) + 4):
        raise DataError(
            f"got {place} of {store.sizes[TABLE]} bytes for {len(names)} files; it is no list of their labels"
        )
    entries = entries_of(store.read(TABLE), names, str(store.root))
    if not num_classes:
        return torch.zeros(len(names), dtype=torch.int64)
    if entries is None:
        raise DataError(f"got {place} without labels (null), as of images of which one had none; set num_classes=0")
    pairs = zip(entries, names, strict=True)
    return torch.tensor([check_label(label, num_classes, str(store.root / name)) for label, name in pairs])


def read_moments(store: Store, name: str) -> NDArray[np.generic]:
    """Return moments (2C, H, W) as stored.

    Raises:
        DataError: the file is damaged or holds something else.
    """
    values = read_array(store.read(name), str(store.root / name), NPY_FLOATS)
    if values.ndim != 3 or not values.size or values.shape[0] % 2:
        raise DataError(f"got {store.root / name} of shape {values.shape}, expected (2C, H, W)")
    check_deviations(values, str(store.root / name))
    return values


def read_image(store: Store, name: str) -> NDArray[np.uint8]:
    """Return an image, uint8 (3, R, R) or of whatever sides it has.

    Raises:
        DataError: it cannot be decoded; names the file.
    """
    pixels = np.asarray(decode(store.read(name), str(store.root / name)))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
