"""Shards of prepared data, mapped into memory, and checked against the manifest before a row is read.

N rows that are asked for, n rows of a shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.errors import DataError
from pathline.data.packed import Mapped, hash_of
from pathline.data.prepare_manifest import FLIPPED, FORMAT, MANIFEST, Manifest, Shard

__all__ = ["Files"]

ALIGNED = 64  # bytes: where tensors begin
TYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "I64": torch.int64,
}
Parts = list[NDArray[np.uint8]]  # of each shard, (n, bytes of a row)


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
        mapped = [self._opened(shard, verify) for shard in manifest.shards]
        self._ends = np.cumsum([shard.rows for shard in manifest.shards])
        self._parts = {name: list(self._rows(mapped, name)) for name in manifest.columns}
        self._check_index()
        self.labels = self._numbers("labels") if manifest.class_names else torch.zeros(manifest.count).long()
        if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < max(len(manifest.class_names), 1):
            raise DataError(
                f"got labels from {self.labels.min()} to {self.labels.max()} in {folder}, expected 0 to "
                f"{len(manifest.class_names) - 1}; prepare the data again"
            )

    def gather(self, name: str, index: NDArray[np.int64], flipped: NDArray[np.bool_] | None) -> Tensor:
        """Return a copy of rows of a column, (N, …).

        Args:
            name: of the column.
            index: (N,) of existing rows.
            flipped: (N,) of which rows the column of mirror images is meant; None of none.
        """
        column = self.manifest.columns[name]
        gathered = torch.empty(len(index), *column.shape, dtype=TYPES[column.dtype])
        to = gathered.flatten(1).view(torch.uint8).numpy()
        if flipped is None:
            self._copy(self._parts[name], index, np.arange(len(index)), to)
        else:
            self._copy(self._parts[name], index, np.flatnonzero(~flipped), to)
            self._copy(self._parts[name + FLIPPED], index, np.flatnonzero(flipped), to)
        return gathered

    def _copy(self, parts: Parts, index: NDArray[np.int64], places: NDArray[np.int64], to: NDArray[np.uint8]) -> None:
        """Copy the rows at some places of the index there; each shard is read in its own order."""
        places = places[np.argsort(index[places], kind="stable")]
        wanted = index[places]
        cuts = np.searchsorted(wanted, self._ends)
        for number in np.unique(np.searchsorted(self._ends, wanted, side="right")):
            here = slice(cuts[number - 1] if number else 0, cuts[number])
            first = self._ends[number] - len(parts[number])
            to[places[here]] = parts[number][wanted[here] - first]

    def _check_names(self) -> None:
        wanted = {shard.file for shard in self.manifest.shards}
        found = {file.name for file in self.folder.glob("*.safetensors") if not file.name.startswith(".")}
        for wrong, what in ((sorted(wanted - found), "without"), (sorted(found - wanted), "with")):
            if wrong:
                raise DataError(
                    f"got {self.folder} {what} {wrong[0]}, other than its {MANIFEST} says ({len(wrong)} such files); "
                    "copy the folder again, or prepare the data again"
                )

    def _opened(self, shard: Shard, verify: bool) -> Mapped:
        path = self.folder / shard.file
        if path.is_symlink() or not path.is_file():
            raise DataError(f"got {path}, which is no file, expected a shard; copy the folder again")
        size = path.stat().st_size
        if size != shard.bytes or (verify and hash_of(path) != shard.sha256):
            what = f"{size} bytes, expected {shard.bytes}" if size != shard.bytes else "other contents than its hash"
            raise DataError(f"got {path} with {what}; copy the folder again, or prepare the data again")
        file = Mapped(path)
        if file.start % ALIGNED or file.metadata.get("format") != FORMAT or file.keys != self.manifest.columns.keys():
            raise DataError(
                f"got {path} with {', '.join(sorted(file.keys)) or 'nothing'} from the byte {file.start} on, expected "
                f"{', '.join(sorted(self.manifest.columns))} from a multiple of {ALIGNED} on, as {FORMAT!r}"
            )
        return file

    def _rows(self, mapped: list[Mapped], name: str) -> Iterator[NDArray[np.uint8]]:
        """Yield the bytes of a column of each shard, one row a sample."""
        column = self.manifest.columns[name]
        for file, shard in zip(mapped, self.manifest.shards, strict=True):
            _, shape, found = file.tensor(name, {column.dtype: TYPES[column.dtype]})
            if shape != (shard.rows, *column.shape):
                raise DataError(
                    f"got {name} of shape {shape} in {file.path}, expected {(shard.rows, *column.shape)}; prepare the "
                    "data again"
                )
            yield np.asarray(found).reshape(shard.rows, -1)

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
