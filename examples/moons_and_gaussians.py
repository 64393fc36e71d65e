"""Two moons to eight Gaussians with every coupling: what pairing does to the paths of a flow.

``python examples/moons_and_gaussians.py [--steps 500] [--batch 128] [--output moons.png]``

Each panel trains the same small network on a two-ended linear path. The number above it is the mean squared distance
that samples travel, over that of exact optimal transport between two fresh sets: near 1, nothing is travelled in vain.
Labels (``class-conditional``) and conditions bind the upper moon to the upper half of the circle, a longer way.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathline import Draws, Flow, backbones, interpolants, objectives, solvers
from pathline.interpolants import couplings
from pathline.testing import GaussianMixture

CIRCLE = [[4 * math.cos(k * math.pi / 4), 4 * math.sin(k * math.pi / 4)] for k in range(8)]
GAUSSIANS = GaussianMixture(CIRCLE, 0.3, labels=[0, 0, 0, 0, 1, 1, 1, 1])  # upper and lower half
COUPLINGS: dict[str, dict[str, Any]] = {
    "independent": {},
    "exact": {},
    "sinkhorn": {},
    "class-conditional": {},
    "conditional": {"weight": 10.0},
    "partial": {"share": 0.5},
}


def moons(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return points (count, 2) on two half circles, and which of them, (count,)."""
    draws = Draws(seed)
    which = torch.arange(count) % 2
    angle = math.pi * draws.uniform("angle", range(count))
    upper = torch.stack((torch.cos(angle), torch.sin(angle)), 1)
    points = torch.where(which[:, None] == 0, upper, torch.tensor([1.0, 0.5]) - upper)
    return 3 * points - torch.tensor([1.5, 0.75]) + 0.1 * draws.normal("jitter", range(count), (2,)), which


def train(coupling: str, steps: int, batch: int) -> tuple[Flow, int]:
    """Train a velocity from the moons (t = 1) to the Gaussians (t = 0); return the flow and its number of classes."""
    path = interpolants.build("two-ended")
    classes = 2 if coupling == "class-conditional" else 0
    torch.manual_seed(0)
    backbone = backbones.build("mlp", dim=2, hidden_size=96, depth=3, num_classes=classes)
    pairing = couplings.build(coupling, **COUPLINGS[coupling])
    objective = objectives.build("velocity", interpolant=path, coupling=pairing, label_dropout=0.0)
    optimizer = torch.optim.Adam(backbone.parameters(), lr=2e-3)
    for step in range(steps):
        data, component = GAUSSIANS.sample(batch, seed=2 * step)
        label = torch.arange(8)[component] // 4
        order = label.argsort()  # the moon of a point is the half of the circle that it is to go to
        data, label = data[order], label[order]
        source, which = moons(batch, seed=2 * step + 1)
        source = source[which.argsort(stable=True)]
        given: dict[str, Any] = {"label": label} if classes else {}
        if coupling == "conditional":
            given["coupling_condition"] = label[:, None].float()
        loss = objective(backbone, data, Draws(1).at(range(step * batch, (step + 1) * batch)), source=source, **given)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    return Flow(backbone, path), classes


def follow(flow: Flow, classes: int, count: int) -> tuple[Tensor, float]:
    """Return trajectories (steps + 1, count, 2) and the mean squared distance travelled over the least possible."""
    source, which = moons(count, seed=10**6)
    given: dict[str, Any] = {"label": which} if classes else {}
    solution = solvers.build("heun", steps=25).solve(flow, source, trajectory=True, **given)
    fresh, _ = GAUSSIANS.sample(count, seed=10**6 + 1)
    least = couplings.build("exact").pair(source, fresh).cost
    travelled = float((solution.x - source).square().sum(1).mean())
    assert solution.trajectory is not None
    return solution.trajectory, travelled / least


def draw(panels: dict[str, tuple[Tensor, float]], output: Path) -> None:
    """Draw the trajectories of each coupling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(12, 8))
    for axis, (name, (trajectory, ratio)) in zip(axes.flat, panels.items(), strict=True):
        axis.plot(*trajectory[:, :150].numpy().transpose(2, 0, 1), color="0.7", linewidth=0.5)
        for points, color in ((trajectory[0], "tab:blue"), (trajectory[-1], "tab:red")):
            axis.scatter(*points.numpy().T, s=2, color=color)
        axis.set_title(f"{name}: {ratio:.2f} × optimal transport")
        axis.set_aspect("equal")
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(output, dpi=100)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train with every coupling, draw, and return each one's distance over the least."""
    parser = argparse.ArgumentParser(description="Two moons to eight Gaussians with every coupling.")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("moons.png"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    panels = {}
    for name in COUPLINGS:
        panels[name] = follow(*train(name, given.steps, given.batch), count=500)
        print(f"{name}: {panels[name][1]:.3f} × the squared distance of optimal transport")
    draw(panels, given.output)
    print(f"wrote {given.output}")
    return {name: ratio for name, (_, ratio) in panels.items()}


if __name__ == "__main__":
    main()
