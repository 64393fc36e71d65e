"""Error against network calls on the exact flow of a Gaussian mixture: our methods beside torchdiffeq's.

``python benchmarks/accuracy.py [picture.png]`` solves from noise to data with float64 states, prints a table of
root-mean-square errors and draws it. The truth is our adaptive method at a tolerance of 1e-11.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from pathline import Draws, interpolants, solvers
from pathline.core.errors import PathlineError
from pathline.solvers import Solver
from pathline.testing import GaussianMixture

OWN = ("euler", "midpoint", "heun", "rk4", "ab2", "ab3", "dpm++", "unipc")
LIBRARY = ("heun3", "rk4", "dopri5", "bosh3", "dopri8")
CALLS = (8, 16, 32, 64, 128, 256)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)


def mixture() -> GaussianMixture:
    """Eight modes of two widths in two dimensions, on a circle of radius 2."""
    angles = [math.tau * k / 8 for k in range(8)]
    return GaussianMixture([[2 * math.cos(a), 2 * math.sin(a)] for a in angles], [0.15, 0.3] * 4)


def candidates(name: str, library: bool) -> list[Solver]:
    """The settings of one method, from few calls to many."""
    if library:
        if name.startswith(("dopri", "bosh")):
            return [solvers.build("ode", method=name, rtol=tol, atol=tol) for tol in TOLERANCES]
        calls = {"heun3": 3, "rk4": 4}[name]
        return [solvers.build("ode", method=name, steps=n // calls) for n in CALLS]
    if name == "dopri5":
        return [solvers.build(name, rtol=tol, atol=tol) for tol in TOLERANCES]
    calls = solvers.build(name, steps=1).calls_per_step
    return [solvers.build(name, steps=max(1, n // calls)) for n in CALLS]


def curve(found: list[Solver], x: Tensor, truth: Tensor) -> list[tuple[int, float]]:
    """Return (NFE, root-mean-square error) of each setting."""
    flow = mixture().flow(interpolants.build("linear"))
    solutions = [solver.solve(flow, x) for solver in found]
    return [(solution.nfe, float((solution.x - truth).square().mean().sqrt())) for solution in solutions]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description="Error against network calls on an exact flow.")
    parser.add_argument("picture", nargs="?", type=Path, default=Path("docs/error-against-nfe.png"))
    picture = parser.parse_args(arguments).picture
    torch.set_num_threads(1)
    x = Draws(0).normal("start", range(512), (2,)).double()
    truth = solvers.build("dopri5", rtol=1e-11, atol=1e-11)(mixture().flow(interpolants.build("linear")), x)
    figure, axes = plt.subplots(figsize=(7.5, 5.5), layout="constrained")
    print("| method | NFE: root-mean-square error |\n|---|---|")
    for library, names in ((False, (*OWN, "dopri5")), (True, LIBRARY)):
        for name in names:
            try:
                points = curve(candidates(name, library), x, truth)
            except PathlineError as error:
                print(f"| {name} | {error} |")
                continue
            label = f"torchdiffeq {name}" if library else name
            print(f"| {label} | " + ", ".join(f"{nfe}: {error:.1e}" for nfe, error in points) + " |")
            axes.loglog(*zip(*points, strict=True), "--" if library else "-", marker=".", label=label, alpha=0.8)
    axes.set_xlabel("network calls (NFE)")
    axes.set_ylabel("root-mean-square error of the samples")
    axes.set_title("From noise to eight Gaussians on the linear path")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(picture, dpi=110)
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
