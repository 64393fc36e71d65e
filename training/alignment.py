"""Encoders that a run aligns to: where their tokens come from, and what must fit between them and the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathline import encoders
from pathline.core.errors import InputError
from pathline.data import Dataset
from pathline.encoders import Cached, Computed, Source
from pathline.encoders.grids import check_grids
from pathline.objectives import Objective
from pathline.objectives.base import backbone_attribute

__all__ = ["blank_features", "encoder_problems", "source_of", "token_grid"]


def source_of(component: dict[str, Any], dataset: Dataset) -> Source:
    """Return an encoder's tokens: from the file that its entry names, or of the encoder itself."""
    if component["cache"] is not None:
        return Cached(Path(component["cache"]), component, dataset)
    return Computed(encoders.build({key: value for key, value in component.items() if key != "cache"}), dataset)


def token_grid(backbone: nn.Module) -> tuple[int, int] | None:
    """Return rows and columns of a backbone's tokens, its own or its trunk's; None if it does not tell."""
    holder = backbone if hasattr(backbone, "grid") else getattr(backbone, "trunk", None)
    grid: tuple[int, int] | None = getattr(holder, "grid", None)
    return grid


def blank_features(sources: Sequence[Source], backbone: nn.Module, count: int) -> tuple[Tensor, ...]:
    """Return ones of the shape of the encoders' tokens on the backbone's grid."""
    grids = [(token_grid(backbone) or source.grid, source.dim) for source in sources]
    return tuple(torch.ones(count, rows * columns, dim) for (rows, columns), dim in grids)


def encoder_problems(sources: Sequence[Source], objective: Objective, name: str, backbone: nn.Module) -> Iterator[str]:
    """Yield what does not fit between encoders, an objective of a name, and the backbone."""
    aligns = bool(getattr(objective, "weights", {}).get("align"))
    if aligns and not sources:
        yield f"encoders: got none for the objective {name!r}, which aligns to some; write encoders: [dinov2-b], say"
    if sources and not aligns:
        yield (
            f"encoders: got {len(sources)} for the objective {name!r}, which aligns to none; use 'alignment', or give "
            "'deepflow' an align above 0, or leave encoders and align_dims out"
        )
    dims, wanted = backbone_attribute(backbone, "align_dims"), [source.dim for source in sources]
    if dims and not aligns and not sources:
        yield (
            f"backbone.align_dims: got {list(dims)} for the objective {name!r}, which aligns to none and leaves the "
            "projectors as they are; use 'alignment', or give 'deepflow' an align above 0, with as many encoders, or "
            "leave align_dims and align_layer out"
        )
    if aligns and sources and dims is not None and list(dims) != wanted:
        yield f"backbone.align_dims: got {list(dims)}, and the encoders have {wanted}; write align_dims: {wanted}"
    grid = token_grid(backbone)
    for number, source in enumerate(sources):
        try:
            check_grids(source.grid, grid or source.grid)
        except InputError as error:
            yield f"encoders.{number}: {error}"
