"""Safetensors files, mapped into memory and checked against their size before they are read; packed latents in them.

n rows of a file; C, H, W the shape of one latent.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.errors import DataError

__all__ = ["BYTES", "FLOATS", "INTEGERS", "PREPARED", "Mapped", "Packed", "Rows", "files_in", "hash_of", "read"]

PREPARED = "pathline packed"  # how files of pathline.data.prepare tell of themselves, with a version
_HEADER_LIMIT = 2**20  # bytes; a header of five tensors takes a few hundred
Types = Mapping[str, torch.dtype]
FLOATS: Types = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
INTEGERS: Types = {"I32": torch.int32, "I64": torch.int64}
BYTES: Types = {"U8": torch.uint8}


class Rows(NamedTuple):
    """A tensor of a file, one row a sample, mapped into memory.

    Attributes:
        bytes: (n, …) of its rows.
        dtype: of its values.
        shape: of one row.
    """

    bytes: NDArray[np.uint8]
    dtype: torch.dtype
    shape: tuple[int, ...]

    def take(self, rows: NDArray[np.int64]) -> Tensor:
        """Return a copy of rows, (N, *shape)."""
        taken = np.asarray(self.bytes)[rows]  # a copy, and so aligned for its type, as the file need not be
        return torch.from_numpy(taken).view(self.dtype).reshape(-1, *self.shape)


class Mapped:
    """A safetensors file: its header is read, its tensors are mapped when they are asked for.

    Args:
        path: of the file.

    Attributes:
        header: what it tells of each tensor by name, as it stands there.
        start: where its tensors begin, in bytes.
        size: of the file, in bytes.

    Raises:
        DataError: it cannot be read, or its header is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes: NDArray[np.uint8] = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:  # the second: an empty file
            raise DataError(f"got {path}, which cannot be read: {error}; pack the latents again") from error
        self.size = len(self._bytes)
        self.header, self.start = _header(path, self._bytes)

    @property
    def keys(self) -> set[str]:
        """Names of its tensors."""
        return self.header.keys() - {"__metadata__"}

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the file tells of itself beside its tensors; empty if nothing."""
        told = self.header.get("__metadata__")
        return told if isinstance(told, dict) else {}

    @property
    def head(self) -> NDArray[np.uint8]:
        """The bytes before the tensors."""
        return self._bytes[: self.start]

    @property
    def body(self) -> NDArray[np.uint8]:
        """The bytes of the tensors."""
        return self._bytes[self.start :]

    def tensor(self, key: str, types: Types) -> tuple[torch.dtype, tuple[int, ...], NDArray[np.uint8]]:
        """Return a tensor's type, shape and bytes, checked against the size of the file.

        Raises:
            DataError: it is of another type, or lies elsewhere than in the file.
        """
        entry = self.header[key] if isinstance(self.header[key], dict) else {}
        name, shape, offsets = (entry.get(part) for part in ("dtype", "shape", "data_offsets"))
        if not isinstance(name, str) or name not in types:
            raise DataError(f"got {key} of type {name!r} in {self.path}, expected {', '.join(types)}")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise DataError(
                f"got {key} of shape {shape!r} at {offsets!r} in {self.path}, expected lists of whole numbers"
            )
        (begin, end), there = offsets, len(self.body)
        if end - begin != math.prod(shape) * types[name].itemsize or end > there:
            raise DataError(
                f"got {key} of type {name} and shape {shape} at the bytes {begin} to {end} of {there} in {self.path}; "
                "the file is truncated or forged: pack the latents again"
            )
        return types[name], tuple(shape), self.body[begin:end]

    def rows(self, key: str, types: Types, *, axes: str = "(n, C, H, W)") -> Rows:
        """Return a tensor of one row a sample, none of its sizes 0; raises DataError as ``tensor`` does."""
        dtype, shape, found = self.tensor(key, types)
        if len(shape) != axes.count(",") + 1 or not all(shape):
            raise DataError(f"got {key} of shape {shape} in {self.path}, expected {axes}, none of them 0")
        return Rows(found.reshape(shape[0], -1), dtype, shape[1:])

    def vector(self, key: str, count: int) -> Tensor:
        """Return a copy of whole numbers, (count,) int64; raises DataError as ``tensor`` does, or for another shape."""
        dtype, shape, values = self.tensor(key, INTEGERS)
        if shape != (count,):
            raise DataError(f"got {key} of shape {shape} in {self.path}, expected ({count},): one a row of the latents")
        return torch.from_numpy(np.array(values)).view(dtype).long()

    def labels(self, count: int, num_classes: int) -> Tensor:
        """Return ``labels``, (count,) int64; raises DataError where they are missing or out of range."""
        if "labels" not in self.header:
            raise DataError(
                f"got {self.path} without labels, expected them for {num_classes} classes; set num_classes=0"
            )
        labels = self.vector("labels", count)
        if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise DataError(
                f"got labels from {labels.min()} to {labels.max()} in {self.path}, expected 0 to {num_classes - 1}; "
                "set num_classes"
            )
        return labels


class Packed(NamedTuple):
    """One file.

    Attributes:
        path: of it.
        kind: the key of its values, ``latents`` or ``moments``.
        values: its latents, or the means among its moments.
        images: those that the latents were made from, if they are asked for.
        labels: (n,) class labels.
        header: the bytes before the tensors.
        stored: the bytes of all values, of moments those of the variances too.
    """

    path: Path
    kind: str
    values: Rows
    images: Rows | None
    labels: Tensor
    header: NDArray[np.uint8]
    stored: NDArray[np.uint8]

    @property
    def sample(self) -> tuple[str, tuple[int, ...], tuple[int, ...] | None]:
        """What all files of a data set must agree in: kind, shape of a latent, shape of an image."""
        return self.kind, self.values.shape, None if self.images is None else self.images.shape

    @property
    def sha256(self) -> str:
        """Hash of header, values and labels; those of images would take several times as long."""
        found = hashlib.sha256()
        for part in (self.header, self.stored, self.labels.numpy()):
            found.update(part.reshape(-1).data)
        return found.hexdigest()


def files_in(path: Path) -> list[Path]:
    """Return the files that a path means: itself, or those of a folder, sorted; raises DataError if one is none."""
    try:
        inside = sorted(path.glob("*.safetensors")) if path.is_dir() else None
        files = [path] if inside is None else [file for file in inside if not file.name.startswith(".")]
        wrong = [file for file in files if not file.is_file()]
    except OSError as error:  # as a name that is too long
        raise DataError(f"got {path}, which cannot be looked at: {error}; check data.path") from error
    if not files or wrong:
        raise DataError(
            f"got no latents at {wrong[0] if wrong else path}, expected a safetensors file, or a folder of "
            "*.safetensors files"
        )
    return files


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path, num_classes: int, with_images: bool) -> Packed:
    """Map a file; raises DataError if it is truncated, forged, or does not hold what it should."""
    file = Mapped(path)
    if str(file.metadata.get("format")).startswith(PREPARED):
        raise DataError(
            f"got {path}, part of a folder of python -m pathline.data.prepare, whose manifest tells how it is scaled; "
            f"use {{name: prepared, path: {path.parent}}}"
        )
    keys = [key for key in ("latents", "moments") if key in file.header]
    if len(keys) != 1:
        raise DataError(f"got {path} with the keys {sorted(file.header)}, expected latents or moments, and labels")
    values = file.rows(keys[0], FLOATS)
    stored = values.bytes
    count, (channels, *sides) = len(values.bytes), values.shape
    if keys[0] == "moments":  # the mean comes first
        if channels % 2:
            raise DataError(f"got moments of shape {(count, *values.shape)} in {path}, expected (n, 2C, H, W)")
        values = Rows(values.bytes[:, : values.bytes.shape[1] // 2], values.dtype, (channels // 2, *sides))
    images = _images(file, count) if with_images else None
    labels = file.labels(count, num_classes) if num_classes else torch.zeros(count).long()
    return Packed(path, keys[0], values, images, labels, file.head, stored)


def _images(file: Mapped, count: int) -> Rows:
    if "images" not in file.header:
        raise DataError(f"got {file.path} without images, which are asked for; pack them as well, or set images=false")
    images = file.rows("images", BYTES)
    if len(images.bytes) != count or images.shape[0] != 3:
        raise DataError(
            f"got images of shape {(len(images.bytes), *images.shape)} in {file.path}, expected ({count}, 3, R, R): "
            "one a row of the latents"
        )
    return images


def _header(path: Path, mapped: NDArray[np.uint8]) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file and where its data begin: 8 bytes give the length of the JSON."""
    length = int.from_bytes(mapped[:8].tobytes(), "little")
    if len(mapped) < 8 or not 0 < length <= min(_HEADER_LIMIT, len(mapped) - 8):
        raise DataError(
            f"got {path} of {len(mapped)} bytes with a header of {length}, expected a whole safetensors file whose "
            f"header takes {_HEADER_LIMIT} bytes or less; pack the latents again"
        )
    try:
        header = json.loads(mapped[8 : 8 + length].tobytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"got {path} with a header that is not JSON: {error}; pack the latents again") from error
    if not isinstance(header, dict):
        raise DataError(f"got {path} with a header that holds a {type(header).__name__}, expected tensors by name")
    return header, 8 + length


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
