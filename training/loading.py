"""Batches on the device, read ahead of training: a thread gathers on the host what the next visits of the data need."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import count
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

import torch

from pathline.core.draws import BoundDraws, Draws, send
from pathline.data import Batch, Dataset

__all__ = ["Loader", "Stream", "Visit"]

AHEAD = 2  # visits that are loaded before they are asked for
_PATIENCE = 2.0  # seconds that a load under way has to end in when the loader is closed


class Visit(NamedTuple):
    """Samples that a device takes at once.

    Attributes:
        step: number of their batch in the training stream, counted from 0; a roll-back does not go back in it.
        positions: of the samples in the training stream.
    """

    step: int
    positions: range


class Stream(NamedTuple):
    """The part of the training stream that one device takes.

    Attributes:
        seed: of the run.
        batch: samples of a step, over all devices.
        share: those of this device.
        micro: samples at once; the last ones of a step may be fewer.
        rank: number of this device, counted from 0.
    """

    seed: int
    batch: int
    share: int
    micro: int
    rank: int

    def visits(self, step: int) -> list[Visit]:
        """Return what this device takes of a step, in order."""
        first = step * self.batch + self.rank * self.share
        end = first + self.share
        return [Visit(step, range(start, min(start + self.micro, end))) for start in range(first, end, self.micro)]

    def visits_from(self, visit: Visit) -> Iterator[Visit]:
        """Yield a visit and all after it, without end."""
        for step in count(visit.step):
            yield from (later for later in self.visits(step) if later.positions.start >= visit.positions.start)

    def draws(self, visit: Visit) -> BoundDraws:
        """Return the draws of a visit."""
        return Draws(self.seed).at(visit.positions, step=visit.step)


class Loader:
    """Hands out the batches of a run, on the device.

    Unless the data lie in memory, a thread loads the next two visits meanwhile, into pinned memory for a CUDA device;
    on a CPU it finishes them too. Which visits these are is known, since the order of the data is a function of (seed,
    position); after a roll-back or a resume, what was loaded ahead is dropped. The thread starts with the first visit
    and ends with ``close``; a visit after that starts another.

    Args:
        dataset: whose samples.
        stream: what of them this device takes.
        device: where batches go.
    """

    def __init__(self, dataset: Dataset, stream: Stream, device: torch.device) -> None:
        self.dataset, self.stream, self.device = dataset, stream, device
        self._thread: Thread | None = None
        self._asked: SimpleQueue[tuple[Visit, Future[Batch]] | None] = SimpleQueue()
        self._queue: deque[tuple[Visit, Future[Batch]]] = deque()
        self._upcoming: Iterator[Visit] = iter(())

    def take(self, visit: Visit) -> Batch:
        """Return the batch of a visit on the device, but for ``index``, which stays on the host.

        Raises:
            Exception: whatever the data set raises, also that of loading ahead: in the visit that it concerns.
        """
        loaded = self._load(visit) if self.dataset.in_memory else self._loaded_ahead(visit)
        if self.device.type == "cpu":
            return loaded
        there = {name: values if name == "index" else send(values, self.device) for name, values in loaded.items()}
        return self.dataset.finish(there, self.stream.draws(visit))

    def close(self) -> None:
        """Drop what was loaded ahead, and end the thread; one that waits for data which do not come is left behind."""
        self._drop()
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join(_PATIENCE)
            self._thread = None

    def _loaded_ahead(self, visit: Visit) -> Batch:
        if self._thread is None:
            self._asked = SimpleQueue()
            # a daemon, so that a read that hangs cannot keep the process from ending
            self._thread = Thread(target=self._serve, args=(self._asked,), name="loading", daemon=True)
            self._thread.start()
        if not self._queue or self._queue[0][0] != visit:
            self._drop()
            self._upcoming = self.stream.visits_from(visit)
        while len(self._queue) <= AHEAD:
            upcoming = next(self._upcoming)
            self._queue.append((upcoming, Future()))
            self._asked.put(self._queue[-1])
        return self._queue.popleft()[1].result()

    def _serve(self, asked: SimpleQueue[tuple[Visit, Future[Batch]] | None]) -> None:
        """Load what is asked for, visit after visit, until None is asked for."""
        while (task := asked.get()) is not None:
            visit, future = task
            if future.set_running_or_notify_cancel():
                try:
                    self._use_device()
                    future.set_result(self._load(visit))
                except BaseException as error:
                    future.set_exception(error)
            del task, future  # while it waits for more, it holds no batch

    def _load(self, visit: Visit) -> Batch:
        """Load a visit, and finish it too where there is no other device.

        Torch keeps pinned memory, and uses it again once it has been sent.
        """
        draws = self.stream.draws(visit)
        loaded = self.dataset.load(self.dataset.indices_at(visit.positions, self.stream.seed), draws)
        if self.device.type == "cpu":
            return self.dataset.finish(loaded, draws)
        if self.device.type != "cuda":
            return loaded
        return {name: values if name == "index" else values.pin_memory() for name, values in loaded.items()}

    def _use_device(self) -> None:
        """Pin memory in the context of this process's device: by default a thread would make one on the first."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _drop(self) -> None:
        while self._queue:
            self._queue.pop()[1].cancel()
