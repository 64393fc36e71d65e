"""How fast data are loaded, and how long training waits for them.

``python benchmarks/data.py`` prints tables in Markdown. Everything is made up, written to a temporary folder, and read
from the page cache, in one process of one thread but for the two workers that read single files; what is compared takes
turns, and figures are medians over the turns. Data of ``prepared`` are packed by ``pathline.data.prepare`` itself, of
random pictures by an autoencoder that does nothing. A missed bar is marked, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
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
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from pathline import data
from pathline.core.draws import Draws
from pathline.data import Dataset
from pathline.data.prepare import Options, prepare
from pathline.data.sources import ImageSource
from pathline.encoders.autoencoders import Autoencoder, Moments
from pathline.training.loading import Loader, Stream

BATCH = 256
SHAPE = (4, 32, 32)
STEP = 0.010  # seconds of a simulated step
SEED = 0
WORKERS = 2
BARS = {"memmap": 0.6, "files": 50.0, "wait": 0.01}


class Pictures(ImageSource):
    """Noise, in ten classes."""

    def __init__(self, number: int, side: int) -> None:
        self.keys = [f"{index:07d}.png" for index in range(number)]
        self.labels = [index % 10 for index in range(number)]
        self.class_names = [f"class {index}" for index in range(10)]
        self.noise = np.random.default_rng(SEED).bytes(3 * side**2 + number)
        self.side = side

    def read(self, index: int) -> Image.Image:
        return Image.frombytes("RGB", (self.side, self.side), self.noise[index : index + 3 * self.side**2])

    @property
    def manifest(self) -> dict[str, Any]:
        return {"name": "noise", "count": len(self.keys)}


class Copy(Autoencoder):
    """Gives pixels as latents of four channels, with a posterior or without."""

    def __init__(self, *, posterior: bool) -> None:
        super().__init__()
        self.posterior = posterior
        scaling = {"mean": [0.0] * 4, "std": [2.0] * 4, "source": "made up"}
        self.manifest = {"name": "copy", "class": "Copy", "sha256": "0" * 64, "dtype": "float32", "scaling": scaling}

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        return (4, resolution, resolution)

    def moments(self, images: Tensor) -> Moments:
        mean = images.float()[:, [0, 1, 2, 0]] / 127.5 - 1
        return Moments(mean, mean.abs() if self.posterior else None)

    def to_model(self, z: Tensor) -> Tensor:
        return z / 2

    def to_autoencoder(self, z: Tensor) -> Tensor:
        return z * 2

    decode = to_model  # which nobody calls


class Layouts:
    """The same number of samples in several layouts.

    Args:
        folder: to write to.
        number: of samples that are packed.
        files: number of samples that are files of their own.
    """

    def __init__(self, folder: Path, number: int, files: int) -> None:
        self.number, self.folder, self.files = number, folder, folder / "files"
        self.means, self.moments, self.pixels = (folder / name for name in ("means", "moments", "pixels"))
        options = Options(SHAPE[1], flip=True)
        prepare(Pictures(number, SHAPE[1]), self.means, options, autoencoder=Copy(posterior=False))
        prepare(Pictures(number, SHAPE[1]), self.moments, options, autoencoder=Copy(posterior=True))
        prepare(Pictures(number, 64), self.pixels, Options(64, flip=True))
        self.files.mkdir()
        rng = np.random.default_rng(SEED)
        for index in range(files):
            values = rng.standard_normal((2 * SHAPE[0], *SHAPE[1:]), np.float32)
            np.save(self.files / f"img-mean-std-{index:08d}.npy", values)

    def latents(self, **options: Any) -> Dataset:
        return data.build("prepared", path=str(self.means), **options)

    def bare(self) -> NDArray[np.float16]:
        """Map the latents of the first shard as one would without any framework."""
        path = next(iter(sorted(self.means.glob("*.safetensors"))))
        start = 8 + int.from_bytes(path.open("rb").read(8), "little")
        rows = self.latents(flip=False).told.shards[0].rows  # type: ignore[attr-defined]  # of prepared
        return np.memmap(path, np.float16, "r", start, (rows, *SHAPE))


class Files(TorchDataset[Tensor]):
    """One file a sample, as REPA's program reads them."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.npy"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.load(self.paths[index]))


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
    """A way to load latents, and how many batches make a turn of it."""

    name: str
    batches: Batches
    turn: int


def rates(ways: Sequence[Way], turns: int) -> dict[str, float]:
    """Return latents a second of each way, the median over turns; the first turn warms up."""
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(turns + 1):
        for way in ways:
            began = time.perf_counter()
            for _ in range(way.turn):
                next(way.batches)
            seconds[way.name].append((time.perf_counter() - began) / way.turn)
    return {name: BATCH / statistics.median(times[1:]) for name, times in seconds.items()}


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
    """Share of a simulated step's time that is spent waiting for data of a kind, or ms where there is no step."""

    kind: str
    place: float
    idle: float
    busy: float
    loading: float

    def cells(self) -> dict[str, str]:
        met = self.idle < BARS["wait"]
        return {
            "data": self.kind,
            "ms to load a batch": f"{1e3 * self.loading:.2f}",
            "wait, in place": f"{self.place:.1%}",
            "wait, ahead": f"{self.idle:.2%}",
            "wait, ahead, a busy host": f"{self.busy:.2%}",
            "bar": f"< {BARS['wait']:.0%}: {'met' if met else 'MISSED'}",
        }


def waiting(kind: str, dataset: Dataset, device: torch.device, turns: int, steps: int) -> Waiting:
    """Measure a kind of data."""
    shares: dict[tuple[bool, Callable[[], None]], list[float]] = {(False, idle): [], (True, idle): [], (True, busy): []}
    loading = rates([Way(kind, by_load(dataset), 10)], turns)[kind]
    for _ in range(turns):
        for (ahead, step), found in shares.items():
            total = sum(waits(dataset, device, step, ahead=ahead, steps=steps))
            found.append(total / (total + steps * STEP))
    return Waiting(kind, *(statistics.median(found) for found in shares.values()), BATCH / loading)


def speeds(layouts: Layouts, turns: int) -> list[dict[str, str]]:
    """Return the rows of the table of rates."""
    shard = next(iter(sorted(layouts.means.glob("*.safetensors"))))
    mapped = layouts.bare()
    ways = [
        Way("`np.memmap` gather, bare", by_memmap(mapped), 40),
        Way("`prepared`, load", by_load(layouts.latents(flip=False)), 40),
        Way("`prepared`, load, with flips", by_load(layouts.latents(flip=True)), 40),
        Way("safetensors, opened for each row", by_slices(shard, len(mapped)), 1),
        Way(f"one .npy a sample, {WORKERS} workers", by_workers(layouts.files), 8),
    ]
    found = rates(ways, turns)
    bare, ours, _, _, files = found.values()
    bars = {
        ways[0].name: f"≥ {BARS['memmap']:g} ×: {'met' if ours >= BARS['memmap'] * bare else 'MISSED'}",
        ways[4].name: f"≥ {BARS['files']:g} ×: {'met' if ours >= BARS['files'] * files else 'MISSED'}",
    }
    return [
        {"way": name, "latents/s": f"{rate:,.0f}", "ours / it": f"{ours / rate:.2f}", "bar": bars.get(name, "")}
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
