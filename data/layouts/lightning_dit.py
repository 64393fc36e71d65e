"""Latents of LightningDiT (arXiv:2501.01423): safetensors files, each latent beside that of the flipped image."""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.draws import BoundDraws
from pathline.core.errors import DataError, InputError, InputTypeError
from pathline.data.base import Batch, Indices, as_indices, registry
from pathline.data.layouts.base import LatentScaling, StoredLatents, check_options
from pathline.data.layouts.ranks import check_shards
from pathline.data.packed import FLOATS, Mapped, Rows, files_in
from pathline.data.sources.files import as_path
from pathline.data.visits import flips

__all__ = ["LightningDit"]

STATISTICS_FILE = "latents_stats.pt"
_LIMIT = 2**20  # bytes of the file of statistics, which holds two numbers a channel


@registry.register("lightning-dit")
class LightningDit(StoredLatents):
    """LightningDiT's ``latents_rank00_shard000.safetensors`` … with ``latents``, ``latents_flip`` and ``labels``.

    Model space is (latent − mean)/std·multiplier, of the posterior's samples that were stored. Each visit of training
    takes the latent of the image or of the flipped image, by the stream ``flip``. Samples are counted through the
    files, sorted by name, each with its own number of rows.

    Of a folder it is checked that it has all shards of all ranks and no others, by their numbers and those of their
    rows; a last rank that is missing cannot be told, nor the last shards of all ranks.

    Args:
        path: folder of the files, or one of them.
        num_classes: class labels 0 … num_classes − 1; 0 for data without labels.
        mean: of each channel, with ``std``; None reads both from the folder's ``latents_stats.pt``, of which nothing is
            executed, and which that program takes from 10,000 samples that it does not tell of.
        std: of each channel.
        normalise: whether mean and std are used at all; LightningDiT's own for VA-VAE, not for Stable Diffusion's.
        multiplier: 1 for VA-VAE; 0.18215 for Stable Diffusion's first autoencoders.
        flip: whether flipped latents are taken.

    Raises:
        DataError: no file, one missing or added, or one that is truncated, forged, or does not hold what it should; no
            statistics.
        InputError: an option out of range, or statistics of another number of channels.
        InputTypeError: an option of another type.
    """

    name, kind = "lightning-dit", "latents"

    def __init__(
        self,
        path: str,
        *,
        num_classes: int = 1000,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        normalise: bool = True,
        multiplier: float = 1.0,
        flip: bool = True,
    ) -> None:
        check_options(num_classes, multiplier=multiplier)
        if not isinstance(normalise, bool) or not isinstance(flip, bool):
            raise InputTypeError(f"got normalise {normalise!r} and flip {flip!r}, expected true or false")
        if (mean is None) != (std is None) or (mean is not None and not normalise):
            raise InputError("got mean or std alone, or beside normalise=false; expected both, with normalise=true")
        self.num_classes, self.flip = num_classes, flip
        place = as_path(path)
        self.files = tuple(Mapped(file) for file in files_in(place))
        columns = [file.rows("latents", FLOATS) if "latents" in file.header else _lack(file) for file in self.files]
        self._columns = {False: columns, True: self._flipped(columns) if flip else []}
        self._ends = np.cumsum([len(rows.bytes) for rows in columns])
        if place.is_dir():
            check_shards(
                {file.path.name: len(rows.bytes) for file, rows in zip(self.files, columns, strict=True)}, place
            )
        self._labels = self._label()
        channels, height, width = self._common(columns)
        self.shape = (channels, height, width)
        self._set_scaling(self._scaling(place, mean, std, normalise, float(multiplier)), input_range=[-1, 1])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def load(self, indices: Indices, draws: BoundDraws) -> Batch:
        """Return latents as they are stored, of the image or of the flipped image, with labels and indices."""
        index = as_indices(indices, len(self))
        flipped = flips(draws).numpy() if self.flip else np.zeros(len(index), bool)
        return {**self._rows(index.numpy(), flipped), "index": index}

    def _stored(self, index: NDArray[np.int64]) -> Batch:
        return self._rows(index, np.zeros(len(index), bool))

    def _rows(self, index: NDArray[np.int64], flipped: NDArray[np.bool_]) -> Batch:
        taken = torch.empty(len(index), *self.shape, dtype=self._columns[False][0].dtype)
        holders = np.searchsorted(self._ends, index, side="right")
        for number in np.unique(holders):
            for side in (False, True):
                chosen = np.flatnonzero((holders == number) & (flipped == side))
                if len(chosen):
                    rows = self._columns[side][number]
                    taken[torch.from_numpy(chosen)] = rows.take(index[chosen] - self._ends[number] + len(rows.bytes))
        return {"data": taken, "label": self._labels[torch.from_numpy(index)]}

    def _flipped(self, columns: Sequence[Rows]) -> list[Rows]:
        found = []
        for file, rows in zip(self.files, columns, strict=True):
            if "latents_flip" not in file.header:
                raise DataError(f"got {file.path} without latents_flip; set flip=false, or pack it anew")
            found.append(file.rows("latents_flip", FLOATS))
            if (found[-1].bytes.shape, found[-1].shape, found[-1].dtype) != (rows.bytes.shape, rows.shape, rows.dtype):
                raise DataError(f"got latents_flip of another shape or type than latents in {file.path}; pack it anew")
        return found

    def _common(self, columns: Sequence[Rows]) -> tuple[int, ...]:
        for file, rows in zip(self.files, columns, strict=True):
            if (rows.shape, rows.dtype) != (columns[0].shape, columns[0].dtype):
                raise DataError(
                    f"got latents of shape {rows.shape} and type {rows.dtype} in {file.path} beside {columns[0].shape} "
                    f"and {columns[0].dtype} in {self.files[0].path}; keep each kind in a folder of its own"
                )
        return columns[0].shape

    def _label(self) -> Tensor:
        counts = np.diff(self._ends, prepend=0).tolist()
        if not self.num_classes:
            return torch.zeros(len(self), dtype=torch.int64)
        pairs = zip(self.files, counts, strict=True)
        return torch.cat([file.labels(count, self.num_classes) for file, count in pairs])

    def _scaling(
        self, path: Path, mean: Sequence[float] | None, std: Sequence[float] | None, normalise: bool, multiplier: float
    ) -> LatentScaling:
        if not normalise:
            return LatentScaling.by(multiplier, self.shape[0], "option multiplier")
        file = path / STATISTICS_FILE if path.is_dir() else path.with_name(STATISTICS_FILE)
        source = STATISTICS_FILE if mean is None else "options mean and std"
        found = _read_statistics(file) if mean is None or std is None else (_numbers(mean), _numbers(std))
        if any(len(numbers) != self.shape[0] for numbers in found) or not all(0 < number for number in found[1]):
            raise InputError(
                f"got mean {found[0]} and std {found[1]} ({source}), expected {self.shape[0]} numbers each, the second "
                "above 0"
            )
        return LatentScaling(found[0], tuple(number / multiplier for number in found[1]), source)

    @cached_property
    def _contents(self) -> Mapping[str, Any]:
        found = hashlib.sha256()
        for file in self.files:
            found.update(file.path.name.encode() + file.head.tobytes())
        found.update(self._labels.numpy().tobytes())
        covered = "names and headers of the files, which tell of all shapes and places, and labels; no latents"
        return {"flip": self.flip, "files": len(self.files), "sha256": found.hexdigest(), "sha256_of": covered}


def _lack(file: Mapped) -> Rows:
    raise DataError(f"got {file.path} with the keys {sorted(file.keys)}, expected latents, latents_flip and labels")


def _numbers(values: Any) -> tuple[float, ...]:
    """Return finite numbers; raises InputTypeError for anything else."""
    if not isinstance(values, Sequence) or not all(type(value) in (int, float) for value in values):
        raise InputTypeError(f"got {values!r} for mean or std, expected a list of numbers, one a channel")
    if not all(map(math.isfinite, values)):
        raise InputError(f"got {values!r} for mean or std, expected finite numbers")
    return tuple(float(value) for value in values)


def _read_statistics(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of each channel from a file that torch wrote; nothing in it is executed."""
    if not path.is_file():
        raise DataError(f"got no {path}; give mean and std, or normalise=false where latents are not normalised")
    try:
        with zipfile.ZipFile(path) as archive:  # before torch reads it: what it would take in memory
            size = sum(member.file_size for member in archive.infolist())
        if max(size, path.stat().st_size) > _LIMIT:
            raise DataError(f"got {path} of {size} bytes, expected {_LIMIT} or less; it holds no two numbers a channel")
        told = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(told, dict):
            raise TypeError(f"a {type(told).__name__}")
        mean, std = (_numbers(told[key].double().flatten().tolist()) for key in ("mean", "std"))
    except DataError:
        raise
    except Exception as error:  # of zip files, of the unpickler, of what it gave
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"got {path}, which cannot be read as mean and std alone ({said}); give both as options"
        ) from error
    return mean, std
