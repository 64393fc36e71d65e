"""Work that several processes do at the same place, each its part: it succeeds on all of them, or fails on all."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from pathline.core.errors import CheckpointError, ProcessError

__all__ = ["alone", "gathered", "together"]

LONGEST = 1000  # bytes of a message
T = TypeVar("T")


def together(work: Callable[[], T], group: ProcessGroup | None) -> T:
    """Do a part of a common work, and hear of the others whether they did theirs.

    Args:
        work: returns what is handed on. It may call ``torch.distributed.checkpoint`` with the same group, if nothing
            fails in one process alone before that.
        group: of gloo; None is the default one, or this process alone.

    Raises:
        CheckpointError: it failed in some processes; tells what they say. Without processes its own error is raised.
        ProcessError: another process is gone.
    """
    if not dist.is_initialized():
        return alone(work)
    failure: BaseException | None = None
    told: dict[int, str] = {}
    try:
        result = work()
    except CheckpointException as error:  # torch has told all processes; it is no Exception
        failure, told = error, {rank: _words(other) for rank, (other, _) in error.failures.items()}
    except Exception as error:  # of any kind: the others are waiting
        failure = error
    told = told or {rank: text for rank, text in enumerate(gathered(_words(failure), group)) if text}
    if told:
        who = {text: [str(rank) for rank, other in sorted(told.items()) if other == text] for text in told.values()}
        words = "; ".join(f"{text} (process {', '.join(ranks)})" for text, ranks in who.items())
        raise CheckpointError(words) from failure
    return result


def alone(work: Callable[[], T]) -> T:
    """Do a work of ``torch.distributed.checkpoint`` in this process alone, without a warning of that.

    Raises:
        BaseException: what was raised in it, and not torch's sum of what went wrong in all processes.
    """
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            return work()
    except CheckpointException as error:
        raise error.failures[0][0] from error


def gathered(text: str, group: ProcessGroup | None) -> list[str]:
    """Return a message of every process, by rank; nothing is pickled.

    Raises:
        ProcessError: another process is gone, or silent for longer than the group's timeout.
    """
    content = text.encode()[:LONGEST].ljust(LONGEST, b"\0")
    mine = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    try:
        dist.all_gather(every, mine, group=group)
    except RuntimeError as error:  # what gloo raises
        raise ProcessError(f"got no word from another process ({str(error).splitlines()[0]}); see its own") from error
    return [bytes(other.tolist()).rstrip(b"\0").decode(errors="ignore") for other in every]


def _words(error: BaseException | None) -> str:
    return "" if error is None else str(error) or type(error).__name__
