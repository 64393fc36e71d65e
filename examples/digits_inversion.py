"""Inversion: from a digit to the noise that it comes from, and back, or on to another digit in the same hand.

``python examples/digits_inversion.py [--run FOLDER] [--steps 1200] [--output inversion.png]``

The flow is an ODE, so a solver that runs from noise to data has a reverse, ``solver.reversed()``. The trip there and
back ends where it began, up to the solver's error. Back under another label, the noise keeps slant and weight. The
noise is a little weaker than one that is drawn: nothing tells that of pixels that are black in nearly every image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from digits_model import train
from torch import Tensor

from pathline import data, solvers
from pathline.core.flow import BaseFlow
from pathline.training import checkpoints, sampling
from pathline.training.pictures import save_grid


def load(run: Path) -> BaseFlow:
    """Return the flow of a trained run, without guidance, which would bend the way back."""
    _, parts = sampling.load(checkpoints.find(run), ["guidance=[]"])
    return parts.flow(parts.backbone)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Invert held-out digits and return; give the error of the way there and back by solver."""
    parser = argparse.ArgumentParser(description="Inversion of digits.")
    parser.add_argument("--run", type=Path, help="a run's folder on digits; trains a small network if not given")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--output", type=Path, default=Path("inversion.png"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    flow = load(given.run) if given.run else train(given.steps)
    batch = data.build("digits", split="held-out").batch(range(50))
    images, label = batch["data"], batch["label"]
    errors: dict[str, float] = {}
    back, noise = images, images
    for name, options in (
        ("heun", {"steps": 10}),
        ("heun", {"steps": 20}),
        ("heun", {"steps": 40}),
        ("rk4", {"steps": 20}),
        ("dopri5", {}),
    ):
        solver = solvers.build(name, **options)
        there = solver.reversed().solve(flow, images, label=label)
        noise, back = there.x, solver(flow, there.x, label=label)
        key = " ".join([name, *(f"{value} steps" for value in options.values())])
        errors[key] = rms(back - images)
        print(f"{key}: {there.nfe} calls there, as many back, and {errors[key]:.1e} (root mean square) from the image")
    print(f"noise: mean {float(noise.mean()):.2f}, standard deviation {float(noise.std()):.2f}")
    other = (label + 1) % 10
    turned = solvers.build("dopri5")(flow, noise, label=other)
    rows = torch.cat([part[:10] for part in (images, noise / 3, back, turned)])
    save_grid(given.output, rows.clamp(-1, 1), torch.arange(4).repeat_interleave(10))
    print(f"wrote {given.output}: images; their noise, from -3 to 3; back; and back as the next digit")
    return errors


def rms(x: Tensor) -> float:
    """Return the root mean square."""
    return float(x.square().mean().sqrt())


if __name__ == "__main__":
    main()
