"""DeepFlow's ladder: SiT; + deep supervision; + time gap; + acceleration; + cross-space attention; and variants of it.

``python benchmarks/ladder.py`` trains every rung for every seed and prints quality at equal steps, at equal seconds and
at equal parameters, as Markdown, with a picture. A finished run is kept as JSON under ``--folder`` and not run again.

All rungs see the same data, noise, times and label dropout, by the library's draws. The learning rate is constant after
its warm-up and the averaged network is measured, so that the curve at any budget is that of an honest run of so many
steps. Quality is the velocity loss of the final head on held-out images at fixed times and noise, and at the end the
Fréchet distances and label agreement of samples (Euler, guidance 1). What a step costs is measured apart, the rungs in
turns, so that a busy machine is equally busy for all: process time on a CPU, the wall clock on a GPU. At equal
parameters the MLPs of a rung are widened up to DeepFlow's count.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bare import device_name, table
from ladder_plot import draw
from ladder_rungs import FULL, LADDER, PLAIN, VARIANTS, Settings, matched
from ladder_runs import Runs, costs

from pathline.metrics import Real


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


def rows(
    found: Mapping[str, list[dict[str, Any]]],
    widened: Mapping[str, list[dict[str, Any]]],
    seconds: Mapping[str, float],
) -> Iterator[dict[str, str]]:
    """Yield the rows of the table of losses: at equal steps, seconds and parameters, each beside the plain network."""
    steps = found[PLAIN][0]["curve"][-1]["step"]
    budget = steps * min(seconds.values())  # all runs reach it
    plain = [run["curve"][-1]["loss"] for run in found[PLAIN]]
    for name, runs in found.items():
        last = [run["curve"][-1]["loss"] for run in runs]
        timed = [loss_at(run, min(steps, budget / seconds[name])) for run in runs]
        cells = {
            "rung": name,
            "seeds": str(len(runs)),
            "parameters": f"{runs[0]['parameters']:,}",
            "ms a step": f"{seconds[name] * 1e3:.1f} ({seconds[name] / seconds[PLAIN]:.2f} ×)",
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
    parser.add_argument("--equal-parameters", nargs="*", help="rungs to train as large as the full one; alone: all")
    parser.add_argument("--blocks", type=int, default=12, help="of four steps, to measure what a step costs")
    parser.add_argument("--folder", type=Path, default=Path("runs/ladder"))
    parser.add_argument("--plot", type=Path, default=Path("docs/ladder.png"))
    given = parser.parse_args(arguments)
    alike = given.rungs if given.equal_parameters == [] else given.equal_parameters or []
    unknown = [name for name in (*given.rungs, *alike) if name not in LADDER]
    unknown += [name for name in given.variants if not set(name.split(" & ")) <= set(VARIANTS)]
    if unknown or PLAIN not in given.rungs or (alike and PLAIN not in alike):
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
        for name in alike:
            mlp = None if name == FULL else matched(name, settings, real)
            widened.setdefault(name, []).append(runs.get(name, seed, mlp))
    for seed in given.variant_seeds or given.seeds:
        for name in given.variants:
            found[name].append(runs.get(name, seed))
    seconds = costs(list(found), settings, real, given.blocks)
    made = table(list(rows(found, widened, seconds)))
    print(f"\n{device_name(settings.device)}, torch {torch.__version__}:\n\n{made}\n")
    if found[PLAIN][0]["samples"]:
        print(table(list(sample_rows(found))))
    draw({name: found[name] for name in given.rungs}, seconds, given.plot)


if __name__ == "__main__":
    main()
