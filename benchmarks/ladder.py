"""DeepFlow's ladder: SiT; + deep supervision; + time gap; + acceleration; + cross-space attention; and variants of it.

``python benchmarks/ladder.py`` trains every rung for every seed and prints quality at equal steps, at equal seconds and
at equal parameters, as Markdown, with a picture. A finished run is kept as JSON under ``--folder`` and not run again.

All rungs see the same data, noise, times and label dropout, by the library's draws. The learning rate is constant after
its warm-up and the averaged network is measured, so that the curve at any budget is that of an honest run of so many
steps. Quality is the velocity loss of the final head on held-out images at fixed times and noise, and at the end the
Fréchet distances and label agreement of samples (Euler, guidance 1). Seconds are those of training alone, process time
on a CPU, the wall clock on a GPU; a step of a rung costs the first decile over the stretches between measurements of
all its runs, as neighbours only add. At equal parameters the MLPs of a rung are widened up to DeepFlow's count.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bare import device_name, table
from ladder_plot import draw
from torch import Tensor, nn

from pathline import Draws, Flow, backbones, interpolants, objectives, solvers
from pathline.core.sections import Ema
from pathline.metrics import Real
from pathline.metrics.report import Judge
from pathline.objectives import Objective
from pathline.training.ema import Averages

LINEAR = interpolants.build("linear")
Options = dict[str, dict[str, Any]]

LADDER: dict[str, Options] = {
    "SiT": {"backbone": {"name": "sit"}, "objective": {"name": "velocity"}},
    "+ deep supervision": {"backbone": {"refiner": "none"}, "objective": {"acceleration": 0.0, "max_gap": 0.0}},
    "+ time gap": {"backbone": {"refiner": "gap"}, "objective": {"acceleration": 0.0}},
    "+ acceleration": {"backbone": {"refiner": "acceleration"}, "objective": {}},
    "DeepFlow": {"backbone": {}, "objective": {}},
}
VARIANTS: dict[str, Options] = {
    "addition": {"backbone": {"refiner": "addition"}},
    "scales": {"backbone": {"time_scale": 1000.0, "gap_scale": 1000.0}},
    "time scale": {"backbone": {"time_scale": 1000.0}},
    "velocity residual": {"backbone": {"residual": "velocity", "zero_output": True}},
    "query residual": {"backbone": {"residual": "query"}},
    "separate heads": {"backbone": {"shared_heads": False}},
    "sample sign": {"objective": {"gap_sign": "sample"}},
    "by clock": {"objective": {"acceleration_by_clock": True}},
    "free velocity": {"objective": {"stop_velocity": False}},
    "no acceleration loss": {"objective": {"acceleration": 0.0}},
    "material beside": {"objective": {"material": 0.02}},
    "material instead": {"objective": {"acceleration": 0.0, "material": 0.02}},
}
FULL, PLAIN = "DeepFlow", "SiT"


@dataclass(frozen=True)
class Settings:
    """What a run is, but for its rung and seed; whatever changes its numbers."""

    data: str = "digits"
    width: int = 64
    depth: int = 4
    heads: int = 4
    branches: int = 2
    patch: int = 2
    acceleration_width: int = 64
    batch: int = 32
    lr: float = 4e-3
    warmup: int = 100
    decay: float = 0.998
    steps: int = 1000
    points: int = 12
    samples: int = 1000
    device: str = "cpu"

    def marks(self) -> list[int]:
        """Return the steps after which quality is measured, evenly spread over their logarithm from 1/20 on."""
        first = math.log(self.steps / 20)
        spread = (first + (math.log(self.steps) - first) * i / (self.points - 1) for i in range(self.points))
        return sorted({max(1, round(math.exp(mark))) for mark in spread})


def rung(name: str) -> Options:
    """Return the options of a rung, or of the full DeepFlow with one or several variants, as ``a & b``."""
    if name in LADDER:
        return LADDER[name]
    merged: Options = {"backbone": {}, "objective": {}}
    for part in name.split(" & "):
        for section, options in VARIANTS[part].items():
            merged[section].update(options)
    return merged


def build(name: str, settings: Settings, real: Real, mlp: int | None = None) -> tuple[nn.Module, Objective]:
    """Build a rung's network and objective, the MLPs of its blocks ``mlp`` wide or four times the width."""
    s, options = settings, rung(name)
    shape, classes = real.training.shape, real.training.num_classes
    network: dict[str, Any] = {"name": "deepflow", "hidden_size": s.width, "depth": s.depth, "num_heads": s.heads}
    network |= {"input_size": tuple(shape[1:]), "in_channels": shape[0], "patch_size": s.patch, "num_classes": classes}
    network |= {} if mlp is None else {"mlp_ratio": (mlp + 0.5) / s.width}
    network |= options["backbone"]
    if network["name"] == "deepflow":
        network["branches"] = s.branches
        if network.get("refiner", "vera") not in ("none", "gap"):
            network["acceleration_width"] = s.acceleration_width
    objective = {"name": "deepflow", "times": "logit-normal", **options["objective"]}
    return backbones.build(network), objectives.build(objective, interpolant=LINEAR)


def parameters(name: str, settings: Settings, real: Real, mlp: int | None = None) -> int:
    """Count the trained parameters of a rung."""
    with torch.device("meta"):
        network, _ = build(name, settings, real, mlp)
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def matched(name: str, settings: Settings, real: Real) -> int:
    """Return the width of a rung's MLPs at which its parameters come nearest to the full DeepFlow's."""
    wanted, usual = parameters(FULL, settings, real), 4 * settings.width
    first, second = (parameters(name, settings, real, width) for width in (usual, usual + 1))
    return usual + round((wanted - first) / (second - first))


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


def train(name: str, settings: Settings, seed: int, examiner: Examiner, real: Real, mlp: int | None) -> dict[str, Any]:
    """Train a rung once; return its record."""
    s, device, clock = settings, examiner.device, Clock(examiner.device)
    torch.manual_seed(seed)
    network, objective = build(name, s, real, mlp)
    network = network.to(device).train()
    trained = list(network.parameters())
    averages = Averages(network, Ema(decay=s.decay))
    averages.tracks["ema"].to(device)
    averages.follow(network)
    optimizer = torch.optim.AdamW(trained, lr=s.lr, weight_decay=0.0, fused=True)
    curve, spent, marks, kept = [], 0.0, s.marks(), torch.ones((), device=device)
    began = clock()
    for step, batch in enumerate(real.training.batches(s.batch, s.steps, seed)):
        draws = Draws(seed).at(range(step * s.batch, (step + 1) * s.batch), step=step)
        optimizer.param_groups[0]["lr"] = s.lr * min(1.0, (step + 1) / s.warmup)
        loss = objective(network, batch["data"].to(device), draws, **labels(batch, real, device)).total
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        averages.update(kept)
        if step + 1 in marks:
            spent += clock() - began
            curve.append({"step": step + 1, "seconds": spent, "loss": examiner.loss(averages.tracks["ema"])})
            began = clock()
    return {
        "name": name,
        "seed": seed,
        "mlp": mlp,
        "parameters": sum(p.numel() for p in trained if p.requires_grad),
        "settings": asdict(s),
        "curve": curve,
        "samples": examiner.judged(averages.tracks["ema"]),
    }


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


def cost(runs: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds of a step: the first decile over the stretches of all runs."""
    rates = []
    for run in runs:
        before = {"step": 0, "seconds": 0.0}
        for point in run["curve"]:
            rates.append((point["seconds"] - before["seconds"]) / (point["step"] - before["step"]))
            before = point
    return statistics.quantiles(rates, n=10, method="inclusive")[0]


def loss_at(run: Mapping[str, Any], step: float) -> float:
    """Return the loss at a step, linear in its logarithm between the measurements around it."""
    points = [(point["step"], point["loss"]) for point in run["curve"]]
    for (first, before), (second, after) in pairwise(points):
        if step <= second:
            return float(before + (after - before) * math.log(step / first) / math.log(second / first))
    return float(points[-1][1])


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Return mean ± standard error."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def differences(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return the paired difference over seeds."""
    pairs = list(zip(ours, theirs, strict=False))
    text = spread([one - other for one, other in pairs])
    return text if text.startswith("-") else f"+{text}"


def rows(found: Mapping[str, list[dict[str, Any]]], widened: Mapping[str, list[dict[str, Any]]]) -> Iterator[Any]:
    """Yield the rows of the table of losses: at equal steps, seconds and parameters, each beside the plain network."""
    steps = found[PLAIN][0]["curve"][-1]["step"]
    costs = {name: cost(runs) for name, runs in found.items()}
    budget = steps * costs[PLAIN]
    plain = [run["curve"][-1]["loss"] for run in found[PLAIN]]
    for name, runs in found.items():
        last = [run["curve"][-1]["loss"] for run in runs]
        timed = [loss_at(run, min(steps, budget / costs[name])) for run in runs]
        cells = {
            "rung": name,
            "seeds": str(len(runs)),
            "parameters": f"{runs[0]['parameters']:,}",
            "ms a step": f"{costs[name] * 1e3:.1f} ({costs[name] / costs[PLAIN]:.2f} ×)",
            f"loss, {steps} steps": spread(last),
            f"− {PLAIN}": differences(last, plain),
            f"loss, {budget:.1f} s": spread(timed),
            f"− {PLAIN} ": differences(timed, plain),
        }
        if widened:
            wide = [run["curve"][-1]["loss"] for run in widened.get(name, [])]
            base = [run["curve"][-1]["loss"] for run in widened[PLAIN]]
            cells["loss, equal parameters"] = spread(wide) if wide else ""
            cells["count"] = f"{widened[name][0]['parameters']:,}" if wide else ""
            cells[f"− {PLAIN}  "] = differences(wide, base) if wide else ""
        yield cells


def sample_rows(found: Mapping[str, list[dict[str, Any]]]) -> Iterator[dict[str, str]]:
    """Yield the rows of the table of samples."""
    for name, runs in found.items():
        keys = [key for key in runs[0]["samples"] if key.startswith(("frechet", "label"))]
        yield {"rung": name, **{key: spread([run["samples"][key] for run in runs], 3) for key in keys}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, print, draw."""
    usual = Settings()
    parser = argparse.ArgumentParser(description="DeepFlow's ladder at equal steps, seconds and parameters.")
    for key, value in asdict(usual).items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rungs", nargs="+", default=list(LADDER), help="names; SiT is needed to compare with")
    parser.add_argument("--variants", nargs="+", default=[], help=f"of {FULL}: {', '.join(VARIANTS)}; 'a & b' for both")
    parser.add_argument("--variant-seeds", nargs="+", type=int, help="those of --seeds if not given")
    parser.add_argument("--equal-parameters", action="store_true", help="with runs of their own")
    parser.add_argument("--folder", type=Path, default=Path("runs/ladder"))
    parser.add_argument("--plot", type=Path, default=Path("docs/ladder.png"))
    given = parser.parse_args(arguments)
    unknown = [name for name in given.rungs if name not in LADDER]
    unknown += [name for name in given.variants if not set(name.split(" & ")) <= set(VARIANTS)]
    if unknown or PLAIN not in given.rungs:
        parser.error(f"got unknown {unknown}, rungs {given.rungs}; expected {PLAIN} among rungs of {list(LADDER)}")
    settings = replace(usual, **{key: getattr(given, key) for key in asdict(usual)})
    torch.set_num_threads(1)
    real = Real.of(settings.data)
    runs = Runs(given.folder, settings, real)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*given.rungs, *given.variants)}
    widened: dict[str, list[dict[str, Any]]] = {}
    for seed in given.seeds:  # seed by seed, so that a stop leaves whole comparisons
        for name in given.rungs:
            found[name].append(runs.get(name, seed))
    for seed in given.seeds:
        for name in given.rungs if given.equal_parameters else ():
            mlp = None if name == FULL else matched(name, settings, real)
            widened.setdefault(name, []).append(runs.get(name, seed, mlp))
    for seed in given.variant_seeds or given.seeds:
        for name in given.variants:
            found[name].append(runs.get(name, seed))
    print(f"\n{device_name(settings.device)}, torch {torch.__version__}:\n\n{table(list(rows(found, widened)))}\n")
    if found[PLAIN][0]["samples"]:
        print(table(list(sample_rows(found))))
    draw({name: found[name] for name in given.rungs}, {name: cost(found[name]) for name in given.rungs}, given.plot)


if __name__ == "__main__":
    main()
