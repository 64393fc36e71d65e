"""The branched backbone: a trunk cut into branches, each with a velocity of its own (arXiv:2503.14494, 3.2 and 3.3).

N samples, T tokens, D width, k branches.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from pathline import backbones
from pathline.backbones.base import Backbone, Trunk
from pathline.backbones.base import registry as backbone_registry
from pathline.backbones.layers import Projector, ScalarEmbedding
from pathline.backbones.sit import SIZES, SizeName, resolve_size
from pathline.core.checks import check_time_shape
from pathline.core.errors import InputError, InputTypeError
from pathline.plugins.deepflow.branches import (
    Branches,
    Spoken,
    check_alignment,
    check_one_branch,
    resolve_cuts,
)
from pathline.plugins.deepflow.refiner import (
    ACCELERATING,
    RefinerName,
    Residual,
    VelocityRefiner,
    check_used,
    gap_width,
    hidden_widths,
    resolve_residual,
)

__all__ = ["BRANCHED_SIZES", "Branches", "DeepFlow", "Spoken"]

BRANCHED_SIZES = {**SIZES, "XL": SIZES["XL"]._replace(depth=24)}


def _trunk_options(given: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    return backbone_registry.entry(given.get("trunk", "sit")).options()


@backbone_registry.register("deepflow", inherits=_trunk_options)
class DeepFlow(Backbone):
    """A trunk built by name, cut into branches, with a refiner at each cut.

    Args:
        trunk: name of a backbone of the form ``Trunk``; options not listed here are the trunk's own.
        size: S, B, L or XL; sets width, heads and depth (S, B 12; L, XL 24), of which ``depth`` may be given as well.
        hidden_size: width D, unless a size is named.
        depth: number of blocks.
        num_heads: attention heads, of the trunk and of the cross-space attention.
        branches: number of branches k, cut at i·depth/k; 2 unless given, and 1 is the plain trunk, for which the rest
            but acceleration_width, without effect, keep their defaults.
        cuts: block counts after which a branch ends, ascending, in 1 … depth − 1; in place of ``branches``.
        refiner: what stands at a cut, see ``VelocityRefiner``: the paper's ``vera``, or a rung of its ladder (Table 7);
            ``none`` is deep supervision alone.
        residual: what a refiner's output is added to: ``normed-query`` or ``query`` of the cross-space attention, or
            ``velocity``, the features of the branch that ends. None: the normed query where there is one, or nothing.
        zero_output: let a refiner's last layer be zero at first, so that it starts as its residual.
        acceleration_width: W, for an acceleration MLP of hidden widths W, 2W, W whatever D; or all its hidden widths,
            as [2048] for the paper's shallow one.
        shared_heads: whether intermediate branches share one velocity head and one acceleration head.
        gap_scale: what the time gap is multiplied by before its features are made (``time_scale`` of the trunk does so
            for t); the raw gap of 0.01 moves them by 0.2 % only.
        clamp_gap: limit the gap's scale to [−5, 5]: on for the weights released with alignment, off for the others.
        align_dims: width of each encoder to align to; none by default.
        align_width: hidden width of the alignment projectors; None is 2048. Only with align_dims.

    Attributes:
        cuts: block counts after which a branch ends.
        branch_count: k.
        refiner: what stands at a cut.
        has_acceleration: whether the branches 1 … k − 1 say an acceleration.
        align_dims: width of each encoder that tokens are projected to after a cut.

    Raises:
        InputError: cuts that do not fit the depth, contradictory options, or one that the refiner does not use.
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
        refiner: RefinerName = "vera",
        residual: Residual | None = None,
        zero_output: bool = False,
        acceleration_width: int | Sequence[int] = 2048,
        shared_heads: bool = True,
        gap_scale: float = 1.0,
        clamp_gap: bool = False,
        align_dims: Sequence[int] = (),
        align_width: int | None = None,
        **trunk_options: Any,
    ) -> None:
        super().__init__()
        width, heads, blocks = resolve_size(size, hidden_size, num_heads, depth, BRANCHED_SIZES)
        self.cuts = resolve_cuts(branches, cuts, blocks)
        check_alignment(align_dims, align_width, trunk_options.get("align_layer"))
        kept = resolve_residual(refiner, residual)
        hidden = hidden_widths(acceleration_width)
        check_used(refiner, kept, zero_output, acceleration_width, gap_scale, clamp_gap)
        if not self.cuts:
            check_one_branch(
                {
                    "refiner": (refiner, "vera"),
                    "residual": (residual, None),
                    "zero_output": (zero_output, False),
                    "shared_heads": (shared_heads, True),
                    "gap_scale": (gap_scale, 1.0),
                    "clamp_gap": (clamp_gap, False),
                    "align_dims": (tuple(align_dims), ()),
                }
            )
        self.trunk = _build_trunk(trunk, hidden_size=width, num_heads=heads, depth=blocks, **trunk_options)
        self.num_classes, self.null_label = self.trunk.num_classes, self.trunk.null_label
        self.input_shape, self.depth = self.trunk.input_shape, blocks
        self.branch_count = len(self.cuts) + 1
        self.refiner, self.has_acceleration = refiner, bool(self.cuts) and refiner in ACCELERATING
        self.align_dims = tuple(align_dims)
        if not self.cuts:
            return
        self._build_heads(shared_heads)
        if refiner != "none":
            self.gap = ScalarEmbedding(gap_width(refiner, width), gap_scale)
        self.refiners = nn.ModuleList(
            VelocityRefiner(
                width,
                heads,
                hidden,
                refiner=refiner,
                residual=kept,
                clamp_gap=clamp_gap,
                zero_output=zero_output,
            )
            for _ in (self.cuts if refiner != "none" else ())
        )
        self.projectors = nn.ModuleList(
            nn.ModuleList(Projector(width, align_width or 2048, dim) for dim in align_dims) for _ in self.cuts
        )

    def _build_heads(self, shared: bool) -> None:
        if shared:
            self.middle_head = self.trunk.new_head()
            if self.has_acceleration:
                self.acceleration_head = self.trunk.new_head()
            return
        # no nn.ModuleList: training compiles, shards and orthogonalises the members of those, and heads are no blocks
        self.middle_heads = nn.Sequential(*(self.trunk.new_head() for _ in self.cuts))
        if self.has_acceleration:
            self.acceleration_heads = nn.Sequential(*(self.trunk.new_head() for _ in self.cuts))

    def blocks_until(self, branch: int) -> int:
        """Return how many transformer blocks run for the velocity of a branch, 1 … k.

        Raises:
            InputError: there is no such branch.
        """
        Spoken(velocities=(branch,)).check(self.branch_count, 0)
        return (*self.cuts, cast("int", self.depth))[branch - 1]

    @overload
    def forward(
        self, x: Tensor, t: Tensor, *, branch_times: None = None, spoken: None = None, **conditions: Any
    ) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, t: Tensor, *, branch_times: Sequence[Tensor], spoken: Spoken | None = None, **conditions: Any
    ) -> Branches: ...
    @overload
    def forward(
        self, x: Tensor, t: Tensor, *, branch_times: None = None, spoken: Spoken, **conditions: Any
    ) -> Branches: ...
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        branch_times: Sequence[Tensor] | None = None,
        spoken: Spoken | None = None,
        **conditions: Any,
    ) -> Tensor | Branches:
        """Predict the velocity, or what the branches say.

        Args:
            x: x at time t, (N, C, H, W).
            t: time of the first branch, (N,) or ().
            branch_times: times of the branches 2 … k, each (N,) or (); all branches then speak, unless ``spoken``
                says which. None puts every branch at t.
            spoken: the branches that are to speak: no block after the last of them runs, and nothing else is computed.
            conditions: what the trunk takes, as ``label`` of shape (N,).

        Returns:
            The last branch's velocity, or ``Branches`` of what was asked.

        Raises:
            InputError: wrong shapes, a number of branch times other than k − 1, or branches that do not exist.
            InputTypeError: ``spoken`` is not a ``Spoken``.
        """
        self.check_inputs(x, t, conditions.get("label"))
        times = self._times(x, t, branch_times)
        asked = self._asked(spoken, plain=branch_times is None)
        projected = spoken is None and branch_times is not None
        space, context = self.trunk.embed(x), self.trunk.context(**conditions)
        tokens, condition, gap = space, self.trunk.condition(times[0], **conditions), None
        velocities, accelerations, features = [], [], []
        blocks, ends = list(self.trunk.blocks), (0, *self.cuts, len(self.trunk.blocks))
        for branch in range(1, asked.last + 1):
            if branch > 1 and branch_times is not None:  # else every branch has one time, and with it one condition
                condition = self.trunk.condition(times[branch - 1], **conditions)
            for block in blocks[ends[branch - 1] : ends[branch]]:
                tokens, context = block(tokens, context, condition)
            ended, acceleration = tokens, None
            if branch < asked.last:
                gap = self._gap(times, branch, gap if branch_times is None else None)
                acceleration, tokens = self._refine(branch, ended, space, gap)
            elif branch in asked.accelerations:
                acceleration, _ = self.refiners[branch - 1](ended)
            if branch in asked.velocities:
                velocities.append(self._read(self._head("middle_head", branch), ended, condition))
            if branch in asked.accelerations:
                accelerations.append(
                    self._read(self._head("acceleration_head", branch), cast("Tensor", acceleration), condition)
                )
            if projected and branch < asked.last:
                projectors = cast("Iterable[nn.Module]", self.projectors[branch - 1])
                features.append(tuple(projector(tokens) for projector in projectors))
        if spoken is None and branch_times is None:
            return velocities[0]
        return Branches(tuple(velocities), tuple(accelerations), tuple(features))

    def _asked(self, spoken: Spoken | None, *, plain: bool) -> Spoken:
        """Return which branches speak: those asked, else the last one's velocity, or all there is in training."""
        cuts = len(self.cuts) if self.has_acceleration else 0
        if spoken is not None:
            if not isinstance(spoken, Spoken):
                raise InputTypeError(f"got spoken {spoken!r}, expected Spoken(velocities=…, accelerations=…)")
            spoken.check(self.branch_count, cuts)
            return spoken
        if plain:
            return Spoken(velocities=(self.branch_count,))
        return Spoken(tuple(range(1, self.branch_count + 1)), tuple(range(1, cuts + 1)))

    def _gap(self, times: Sequence[Tensor], branch: int, same: Tensor | None) -> Tensor | None:
        """Embed the gap from a branch to the next one; ``same`` is that of the cut before, where all are 0."""
        if same is not None or not len(self.refiners):
            return same
        here, ahead = times[branch - 1], times[branch]
        embedded: Tensor = self.gap(torch.zeros_like(here) if ahead is here else ahead - here)
        return embedded

    def _refine(self, branch: int, ended: Tensor, space: Tensor, gap: Tensor | None) -> tuple[Tensor | None, Tensor]:
        if not len(self.refiners):
            return None, ended
        refined: tuple[Tensor | None, Tensor] = self.refiners[branch - 1](ended, space, gap)
        return refined

    def _head(self, name: str, branch: int) -> nn.Module:
        """Return the head of a branch, by the name of the shared one."""
        if branch == self.branch_count:
            return self.trunk.head
        head: nn.Module = getattr(self, name) if hasattr(self, name) else getattr(self, f"{name}s")[branch - 1]
        return head

    def _read(self, head: nn.Module, tokens: Tensor, condition: Tensor) -> Tensor:
        return self.trunk.unpatchify(head(tokens, condition))

    def _times(self, x: Tensor, t: Tensor, branch_times: Sequence[Tensor] | None) -> list[Tensor]:
        """Return the times of all branches, (N,) each."""
        first = t.expand(len(x))
        if branch_times is None:
            return [first] * self.branch_count
        if len(branch_times) != len(self.cuts):
            raise InputError(
                f"got {len(branch_times)} branch times, expected {len(self.cuts)}: one for each branch after the first"
            )
        for later in branch_times:
            check_time_shape(later, len(x))
        return [first, *(later.expand(len(x)) for later in branch_times)]


def _build_trunk(name: str, **options: Any) -> Trunk:
    trunk = backbones.build(name, **options)
    if not isinstance(trunk, Trunk):
        raise InputError(f"got trunk {name!r}, which exposes no parts; expected a backbone of the form Trunk, as 'sit'")
    return trunk
