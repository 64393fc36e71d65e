"""A drawing in pieces: a folder of shards, each of a fixed range of samples, that a killed drawing goes on from."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from pathline.core.errors import CheckpointError, ConfigurationError, DataError
from pathline.data.layouts.arrays import read_array
from pathline.training.manifest import make_folder, parse
from pathline.training.stored import clear_leftovers, leftover_of, write_npz, write_text

__all__ = ["PICTURE", "RECORD", "About", "Shards"]

FORMAT = 1
JOURNAL, LOCK, STOP, RECORD, PICTURE = "journal.json", ".lock", ".stop", "record.json", "picture.png"
MOST = 100_000  # shards
_SHARD = re.compile(r"shard-[0-9]{5}\.(npz|json)")
_Natural = Annotated[int, Field(ge=0, strict=True)]


class About(NamedTuple):
    """What a shard cost, and what it holds.

    Attributes:
        nfe: network calls of a batch's solve, the most of all batches.
        block_evaluations: transformer blocks that ran in them, the most as well; None for a network without any.
        seconds: of all batches.
        bytes: of the file.
    """

    nfe: _Natural
    block_evaluations: _Natural | None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
    bytes: _Natural = 0


_ABOUT = TypeAdapter(About)


class Shards:
    """The shards of a drawing, ``shard-00000.npz`` and on; beside each a JSON file tells what it cost.

    A shard is there when both files are. ``journal.json`` tells what was asked for.

    Args:
        folder: of the shards.
        count: number of samples.
        size: samples a shard; the last has what is left.

    Raises:
        ConfigurationError: too many shards.
    """

    def __init__(self, folder: Path, count: int, size: int) -> None:
        self.folder = folder
        if -(-count // size) > MOST:
            raise ConfigurationError(
                f"sample.shard: got {size} for {count} samples, which are more than {MOST:,} shards; set it to "
                f"{-(-count // MOST)} or more"
            )
        self.ranges = [range(first, min(first + size, count)) for first in range(0, count, size)]
        self._lock = -1  # of no file

    def claim(self, request: Mapping[str, Any], differences: Callable[[Mapping[str, Any]], list[str]]) -> list[int]:
        """Keep others from drawing here, and return the numbers of the shards that are missing.

        Args:
            request: what is asked for; fit for JSON.
            differences: tells, given an older request, in what it is another one; no words if it is the same.

        Raises:
            DataError: another drawing is here, finished or not, or files of something else; or another process is
                drawing.
            OSError: the folder cannot be made or written to.
        """
        make_folder(self.folder.absolute())
        foreign = sorted(path.name for path in self.folder.iterdir() if not _is_own(path))
        if foreign:
            raise DataError(
                f"got {self.folder} with {', '.join(foreign[:3])} in it, which no drawing wrote; move it elsewhere, or "
                "name another sample.output"
            )
        self._claim()
        journal = self.folder / JOURNAL
        try:
            self._check(journal, differences)
        except BaseException:
            self.release()
            raise
        clear_leftovers([path.with_name(leftover_of(path.name) or path.name) for path in self.folder.iterdir()])
        (self.folder / STOP).unlink(missing_ok=True)
        write_text(journal, json.dumps({"format": FORMAT, "request": request}, indent=1))
        return [number for number in range(len(self.ranges)) if self.about(number) is None]

    def about(self, number: int) -> About | None:
        """Return what is told of a shard; None if it is not there, or not whole."""
        told, path = self._paths(number)
        try:
            about = _ABOUT.validate_python(parse(told))
            return about if path.stat().st_size == about.bytes else None
        except (OSError, CheckpointError, ValidationError):
            return None

    def write(self, number: int, samples: NDArray[Any], labels: Tensor | None, about: About) -> None:
        """Write a shard; it is there when it is whole."""
        told, path = self._paths(number)
        write_npz(path, [samples], len(samples), None if labels is None else labels.numpy(), older=[told])
        write_text(told, json.dumps(about._replace(bytes=path.stat().st_size)._asdict()))

    def check_room(self, number: int, *, joined: bool) -> None:
        """Check, by a shard that is there, that the disk has room for those that are not, and for all of them joined.

        Raises:
            DataError: it has not.
        """
        about = self.about(number)
        each = about.bytes / len(self.ranges[number]) if about else 0.0
        count = sum(map(len, self.ranges))
        needed, free = each * (count - self.done + joined * count), shutil.disk_usage(self.folder).free
        if free < needed:
            raise DataError(
                f"got {self.folder} on a disk with {free / 2**20:,.0f} MiB free, expected {needed / 2**20:,.0f} MiB "
                f"for the other samples{' and for joining them' * joined}; make room and give the same command again"
                f"{', or set sample.shards to keep' * joined}"
            )

    def read(self, number: int, labels: Tensor | None, dtype: type[np.generic]) -> NDArray[Any]:
        """Return the samples of a shard.

        Args:
            number: of the shard.
            labels: that it must have.
            dtype: that its samples must have.

        Raises:
            DataError: it is damaged, or of other labels or samples; it is then left aside, and is missing.
        """
        told, path = self._paths(number)
        try:
            return _read(path, len(self.ranges[number]), labels, dtype)
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile) as error:  # of a wrong sum
            told.unlink(missing_ok=True)
            raise DataError(
                f"got {path}, which is damaged ({error}); give the same command again, which draws it anew"
            ) from error

    def read_all(self, labels: Callable[[range], Tensor | None], dtype: type[np.generic]) -> Iterator[NDArray[Any]]:
        """Yield the samples of all shards in turn.

        Raises:
            DataError: as ``read`` does, or shards of different shapes; these are then left aside, and are missing.
        """
        shape: tuple[int, ...] | None = None
        for number, ids in enumerate(self.ranges):
            samples = self.read(number, labels(ids), dtype)
            if samples.shape[1:] != (shape or samples.shape[1:]):
                paths = [self._paths(other) for other in (0, number)]
                for told, _ in paths:
                    told.unlink(missing_ok=True)
                raise DataError(
                    f"got samples {samples.shape[1:]} in {paths[1][1]} and {shape} in {paths[0][1]}; give the same "
                    "command again, which draws both anew"
                )
            shape = samples.shape[1:]
            yield samples

    def stop(self) -> None:
        """Ask all processes to leave after the batch that they are at."""
        (self.folder / STOP).touch()

    @property
    def stopped(self) -> bool:
        """Whether they are asked to."""
        return (self.folder / STOP).exists()

    @property
    def done(self) -> int:
        """Number of samples in the shards that are there."""
        return sum(len(ids) for number, ids in enumerate(self.ranges) if self.about(number) is not None)

    @property
    def bytes(self) -> int | None:
        """Of all shards together; None if one is missing."""
        found = [self.about(number) for number in range(len(self.ranges))]
        sizes = [about.bytes for about in found if about is not None]
        return sum(sizes) if len(sizes) == len(found) else None

    def release(self, *, remove: bool = False) -> None:
        """Let others draw here; or remove the folder, the journal last, so that a kill meanwhile does no harm.

        What is not a drawing's stays, with its folder, as does one that is a link.
        """
        if remove:
            last = (self.folder / JOURNAL, self.folder / LOCK)
            for path in (*(path for path in self.folder.iterdir() if _is_own(path) and path not in last), *last):
                path.unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _paths(self, number: int) -> tuple[Path, Path]:
        name = f"shard-{number:05d}"
        return self.folder / f"{name}.json", self.folder / f"{name}.npz"

    def _claim(self) -> None:
        """Lock the folder by the operating system, which a killed process leaves open; where that cannot be, go on."""
        handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
            os.close(handle)
            raise DataError(
                f"got {self.folder}, into which process {holder or 'unknown'} is drawing; wait for it, or name another "
                "sample.output"
            ) from error
        except OSError:  # a file system without locks
            os.close(handle)
            return
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._lock = handle

    def _check(self, journal: Path, differences: Callable[[Mapping[str, Any]], list[str]]) -> None:
        """Check that what is here is of the same drawing, or nothing."""
        if not journal.exists():
            if any(self.folder.glob("shard-*")):
                raise DataError(f"got {self.folder} with shards and no {JOURNAL}; remove it, or name another output")
            return
        try:
            content = parse(journal)
        except CheckpointError as error:
            raise DataError(f"got {self.folder} with {error}; remove it, or name another sample.output") from error
        request = content.get("request")
        if content.get("format") != FORMAT or not isinstance(request, dict):
            raise DataError(f"got {journal}, which tells of no drawing; remove its folder, or name another")
        if found := differences(request):
            raise DataError(
                f"got {self.folder}, which holds another drawing ({'; '.join(found)}); give what it was begun "
                "with to go on, or remove it, or name another sample.output"
            )


def _is_own(path: Path) -> bool:
    """Whether a file in a folder of shards is a drawing's, by its name."""
    name = leftover_of(path.name) or path.name
    known = name in (JOURNAL, LOCK, STOP, RECORD, PICTURE) or _SHARD.fullmatch(name) is not None
    return known and not path.is_dir()


def _read(path: Path, count: int, labels: Tensor | None, dtype: type[np.generic]) -> NDArray[Any]:
    """Return the samples of a shard; raises, as zipfile does or ValueError, unless they are such with these labels."""
    with zipfile.ZipFile(path) as archive:
        samples = _array(archive, "arr_0.npy", path, dtype)
        theirs = _array(archive, "arr_1.npy", path, np.int64) if "arr_1.npy" in archive.namelist() else None
    if samples.ndim != 4 or len(samples) != count or (theirs is None) != (labels is None):
        raise ValueError(f"arrays {samples.shape}, {'no ' * (theirs is None)}labels")
    if theirs is not None and labels is not None and not np.array_equal(theirs, labels.numpy()):
        raise ValueError("other labels")
    return samples


def _array(archive: zipfile.ZipFile, name: str, path: Path, dtype: type[np.generic]) -> NDArray[Any]:
    """Return a member, which is not compressed, so that it is no larger than the file."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > path.stat().st_size:
        raise ValueError(f"{name} is compressed or forged")
    return read_array(archive.read(info), name, (np.dtype(dtype).str,))
