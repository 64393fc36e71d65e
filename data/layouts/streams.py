"""Shards held in memory, and read ahead by threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import CancelledError, Future
from typing import Generic, TypeVar

__all__ = ["Held"]

_STREAMS = 4  # shards that are read at once
T = TypeVar("T")


class Held(Generic[T]):
    """What is wanted of numbered things, read by threads in the order of asking, and let go when no one wants it.

    Args:
        read: returns a thing by its number, in a thread.
    """

    def __init__(self, read: Callable[[int], T]) -> None:
        self._read = read
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock, self._streams = threading.Lock(), threading.Semaphore(_STREAMS)
        self._wanted: dict[Hashable, tuple[int, ...]] = {}
        self._futures: dict[int, Future[T]] = {}

    def want(self, wanted: Mapping[Hashable, Iterable[int]], *, forget: Callable[[Hashable], bool]) -> None:
        """Begin to read what is wanted and not there yet, and let go of what no one wants any more.

        Args:
            wanted: numbers by who wants them, in place of those that the same had wanted before.
            forget: whether what another had wanted before is wanted no longer.
        """
        self._check_process()
        with self._lock:
            self._update(wanted, forget)

    def get(self, number: int, who: Hashable) -> T:
        """Return a thing, which then is all that ``who`` wants; waits until it is read.

        Raises:
            Exception: what reading it raised; it is read anew when it is wanted the next time.
        """
        self._check_process()
        while True:
            with self._lock:
                self._update({who: (number,)}, lambda _: False)
                future = self._futures[number]
            try:
                return future.result()
            except CancelledError:  # another thread let go of it before it was begun
                continue
            except Exception:
                with self._lock:
                    self._futures = {n: other for n, other in self._futures.items() if other is not future}
                raise

    def _check_process(self) -> None:
        if self._process != os.getpid():  # after a fork the threads are gone
            self._reset()

    def _update(self, wanted: Mapping[Hashable, Iterable[int]], forget: Callable[[Hashable], bool]) -> None:
        kept = {who: numbers for who, numbers in self._wanted.items() if who not in wanted and not forget(who)}
        self._wanted = {**kept, **{who: tuple(numbers) for who, numbers in wanted.items()}}
        needed = dict.fromkeys(number for numbers in self._wanted.values() for number in numbers)
        for number in self._futures.keys() - needed.keys():
            self._futures.pop(number).cancel()
        for number in needed:
            if number not in self._futures:
                self._begin(number)

    def _begin(self, number: int) -> None:
        future: Future[T] = Future()
        self._futures[number] = future
        # a daemon, so that a command that hangs cannot keep the process from ending
        threading.Thread(target=self._fill, args=(number, future), daemon=True).start()

    def _fill(self, number: int, future: Future[T]) -> None:
        with self._streams:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(self._read(number))
            except BaseException as error:
                future.set_exception(error)
