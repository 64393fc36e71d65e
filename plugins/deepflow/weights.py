"""The layout of the weights that DeepFlow's authors released."""

from __future__ import annotations

from torch import Tensor

from pathline.core.weights import TRUNK_KEYS, State, WeightFamily, registry, rename, swapped

__all__ = ["DeepFlowFamily"]

_KEYS = (
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
    ("projectors.{}.", "projectors.{}.0."),
)


@registry.register("deepflow")
class DeepFlowFamily(WeightFamily):
    """DeepFlow (ByteDance-Seed/DeepFlow), with alignment to one encoder or none.

    The weights do not tell whether the gap's scale was clamped: build the backbone with ``clamp_gap=True`` for those
    released with alignment.
    """

    clock = "data-first"

    def matches(self, state: State) -> bool:
        """Whether there are VeRA blocks."""
        return any(key.startswith("df_blocks.") for key in state)

    def to_pathline(self, state: State) -> dict[str, Tensor]:
        """Rename the keys; every tensor keeps its shape."""
        return rename(state, _KEYS, "deepflow")

    def from_pathline(self, state: State) -> dict[str, Tensor]:
        """Rename the keys back; only the first encoder's projectors have a place in the layout."""
        return rename(state, swapped(_KEYS), "pathline's deepflow")
