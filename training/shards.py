"""A drawing in pieces: a folder of shards, each of a fixed range of samples, that a killed drawing goes on from."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import socket
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.errors import CheckpointError, DataError
from pathline.training.manifest import make_folder, parse
from pathline.training.stored import LEFTOVER, write_npz, write_text

__all__ = ["About", "Shards"]

FORMAT = 1
JOURNAL, LOCK, STOP = "journal.json", ".lock", ".stop"


class About(NamedTuple):
    """What a shard cost, and what it holds.

    Attributes:
        nfe: network calls of a batch's solve, the most of all batches.
        block_evaluations: transformer blocks that ran in them, the most as well; None for a network without any.
        seconds: of all batches.
        bytes: of the file.
    """

    nfe: int
    block_evaluations: int | None
    seconds: float
    bytes: int = 0


class Shards:
    """The shards of a drawing, ``shard-00000.npz`` and on; beside each a JSON file tells what it cost.

    A shard is there when both files are. ``journal.json`` tells what was asked for.

    Args:
        folder: of the shards.
        count: number of samples.
        size: samples a shard; the last has what is left.
    """

    def __init__(self, folder: Path, count: int, size: int) -> None:
        self.folder = folder
        self.ranges = [range(first, min(first + size, count)) for first in range(0, count, size)]
        self._lock = -1  # of no file

    def claim(self, request: Mapping[str, Any], differences: Callable[[Mapping[str, Any]], list[str]]) -> list[int]:
        """Keep others from drawing here, and return the numbers of the shards that are missing.

        Args:
            request: what is asked for; fit for JSON.
            differences: tells, given an older request, in what it is another one; no words if it is the same.

        Raises:
            DataError: another drawing is here, finished or not, or files that are none; or another process is drawing.
            OSError: the folder cannot be made or written to.
        """
        make_folder(self.folder)
        self._claim()
        journal = self.folder / JOURNAL
        try:
            self._check(journal, differences)
        except BaseException:
            self.release()
            raise
        outputs = f"{LEFTOVER}{glob.escape(self.folder.stem)}.*"
        for path in (*self.folder.glob(f"{LEFTOVER}*"), *self.folder.parent.glob(outputs)):
            path.unlink()
        (self.folder / STOP).unlink(missing_ok=True)
        write_text(journal, json.dumps({"format": FORMAT, "request": request}, indent=1))
        return [number for number in range(len(self.ranges)) if self.about(number) is None]

    def about(self, number: int) -> About | None:
        """Return what is told of a shard; None if it is not there, or not whole."""
        told, path = self._paths(number)
        try:
            about = About(**parse(told))
            return about if path.stat().st_size == about.bytes else None
        except (OSError, CheckpointError, TypeError):
            return None

    def write(self, number: int, samples: NDArray[Any], labels: Tensor | None, about: About) -> None:
        """Write a shard; it is there when it is whole."""
        told, path = self._paths(number)
        told.unlink(missing_ok=True)
        write_npz(path, [samples], len(samples), None if labels is None else labels.numpy())
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

    def read(self, number: int, labels: Tensor | None) -> NDArray[Any]:
        """Return the samples of a shard.

        Raises:
            DataError: it is damaged, or of other labels; it is then left aside, and is missing.
        """
        told, path = self._paths(number)
        try:
            return _read(path, len(self.ranges[number]), labels)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:  # the last of a wrong sum, too
            told.unlink(missing_ok=True)
            raise DataError(
                f"got {path}, which is damaged ({error}); give the same command again, which draws it anew"
            ) from error

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

    def release(self, *, remove: bool = False) -> None:
        """Let others draw here; or remove the folder, the journal last, so that a kill meanwhile does no harm."""
        if remove:
            for path in self.folder.glob("shard-*"):
                path.unlink()
            shutil.rmtree(self.folder)
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


def _read(path: Path, count: int, labels: Tensor | None) -> NDArray[Any]:
    """Return the samples of a shard; raises ValueError, as numpy does, unless they are ``count`` with these labels."""
    with np.load(path, allow_pickle=False) as arrays:
        samples: NDArray[Any] = arrays["arr_0"]
        theirs = arrays["arr_1"] if "arr_1" in arrays else None
    if samples.shape[:1] != (count,) or (theirs is None) != (labels is None):
        raise ValueError(f"arrays {samples.shape}, {'no ' * (theirs is None)}labels")
    if theirs is not None and labels is not None and not np.array_equal(theirs, labels.numpy()):
        raise ValueError("other labels")
    return samples
