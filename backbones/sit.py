"""SiT: the class-conditional transformer of scalable interpolant transformers (arXiv:2401.08740; trunk of DiT)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

from torch import Tensor, nn

from pathline.backbones.base import Trunk, pair, registry
from pathline.backbones.layers import (
    Block,
    Head,
    LabelEmbedding,
    PatchEmbedding,
    Projector,
    ScalarEmbedding,
    embed_gap,
    position_table,
    unpatchify,
)
from pathline.core.errors import InputError

__all__ = ["SIZES", "Aligned", "SiT", "Size", "resolve_size"]

SizeName = Literal["S", "B", "L", "XL"]


class Size(NamedTuple):
    """Width, heads and blocks of a named model."""

    hidden_size: int
    num_heads: int
    depth: int


SIZES: dict[str, Size] = {
    "S": Size(384, 6, 12),
    "B": Size(768, 12, 12),
    "L": Size(1024, 16, 24),
    "XL": Size(1152, 16, 28),
}


class Aligned(NamedTuple):
    """What a network with projectors says, for training.

    Attributes:
        velocity: of x's shape.
        features: one tensor (N, T, dim) per entry of ``align_dims``.
    """

    velocity: Tensor
    features: tuple[Tensor, ...]


@registry.register("sit")
class SiT(Trunk):
    """A transformer over patches, modulated by time and class label.

    Args:
        size: S, B, L or XL (SiT's table); sets the three below, of which ``depth`` alone may be given as well.
        hidden_size: width D, a multiple of 4 and of the heads.
        depth: number of blocks.
        num_heads: attention heads.
        input_size: side of the image or latent, or (height, width); multiples of the patch.
        patch_size: side of a patch.
        in_channels: channels of the image or latent.
        num_classes: class labels 0 … num_classes − 1; num_classes is the null label; 0 for an unconditional network.
        mlp_ratio: width of a block's MLP over D.
        query_key_norm: normalise each head's queries and keys; off in the released weights.
        time_scale: what t is multiplied by before its features are made; 1 as in SiT, 1000 as DiT's steps are counted.
        takes_gap: whether it takes the condition ``gap``, a length of time to look ahead, as ``mean-flow`` needs.
        align_layer: number of blocks, 1 … depth, after which tokens are projected to encoders' features, as the
            objective ``alignment`` needs; REPA's 8 (arXiv:2410.06940). None for no projectors.
        align_dims: width of each encoder to align to; needs align_layer, and is needed by it.
        align_width: hidden width of the projectors; None is REPA's 2048. Only with align_layer.

    Raises:
        InputError: sizes that do not fit one another, or one of align_layer and align_dims alone.
    """

    def __init__(
        self,
        *,
        size: SizeName | None = None,
        hidden_size: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        query_key_norm: bool = False,
        time_scale: float = 1.0,
        takes_gap: bool = False,
        align_layer: int | None = None,
        align_dims: Sequence[int] = (),
        align_width: int | None = None,
    ) -> None:
        super().__init__()
        width, heads, blocks = resolve_size(size, hidden_size, num_heads, depth, SIZES)
        height_in, width_in = pair(input_size, "input_size")
        _check_sizes(width, heads, blocks, (height_in, width_in), patch_size, in_channels, num_classes)
        _check_alignment(align_layer, align_dims, align_width, blocks)
        if not 0 < time_scale < math.inf:
            raise InputError(f"got time_scale {time_scale}, expected a positive finite number")
        self.hidden_size, self.num_heads, self.patch_size, self.depth = width, heads, patch_size, blocks
        self.num_classes, self.null_label = num_classes, num_classes or None
        self.input_shape = (in_channels, height_in, width_in)
        self.grid = (height_in // patch_size, width_in // patch_size)
        self.patches = PatchEmbedding(in_channels, patch_size, width)
        self.register_buffer("positions", position_table(width, *self.grid))
        self.time = ScalarEmbedding(width, time_scale)
        self.labels = LabelEmbedding(num_classes, width) if num_classes else None
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, query_key_norm=query_key_norm) for _ in range(blocks)
        )
        self.head = self.new_head()
        self.gap = ScalarEmbedding(width) if takes_gap else None
        self.align_layer, self.align_dims = align_layer, tuple(align_dims)
        self.projectors = nn.ModuleList(Projector(width, align_width or 2048, dim) for dim in align_dims)

    positions: Tensor

    def embed(self, x: Tensor) -> Tensor:
        """Return the patch tokens with their positions, (N, T, D)."""
        tokens: Tensor = self.patches(x)
        return tokens + self.positions.to(tokens.dtype)

    def condition(
        self, t: Tensor, *, label: Tensor | None = None, gap: Tensor | None = None, **conditions: Any
    ) -> Tensor:
        """Return the time embedding plus those of the label and the gap, (N, D)."""
        if conditions:
            raise InputError(f"got conditions {sorted(conditions)}, expected label and gap alone; leave them out")
        embedded: Tensor = self.time(t)
        if self.labels is not None and label is not None:
            embedded = embedded + self.labels(label)
        ahead = embed_gap(self.gap, gap, t)
        return embedded if ahead is None else embedded + ahead

    def new_head(self) -> Head:
        """Return a fresh velocity head, zero at first."""
        channels = (self.input_shape or (0,))[0]
        return Head(self.hidden_size, self.patch_size**2 * channels)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Turn (N, T, p·p·C) into (N, C, H, W)."""
        return unpatchify(tokens, self.grid[0], self.patch_size)

    @overload
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        label: Tensor | None = None,
        gap: Tensor | None = None,
        with_features: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        label: Tensor | None = None,
        gap: Tensor | None = None,
        with_features: Literal[True],
    ) -> Aligned: ...
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        label: Tensor | None = None,
        gap: Tensor | None = None,
        with_features: bool = False,
    ) -> Tensor | Aligned:
        """Predict one tensor of x's shape, and the projected features if asked for.

        Args:
            x: images or latents, (N, C, H, W).
            t: times in [0, 1], (N,) or ().
            label: class labels, (N,); required unless num_classes is 0.
            gap: lengths of time, (N,), for a network that takes them; None is 0.
            with_features: whether to run the projectors as well, in training.

        Returns:
            The velocity, or ``Aligned``.

        Raises:
            InputError: wrong shapes, a missing label, a gap that it does not take, or features that it does not have.
            InputTypeError: labels that are not integers.
        """
        self.check_inputs(x, t, label)
        if with_features and not self.align_dims:
            raise InputError(
                "got with_features for a network without projectors; build it with align_layer, align_dims"
            )
        tokens, context = self.embed(x), self.context()
        condition = self.condition(t.expand(len(x)), label=label, gap=gap)
        features: tuple[Tensor, ...] = ()
        for number, block in enumerate(self.blocks, start=1):
            tokens, context = block(tokens, context, condition)
            if with_features and number == self.align_layer:
                features = tuple(projector(tokens) for projector in self.projectors)
        velocity = self.unpatchify(self.head(tokens, condition))
        return Aligned(velocity, features) if with_features else velocity


def resolve_size(
    size: str | None, hidden_size: int | None, num_heads: int | None, depth: int | None, table: dict[str, Size]
) -> Size:
    """Return width, heads and depth, from a named size or from the three numbers.

    Raises:
        InputError: neither, both, or an unknown size.
    """
    if size is None:
        if hidden_size is None or num_heads is None or depth is None:
            raise InputError("got no size; give size='S', 'B', 'L' or 'XL', or hidden_size, num_heads and depth")
        return Size(hidden_size, num_heads, depth)
    if size not in table:
        raise InputError(f"got size {size!r}, expected one of {', '.join(table)}")
    if hidden_size is not None or num_heads is not None:
        raise InputError(f"got size {size!r} beside hidden_size or num_heads; give one or the other")
    return table[size]._replace(**({} if depth is None else {"depth": depth}))


def _check_sizes(
    width: int, heads: int, depth: int, image: tuple[int, int], patch: int, channels: int, classes: int
) -> None:
    numbers = (width, heads, depth, patch, channels, classes)
    if not all(isinstance(n, int) for n in numbers) or min(numbers[:-1]) < 1 or classes < 0:
        raise InputError(
            f"got hidden_size {width}, num_heads {heads}, depth {depth}, patch_size {patch}, in_channels {channels}, "
            f"num_classes {classes}; expected positive whole numbers (num_classes may be 0)"
        )
    if width % heads:
        raise InputError(f"got hidden_size {width} and num_heads {heads}; the heads must divide the width")
    if any(side % patch for side in image):
        raise InputError(f"got input_size {image} and patch_size {patch}; the patch must divide both sides")


def _check_alignment(layer: int | None, dims: Sequence[int], hidden: int | None, depth: int) -> None:
    if hidden is not None and layer is None:
        raise InputError(f"got align_width {hidden} without align_layer, which alone uses it; give both or neither")
    if (layer is None) != (not dims):
        raise InputError(f"got align_layer {layer} and align_dims {tuple(dims)}; give both or neither")
    if layer is not None and (not isinstance(layer, int) or not 1 <= layer <= depth):
        raise InputError(f"got align_layer {layer}, expected a number of blocks from 1 to {depth}")
    if not all(isinstance(n, int) and n >= 1 for n in (1 if hidden is None else hidden, *dims)):
        raise InputError(f"got align_width {hidden} and align_dims {tuple(dims)}, expected positive whole numbers")
