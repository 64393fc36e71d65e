"""Image to image: a digit is partly drowned in noise and drawn again, as another digit.

``python examples/digits_image_to_image.py [--run FOLDER] [--steps 1200] [--output image-to-image.png]``

x_t = α(t)·image + σ(t)·noise, and a solver that starts at t instead of 1. A start near 1, noise, leaves the model
free; one near 0 keeps the image, whatever the label says.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from digits_model import train
from torch import Tensor

from pathline import Draws, data, solvers
from pathline.core.flow import BaseFlow
from pathline.solvers import guidance
from pathline.training import checkpoints, sampling
from pathline.training.pictures import save_grid

STARTS = (0.2, 0.35, 0.5, 0.65, 0.8, 1.0)


def load(run: Path) -> BaseFlow:
    """Return the flow of a trained run, with its guidance."""
    _, parts = sampling.load(checkpoints.find(run), [])
    return parts.flow(parts.backbone)


def redraw(flow: BaseFlow, images: Tensor, label: Tensor, start: float) -> Tensor:
    """Return images of a label that keep what their noised versions at time ``start`` still show, (N, 1, 8, 8)."""
    noise = Draws(0).normal("noise", range(len(images)), images.shape[1:])
    x = flow.interpolant.interpolate(images, noise, start)
    return solvers.build("heun", steps=20, start=start)(flow, x, label=label)


def nearest(images: Tensor) -> Tensor:
    """Return the label of the nearest training image, (N,)."""
    digits = data.build("digits", split="train")
    known = digits.batch(range(len(digits)))
    return known["label"][torch.cdist(images.flatten(1), known["data"].flatten(1)).argmin(1)]


def main(arguments: list[str] | None = None) -> dict[float, tuple[float, float]]:
    """Turn held-out digits into the next ones; return, by start, the share turned and the distance travelled."""
    parser = argparse.ArgumentParser(description="Image to image on digits.")
    parser.add_argument("--run", type=Path, help="a run's folder on digits; trains a small network if not given")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--output", type=Path, default=Path("image-to-image.png"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    guided = guidance.build("classifier-free", scale=2.0)
    flow = load(given.run) if given.run else guided(train(given.steps))
    batch = data.build("digits", split="held-out").batch(range(100))
    images, label = batch["data"], (batch["label"] + 1) % 10
    rows, found = [images[:10]], {}
    for start in STARTS:
        result = redraw(flow, images, label, start)
        turned = float((nearest(result) == label).float().mean())
        moved = float((result - images).square().mean().sqrt())
        found[start] = turned, moved
        rows.append(result[:10])
        print(
            f"from t = {start}: {turned:.0%} become the next digit; pixels move by {moved:.2f} of 2, root mean square"
        )
    save_grid(given.output, torch.cat(rows).clamp(-1, 1), torch.arange(len(rows)).repeat_interleave(10))
    print(f"wrote {given.output}: images, and below them the next digit from t = {', '.join(map(str, STARTS))}")
    return found


if __name__ == "__main__":
    main()
