"""Runs that are stopped and go on leave what an unbroken one leaves: weights, averages, moments, rows, pictures."""

from __future__ import annotations

import importlib.util
import math
import os
import random
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from pathline import Draws
from pathline.data import Digits
from pathline.training import loop
from pathline.training.step import take_step

spec = importlib.util.spec_from_file_location("faults", Path(__file__).with_name("faults.py"))
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)

BRANCHED = {"name": "deepflow", "depth": 2, "cuts": [1], "acceleration_width": 7}
VARIANTS: dict[str, dict] = {
    "fp32": {},
    "bf16": {"train": {"precision": "bf16"}},
    "4 + 2": {"train": {"micro_batch": 4}, "checkpoint": {"asynchronous": True}},
    "bf16, 1 by 1": {"train": {"micro_batch": 1, "precision": "bf16"}},
    "rows and pictures of every step": {"log": {"every": 1, "pictures_every": 1}},
    "rows of no save": {"log": {"every": 7}, "checkpoint": {"every": 99}},
    "averages": {"ema": {"decay": None, "lengths": [0.03, 0.1, 0.25], "snapshot_every": 1}},
    "muon": {"optim": {"name": "muon", "weight_decay": 0.1}},
    "branched": {"backbone": BRANCHED, "objective": {"name": "deepflow"}, "ema": {"warmup": False}},
}
ORDER = Draws(5).permutation("data order", 898, counter=0)
BAD = {int(ORDER[14]): math.nan, int(ORDER[40]): math.inf}  # in steps 3 and 7


def poison() -> None:
    """Give some samples of the digits another first pixel, in this process."""
    inner = Digits.batch

    def batch(self, indices):
        found = inner(self, indices)
        for place, index in enumerate(found["index"].tolist()):
            if index in BAD:
                found["data"][place, 0, 0, 0] = BAD[index]
        return found

    Digits.batch = batch


def run(folder: Path, *words: str, kill: tuple[int, int] | None = None, **sections: Mapping):
    """Train with bad samples; ``kill`` is a signal, and the step in which this process sends it to itself."""

    def take(state) -> None:
        if kill is not None and state.step + 1 == kill[1]:
            os.kill(os.getpid(), kill[0])
        take_step(state)

    def work() -> int:
        poison()
        loop.take_step = take
        return faults.start(folder, *words, **sections)

    return faults.forked(work)


def unbroken(tmp_path: Path, name: str) -> dict[str, str]:
    """Return what a run of a variant leaves; two steps of it are skipped."""
    folder = tmp_path / f"unbroken {name}"
    ended = run(folder, **VARIANTS[name])
    assert ended.code == 0, ended.said
    assert len((folder / "run" / "incidents.jsonl").read_text().splitlines()) == 2
    return faults.outcome(folder)


def stopped(tmp_path: Path, name: str, stops: Sequence[int | tuple[int, int]], whole: dict[str, str], tally) -> None:
    """Stop a run at steps, or by signals in them, one after the other; it ends as the unbroken one."""
    what, sections = f"{name} stopped at {stops}", VARIANTS[name]
    folder = tmp_path / what
    extra = set()
    for stop in stops:
        if isinstance(stop, int):
            ended = run(folder, "--resume", "auto", f"train.stop_at={stop}", **sections)
            tally.expect(ended.code == 0, "lost", f"{what}: {ended.said[-1000:]}")
            extra.add(f"pictures/step-{stop:09d}.png")  # of where it was stopped
        else:
            ended = run(folder, "--resume", "auto", kill=stop, **sections)
            tally.expect(ended.code == 75, "lost", f"{what}: {ended.said[-1000:]}")
        tally.count("resumes")
        tally.expect(not ended.hung, "hangs", what)
    ended = run(folder, "--resume", "auto", **sections)
    tally.expect(ended.code == 0 and not ended.hung, "lost", f"{what}: {ended.said[-1000:]}")
    left = {key: value for key, value in faults.outcome(folder).items() if key in whole or key not in extra}
    different = faults.differing(whole, left)
    tally.expect(not different, "lost", f"{what}: {different}")


@pytest.mark.parametrize("name", ["4 + 2", "averages"])
def test_stopped_and_gone_on(name, tmp_path):
    tally = faults.Tally()
    stopped(tmp_path, name, [3, (signal.SIGTERM, 8)], unbroken(tmp_path, name), tally)
    tally.close(resumes=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_stopped_anywhere(name, tmp_path):
    """At each step or by a signal in it; twice in a run, and in a run that is stopped at every step."""
    tally, draw, whole = faults.Tally(), random.Random(len(name)), unbroken(tmp_path, name)
    signals = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    for stop in draw.sample(range(1, faults.STEPS), k=3):
        stopped(tmp_path, name, [stop], whole, tally)
        stopped(tmp_path, name, [(draw.choice(signals), stop)], whole, tally)
    first, second = sorted(draw.sample(range(1, faults.STEPS), k=2))
    stopped(tmp_path, name, [first, (draw.choice(signals), second)], whole, tally)
    if name in ("4 + 2", "rows of no save"):
        stopped(tmp_path, name, list(range(1, faults.STEPS)), whole, tally)
    tally.close(resumes=8)
