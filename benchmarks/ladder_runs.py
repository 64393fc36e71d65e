"""Runs of the ladder: training, what a step costs, quality on held-out images, and files of finished runs."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from ladder_rungs import LINEAR, Settings, build, rung
from torch import Tensor, nn

from pathline import Draws, Flow, objectives, solvers
from pathline.core.sections import Ema
from pathline.metrics import Real
from pathline.metrics.report import Judge
from pathline.training.ema import Averages


def labels(batch: Mapping[str, Tensor], real: Real, device: torch.device) -> dict[str, Tensor]:
    """Return the conditions of a batch: labels, if the data have some."""
    return {"label": batch["label"].to(device)} if real.training.num_classes else {}


class Examiner:
    """Measures networks on the held-out half: fixed times and noise, and samples from fixed noise."""

    def __init__(self, settings: Settings, real: Real, device: torch.device) -> None:
        self.settings, self.device = settings, device
        batch = real.held_out.batch(range(len(real.held_out)))
        count, draws = len(batch["data"]), Draws(2**40)
        u = (torch.from_numpy(draws.permutation("times", count)).double() + 0.5) / count
        self.t = objectives.times.build("logit-normal").quantile(u).float().to(device)
        self.given = labels(batch, real, device)
        data, noise = batch["data"], draws.normal("noise", range(count), batch["data"].shape[1:])
        self.x = LINEAR.interpolate(data, noise, self.t.cpu()).to(device)
        self.velocity = LINEAR.velocity(data, noise, self.t.cpu()).to(device)
        self.start = draws.normal("start", range(settings.samples), data.shape[1:]).to(device)
        self.asked = torch.arange(settings.samples, device=device) % max(1, real.training.num_classes)
        self.judge = Judge.of(real) if tuple(real.training.shape) == (1, 8, 8) else None

    @torch.no_grad()
    def loss(self, network: nn.Module) -> float:
        """Return the held-out velocity loss of the final head."""
        said = []
        for part in torch.arange(len(self.x), device=self.device).split(512):
            given = {name: value[part] for name, value in self.given.items()}
            said.append(network(self.x[part], self.t[part], **given))
        return float((torch.cat(said) - self.velocity).square().mean())

    def judged(self, network: nn.Module) -> dict[str, float]:
        """Return the figures of samples, Euler 20 without guidance; none for data that have no classifier here."""
        if self.judge is None:
            return {}
        solver, flow = solvers.build("euler", steps=20), Flow(network, LINEAR)
        pairs = zip(torch.split(self.start, 500), torch.split(self.asked, 500), strict=True)
        images = torch.cat([solver(flow, x, label=label).clamp(-1, 1).cpu() for x, label in pairs])
        records = self.judge.report(images, self.asked.cpu())
        return {f"{record.metric}: {key}": value for record in records for key, value in record.values.items()}


class Loop:
    """A rung in training, from its first step.

    Args:
        name: of the rung.
        settings: of the run.
        seed: of the weights, the order of the data, and all draws.
        real: what to train on.
        device: where.
        mlp: width of the blocks' MLPs, or None for the usual one.
    """

    def __init__(self, name: str, settings: Settings, seed: int, real: Real, device: torch.device, mlp: int | None):
        torch.manual_seed(seed)
        network, self.objective = build(name, settings, real, mlp)
        self.settings, self.seed, self.real, self.device = settings, seed, real, device
        self.network = network.to(device).train()
        self.trained, self.steps = list(network.parameters()), 0
        self.averages = Averages(network, Ema(decay=settings.decay))
        self.optimizer = torch.optim.AdamW(self.trained, lr=settings.lr, weight_decay=0.0, fused=True)
        self.kept = torch.ones((), device=device)

    @property
    def average(self) -> nn.Module:
        """The averaged network."""
        return self.averages.tracks["ema"]

    def step(self) -> None:
        """Train on one batch."""
        s, data = self.settings, self.real.training
        positions = range(self.steps * s.batch, (self.steps + 1) * s.batch)
        batch = data.batch(data.indices_at(positions, self.seed))
        draws, given = Draws(self.seed).at(positions, step=self.steps), labels(batch, self.real, self.device)
        self.optimizer.param_groups[0]["lr"] = s.lr * min(1.0, (self.steps + 1) / s.warmup)
        self.objective(self.network, batch["data"].to(self.device), draws, **given).total.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.averages.update(self.kept)
        self.steps += 1


def train(name: str, settings: Settings, seed: int, examiner: Examiner, real: Real, mlp: int | None) -> dict[str, Any]:
    """Train a rung once; return its record."""
    loop, clock = Loop(name, settings, seed, real, examiner.device, mlp), Clock(examiner.device)
    curve, spent = [], 0.0
    for mark in settings.marks():
        began = clock()
        while loop.steps < mark:
            loop.step()
        spent += clock() - began
        curve.append({"step": mark, "seconds": spent, "loss": examiner.loss(loop.average)})
    return {
        "name": name,
        "seed": seed,
        "mlp": mlp,
        "parameters": sum(p.numel() for p in loop.trained if p.requires_grad),
        "settings": asdict(settings),
        "curve": curve,
        "samples": examiner.judged(loop.average),
    }


def costs(names: Sequence[str], settings: Settings, real: Real, blocks: int, length: int = 4) -> dict[str, float]:
    """Return the seconds of a step of each rung: the median over blocks of steps, taken in turns."""
    device = torch.device(settings.device)
    clock, loops = Clock(device), {name: Loop(name, settings, 0, real, device, None) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(blocks + 1):  # the first block warms up
        for name, loop in loops.items():
            began = clock()
            for _ in range(length):
                loop.step()
            times[name].append((clock() - began) / length)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


class Clock:
    """Process time on a CPU; on a GPU the wall clock with nothing left to do."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> float:
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Runs:
    """Runs by rung, seed and MLP width, each kept in a file of its own."""

    def __init__(self, folder: Path, settings: Settings, real: Real) -> None:
        self.folder, self.settings, self.real = folder, settings, real
        self.examiner: Examiner | None = None

    def get(self, name: str, seed: int, mlp: int | None = None) -> dict[str, Any]:
        """Return a run, from its file if there is one."""
        options = {**asdict(self.settings), **rung(name), "seed": seed, "mlp": mlp}
        digest = blake2b(json.dumps(options, sort_keys=True).encode(), digest_size=8).hexdigest()
        path = self.folder / f"{self.settings.data}-{name.replace(' ', '-')}-{seed}-{digest}.json"
        if path.exists():
            return dict(json.loads(path.read_text()))
        if self.examiner is None:
            self.examiner = Examiner(self.settings, self.real, torch.device(self.settings.device))
        found = train(name, self.settings, seed, self.examiner, self.real, mlp)
        self.folder.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(found, indent=1))
        path.with_suffix(".part").replace(path)
        last = found["curve"][-1]
        print(f"{name}, seed {seed}: {last['loss']:.4f} after {last['seconds']:.0f} s", flush=True)
        return found
