"""Signals that ask a run to leave, heard at the end of a step."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Signals"]

HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Signals:
    """While entered, the first of SIGINT, SIGTERM, SIGUSR1 and SIGHUP is noted; a second leaves at once.

    Its exit code is 128 + its number. Nothing is damaged by leaving at once: whatever was being written is known by its
    name to be unfinished. A thread waits for the second one, since Python itself hears none while it waits for a device
    or for another process. SIGHUP, which a closed terminal sends, may come twice: as a second one it is not heard, and
    not at all where it is ignored, as under ``nohup``.

    Attributes:
        caught: number of the signal noted, or 0.
    """

    def __init__(self) -> None:
        self.caught = 0
        self._previous: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._woken_before = -1

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # handlers can be set nowhere else
            self._pipe = reading, writing = os.pipe()
            os.set_blocking(writing, False)
            self._woken_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
            threading.Thread(target=_leave_on_the_second, args=(reading,), name="signals", daemon=True).start()
            ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            heard = HEARD[:-1] if ignored else HEARD
            self._previous = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._woken_before)
            os.close(self._pipe[1])  # the thread ends, and closes the other end

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.caught = self.caught or number


def _leave_on_the_second(pipe: int) -> None:
    """Read the numbers of signals as they come; end the process at the second."""
    first = True
    while came := os.read(pipe, 1):
        number = came[0]
        if number not in HEARD or (number == signal.SIGHUP and not first):
            continue
        if not first:
            with suppress(OSError):  # nobody may be there to read it
                os.write(2, b"\na second signal: leaving at once; go on with --resume auto\n")
            os._exit(128 + number)
        first = False
    os.close(pipe)
