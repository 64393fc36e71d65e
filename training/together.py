"""Work that several processes do at the same place, each its part: it succeeds on all of them, or fails on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from pathline.core.errors import CheckpointError, ProcessError

__all__ = ["gathered", "together"]

LONGEST = 1000  # bytes of a message
T = TypeVar("T")


def together(work: Callable[[], T], group: ProcessGroup | None) -> T:
    """Do a part of a common work, and hear of the others whether they did theirs.

    Args:
        work: returns what is handed on.
        group: of gloo; None is the default one, or this process alone.

    Raises:
        CheckpointError: it failed in some processes; tells what they say. One process raises its own error.
        ProcessError: another process is gone.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return work()
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:  # of any kind: the others are waiting
        failure = error
    told = gathered("" if failure is None else str(failure) or type(failure).__name__, group)
    who = {text: [str(rank) for rank, other in enumerate(told) if other == text] for text in told if text}
    if who:
        words = "; ".join(f"{text} (process {', '.join(ranks)})" for text, ranks in who.items())
        raise CheckpointError(words) from failure
    return result


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
