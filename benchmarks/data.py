"""How fast data are loaded, and how long training waits for them.

``python benchmarks/data.py`` prints tables in Markdown. Everything is made up, written to a temporary folder, and read
from the page cache, in one process of one thread but for the two workers that read single files; what is compared takes
turns, and figures are medians over the turns. Rates are by process time over the processes at work, which neighbours
disturb least: those of free cores. Waits are by the wall clock, and mean little on a busy machine. A missed bar is
marked, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import date
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bare import device_name, table
from layouts import SEED, SHAPE, Files, Layouts
from numpy.typing import NDArray
from safetensors import safe_open
from torch.utils.data import DataLoader

from pathline import data
from pathline.core.draws import Draws
from pathline.data import Dataset
from pathline.training.loading import Loader, Stream

BATCH = 256
STEP = 0.010  # seconds of a simulated step
WORKERS = 2
WARM = 80  # batches: a pass over 20,000 samples
BARS = {"memmap": 0.6, "files": 50.0, "wait": 0.01}


Batches = Iterator[Any]
"""Each loads 256 latents when the next is asked for."""


def by_load(dataset: Dataset) -> Batches:
    """Yield what ``load`` gives, in the order of training."""
    for step in count():
        positions = range(step * BATCH, (step + 1) * BATCH)
        yield dataset.load(dataset.indices_at(positions, SEED), Draws(SEED).at(positions, step=step))


def by_memmap(values: NDArray[np.float16]) -> Batches:
    """Yield rows picked from a mapped file."""
    rng = np.random.default_rng(SEED)
    while True:
        order = rng.permutation(len(values))
        for first in range(0, len(order) - BATCH + 1, BATCH):
            yield values[order[first : first + BATCH]]


def by_slices(path: Path, number: int) -> Batches:
    """Yield rows read one by one, the file opened for each, as LightningDiT's program does."""
    rng = np.random.default_rng(SEED)
    while True:
        rows = []
        for index in rng.integers(0, number, BATCH).tolist():
            with safe_open(path, "pt") as file:
                rows.append(file.get_slice("latents")[index : index + 1])
        yield torch.cat(rows)


def by_workers(folder: Path) -> Batches:
    """Yield batches of files that two workers read."""
    loader = DataLoader(
        Files(folder), BATCH, shuffle=True, num_workers=WORKERS, drop_last=True, persistent_workers=True
    )
    while True:
        yield from loader


class Way(NamedTuple):
    """A way to load latents, how many batches make a turn of it, and how many processes are at work."""

    name: str
    batches: Batches
    turn: int
    processes: int = 1


def process_time() -> float:
    """Return the CPU seconds of this process and its workers."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # in user and system mode
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


class Rate(NamedTuple):
    """Latents a second, medians over turns: on free cores, and by the wall clock as it was."""

    free: float
    wall: float


def rates(ways: Sequence[Way], turns: int) -> dict[str, Rate]:
    """Measure ways in turns; before them each goes over much of its data, so that pages are mapped."""
    seconds: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
    for way in ways:
        for _ in range(WARM):
            next(way.batches)
    for _ in range(turns):
        for way in ways:
            began = process_time(), time.perf_counter()
            for _ in range(way.turn):
                next(way.batches)
            ended = process_time(), time.perf_counter()
            seconds[way.name].append(((ended[0] - began[0]) / way.processes, ended[1] - began[1]))
    return {
        way.name: Rate(*(way.turn * BATCH / statistics.median(turn[i] for turn in seconds[way.name]) for i in (0, 1)))
        for way in ways
    }


def idle() -> None:
    """Wait, as for a device."""
    time.sleep(STEP)


def busy() -> None:
    """Keep Python at work, as launching kernels does."""
    end = time.perf_counter() + STEP
    values = torch.zeros(64)
    while time.perf_counter() < end:
        values = values + 1


def waits(dataset: Dataset, device: torch.device, step: Callable[[], None], *, ahead: bool, steps: int) -> list[float]:
    """Return the seconds that each step waits for its batch, the first few left out."""
    dataset.in_memory = not ahead
    waited = []
    with closing(Loader(dataset, Stream(SEED, BATCH, BATCH, BATCH, 0), device)) as loader:
        for number in range(steps + 5):
            (visit,) = loader.stream.visits(number)
            began = time.perf_counter()
            loader.take(visit)
            waited.append(time.perf_counter() - began)
            step()
    return waited[5:]


class Waiting(NamedTuple):
    """Share of a simulated step's time that is spent waiting for data of a kind, and seconds to load a batch.

    Attributes:
        place: loaded in place.
        ahead: loaded ahead.
        middle: the same of the step in the middle, which neighbours of a busy machine disturb less.
        busy: as ``ahead``, beside a host that is at work.
    """

    kind: str
    place: float
    ahead: float
    middle: float
    busy: float
    loading: float

    def cells(self) -> dict[str, str]:
        met = self.ahead < BARS["wait"]
        return {
            "data": self.kind,
            "ms to load a batch": f"{1e3 * self.loading:.2f}",
            "wait, in place": f"{self.place:.1%}",
            "wait, ahead": f"{self.ahead:.2%}",
            "of the median step": f"{self.middle:.2%}",
            "wait, ahead, a busy host": f"{self.busy:.2%}",
            "bar": f"< {BARS['wait']:.0%}: {'met' if met else 'MISSED'}",
        }


def waiting(kind: str, dataset: Dataset, device: torch.device, turns: int, steps: int) -> Waiting:
    """Measure a kind of data."""
    loading = rates([Way(kind, by_load(dataset), 10)], turns)[kind].free
    ways = ((False, idle), (True, idle), (True, busy))
    shares: list[list[float]] = [[] for _ in ways]
    middle = []
    for _ in range(turns):
        for found, (ahead, step) in zip(shares, ways, strict=True):
            waited = waits(dataset, device, step, ahead=ahead, steps=steps)
            found.append(sum(waited) / (sum(waited) + steps * STEP))
            if (ahead, step) == (True, idle):
                typical = statistics.median(waited)
                middle.append(typical / (typical + STEP))
    place, idly, busily = (statistics.median(found) for found in shares)
    return Waiting(kind, place, idly, statistics.median(middle), busily, BATCH / loading)


def speeds(layouts: Layouts, turns: int) -> list[dict[str, str]]:
    """Return the rows of the table of rates."""
    shard = next(iter(sorted(layouts.means.glob("*.safetensors"))))
    mapped = layouts.bare()
    ways = [
        Way("`np.memmap` gather, bare", by_memmap(mapped), 40),
        Way("`prepared`, load", by_load(layouts.latents(flip=False)), 40),
        Way("`prepared`, load, with flips", by_load(layouts.latents(flip=True)), 40),
        Way("safetensors, opened for each row", by_slices(shard, len(mapped)), 1),
        Way(f"one .npy a sample, {WORKERS} workers", by_workers(layouts.files), 8, WORKERS),
    ]
    found = rates(ways, turns)
    bare, ours, _, _, files = (rate.free for rate in found.values())
    bars = {
        ways[0].name: f"≥ {BARS['memmap']:g} ×: {'met' if ours >= BARS['memmap'] * bare else 'MISSED'}",
        ways[4].name: f"≥ {BARS['files']:g} ×: {'met' if ours >= BARS['files'] * files else 'MISSED'}",
    }
    return [
        {
            "way": name,
            "latents/s": f"{rate.free:,.0f}",
            "ours / it": f"{ours / rate.free:.2f}",
            "by the wall clock": f"{rate.wall:,.0f}",
            "bar": bars.get(name, ""),
        }
        for name, rate in found.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="The speed of loading data.")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--files", type=int, default=4_096, help="samples that are files of their own")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=100, help="simulated steps of a turn")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = torch.device(given.device)
    with tempfile.TemporaryDirectory() as name:
        layouts = Layouts(Path(name), given.samples, given.files)
        rows = speeds(layouts, given.turns)
        kinds = {
            "latents": layouts.latents(flip=False),
            "latents, flips": layouts.latents(flip=True),
            "means of moments": data.build("prepared", path=str(layouts.moments), flip=False, posterior="mean"),
            "moments, drawn": data.build("prepared", path=str(layouts.moments), flip=False),
            "moments, drawn, flips": data.build("prepared", path=str(layouts.moments), flip=True),
            "pixels 64": data.build("prepared", path=str(layouts.pixels), flip=False),
            "pixels 64, flips": data.build("prepared", path=str(layouts.pixels), flip=True),
        }
        shares = [waiting(kind, dataset, device, given.turns, given.steps) for kind, dataset in kinds.items()]
    machine = f"{device_name(given.device)}, torch {torch.__version__}, {date.today().isoformat()}"
    text = (
        f"## {machine}: data\n\n{given.samples:,} latents {SHAPE} in fp16, batch {BATCH}:\n\n{table(rows)}\n\n"
        f"Share of a step of {1e3 * STEP:.0f} ms at batch {BATCH}:\n\n{table([share.cells() for share in shares])}\n"
    )
    print(text)
    missed = text.count("MISSED")
    print(f"{missed} bars missed" if missed else "all bars met")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
