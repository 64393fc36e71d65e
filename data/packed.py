"""Files of packed latents: safetensors files, mapped into memory and checked against their size before they are read.

n rows of a file; C, H, W the shape of one latent.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.errors import DataError

__all__ = ["Packed", "Rows", "files_in", "read"]

_HEADER_LIMIT = 2**20  # bytes; a header of five tensors takes a few hundred
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_INTEGERS = {"I32": torch.int32, "I64": torch.int64}
_BYTES = {"U8": torch.uint8}
Types = dict[str, torch.dtype]


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
        taken = np.asarray(self.bytes[rows])  # a copy, and so aligned for its type, as the file need not be
        return torch.from_numpy(taken).view(self.dtype).reshape(-1, *self.shape)


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


def read(path: Path, num_classes: int, with_images: bool) -> Packed:
    """Map a file; raises DataError if it is truncated, forged, or does not hold what it should."""
    try:
        mapped: NDArray[np.uint8] = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:  # the second: an empty file
        raise DataError(f"got {path}, which cannot be read: {error}; pack the latents again") from error
    header, start = _header(path, mapped)
    data, keys = mapped[start:], [key for key in ("latents", "moments") if key in header]
    if len(keys) != 1:
        raise DataError(f"got {path} with the keys {sorted(header)}, expected latents or moments, and labels")
    values = _rows(path, keys[0], header, data, _FLOATS)
    stored = values.bytes
    count, (channels, *sides) = len(values.bytes), values.shape
    if keys[0] == "moments":  # the mean comes first
        if channels % 2:
            raise DataError(f"got moments of shape {(count, *values.shape)} in {path}, expected (n, 2C, H, W)")
        values = Rows(values.bytes[:, : values.bytes.shape[1] // 2], values.dtype, (channels // 2, *sides))
    images = _images(path, header, data, count) if with_images else None
    labels = _labels(path, header, data, count, num_classes) if num_classes else torch.zeros(count).long()
    return Packed(path, keys[0], values, images, labels, mapped[:start], stored)


def _rows(path: Path, key: str, header: dict[str, Any], data: NDArray[np.uint8], types: Types) -> Rows:
    dtype, shape, found = _tensor(path, key, header, data, types)
    if len(shape) != 4 or not all(shape):
        raise DataError(f"got {key} of shape {shape} in {path}, expected (n, C, H, W), none of them 0")
    return Rows(found.reshape(shape[0], -1), dtype, shape[1:])


def _images(path: Path, header: dict[str, Any], data: NDArray[np.uint8], count: int) -> Rows:
    if "images" not in header:
        raise DataError(f"got {path} without images, which are asked for; pack them as well, or set images=false")
    images = _rows(path, "images", header, data, _BYTES)
    if len(images.bytes) != count or images.shape[0] != 3:
        raise DataError(
            f"got images of shape {(len(images.bytes), *images.shape)} in {path}, expected ({count}, 3, R, R): "
            "one a row of the latents"
        )
    return images


def _labels(path: Path, header: dict[str, Any], data: NDArray[np.uint8], rows: int, num_classes: int) -> Tensor:
    if "labels" not in header:
        raise DataError(f"got {path} without labels, expected them for {num_classes} classes; set num_classes=0")
    dtype, shape, values = _tensor(path, "labels", header, data, _INTEGERS)
    if shape != (rows,):
        raise DataError(f"got labels of shape {shape} in {path}, expected ({rows},): one a row of the latents")
    labels = torch.from_numpy(np.array(values)).view(dtype).long()
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise DataError(
            f"got labels from {labels.min()} to {labels.max()} in {path}, expected 0 to {num_classes - 1}; "
            "set num_classes"
        )
    return labels


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


def _tensor(
    path: Path, key: str, header: dict[str, Any], data: NDArray[np.uint8], types: Types
) -> tuple[torch.dtype, tuple[int, ...], NDArray[np.uint8]]:
    """Return a tensor's type, shape and bytes, checked against the size of the file."""
    entry = header[key] if isinstance(header[key], dict) else {}
    name, shape, offsets = (entry.get(part) for part in ("dtype", "shape", "data_offsets"))
    if not isinstance(name, str) or name not in types:
        raise DataError(f"got {key} of type {name!r} in {path}, expected {', '.join(types)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise DataError(f"got {key} of shape {shape!r} at {offsets!r} in {path}, expected lists of whole numbers")
    begin, end = offsets
    if end - begin != math.prod(shape) * types[name].itemsize or end > len(data):
        raise DataError(
            f"got {key} of type {name} and shape {shape} at the bytes {begin} to {end} of {len(data)} in {path}; "
            "the file is truncated or forged: pack the latents again"
        )
    return types[name], tuple(shape), data[begin:end]


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
