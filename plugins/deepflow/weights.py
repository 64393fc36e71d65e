"""The layout of the weights that DeepFlow's authors released."""

from __future__ import annotations

import re
from typing import ClassVar

from torch import Tensor

from pathline.core.errors import WeightsError
from pathline.core.layouts import (
    DEFECTS,
    TRUNK_KEYS,
    Defect,
    Facts,
    Keys,
    State,
    WeightFamily,
    distinct,
    listed,
    matched,
    registry,
    rename,
    size,
    swapped,
    trunk_facts,
)

__all__ = ["DeepFlowFamily"]

_KEYS: Keys = (
    *((theirs, f"trunk.{ours}") for theirs, ours in TRUNK_KEYS),
    ("final_layer.0.linear.", "middle_head.linear."),
    ("final_layer.0.adaLN_modulation.1.", "middle_head.modulation.linear."),
    ("final_layer.1.linear.", "trunk.head.linear."),
    ("final_layer.1.adaLN_modulation.1.", "trunk.head.modulation.linear."),
    ("final_acc_layer.linear.", "acceleration_head.linear."),
    ("final_acc_layer.adaLN_modulation.1.", "acceleration_head.modulation.linear."),
    ("dt_embedder.mlp.0.", "gap.hidden."),
    ("dt_embedder.mlp.2.", "gap.output."),
    ("df_blocks.{}.acc_mlp.", "refiners.{}.acceleration."),
    ("df_blocks.{}.acc_norm.mlp.fc1.", "refiners.{}.gap_modulation.mlp.hidden."),
    ("df_blocks.{}.acc_norm.mlp.fc2.", "refiners.{}.gap_modulation.mlp.output."),
    ("df_blocks.{}.acc_norm.adaLN_modulation.1.", "refiners.{}.gap_modulation.modulation.linear."),
    ("df_blocks.{}.cross_attention.multihead_attn.in_proj_", "refiners.{}.cross_space.query_key_value."),
    ("df_blocks.{}.cross_attention.multihead_attn.out_proj.", "refiners.{}.cross_space.output."),
    ("df_blocks.{}.cross_attention.layer_norm.", "refiners.{}.cross_space.norm."),
    ("projectors.{}.{}.", "projectors.{}.{}."),
)


_VERA = tuple(ours for _, ours in _KEYS if ours.startswith("refiners.{}."))
_BESIDE = ("middle_head.linear.", "acceleration_head.linear.", "gap.")
"""What begins the keys of a whole VeRA block in our layout, and of what stands beside it."""


@registry.register("deepflow")
class DeepFlowFamily(WeightFamily):
    """DeepFlow (ByteDance-Seed/DeepFlow), with alignment to one encoder, several or none.

    Its projectors stand in one row, those of the first VeRA block first. The weights do not tell whether the gap's
    scale was clamped, and where the cuts are: even, unless given.
    """

    clock = "data-first"
    defects: ClassVar[dict[str, Defect]] = {
        **{name: DEFECTS[name] for name in ("random-labels", "null-label-1000")},
        "clamped-gap": Defect("backbone.clamp_gap", True, "limits the gap's scale to ±5 where it aligns features"),
    }

    def matches(self, state: State) -> bool:
        """Whether there are VeRA blocks."""
        return any(key.startswith("df_blocks.") for key in state)

    def to_pathline(self, state: State) -> dict[str, Tensor]:
        """Rename the keys; every tensor keeps its shape."""
        return rename(_by_cut(state), _KEYS, "deepflow")

    def from_pathline(self, state: State) -> dict[str, Tensor]:
        """Rename the keys back.

        The weights do not carry ``residual``, ``gap_scale``, ``time_scale`` and ``clamp_gap``: the authors' program
        takes what it has, the normed query and scales of 1, and its clamp is set there.

        Raises:
            WeightsError: not the weights of whole VeRA blocks with shared heads, which are all that the program has.
        """
        cuts = range(max(1, distinct(state, "refiners.")))
        wanted = (*_BESIDE, *(start.format(cut) for cut in cuts for start in _VERA))
        missing = [start for start in wanted if not any(key.startswith(start) for key in state)]
        if missing:
            raise WeightsError(
                f"got a network without {listed(missing)}, which its authors' layout has; expected two branches or "
                "more, refiner 'vera' and shared heads"
            )
        return _in_a_row(rename(state, swapped(_KEYS), "pathline's deepflow"))

    def facts(self, state: State) -> Facts:
        """Tell the options of the backbone ``deepflow``."""
        ours = matched(_by_cut(state), _KEYS)[0]
        options, unknown = trunk_facts(ours, "trunk.")
        branches, depth = distinct(ours, "refiners.") + 1, options["depth"]
        if depth % branches:
            unknown["cuts"] = f"{branches} branches do not divide {depth} blocks evenly"
        else:
            options["cuts"] = [depth * i // branches for i in range(1, branches)]
        unknown["clamp_gap"] = "true for the weights released with alignment, false for the others"
        options["acceleration_width"] = _acceleration_width(ours)
        encoders = distinct(ours, "projectors.0.")
        if encoders:
            options["align_dims"] = [size(ours, f"projectors.0.{i}.4.weight")[0] for i in range(encoders)]
            options["align_width"] = size(ours, "projectors.0.0.0.weight")[0]
        return Facts({"name": "deepflow", **options}, unknown)


def _acceleration_width(ours: State) -> int | list[int]:
    """Return W where the hidden widths are W, 2W, W, else the widths themselves."""
    start = "refiners.0.acceleration."
    layers = distinct({key: value for key, value in ours.items() if key.endswith(".weight")}, start)
    widths = [size(ours, f"{start}{2 * i}.weight")[0] for i in range(max(1, layers - 1))]
    first = widths[0]
    return first if widths == [first, 2 * first, first] else widths


def _by_cut(state: State) -> dict[str, Tensor]:
    """Number projectors by cut and encoder in place of one row.

    Raises:
        WeightsError: not as many for every cut.
    """
    cuts, row = distinct(state, "df_blocks."), distinct(state, "projectors.")
    if row and (not cuts or row % cuts):
        raise WeightsError(f"got {row} projectors at {cuts} VeRA blocks, expected as many at each; check the file")

    def named(found: re.Match[str]) -> str:
        cut, encoder = divmod(int(found[1]), row // cuts)
        return f"projectors.{cut}.{encoder}."

    return {re.sub(r"^projectors\.(\d+)\.", named, key): value for key, value in state.items()}


def _in_a_row(state: State) -> dict[str, Tensor]:
    """Number projectors in one row in place of by cut and encoder."""
    encoders = distinct(state, "projectors.0.")

    def named(found: re.Match[str]) -> str:
        return f"projectors.{int(found[1]) * encoders + int(found[2])}."

    return {re.sub(r"^projectors\.(\d+)\.(\d+)\.", named, key): value for key, value in state.items()}
