"""The branched backbone: a trunk cut into branches, each with a velocity of its own (arXiv:2503.14494, 3.2 and 3.3).

N samples, T tokens, D width, k branches.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast, overload

from torch import Tensor, nn

from pathline import backbones
from pathline.backbones.base import Backbone, Trunk
from pathline.backbones.base import registry as backbone_registry
from pathline.backbones.layers import Projector, ScalarEmbedding
from pathline.backbones.sit import SIZES, SizeName, resolve_size
from pathline.core.checks import check_time_shape
from pathline.core.errors import InputError
from pathline.plugins.deepflow.refiner import VelocityRefiner

__all__ = ["BRANCHED_SIZES", "Branches", "DeepFlow"]

BRANCHED_SIZES = {**SIZES, "XL": SIZES["XL"]._replace(depth=24)}


class Branches(NamedTuple):
    """What every branch says, for training.

    Attributes:
        velocities: k tensors of x's shape; the last is the model's velocity.
        accelerations: k − 1 tensors of x's shape.
        features: k − 1 tuples, with one tensor (N, T, dim) per entry of ``align_dims``.
    """

    velocities: tuple[Tensor, ...]
    accelerations: tuple[Tensor, ...]
    features: tuple[tuple[Tensor, ...], ...]


def _trunk_options(given: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    return backbone_registry.entry(given.get("trunk", "sit")).options()


@backbone_registry.register("deepflow", inherits=_trunk_options)
class DeepFlow(Backbone):
    """A trunk built by name, cut into branches, with a VeRA block at each cut.

    Args:
        trunk: name of a backbone of the form ``Trunk``; options not listed here are the trunk's own.
        size: S, B, L or XL; sets width, heads and depth (S, B 12; L, XL 24), of which ``depth`` may be given as well.
        hidden_size: width D, unless a size is named.
        depth: number of blocks.
        num_heads: attention heads, of the trunk and of the cross-space attention.
        branches: number of branches k, cut at i·depth/k; 2 unless given, and 1 is the plain trunk.
        cuts: block counts after which a VeRA block stands, ascending, in 1 … depth − 1; in place of ``branches``.
        acceleration_width: W of the acceleration MLP, whatever D.
        clamp_gap: limit the gap's scale to [−5, 5]: on for the weights released with alignment, off for the others.
        align_dims: width of each encoder to align to; none by default.
        align_width: hidden width of the alignment projectors.

    Raises:
        InputError: cuts that do not fit the depth, or contradictory options.
    """

    def __init__(
        self,
        *,
        trunk: str = "sit",
        size: SizeName | None = None,
        hidden_size: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        branches: int | None = None,
        cuts: Sequence[int] | None = None,
        acceleration_width: int = 2048,
        clamp_gap: bool = False,
        align_dims: Sequence[int] = (),
        align_width: int = 2048,
        **trunk_options: Any,
    ) -> None:
        super().__init__()
        width, heads, blocks = resolve_size(size, hidden_size, num_heads, depth, BRANCHED_SIZES)
        self.cuts = _resolve_cuts(branches, cuts, blocks)
        if min(acceleration_width, align_width, *align_dims) < 1:
            raise InputError(
                f"got acceleration_width {acceleration_width}, align_width {align_width}, align_dims {align_dims}; "
                "expected positive numbers"
            )
        self.trunk = _build_trunk(trunk, hidden_size=width, num_heads=heads, depth=blocks, **trunk_options)
        self.num_classes, self.null_label = self.trunk.num_classes, self.trunk.null_label
        self.input_shape = self.trunk.input_shape
        if not self.cuts:
            return
        self.middle_head = self.trunk.new_head()
        self.acceleration_head = self.trunk.new_head()
        self.gap = ScalarEmbedding(2 * width)
        self.refiners = nn.ModuleList(
            VelocityRefiner(width, heads, acceleration_width, clamp_gap=clamp_gap) for _ in self.cuts
        )
        self.projectors = nn.ModuleList(
            nn.ModuleList(Projector(width, align_width, dim) for dim in align_dims) for _ in self.cuts
        )

    @overload
    def forward(self, x: Tensor, t: Tensor, *, branch_times: None = None, **conditions: Any) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, t: Tensor, *, branch_times: Sequence[Tensor], **conditions: Any) -> Branches: ...
    def forward(
        self, x: Tensor, t: Tensor, *, branch_times: Sequence[Tensor] | None = None, **conditions: Any
    ) -> Tensor | Branches:
        """Predict the velocity, or what every branch says.

        Args:
            x: x at time t, (N, C, H, W).
            t: time of the first branch, (N,) or ().
            branch_times: times of the branches 2 … k, each (N,) or (); all branches then speak. None puts every
                branch at t and computes only what the last one needs.
            conditions: what the trunk takes, as ``label`` of shape (N,).

        Returns:
            The last branch's velocity, or ``Branches``.

        Raises:
            InputError: wrong shapes, or a number of branch times other than k − 1.
        """
        self.check_inputs(x, t, conditions.get("label"))
        times = [time.expand(len(x)) for time in self._times(x, t, branch_times)]
        speak = branch_times is not None
        spoken = Branches((), (), ())
        space, context = self.trunk.embed(x), self.trunk.context(**conditions)
        tokens, condition = space, self.trunk.condition(times[0], **conditions)
        blocks = list(self.trunk.blocks)
        for i, (first, last) in enumerate(pairwise((0, *self.cuts, len(blocks)))):
            if i and speak:  # at inference every branch has one time, and with it one condition
                condition = self.trunk.condition(times[i], **conditions)
            for block in blocks[first:last]:
                tokens, context = block(tokens, context, condition)
            if last < len(blocks):
                ended, gap = tokens, self.gap(times[i + 1] - times[i])
                acceleration, tokens = self.refiners[i](ended, space, gap)
                if speak:
                    spoken = self._speak(spoken, i, ended, acceleration, tokens, condition)
        velocity = self._read(self.trunk.head, tokens, condition)
        return spoken._replace(velocities=(*spoken.velocities, velocity)) if speak else velocity

    def _speak(
        self, spoken: Branches, i: int, ended: Tensor, acceleration: Tensor, refined: Tensor, condition: Tensor
    ) -> Branches:
        """Add what the branch that ends at cut i says."""
        projectors = cast("nn.ModuleList", self.projectors[i])
        return Branches(
            (*spoken.velocities, self._read(self.middle_head, ended, condition)),
            (*spoken.accelerations, self._read(self.acceleration_head, acceleration, condition)),
            (*spoken.features, tuple(projector(refined) for projector in projectors)),
        )

    def _read(self, head: nn.Module, tokens: Tensor, condition: Tensor) -> Tensor:
        return self.trunk.unpatchify(head(tokens, condition))

    def _times(self, x: Tensor, t: Tensor, branch_times: Sequence[Tensor] | None) -> list[Tensor]:
        if branch_times is None:
            return [t] * (len(self.cuts) + 1)
        if len(branch_times) != len(self.cuts):
            raise InputError(
                f"got {len(branch_times)} branch times, expected {len(self.cuts)}: one for each branch after the first"
            )
        for later in branch_times:
            check_time_shape(later, len(x))
        return [t, *branch_times]


def _build_trunk(name: str, **options: Any) -> Trunk:
    trunk = backbones.build(name, **options)
    if not isinstance(trunk, Trunk):
        raise InputError(f"got trunk {name!r}, which exposes no parts; expected a backbone of the form Trunk, as 'sit'")
    return trunk


def _resolve_cuts(branches: int | None, cuts: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """Return the cuts, given or spread evenly; raise InputError where they do not fit."""
    if isinstance(cuts, int):
        raise InputError(f"got cuts {cuts}, expected a sequence of block counts; write ({cuts},)")
    if cuts is not None:
        chosen = tuple(cuts)
        if branches is not None and branches != len(chosen) + 1:
            raise InputError(f"got branches {branches} beside cuts {chosen}; give one or the other")
        if any(not 1 <= cut < depth for cut in chosen) or list(chosen) != sorted(set(chosen)):
            raise InputError(f"got cuts {chosen}, expected ascending, distinct block counts from 1 to {depth - 1}")
        return chosen
    count = 2 if branches is None else branches
    if count < 1 or depth % count:
        raise InputError(f"got branches {count} and depth {depth}; expected a divisor of the depth, or give cuts")
    return tuple(depth * i // count for i in range(1, count))
