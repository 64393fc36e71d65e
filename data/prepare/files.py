"""Shards of prepared data, mapped into memory, and checked against the manifest before a row is read.

N rows that are asked for, n rows of a shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.errors import DataError
from pathline.data.packed import Mapped, hash_of
from pathline.data.prepare.columns import FLIPPED
from pathline.data.prepare.manifest import FORMAT, MANIFEST, Manifest, Shard

__all__ = ["Files", "Found"]

ALIGNED = 64  # bytes: where tensors begin


class Found(NamedTuple):
    """Where the rows lie that are asked for, shard by shard and in their order there.

    Attributes:
        ends: of each shard, how many of them lie in it and in those before.
        rows: (N,) their numbers in their shards.
        sides: (N,) the same where a column is stored of mirror images as well, which lie behind all others.
        places: (N,) int64: the row that was asked for as the i-th is the places[i]-th; None if they lie in one shard,
            and are left in the order in which they were asked for.
    """

    ends: list[int]
    rows: NDArray[np.int64]
    sides: NDArray[np.int64]
    places: Tensor | None


class Files:
    """The shards of a folder.

    Args:
        folder: that holds them.
        manifest: of it.
        verify: whether every file is compared with its hash.

    Attributes:
        labels: (number of rows,) int64; 0 without labels.

    Raises:
        DataError: a shard is missing, truncated or another one than the manifest tells of, or there is one too many.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, verify: bool) -> None:
        self.folder, self.manifest = folder, manifest
        self._check_names()
        for shard in manifest.shards:
            self._check_file(shard, verify)
        self._counts = np.array([shard.rows for shard in manifest.shards])
        self._ends = np.cumsum(self._counts)
        self._starts = self._ends - self._counts
        self._check_index()
        self.labels = self._numbers("labels") if manifest.class_names else torch.zeros(manifest.count).long()
        if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < max(len(manifest.class_names), 1):
            raise DataError(
                f"got labels from {self.labels.min()} to {self.labels.max()} in {folder}, expected 0 to "
                f"{len(manifest.class_names) - 1}; prepare the data again"
            )

    def find(self, index: NDArray[np.int64], flipped: NDArray[np.bool_] | None) -> Found:
        """Return where rows lie.

        Args:
            index: (N,) of existing rows.
            flipped: (N,) of which the mirror image is meant, in columns that have it; None of none.
        """
        if len(self._counts) == 1:
            return Found([len(index)], index, index if flipped is None else index + self._counts * flipped, None)
        order = np.argsort(index)  # rows are counted through the shards
        found, places = index[order], np.empty_like(order)
        places[order] = np.arange(len(order))
        holders = np.searchsorted(self._ends, found, side="right")
        rows = found - self._starts[holders]
        sides = rows if flipped is None else rows + self._counts[holders] * flipped[order]
        return Found(np.searchsorted(found, self._ends).tolist(), rows, sides, torch.from_numpy(places))

    def gather(self, name: str, found: Found) -> Tensor:
        """Return a copy of rows of a column, (N, …), in the order in which they were found.

        That is one copy, whatever the number of shards; to put them into the order in which they were asked for is
        left to the device.
        """
        column, begin = self.manifest.columns[name], 0
        gathered = torch.empty(len(found.rows), *column.shape, dtype=column.type)
        to = gathered.flatten(1).view(torch.uint8).numpy()
        rows = found.sides if name + FLIPPED in self.manifest.columns else found.rows
        for part, end in zip(self._parts[name], found.ends, strict=True):
            if end > begin:  # "clip" is the mode in which nothing is copied twice
                part.take(rows[begin:end], axis=0, out=to[begin:end], mode="clip")
            begin = end
        return gathered

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs: it maps the shards by itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_parts"}

    @cached_property
    def _parts(self) -> dict[str, list[NDArray[np.uint8]]]:
        """Of each column the rows of each shard, (n, bytes of a row), mapped."""
        mapped = [self._opened(shard) for shard in self.manifest.shards]
        names = [name for name in self.manifest.columns if not name.endswith(FLIPPED)]
        return {name: list(self._rows(mapped, name)) for name in names}

    def _check_names(self) -> None:
        wanted = {shard.file for shard in self.manifest.shards}
        found = {file.name for file in self.folder.glob("*.safetensors") if not file.name.startswith(".")}
        for wrong, what in ((sorted(wanted - found), "without"), (sorted(found - wanted), "with")):
            if wrong:
                raise DataError(
                    f"got {self.folder} {what} {wrong[0]}, other than its {MANIFEST} says ({len(wrong)} such files); "
                    "copy the folder again, or prepare the data again"
                )

    def _check_file(self, shard: Shard, verify: bool) -> None:
        path = self.folder / shard.file
        if path.is_symlink() or not path.is_file():
            raise DataError(f"got {path}, which is no file, expected a shard; copy the folder again")
        size = path.stat().st_size
        if size != shard.bytes or (verify and hash_of(path) != shard.sha256):
            what = f"{size} bytes, expected {shard.bytes}" if size != shard.bytes else "other contents than its hash"
            raise DataError(f"got {path} with {what}; copy the folder again, or prepare the data again")

    def _opened(self, shard: Shard) -> Mapped:
        path = self.folder / shard.file
        file = Mapped(path)
        if file.start % ALIGNED or file.metadata.get("format") != FORMAT or file.keys != self.manifest.columns.keys():
            raise DataError(
                f"got {path} with {', '.join(sorted(file.keys)) or 'nothing'} from the byte {file.start} on, expected "
                f"{', '.join(sorted(self.manifest.columns))} from a multiple of {ALIGNED} on, as {FORMAT!r}"
            )
        return file

    def _rows(self, mapped: list[Mapped], name: str) -> Iterator[NDArray[np.uint8]]:
        """Yield the bytes of a column of each shard, one row a sample, and behind them those of its mirror images."""
        column, both = self.manifest.columns[name], name + FLIPPED in self.manifest.columns
        for file, shard in zip(mapped, self.manifest.shards, strict=True):
            types: dict[str, torch.dtype] = {column.dtype: column.type}
            for key in (name, name + FLIPPED) if both else (name,):
                _, shape, _ = file.tensor(key, types)
                if shape != (shard.rows, *column.shape):
                    raise DataError(
                        f"got {key} of shape {shape} in {file.path}, expected {(shard.rows, *column.shape)}; prepare "
                        "the data again"
                    )
            first, last = (file.header[key]["data_offsets"] for key in (name, key))
            if last[1] - first[0] != shard.rows * column.bytes * (1 + both):
                raise DataError(f"got {file.path} with {key} elsewhere than behind {name}; prepare the data again")
            yield np.asarray(file.body[first[0] : last[1]]).reshape(-1, column.bytes)

    def _numbers(self, name: str) -> Tensor:
        """Return a whole column of numbers."""
        return torch.from_numpy(np.concatenate(self._parts[name])).view(torch.int64).flatten()

    def _check_index(self) -> None:
        index = self._numbers("index")
        if int(index[0]) < 0 or bool((index.diff() < 1).any()):
            raise DataError(
                f"got numbers of images in {self.folder} that do not rise from row to row: some would be there twice; "
                "prepare the data again"
            )
