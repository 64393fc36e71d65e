"""What a released layout of weights is: the keys of another program, what they mean here, and what they tell.

D width, p patch side, C channels, T tokens.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from pathline.backbones.sit import SIZES
from pathline.core.errors import WeightsError
from pathline.core.registry import Registry

__all__ = [
    "DEFECTS",
    "TRUNK_KEYS",
    "ClockKind",
    "Defect",
    "Facts",
    "Keys",
    "State",
    "WeightFamily",
    "distinct",
    "listed",
    "matched",
    "registry",
    "rename",
    "size",
    "swapped",
    "trunk_facts",
]

State = Mapping[str, Tensor]
Keys = tuple[tuple[str, str], ...]
ClockKind = Literal["data-first", "noise-first", "steps"]

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

HEADS = {size.hidden_size: size.num_heads for size in SIZES.values()}
_SHOWN = 8


class Defect(NamedTuple):
    """Something that another program does wrong and its published numbers depend on.

    Attributes:
        entry: of a configuration; ``*`` stands for every guidance.
        value: what the entry is set to.
        what: what the program does.
    """

    entry: str
    value: Any
    what: str


DEFECTS: dict[str, Defect] = {
    "three-channel-guidance": Defect("guidance.*.channels", 3, "guides the first 3 channels of the latent alone"),
    "random-labels": Defect("sample.labels", "random", "draws labels at random, not as many of each class"),
    "null-label-1000": Defect("guidance.*.null", 1000, "takes 1000 for the null label, whatever the classes"),
}
"""Defects by name. A family names those that its program has; none is ever on unless named."""


class Facts(NamedTuple):
    """What weights tell about their network.

    Attributes:
        options: of the backbone.
        unknown: options that the weights do not tell -> why they must be given.
    """

    options: dict[str, Any]
    unknown: dict[str, str]


class WeightFamily(ABC):
    """A released layout of weights, and how its networks are used.

    Attributes:
        clock: ``data-first`` if its networks take t = 0 as data, as ours do; ``noise-first`` if as noise, in which
            case the converted network is used through ``reverse_clock``; ``steps`` if they count diffusion steps.
        keys_of: name of a family that has the same keys, so that this one must be named; None if it is recognised.
        wrapper: name of the backbone that turns the family's clock into ours; None if it is ours.
        interpolant: the path its networks were trained on.
        predicts: what they predict; name of the objective as well.
        defects: what its program does wrong, by name.
    """

    clock: ClassVar[ClockKind]
    keys_of: ClassVar[str | None] = None
    wrapper: ClassVar[str | None] = None
    interpolant: ClassVar[str] = "linear"
    predicts: ClassVar[Literal["velocity", "noise"]] = "velocity"
    defects: ClassVar[Mapping[str, Defect]] = {}

    @property
    def name(self) -> str:
        """The registered name."""
        return next((entry.name for entry in registry if entry.factory is type(self)), type(self).__name__)

    @abstractmethod
    def matches(self, state: State) -> bool:
        """Whether a state dictionary is of this layout."""

    @abstractmethod
    def to_pathline(self, state: State) -> dict[str, Tensor]:
        """Turn the family's layout into ours."""

    @abstractmethod
    def from_pathline(self, state: State) -> dict[str, Tensor]:
        """Turn ours into the family's layout."""

    def current(self, state: State) -> dict[str, Tensor]:
        """Turn an older form of the layout into the one that ``from_pathline`` writes by default; all keys stay."""
        return dict(state)

    def facts(self, state: State) -> Facts:
        """Tell what the family's weights say about their network.

        Raises:
            WeightsError: keys that a description needs are missing, or have other shapes than a network can have.
        """
        raise WeightsError(f"got {self.name} weights, whose network cannot be told from them; build it by hand")


registry: Registry[WeightFamily] = Registry("weight family", "weights", WeightFamily)


def rename(state: State, keys: Keys, family: str) -> dict[str, Tensor]:
    """Give every key the other beginning that ``keys`` names for its own.

    Raises:
        WeightsError: keys that begin like none of them; lists the first eight.
    """
    renamed, unknown = matched(state, keys)
    if unknown:
        raise WeightsError(f"got keys that {family} weights do not have: {listed(unknown)}; check the family")
    return renamed


def matched(state: State, keys: Keys) -> tuple[dict[str, Tensor], list[str]]:
    """Return what ``rename`` can rename, and the keys that it cannot."""
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
    return renamed, unknown


def swapped(keys: Keys) -> Keys:
    """Turn (theirs, ours) into (ours, theirs)."""
    return tuple((ours, theirs) for theirs, ours in keys)


def listed(words: list[str]) -> str:
    """Join the first eight words, and say how many more there are."""
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more


def size(state: State, key: str, ndim: int = 2) -> tuple[int, ...]:
    """Return the shape of a tensor that a description needs.

    Raises:
        WeightsError: it is missing, or of another number of dimensions.
    """
    if key not in state:
        raise WeightsError(f"got weights without what becomes {key}, which tells a size; check family and file")
    if state[key].ndim != ndim or not all(state[key].shape):
        raise WeightsError(f"got {key} of shape {tuple(state[key].shape)}, expected {ndim} dimensions; check the file")
    return tuple(state[key].shape)


def distinct(state: State, start: str) -> int:
    """Count the different words that follow ``start`` in keys, as the numbers of blocks."""
    return len({key[len(start) :].partition(".")[0] for key in state if key.startswith(start)})


def trunk_facts(state: State, prefix: str = "") -> Facts:
    """Tell width, depth, patch, channels, classes and the like of a trunk ``sit`` in our layout."""
    width, channels, patch, side = size(state, f"{prefix}patches.projection.weight", ndim=4)
    if patch != side:
        raise WeightsError(f"got patches of {patch} × {side}, expected square ones; no backbone here has others")
    block, labels = f"{prefix}blocks.0.", f"{prefix}labels.weight"
    options = {
        "hidden_size": width,
        "depth": distinct(state, f"{prefix}blocks."),
        "patch_size": patch,
        "in_channels": channels,
        "num_classes": size(state, labels)[0] - 1 if labels in state else 0,
        "mlp_ratio": size(state, f"{block}mlp.hidden.weight")[0] / width,
    }
    unknown: dict[str, str] = {}
    if f"{block}attention.query_norm.weight" in state:
        options["query_key_norm"] = True
        options["num_heads"] = width // size(state, f"{block}attention.query_norm.weight", ndim=1)[0]
    elif width in HEADS:
        options["num_heads"] = HEADS[width]
    else:
        unknown["num_heads"] = f"no released model is {width} wide"
    tokens = size(state, f"{prefix}positions", ndim=3)[1] if f"{prefix}positions" in state else 0
    if tokens and math.isqrt(tokens) ** 2 == tokens:
        options["input_size"] = patch * math.isqrt(tokens)
    else:
        unknown["input_size"] = f"{tokens} positions are no square" if tokens else "there is no table of positions"
    return Facts(options, unknown)
