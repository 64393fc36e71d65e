"""Latents of an autoencoder, packed in safetensors files: read in place, a row at a time.

n rows of a file; C, H, W the shape of one latent.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.errors import DataError, InputError
from pathline.data.base import Batch, Dataset, Indices, as_indices, registry

__all__ = ["Latents", "Packed", "Rows"]

_HEADER_LIMIT = 2**20  # bytes; a header of five tensors takes a few hundred
_CHUNK = 256  # rows that the statistics take at once
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
    """

    path: Path
    kind: str
    values: Rows
    images: Rows | None
    labels: Tensor

    @property
    def sample(self) -> tuple[str, tuple[int, ...], tuple[int, ...] | None]:
        """What all files of a data set must agree in: kind, shape of a latent, shape of an image."""
        return self.kind, self.values.shape, None if self.images is None else self.images.shape


@registry.register("latents")
class Latents(Dataset):
    """Latents packed in safetensors files, each with the same keys and an own number of rows.

    Keys: ``latents`` (n, C, H, W) or ``moments`` (n, 2C, H, W), the mean and the logarithm of the variance of an
    autoencoder's posterior, of which the mean is taken; ``labels`` (n,) of type int32 or int64, which unlabelled data
    do without; ``images`` (n, 3, R, R) of type uint8, where they are asked for; others are not read. Rows are counted
    through all files, sorted by name. Nothing is copied before it is asked for, and no value of the latents is checked:
    what is not finite makes training skip the step.

    Args:
        path: a file, or a folder of ``*.safetensors`` files.
        num_classes: class labels 0 … num_classes − 1; 0 for data without labels, whose label is 0 throughout.
        scale: factor of the stored values; 0.18215 is that of Stable Diffusion's first autoencoders (arXiv:2112.10752),
            and 1 is for latents that were scaled before they were stored.
        images: whether batches have an ``image`` as well, uint8, for encoders to align to.

    Raises:
        DataError: no file, or one that is truncated, forged, or does not hold what it should; names the file.
        InputError: a negative number of classes, or a scale that is not finite and above 0.
    """

    def __init__(self, path: str, *, num_classes: int = 1000, scale: float = 0.18215, images: bool = False) -> None:
        if num_classes < 0 or not 0 < scale < math.inf:
            raise InputError(f"got num_classes {num_classes}, scale {scale}; expected 0 or more, and a scale above 0")
        self.num_classes, self.scale, self.images = num_classes, float(scale), images
        self.files = tuple(_read(file, num_classes, images) for file in _files(Path(path)))
        first = self.files[0]
        for other in self.files:
            if other.sample != first.sample:
                raise DataError(
                    f"got {_words(*other.sample)} in {other.path} beside {_words(*first.sample)} in {first.path}; "
                    "keep each kind in a folder of its own"
                )
        channels, height, width = first.values.shape
        self.shape = (channels, height, width)
        self._ends = np.cumsum([len(packed.labels) for packed in self.files])
        self._labels = torch.cat([packed.labels for packed in self.files])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def batch(self, indices: Indices) -> Batch:
        """Return scaled latents, labels and indices, and images if the data set was built with them."""
        index = as_indices(indices, len(self))
        batch = {"data": self._latents(index.numpy()), "label": self._labels[index], "index": index}
        images = [packed.images for packed in self.files if packed.images is not None]
        return {**batch, "image": self._gather(images, index.numpy(), torch.uint8)} if images else batch

    def _latents(self, index: NDArray[np.int64]) -> Tensor:
        return self._gather([packed.values for packed in self.files], index, torch.float32).mul_(self.scale)

    def _gather(self, columns: Sequence[Rows], index: NDArray[np.int64], dtype: torch.dtype) -> Tensor:
        """Return rows that lie in several files, (N, *S)."""
        gathered = torch.empty(len(index), *columns[0].shape, dtype=dtype)
        holders = np.searchsorted(self._ends, index, side="right")
        for number in np.unique(holders):
            chosen, rows = np.flatnonzero(holders == number), columns[number]
            first = self._ends[number] - len(rows.bytes)
            gathered[torch.from_numpy(chosen)] = rows.take(index[chosen] - first).to(dtype)
        return gathered

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """Mean and standard deviation of each channel, and the range; one pass over all values, when first asked."""
        means, squares, ends = [], [], []
        for start in range(0, len(self), _CHUNK):
            data = self._latents(np.arange(start, min(start + _CHUNK, len(self))))
            values = data.double().flatten(2)
            ends += [float(end) for end in torch.aminmax(data)]
            means.append(values.mean(2))
            squares.append(values.sub_(means[-1].unsqueeze(2)).square_().sum(2))
        # squares within the rows, and of the rows about their mean: sums of squares of values would lose digits
        row, pixels = torch.cat(means), self.shape[1] * self.shape[2]
        total = torch.cat(squares).sum(0) + pixels * (row - row.mean(0)).square().sum(0)
        deviation = (total / max(len(self) * pixels - 1, 1)).sqrt()
        return {"mean": row.mean(0).tolist(), "std": deviation.tolist(), "range": [min(ends), max(ends)]}

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Name, count, shape, scale, and each file's name, rows and hash; one pass over all files, when first asked."""
        return {
            "name": "latents",
            "kind": self.files[0].kind,
            "count": len(self),
            "shape": list(self.shape),
            "num_classes": self.num_classes,
            "scale": self.scale,
            "files": [{"file": p.path.name, "rows": len(p.labels), "sha256": _sha256(p.path)} for p in self.files],
        }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise DataError(f"got no latents at {path}, expected a safetensors file, or a folder of *.safetensors files")
    return files


def _words(kind: str, shape: tuple[int, ...], image: tuple[int, ...] | None) -> str:
    return f"{kind} of samples of shape {shape}{'' if image is None else f' and images of shape {image}'}"


def _read(path: Path, num_classes: int, with_images: bool) -> Packed:
    """Map a file."""
    try:
        mapped: NDArray[np.uint8] = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:  # the second: an empty file
        raise DataError(f"got {path}, which cannot be read: {error}; pack the latents again") from error
    header, start = _header(path, mapped)
    data, keys = mapped[start:], [key for key in ("latents", "moments") if key in header]
    if len(keys) != 1:
        raise DataError(f"got {path} with the keys {sorted(header)}, expected latents or moments, and labels")
    values = _rows(path, keys[0], header, data, _FLOATS)
    count, (channels, *sides) = len(values.bytes), values.shape
    if keys[0] == "moments":  # the mean comes first
        if channels % 2:
            raise DataError(f"got moments of shape {(count, *values.shape)} in {path}, expected (n, 2C, H, W)")
        values = Rows(values.bytes[:, : values.bytes.shape[1] // 2], values.dtype, (channels // 2, *sides))
    images = _images(path, header, data, count) if with_images else None
    labels = _labels(path, header, data, count, num_classes) if num_classes else torch.zeros(count).long()
    return Packed(path, keys[0], values, images, labels)


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
