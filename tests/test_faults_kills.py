"""SIGKILL at every instant of a run, and at random ones: nothing that was saved is lost, and the run ends the same."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pathline.training import step

spec = importlib.util.spec_from_file_location("faults", Path(__file__).with_name("faults.py"))
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)

ASYNCHRONOUS = {"checkpoint": {"asynchronous": True}}
OLDER = "run/checkpoints/step-000000002"
PLANTED = "half run/metrics.jsonl"  # the row of step 3


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, str]:
    """What a run leaves that nothing happens to."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert faults.forked(lambda: faults.start(folder)).code == 0
    return faults.outcome(folder)


@pytest.fixture(scope="module")
def half_done(tmp_path_factory) -> Path:
    """A run that has stopped at step 4, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("half")
    assert faults.forked(lambda: faults.start(folder, "train.stop_at=4")).code == 0
    return folder


def go_back(folder: Path, action, **sections) -> int:
    """Go on from step 2, so that step 4 is superseded; a damaged step 6 appears on the way, and is set aside."""

    def act(name: str) -> None:
        if name == PLANTED:
            shutil.copytree(folder / OLDER, folder / "run" / "checkpoints" / "step-000000006")
        action(name)

    return faults.start(folder, "--resume", OLDER, action=act, **sections)


def instants(folder: Path, **sections) -> list[str]:
    """Return the names of all instants of such a run."""
    seen: list[str] = []

    def work() -> list[str]:
        assert go_back(folder, seen.append, **sections) == 0
        return seen

    ended = faults.forked(work)
    assert ended.code == 0, ended.said
    return ended.result


def killed_at(instant: str, source: Path | None, folder: Path, **sections):
    """Kill a run at an instant, in a copy of a folder; without one, a run from the start."""
    if source is not None:
        shutil.copytree(source, folder)
    kill = faults.kill_at(instant)

    def work() -> int:
        if source is not None:
            return go_back(folder, kill, **sections)
        return faults.start(folder, action=kill, **sections)

    return faults.forked(work)


def finish(folder: Path, unbroken: dict[str, str], tally, kind: str, what: str, saved: bool, **sections) -> None:
    """After a kill: a whole checkpoint is there if one was; the run goes on from it, and ends as the unbroken one."""
    tally.count(kind)
    tally.expect(bool(faults.verified(folder)) or not saved, "lost", f"{what}: no whole checkpoint")
    ended = faults.forked(lambda: faults.start(folder, "--resume", "auto", **sections))
    tally.expect(not ended.hung, "hangs", f"{what}: going on")
    tally.expect(ended.code == 0, "lost", f"{what}: code {ended.code}\n{ended.said[-1000:]}")
    if ended.code == 0:
        different = faults.differing(unbroken, faults.outcome(folder))
        tally.expect(not different, "lost", f"{what}: {different}")
        left = [path.name for path in (folder / "run").glob("*/.*")]
        tally.expect(not left, "silent", f"{what}: left behind {left}")
    shutil.rmtree(folder)


def kill_at_each(names: Iterator[str] | list[str], source: Path | None, tmp_path, unbroken, tally, kind, **sections):
    for number, name in enumerate(names):
        folder = tmp_path / f"{kind}-{number}".replace(" ", "-")
        ended = killed_at(name, source, folder, **sections)
        tally.expect(not ended.hung, "hangs", name)
        assert ended.code == -signal.SIGKILL, f"{kind}: {name} did not come: {ended.said}"
        saved = source is not None or "step-000000002" in name
        finish(folder, unbroken, tally, kind, f"{kind}: {name}", saved, **sections)


def kill_at_random(count: int, tmp_path, unbroken, tally, **sections) -> None:
    """Saves at every step, one of them under way at nearly all times."""
    sections = {**sections, "checkpoint": {**sections.get("checkpoint", {}), "every": 1, "keep": 2}}
    draw = random.Random(count)
    for number in range(count):
        folder = tmp_path / f"random-{number}"
        child = faults.Child(lambda folder=folder: faults.start(folder, "--resume", "auto", **sections))
        checkpoints = folder / "run" / "checkpoints"
        deadline = time.monotonic() + faults.LONGEST
        while not checkpoints.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.6))
        saved = bool(faults.verified(folder))
        child.signal(signal.SIGKILL)
        ended = child.end()
        tally.expect(not ended.hung, "hangs", f"random {number}")
        what = f"random kill {number}, {sections['checkpoint']}"
        finish(folder, unbroken, tally, "at random", what, saved, **sections)


def kill_in_steps(steps: list[int], tmp_path, unbroken, tally, **sections) -> None:
    """Between a step's gradient and what becomes of it."""
    for number in steps:
        folder = tmp_path / f"step-{number}"

        def work(folder=folder, number=number) -> int:
            inner, calls = step.clipped_norm, []

            def clipped_norm(*arguments):
                calls.append(number)
                if len(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return inner(*arguments)

            step.clipped_norm = clipped_norm
            return faults.start(folder, **sections)

        assert faults.forked(work).code == -signal.SIGKILL
        finish(folder, unbroken, tally, "mid step", f"step {number} {sections}", number > 2, **sections)


# --- a selection ------------------------------------------------------------------------------------------------------

SELECTED = [
    "rename run/checkpoints/step-000000004",  # superseded
    "half run/checkpoints/.writing-000000006/optim.safetensors",
    "half run/checkpoints/.writing-000000006/manifest.json",
    "rename run/checkpoints/step-000000006",  # damaged
    "rename run/checkpoints/.writing-000000006",
    "unlink optim.safetensors",  # while pruning
    "half run/metrics.jsonl #2",
    "half run/pictures/step-000000008.png",
    "half run/averages/.writing-000000010/state.json",
]


@pytest.mark.parametrize("instant", SELECTED)
def test_killed_at_an_instant(instant, half_done, unbroken, tmp_path):
    tally = faults.Tally()
    kill_at_each([instant], half_done, tmp_path, unbroken, tally, "in order")
    tally.close(in_order=1)


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_every_instant(half_done, unbroken, tmp_path):
    """Each change of the file system, of a run that goes back, prunes, and meets a damaged checkpoint."""
    tally = faults.Tally()
    shutil.copytree(half_done, tmp_path / "whole")
    names = instants(tmp_path / "whole")
    for call in ("mkdir", "fsync", "rename", "unlink", "rmdir", "replace", "half"):
        assert any(name.startswith(call) for name in names), call
    kill_at_each(names, half_done, tmp_path, unbroken, tally, "in order")
    beside = [name for name in names if "writing-000000006" in name or "averages" in name or "unlink" in name]
    kill_at_each(beside, half_done, tmp_path, unbroken, tally, "beside training", **ASYNCHRONOUS)
    first = [name.replace("000000006", "000000002") for name in names if "writing-000000006" in name]
    kill_at_each(first, None, tmp_path, unbroken, tally, "first save")
    kill_in_steps([1, 2, 5, 10], tmp_path, unbroken, tally)
    kill_in_steps([5, 7], tmp_path, unbroken, tally, **ASYNCHRONOUS)
    kill_at_random(30, tmp_path, unbroken, tally)
    kill_at_random(30, tmp_path, unbroken, tally, **ASYNCHRONOUS)
    tally.close(mid_step=6, in_order=100, beside_training=30, first_save=10, at_random=60)
    assert tally.tried.total() >= 200


def test_killed_in_a_step(unbroken, tmp_path):
    tally = faults.Tally()
    kill_in_steps([6], tmp_path, unbroken, tally)
    tally.close(mid_step=1)
