"""Samples in a file each: read by several threads, and held to the shape of the first."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.errors import DataError, InputError, InputTypeError
from pathline.data.layouts.stores import Store

__all__ = ["check_workers", "hash_of_files", "read_all"]

Item = TypeVar("Item")
_READ = 64  # files that a hash reads


def read_all(
    read: Callable[[Item], NDArray[Any]],
    items: Sequence[Item],
    name: Callable[[Item], object],
    shape: Sequence[int],
    workers: int,
) -> Tensor:
    """Read a sample an item.

    Args:
        read: of an item, the array.
        items: N, as names of files.
        name: of an item, for errors.
        shape: that each array must have, S.
        workers: threads that read; 1 reads in the caller's.

    Returns:
        (N, *S), of the type of the first.

    Raises:
        DataError: a sample of another shape or type; names it.
    """
    if workers == 1 or len(items) < 2:
        arrays = [read(item) for item in items]
    else:
        with ThreadPoolExecutor(workers) as pool:  # for each batch anew: threads outlive neither a fork nor the data
            arrays = list(pool.map(read, items))
    for item, array in zip(items, arrays, strict=True):
        if array.shape != tuple(shape) or array.dtype != arrays[0].dtype:
            raise DataError(
                f"got {name(item)} of shape {array.shape} and type {array.dtype}, expected {tuple(shape)} and "
                f"{arrays[0].dtype} as of the others; make it anew"
            )
    return torch.from_numpy(np.stack(arrays)) if arrays else torch.empty(0, *shape)


def check_workers(workers: Any) -> int:
    """Return the number of threads.

    Raises:
        InputError: below 1.
        InputTypeError: no whole number.
    """
    if type(workers) is not int:
        raise InputTypeError(f"got workers {workers!r}, expected a whole number of threads")
    if workers < 1:
        raise InputError(f"got workers {workers}, expected 1 or more threads")
    return workers


def hash_of_files(store: Store, names: Iterable[str], labels: Tensor | None = None) -> str:
    """Return the SHA-256 of the names and sizes of files, of the contents of 64 of them, and of labels (N,) if given.

    The 64 are spread evenly, the first and the last among them: all are too many to be read.
    """
    found, every = hashlib.sha256(), list(names)
    for name in every:
        found.update(f"{name}\0{store.sizes[name]}\n".encode())
    for place in sorted(set(np.linspace(0, len(every) - 1, _READ).round().astype(int).tolist())) if every else ():
        found.update(hashlib.sha256(store.read(every[place])).digest())
    if labels is not None:
        found.update(labels.numpy().astype("<i8").tobytes())
    return found.hexdigest()
