"""Latents of an autoencoder, packed in safetensors files: read in place, a row at a time.

n rows of a file; C, H, W the shape of one latent.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.errors import DataError, InputError
from pathline.data.base import Batch, Dataset, Indices, as_indices, registry

__all__ = ["Latents", "Packed"]

_HEADER_LIMIT = 2**20  # bytes; a header of five tensors takes a few hundred
_CHUNK = 256  # rows that the statistics take at once
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_INTEGERS = {"I32": torch.int32, "I64": torch.int64}
_TYPES = _FLOATS | _INTEGERS


class Packed(NamedTuple):
    """One file, mapped into memory.

    Attributes:
        path: the file.
        rows: (n, …) bytes of its latents, or of the means among its moments; one row a sample.
        dtype: of their values.
        shape: (C, H, W) of one row.
        labels: (n,) class labels.
    """

    path: Path
    rows: NDArray[np.uint8]
    dtype: torch.dtype
    shape: tuple[int, int, int]
    labels: Tensor

    def values(self, rows: NDArray[np.int64]) -> Tensor:
        """Return the values of rows, float32, (N, C, H, W)."""
        taken = np.asarray(self.rows[rows])  # a copy, and so aligned for its type, as the file need not be
        return torch.from_numpy(taken).view(self.dtype).reshape(-1, *self.shape).float()


@registry.register("latents")
class Latents(Dataset):
    """Latents packed in safetensors files, each with the same keys and an own number of rows.

    Keys: ``latents`` (n, C, H, W) or ``moments`` (n, 2C, H, W), the mean and the logarithm of the variance of an
    autoencoder's posterior, of which the mean is taken; ``labels`` (n,) of type int32 or int64, which unlabelled data
    do without; others are not read. Rows are counted through all files, sorted by name. Nothing is copied before it is
    asked for, and no value of the latents is checked: what is not finite makes training skip the step.

    Args:
        path: a file, or a folder of ``*.safetensors`` files.
        num_classes: class labels 0 … num_classes − 1; 0 for data without labels, whose label is 0 throughout.
        scale: factor of the stored values; 0.18215 is that of Stable Diffusion's first autoencoders (arXiv:2112.10752),
            and 1 is for latents that were scaled before they were stored.

    Raises:
        DataError: no file, or one that is truncated, forged, or does not hold what it should; names the file.
        InputError: a negative number of classes, or a scale that is not finite and above 0.
    """

    def __init__(self, path: str, *, num_classes: int = 1000, scale: float = 0.18215) -> None:
        if num_classes < 0 or not 0 < scale < math.inf:
            raise InputError(f"got num_classes {num_classes}, scale {scale}; expected 0 or more, and a scale above 0")
        self.num_classes, self.scale = num_classes, float(scale)
        files = _files(Path(path))
        read = [_read(file, num_classes) for file in files]
        key, shape = read[0][0], read[0][1].shape
        for other, packed in read:
            if (other, packed.shape) != (key, shape):
                raise DataError(
                    f"got {other} in {packed.path}, which give samples of shape {packed.shape}, beside {key} in "
                    f"{files[0]}, which give {shape}; keep each kind in a folder of its own"
                )
        self.kind, self.files, self.shape = key, tuple(packed for _, packed in read), shape
        self._ends = np.cumsum([len(packed.rows) for packed in self.files])
        self._labels = torch.cat([packed.labels for packed in self.files])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def batch(self, indices: Indices) -> Batch:
        """Return scaled latents, labels and indices."""
        index = as_indices(indices, len(self))
        rows = index.numpy()
        holders = np.searchsorted(self._ends, rows, side="right")
        latents = torch.empty(len(rows), *self.shape)
        for number in np.unique(holders):
            chosen = np.flatnonzero(holders == number)
            packed = self.files[number]
            values = packed.values(rows[chosen] - (self._ends[number] - len(packed.rows)))
            latents[torch.from_numpy(chosen)] = values
        return {"data": latents.mul_(self.scale), "label": self._labels[index], "index": index}

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """Mean and standard deviation of each channel, and the range; one pass over all values, when first asked."""
        means, squares, ends = [], [], []
        for start in range(0, len(self), _CHUNK):
            data = self.batch(range(start, min(start + _CHUNK, len(self))))["data"]
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
            "kind": self.kind,
            "count": len(self),
            "shape": list(self.shape),
            "num_classes": self.num_classes,
            "scale": self.scale,
            "files": [{"file": p.path.name, "rows": len(p.rows), "sha256": _sha256(p.path)} for p in self.files],
        }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise DataError(f"got no latents at {path}, expected a safetensors file, or a folder of *.safetensors files")
    return files


def _read(path: Path, num_classes: int) -> tuple[str, Packed]:
    """Map a file, and return the key of its values with what it holds."""
    try:
        mapped: NDArray[np.uint8] = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:  # the second: an empty file
        raise DataError(f"got {path}, which cannot be read: {error}; pack the latents again") from error
    header, start = _header(path, mapped)
    keys = [key for key in ("latents", "moments") if key in header]
    if len(keys) != 1:
        raise DataError(f"got {path} with the keys {sorted(header)}, expected latents or moments, and labels")
    dtype, shape, values = _tensor(path, keys[0], header, mapped[start:], _FLOATS)
    parts = 2 if keys[0] == "moments" else 1  # the mean comes first
    if len(shape) != 4 or not all(shape) or shape[1] % parts:
        wanted = "(n, 2C, H, W)" if parts == 2 else "(n, C, H, W)"
        raise DataError(f"got {keys[0]} of shape {shape} in {path}, expected {wanted}, none of them 0")
    count, channels, height, width = shape
    labels = _labels(path, header, mapped[start:], count, num_classes) if num_classes else torch.zeros(count).long()
    rows = values.reshape(count, -1)[:, : len(values) // count // parts]
    return keys[0], Packed(path, rows, dtype, (channels // parts, height, width), labels)


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
    path: Path, key: str, header: dict[str, Any], data: NDArray[np.uint8], types: dict[str, torch.dtype]
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
