"""Samples of a network: batch by batch, and the few of a picture in training.

N samples; (C, H, W) the shape of one in the model's space, (c, h, w) that of its image.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pathline.core.draws import Draws
from pathline.core.errors import ConfigurationError
from pathline.core.flow import BaseFlow
from pathline.core.sections import Sample
from pathline.solvers.guidance import Autoguidance
from pathline.training.parts import Parts
from pathline.training.pictures import levels, save_grid
from pathline.training.trained import find, load

__all__ = [
    "Drawn",
    "Solved",
    "batches",
    "draw_picture",
    "find",
    "finished",
    "labels_of",
    "load",
    "moved",
    "save_picture",
    "solve",
    "solved",
]


@dataclass(frozen=True)
class Drawn:
    """Samples with their labels, and what they cost.

    Attributes:
        x: (N, C, H, W) on the host.
        labels: (N,), or None.
        nfe: network calls of one batch's solve, the most of all batches.
        block_evaluations: transformer blocks that ran in them, the most as well; None for a network without any.
        seconds: wall time of all solves.
    """

    x: Tensor
    labels: Tensor | None
    nfe: int
    block_evaluations: int | None
    seconds: float


class Solved(NamedTuple):
    """A batch of samples.

    Attributes:
        ids: the numbers of the samples.
        x: (N, C, H, W) in the model's space, on the device.
        labels: (N,) on the host, or None.
        nfe: network calls.
        block_evaluations: transformer blocks that ran in them; None for a network without any.
    """

    ids: range
    x: Tensor
    labels: Tensor | None
    nfe: int
    block_evaluations: int | None


def solved(
    parts: Parts, network: nn.Module, labels: Tensor | None, ids: range, seed: int, batch: int
) -> Iterator[Solved]:
    """Draw samples by number; each is a function of (seed, number) and its label, whatever else is drawn.

    Args:
        parts: tells solver, guidance and path; where guidance has one scale a sample, that of each goes by its number.
        network: in evaluation mode; its device is used.
        labels: (N,) of these samples, or None for an unconditional network.
        ids: the N numbers of the samples, one after the other.
        seed: with a sample's number fixes its noise, and what an SDE draws on the way.
        batch: samples solved at once; changes nothing but rounding.

    Raises:
        SolverError: a sample became NaN or infinite.
    """
    device = next(network.parameters()).device
    for first in range(0, len(ids), batch):
        some = ids[first : first + batch]
        flow = replace(parts, guidance=tuple(guide.of_samples(some) for guide in parts.guidance)).flow(network)
        theirs = None if labels is None else labels[first : first + batch]
        noise = Draws(seed).normal("initial noise", some, parts.dataset.shape).to(device)
        given = parts.conditions(None if theirs is None else theirs.to(device))
        solution = parts.solver.solve(flow, noise, seed=seed, sample_ids=some, **given)
        yield Solved(some, solution.x, theirs, solution.nfe, solution.block_evaluations)


def batches(
    parts: Parts, network: nn.Module, labels: Tensor | None, ids: range, seed: int, batch: int
) -> Iterator[tuple[range, Tensor, Tensor | None, int]]:
    """Draw samples as they are written down: ``(ids, samples, labels, nfe)`` a batch; arguments as for ``solved``.

    Samples are on the host: images uint8 (N, c, h, w), or, of latents that nothing decodes, float32 (N, C, H, W).
    """
    for piece in solved(parts, network, labels, ids, seed, batch):
        yield piece.ids, finished(parts, piece.x), piece.labels, piece.nfe


def finished(parts: Parts, x: Tensor) -> Tensor:
    """Return samples (N, C, H, W) as they are written down: images uint8 (N, c, h, w), or else float32 latents.

    Latents are decoded ``sample.decode_batch`` at once; the result is on the host.
    """
    return torch.cat([_finished(parts, some) for some in _cut(parts, x)])


def _finished(parts: Parts, x: Tensor) -> Tensor:
    images = parts.images(x)
    return x.float().cpu() if images is None else levels(images).cpu()


def _cut(parts: Parts, x: Tensor) -> list[Tensor]:
    size = parts.configuration.sample.decode_batch
    return [x[first : first + size] for first in range(0, len(x), size)]


def labels_of(wanted: Sample, ids: range, classes: int, null: int | None = None) -> Tensor | None:
    """Return the labels (N,) of samples by number: by a law, the null label, one for all, or a list over and over.

    Args:
        wanted: tells the law; ``random`` is a function of (seed, number) alone.
        ids: the N numbers.
        classes: of the network; 0 has no labels.
        null: the network's null label; None if it has none.

    Raises:
        ConfigurationError: the null label is asked for, and there is none.
    """
    if not classes:
        return None
    numbers = torch.arange(ids.start, ids.stop)
    if wanted.labels == "balanced":
        return numbers % classes
    if wanted.labels == "random":
        return (Draws(wanted.seed).uniform("labels", ids) * classes).long()
    if wanted.labels == "none":
        if null is None:
            raise ConfigurationError(
                "sample.labels: got none for a network without a null label; name a law or classes"
            )
        return torch.full((len(ids),), null)
    named = torch.tensor([wanted.labels] if isinstance(wanted.labels, int) else wanted.labels)
    return named[numbers % len(named)]


def moved(parts: Parts, device: torch.device) -> nn.Module:
    """Move a model to a device, weak ones that guide it along, and return its network."""
    for guide in parts.guidance:
        if isinstance(guide, Autoguidance):
            (guide.weak.backbone if isinstance(guide.weak, BaseFlow) else guide.weak).to(device)
    return parts.backbone.to(device)


def solve(parts: Parts, network: nn.Module, labels: Tensor | None, count: int, seed: int, batch: int) -> Drawn:
    """Draw samples 0 … count − 1 and keep them; other arguments as for ``solved``."""
    began = time.perf_counter()
    pieces = list(solved(parts, network, labels, range(count), seed, batch))
    blocks = [piece.block_evaluations for piece in pieces if piece.block_evaluations is not None]
    x, most = torch.cat([piece.x.cpu() for piece in pieces]), max(blocks) if blocks else None
    return Drawn(x, labels, max(piece.nfe for piece in pieces), most, time.perf_counter() - began)


def draw_picture(parts: Parts, network: nn.Module) -> Drawn:
    """Draw ten samples of each of the first ten classes, with fixed noise; latents are decoded, if that can be."""
    classes = min(10, getattr(network, "num_classes", 0))
    labels = torch.arange(classes).repeat_interleave(10) if classes else None
    count = 10 * classes or 100
    drawn = solve(parts, network, labels, count, parts.configuration.sample.seed, batch=count)
    x = drawn.x.to(next(network.parameters()).device)
    images = [image.cpu() for image in (parts.images(some) for some in _cut(parts, x)) if image is not None]
    return replace(drawn, x=torch.cat(images)) if images else drawn


def save_picture(drawn: Drawn, folder: Path, step: int) -> None:
    """Write samples drawn after a step as ``pictures/step-….png``, and as ``samples.png``, which is the newest."""
    path = folder / "pictures" / f"step-{step:09d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_grid(path, drawn.x, drawn.labels)
    shutil.copyfile(path, folder / "samples.png")
