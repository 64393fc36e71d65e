"""Signals that ask a run to leave, heard at the end of a step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Signals"]

HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Signals:
    """While entered, the first of SIGINT, SIGTERM and SIGUSR1 is noted; a second leaves at once, with 128 + its number.

    Nothing is damaged by leaving at once: whatever was being written is known by its name to be unfinished.

    Attributes:
        caught: number of the signal noted, or 0.
    """

    def __init__(self) -> None:
        self.caught = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # handlers can be set nowhere else
            self._previous = {number: signal.signal(number, self._hear) for number in HEARD}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.caught:
            os.write(2, b"\na second signal: leaving at once; go on with --resume auto\n")
            os._exit(128 + number)
        self.caught = number
