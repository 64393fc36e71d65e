"""Shards of prepared data: written beside their name, forced to the disk, and kept with a record of what they hold.

n rows of a shard.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pathline.core.errors import DataError
from pathline.data.packed import hash_of
from pathline.data.prepare.manifest import (
    FORMAT,
    MANIFEST,
    MOMENTS,
    Column,
    Dropped,
    Manifest,
    Request,
    Shard,
    parse,
    read_manifest,
    shard_name,
)
from pathline.data.prepare.statistics import Spread

__all__ = ["Folder", "Record", "ShardFile"]

ALIGNED = 64  # bytes: where the tensors of a file begin
JOURNAL, PLAN, LOCK = "journal", "plan.json", "lock"
UNFINISHED = ".writing-"  # beginning of the names of what is being written
_COPIED = 2**24  # bytes moved at once


class Record(BaseModel):
    """What is known of a whole shard; the manifest is made of these."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    shard: Shard
    dropped: list[Dropped]
    statistics: dict[str, Spread]


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
        self._file = self.path.open("w+b")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)

    def write(self, parts: Mapping[str, Tensor]) -> None:
        """Append rows of every column."""
        begins, count = self._begins(self.most), 0
        for name, column in self.columns.items():
            rows = parts[name].contiguous()
            count = len(rows)
            assert Column.of(rows) == column and self.rows + count <= self.most
            self._file.seek(begins[name] + self.rows * column.bytes)
            self._file.write(rows.reshape(-1).view(torch.uint8).numpy().data)
        self.rows += count

    def kept(self, first_index: int) -> Shard:
        """Force the shard to the disk and return what it is; ``publish`` gives it its name."""
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


class Folder:
    """The folder of prepared data, from the first run on it to the last.

    While it is unfinished, ``journal`` in it holds the request and a record of each whole shard.

    Args:
        path: of the folder; it need not exist.
        request: that its contents answer.

    Raises:
        DataError: it holds something else, or what another request has begun or finished.
    """

    def __init__(self, path: Path, request: Request) -> None:
        self.path, self.request, self.journal = path, request, path / JOURNAL
        self._lock = -1  # of no file
        if path.exists() and not path.is_dir():
            raise DataError(f"got {path}, which is no folder, to prepare data in; name another")
        self.check()

    def check(self) -> None:
        """Raise DataError unless what is in the folder belongs to the request."""
        plan = self.journal / PLAN
        if (self.path / MANIFEST).exists():
            begun = read_manifest(self.path).request
        elif plan.exists():
            begun = parse(plan, Request)
        else:
            others = sorted(file.name for file in self.path.glob("*") if file.name != JOURNAL)
            if others:
                raise DataError(f"got {self.path} to prepare data in, which holds {others[0]}; name another folder")
            return
        changed = _differences(begun, self.request)
        if changed:
            raise DataError(
                f"got {self.path}, which was begun with another request ({'; '.join(changed)}); go on with that one, "
                "or name another folder"
            )

    def open(self, needed: int) -> None:
        """Claim the folder for this command: lock it, write the request down, and remove what was left unfinished.

        Args:
            needed: bytes of all shards, for which there must be room.

        Raises:
            DataError: another command is at work in it, it belongs to another request, or its disk is too full.
        """
        self.journal.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.journal / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"got {self.path}, in which another command is preparing data; wait for it") from error
        self.check()
        write_whole(self.journal / PLAN, self.request.model_dump_json(indent=1))
        for left in [*self.path.glob(f"{UNFINISHED}*"), *self.journal.glob(f"{UNFINISHED}*")]:
            left.unlink()
        there = sum(file.stat().st_size for file in self.path.glob("shard-*"))
        free = shutil.disk_usage(self.path).free
        if free < needed - there:
            raise DataError(
                f"got {self.path} on a disk with {free / 2**30:,.1f} GiB free, expected {(needed - there) / 2**30:,.1f}"
                " GiB for what is to come; make room, or name another folder"
            )

    def record(self, number: int) -> Record | None:
        """Return the record of a shard that is whole; None for one that is to be made, or made again."""
        path, shard = self.journal / f"{number:05d}.json", self.path / shard_name(number)
        if not path.is_file() or not shard.is_file():
            return None
        try:
            record = parse(path, Record)
        except DataError:
            return None
        same = shard.stat().st_size == record.shard.bytes and hash_of(shard) == record.shard.sha256
        return record if same else None

    def keep(self, number: int, file: ShardFile, record: Record) -> None:
        """Give a shard its name, and write its record down."""
        write_whole(self.journal / f"{number:05d}.json", record.model_dump_json())
        file.publish()

    def records(self, count: int) -> list[Record]:
        """Return the records of all shards, whose files are known to be whole."""
        return [parse(self.journal / f"{number:05d}.json", Record) for number in range(count)]

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest: from now on the folder is whole."""
        write_whole(self.path / MANIFEST, manifest.model_dump_json(indent=1) + "\n")

    def tidy(self) -> None:
        """Remove the journal of a folder that is whole."""
        shutil.rmtree(self.journal, ignore_errors=True)

    def release(self) -> None:
        """Let other commands in; without a claim, nothing."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    part = path.with_name(f"{UNFINISHED}{secrets.token_hex(4)}-{path.name}")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    _sync(path.parent)


def _differences(before: Request, now: Request) -> list[str]:
    """List the entries in which two requests differ, as ``resolution: 256 -> 512``."""
    old, new = (dict(_leaves(request.model_dump(mode="json"))) for request in (before, now))
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}".lstrip("."))
    else:
        yield path, value


def _sync(folder: Path) -> None:
    """Force the entries of a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
