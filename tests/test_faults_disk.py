"""Disks that are full, read-only, broken or gone, memory that runs out: training goes on, says so, and saves again."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import resource
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pathline.data import Digits
from pathline.training import loop, writing
from pathline.training.log import read_rows
from pathline.training.step import take_step

spec = importlib.util.spec_from_file_location("faults", Path(__file__).with_name("faults.py"))
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)

NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000  # of unshare(2)
READ_ONLY, REMOUNT, RECURSIVE, PRIVATE = 1, 32, 16384, 1 << 18  # of mount(2)
BASE: dict[str, dict] = {"log": {"pictures_every": None}, "ema": {"snapshot_every": 10}}
BESIDE = {**BASE, "checkpoint": {"asynchronous": True}}
NOBODY = 65534
WRITING = "run/checkpoints/.writing-000000004"


def mount(folder: Path, size: int) -> None:
    """Put an empty file system of a few bytes in a folder's place, in this process alone."""
    library, user = ctypes.CDLL(None, use_errno=True), os.geteuid()

    def checked(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    checked(library.unshare(NEW_MOUNTS | (NEW_USER if user else 0)))
    if user:
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    checked(library.mount(b"none", b"/", None, RECURSIVE | PRIVATE, None))
    folder.mkdir(parents=True, exist_ok=True)
    checked(library.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()))


def remount(folder: Path, flags: int) -> None:
    if ctypes.CDLL(None, use_errno=True).mount(b"none", os.fsencode(folder), b"tmpfs", REMOUNT | flags, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@pytest.fixture(scope="module")
def mounts(tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("mount")
    if faults.forked(lambda: mount(folder / "disk", 4096)).code:
        pytest.skip("this user may mount no file system")


def fill(folder: Path) -> None:
    """Write a file until there is no room."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC


class Fault(NamedTuple):
    """What goes wrong: ``prepare`` is called first, with the folder, and ``before`` before each step, with its number.

    ``failed``: steps whose checkpoints cannot be written; ``gone``: what of the outcome the fault itself takes away.
    """

    name: str
    before: Callable[[int], object] = lambda step: None
    action: Callable[[str], object] | None = None
    failed: tuple[int, ...] = (4,)
    sections: dict = BASE
    prepare: Callable[[Path], object] = lambda folder: None
    gone: tuple[str, ...] = ()


def at_steps(actions: dict[int, Callable[[], object]]) -> Callable[[int], object]:
    return lambda step: actions[step]() if step in actions else None


def raising(instant: str, error: BaseException) -> Callable[[str], None]:
    def act(name: str) -> None:
        if name == instant:
            raise error

    return act


def limit(size: int) -> None:
    """Let no file of this process grow beyond a size; −1 for any."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def failing_once(owner: Any, name: str, error: BaseException, call: int) -> Callable[[Path], None]:
    """Let a function raise at one of its calls, counted from 1."""

    def prepare(folder: Path) -> None:
        inner, calls = getattr(owner, name), []

        def outer(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == call:
                raise error
            return inner(*arguments, **options)

        setattr(owner, name, outer)

    return prepare


RUN, CHECKPOINTS = Path("run"), Path("run/checkpoints")
ERRORS = [
    ("mkdir {}", OSError(errno.EROFS, "Read-only file system", WRITING)),
    ("half {}/model.safetensors", OSError(errno.ENOSPC, "No space left on device")),
    ("half {}/state.json", OSError(errno.EDQUOT, "Disk quota exceeded")),
    ("half {}/manifest.json", OSError(errno.ENOSPC, "No space left on device")),
    ("fsync {}/optim.safetensors", OSError(errno.EIO, "Input/output error")),
    ("fsync {}", OSError(errno.EIO, "Input/output error")),
    ("rename {}", OSError(errno.EROFS, "Read-only file system")),
    ("half {}/ema.safetensors", MemoryError()),
    ("half {}/manifest.json", MemoryError()),
]
PATCHED = [
    Fault(f"{error!r} before {instant}", action=raising(instant.format(WRITING), error), sections=sections)
    for instant, error in ERRORS
    for sections in (BASE, BESIDE)
]
FULL = at_steps({5: lambda: fill(RUN), 7: lambda: (RUN / "filler").unlink()})
SMALL = at_steps({3: lambda: limit(8192), 5: lambda: limit(-1)})
READ = at_steps({3: lambda: remount(CHECKPOINTS, READ_ONLY), 5: lambda: remount(CHECKPOINTS, 0)})
MOUNTED = [
    Fault("full disk", FULL, failed=(6,), prepare=lambda folder: mount(folder / RUN, 2**20)),
    Fault("full disk", FULL, failed=(6,), prepare=lambda folder: mount(folder / RUN, 2**20), sections=BESIDE),
    Fault("read only", READ, prepare=lambda folder: mount(folder / CHECKPOINTS, 2**20)),
    Fault("read only", READ, prepare=lambda folder: mount(folder / CHECKPOINTS, 2**20), sections=BESIDE),
]
OTHERS = [
    Fault("file size", SMALL),
    Fault("file size", SMALL, sections=BESIDE),
    Fault("checkpoints deleted", at_steps({5: lambda: shutil.rmtree(CHECKPOINTS)}), failed=()),
    Fault("folder deleted", at_steps({5: lambda: shutil.rmtree(RUN)}), failed=(), gone=("rows",)),
    Fault("folder deleted", at_steps({6: lambda: shutil.rmtree(RUN)}), failed=(), gone=("rows",), sections=BESIDE),
    *(
        Fault(f"{error!r} raised once by {name}", sections=BESIDE, prepare=failing_once(owner, name, error, call))
        for owner, name, error, call in (
            (writing.Writer, "_staged", MemoryError(), 2),
            (writing.Writer, "_staged", RuntimeError("DefaultCPUAllocator: not enough memory"), 2),
            (threading, "Thread", RuntimeError("can't start new thread"), 3),  # the first thread waits for signals
        )
    ),
]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("unbroken")
    assert faults.forked(lambda: faults.start(folder, **BASE)).code == 0
    return faults.outcome(folder, ["failed_saves"])


def bear(fault: Fault, folder: Path, unbroken: dict[str, str], tally) -> None:
    """Training goes on to the end, tells of each save that failed and counts it, and saves again when it can."""

    def work() -> dict[str, Any]:
        fault.prepare(folder)
        seen: list[int] = []

        def take(state) -> None:
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join(30)  # so that the fault meets the save that it is meant for
            fault.before(state.step + 1)
            take_step(state)
            if state.step > 4 and "deleted" not in fault.name and not fault.sections.get("checkpoint"):
                seen.append(len(faults.verified(folder)))

        loop.take_step = take
        code = faults.start(folder, action=fault.action, **fault.sections)
        counted = read_rows(folder / "run")[-1]["failed_saves"]
        left = [str(path) for path in (folder / "run").glob("*/.*")]
        end = {"code": code, "counted": counted, "least": min(seen, default=1), "left": left}
        return {**end, "outcome": faults.outcome(folder, ["failed_saves"])}

    what = f"{fault.name}{' beside training' * (fault.sections is BESIDE)}"
    ended = faults.forked(work)
    tally.count(fault.name if len(fault.name) < 30 else "patched")
    tally.expect(not ended.hung, "hangs", what)
    if ended.result is None:
        return tally.expect(False, "lost", f"{what}: {ended.said[-2000:]}")
    result = ended.result
    tally.expect(result["code"] == 0 and result["least"] > 0, "lost", f"{what}: {result}")
    whole = {key: value for key, value in unbroken.items() if key not in fault.gone}
    other = {key: value for key, value in result["outcome"].items() if key not in fault.gone}
    different = faults.differing(whole, other)
    tally.expect(not different, "lost", f"{what}: {different}")
    told = all(f"warning: the checkpoint of step {step} was not written" in ended.said for step in fault.failed)
    tally.expect(told and result["counted"] == len(fault.failed), "silent", f"{what}: {result} {ended.said[-500:]}")
    return tally.expect(not result["left"], "silent", f"{what}: left {result['left']}")


def refuse(kind: str, prepare: Callable[[Path], object], said: str, folder: Path, tally, *words: str, **sections):
    """A folder that cannot be written to: refused with 2 before anything has begun."""

    def work() -> int:
        prepare(folder)
        return faults.start(folder, *words, **sections)

    ended = faults.forked(work)
    tally.count("refused")
    told = ended.code == 2 and said in ended.said and "Traceback" not in ended.said
    tally.expect(told, "silent", f"{kind}: {ended.code}: {ended.said[-1000:]}")
    tally.expect(not (folder / "run" / "metrics.jsonl").exists(), "silent", f"{kind}: it began")
    tally.expect(not ended.hung, "hangs", kind)


def nobody(folder: Path) -> None:
    """Become a user who may write nothing here, nor read anything of what root keeps to itself."""
    Digits()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "c.yaml").touch()
    (folder / "c.yaml").chmod(0o666)
    folder.chmod(0o555)
    os.chdir(folder)
    os.setuid(NOBODY)


def test_a_selection(unbroken, tmp_path):
    tally = faults.Tally()
    for number, fault in enumerate((PATCHED[2], PATCHED[13], OTHERS[1], OTHERS[5])):
        bear(fault, tmp_path / str(number), unbroken, tally)
    refuse("a file", lambda folder: (folder / "run").write_text(""), "is no folder", tmp_path, tally)
    tally.close(refused=1)


def test_a_full_disk(mounts, unbroken, tmp_path):
    tally = faults.Tally()
    bear(MOUNTED[1], tmp_path / "beside", unbroken, tally)
    refuse("full", lambda folder: mount(folder / "run", 65536), "on a disk with 0 MiB", tmp_path / "start", tally)
    tally.close(full_disk=1, refused=1)


@pytest.mark.slow
def test_all_failures(mounts, unbroken, tmp_path):
    tally = faults.Tally()
    for number, fault in enumerate([*MOUNTED, *PATCHED, *OTHERS]):
        bear(fault, tmp_path / str(number), unbroken, tally)
    refuse("a file", lambda folder: (folder / "run").write_text(""), "is no folder", tmp_path, tally)
    refuse("full", lambda folder: mount(folder / "run", 65536), "on a disk with 0 MiB", tmp_path / "start", tally)
    tally.close(patched=18, full_disk=2, read_only=2, file_size=2, refused=2)


def test_no_rights(tmp_path):
    if os.getuid():
        pytest.skip("only root can become another user")
    tally = faults.Tally()
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        refuse("no rights", nobody, "nothing can be written to", Path(name) / "x", tally)
    tally.close(refused=1)


def test_a_signal_on_a_full_disk_says_that_nothing_was_saved(mounts, tmp_path):
    """Exit code 74; the checkpoint before is whole, and is gone on from when there is room."""

    def work() -> list[Any]:
        mount(tmp_path / "run", 2**20)

        def take(state) -> None:
            if state.step == 4:
                fill(RUN)
                os.kill(os.getpid(), signal.SIGTERM)
            take_step(state)

        loop.take_step = take
        code, names = faults.start(tmp_path, **BASE), [path.name for path in faults.verified(tmp_path)]
        (RUN / "filler").unlink()
        loop.take_step = take_step
        return [code, names, faults.start(tmp_path, "--resume", "auto", **BASE)]

    ended = faults.forked(work)
    assert ended.result == [74, ["step-000000002", "step-000000004"], 0], ended.said
    assert "after step 5 of 10; NOT saved" in ended.said
