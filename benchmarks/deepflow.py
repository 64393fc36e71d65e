"""What DeepFlow costs beside an equally wide plain backbone, forward and backward apart, and what arithmetic expects.

``python benchmarks/deepflow.py`` prints a table a case; ``--record`` adds them to RESULTS.md, with device, versions and
date. Each network trains on its own objective and samples by Euler's method, without guidance and with classifier-free
guidance, which doubles the rows. The two take turns in one process and one thread; times are medians over turns, of
process time on a CPU, which neighbours disturb least, and of the wall clock on a GPU. Beside each ratio of times stands
that of the multiply–accumulates, and of the parameters for the optimizer. Memory is what a process grows by with the
network and all it holds, or what tensors take on a GPU. A profile of a step and of a call tells whether any tensor has
the number of tokens twice among its sides, as an attention map has. A missed bar is marked; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from itertools import pairwise
from typing import NamedTuple

import torch
from bare import RESULTS, device_name, table
from footprint import peak_memory, profiled
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from pathline import Draws, Flow, backbones, interpolants, objectives, solvers
from pathline.training.speed import forward_flops

MIB = 2**20
NETWORKS = ("sit", "deepflow")


class Case(NamedTuple):
    """Two networks of one width and depth, and the bars on the ratios of their times."""

    name: str
    width: int
    heads: int
    depth: int
    acceleration_width: int
    branches: int = 2
    batch: int = 8
    side: int = 32
    patch: int = 2
    step: float | None = None
    sampling: float | None = None

    @property
    def tokens(self) -> int:
        return (self.side // self.patch) ** 2


CASES = (
    Case("W 768", 384, 6, 12, 768, step=1.45, sampling=1.25),
    Case("W 2048", 384, 6, 12, 2048),
)


class Model:
    """A network with all that it needs to train and to sample."""

    def __init__(self, case: Case, name: str, device: torch.device) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": case.width, "num_heads": case.heads, "depth": case.depth, "num_classes": 10}
        own = {"branches": case.branches, "acceleration_width": case.acceleration_width} if name == "deepflow" else {}
        image = {"input_size": case.side, "patch_size": case.patch, "in_channels": 4}
        self.network = backbones.build(name, **sizes, **image, **own).to(device)
        path = interpolants.build("linear")
        self.objective = objectives.build("deepflow" if name == "deepflow" else "velocity", interpolant=path)
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.x = torch.randn(case.batch, 4, case.side, case.side, device=device)
        self.label = torch.arange(case.batch, device=device) % 10
        self.t = torch.linspace(0.1, 0.9, case.batch, device=device)
        self.solver = solvers.build("euler", steps=1)
        flow = Flow(self.network, path)
        self.flows = {"sampling": flow, "guided": solvers.guidance.build("classifier-free", scale=1.5)(flow)}

    def loss(self) -> Tensor:
        draws = Draws(0).at(range(len(self.x)))
        total: Tensor = self.objective(self.network, self.x, draws, label=self.label).total
        return total

    def update(self) -> None:
        clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self) -> None:
        self.loss().backward()
        self.update()

    def sample(self, kind: str) -> None:
        self.solver(self.flows[kind], self.x, label=self.label)

    @torch.no_grad()
    def call(self) -> None:
        self.network(self.x, self.t, label=self.label)

    def work(self) -> dict[str, float]:
        """Return what arithmetic expects the parts to cost: multiply–accumulates, or parameters to update."""
        forward, call = forward_flops(self.loss) / 2, forward_flops(self.call) / 2
        parts = {"forward": forward, "backward": 2 * forward, "step": 3 * forward, "sampling": call, "guided": 2 * call}
        return {**parts, "optimizer": sum(parameter.numel() for parameter in self.parameters)}


def turn(model: Model, clock: Callable[[], float]) -> dict[str, float]:
    """Return the seconds that each part takes, once each; of sampling, one step of Euler's method."""
    marks = [clock()]
    loss = model.loss()
    marks.append(clock())
    loss.backward()
    marks.append(clock())
    model.update()
    marks.append(clock())
    for kind in model.flows:
        model.sample(kind)
        marks.append(clock())
    forward, backward, optimizer, sampling, guided = (b - a for a, b in pairwise(marks))
    step = forward + backward + optimizer
    parts = {"forward": forward, "backward": backward, "optimizer": optimizer, "step": step}
    return {**parts, "sampling": sampling, "guided": guided}


def timer(device: torch.device) -> Callable[[], float]:
    """Return a clock: process time, or the wall clock with nothing left to do on a GPU."""

    def wall() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return wall if device.type == "cuda" else time.process_time


def maps(run: Callable[[], object], tokens: int) -> set[str]:
    """Return the operations of a call that take a tensor with the number of tokens twice among its sides."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as found:
        run()
    shapes = {(event.name, tuple(shape)) for event in found.events() or () for shape in event.input_shapes if shape}
    return {name for name, shape in shapes if shape.count(tokens) > 1}


class Result(NamedTuple):
    """What was measured of one case: of the plain network, then of DeepFlow."""

    case: Case
    seconds: tuple[dict[str, float], dict[str, float]]
    work: tuple[dict[str, float], dict[str, float]]
    memory: dict[str, tuple[int, ...]]
    maps: set[str]
    kernels: tuple[int, int] | None

    def bar(self, part: str) -> str:
        """Return the bar on a part's ratio of times, and whether it is met."""
        most = {"step": self.case.step, "sampling": self.case.sampling}.get(part)
        if most is None:
            return ""
        return f"≤ {most}: {'met' if self.seconds[1][part] <= most * self.seconds[0][part] else 'MISSED'}"

    def rows(self) -> list[dict[str, str]]:
        """Return the rows of the table."""
        rows = []
        for part, plain in self.seconds[0].items():
            ours, memory = self.seconds[1][part], self.memory.get(part)
            row = {"part": part, "plain ms": f"{plain * 1e3:.0f}", "DeepFlow ms": f"{ours * 1e3:.0f}"}
            row |= {"ratio": f"{ours / plain:.2f}", "by arithmetic": f"{self.work[1][part] / self.work[0][part]:.2f}"}
            sizes = ["", "", ""]
            if memory:
                sizes = [*(f"{size / MIB:.0f}" for size in memory), f"{memory[1] / memory[0]:.2f}"]
            row |= dict(zip(("plain MiB", "DeepFlow MiB", "memory ratio"), sizes, strict=True))
            rows.append({**row, "bar": self.bar(part)})
        return rows

    def text(self) -> str:
        """Return title, table and what was counted, in Markdown."""
        c = self.case
        title = f"Width {c.width}, depth {c.depth}, {c.branches} branches, acceleration {c.name}, batch {c.batch} of "
        title += f"{c.side} × {c.side} × 4, patch {c.patch}:"
        seen = f"MISSED: tensors of {c.tokens} × {c.tokens} in {', '.join(sorted(self.maps))}" if self.maps else "none"
        notes = f"Tensors of tokens × tokens in a step and a call of DeepFlow: {seen}."
        if self.kernels:
            notes += f" Kernels a forward pass: plain {self.kernels[0]}, DeepFlow {self.kernels[1]}."
        return f"{title}\n\n{table(self.rows())}\n\n{notes}\n"


def memories(case: Case, device: torch.device) -> dict[str, tuple[int, ...]]:
    """Return the peak memory of two steps and of a call, weights included; before any network is in this process."""

    def steps(name: str) -> None:
        model = Model(case, name, device)
        model.train()
        model.train()

    return {
        "step": tuple(peak_memory(device.type, lambda name=name: steps(name)) for name in NETWORKS),
        "sampling": tuple(
            peak_memory(device.type, lambda name=name: Model(case, name, device).call()) for name in NETWORKS
        ),
    }


def measure(case: Case, memory: dict[str, tuple[int, ...]], device: torch.device, repetitions: int) -> Result:
    """Measure one case; the first turn of each network warms up."""
    models = [Model(case, name, device) for name in NETWORKS]
    clock, turns = timer(device), list[tuple[dict[str, float], ...]]()
    for _ in range(repetitions + 1):
        turns.append(tuple(turn(model, clock) for model in models))
    parts = turns[0][0]
    plain, ours = ({part: statistics.median(both[i][part] for both in turns[1:]) for part in parts} for i in range(2))
    found = maps(models[1].train, case.tokens) | maps(models[1].call, case.tokens)
    counts = (profiled(models[0].call), profiled(models[1].call)) if device.type == "cuda" else None
    return Result(case, (plain, ours), (models[0].work(), models[1].work()), memory, found, counts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="The cost of DeepFlow beside its trunk.")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--repetitions", type=int, default=5, help="turns of each network")
    parser.add_argument("--record", action="store_true", default=cuda, help="add the tables to RESULTS.md")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    clock = "process time" if given.device == "cpu" else "wall clock"
    name = f"{device_name(given.device)}, torch {torch.__version__}, {date.today().isoformat()}"
    text = f"## {name}: DeepFlow beside its trunk\n\nBy {clock}, a step of Euler's method for sampling:\n"
    device = torch.device(given.device)
    taken = [memories(case, device) for case in CASES]
    for case, memory in zip(CASES, taken, strict=True):
        text += f"\n{measure(case, memory, device, given.repetitions).text()}"
    print(text)
    if given.record:
        with RESULTS.open("a") as file:
            file.write(f"\n{text}")
    missed = text.count("MISSED")
    print(f"{missed} bars missed" if missed else "all bars met")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
