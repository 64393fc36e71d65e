"""Files of prepared data: shards, written beside their name, forced to the disk, and renamed once they are whole.

n rows of a shard.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from pathline.core.errors import DataError
from pathline.data.packed import hash_of
from pathline.data.prepare.columns import Column
from pathline.data.prepare.manifest import FORMAT, MOMENTS, Shard

__all__ = ["UNFINISHED", "ShardFile", "write_whole", "writing"]

ALIGNED = 64  # bytes: where the tensors of a file begin
UNFINISHED = ".writing-"  # beginning of the names of what is being written
_COPIED = 2**24  # bytes moved at once


class ShardFile:
    """A shard that is being written, rows after rows; what is not ``kept`` is removed at the end.

    Args:
        folder: of the shards.
        name: that it will have.
        columns: of its tensors, in their order in the file.
        most: number of rows that may come.
    """

    def __init__(self, folder: Path, name: str, columns: Mapping[str, Column], most: int) -> None:
        self.final, self.columns, self.most, self.rows = folder / name, columns, most, 0
        self.path = folder / f"{UNFINISHED}{secrets.token_hex(4)}-{name}"
        self._head = len(_head(columns, most, 0))

    def __enter__(self) -> ShardFile:
        with writing(self.final):
            self._file = self.path.open("w+b")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # what is kept was forced to the disk before
            self._file.close()
        self.path.unlink(missing_ok=True)

    def write(self, parts: Mapping[str, Tensor]) -> None:
        """Append rows of every column; raises DataError if there is no room."""
        begins, count = self._begins(self.most), 0
        for name, column in self.columns.items():
            rows = parts[name].contiguous()
            count = len(rows)
            assert Column.of(rows) == column and self.rows + count <= self.most
            with writing(self.final):
                self._file.seek(begins[name] + self.rows * column.bytes)
                self._file.write(rows.reshape(-1).view(torch.uint8).numpy().data)
        self.rows += count

    def kept(self, first_index: int) -> Shard:
        """Force the shard to the disk and return what it is; ``publish`` gives it its name. Raises as ``write``."""
        with writing(self.final):
            if self.rows < self.most:
                self._close_gaps()
            self._file.seek(0)
            self._file.write(_head(self.columns, self.rows, self._head))
            self._file.flush()
            os.fsync(self._file.fileno())
        size = self.path.stat().st_size
        return Shard(
            file=self.final.name, rows=self.rows, bytes=size, sha256=hash_of(self.path), first_index=first_index
        )

    def publish(self) -> None:
        """Let the shard appear under its name."""
        with writing(self.final):
            self.path.replace(self.final)
            _sync(self.final.parent)

    def _begins(self, rows: int) -> dict[str, int]:
        """Return where each column begins in a file of so many rows."""
        begins, at = {}, self._head
        for name, column in self.columns.items():
            begins[name] = at
            at += rows * column.bytes
        return begins

    def _close_gaps(self) -> None:
        """Move every column to where it belongs in a file of fewer rows: always towards the front."""
        before, after, end = self._begins(self.most), self._begins(self.rows), self._head
        for name, column in self.columns.items():
            size = self.rows * column.bytes
            for at in range(0, size, _COPIED):
                self._file.seek(before[name] + at)
                part = self._file.read(min(_COPIED, size - at))
                self._file.seek(after[name] + at)
                self._file.write(part)
            end = after[name] + size
        self._file.truncate(end)


def _head(columns: Mapping[str, Column], rows: int, length: int) -> bytes:
    """Return the first bytes of a file: a length and the JSON of a header, of ``length`` or more, ending aligned."""
    told = {"format": FORMAT} | ({"moments": MOMENTS} if "moments" in columns else {})
    header: dict[str, object] = {"__metadata__": told}
    at = 0
    for name, column in columns.items():
        size = rows * column.bytes
        header[name] = {"dtype": column.dtype, "shape": [rows, *column.shape], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    whole = max(length, 8 + len(text) + -(8 + len(text)) % ALIGNED)
    return (whole - 8).to_bytes(8, "little") + text.ljust(whole - 8)


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all; raises DataError if there is no room."""
    part = path.with_name(f"{UNFINISHED}{secrets.token_hex(4)}-{path.name}")
    with writing(path):
        try:
            with part.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        _sync(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Let what goes wrong in writing a file name it, as DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"got {path}, which cannot be written: {error.strerror or error}; make room, and give the command again"
        ) from error


def _sync(folder: Path) -> None:
    """Force the entries of a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
