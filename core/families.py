"""Layouts that the core knows: SiT's, and those of DiT and REPA, which have its keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pathline.core.errors import WeightsError
from pathline.core.layouts import (
    DEFECTS,
    TRUNK_KEYS,
    ClockKind,
    Defect,
    Facts,
    Keys,
    State,
    WeightFamily,
    distinct,
    matched,
    registry,
    rename,
    size,
    swapped,
    trunk_facts,
)

__all__ = ["DiTFamily", "REPAFamily", "SiTFamily"]

_SIT_KEYS: Keys = (
    *TRUNK_KEYS,
    ("final_layer.linear.", "head.linear."),
    ("final_layer.adaLN_modulation.1.", "head.modulation.linear."),
)
_HEAD = ("final_layer.linear.weight", "final_layer.linear.bias")
_HEAD_OURS = ("head.linear.weight", "head.linear.bias")
_ENCODER_DEPTH = 8


@registry.register("sit")
class SiTFamily(WeightFamily):
    """SiT (willisma/SiT, arXiv:2401.08740): its sigma channels, which nothing samples with, are dropped.

    Args:
        sigma: whether to write them back, as zeros; as the released weights of 256 px have them.
    """

    clock: ClassVar[ClockKind] = "noise-first"
    wrapper: ClassVar[str | None] = "reversed-clock"
    keys: ClassVar[Keys] = _SIT_KEYS
    defects: ClassVar[Mapping[str, Defect]] = DEFECTS

    def __init__(self, *, sigma: bool = False) -> None:
        self.sigma = sigma

    def matches(self, state: State) -> bool:
        """Whether the trunk has one head, no branches and no projectors."""
        return _has_trunk(state) and not _is_aligned(state)

    def current(self, state: State) -> dict[str, Tensor]:
        """Keep the first C of each patch position's channels; a head of another size stays as it is."""
        kept, patches = dict(state), state.get("x_embedder.proj.weight")
        if patches is not None and patches.ndim == 4:
            channels, patch = patches.shape[1:3]
            for name in _HEAD:
                if name in kept and kept[name].ndim and len(kept[name]) == 2 * patch**2 * channels:
                    value = kept[name].reshape(patch**2, -1, *kept[name].shape[1:])
                    kept[name] = value[:, :channels].flatten(0, 1)
        return kept

    def to_pathline(self, state: State) -> dict[str, Tensor]:
        """Rename the keys and keep the first C of each patch position's channels.

        Raises:
            WeightsError: keys of another family, no head, or one of another size.
        """
        renamed = rename(self.current(state), self.keys, self.name)
        missing = [name for name in ("patches.projection.weight", *_HEAD_OURS) if name not in renamed]
        if missing:
            raise WeightsError(f"got {self.name} weights without what becomes {', '.join(missing)}; check the family")
        _, channels, patch, _ = size(renamed, "patches.projection.weight", ndim=4)
        for name in _HEAD_OURS:
            rows = len(renamed[name]) if renamed[name].ndim else 0
            if rows != patch**2 * channels:
                raise WeightsError(f"got a head of {rows} rows, expected {patch**2 * channels} or twice as many")
        return renamed

    def from_pathline(self, state: State) -> dict[str, Tensor]:
        """Rename the keys; sigma channels, where asked for, are zeros."""
        renamed = rename(state, swapped(self.keys), f"pathline's {self.name}")
        if self.sigma:
            patch = size(state, "patches.projection.weight", ndim=4)[2]
            for name in _HEAD:
                value = renamed[name].reshape(patch**2, -1, *renamed[name].shape[1:])
                renamed[name] = torch.cat((value, torch.zeros_like(value)), dim=1).flatten(0, 1)
        return renamed

    def facts(self, state: State) -> Facts:
        """Tell the options of the backbone ``sit``."""
        options, unknown = trunk_facts(self._known(state))
        return Facts({"name": "sit", **options}, unknown)

    def _known(self, state: State) -> dict[str, Tensor]:
        """Return what a description reads, in our layout; entries of other names are ``load``'s to refuse."""
        return matched(self.current(state), self.keys)[0]


@registry.register("dit")
class DiTFamily(SiTFamily):
    """DiT (facebookresearch/DiT, arXiv:2212.09748): a network that predicts the noise after k of 1000 diffusion steps.

    Its keys are SiT's, so that it must be named. The learned sigma is dropped: samples are drawn with the noise alone.

    Args:
        sigma: whether to write sigma channels back, as zeros, the middle of its range; as all released weights have.
    """

    clock = "steps"
    keys_of = "sit"
    wrapper = "dit-clock"
    interpolant = "vp"
    predicts = "noise"

    def __init__(self, *, sigma: bool = True) -> None:
        super().__init__(sigma=sigma)

    def matches(self, state: State) -> bool:
        """Never: nothing tells it from SiT."""
        return False


@registry.register("repa")
class REPAFamily(SiTFamily):
    """REPA (sihyun-yu/REPA, arXiv:2410.06940): SiT on our clock, with projectors to the features of encoders.

    Its legacy layout counts the blocks after the aligned one anew, as ``decoder_blocks``; both are read. Weights
    without projectors have SiT's keys, so that they must be named.

    Args:
        legacy: number of blocks before ``decoder_blocks``, to write the legacy layout; None writes the current one.
    """

    clock = "data-first"
    keys_of = "sit"
    wrapper = None
    keys: ClassVar[Keys] = (*_SIT_KEYS, ("projectors.{}.", "projectors.{}."))
    defects: ClassVar[Mapping[str, Defect]] = {name: DEFECTS[name] for name in ("random-labels", "null-label-1000")}

    def __init__(self, *, legacy: int | None = None) -> None:
        super().__init__()
        self.legacy = legacy

    def matches(self, state: State) -> bool:
        """Whether there are projectors beside one head, or blocks of the legacy layout."""
        return _has_trunk(state) and _is_aligned(state)

    def current(self, state: State) -> dict[str, Tensor]:
        """Number legacy blocks in one row, and keep the first C channels."""
        return super().current(_counted_on(state, _encoder_blocks(state)))

    def to_pathline(self, state: State) -> dict[str, Tensor]:
        """Rename the keys, of the current layout or the legacy one."""
        return super().to_pathline(_counted_on(state, _encoder_blocks(state)))

    def from_pathline(self, state: State) -> dict[str, Tensor]:
        """Rename the keys, and count blocks anew where the legacy layout is asked for."""
        renamed = super().from_pathline(state)
        return renamed if self.legacy is None else _counted_anew(renamed, self.legacy)

    def facts(self, state: State) -> Facts:
        """Tell the options of the backbone ``sit`` with its projectors.

        The current layout does not tell after which block they stand: it is REPA's 8 unless given, which matters in
        training alone. The legacy one does.
        """
        options, unknown = super().facts(state)
        ours, legacy = self._known(state), any(key.startswith("decoder_blocks.") for key in state)
        count = distinct(ours, "projectors.")
        if count:
            options["align_dims"] = [size(ours, f"projectors.{i}.4.weight")[0] for i in range(count)]
            options["align_width"] = size(ours, "projectors.0.0.weight")[0]
            options["align_layer"] = _encoder_blocks(state) if legacy else _ENCODER_DEPTH
            if options["align_layer"] > options["depth"]:
                unknown["align_layer"] = f"REPA's {options.pop('align_layer')} is not in {options['depth']} blocks"
        return Facts(options, unknown)


def _has_trunk(state: State) -> bool:
    return "final_layer.linear.weight" in state and "x_embedder.proj.weight" in state


def _is_aligned(state: State) -> bool:
    return any(key.startswith(("projectors.", "decoder_blocks.")) for key in state)


def _encoder_blocks(state: State) -> int:
    return distinct(state, "blocks.")


def _counted_on(state: State, first: int) -> dict[str, Tensor]:
    """Name ``decoder_blocks.0`` and so on as blocks from ``first`` on; raise WeightsError where two get one name."""
    renamed = {
        re.sub(r"^decoder_blocks\.(\d+)\.", lambda found: f"blocks.{first + int(found[1])}.", key): value
        for key, value in state.items()
    }
    if len(renamed) < len(state):
        raise WeightsError("got decoder_blocks that have the numbers of other blocks; check the file")
    return renamed


def _counted_anew(state: State, first: int) -> dict[str, Tensor]:
    """Name blocks from ``first`` on ``decoder_blocks.0`` and so on."""

    def named(found: re.Match[str]) -> str:
        number = int(found[1])
        return found[0] if number < first else f"decoder_blocks.{number - first}."

    return {re.sub(r"^blocks\.(\d+)\.", named, key): value for key, value in state.items()}
