"""The trees that EDM2's tool writes and REPA's and DeepFlow's programs read: numbered files, with dataset.json.

``00000/img-mean-std-00000000.npy``: an autoencoder's moments, float32 (2C, H, W), mean and standard deviation.
``00000/img00000000.png``: an image. The number in a name, not its place in the listing, joins what belongs together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.errors import DataError
from pathline.data.decode import decode
from pathline.data.layouts.arrays import FLOATS, read_array
from pathline.data.layouts.base import check_label
from pathline.data.layouts.stores import Store, few

__all__ = ["IMAGES", "LABELS", "MOMENTS", "labels_of", "numbered", "read_image", "read_moments", "same_keys"]

MOMENTS = re.compile(r"(?:.*/)?img-mean-std-(\d{8})\.npy")
IMAGES = re.compile(r"(?:.*/)?img(\d{8})\.png")
LABELS = "dataset.json"
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
            strays += [] if name == LABELS else [name]
        elif found.setdefault(int(match[1]), name) != name:
            raise DataError(f"got {name} beside {found[int(match[1])]} in {store.root}, expected each number once")
    wanted = pattern.pattern.removeprefix("(?:.*/)?")
    if strays:
        raise DataError(f"got {few(strays)} in {store.root}, expected files {wanted} alone; move them elsewhere")
    if not found:
        raise DataError(f"got no files in {store.root}, expected {wanted}; check data.path")
    return dict(sorted(found.items()))


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

    Raises:
        DataError: labels that are missing, null, of files that are not there, or out of range; names the files.
    """
    names = list(files)
    if not num_classes:
        return torch.zeros(len(names), dtype=torch.int64)
    given = _listed(store, len(names)) if LABELS in store.sizes else _of_folders(store, names)
    without, extra = set(names) - given.keys(), given.keys() - set(names)
    if without or extra:
        parts = [f"no label of {few(without)}"] * bool(without) + [f"labels of {few(extra)}, not there"] * bool(extra)
        raise DataError(f"got {', and '.join(parts)} in {store.root / LABELS}; make both of the same files")
    return torch.tensor([check_label(given[name], num_classes, str(store.root / name)) for name in names])


def _listed(store: Store, count: int) -> dict[str, Any]:
    """Return the labels of dataset.json by file."""
    place = store.root / LABELS
    if store.sizes[LABELS] > _BYTES_A_LABEL * (count + 4):
        raise DataError(f"got {place} of {store.sizes[LABELS]} bytes for {count} files; it is no list of their labels")
    try:
        told = json.loads(store.read(LABELS))
    except (ValueError, RecursionError) as error:
        raise DataError(f"got {place}, which is not JSON: {error}") from error
    labels = told.get("labels") if isinstance(told, dict) else told
    if labels is None:
        raise DataError(f"got {place} without labels (null), as of images of which one had none; set num_classes=0")
    if not isinstance(labels, list) or not all(_is_pair(pair) for pair in labels):
        raise DataError(f'got {place} without a list of pairs {{"labels": [[file, class], …]}}; write it anew')
    return dict(labels)


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)


def _of_folders(store: Store, names: list[str]) -> dict[str, Any]:
    """Return the number of each file's top-level folder; folders that only count files, as 00000, are no classes."""
    tops = {name: name.split("/")[0] if "/" in name else "" for name in names}
    if any(not top or (top.isdigit() and len(top) == 5) for top in tops.values()):
        raise DataError(f"got no {LABELS} in {store.root}, nor a folder a class; add it, or set num_classes=0")
    order = {top: number for number, top in enumerate(sorted(set(tops.values())))}
    return {name: order[top] for name, top in tops.items()}


def read_moments(store: Store, name: str) -> NDArray[np.generic]:
    """Return moments (2C, H, W) as stored.

    Raises:
        DataError: the file is damaged or holds something else.
    """
    values = read_array(store.read(name), str(store.root / name), FLOATS)
    if values.ndim != 3 or not values.size or values.shape[0] % 2:
        raise DataError(f"got {store.root / name} of shape {values.shape}, expected (2C, H, W)")
    return values


def read_image(store: Store, name: str) -> NDArray[np.uint8]:
    """Return an image, uint8 (3, R, R) or of whatever sides it has.

    Raises:
        DataError: it cannot be decoded; names the file.
    """
    pixels = np.asarray(decode(store.read(name), str(store.root / name)))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
