"""What the tests of faults share: runs in forked processes that end in every way, and hashes of what they leave."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import re
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pathline import train
from pathline.training import checkpoints, log, manifest, sampling
from pathline.training.log import read_rows

TIMED = {"images_per_second", "data_wait_share", "checkpoint_share", "memory_gib"}
LONGEST = 120.0  # seconds after which a process counts as hanging
STEPS = 10
PARENT_DEATH_SIGNAL = 1  # of prctl(2)
Action = Callable[[str], None]


def entries(**sections: Mapping[str, Any]) -> dict[str, Any]:
    """A tiny network on the digits, 10 steps of 6 images into ``run``: three averages, rows, pictures, snapshots."""
    base: dict[str, dict[str, Any]] = {
        "data": {"name": "digits"},
        "backbone": {
            "name": "sit",
            "input_size": 8,
            "patch_size": 4,
            "in_channels": 1,
            "hidden_size": 12,
            "depth": 1,
            "num_heads": 3,
            "num_classes": 10,
        },
        "objective": {"name": "velocity", "times": "logit-normal"},
        "optim": {"lr": 3e-3, "warmup_steps": 4, "schedule": "cosine", "clip": 0.5},
        "ema": {"decay": 0.9, "lengths": [0.05, 0.2], "snapshot_every": 5},
        "solver": {"name": "euler", "steps": 1},
        "train": {"steps": STEPS, "global_batch": 6, "seed": 5, "folder": "run", "accelerator": "cpu"},
        "log": {"every": 3, "pictures_every": 4, "tensorboard": False},
        "checkpoint": {"every": 2, "keep": 3, "asynchronous": False},
    }
    return {name: {**section, **sections.get(name, {})} for name, section in base.items()} | {
        name: section for name, section in sections.items() if name not in base
    }


def start(folder: Path, *words: str, action: Action | None = None, **sections: Mapping[str, Any]) -> int:
    """Call ``train.py`` in a folder and return its exit code; this process is spoilt for all else.

    Args:
        folder: where the configuration comes to lie, and the run's folder ``run``.
        words: of the command line.
        action: called before each change of the file system, see ``watch``.
        sections: what the configuration says else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "c.yaml").write_text(json.dumps(entries(**sections)))
    os.chdir(folder)
    if action is not None:
        watch(action)
    train.save_curves = lambda folder: None  # they take longer than the run
    return train.main(["c.yaml", *words])


# --- processes --------------------------------------------------------------------------------------------------------


class Ended(NamedTuple):
    """What became of a process.

    Attributes:
        code: its exit code, −n if signal n ended it.
        said: what it wrote to stdout and stderr.
        result: what its function returned, through JSON; None if it did not return.
        hung: whether it had to be killed.
    """

    code: int
    said: str
    result: Any
    hung: bool


class Child:
    """A forked process that calls a function; an integer that it returns is its exit code as well.

    Nothing is imported anew. It is killed when the parent dies, and by ``end`` when it takes too long.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self._said, self._result = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                code = self._run(work)
            finally:
                os._exit(code)
        self._handle = os.pidfd_open(self.pid)

    def _run(self, work: Callable[[], Any]) -> int:
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
        os.dup2(self._said.fileno(), 1)
        os.dup2(self._said.fileno(), 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        gc.freeze()  # what the parent holds need not be looked through at each collection
        try:
            result = work()
            self._result.write(json.dumps(result).encode())
            self._result.flush()
            return result if type(result) is int else 0
        except BaseException:
            traceback.print_exc()
            return 1

    def signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)

    def end(self, timeout: float = LONGEST) -> Ended:
        """Wait for the end, and kill it if that does not come."""
        ready, _, _ = select.select([self._handle], [], [], timeout)
        if not ready:
            self.signal(signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self._handle)
        texts = []
        for file in (self._said, self._result):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        result = json.loads(texts[1]) if texts[1] else None
        return Ended(os.waitstatus_to_exitcode(status), texts[0], result, not ready)


def forked(work: Callable[[], Any], timeout: float = LONGEST) -> Ended:
    """Call a function in a forked process and wait for it."""
    return Child(work).end(timeout)


# --- instants of a write ----------------------------------------------------------------------------------------------

CALLS = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")


def watch(action: Action) -> None:
    """Call ``action`` with a name before each change of the file system; this process is spoilt for all else.

    Names are as ``fsync run/checkpoints/.writing-000000003/model.safetensors``; one that begins with ``half`` comes
    when half of a file has been written. What is named twice gets numbers, from the second on.
    """
    seen: Counter[str] = Counter()
    lock = threading.Lock()

    def reach(call: str, path: Any) -> None:
        name = f"{call} {_told(path)}"
        with lock:
            seen[name] += 1
            count = seen[name]
        action(name if count == 1 else f"{name} #{count}")

    def wrapped(call: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def outer(path: Any, *arguments: Any, **options: Any) -> Any:
            reach(call, path)
            return inner(path, *arguments, **options)

        return outer

    def halved(inner: Callable[..., Any], place: int) -> Callable[..., Any]:
        def outer(*arguments: Any, **options: Any) -> Any:
            path = Path(arguments[place])
            before = path.stat().st_size if path.exists() and inner is append else 0
            result = inner(*arguments, **options)
            whole = path.read_bytes()
            os.truncate(path, before + (len(whole) - before) // 2)
            reach("half", path)
            path.write_bytes(whole)
            return result

        return outer

    append, write_text = log._append, Path.write_text
    for call in CALLS:
        setattr(os, call, wrapped(call, getattr(os, call)))
    checkpoints.save_file = halved(checkpoints.save_file, 1)
    Path.write_text = halved(write_text, 0)
    log._append = halved(append, 0)
    sampling.save_grid = halved(sampling.save_grid, 0)


def _told(path: Any) -> str:
    name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
    return re.sub(r"(\.(?:writing-[0-9]+|deleting-step-[0-9]+))-[0-9]+", r"\1", os.path.relpath(name))


def kill_at(instant: str) -> Action:
    """Return an action that kills this process at an instant."""

    def kill(name: str) -> None:
        if name == instant:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # never: the signal is on its way

    return kill


# --- what a run leaves ------------------------------------------------------------------------------------------------


def outcome(folder: Path, without: Sequence[str] = ()) -> dict[str, str]:
    """Return hashes of what a run has left: its newest checkpoint, stored averages, rows, incidents and pictures."""
    run, newest = folder / "run", checkpoints.latest(folder / "run" / "checkpoints", pytest.fail)
    assert newest is not None, f"{folder} holds no checkpoint"
    left = {"rows": json.dumps(rows(folder, without)).encode()}
    for pattern in f"*/{newest.name}/* averages/step-*/* pictures/* samples.png incidents.jsonl".split():
        left |= {str(path.relative_to(run)): _lasting(path) for path in run.glob(pattern)}
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(left.items())}


def _lasting(file: Path) -> bytes:
    """Return what a file holds, but for entries of the configuration that say how long and how often."""
    if file.name != checkpoints.STATE:
        return b"" if file.name == checkpoints.MANIFEST else file.read_bytes()
    state = json.loads(file.read_text())
    state["configuration"] |= {"checkpoint": None, "log": None}
    state["configuration"]["train"]["stop_at"] = None
    return json.dumps(state).encode()


def rows(folder: Path, without: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the rows of a run's log but for timed entries."""
    left_out = {*TIMED, *without}
    return [{key: row[key] for key in row if key not in left_out} for row in read_rows(folder / "run")]


def differing(first: Mapping[str, str], second: Mapping[str, str]) -> str:
    """Name what differs between two outcomes; empty if nothing does."""
    return ", ".join(sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name)))


def verified(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    found = (folder / "run" / "checkpoints").glob("step-*")
    return sorted(path for path in found if manifest.problem(path) is None)


class Tally:
    """Counts faults by kind, and notes what went wrong with each.

    ``lost``: no whole checkpoint where there had been one, or another end than the unbroken run's. ``silent``: nothing
    was said of it. ``hangs``: a process that had to be killed.
    """

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.wrong: dict[str, list[str]] = {"lost": [], "silent": [], "hangs": []}

    def count(self, kind: str) -> None:
        self.tried[kind] += 1

    def expect(self, true: bool, column: str, words: str) -> None:
        """Note a fault that was not borne."""
        if not true:
            self.wrong[column].append(words)

    def close(self, **least: int) -> None:
        """Print the table, and raise AssertionError if anything went wrong, or too little was tried."""
        ends = ", ".join(f"{column} {len(words)}" for column, words in self.wrong.items())
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.tried.items()))
        lines = [f"  {column}: {line}" for column, words in self.wrong.items() for line in words[:20]]
        table = "\n".join([f"{kinds}; {ends}", *lines])
        print(f"\n{table}")
        assert not lines, table
        assert all(self.tried[kind.replace("_", " ")] >= number for kind, number in least.items()), table
