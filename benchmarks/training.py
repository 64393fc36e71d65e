"""What training costs beside a bare loop, and where a step's time goes.

``python benchmarks/training.py`` prints tables; ``--record`` adds them to RESULTS.md, with device, versions and date.
The bare loop has the same network, objective, draws, batches, optimizer, clipping and average, and nothing else: no
guard, no log, no micro-batches, no precision plugin. Both run in turns, in blocks of steps, in one process and one
thread; ours is the whole of ``Trainer.run``, and a hundredth of a row of the log is added to what its steps take. Times
are medians over blocks, of process time on a CPU, which neighbours disturb least, and of the wall clock on a GPU. A
missed bar is marked, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.utils.tensorboard  # imported here, so that no loop's memory holds it alone
from bare import RESULTS, Bare, Case, Enough, configured, device_name, driven, parts_of, table
from footprint import peak_memory, profiled

from pathline.core.draws import Draws
from pathline.objectives import Objective
from pathline.training import Trainer, step
from pathline.training.log import Log
from pathline.training.speed import peak_flops, utilisation

PARTS = ("data", "draws", "forward", "backward", "guard", "optimizer", "averages", "log", "rest")
PRECISIONS = ("fp32", "fp16", "tf32", "bf16")
AMPERE = (8, 0)  # compute capability from which there are the last two
ROWS = 100  # steps from one row of the log to the next, by default
SIZES = ("toy", "384", "1152")
MIB = 2**20


def cases(device: str, sizes: Sequence[str]) -> list[Case]:
    """Return the networks of a device, of the sizes asked for; width 384 is small on a CPU, and SiT-S on a GPU."""
    found = []
    for backbone in ("sit", "deepflow"):
        toy = Case(f"{backbone} toy", backbone, 12, 2, 8, 4, 6, 20, seconds=300e-6)
        small = Case(f"{backbone} 384", backbone, 384, 2, 16, 2, 4, 1, share=0.03)
        if device == "cuda":
            small = small._replace(depth=12, side=32, batch=256, block=5)
        largest = Case(f"{backbone} 1152", backbone, 1152, 28, 32, 2, 64, 2, share=0.03)
        found += [case for size, case in zip(SIZES, (toy, small, largest), strict=True) if size in sizes]
    return found


def precisions(device: str) -> Sequence[str]:
    """Return what a device computes in; a CPU alone in fp32, as most have nothing else in hardware."""
    if device == "cpu":
        return PRECISIONS[:1]
    return PRECISIONS if torch.cuda.get_device_capability() >= AMPERE else PRECISIONS[:2]


class Clock:
    """Reads the wall clock and the process's own time, with nothing left to do on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()


class Times(NamedTuple):
    """Seconds a step, by block: (wall clock, process time) of ours and of the bare loop."""

    ours: list[tuple[float, float]]
    bare: list[tuple[float, float]]

    def median(self, which: int) -> tuple[float, float]:
        """Return the medians of ours and of the bare loop."""
        ours, bare = (statistics.median(pair[which] for pair in pairs) for pairs in self)
        return ours, bare

    def own(self, which: int) -> float:
        """Return the median over neighbouring blocks of what ours takes above the bare loop."""
        return statistics.median(o[which] - b[which] for o, b in zip(self.ours, self.bare, strict=True))


def alternate(trainer: Trainer, bare: Bare, block: int, repetitions: int) -> Times:
    """Run both in turns; the first two blocks of each warm up."""
    clock, times = Clock(bare.device), Times([], [])
    began: list[tuple[float, float]] = []

    def spent(since: tuple[float, float]) -> tuple[float, float]:
        wall, process = clock()
        return (wall - since[0]) / block, (process - since[1]) / block

    def turn(at: int) -> None:
        if at % block:
            return
        if began:
            times.ours.append(spent(began.pop()))
        if len(times.ours) == repetitions + 2:
            raise Enough
        start = clock()
        bare.steps(block)
        times.bare.append(spent(start))
        began.append(clock())

    with driven(turn):
        trainer.run()
    return Times(times.ours[2:], times.bare[2:])


class Stopwatch:
    """Charges time to the part that is running, the innermost one where they nest."""

    def __init__(self, clock: Callable[[], tuple[float, float]], which: int) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._clock, self._which, self._stack = clock, which, ["rest"]
        self._last = clock()[which]

    def charge(self) -> None:
        now = self._clock()[self._which]
        self.seconds[self._stack[-1]] += now - self._last
        self._last = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose time is charged to a part."""

        def run(*inputs: Any, **options: Any) -> Any:
            self.charge()
            self._stack.append(part)
            try:
                return function(*inputs, **options)
            finally:
                self.charge()
                self._stack.pop()

        return run


def split(trainer: Trainer, steps: int) -> tuple[dict[str, float], float]:
    """Return the seconds of each part of a step of ours, and those of a row of the log.

    On a GPU each part is waited for, so that they add up to more than a step.
    """
    state, device = trainer.state, trainer.fabric.device
    watch, first = Stopwatch(Clock(device), int(device.type == "cpu")), state.step
    places: list[tuple[str, Any, str]] = [
        ("data", state.loader, "take"),
        *(("draws", Draws, name) for name in ("normal", "uniform")),
        ("forward", Objective, "__call__"),
        ("backward", state.fabric, "backward"),
        ("guard", state.guard, "verdict"),
        *(("optimizer", step, name) for name in ("clipped_norm", "learning_rate")),
        *(("optimizer", state.optimizers, name) for name in ("set_lr", "step", "zero_grad")),
        ("averages", state.averages, "update"),
        *(("log", state.window, name) for name in ("add_batch", "add_step")),
        ("log", Log, "advance"),
    ]

    write_row, row = trainer._write_row, 0.0

    def stop(at: int) -> None:
        nonlocal row
        watch.charge()
        if at == first:
            watch.seconds.update(dict.fromkeys(PARTS, 0.0))  # what opening the log took
        if at == first + steps:
            began = watch.seconds["rest"]
            write_row()
            watch.charge()
            row, watch.seconds["rest"] = watch.seconds["rest"] - began, began
            raise Enough

    with ExitStack() as patches:
        patches.enter_context(patch.object(trainer, "_write_row", lambda: None))
        for part, place, name in places:
            patches.enter_context(patch.object(place, name, watch.timed(part, getattr(place, name))))
        with driven(stop):
            trainer.run()
    parts = {part: seconds / steps for part, seconds in watch.seconds.items()}
    return {**parts, "log": parts["log"] + row / ROWS}, row


def memories(case: Case, device: str, precision: str, compiled: bool) -> tuple[int, int]:
    """Return the peak memory of ours and of the bare loop, from nothing to the fifth step."""

    def ours() -> None:
        with tempfile.TemporaryDirectory() as name, driven(until(5)):
            c = configured(case, Path(name), device, precision, compiled)
            Trainer(c, parts=parts_of(c)).run()

    def bare() -> None:
        Bare(configured(case, Path(), device, precision, compiled), torch.device(device), 5).steps(5)

    return peak_memory(device, ours), peak_memory(device, bare)


def until(last: int) -> Callable[[int], None]:
    """Return what ends a run after a step."""

    def stop(at: int) -> None:
        if at == last:
            raise Enough

    return stop


class Result(NamedTuple):
    """What was measured of one case; None where a device has no such number."""

    case: Case
    precision: str
    compiled: bool
    times: Times
    which: int
    parts: dict[str, float]
    row: float
    memory: tuple[int, int]
    utilisation: float | None = None
    kernels: tuple[int, int] | None = None

    @property
    def own(self) -> float:
        """Seconds a step above the bare loop."""
        return self.times.own(self.which) + self.row / ROWS

    def verdicts(self) -> list[str]:
        """Return the bars, and whether they are met."""
        own, ours = self.own, self.times.median(self.which)[0]
        bars = []
        if self.case.share is not None:
            bars.append((f"own ≤ {self.case.share:.0%}", own <= self.case.share * ours))
            bars.append(("memory ≤ 1.05 ×", self.memory[0] <= 1.05 * self.memory[1]))
        if self.case.seconds is not None:
            bars.append((f"own ≤ {self.case.seconds * 1e6:.0f} µs", own <= self.case.seconds))
        return [f"{bar}: {'met' if met else 'MISSED'}" for bar, met in bars]

    def cells(self) -> dict[str, str]:
        """Return a row of the table of steps."""
        (ours, bare), own = self.times.median(self.which), self.own
        wall, mib = self.times.median(0)[0], [size / MIB for size in self.memory]
        cells = {
            "network": self.case.name + ", compiled" * self.compiled,
            "precision": self.precision,
            "images/s": f"{self.case.batch / wall:.4g}",
            "ms a step": f"{ours * 1e3:.2f}",
            "bare": f"{bare * 1e3:.2f}",
            "own µs": f"{own * 1e6:+.0f}",
            "own share": f"{own / ours:+.1%}",
            "row ms": f"{self.row * 1e3:.1f}",
            "MiB": f"{mib[0]:.0f}",
            "bare MiB": f"{mib[1]:.0f}",
        }
        if self.kernels is not None:
            cells["kernels"], cells["bare kernels"] = map(str, self.kernels)
            cells["MFU"] = "" if self.utilisation is None else f"{self.utilisation:.1%}"
        return {**cells, "bars": "; ".join(self.verdicts())}

    def part_cells(self) -> dict[str, str]:
        """Return a row of the table of parts, in µs."""
        total = sum(self.parts.values())
        named = {f"{part}": f"{seconds * 1e6:.0f} ({seconds / total:.0%})" for part, seconds in self.parts.items()}
        return {"network": self.case.name + ", compiled" * self.compiled, "precision": self.precision, **named}


def measure(case: Case, device: str, precision: str, compiled: bool, repetitions: int) -> Result:
    """Measure one case."""
    memory = memories(case, device, precision, compiled)
    with tempfile.TemporaryDirectory() as name:
        c = configured(case, Path(name), device, precision, compiled)
        trainer = Trainer(c, parts=parts_of(c))
        bare = Bare(c, trainer.fabric.device, case.block * (repetitions + 4))
        times = alternate(trainer, bare, case.block, repetitions)
        parts, row = split(trainer, 20)
        if device != "cuda":
            return Result(case, precision, compiled, times, 1, parts, row, memory)
        peak = peak_flops(torch.cuda.get_device_name(), c.train.precision, c.train.tf32)
        fraction = utilisation(3 * trainer.parts.forward_flops * case.batch, times.median(0)[0], 1, peak)
        counts = profiled(lambda: step.take_step(trainer.state)), profiled(bare.one_step)
    return Result(case, precision, compiled, times, 0, parts, row, memory, fraction, counts)


def report(results: Sequence[Result], device: str) -> str:
    """Return the tables of a run of this script, in Markdown."""
    clock = "process time" if device == "cpu" else "wall clock"
    title = f"## {device_name(device)}, torch {torch.__version__}, {date.today().isoformat()}: steps"
    steps = f"By {clock}; images/s by the wall clock:\n\n{table([result.cells() for result in results])}"
    parts = f"Parts of a step of ours, in µs:\n\n{table([result.part_cells() for result in results])}"
    return f"{title}\n\n{steps}\n\n{parts}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="The cost of training, beside a bare loop.")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES[:2])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="all that a GPU has; fp32 on a CPU")
    parser.add_argument("--compile", action="store_true", help="compiled networks as well; slow on a CPU")
    parser.add_argument("--repetitions", type=int, default=60, help="blocks of each loop")
    parser.add_argument("--record", action="store_true", default=cuda, help="add the tables to RESULTS.md")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = []
    for case in cases(given.device, given.sizes):
        for precision in given.precisions or precisions(given.device):
            for compiled in (False, True) if given.compile else (False,):
                results.append(measure(case, given.device, precision, compiled, given.repetitions))
                print(results[-1].cells(), file=sys.stderr, flush=True)
    text = report(results, given.device)
    print(text)
    if given.record:
        with RESULTS.open("a") as file:
            file.write(f"\n{text}")
    missed = text.count("MISSED")
    print(f"{missed} bars missed" if missed else "all bars met")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
