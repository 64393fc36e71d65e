"""SIGTERM, SIGUSR1 and SIGINT, at every stage of a run, and twice: it saves, leaves with its code, and goes on."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from pathline.data import Digits
from pathline.training import loop

spec = importlib.util.spec_from_file_location("faults", Path(__file__).with_name("faults.py"))
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)

TERM, USER, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
SAVED, SAVED_OR_DONE = 75, 0
WRITING = "run/checkpoints/.writing-{:09d}"


class Stage(NamedTuple):
    """A place of a run.

    Attributes:
        name: in words.
        prepare: called in the process of the run with a function that sends the signal; returns the action of
            ``faults.watch`` or None.
        code: expected of the run, by the signal.
        sections: of the configuration.
    """

    name: str
    prepare: Callable[[Callable[[], None]], Callable[[str], None] | None]
    code: Callable[[int], int] = lambda number: SAVED
    sections: dict = {}  # noqa: RUF012  # never changed


def at(instant: str):
    return lambda send: lambda name: send() if name == instant else None


def in_batch(count: int, wait: float = 0.0):
    """While the batch of a step is made, which may take a while."""

    def prepare(send) -> None:
        inner, calls = Digits.batch, []

        def batch(self, indices):
            calls.append(len(indices))
            if len(calls) == count + 1:  # the first one checks the parts against one another
                threading.Timer(wait / 4, send).start() if wait else send()
                time.sleep(wait)
            return inner(self, indices)

        Digits.batch = batch

    return prepare


def before_the_first_step(send) -> None:
    inner = loop.Log

    def log(*arguments):
        send()
        return inner(*arguments)

    loop.Log = log


def early(number: int) -> int:
    """Nothing is there to be saved: as any program."""
    return 130 if number == INT else -number


BESIDE = {"checkpoint": {"asynchronous": True}}
STAGES = [
    Stage("a step", in_batch(3)),
    Stage("waiting for data", in_batch(6, wait=0.2)),
    Stage("a save", at(f"fsync {WRITING.format(4)}/model.safetensors")),
    Stage("a save beside training", at(f"half {WRITING.format(4)}/model.safetensors"), sections=BESIDE),
    Stage("a rename", at(f"rename {WRITING.format(6)}")),
    Stage("pruning", at("unlink state.json")),
    Stage("a picture", at("half run/pictures/step-000000004.png")),
    Stage("a row of the log", at("half run/metrics.jsonl #2")),
    Stage("stored averages", at("half run/averages/.writing-000000005/state.json"), sections=BESIDE),
    Stage("the last save", at(f"fsync {WRITING.format(10)}/model.safetensors"), lambda number: SAVED_OR_DONE),
    Stage("the start, once it listens", before_the_first_step),
    Stage("the start", at("half run/config.yaml"), early),
]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("unbroken")
    assert faults.forked(lambda: faults.start(folder)).code == 0
    return faults.outcome(folder)


def finish(folder: Path, unbroken, tally, what: str, **sections) -> None:
    ended = faults.forked(lambda: faults.start(folder, "--resume", "auto", **sections))
    tally.expect(not ended.hung, "hangs", f"{what}: going on")
    tally.expect(ended.code == 0, "lost", f"{what}: code {ended.code}\n{ended.said[-1000:]}")
    if ended.code == 0:
        different = faults.differing(unbroken, faults.outcome(folder))
        tally.expect(not different, "lost", f"{what}: {different}")


def once(number: signal.Signals, stage: Stage, folder: Path, unbroken, tally) -> None:
    """A signal: the run saves at the end of the step, says so, and leaves with 75."""

    def work() -> int:
        action = stage.prepare(lambda: os.kill(os.getpid(), number))
        return faults.start(folder, action=action, **stage.sections)

    what = f"{number.name} during {stage.name}"
    ended = faults.forked(work)
    tally.count("signals")
    tally.expect(not ended.hung, "hangs", what)
    code = stage.code(number)
    tally.expect(ended.code == code, "silent", f"{what}: code {ended.code}\n{ended.said[-1500:]}")
    if code == SAVED:
        told = re.search(rf"{number.name} after step (\d+) of 10; saved in run\ngo on with --resume auto", ended.said)
        tally.expect(told is not None, "silent", f"{what}: {ended.said[-500:]}")
        path = folder / "run" / "checkpoints" / f"step-{int(told[1]):09d}" if told else folder
        tally.expect(path in faults.verified(folder), "lost", f"{what}: no {path.name}")
    finish(folder, unbroken, tally, what, **stage.sections)


def twice(first: signal.Signals, second: signal.Signals, instant: str, folder: Path, unbroken, tally) -> None:
    """A second signal while the first one's checkpoint is written: gone at once, with 128 + its number."""

    def work() -> int:
        in_batch(5)(lambda: os.kill(os.getpid(), first))
        return faults.start(folder, action=at(instant)(lambda: os.kill(os.getpid(), second)))

    what = f"{first.name}, then {second.name} before {instant}"
    ended = faults.forked(work)
    tally.count("twice")
    tally.expect(not ended.hung, "hangs", what)
    said = ended.code == 128 + second and "a second signal: leaving at once" in ended.said
    tally.expect(said, "silent", f"{what}: code {ended.code}\n{ended.said[-1500:]}")
    steps = [path.name for path in faults.verified(folder)]
    # a thread hears the second signal: what stood a moment before its end may have ended, and is whole then
    ended_too = ["step-000000005"] if instant.startswith("rename") else []
    before = ["step-000000002", "step-000000004"]
    tally.expect(steps in (before, before + ended_too), "lost", f"{what}: {steps}")
    finish(folder, unbroken, tally, what)


def any_time(count: int, tmp_path, unbroken, tally) -> None:
    """From outside, at random times: saved or done, or before it listened; it always goes on."""
    draw = random.Random(count)
    for number in range(count):
        folder, kind = tmp_path / f"any-{number}", draw.choice([TERM, USER, INT])
        child = faults.Child(lambda folder=folder: faults.start(folder, **BESIDE))
        time.sleep(draw.uniform(0, 1.0))
        child.signal(kind)
        ended, what = child.end(), f"{kind.name} at random, {number}"
        tally.count("at random")
        tally.expect(not ended.hung, "hangs", what)
        tally.expect(ended.code in (75, 0, early(kind)), "silent", f"{what}: {ended.code}\n{ended.said[-1000:]}")
        finish(folder, unbroken, tally, what, **BESIDE)


@pytest.mark.parametrize(("number", "stage"), [(TERM, 0), (INT, 3), (USER, 6), (TERM, 11)])
def test_a_signal(number, stage, unbroken, tmp_path):
    tally = faults.Tally()
    once(number, STAGES[stage], tmp_path, unbroken, tally)
    tally.close(signals=1)


def test_a_second_signal(unbroken, tmp_path):
    tally = faults.Tally()
    twice(INT, TERM, f"half {WRITING.format(5)}/optim.safetensors", tmp_path, unbroken, tally)
    tally.close(twice=1)


@pytest.mark.slow
def test_all_signals(unbroken, tmp_path):
    tally, folders = faults.Tally(), (tmp_path / str(number) for number in range(999))
    for stage in STAGES:
        for number in (TERM, USER, INT):
            once(number, stage, next(folders), unbroken, tally)
    for first, second in ((TERM, TERM), (INT, TERM), (USER, INT)):
        for instant in ("half {}/model.safetensors", "fsync {}/manifest.json", "rename {}"):
            twice(first, second, instant.format(WRITING.format(5)), next(folders), unbroken, tally)
    any_time(10, tmp_path, unbroken, tally)
    tally.close(signals=36, twice=9, at_random=10)
