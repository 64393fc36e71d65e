"""Whether weights fit: compared before anything is made, value by value after; and what no layout can carry."""

from __future__ import annotations

import resource

import pytest
import torch

from pathline import Flow, WeightsError, backbones, interpolants, solvers, weights

SIZES = dict(input_size=4, hidden_size=16, num_heads=2, depth=4, num_classes=3, acceleration_width=10)
CUTS = dict(branches=2)


@pytest.mark.parametrize(
    ("key", "forged", "said"),
    [
        ("y_embedder.embedding_table.weight", (10**8, 1), r"table.weight \(100000000, 1\), expected \(100000000, 48\)"),
        ("pos_embed", (1, 10**8, 1), r"pos_embed \(1, 100000000, 1\), expected \(1, 100000000, 48\)"),
        ("blocks.0.mlp.fc1.weight", (10**8, 1), r"fc1.weight \(100000000, 1\), expected \(100000000, 48\)"),
    ],
)
def test_nothing_is_allocated_for_shapes_that_do_not_fit(key, forged, said, parity):
    """A table of a hundred million rows of one byte would make a network of 19 GB."""
    state = {**parity("sit").state, key: torch.zeros((), dtype=torch.float8_e4m3fn).expand(forged)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError, match=said):
        weights.network(state, "sit", num_heads=4)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def test_blocks_that_are_only_numbers(parity):
    """30,000 of them would take minutes to make, even without any values."""
    state = dict(parity("sit").state)
    state |= {f"blocks.{i}.mlp.fc1.bias": state["blocks.0.mlp.fc1.bias"] for i in range(3, 30000)}
    with pytest.raises(WeightsError, match=rf"got {len(state)} entries for 30000 blocks, too few"):
        weights.network(state, "sit", num_heads=4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value, parity):
    state = {key: tensor.clone() for key, tensor in parity("sit").state.items()}
    for key in ("blocks.1.mlp.fc1.weight", "t_embedder.mlp.0.bias"):
        state[key].view(-1)[-1] = value
    with pytest.raises(WeightsError, match=r"with NaN or infinity \(2\): (blocks|t_emb).*(fc1.weight|mlp.0.bias)$"):
        weights.network(state, "sit", num_heads=4)
    state = dict(parity("sit").state)
    state["t_embedder.mlp.0.bias"] = torch.full_like(state["t_embedder.mlp.0.bias"].double(), 1e300)  # no float32
    with pytest.raises(WeightsError, match=r"with NaN or infinity \(1\): t_embedder.mlp.0.bias"):
        weights.network(state, "sit", num_heads=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_other_precisions_load_with_their_positions(dtype, parity):
    state = {key: value.to(dtype) for key, value in parity("sit").state.items()}
    made = weights.network(state, "sit", num_heads=4).backbone
    assert torch.equal(made.positions, weights.network(parity("sit").state, "sit", num_heads=4).backbone.positions)
    assert torch.equal(made.labels.weight, state["y_embedder.embedding_table.weight"].float())
    state["pos_embed"] = (-state["pos_embed"].float()).to(dtype)
    with pytest.raises(WeightsError, match="pos_embed differs by 2 from the sine"):
        weights.network(state, "sit", num_heads=4)


def test_a_grid_that_is_no_square_though_its_count_is():
    """2 × 8 tokens look like 4 × 4."""
    made = backbones.build("sit", hidden_size=16, depth=2, num_heads=2, input_size=(4, 16), patch_size=2, num_classes=3)
    state = weights.convert(made.state_dict(), to="sit")
    with pytest.raises(WeightsError, match="or give backbone.input_size if the grid is no square"):
        weights.network(state, "sit", num_heads=2)
    assert weights.network(state, "sit", num_heads=2, input_size=(4, 16)).input_shape == (4, 4, 16)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "ema_model."])
def test_wrapped_names_are_understood_everywhere(prefix, parity):
    """Of a dictionary that torch.load gave, as of a file."""
    state, deepflow = parity("sit").state, parity("deepflow_3t").state
    wrapped = {f"{prefix}{key}": value for key, value in state.items()}
    assert weights.convert(wrapped, "sit").keys() == weights.convert(state, "sit").keys()
    assert weights.convert({f"{prefix}{key}": value for key, value in deepflow.items()}).keys() == (
        weights.convert(deepflow).keys()
    )
    ours = weights.convert(state, "sit")
    back = weights.convert({f"{prefix}{key}": value for key, value in ours.items()}, to="sit")
    assert set(back) == set(state)
    assert weights.recognise({f"{prefix}{key}": value for key, value in deepflow.items()}).name == "deepflow"
    assert weights.describe(wrapped, "sit", num_heads=4) == weights.describe(state, "sit", num_heads=4)
    made = [weights.network(given, "sit", num_heads=4).state_dict() for given in (wrapped, state)]
    assert all(torch.equal(value, made[1][key]) for key, value in made[0].items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(refiner="acceleration"), "without refiners.0.cross_space.query_key_value., refiners.0.cross_space.outp"),
        (dict(refiner="addition"), "without refiners.0.gap_modulation.mlp.hidden., refiners.0.gap_modulation.mlp.out"),
        (dict(refiner="gap", acceleration_width=2048), "without acceleration_head.linear., refiners.0.acceleration."),
        (dict(refiner="none", acceleration_width=2048), "without acceleration_head.linear., gap., refiners.0.acceler"),
        (dict(shared_heads=False), "without middle_head.linear., acceleration_head.linear., which its authors'"),
        (dict(branches=1), "without middle_head.linear., acceleration_head.linear., gap., refiners.0"),
    ],
)
def test_what_the_authors_program_has_not_is_not_written_in_its_layout(options, said):
    made = backbones.build("deepflow", **{**SIZES, **CUTS, **options})
    with pytest.raises(WeightsError, match=said) as caught:
        weights.convert(made.state_dict(), to="deepflow")
    assert "expected two branches or more, refiner 'vera' and shared heads" in str(caught.value)


def test_whole_blocks_are_written_in_the_authors_layout():
    for options in (CUTS, dict(branches=4), dict(cuts=(1,), align_dims=(6, 11), align_width=7)):
        made = backbones.build("deepflow", **SIZES, **options)
        theirs = weights.convert(made.state_dict(), to="deepflow")
        assert sum(key.endswith("acc_norm.mlp.fc1.weight") for key in theirs) == len(made.cuts)
        again = weights.convert(theirs, "deepflow")
        assert all(torch.equal(again[key], value) for key, value in made.state_dict().items())


@pytest.mark.parametrize("family", ["sit", "dit", "repa"])
def test_blocks_are_counted_within_a_clock(family, parity):
    """Three blocks a call, one call a step of Euler's method, seven steps."""
    case = parity("sit")
    made = weights.network(case.state, family, num_heads=4)
    kind = weights.registry.build(family)
    flow = Flow(made, interpolants.build(kind.interpolant), kind.predicts)
    solution = solvers.build("euler", steps=7).solve(flow, torch.randn(2, 4, 8, 8), label=torch.tensor([1, 7]))
    assert case.description["config"]["depth"] == 3 and solution.nfe == 7
    assert solution.block_evaluations == 21
