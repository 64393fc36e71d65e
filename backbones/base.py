"""What a backbone is: a module ``forward(x, t, **conditions)`` of x's shape, a pure function of its inputs.

N samples, S the shape of one sample, T tokens, D width, n context tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pathline.core.checks import check_time_shape
from pathline.core.errors import InputError, InputTypeError
from pathline.core.registry import Registry

__all__ = ["Backbone", "Trunk", "pair", "registry", "wrap"]


class Backbone(nn.Module, ABC):
    """A network that predicts one tensor of x's shape.

    Attributes:
        num_classes: number of class labels, 0 if unconditional.
        null_label: the label that stands for none, or None if there is no such label.
        input_shape: S, or None for any.
        depth: number of transformer blocks that one call runs, or None if it does not tell.
    """

    num_classes: int = 0
    null_label: int | None = None
    input_shape: tuple[int, ...] | None = None
    depth: int | None = None

    def check_inputs(self, x: Tensor, t: Tensor, label: Tensor | None) -> None:
        """Check shapes and types, never values.

        Raises:
            InputError: a wrong shape, a missing label, or one that the backbone does not take.
            InputTypeError: labels that are not integers.
        """
        if self.input_shape is not None and tuple(x.shape[1:]) != self.input_shape:
            wanted = ", ".join(map(str, self.input_shape))
            raise InputError(f"got x of shape {tuple(x.shape)}, expected (N, {wanted})")
        check_time_shape(t, len(x))
        if self.num_classes and label is None:
            raise InputError("got no label, expected label of shape (N,); pass label=…, or build with num_classes=0")
        if label is None:
            return
        if not self.num_classes:
            raise InputError("got a label, but the backbone is unconditional; leave it out or set num_classes")
        if label.is_floating_point() or label.dtype == torch.bool:
            raise InputTypeError(f"got labels of type {label.dtype}, expected integers; call label.long()")
        if label.shape != (len(x),):
            raise InputError(f"got labels of shape {tuple(label.shape)}, expected ({len(x)},): one label a sample")


class Trunk(Backbone):
    """A transformer that exposes its parts, so that another backbone can be composed of them.

    ``forward`` is: ``embed`` once, ``context`` once, ``condition`` once, every block, ``head``, ``unpatchify``.

    Attributes:
        hidden_size: D.
        num_heads: attention heads.
        blocks: each called as ``block(tokens, context, condition) -> (tokens, context)``.
        head: ``head(tokens, condition) -> (N, T, p·p·C)``.
    """

    hidden_size: int
    num_heads: int
    blocks: nn.ModuleList
    head: nn.Module

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """Return the image tokens with their positions, (N, T, D)."""

    @abstractmethod
    def condition(self, t: Tensor, **conditions: Any) -> Tensor:
        """Return what modulates the blocks, (N, D); called once a branch."""

    def context(self, **conditions: Any) -> Tensor | None:
        """Return the tokens of a second stream, (N, n, D), or None; called once."""
        return None

    @abstractmethod
    def new_head(self) -> nn.Module:
        """Return a fresh head of the trunk's own kind, its output zero."""

    @abstractmethod
    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Turn head outputs (N, T, p·p·C) into (N, C, H, W)."""


registry: Registry[nn.Module] = Registry("backbone", "backbones", nn.Module)


class _Wrapped(Backbone):
    def __init__(
        self,
        function: Callable[..., Tensor],
        num_classes: int,
        null_label: int | None,
        input_shape: tuple[int, ...] | None,
    ) -> None:
        super().__init__()
        self.function = function
        self.num_classes, self.null_label, self.input_shape = num_classes, null_label, input_shape

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        return self.function(x, t, **conditions)


def wrap(
    function: Callable[..., Tensor],
    *,
    num_classes: int = 0,
    null_label: int | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> Backbone:
    """Make a backbone of any module or function ``f(x, t, **conditions)`` that returns a tensor of x's shape.

    Args:
        function: t has shape (N,) and runs from 0 (data) to 1 (noise).
        num_classes: labels run from 0 to num_classes − 1; 0 if unconditional.
        null_label: the label that stands for none; None if there is no such label.
        input_shape: shape of one sample; None for any.
    """
    return _Wrapped(function, num_classes, null_label, input_shape)


def pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    """Return (height, width) of a size given as one number or two.

    Raises:
        InputError: not one or two positive integers.
    """
    sizes = (value, value) if isinstance(value, int) else tuple(value)
    if len(sizes) != 2 or min(sizes) < 1:
        raise InputError(f"got {name} {value}, expected a positive integer or two of them (height, width)")
    return sizes[0], sizes[1]
