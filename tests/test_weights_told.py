"""What weights tell of their network by their shapes alone, and what must be given."""

from __future__ import annotations

import pytest
import torch

from pathline import WeightsError, backbones, weights
from pathline.backbones.sit import SIZES
from pathline.core.layouts import trunk_facts
from pathline.plugins.deepflow.backbone import BRANCHED_SIZES


@pytest.mark.parametrize("family", ["sit", "dit", "repa"])
@pytest.mark.parametrize("name", SIZES)
def test_released_sizes_need_nothing_but_their_family(name, family):
    """Every size of the papers, as shapes without values."""
    aligned = dict(align_layer=8, align_dims=(768, 1024)) if family == "repa" else {}
    with torch.device("meta"):
        made = backbones.build("sit", size=name, patch_size=2, input_size=32, **aligned)
        state = weights.convert(made.state_dict(), to=family)
        again = backbones.build(weights.describe(state, family))
    shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (made, again)]
    assert shapes[0] == shapes[1] and again.num_heads == SIZES[name].num_heads
    assert (again.input_shape, again.num_classes, again.align_layer) == ((4, 32, 32), 1000, made.align_layer)
    assert len(state["final_layer.linear.bias"]) == (32 if family == "dit" else 16)


@pytest.mark.parametrize("dims", [(), (768,), (768, 1024)])
@pytest.mark.parametrize("name", BRANCHED_SIZES)
def test_released_sizes_of_deepflow_need_the_clamp_alone(name, dims):
    with torch.device("meta"):
        made = backbones.build("deepflow", size=name, branches=3, align_dims=dims)
        state = weights.convert(made.state_dict(), to="deepflow")
        again = backbones.build(weights.describe(state, clamp_gap=bool(dims)))
    shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (made, again)]
    assert shapes[0] == shapes[1] and again.cuts == made.cuts
    assert again.refiners[0].gap_modulation.clamp == bool(dims)
    with pytest.raises(WeightsError, match="do not tell all; give backbone.clamp_gap \\(true for the weights released"):
        weights.describe(state)


def test_what_sit_tells(parity):
    state = parity("sit").state
    depth = parity("sit").description["config"]["depth"]
    assert weights.describe(state, "sit", num_heads=4) == {
        "name": "sit",
        "hidden_size": 48,
        "depth": depth,
        "patch_size": 2,
        "in_channels": 4,
        "num_classes": 10,
        "mlp_ratio": 4.0,
        "input_size": 8,
        "num_heads": 4,
    }
    wide = {"positions": torch.zeros(1, 15, 1152), "patches.projection.weight": torch.zeros(1152, 3, 2, 2)}
    wide["blocks.0.mlp.hidden.weight"] = torch.zeros(2304, 1152)
    told, unknown = trunk_facts(wide)
    assert (told["num_heads"], told["mlp_ratio"], told["num_classes"], "input_size" in told) == (16, 2.0, 0, False)
    assert unknown == {"input_size": "15 positions are no square"}
    told, unknown = trunk_facts({**wide, "blocks.0.attention.query_norm.weight": torch.zeros(96)})
    assert told["query_key_norm"] and told["num_heads"] == 12
    without = {key: value for key, value in state.items() if key != "pos_embed"}
    with pytest.raises(WeightsError, match=r"give backbone.input_size \(there is no table of positions\)"):
        weights.describe(without, "sit", num_heads=4)
    assert weights.network(without, "sit", num_heads=4, input_size=8).input_shape == (4, 8, 8)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("x_embedder.proj.weight", None, "without what becomes patches.projection.weight"),
        ("x_embedder.proj.weight", torch.zeros(48), "got patches.projection.weight of shape \\(48,\\), expected 4"),
        ("x_embedder.proj.weight", torch.zeros(48, 4, 2, 3), "got patches of 2 × 3"),
        ("x_embedder.proj.weight", torch.zeros(48, 0, 2, 2), "expected 4 dimensions"),
        ("y_embedder.embedding_table.weight", torch.zeros(5), "got labels.weight of shape \\(5,\\), expected 2"),
        ("blocks.0.mlp.fc1.weight", None, "without what becomes blocks.0.mlp.hidden.weight"),
        ("pos_embed", torch.zeros(()), "got positions of shape \\(\\), expected 3 dimensions"),
    ],
)
def test_weights_that_tell_no_size(key, value, said, parity):
    state = dict(parity("sit").state)
    if value is None:
        del state[key]
    else:
        state[key] = value
    with pytest.raises(WeightsError, match=said):
        weights.describe(state, "sit", num_heads=4)


def test_a_shallow_acceleration_mlp_is_told_by_its_widths():
    sizes = dict(input_size=4, hidden_size=16, num_heads=2, depth=2, cuts=(1,), num_classes=3)
    made = backbones.build("deepflow", **sizes, acceleration_width=(10,))
    state = weights.convert(made.state_dict(), to="deepflow")
    assert weights.describe(state, num_heads=2, clamp_gap=False)["acceleration_width"] == [10]
