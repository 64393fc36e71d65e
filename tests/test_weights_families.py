"""Layouts that the core knows: SiT, DiT and REPA, both ways, on our clock; what is said where they do not fit."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from pathline import Flow, InputError, WeightsError, backbones, interpolants, weights

FORWARD = 2e-5


def assert_close(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    assert float((ours.detach().double() - theirs.double()).abs().max()) <= tolerance


@pytest.fixture
def aligned(parity):
    """The stored SiT in REPA's current layout, with projectors to two encoders of widths 11 and 6."""
    state = dict(parity("sit").state)
    for i, dim in enumerate((11, 6)):
        for layer, (rows, columns) in enumerate(((14, 48), (14, 14), (dim, 14))):
            state[f"projectors.{i}.{2 * layer}.weight"] = torch.randn(rows, columns)
            state[f"projectors.{i}.{2 * layer}.bias"] = torch.randn(rows)
    return state


def in_legacy_layout(state, first):
    """Blocks from ``first`` on as ``decoder_blocks``, counted from 0."""
    result = {}
    for key, value in state.items():
        words = key.split(".")
        if words[0] == "blocks" and int(words[1]) >= first:
            words[:2] = ["decoder_blocks", str(int(words[1]) - first)]
        result[".".join(words)] = value
    return result


@pytest.mark.parametrize("name", ["sit", "sit_sigma"])
def test_sit_runs_on_our_clock(name, parity):
    """The velocity at our 1 − t is the negative of theirs at t, with and without sigma channels."""
    state, given, wanted, _ = parity(name)
    made = weights.network(state, "sit", num_heads=4)
    assert isinstance(made, backbones.ReversedClock) and not made.training
    assert_close(-made(given["x"], 1 - given["t"], label=given["y"]), wanted["prediction"], FORWARD)
    assert (made.num_classes, made.null_label, made.input_shape) == (10, 10, (4, 8, 8))


def test_repa_runs_on_our_clock_as_it_is(parity, aligned):
    _, given, wanted, _ = parity("sit")
    made = weights.network(aligned, num_heads=4, align_layer=2)
    assert isinstance(made, backbones.SiT)
    assert_close(made(given["x"], given["t"], label=given["y"]), wanted["prediction"], FORWARD)
    features = made(given["x"], given["t"], label=given["y"], with_features=True).features
    assert [tuple(item.shape) for item in features] == [(len(given["x"]), 16, 11), (len(given["x"]), 16, 6)]


def noise_level(t):
    """−ln α² of the path ``vp``, from its definition: ∫β, β from 0.1 to 20."""
    return 0.1 * t + 19.9 / 2 * t**2


def discrete():
    """−ln ᾱ after each of DiT's steps, in numpy."""
    return -np.log(1 - np.linspace(1e-4, 0.02, 1000)).cumsum()


def test_dit_is_asked_at_the_step_that_is_as_noisy(parity):
    """At noise levels between its first two steps; what it predicts is the noise, as it is."""
    state, given, wanted, _ = parity("sit_sigma")
    made = weights.network(state, "dit", num_heads=4).double()
    level = torch.from_numpy(np.interp(given["t"].numpy(), [0, 1], discrete()[:2]))
    t = (-0.1 + (0.01 + 4 * 19.9 / 2 * level).sqrt()) / 19.9
    assert_close(made(given["x"].double(), t, label=given["y"]), wanted["prediction"], FORWARD)


def test_steps_of_dit_on_our_path():
    clock, level = backbones.DiTClock(backbones.wrap(lambda x, t: t)), discrete()
    times = (-0.1 + np.sqrt(0.01 + 4 * 19.9 / 2 * level)) / 19.9
    inside = times <= 1
    at = clock.step_at(torch.from_numpy(times[inside]))
    assert_close(at, torch.arange(inside.sum(), dtype=torch.float64), 1e-9)
    path = interpolants.build("vp").evaluate(torch.from_numpy(times[inside]))
    assert_close(path.alpha.square(), torch.from_numpy(np.exp(-level[inside])), 1e-12)
    assert float(clock.step_at(torch.tensor(0.0))) == 0 and inside.sum() == 996
    assert 995 < float(clock.step_at(torch.tensor(1.0))) < 996
    assert clock.step_at(torch.tensor([0.5], dtype=torch.bfloat16)).dtype == torch.float32
    for width, wrong in ((5, 3e-2), (1000, 6e-4)):  # float32 keeps steps apart
        t = torch.linspace(0.01, 1, width)
        assert_close(clock.step_at(t), clock.step_at(t.double()), wrong)


def test_the_naive_clock_of_dit_is_off_by_what_is_said():
    said = [float(number) for number in re.findall(r"0\.00\d\d", backbones.DiTClock.__doc__)]
    steps = torch.arange(1000, dtype=torch.float64)
    path = interpolants.build("vp").evaluate((steps + 1) / 1000)
    alpha = torch.from_numpy(np.exp(-discrete() / 2))
    sigma = (1 - alpha.square()).sqrt()
    off = [float((path.alpha - alpha).abs().max()), float((path.sigma - sigma).abs().max())]
    assert off == pytest.approx(said[:2], abs=5e-5)


def test_dit_predicts_noise_that_our_path_understands(gaussian):
    """The exact noise of N(2, 0.5²) at DiT's steps, read as a velocity on ``vp``, is the exact velocity there."""
    level = torch.from_numpy(discrete())

    def noise(x, step):
        low = step.floor().long().clamp(max=998)
        total = torch.lerp(level[low], level[low + 1], step.double() - low)[:, None]
        alpha, variance = (-total / 2).exp(), -torch.expm1(-total)
        return variance.sqrt() * (x - 2 * alpha) / (alpha.square() / 4 + variance)

    exact = gaussian("vp")
    flow = Flow(backbones.DiTClock(backbones.wrap(noise)), exact.path, "noise")
    x, t = torch.randn(7, 3, dtype=torch.float64), torch.linspace(0.01, 1, 7, dtype=torch.float64)
    assert_close(flow(x, t).velocity, exact.velocity(x, t), 1e-5)


@pytest.mark.parametrize(
    "options", [dict(steps=1), dict(betas=(0.0, 0.02)), dict(betas=(0.1, 1.0)), dict(beta_min=0.0)]
)
def test_clocks_of_dit_that_are_none(options):
    with pytest.raises(InputError, match="two steps or more, betas in"):
        backbones.build("dit-clock", backbone=backbones.wrap(lambda x, t: x), **options)


def test_sigma_channels_come_back_as_zeros(parity):
    """All else to the byte, by a network built from the file; a table of positions is the formula's."""
    state = parity("sit_sigma").state
    for family, to in (("sit", {"name": "sit", "sigma": True}), ("dit", "dit")):
        made = weights.network(state, family, num_heads=4)
        returned = weights.convert(made.backbone.state_dict(), to=to)
        assert set(returned) == set(state)
        for key, value in state.items():
            if key.startswith("final_layer.linear"):
                rows = [item.reshape(2, 2, 8, -1) for item in (returned[key], value)]
                assert torch.equal(rows[0][:, :, :4], rows[1][:, :, :4].float()) and not rows[0][:, :, 4:].any()
                assert bool(value.reshape(2, 2, 8, -1)[:, :, 4:].any())
            elif key == "pos_embed":
                assert_close(returned[key], value, 1e-6)
            else:
                assert torch.equal(returned[key], value.float())
    assert weights.convert(weights.convert(state, "sit"), to="sit")["final_layer.linear.bias"].shape == (16,)


def test_repa_returns_to_the_byte_in_either_layout(aligned):
    legacy = in_legacy_layout(aligned, 1)
    assert sum(key.startswith("decoder_blocks.") for key in legacy) > 0
    ours = weights.convert(aligned)
    assert set(ours) == set(weights.convert(legacy)) and "projectors.1.4.weight" in ours
    for to, wanted in (("repa", aligned), ({"name": "repa", "legacy": 1}, legacy)):
        for source in (aligned, legacy):
            returned = weights.convert(weights.convert(source, "repa"), to=to)
            assert set(returned) == set(wanted)
            assert all(torch.equal(returned[key], value) for key, value in wanted.items())
    stranger = {**legacy, "decoder_blocks.-1.mlp.fc1.bias": torch.zeros(3)}
    with pytest.raises(WeightsError, match="got keys that repa weights do not have: decoder_blocks.-1"):
        weights.convert(stranger, "repa")
    apart = {**legacy, "blocks.2.mlp.fc1.bias": torch.zeros(3)}  # two with the number 2
    with pytest.raises(WeightsError, match="got decoder_blocks that have the numbers of other blocks"):
        weights.convert({key: value for key, value in apart.items() if "decoder_blocks.1" not in key}, "repa")


def test_where_repa_aligns(aligned):
    """The legacy layout tells; the current one does not, and a model of three blocks has no eighth."""
    assert weights.describe(in_legacy_layout(aligned, 2), num_heads=4)["align_layer"] == 2
    with pytest.raises(WeightsError, match=r"give backbone.num_heads .*, backbone.align_layer \(REPA's 8 is not in"):
        weights.describe(aligned)
    deep = dict(aligned)
    for i in range(9):
        deep |= {
            key.replace("blocks.0.", f"blocks.{i}."): value for key, value in aligned.items() if "blocks.0." in key
        }
    told = weights.describe(deep, num_heads=4)
    assert (told["align_layer"], told["align_dims"], told["align_width"], told["depth"]) == (8, [11, 6], 14, 9)


def test_families_that_their_keys_do_not_tell_must_be_named(parity, aligned):
    state = parity("sit").state
    for ask in (weights.recognise, weights.describe, weights.network):
        with pytest.raises(WeightsError, match=r"the keys of sit, dit, repa, which differ .* name the family"):
            ask(state)
    assert weights.recognise(aligned).name == "repa" == weights.recognise(state, "repa").name
    assert weights.recognise(parity("deepflow_3t").state).name == "deepflow"
    assert weights.recognise(in_legacy_layout(state, 2)).name == "repa"
    assert weights.component(state, "repa", num_heads=4)["name"] == "sit"
    wrappers = [weights.component(state, name, num_heads=4)["name"] for name in ("sit", "dit")]
    assert wrappers == ["reversed-clock", "dit-clock"]


def test_all_that_does_not_fit_is_one_error(parity):
    state = dict(parity("sit").state)
    made = weights.network(state, "sit", num_heads=4)
    before = {key: value.clone() for key, value in made.state_dict().items()}
    for i in range(11):
        state[f"extra.{i}"] = torch.zeros(2)
    del state["blocks.1.attn.proj.bias"], state["final_layer.linear.bias"]
    state["t_embedder.mlp.0.bias"] = torch.zeros(47)
    state["t_embedder.mlp.2.bias"] = torch.zeros(48, dtype=torch.int32)
    with pytest.raises(WeightsError) as caught:
        weights.load(made, state, "sit")
    assert str(caught.value).split("\n  ") == [
        "got sit weights that do not fit the backbone; check its options:",
        "missing (2): blocks.1.attn.proj.bias, final_layer.linear.bias",
        f"unexpected (11): {', '.join(f'extra.{i}' for i in range(8))} and 3 more",
        "of another shape (1): t_embedder.mlp.0.bias (47,), expected (48,)",
        "not floating-point (1): t_embedder.mlp.2.bias torch.int32",
    ]
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())
    deeper = {key.replace("blocks.0.", "blocks.700."): value for key, value in parity("sit").state.items()}
    with pytest.raises(WeightsError, match=r"missing \(\d+\): blocks.0.*\n  unexpected \(\d+\): blocks.700"):
        weights.network(deeper | {"blocks.0.mlp.fc1.weight": torch.zeros(192, 48)}, "sit", num_heads=4)


@pytest.mark.parametrize(("off", "fits"), [(5e-4, True), (2e-3, False), (float("nan"), False)])
def test_positions_are_the_formulas(off, fits, parity):
    """Averages round them; another table is another network."""
    state = dict(parity("sit").state)
    state["pos_embed"] = state["pos_embed"].clone()
    state["pos_embed"][0, 3, 5] += off
    if not fits:
        with pytest.raises(
            WeightsError, match=r"pos_embed differs by (0.002|nan) from the sine–cosine table, more than"
        ):
            weights.network(state, "sit", num_heads=4)
        return
    made = weights.network(state, "sit", num_heads=4).backbone
    assert torch.equal(made.positions, backbones.build("sit", **weights_options(made)).positions)


def weights_options(made):
    return dict(hidden_size=made.hidden_size, depth=1, num_heads=4, input_size=8, num_classes=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load(dtype, parity):
    state = parity("sit").state
    made = weights.network({key: value.to(dtype) for key, value in state.items() if key != "pos_embed"}, "sit",
                           num_heads=4, input_size=8)  # fmt: skip
    assert made.backbone.labels.weight.dtype == torch.float32
    assert torch.equal(made.backbone.labels.weight, state["y_embedder.embedding_table.weight"].to(dtype).float())


def test_every_defect_says_what_it_sets():
    entries = {"guidance.*.channels", "guidance.*.null", "sample.labels", "backbone.clamp_gap"}
    for name in weights.registry.names():
        family = weights.registry.build(name)
        assert family.name == name and "random-labels" in family.defects
        assert {defect.entry for defect in family.defects.values()} <= entries
    assert "three-channel-guidance" not in weights.registry.build("repa").defects  # it guides all channels
    assert "clamped-gap" in weights.registry.build("deepflow").defects
