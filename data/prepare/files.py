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
from pathline.data.prepare.manifest import FLIPPED, FORMAT, MANIFEST, Manifest, Shard

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
        self._counts = np.array([shard.rows for shard in manifest.shards])
        self._ends = np.cumsum(self._counts)
        self._starts = self._ends - self._counts
        names = [name for name in manifest.columns if not name.endswith(FLIPPED)]
        self._parts = {name: list(self._rows(mapped, name)) for name in names}
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
        column, parts = self.manifest.columns[name], self._parts[name]
        gathered = torch.empty(len(index), *column.shape, dtype=TYPES[column.dtype])
        holders = np.searchsorted(self._ends, index, side="right")
        rows = index - self._starts[holders]
        if flipped is not None:  # mirror images lie behind all others of their shard
            rows += self._counts[holders] * flipped
        if len(index):
            _take(parts, holders, rows, gathered.flatten(1).view(torch.uint8).numpy())
        return gathered

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
        """Yield the bytes of a column of each shard, one row a sample, and behind them those of its mirror images."""
        column, both = self.manifest.columns[name], name + FLIPPED in self.manifest.columns
        for file, shard in zip(mapped, self.manifest.shards, strict=True):
            types: dict[str, torch.dtype] = {column.dtype: TYPES[column.dtype]}
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


def _take(parts: Parts, holders: NDArray[np.int64], rows: NDArray[np.int64], to: NDArray[np.uint8]) -> None:
    """Copy rows of the parts that hold them; out of several parts, each is read in its own order.

    Rows of one part go where they belong at once. Those of several lie by parts at first: that is a second copy, of
    what the cache holds.
    """
    if holders.min() == holders.max():
        np.take(parts[holders[0]], rows, axis=0, out=to, mode="clip")  # the mode in which nothing is copied twice
        return
    order = np.lexsort((rows, holders))
    numbers, firsts = np.unique(holders[order], return_index=True)
    sorted_rows, buffer = rows[order], np.empty_like(to)
    for number, first, end in zip(numbers, firsts, (*firsts[1:], len(rows)), strict=True):
        np.take(parts[number], sorted_rows[first:end], axis=0, out=buffer[first:end], mode="clip")
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    np.take(buffer, places, axis=0, out=to, mode="clip")
