"""How likely are digits? Bits a dimension of held-out images, and which of them the model finds usual.

``python examples/digits_likelihood.py [--steps 1200] [--count 400] [--output likelihood.png]``

Pixels have 17 levels. In training and in the likelihood each stands for a bin, filled with uniform noise, so that bits
count what it takes to tell the level of a pixel: log₂ 17 = 4.09 for one who knows nothing of digits.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from digits_model import train
from torch import Tensor

from pathline import Flow, data
from pathline.solvers.likelihood import Dequantization, log_likelihood
from pathline.training.pictures import save_grid

LEVELS = 17


def bits(flow: Flow, images: Tensor, label: Tensor) -> Tensor:
    """Return bits a dimension of each image, (N,), from one probe each."""
    solver = {"name": "dopri5", "rtol": 1e-4, "atol": 1e-4}
    return log_likelihood(flow, images, solver=solver, levels=LEVELS, seed=0, label=label).bits_per_dimension


def pixels_alone(images: Tensor, others: Tensor) -> float:
    """Return bits a dimension of ``images`` by the levels that each pixel has in ``others``, alone."""
    ours, theirs = (((x + 1) * 8).round().long().flatten(1) for x in (images, others))
    counts = torch.stack([(theirs == level).sum(0) for level in range(LEVELS)]) + 1 / LEVELS
    return -float((counts / counts.sum(0)).log2().gather(0, ours).mean())


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, measure, draw the most and the least likely of each class; return the mean bits a dimension."""
    parser = argparse.ArgumentParser(description="The likelihood of digits.")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--count", type=int, default=400, help="images of each set, at most 898")
    parser.add_argument("--output", type=Path, default=Path("likelihood.png"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    flow = train(given.steps, Dequantization(LEVELS))
    sets = [data.build("digits", split=split) for split in ("train", "held-out")]
    known, held_out = (digits.batch(range(given.count)) for digits in sets)
    images, label = held_out["data"], held_out["label"]
    usual = bits(flow, images, label)
    found = {
        "training images": bits(flow, known["data"], known["label"]),
        "held-out images": usual,
        "held-out images, called by the next digit": bits(flow, images, (label + 1) % 10),
        "held-out images, upside down": bits(flow, images.flip(2), label),
        "held-out images, black for white": bits(flow, -images, label),
    }
    means = {name: float(value.mean()) for name, value in found.items()}
    means["held-out images, each pixel for itself"] = pixels_alone(images, known["data"])
    for name, mean in means.items():
        print(f"{mean:.3f} bits a dimension: {name}")
    print(f"{math.log2(LEVELS):.3f} bits a dimension: all levels alike")
    ends = [(label == digit).nonzero()[:, 0] for digit in range(10)]
    ends = [rows[usual[rows].argsort()] for rows in ends]
    chosen = torch.cat([torch.cat((rows[:5], rows[-5:])) for rows in ends])
    save_grid(given.output, images[chosen], label[chosen])
    print(f"wrote {given.output}: of each digit the five most likely on the left, the five least likely on the right")
    return means


if __name__ == "__main__":
    main()
