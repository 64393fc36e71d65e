"""``python -m pathline.plugins.deepflow.report [row …]``: sizes and costs of the published models, beside the paper's.

Each is built without memory for its weights. A cost is a number of multiply–accumulates of one image's forward pass.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pathline import backbones
from pathline.core.errors import PathlineError
from pathline.plugins.deepflow.backbone import DeepFlow
from pathline.plugins.deepflow.presets import PRESETS, Preset, preset
from pathline.plugins.deepflow.refiner import CrossSpaceAttention
from pathline.training.speed import forward_flops

__all__ = ["Count", "count", "main", "report"]


class Count(NamedTuple):
    """Sizes and costs of a network.

    Attributes:
        parameters: of all tensors that its weights have, the fixed position table included.
        trainable: of those that are trained.
        training: cost of all matrix products, convolutions and attention, every branch speaking.
        sampling: the same of what the last branch's velocity needs.
        modules: cost in the paper's convention, every branch speaking: what a counter sees that is called with each
            linear and convolution module. It misses the products of attention with no weights in them, and the four
            projections of the cross-space attention, which torch's module for attention applies as functions.
    """

    parameters: int
    trainable: int
    training: int
    sampling: int
    modules: int


def count(options: Mapping[str, Any]) -> Count:
    """Count for a backbone given by name and options; nothing is computed, and no memory taken for its weights."""
    with torch.device("meta"):
        backbone: Any = backbones.build(options)
        x, t = torch.zeros(1, *backbone.input_shape), torch.zeros(1)
        label = torch.zeros(1, dtype=torch.int64)
    spoken = _speaking(backbone, t)
    training, modules = _cost(backbone, lambda: backbone(x, t, label=label, **spoken))
    sampling, _ = _cost(backbone, lambda: backbone(x, t, label=label))
    trainable = sum(p.numel() for p in backbone.parameters())
    parameters = trainable + sum(buffer.numel() for buffer in backbone.buffers())
    return Count(parameters, trainable, training, sampling, modules)


def _speaking(backbone: nn.Module, t: Tensor) -> dict[str, Any]:
    """What makes a backbone say all that it is trained to say."""
    if isinstance(backbone, DeepFlow):
        return {"branch_times": (t.clone(),) * len(backbone.cuts)}
    return {"with_features": True} if getattr(backbone, "align_dims", ()) else {}


def _cost(backbone: nn.Module, run: Callable[[], object]) -> tuple[int, int]:
    """Return the cost of a call: of everything, and of its modules in the paper's convention.

    The transformer blocks are alike: one is run, and counted for all.
    """
    trunk: Any = getattr(backbone, "trunk", backbone)
    passed = [(block, block.forward) for block in trunk.blocks]
    for block, _ in passed:
        block.forward = lambda tokens, context, condition: (tokens, context)
    without = _counted(backbone, run)
    passed[0][0].forward = passed[0][1]
    with_one = _counted(backbone, run)
    for block, forward in passed:
        block.forward = forward
    full, modules = (none + len(passed) * (one - none) for none, one in zip(without, with_one, strict=True))
    return full, modules


def _counted(backbone: nn.Module, run: Callable[[], object]) -> tuple[int, int]:
    costs: list[int] = []

    def note(module: nn.Module, _: Any, out: Tensor) -> None:
        weight: Any = module.weight  # of a linear layer (output, input), of a convolution (output, input, …)
        costs.append(out.numel() * weight[0].numel())

    unseen = {
        m for attention in backbone.modules() if isinstance(attention, CrossSpaceAttention) for m in attention.modules()
    }
    seen = [m for m in backbone.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m not in unseen]
    handles = [module.register_forward_hook(note) for module in seen]
    full = forward_flops(run) // 2
    for handle in handles:
        handle.remove()
    return full, sum(costs)


def report(names: Sequence[str] = ()) -> Iterator[str]:
    """Yield a table of rows, by default all of them, line by line, and the largest deviations from the paper.

    Raises:
        UnknownNameError: no such row.
    """
    rows = {name: preset(name) for name in names or PRESETS}
    yield (
        f"{'':31}{'parameters':>13}{'trainable':>13}{'paper (M)':>11}{'':8}{'sampling':>9}{'training':>9}"
        f"{'modules':>9}{'paper':>7}{'':8}{'FID':>6}"
    )
    counts: dict[str, Count] = {}  # several rows train one and the same network
    deviations: dict[str, tuple[float | None, float | None]] = {}
    for name, row in rows.items():
        built = str(row.backbone)
        found = counts[built] = counts[built] if built in counts else count(row.backbone)
        off = deviations[name] = _deviation(found, row)
        yield (
            f"{name:31}{found.parameters:13,}{found.trainable:13,}{_known(row.figures.parameters, 11)}{_signed(off[0])}"
            f"{found.sampling / 1e9:9.2f}{found.training / 1e9:9.2f}{found.modules / 1e9:9.2f}"
            f"{_known(row.figures.cost, 7)}{_signed(off[1])}{_known(row.figures.fid, 6)}"
        )
    yield (
        "\nCosts in 10^9 multiply-accumulates of one image: sampling, training with its heads, and training as the "
        "paper counts (modules); FID is the paper's."
    )
    yield from _largest(deviations)


def _deviation(found: Count, row: Preset) -> tuple[float | None, float | None]:
    """How far millions of parameters, and the cost in the paper's convention, lie above the paper's figures."""
    figures = row.figures
    return (
        None if figures.parameters is None else found.parameters / 1e6 - figures.parameters,
        None if figures.cost is None else found.modules / 1e9 - figures.cost,
    )


def _known(figure: float | None, width: int) -> str:
    return f"{'' if figure is None else figure:>{width}}"


def _signed(deviation: float | None) -> str:
    return f"{'' if deviation is None else f'({deviation:+.2f})':>8}"


def _largest(deviations: Mapping[str, tuple[float | None, float | None]]) -> Iterator[str]:
    """Yield the largest deviations, over all rows and over the branched ones."""
    for kind, place, unit in (("parameters", 0, "M"), ("cost", 1, "G")):
        known = {name: pair[place] or 0.0 for name, pair in deviations.items() if pair[place] is not None}
        branched = {name: off for name, off in known.items() if PRESETS[name].backbone["name"] == "deepflow"}
        for words, chosen in (("", known), (" of a branched model", branched)):
            if chosen:
                name = max(chosen, key=lambda row: abs(chosen[row]))
                yield f"largest deviation in {kind}{words}: {chosen[name]:+.2f} {unit} ({name})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the report; return 0, or 2 for a row that does not exist."""
    parser = argparse.ArgumentParser(
        prog="python -m pathline.plugins.deepflow.report", description="Sizes and costs beside the paper's figures."
    )
    parser.add_argument("rows", nargs="*", help="names of recipes in configs/deepflow; none for all")
    try:
        for line in report(parser.parse_args(arguments).rows):
            print(line)
    except PathlineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":  # run again under the package's name, so that no class lives in __main__
    from pathline.plugins.deepflow.report import main as package_main

    sys.exit(package_main())
