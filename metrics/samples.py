"""Samples on disk, read piece by piece: arrays in an ``.npz``, a folder of such shards, or a folder of images.

N samples of a file, n of a batch; C, H, W the shape of one.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from einops import rearrange
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.errors import DataError, InputError
from pathline.data import sources
from pathline.data.sources import ImageSource

__all__ = ["Samples", "read_record", "read_samples"]

RECORD = "record.json"  # in a folder of shards
SHARDS = "shard-*.npz"
_DENSEST = 1100  # how many times smaller deflate makes what it packs, at most
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


@dataclass(frozen=True)
class _Piece(ABC):
    """A part of the samples: ``labels`` (N,) or None, ``shape`` (H, W, C)."""

    path: Path
    count: int
    shape: tuple[int, int, int]
    labels: Tensor | None

    @abstractmethod
    def rows(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """Yield all images in turn, (n, H, W, C), at most ``size`` at once."""


@dataclass(frozen=True)
class Samples:
    """Images as they were written, checked before the first is read.

    Attributes:
        path: the file or folder.
        count: number of samples, N.
        shape: of one, (C, H, W).
        labelled: whether each has a label.
        record: how they were drawn, as ``sample.py`` wrote it; empty if nobody did.
    """

    path: Path
    count: int
    shape: tuple[int, int, int]
    labelled: bool
    record: Mapping[str, Any]
    _pieces: tuple[_Piece, ...]

    @classmethod
    def of(cls, path: Path) -> Samples:
        """Open samples: ``.npz`` as of sample.py or ADM, its folder of shards, or any folder of images of one size.

        Arrays: ``arr_0`` uint8 (N, H, W, C), and labels, if any, in ``arr_1`` (N,). Nothing is unpickled.

        Raises:
            DataError: nothing there, or not what samples look like; the file is named.
        """
        if path.is_dir():
            return _of_shards(path) if any(path.glob(SHARDS)) or (path / "journal.json").exists() else _of_images(path)
        return _joined(path, (_Arrays.of(path),), read_record(path))

    def batches(self, size: int, count: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield images uint8 (n, C, H, W), at most ``size`` at once, and labels (n,) or None, in order.

        Args:
            size: 1 or more.
            count: how many in all, the first ones; None is all.

        Raises:
            InputError: more than there are.
            DataError: a damaged file; it is named.
        """
        left = self.count if count is None else count
        if not 1 <= left <= self.count or size < 1:
            raise InputError(f"got count {left} and batches of {size}, expected 1 to {self.count} of {self.path}")
        for piece in self._pieces:
            first = 0
            for rows in piece.rows(size):
                rows = rows[:left]
                labels = None if piece.labels is None else piece.labels[first : first + len(rows)]
                yield rearrange(torch.from_numpy(rows), "n h w c -> n c h w").contiguous(), labels
                first, left = first + len(rows), left - len(rows)
                if not left:
                    return


def read_samples(path: Path) -> tuple[Tensor, Tensor | None]:
    """Read all images of a small set, (N, C, H, W) = a/127.5 − 1 of levels a, and labels (N,) or None.

    Raises:
        DataError: as ``Samples.of`` does.
    """
    samples = Samples.of(path)
    images, labels = zip(*samples.batches(samples.count), strict=True)
    x = torch.cat(images).float() / 127.5 - 1
    return x, torch.cat(labels) if samples.labelled else None


def read_record(path: Path) -> dict[str, Any]:
    """Read how samples were drawn, from the JSON beside them, or in a folder of shards; empty if there is none.

    Raises:
        DataError: a file that is no JSON object.
    """
    record = path / RECORD if path.is_dir() else path.with_suffix(".json")
    if not record.is_file():
        return {}
    try:
        content = json.loads(record.read_text())
    except (ValueError, RecursionError) as error:
        raise DataError(f"got {record}, which is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"got {record} with a {type(content).__name__}, expected an object")
    return content


def _joined(path: Path, pieces: tuple[_Piece, ...], record: Mapping[str, Any]) -> Samples:
    """Join pieces, which must be of one kind."""
    first, count = pieces[0], sum(piece.count for piece in pieces)
    for other in pieces[1:]:
        if other.shape != first.shape or (other.labels is None) != (first.labels is None):
            raise DataError(
                f"got {_words(other)} in {other.path} beside {_words(first)} in {first.path}; they are of two drawings"
            )
    height, width, channels = first.shape
    if not count or channels not in (1, 3):
        raise DataError(f"got {count} images of {channels} channels in {path}, expected some, of 1 or 3 channels")
    return Samples(path, count, (channels, height, width), first.labels is not None, record, pieces)


def _words(piece: _Piece) -> str:
    return f"images {piece.shape} {'without' if piece.labels is None else 'with'} labels"


def _of_shards(folder: Path) -> Samples:
    """Open the folder of a finished drawing."""
    record = read_record(folder)
    if not record:
        raise DataError(f"got {folder} without {RECORD}: the drawing is not finished; go on with the same sample.py")
    files = sorted(folder.glob(SHARDS))
    names = [f"shard-{number:05d}.npz" for number in range(len(files))]
    if [file.name for file in files] != names:
        missing = sorted(set(names) - {file.name for file in files})
        raise DataError(
            f"got {folder} without {', '.join(missing[:3])}, expected shards from 00000 on; draw them again"
        )
    samples = _joined(folder, tuple(_Arrays.of(file) for file in files), record)
    if record.get("count") != samples.count:
        raise DataError(f"got {samples.count} samples in {folder}, and {record.get('count')} by its {RECORD}")
    return samples


def _of_images(folder: Path) -> Samples:
    return _joined(folder, (_Images.of(folder),), read_record(folder))


@dataclass(frozen=True)
class _Images(_Piece):
    """Image files of one size, by name; labels are those of class folders."""

    source: ImageSource

    @classmethod
    def of(cls, folder: Path) -> _Images:
        source = sources.build("folder", path=str(folder))
        labels = None if source.labels is None else torch.as_tensor(list(source.labels), dtype=torch.int64)
        width, height = source.read(0).size
        return cls(folder, len(source), (height, width, 3), labels, source)

    def rows(self, size: int) -> Iterator[NDArray[np.uint8]]:
        for first in range(0, self.count, size):
            yield np.stack([self._read(i) for i in range(first, min(first + size, self.count))])

    def _read(self, index: int) -> NDArray[np.uint8]:
        image = np.asarray(self.source.read(index))
        if image.shape != self.shape:
            raise DataError(
                f"got {self.path / self.source.keys[index]} of shape {image.shape}, and {self.source.keys[0]} of "
                f"{self.shape} (H, W, C); samples are of one size"
            )
        return image


class _Arrays(_Piece):
    """Arrays in an ``.npz``, read from inside the archive."""

    @classmethod
    def of(cls, path: Path) -> _Arrays:
        if not path.is_file():
            raise DataError(f"got no file at {path}, expected samples written by sample.py")
        with _archive(path) as archive:
            members = {info.filename for info in archive.infolist()}
            if "arr_0.npy" not in members:
                raise DataError(
                    f"got {path} without an array arr_0, expected the images there and labels, if any, in arr_1"
                )
            with _member(archive, "arr_0.npy", path) as (_, shape, dtype):
                if dtype != np.uint8 or len(shape) != 4:
                    raise DataError(
                        f"got {path} with images {dtype} {shape}, expected uint8 (N, H, W, C); values that are no "
                        "levels are latents, which an autoencoder decodes, or were not rounded"
                    )
            labels = _labels(archive, path, shape[0]) if "arr_1.npy" in members else None
        return cls(path, shape[0], (shape[1], shape[2], shape[3]), labels)

    def rows(self, size: int) -> Iterator[NDArray[np.uint8]]:
        with _archive(self.path) as archive, _member(archive, "arr_0.npy", self.path) as (stream, shape, _):
            if shape != (self.count, *self.shape):
                raise DataError(f"got {self.path}, which has changed since it was opened")
            for first in range(0, self.count, size):
                yield _read(stream, (min(size, self.count - first), *self.shape), np.dtype(np.uint8), self.path)


def _labels(archive: zipfile.ZipFile, path: Path, count: int) -> Tensor:
    with _member(archive, "arr_1.npy", path) as (stream, shape, dtype):
        if shape != (count,) or not np.issubdtype(dtype, np.integer):
            raise DataError(f"got {path} with labels {dtype} {shape}, expected {count} whole numbers")
        return torch.from_numpy(_read(stream, shape, dtype, path).astype(np.int64))


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive; whatever is damaged in it names the file."""
    damaged = (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except DataError:
        raise
    except damaged as error:
        raise DataError(f"got {path}, which is no .npz of plain arrays: {error}") from error


@contextmanager
def _member(
    archive: zipfile.ZipFile, name: str, path: Path
) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]]:
    """Open an array at its values, its header checked against its size, and that against the file's."""
    info, room = archive.getinfo(name), path.stat().st_size
    with archive.open(info) as stream:
        version = npy.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"{name} is of npy version {version}")
        shape, fortran, dtype = _HEADERS[version](stream)
        if dtype.hasobject or fortran:
            raise ValueError(f"{name} holds {'objects' if dtype.hasobject else 'values in the order of Fortran'}")
        needed, packed = math.prod(shape) * dtype.itemsize, info.compress_size
        if any(size < 0 for size in shape) or needed != info.file_size - stream.tell():
            raise ValueError(
                f"{name} of {info.file_size} bytes tells the shape {shape} of {dtype}; truncated or forged"
            )
        if packed > room or info.file_size > packed * (_DENSEST if info.compress_type else 1):
            raise ValueError(f"{name} tells {info.file_size} bytes, in a file of {room}; truncated or forged")
        yield stream, shape, dtype


def _read(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], path: Path) -> NDArray[Any]:
    """Read the next values of an array."""
    needed = math.prod(shape) * dtype.itemsize
    content = bytearray(stream.read(needed))
    if len(content) != needed:
        raise DataError(f"got {path}, which is truncated: {len(content)} of {needed} bytes")
    return np.frombuffer(content, dtype).reshape(shape)
