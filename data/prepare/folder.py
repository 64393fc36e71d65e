"""The folder of prepared data while it is made: its lock, its request, and a record of each shard that is whole."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pathline.core.errors import DataError
from pathline.data.packed import hash_of
from pathline.data.prepare.manifest import (
    MANIFEST,
    Dropped,
    Manifest,
    Request,
    Shard,
    parse,
    read_manifest,
    shard_name,
)
from pathline.data.prepare.shards import UNFINISHED, ShardFile, write_whole, writing
from pathline.data.prepare.statistics import Spread

__all__ = ["Folder", "Record"]

JOURNAL, PLAN, LOCK, STOPPED = "journal", "plan.json", "lock", "stopped"


class Record(BaseModel):
    """What is known of a whole shard; the manifest is made of these.

    Attributes:
        shard: its file; None if none of its images could be stored.
        dropped: images that were left out.
        statistics: of its rows, by column; empty without a row.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    shard: Shard | None
    dropped: list[Dropped]
    statistics: dict[str, Spread]


class Folder:
    """The folder of prepared data, from the first run on it to the last.

    While it is unfinished, ``journal`` in it holds the request and a record of each whole shard.

    Args:
        path: of the folder; it need not exist.
        request: that its contents answer; one that goes on may leave the note on the licence out, and may from now on
            drop images instead of stopping at them: until then none was left out.

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
        request = self.request
        if request.licence is None:
            request = request.model_copy(update={"licence": begun.licence})
        if begun.on_error == "stop":
            begun = begun.model_copy(update={"on_error": request.on_error})
        changed = _differences(begun, request)
        if changed:
            raise DataError(
                f"got {self.path}, which was begun with another request ({'; '.join(changed)}); go on with that one, "
                "or name another folder"
            )
        self.request = request

    def open(self, needed: int) -> None:
        """Claim the folder for this command: lock it, write the request down, and remove what was left unfinished.

        Args:
            needed: bytes of all shards, for which there must be room.

        Raises:
            DataError: another command is at work in it, it belongs to another request, or its disk is too full.
        """
        with writing(self.journal):
            self.journal.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.journal / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"got {self.path}, in which another command is preparing data; wait for it") from error
        self.check()
        write_whole(self.journal / PLAN, self.request.model_dump_json(indent=1))
        (self.journal / STOPPED).unlink(missing_ok=True)
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
        try:
            record = parse(path, Record) if path.is_file() else None
        except DataError:
            return None
        if record is None or record.shard is None:
            return record
        same = shard.is_file() and shard.stat().st_size == record.shard.bytes and hash_of(shard) == record.shard.sha256
        return record if same else None

    def keep(self, number: int, file: ShardFile, record: Record) -> None:
        """Give a shard its name, and write its record down."""
        write_whole(self.journal / f"{number:05d}.json", record.model_dump_json())
        if record.shard is not None:
            file.publish()

    def records(self, count: int) -> list[Record]:
        """Return the records of all shards, whose files are known to be whole."""
        return [parse(self.journal / f"{number:05d}.json", Record) for number in range(count)]

    def stop(self, word: str) -> None:
        """Tell the other processes at work in the folder to leave, and why by a word, if there is room for it."""
        with suppress(DataError):
            write_whole(self.journal / STOPPED, word)

    def stopped(self) -> str | None:
        """Return the word that another process left for this one; None as long as there is none."""
        with suppress(OSError):
            return (self.journal / STOPPED).read_text(encoding="utf-8")
        return None

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


def _differences(before: Request, now: Request) -> list[str]:
    """List the entries in which two requests differ, as ``resolution: 256 -> 512``."""
    old, new = (dict(_leaves(request.model_dump(mode="json"))) for request in (before, now))
    return [
        f"{key}: {old.get(key)!r:.100} -> {new.get(key)!r:.100}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}".lstrip("."))
    else:
        yield path, value
