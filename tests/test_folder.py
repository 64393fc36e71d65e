"""The folder of a run: locked while a process lives, swept of what killed ones left, and roomy enough."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from pathline.core.errors import CheckpointError
from pathline.training import folder as module
from pathline.training.folder import RunFolder
from pathline.training.manifest import make_folder


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@contextmanager
def process(act: Callable[[], None]):
    """A forked process that has done something and waits to be killed; yields its id."""
    ready, said = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            act()
            os.write(said, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(said)
    try:
        assert os.read(ready, 1) == b"x"
        yield child
    finally:
        os.close(ready)
        kill(child)


def kill(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # it was killed before


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    run, path = RunFolder(tmp_path / "runs" / "a"), tmp_path / "runs" / "a"
    with process(lambda: RunFolder(path).lock()) as holder:
        with pytest.raises(CheckpointError, match=rf"got {path}, in which process {holder} on \S+ is training"):
            run.lock()
        assert run.sweep() == []
        kill(holder)
        assert str(holder) in (path / ".lock").read_text()  # the file stays, and is no obstacle
        run.lock()
    with pytest.raises(CheckpointError, match=f"process {os.getpid()} on"):
        RunFolder(path).lock()  # nor twice in one process
    run.unlock()
    run.unlock()
    other = RunFolder(path)
    other.lock()
    other.unlock()


def test_a_program_of_its_own_is_refused(tmp_path):
    run = RunFolder(tmp_path)
    run.lock()
    script = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    lock = [sys.executable, "-c", script, str(tmp_path / ".lock")]
    assert b"BlockingIOError" in subprocess.run(lock, timeout=60, capture_output=True).stderr
    run.unlock()
    assert subprocess.run(lock, timeout=60, capture_output=True).returncode == 0


def test_children_that_outlive_a_killed_holder_are_no_obstacle(tmp_path):
    """As processes that load data do, for some seconds."""
    numbers, written = os.pipe()

    def hold():
        RunFolder(tmp_path).lock()
        child = os.fork()
        if child == 0:
            signal.pause()
        os.write(written, str(child).encode())

    with process(hold) as holder:
        orphan = int(os.read(numbers, 20))
        try:
            kill(holder)
            os.kill(orphan, 0)  # lives
            run = RunFolder(tmp_path)
            run.lock()
            run.unlock()
        finally:
            os.kill(orphan, signal.SIGKILL)


def test_a_forked_child_neither_holds_nor_gives_up_the_lock(tmp_path):
    run = RunFolder(tmp_path)
    run.lock()

    def child():
        run.unlock()
        assert run.sweep() == []

    (tmp_path / "checkpoints" / ".writing-000000005-1").mkdir(parents=True)
    with process(child), pytest.raises(CheckpointError, match=f"process {os.getpid()} on"):
        RunFolder(tmp_path).lock()
    assert len(run.sweep()) == 1
    run.unlock()


def test_a_file_of_another_length_or_content_is_overwritten(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff" * 300)
    with process(lambda: RunFolder(tmp_path).lock()) as holder:
        assert (tmp_path / ".lock").read_text().split() == [str(holder), "on", os.uname().nodename]


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def refuse(handle, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "checkpoints" / ".writing-000000005-1").mkdir(parents=True)
    run = RunFolder(tmp_path)
    with pytest.warns(UserWarning, match="without locks"):
        run.lock()
    assert run.sweep() == []  # nobody knows whose it is
    run.unlock()


def test_only_leftovers_are_swept(tmp_path):
    stay = ["checkpoints/step-000000003", "checkpoints/damaged-step-000000005-1", "averages/step-000000002", "mine"]
    go = ["checkpoints/.writing-000000007-11", "checkpoints/.deleting-step-000000002-11", "averages/.writing-000000007"]
    for name in stay + go:
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "shard.safetensors").write_bytes(b"abc")
    run = RunFolder(tmp_path)
    assert run.sweep() == [] and all((tmp_path / name).exists() for name in go)
    run.lock()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in run.sweep()) == sorted(go)
    run.unlock()
    assert all((tmp_path / name / "model" / "shard.safetensors").exists() for name in stay)
    assert not any((tmp_path / name).exists() for name in go)


# --- room ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [False, True])
def test_room_for_a_checkpoint_and_a_fifth(made, tmp_path, monkeypatch):
    path = tmp_path / "runs" / "a"
    if made:
        (path / "checkpoints").mkdir(parents=True)
    asked = []

    def usage(of):
        asked.append(of)
        return Usage(100 * 2**30, 94 * 2**30, 6 * 2**30)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    RunFolder(path).check_room(5 * 2**30)
    assert set(asked) == ({path, path / "checkpoints"} if made else {tmp_path})
    with pytest.raises(CheckpointError, match=rf"got {path} on a disk with 6,144 MiB free, expected 7,373 MiB"):
        RunFolder(path).check_room(6 * 2**30)
    assert path.exists() == made
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []  # no probe left


def test_room_on_this_disk(tmp_path):
    RunFolder(tmp_path).check_room(1)
    with pytest.raises(CheckpointError, match="make room"):
        RunFolder(tmp_path).check_room(2**70)


@pytest.mark.parametrize("below", [".", "runs", "runs/a"])
def test_a_file_where_a_folder_should_be(below, tmp_path):
    (tmp_path / "runs").write_text("mine")
    path = tmp_path / "runs" / below
    with pytest.raises(CheckpointError, match=rf"got {path}, but {tmp_path / 'runs'} is no folder"):
        RunFolder(path).check_room(1)


def test_a_link_to_nowhere(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "unmounted")
    with pytest.raises(CheckpointError, match="is no folder"):
        RunFolder(tmp_path / "a").check_room(1)


def test_a_folder_in_which_nobody_can_write():
    """Not even root in /proc, which allows no new file."""
    with pytest.raises(CheckpointError, match=r"got /proc/self/run, but nothing can be written to /proc/self: \w+"):
        RunFolder(Path("/proc/self/run")).check_room(1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    (tmp_path / "a").mkdir(mode=0o555)
    with pytest.raises(CheckpointError, match="nothing can be written to .*: Permission denied"):
        RunFolder(tmp_path / "a").check_room(1)


def test_a_full_disk(tmp_path, monkeypatch):
    """Room by its count, and yet no write: a quota."""

    def refuse(**keywords):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", refuse)
    with pytest.raises(CheckpointError, match="Disk quota exceeded"):
        RunFolder(tmp_path).check_room(1)


def test_new_folders_reach_the_disk(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(os.readlink(f"/proc/self/fd/{handle}")))
    make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert seen == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    make_folder(tmp_path / "a")
    assert len(seen) == 3
