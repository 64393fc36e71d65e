"""Numbers that are not finite, and jumps of the loss: a step that meets them changes nothing, and is written down."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import random
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import pytest

from pathline import Draws
from pathline.core.config import resolve
from pathline.core.errors import DivergedError
from pathline.training import Trainer, checkpoints, loop
from pathline.training.log import read_rows
from pathline.training.step import take_step

spec = importlib.util.spec_from_file_location("faults", Path(__file__).with_name("faults.py"))
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)

KINDS = ("data", "loss", "one loss", "gradient")
VALUES = (math.nan, math.inf, -math.inf)
SIZE, SEED = 6, 5  # of a batch, of the run
EVERY_ROW = {"log": {"every": 1}}


def trainer_of(folder: Path, **sections) -> Trainer:
    return Trainer(
        resolve(faults.entries(**{**sections, "train": {"folder": str(folder), **sections.get("train", {})}}))
    )


def moving(state) -> str:
    """Return a hash of what a skipped step must leave: weights, moments, averages, and their clocks."""
    found = hashlib.sha256(json.dumps(state.averages.state()).encode())
    for group, tensors in sorted(state.tensors().items()):
        for name, tensor in sorted(tensors.items()):
            found.update(f"{group}.{name}".encode() + tensor.detach().numpy().tobytes())
    return found.hexdigest()


class Injector:
    """Takes the place of ``take_step``; in some batches, counted from 0, it makes a number bad.

    Attributes:
        moved: for every bad batch that came, whether the step changed anything.
    """

    def __init__(self, kind: str, value: float, batches: Iterable[int], place: int = 3) -> None:
        self.kind, self.value, self.batches, self.place = kind, value, frozenset(batches), place
        self.moved: list[bool] = []
        self._bad = False
        self._known: list[object] = []

    def __call__(self, state) -> None:
        if state not in self._known:
            self._install(state)
            self._known.append(state)
        self._bad = state.step + state.passed in self.batches
        before = moving(state)
        take_step(state)
        if self._bad:
            self.moved.append(moving(state) != before)
        else:
            assert moving(state) != before

    def _install(self, state) -> None:
        dataset, objective, parameters = state.parts.dataset, state.parts.objective, state.optimizers.parameters
        batch, indices_at, micro = dataset.batch, dataset.indices_at, range(0)

        def bad_indices(positions, seed):
            nonlocal micro
            micro = range(positions.start % SIZE, positions.start % SIZE + len(positions))
            return indices_at(positions, seed)

        def bad_batch(indices):
            found = batch(indices)
            if self._bad and self.place in micro and self.kind == "data":
                found["data"][micro.index(self.place), 0, 2, 5] = self.value
            if self._bad and self.place in micro and self.kind == "jump":
                found["data"][micro.index(self.place)] *= self.value
            return found

        def bad_loss(*arguments, **conditions):
            loss = objective(*arguments, **conditions)
            if self._bad and self.kind == "loss":
                loss = loss._replace(total=loss.total * self.value)
            if self._bad and self.place in micro and self.kind == "one loss":
                details = {name: detail.clone() for name, detail in loss.details.items()}
                for detail in details.values():
                    detail[micro.index(self.place)] = self.value
                loss = loss._replace(details=details, total=loss.total + self.value)
            return loss

        def bad_gradient(gradient):
            if self._bad and self.kind == "gradient":
                gradient = gradient.clone()
                gradient.view(-1)[self.place] = self.value
            return gradient

        bad_loss.mixes_samples, bad_loss.predicts = objective.mixes_samples, objective.predicts
        dataset.batch, dataset.indices_at = bad_batch, bad_indices
        state.parts = dataclasses.replace(state.parts, objective=bad_loss)
        parameters[self.place % len(parameters)].register_hook(bad_gradient)


def expected(kind: str, batch: int, place: int, step: int | None = None) -> dict:
    """Return what must be written down of a bad batch, from the documented order of data and law of times."""
    alone = kind in ("data", "one loss")
    positions = [SIZE * batch + place] if alone else list(range(SIZE * batch, SIZE * (batch + 1)))
    order = Draws(SEED).permutation("data order", 898, counter=0)
    times = Draws(SEED).normal("time", positions).double()
    return {
        "step": batch + 1 if step is None else step,
        "batch": batch + 1,
        "reason": "loss" if kind == "one loss" else kind,
        "positions": positions,
        "samples": [int(order[position]) for position in positions],
        "times": (1 / (1 + (-times).exp())).tolist(),
    }


def written(folder: Path) -> list[dict]:
    path = folder / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def agree(entries: list[dict], wanted: list[dict]) -> bool:
    """Whether incidents are those wanted; times to the precision of float32."""
    if len(entries) != len(wanted):
        return False
    for entry, want in zip(entries, wanted, strict=True):
        if entry["times"] != pytest.approx(want["times"], rel=1e-6):
            return False
        if any(entry[key] != want[key] for key in want if key != "times") or len(entry["losses"]) != len(want["times"]):
            return False
    return True


def by_hand(folder: Path, leave_out: Iterable[int], end: int, **sections) -> str:
    """Return the hash of a run in which some steps are not taken at all."""
    state = trainer_of(folder, **sections).state
    while state.step < end:
        if state.step in leave_out:
            state.step += 1
        else:
            take_step(state)
    return moving(state)


def single(kind, value, batches, place, micro, tmp_path, tally, monkeypatch) -> None:
    """Bad numbers in single steps: the run ends as if these steps had not been, but for the counters."""
    sections = {"train": {"micro_batch": micro}}
    inject = Injector(kind, value, batches, place)
    monkeypatch.setattr(loop, "take_step", inject)
    what = f"{kind} {value} at {place} of batches {sorted(batches)}, micro {micro}"
    folder = tmp_path / what.replace(" ", "-")
    trainer = trainer_of(folder, **sections)
    trainer.run()
    tally.count(kind)
    tally.expect(inject.moved == [False] * len(batches), "lost", f"{what}: moved {inject.moved}")
    other = by_hand(folder / "other", batches, faults.STEPS, **sections)
    tally.expect(moving(trainer.state) == other, "lost", f"{what}: another end")
    tally.expect(read_rows(folder)[-1]["skipped"] == len(batches), "silent", f"{what}: not counted")
    wanted = [expected(kind, batch, place) for batch in sorted(batches)]
    tally.expect(agree(written(folder), wanted), "silent", f"{what}: {written(folder)} {wanted}")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> Path:
    """A run of 110 of 120 steps, long enough to look for jumps."""
    folder = tmp_path_factory.mktemp("long")
    trainer_of(folder, train={"steps": 120, "stop_at": 110}, checkpoint={"every": 110}).run()
    return folder


def jump(batch, factor, place, long_run, folder, tally, monkeypatch) -> None:
    """A sample a thousand times too large: finite, and skipped."""
    sections = {"train": {"steps": 120, "folder": str(folder)}, "checkpoint": {"every": 110}}
    inject = Injector("jump", factor, [batch], place)
    ends = []
    for bad in (True, False):
        monkeypatch.setattr(loop, "take_step", inject if bad else take_step)
        trainer = trainer_of(folder / str(bad), **sections | {"train": {"steps": 120}})
        trainer.resume(long_run / "checkpoints" / "step-000000110")
        if bad:
            trainer.run()
        else:
            while trainer.state.step < 120:
                if trainer.state.step == batch:
                    trainer.state.step += 1
                else:
                    take_step(trainer.state)
        ends.append(moving(trainer.state))
    what = f"jump by {factor} at {place} of batch {batch}"
    tally.count("jump")
    tally.expect(inject.moved == [False] and ends[0] == ends[1], "lost", what)
    tally.expect(read_rows(folder / "True")[-1]["skipped"] == 1, "silent", f"{what}: not counted")
    tally.expect(agree(written(folder / "True"), [expected("jump", batch, place)]), "silent", f"{what}: not named")


def streak(kind, value, first, length, tmp_path, tally, monkeypatch) -> None:
    """As many bad batches in a row as lead to a roll-back: training goes back, and on with the samples after them."""
    sections = {"guard": {"rollback_after": length}, **EVERY_ROW}
    bad = range(first, first + length)
    inject = Injector(kind, value, bad)
    monkeypatch.setattr(loop, "take_step", inject)
    what = f"streak of {length} {kind} {value} from batch {first}"
    folder = tmp_path / what.replace(" ", "-")
    trainer = trainer_of(folder, **sections)
    trainer.run()
    tally.count("streak")
    back = first - first % 2  # the newest checkpoint before which nothing was skipped
    state = trainer_of(folder / "other", **sections).state
    while state.step < faults.STEPS:
        if state.step == back:
            state.passed = first + length - back
        take_step(state)
    tally.expect(inject.moved == [False] * length, "lost", f"{what}: moved")
    tally.expect(moving(trainer.state) == moving(state), "lost", f"{what}: another end")
    rows = read_rows(folder)
    counted = [row["step"] for row in rows] == list(range(1, faults.STEPS + 1)) and rows[-1]["passed"] == state.passed
    tally.expect(counted, "silent", f"{what}: rows {rows}")
    tally.expect(agree(written(folder), [expected(kind, batch, 3) for batch in bad]), "silent", f"{what}: not named")
    whole = checkpoints.latest(folder / "checkpoints", pytest.fail)
    tally.expect(whole == folder / "checkpoints" / "step-000000010", "lost", f"{what}: {whole}")


def diverge(kind, value, first, tmp_path, tally) -> None:
    """Bad for good: after two roll-backs the run ends with code 65, and with what it knows in a file."""
    what = f"{kind} {value} from batch {first} on"
    folder = tmp_path / what.replace(" ", "-")

    def work() -> int:
        loop.take_step = Injector(kind, value, range(first, 99))
        return faults.start(folder, guard={"rollback_after": 3, "max_rollbacks": 2}, **EVERY_ROW)

    ended = faults.forked(work)
    tally.count("diverged")
    tally.expect(not ended.hung, "hangs", what)
    back = first - first % 2  # where each roll-back goes to, if anywhere
    tried = [*range(first, first + 3), *range(first + 3, first + 9)] if back else [*range(first, first + 3)]
    step = back + 3 if back else first + 3
    dumped = folder / "run" / f"diverged-step-{step:09d}.json"
    tally.expect(ended.code == 65 and dumped.exists(), "silent", f"{what}: code {ended.code}\n{ended.said[-1500:]}")
    if dumped.exists():
        content = json.loads(dumped.read_text())
        known = [entry["batch"] - 1 for entry in content["incidents"]]
        tally.expect(content["streak"] == 3 and known == tried[-3:], "silent", f"{what}: {content}")
        tally.expect(str(dumped.name) in ended.said, "silent", f"{what}: the file is not named")
    tally.expect(len(written(folder / "run")) == len(tried), "silent", f"{what}: {len(written(folder / 'run'))}")
    tally.expect(len(faults.verified(folder)) >= (back > 0), "lost", f"{what}: no checkpoint")


@pytest.mark.parametrize(("kind", "value"), list(zip(KINDS, (math.nan, math.inf, -math.inf, math.nan), strict=True)))
def test_a_bad_number_in_single_steps(kind, value, tmp_path, monkeypatch):
    tally = faults.Tally()
    single(kind, value, {2, 6}, 4, 4, tmp_path, tally, monkeypatch)
    tally.close()


def test_a_jump_a_streak_and_the_end(long_run, tmp_path, monkeypatch):
    tally = faults.Tally()
    jump(113, 1e3, 2, long_run, tmp_path / "jump", tally, monkeypatch)
    streak("gradient", math.inf, 5, 3, tmp_path, tally, monkeypatch)
    diverge("data", math.nan, 4, tmp_path, tally)
    tally.close(jump=1, streak=1, diverged=1)


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "take_step", Injector("loss", math.nan, range(1, 4)))
    trainer = trainer_of(tmp_path, guard={"rollback_after": 3}, **EVERY_ROW, checkpoint={"every": 9})
    with pytest.raises(DivergedError, match="3 steps in a row up to step 4 .* no checkpoint was written before"):
        trainer.run()


@pytest.mark.slow
def test_all_bad_numbers(long_run, tmp_path, monkeypatch):
    tally, draw = faults.Tally(), random.Random(3)
    for number, (kind, value) in enumerate([*product(KINDS, VALUES)] * 3):
        steps = set(draw.sample(range(faults.STEPS), k=1 + number % 3))
        micro = draw.choice([None, 1, 4, 5])
        single(kind, value, steps, draw.randrange(SIZE), micro, tmp_path / str(number), tally, monkeypatch)
    for number, factor in enumerate((1e3, -1e3, 1e4, 1e3, 1e6)):
        folder = tmp_path / f"jump-{number}"
        jump(draw.randrange(110, 120), factor, draw.randrange(SIZE), long_run, folder, tally, monkeypatch)
    for number, (kind, value) in enumerate(zip(KINDS * 2, VALUES * 3, strict=False)):
        streak(kind, value, draw.randrange(2, 7), 2 + number % 2, tmp_path / f"s{number}", tally, monkeypatch)
    for number, kind in enumerate(KINDS):
        diverge(kind, VALUES[number % 3], (2, 3, 5, 6)[number], tmp_path, tally)
    tally.close(data=9, loss=9, one_loss=9, gradient=9, jump=5, streak=8, diverged=4)
