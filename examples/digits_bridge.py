"""A Schrödinger bridge between two classes of digits: threes become eights, and keep their slant and weight.

``python examples/digits_bridge.py [--source 3] [--target 8] [--steps 1500] [--output bridge.png]``

Two networks learn the two parts of a Brownian bridge, its drift and its noise; a ``SplitFlow`` puts them together for
the SDE, whose diffusion is the bridge's own. The coupling is the entropic one of the bridge, by default.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from pathline import Draws, SplitFlow, backbones, data, interpolants, objectives, solvers
from pathline.training.pictures import save_grid

SCALE = 1.0


def digits(label: int, split: str) -> Tensor:
    """Return all images of a class, flattened, (N, 64) in [−1, 1]."""
    dataset = data.build("digits", split=split)
    batch = dataset.batch(range(len(dataset)))
    return batch["data"][batch["label"] == label].flatten(1)


def train(kind: str, path: interpolants.Interpolant, ends: tuple[Tensor, Tensor], steps: int, batch: int) -> nn.Module:
    """Train a network on one part of the bridge: its drift or its noise."""
    torch.manual_seed(0)
    backbone = backbones.build("mlp", dim=64, hidden_size=256, depth=3)
    objective = objectives.build(kind, interpolant=path)
    optimizer = torch.optim.Adam(backbone.parameters(), lr=1e-3)
    for step in range(steps):
        draws = Draws(0)
        ids = range(step * batch, (step + 1) * batch)
        near, far = (
            end[(draws.uniform(name, ids) * len(end)).long()]
            for name, end in zip(("target", "source"), ends, strict=True)
        )
        loss = objective(backbone, near, draws.at(ids), source=far)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    return backbone.eval()


def main(arguments: list[str] | None = None) -> float:
    """Train, carry held-out digits over, draw; return the share of results nearest to an image of the target class."""
    parser = argparse.ArgumentParser(description="A Schrödinger bridge between two classes of digits.")
    parser.add_argument("--source", type=int, default=3)
    parser.add_argument("--target", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("bridge.png"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    path = interpolants.build("bridge", scale=SCALE)
    ends = (digits(given.target, "train"), digits(given.source, "train"))
    drift, noise = (train(kind, path, ends, given.steps, given.batch) for kind in ("drift", "noise"))
    flow = SplitFlow(drift, noise, path)
    sampler = solvers.build(
        "euler-maruyama",
        steps=100,
        grid="uniform",
        start=0.999,  # the bridge's rates are infinite at both ends
        end=0.001,
        diffusion={"name": "constant", "norm": SCALE**2 / 2},
    )
    before = digits(given.source, "held-out")
    after = sampler(flow, before, seed=0)
    share = nearest_is(after, given.target, given.source)
    print(f"{share:.0%} of {len(after)} held-out {given.source}s become {given.target}s by their nearest neighbour")
    pairs = torch.cat((before[:20], after[:20])).clamp(-1, 1).reshape(-1, 1, 8, 8)
    save_grid(given.output, pairs, torch.arange(2).repeat_interleave(20))
    print(f"wrote {given.output}: above what went in, below what came out")
    return share


def nearest_is(images: Tensor, target: int, source: int) -> float:
    """Return the share of images nearer to a training image of the target class than to one of the source class."""
    distances = [torch.cdist(images, digits(label, "train")).amin(1) for label in (target, source)]
    return float((distances[0] < distances[1]).float().mean())


if __name__ == "__main__":
    main()
