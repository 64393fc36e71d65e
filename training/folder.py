"""The folder of a run: one process at a time trains in it, leftovers of killed ones go, and there is room."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import tempfile
import warnings
from pathlib import Path

from pathline.core.errors import CheckpointError
from pathline.training.manifest import make_folder

__all__ = ["RunFolder"]

LEFTOVERS = ("*/.writing-*", "*/.deleting-*")  # in the folders of checkpoints and of averages
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: set[int] = set()  # open lock files of this process


class RunFolder:
    """The folder of a run.

    Args:
        path: of the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = -1  # of no file

    def lock(self) -> None:
        """Keep other processes from training in the folder, until ``unlock`` or the end of this process.

        The folder is made if it is missing. The lock is one of the operating system on ``.lock`` in it, so that the
        file alone, as a killed process leaves it, is no obstacle. A file system without locks is warned of.

        Raises:
            CheckpointError: another process holds it; it is named.
            OSError: the folder or the file cannot be made.
        """
        make_folder(self.path)
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
            os.close(handle)
            if error.errno not in UNKNOWN:
                raise CheckpointError(
                    f"got {self.path}, in which process {holder or 'unknown'} is training; wait for it, or name "
                    "another train.folder"
                ) from error
            warnings.warn(f"{self.path} lies on a file system without locks: start no second run in it", stacklevel=2)
            return
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._handle = handle
        _held.add(handle)

    def unlock(self) -> None:
        """Let others train in the folder; without a lock, nothing."""
        if self._handle in _held:
            _held.remove(self._handle)
            os.close(self._handle)

    def sweep(self) -> list[Path]:
        """Remove what killed processes left half written or half deleted, and return it; without the lock, nothing."""
        if self._handle not in _held:
            return []
        found = [path for pattern in LEFTOVERS for path in sorted(self.path.glob(pattern))]
        for path in found:
            shutil.rmtree(path)
        return found

    def check_room(self, needed: int) -> None:
        """Check that checkpoints can be written: rights, and room for one more, with a fifth to spare.

        Args:
            needed: size of a checkpoint, in bytes.

        Raises:
            CheckpointError: the folder or its nearest parent is none or read-only, or its disk is too full.
        """
        for folder in (self.path, self.path / "checkpoints"):
            nearest = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
            if not nearest.is_dir():
                raise CheckpointError(f"got {folder}, but {nearest} is no folder; name another train.folder")
            _check_writable(folder, nearest)
            free = shutil.disk_usage(nearest).free
            if free < 1.2 * needed:
                raise CheckpointError(
                    f"got {folder} on a disk with {free / 2**20:,.0f} MiB free, expected {1.2 * needed / 2**20:,.0f} "
                    "MiB for one checkpoint and a fifth; make room, or name another train.folder"
                )


def _check_writable(folder: Path, nearest: Path) -> None:
    """Write a page into a file without a name."""
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise CheckpointError(
            f"got {folder}, but nothing can be written to {nearest}: {error.strerror}; name another train.folder"
        ) from error


def _leave_to_parent() -> None:
    """Close the lock files in a forked process, such as one that loads data and may outlive a killed parent."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
