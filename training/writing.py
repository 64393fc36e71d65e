"""Checkpoints written beside training: a save copies what it saves to the host, and a thread writes the copy."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pathline.core.errors import CheckpointError
from pathline.training import checkpoints
from pathline.training.checkpoints import Keep, Snapshot

__all__ = ["Writer"]


class Writer:
    """Writes the checkpoints of a run, at most one at a time; one that fails does not end the run.

    The copy on the host is as large as a checkpoint, and is kept from save to save.

    Args:
        folder: of the checkpoints.
        keep: which of them stay.
        asynchronous: whether ``save`` returns while a thread writes.

    Attributes:
        failures: what to tell of the saves that failed, for want of room, rights or memory; each leaves the older
            checkpoints as they are and no trace.
        saved: number of saves that did not.
    """

    def __init__(self, folder: Path, keep: Keep, *, asynchronous: bool) -> None:
        self.folder, self.keep, self.asynchronous = folder, keep, asynchronous
        self.failures: list[str] = []
        self.saved = self._told = 0
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Save a snapshot as it is now; what changes it afterwards does not reach the disk.

        Waits for the save before this one. Raises what went wrong with that one or this one, unless it is a failure
        that ``failures`` tells.
        """
        self.wait()
        if not self.asynchronous:
            self._write(step, snapshot, [])
            return self._raise()
        try:
            staged = Snapshot(self._staged(snapshot.tensors), copy.deepcopy(dict(snapshot.state)))
            thread = threading.Thread(target=self._write, args=(step, staged, _copying(snapshot)), name="checkpoint")
            thread.start()
        except (MemoryError, RuntimeError) as error:  # the second is torch's word for no memory, and that of threads
            self._copies.clear()
            self._fail(step, error)
        else:
            self._thread = thread

    def wait(self) -> None:
        """Wait until nothing is being written; raises what went wrong, unless it is a failure."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def poll(self) -> str | None:
        """Return what to tell of a failed save that was not told yet, or None."""
        if self._told == len(self.failures):
            return None
        self._told += 1
        return self.failures[self._told - 1]

    def close(self) -> None:
        """Wait until nothing is being written, and free the copy; raises what went wrong, unless it is a failure."""
        try:
            self.wait()
        finally:
            self._copies.clear()

    def _staged(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copy tensors to the host; those on a device are on their way when this returns."""
        staged: dict[str, dict[str, Tensor]] = {}
        for group, tensors in groups.items():
            staged[group] = {name: self._copy(group, name, tensor) for name, tensor in tensors.items()}
        for gone in self._copies.keys() - {(group, name) for group, tensors in groups.items() for name in tensors}:
            del self._copies[gone]
        return staged

    def _copy(self, group: str, name: str, tensor: Tensor) -> Tensor:
        held = self._copies.get((group, name))
        if held is None or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[group, name] = held
        return held.copy_(tensor.detach(), non_blocking=tensor.is_cuda)

    def _write(self, step: int, snapshot: Snapshot, copying: list[torch.cuda.Event]) -> None:
        """Write a snapshot once it has arrived; never raises, for nobody would hear of it in a thread."""
        try:
            for event in copying:
                event.synchronize()
            self._store(step, snapshot)
            self.saved += 1
        except (OSError, MemoryError, CheckpointError) as error:
            self._fail(step, error)
        except BaseException as error:
            self._error = error

    def _store(self, step: int, snapshot: Snapshot) -> None:
        checkpoints.write(self.folder, step, snapshot, self.keep)

    def _fail(self, step: int, error: BaseException) -> None:
        reason = str(error) or type(error).__name__
        self.failures.append(
            f"the checkpoint of step {step} was not written to {self.folder}: {reason}; training goes on, and the "
            "next save tries again"
        )

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


def _copying(snapshot: Snapshot) -> list[torch.cuda.Event]:
    """Return an event for each CUDA device, after the copies that were begun on it."""
    events = []
    for device in {tensor.device for tensors in snapshot.tensors.values() for tensor in tensors.values()}:
        if device.type == "cuda":
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # waits without keeping a core busy
            event.record(torch.cuda.current_stream(device))
            events.append(event)
    return events
