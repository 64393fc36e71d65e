"""Several processes that run one function, as torchrun would start them; forked, so that nothing is imported anew."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class Ended(NamedTuple):
    """What became of the processes, by rank.

    Attributes:
        codes: exit codes, −n for one that signal n ended; −9 for one that was running at the timeout.
        results: what the function returned, through JSON; None for a process that failed.
        outputs: what each wrote to stdout and stderr, the trace of an exception included.
        seconds: how long each ran.
    """

    codes: list[int]
    results: list[Any]
    outputs: list[str]
    seconds: list[float]

    def checked(self) -> list[Any]:
        """Return the results; raise AssertionError, with all that was written, if a process failed."""
        if any(self.codes):
            raise AssertionError("\n".join(f"--- rank {i}: {self.codes[i]}\n{o}" for i, o in enumerate(self.outputs)))
        return self.results


def run_processes(
    count: int, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0, endless: Collection[int] = ()
) -> Ended:
    """Call ``function(*arguments)`` in ``count`` forked processes, with the environment that torchrun gives.

    A process that fails leaves the others alone: they have to find out for themselves. All are killed at the timeout,
    with what they started in their process groups.

    Args:
        count: number of processes; each finds its number in the variable RANK.
        function: may be a closure; returns what JSON can hold.
        arguments: of the function.
        timeout: in seconds, for all together.
        endless: ranks that are not waited for, as one that stops itself: killed once the others have ended.
    """
    port, numbers = _free_port(), range(count)
    with tempfile.TemporaryDirectory(prefix="processes-") as name:
        folder = Path(name)
        children = [_fork(rank, count, port, folder, lambda: function(*arguments)) for rank in numbers]
        awaited = [child for rank, child in enumerate(children) if rank not in endless]
        codes, seconds = _wait(children, awaited, timeout)
        results = [_read(folder / f"{rank}.json") if codes[rank] == 0 else None for rank in numbers]
        outputs = [(folder / f"{rank}.txt").read_text(errors="replace") for rank in numbers]
    return Ended(codes, results, outputs, seconds)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _read(file: Path) -> Any:
    return json.loads(file.read_text())


def _fork(rank: int, count: int, port: int, folder: Path, work: Callable[[], Any]) -> int:
    """Start one process; return its number. The child never comes back from here."""
    parent = os.getpid()
    (folder / f"{rank}.txt").touch()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        _settle(rank, count, port, folder, parent)
        code = _run(work, folder / f"{rank}.json")
    finally:
        os._exit(code)  # neither pytest's own end nor anything that was registered in the parent


def _settle(rank: int, count: int, port: int, folder: Path, parent: int) -> None:
    """Set output and environment; end with the parent."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    written = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    places = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({key: str(value) for key, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="tests")
    torch.set_num_threads(1)


def _run(work: Callable[[], Any], file: Path) -> int:
    """Return the exit code that Python itself would give, with the result in the file."""
    try:
        file.write_text(json.dumps(work()))
        return 0
    except SystemExit as end:
        file.write_text("null")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _wait(children: list[int], awaited: list[int], timeout: float) -> tuple[list[int], list[float]]:
    """Return exit codes and seconds; what still runs in the end, or when the wait is broken off, is killed."""
    codes: dict[int, int] = {}
    seconds: dict[int, float] = {}
    began = time.monotonic()
    try:
        while not codes.keys() >= set(awaited) and time.monotonic() < began + timeout:
            ended = _reaped(children, codes, os.WNOHANG)
            codes.update(ended)
            seconds.update(dict.fromkeys(ended, time.monotonic() - began))
            time.sleep(0.005)
    finally:
        for child in children:
            for kill in (os.killpg, os.kill):  # the group also where the child has ended: what it started may run on
                if kill is os.killpg or child not in codes:
                    with contextlib.suppress(ProcessLookupError):
                        kill(child, signal.SIGKILL)
        codes.update(_reaped(children, codes, 0))
    return [codes[child] for child in children], [seconds.get(child, time.monotonic() - began) for child in children]


def _reaped(children: list[int], codes: dict[int, int], options: int) -> dict[int, int]:
    """Return the exit codes of children that have ended and are not among ``codes``."""
    ended = {child: os.waitpid(child, options) for child in children if child not in codes}
    return {child: os.waitstatus_to_exitcode(status) for child, (found, status) in ended.items() if found}
