"""Samples on disk, read piece by piece: arrays in an ``.npz``, a folder of such shards, or a folder of images.

N samples of a file, n of a batch; C, H, W the shape of one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.errors import DataError, InputError
from pathline.data import sources
from pathline.data.sources import ImageSource
from pathline.metrics.archives import member, opened, read_values

__all__ = ["Samples", "read_record", "read_samples"]

RECORD = "record.json"  # in a folder of shards
SHARDS = "shard-*.npz"
_IMAGE = 2**26  # bytes of an image, at most
_AT_ONCE = 2**28  # bytes of images that are read at once, at most
_MOST = 2**27  # samples of a file
_STALE = "draw them again, or remove the record if it is of others"


@dataclass(frozen=True)
class _Piece(ABC):
    """A part of the samples: ``labels`` (N,) or None, ``shape`` (H, W, C)."""

    path: Path
    count: int
    shape: tuple[int, int, int]
    labels: Tensor | None

    @abstractmethod
    def rows(self, ids: range, size: int) -> Iterator[NDArray[np.uint8]]:
        """Yield images by number in turn, (n, H, W, C), at most ``size`` at once."""

    @property
    def bytes(self) -> int:
        """Of the file."""
        return self.path.stat().st_size


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
            DataError: nothing there, not what samples look like, or not what their record tells of; the file is named.
        """
        if path.is_dir():
            return _of_shards(path) if any(path.glob(SHARDS)) or (path / "journal.json").exists() else _of_images(path)
        samples = _joined(path, (_Arrays.of(path),), read_record(path))
        _check_record(samples)
        return samples

    def batches(self, size: int, count: int | None = None, first: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield images uint8 (n, C, H, W), at most ``size`` at once, and labels (n,) or None, in order.

        Where all are asked for, and their record has a hash, it is checked in the end.

        Args:
            size: 1 or more.
            count: how many in all; None is all from ``first`` on.
            first: number of the first one.

        Raises:
            InputError: more than there are.
            DataError: a damaged file, or other samples than their record tells of; it is named.
        """
        count = self.count - first if count is None else count
        if first < 0 or not 1 <= count <= self.count - first or size < 1:
            raise InputError(
                f"got count {count} and batches of {size}, expected 1 to {self.count - first} of {self.path}"
            )
        told, known = hashlib.sha256(), self.record.get("samples_sha256") if count == self.count else None
        for piece, ids in self._parts(range(first, first + count)):
            done = ids.start
            for rows in piece.rows(ids, max(1, min(size, _AT_ONCE // math.prod(self.shape)))):
                if known is not None:
                    told.update(np.ascontiguousarray(rows).data)
                labels = None if piece.labels is None else piece.labels[done : done + len(rows)]
                yield rearrange(torch.from_numpy(rows), "n h w c -> n c h w").contiguous(), labels
                done += len(rows)
        if known not in (None, told.hexdigest()):
            raise DataError(f"got {self.path} with other samples than its record tells of, by their hash; {_STALE}")

    def check_hash(self) -> None:
        """Read all samples; raises DataError as ``batches`` does."""
        if "samples_sha256" in self.record:
            for _ in self.batches(256):
                pass

    def _parts(self, ids: range) -> Iterator[tuple[_Piece, range]]:
        """Yield the pieces that hold samples by number, each with their numbers in it."""
        start = 0
        for piece in self._pieces:
            mine = range(max(ids.start - start, 0), min(ids.stop - start, piece.count))
            if mine:
                yield piece, mine
            start += piece.count


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


def _check_record(samples: Samples) -> None:
    """Raise DataError if the record is of other samples, as far as their number and bytes tell."""
    here = {"count": samples.count, "bytes": sum(piece.bytes for piece in samples._pieces)}
    for name, value in here.items():
        if samples.record.get(name, value) != value:
            raise DataError(
                f"got {samples.path} with {name} {value}, and {samples.record[name]} by its record; {_STALE}"
            )


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
    _check_record(samples)
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

    def rows(self, ids: range, size: int) -> Iterator[NDArray[np.uint8]]:
        for first in ids[::size]:
            yield np.stack([self._read(i) for i in range(first, min(first + size, ids.stop))])

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
        with opened(path) as archive:
            members = {info.filename for info in archive.infolist()}
            if "arr_0.npy" not in members:
                raise DataError(
                    f"got {path} without an array arr_0, expected the images there and labels, if any, in arr_1"
                )
            with member(archive, "arr_0.npy", path) as (_, shape, dtype):
                if dtype != np.uint8 or len(shape) != 4:
                    raise DataError(
                        f"got {path} with images {dtype} {shape}, expected uint8 (N, H, W, C); values that are no "
                        "levels are latents, which an autoencoder decodes, or were not rounded"
                    )
                if math.prod(shape[1:]) > _IMAGE or shape[0] > _MOST:
                    raise DataError(
                        f"got {path} with {shape[0]} images of {shape[1:]} (H, W, C), expected {_MOST} at most of "
                        f"{_IMAGE >> 20} MiB at most; an archive may tell more than anybody drew"
                    )
            labels = _labels(archive, path, shape[0]) if "arr_1.npy" in members else None
        return cls(path, shape[0], (shape[1], shape[2], shape[3]), labels)

    def rows(self, ids: range, size: int) -> Iterator[NDArray[np.uint8]]:
        with opened(self.path) as archive, member(archive, "arr_0.npy", self.path) as (stream, shape, _):
            if shape != (self.count, *self.shape):
                raise DataError(f"got {self.path}, which has changed since it was opened")
            stream.seek(ids.start * math.prod(self.shape), os.SEEK_CUR)
            for first in ids[::size]:
                wanted = (min(size, ids.stop - first), *self.shape)
                yield read_values(stream, wanted, np.dtype(np.uint8), self.path)


def _labels(archive: zipfile.ZipFile, path: Path, count: int) -> Tensor:
    with member(archive, "arr_1.npy", path) as (stream, shape, dtype):
        if shape != (count,) or not np.issubdtype(dtype, np.integer):
            raise DataError(f"got {path} with labels {dtype} {shape}, expected {count} whole numbers")
        return torch.from_numpy(read_values(stream, shape, dtype, path).astype(np.int64))
