"""SIGKILL at every change of the file system while data are prepared, and at random instants: the bytes stay equal."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from pathline.data.prepare import Options
from pathline.data.prepare.command import prepare

TESTS = Path(__file__).parent


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


preparing, faults = loaded("preparing"), loaded("faults")

OPTIONS = Options(10, flip=True, images=True, rows_per_shard=5, on_error="drop")  # four shards of 17 images
FEATURES = {"tokens": (preparing.TOKENS, preparing.Tokens())}
CHANGES = ("fsync", "replace", "mkdir", "unlink", "rmdir")


def work(folder, seconds=0.0) -> int:
    """Prepare; return the number of images that were read."""
    source = preparing.Pictures(17, broken={2, 11}, seconds=seconds)
    prepare(source, folder, OPTIONS, autoencoder=preparing.Coder(), features=FEATURES, batch=4)
    return len(source.reads)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, bytes]:
    """What a command leaves that nothing happens to."""
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    assert work(folder) == 17
    return preparing.contents(folder)


def watch(action: Callable[[int], None]) -> None:
    """Call ``action`` with a number before each change of the file system; this process is spoilt for all else."""
    count = 0

    def wrapped(inner):
        def outer(*arguments, **options):
            nonlocal count
            count += 1
            action(count)
            return inner(*arguments, **options)

        return outer

    for name in CHANGES:
        setattr(os, name, wrapped(getattr(os, name)))


def changes(folder) -> int:
    """Return the number of changes of the file system that a whole command makes."""

    def counted() -> list[int]:
        seen = []
        watch(seen.append)
        work(folder)
        return seen

    ended = faults.forked(counted)
    assert ended.code == 0, ended.said
    return ended.result[-1]


def kill(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def goes_on(folder, unbroken) -> None:
    """Give the command again: it ends as the unbroken one, and reads no image of a shard that was whole."""
    numbers = [int(path.stem) for path in folder.glob("journal/0*.json")]
    kept = [number for number in numbers if (folder / f"shard-{number:05d}.safetensors").exists()]
    expected = 0 if (folder / "manifest.json").exists() else 17 - sum((5, 5, 5, 2)[number] for number in kept)
    assert work(folder) == expected
    assert preparing.contents(folder) == unbroken


def killed_at(wanted: int, folder) -> None:
    def broken() -> None:
        watch(lambda number: kill(number) if number == wanted else None)
        work(folder)

    ended = faults.forked(broken)
    assert ended.code == -signal.SIGKILL, ended.said


def killed_after(seconds: float, folder) -> int:
    """Kill a command at any time of its second or so; return its exit code."""
    child = faults.Child(lambda: work(folder, seconds=0.05))
    time.sleep(seconds)
    child.signal(signal.SIGKILL)
    return child.end().code


@pytest.mark.parametrize("part", [0.2, 0.5, 0.97])
def test_killed_at_a_change(part, unbroken, tmp_path):
    total = changes(tmp_path / "counted")
    killed_at(round(part * total), tmp_path / "out")
    goes_on(tmp_path / "out", unbroken)


def test_killed_again_and_again(unbroken, tmp_path):
    """Three times in one folder."""
    draw = random.Random(1)
    codes = [killed_after(draw.uniform(0.1, 0.5), tmp_path) for _ in range(3)]
    assert -signal.SIGKILL in codes
    goes_on(tmp_path, unbroken)


@pytest.mark.slow
def test_killed_at_every_change(unbroken, tmp_path):
    total = changes(tmp_path / "counted")
    assert total > 30
    for number in range(1, total + 1):
        killed_at(number, tmp_path / str(number))
        goes_on(tmp_path / str(number), unbroken)


@pytest.mark.slow
def test_killed_at_random(unbroken, tmp_path):
    """20 kills; what has ended before one is tried again."""
    draw, kills = random.Random(20), 0
    for number in range(60):
        kills += killed_after(draw.uniform(0, 0.7), tmp_path / str(number)) == -signal.SIGKILL
        goes_on(tmp_path / str(number), unbroken)
        if kills == 20:
            return
    pytest.fail(f"{kills} kills in 60 tries")


# --- the command


@pytest.fixture
def pictures(tmp_path) -> Path:
    (tmp_path / "pictures").mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(600):
        levels = torch.randint(256, (20, 30, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(levels.numpy()).save(tmp_path / "pictures" / f"{index:03d}.png")
    return tmp_path / "pictures"


def started(pictures, folder, *words) -> subprocess.Popen:
    command = [sys.executable, "-m", "pathline.data.prepare", str(pictures), str(folder), "--resolution", "16"]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1"}
    given = [*command, "--rows-per-shard", "10", "--accelerator", "cpu", *words]
    return subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def children(process) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def wait_for(condition, seconds=60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def alive(process) -> bool:
    """Whether a process is at work; one that has ended and was not waited for is not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_command_says_how_to_go_on(number, pictures, tmp_path):
    command = started(pictures, tmp_path / "out", "--rows-per-shard", "2")
    try:
        wait_for((tmp_path / "out" / "shard-00001.safetensors").exists)
        command.send_signal(number)
        _, said = command.communicate(timeout=60)
    finally:
        command.kill()
    assert command.returncode == 75, said
    assert f"interrupted; what is whole stays in {tmp_path / 'out'}: give the command again to go on" in said
    assert not (tmp_path / "out" / "manifest.json").exists()
    whole = sorted(tmp_path.glob("out/shard-*"))
    assert 2 <= len(whole) < 300 and not list(tmp_path.glob("out/.writing-*"))


def test_the_error_of_any_process_is_told_at_once(pictures, tmp_path):
    """Image 11 is of the second process's first shard; the first one leaves its shards for later."""
    broken = pictures / "011.png"
    broken.write_bytes(broken.read_bytes()[:200])
    command = started(pictures, tmp_path / "out", "--devices", "2")
    try:
        _, said = command.communicate(timeout=120)
    finally:
        command.kill()
    assert command.returncode == 2, said
    assert f"error (process 2): got {broken}" in said and "lost contact" not in said and "Traceback" not in said
    assert "stopped: another process has failed; look at its last words" in said
    assert len(list(tmp_path.glob("out/shard-*"))) < 30


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_no_process_outlives_the_first(number, pictures, tmp_path):
    words = ("--devices", "2", "--rows-per-shard", "1")
    command = started(pictures, tmp_path / "out", *words)
    try:
        wait_for(lambda: len(list(tmp_path.glob("out/shard-*"))) > 5)
        (other,) = (child for child in children(command.pid) if alive(child))
        command.send_signal(number)
        _, said = command.communicate(timeout=60)
    finally:
        command.kill()
    wait_for(lambda: not alive(other), 20)
    assert len(list(tmp_path.glob("out/shard-*"))) < 600
    if number == signal.SIGTERM:
        assert command.returncode == 75 and "give the command again to go on" in said
    for folder in ("out", "unbroken"):
        command = started(pictures, tmp_path / folder, *words)
        assert command.wait(120) == 0
    assert preparing.contents(tmp_path / "out") == preparing.contents(tmp_path / "unbroken")


@pytest.mark.slow
def test_the_command_starts_its_own_processes(pictures, tmp_path):
    for name, words in (("one", ()), ("two", ("--devices", "2"))):
        command = started(pictures, tmp_path / name, *words)
        try:
            printed, said = command.communicate(timeout=120)
        finally:
            command.kill()
        assert command.returncode == 0, said
        assert printed.startswith("600 images: 60 shards") and "error" not in said
    assert preparing.contents(tmp_path / "one") == preparing.contents(tmp_path / "two")
