"""State dictionaries of other programs, turned into ours and back.

A family is a released layout with a name, a way to recognise it, and a clock. The core knows ``sit``; plugins add
theirs.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from pathline.backbones.base import Backbone
from pathline.core.errors import WeightsError
from pathline.core.registry import Registry

__all__ = ["TRUNK_KEYS", "SiTFamily", "WeightFamily", "convert", "registry", "rename", "reverse_clock", "swapped"]

State = Mapping[str, Tensor]
Keys = tuple[tuple[str, str], ...]

TRUNK_KEYS: Keys = (
    ("pos_embed", "positions"),
    ("x_embedder.proj.", "patches.projection."),
    ("t_embedder.mlp.0.", "time.hidden."),
    ("t_embedder.mlp.2.", "time.output."),
    ("y_embedder.embedding_table.", "labels."),
    ("blocks.{}.attn.qkv.", "blocks.{}.attention.query_key_value."),
    ("blocks.{}.attn.proj.", "blocks.{}.attention.output."),
    ("blocks.{}.attn.q_norm.", "blocks.{}.attention.query_norm."),
    ("blocks.{}.attn.k_norm.", "blocks.{}.attention.key_norm."),
    ("blocks.{}.mlp.fc1.", "blocks.{}.mlp.hidden."),
    ("blocks.{}.mlp.fc2.", "blocks.{}.mlp.output."),
    ("blocks.{}.adaLN_modulation.1.", "blocks.{}.modulation.linear."),
)
"""Trunk of SiT, DiT and DeepFlow: the beginning of their key and of ours; ``{}`` stands for a number."""


class WeightFamily(ABC):
    """A released layout of weights.

    Attributes:
        clock: ``data-first`` if its networks take t = 0 as data, as ours do; ``noise-first`` if as noise, in which
            case the converted network is used through ``reverse_clock``.
    """

    clock: ClassVar[Literal["data-first", "noise-first"]]

    @abstractmethod
    def matches(self, state: State) -> bool:
        """Whether a state dictionary is of this layout."""

    @abstractmethod
    def to_pathline(self, state: State) -> dict[str, Tensor]:
        """Turn the family's layout into ours."""

    @abstractmethod
    def from_pathline(self, state: State) -> dict[str, Tensor]:
        """Turn ours into the family's layout."""


registry: Registry[WeightFamily] = Registry("weight family", "weights", WeightFamily)


def convert(
    state_dict: State, family: str | WeightFamily | None = None, *, to: str | WeightFamily | None = None
) -> dict[str, Tensor]:
    """Turn a family's state dictionary into ours, or ours into a family's.

    Args:
        state_dict: weights by name.
        family: name of the layout that ``state_dict`` has; None recognises it.
        to: name of the layout wanted, if ``state_dict`` is ours.

    Returns:
        A new dictionary; tensors that need no change are shared.

    Raises:
        WeightsError: the layout is not recognised, or has other keys than its family.
    """
    if to is not None:
        if family is not None:
            raise WeightsError(f"got family {family!r} and to {to!r}; give the one that is not pathline's own layout")
        return registry.build(to).from_pathline(state_dict)
    if family is not None:
        return registry.build(family).to_pathline(state_dict)
    matching = [name for name in registry.names() if registry.build(name).matches(state_dict)]
    if len(matching) != 1:
        raise WeightsError(
            f"got weights that match {matching or 'no known family'}; name one of {', '.join(registry.names())}"
        )
    return registry.build(matching[0]).to_pathline(state_dict)


class _ReversedClock(Backbone):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = getattr(backbone, "num_classes", 0)
        self.null_label = getattr(backbone, "null_label", None)
        self.input_shape = getattr(backbone, "input_shape", None)

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        predicted: Tensor = self.backbone(x, 1 - t, **conditions)
        return -predicted


def reverse_clock(backbone: nn.Module) -> Backbone:
    """Wrap a velocity network whose clock runs from noise (0) to data (1), as SiT's, as −net(x, 1 − t)."""
    return _ReversedClock(backbone)


def rename(state: State, keys: Keys, family: str) -> dict[str, Tensor]:
    """Give every key the other beginning that ``keys`` names for its own.

    Raises:
        WeightsError: keys that begin like none of them; lists the first eight.
    """
    patterns = [(re.compile(re.escape(old).replace(r"\{\}", r"(\d+)")), new) for old, new in keys]
    renamed: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        for pattern, new in patterns:
            if found := pattern.match(key):
                renamed[new.format(*found.groups()) + key[found.end() :]] = value
                break
        else:
            unknown.append(key)
    if unknown:
        raise WeightsError(f"got keys that {family} weights do not have: {', '.join(unknown[:8])}; check the family")
    return renamed


def swapped(keys: Keys) -> Keys:
    """Turn (theirs, ours) into (ours, theirs)."""
    return tuple((ours, theirs) for theirs, ours in keys)


_SIT_KEYS: Keys = (
    *TRUNK_KEYS,
    ("final_layer.linear.", "head.linear."),
    ("final_layer.adaLN_modulation.1.", "head.modulation.linear."),
)


@registry.register("sit")
class SiTFamily(WeightFamily):
    """SiT (willisma/SiT): its sigma channels, which nothing samples with, are dropped, and not written back."""

    clock = "noise-first"

    def matches(self, state: State) -> bool:
        """Whether the trunk has one head and no branches."""
        return "final_layer.linear.weight" in state and "x_embedder.proj.weight" in state

    def to_pathline(self, state: State) -> dict[str, Tensor]:
        """Rename the keys and keep the first C of each patch position's channels."""
        renamed = rename(state, _SIT_KEYS, "sit")
        heads = ("head.linear.weight", "head.linear.bias")
        missing = [name for name in ("patches.projection.weight", *heads) if name not in renamed]
        if missing:
            raise WeightsError(f"got sit weights without what becomes {', '.join(missing)}; check the family")
        channels, patch = renamed["patches.projection.weight"].shape[1:3]
        for name in heads:
            value = renamed[name]
            if len(value) not in (patch**2 * channels, 2 * patch**2 * channels):
                raise WeightsError(f"got a head of {len(value)} rows, expected {patch**2 * channels} or twice as many")
            renamed[name] = value.reshape(patch**2, -1, *value.shape[1:])[:, :channels].flatten(0, 1)
        return renamed

    def from_pathline(self, state: State) -> dict[str, Tensor]:
        """Rename the keys; the head is that of a model without sigma channels."""
        return rename(state, swapped(_SIT_KEYS), "pathline's sit")
