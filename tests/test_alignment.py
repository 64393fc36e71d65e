"""Alignment to encoders (REPA) against its formula, written again here."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from pathline import Draws, Flow, InputError, backbones, interpolants, objectives, solvers
from pathline.backbones.sit import Aligned
from pathline.objectives import weightings
from pathline.testing import check_backbone

LINEAR = interpolants.build("linear")
TOY = dict(input_size=(4, 6), patch_size=2, in_channels=3, hidden_size=24, depth=3, num_heads=2, num_classes=7)
TOKENS = 6
DATA, LABEL = torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(1)), torch.arange(5)


def network(dims=(9, 11), layer=2, **changes):
    """A ``sit`` whose zero-initialised layers have something to say."""
    backbone = backbones.build("sit", **{**TOY, "align_layer": layer, "align_dims": dims, "align_width": 13, **changes})
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.2)
    return backbone


def encoded(*dims, count=5, tokens=TOKENS, seed=0):
    return tuple(torch.randn(count, tokens, dim, generator=torch.Generator().manual_seed(seed + dim)) for dim in dims)


def build(**options):
    return objectives.build("alignment", interpolant=LINEAR, **options)


def projected_by_hand(backbone, x, t, label, layer):
    """The tokens after ``layer`` blocks, through each projector: three linear layers, x·sigmoid(x) between."""
    tokens, condition = backbone.embed(x), backbone.condition(t, label=label)
    for block in list(backbone.blocks)[:layer]:
        tokens, _ = block(tokens, None, condition)
    found = []
    for projector in backbone.projectors:
        y = tokens
        for number, layer in enumerate(list(projector)[::2]):
            y = (y if number == 0 else y * torch.sigmoid(y)) @ layer.weight.T + layer.bias
        found.append(y)
    return found


def cosine_by_hand(ours, theirs):
    return (ours * theirs).sum(-1) / (ours.square().sum(-1).sqrt() * theirs.square().sum(-1).sqrt())


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_features_are_the_projected_tokens_of_the_named_block(layer):
    backbone = network(layer=layer).double()
    x, t = DATA.double(), torch.rand(5, dtype=torch.float64)
    out = backbone(x, t, label=LABEL, with_features=True)
    assert isinstance(out, Aligned) and [tuple(f.shape) for f in out.features] == [(5, TOKENS, 9), (5, TOKENS, 11)]
    for ours, truth in zip(out.features, projected_by_hand(backbone, x, t, LABEL, layer), strict=True):
        assert torch.allclose(ours, truth, atol=1e-12)
    assert torch.equal(out.velocity, backbone(x, t, label=LABEL))


def test_the_projectors_are_not_run_where_nobody_asks():
    backbone, called = network(), []
    for projector in backbone.projectors:
        projector.register_forward_hook(lambda *_: called.append(1))
    assert backbone(DATA, torch.rand(5), label=LABEL).shape == DATA.shape and not called
    solvers.build("heun", steps=2)(Flow(backbone, LINEAR), torch.randn(5, 3, 4, 6), label=LABEL)
    assert not called
    check_backbone(backbone)


def test_other_networks_keep_their_parameters_and_their_first_values():
    """Projectors come last: the rest is drawn as without them, under the same names."""
    torch.manual_seed(3)
    plain = backbones.build("sit", **TOY).state_dict()
    torch.manual_seed(3)
    aligned = backbones.build("sit", **TOY, align_layer=1, align_dims=(9,)).state_dict()
    assert all(torch.equal(aligned[key], value) for key, value in plain.items())
    added = {key: tuple(value.shape) for key, value in aligned.items() if key not in plain}
    weights = {"0.weight": (2048, 24), "2.weight": (2048, 2048), "4.weight": (9, 2048)}
    biases = {"0.bias": (2048,), "2.bias": (2048,), "4.bias": (9,)}
    assert added == {f"projectors.0.{key}": shape for key, shape in (weights | biases).items()}


def test_the_loss_by_hand():
    backbone, features = network(), encoded(9, 11)
    draws = Draws(4).at(range(20, 25))
    loss = build(label_dropout=0.0, align=0.7)(backbone, DATA, draws, label=LABEL, features=features)
    noise, t = draws.normal("noise", DATA.shape[1:]), draws.uniform("time")
    x = (1 - t)[:, None, None, None] * DATA + t[:, None, None, None] * noise
    error = (backbone(x, t, label=LABEL) - (noise - DATA)).square().mean((1, 2, 3))
    projected = projected_by_hand(backbone, x, t, LABEL, 2)
    cosines = [cosine_by_hand(p, f).mean(1) for p, f in zip(projected, features, strict=True)]
    align = -(cosines[0] + cosines[1]) / 2
    assert torch.allclose(loss.terms["velocity"], error, atol=1e-6)
    assert torch.allclose(loss.terms["align"], align, atol=1e-6)
    assert torch.allclose(loss.total, (error + 0.7 * align).mean(), atol=1e-6)
    assert list(loss.details) == ["velocity", "align"] and torch.equal(loss.times, t)
    loss.total.backward()
    assert all(
        p.grad is not None and bool(p.grad.any()) for name, p in backbone.named_parameters() if "label" not in name
    )


def test_the_default_weight_is_the_papers():
    assert build().weights == {"velocity": 1.0, "align": 0.5}


def test_the_cosine_is_at_its_bounds_for_tokens_along_and_against():
    backbone = network(dims=(9,))
    draws = Draws(4).at(range(5))
    noise, t = draws.normal("noise", DATA.shape[1:]), draws.uniform("time")
    x = LINEAR.interpolate(DATA, noise, t)
    (own,) = backbone(x, t, label=LABEL, with_features=True).features
    for sign in (1, -1):  # whatever the length of the tokens
        given = (sign * torch.rand(5, TOKENS, 1) * own.detach(),)
        loss = build(label_dropout=0.0)(backbone, DATA, draws, label=LABEL, features=given)
        assert torch.allclose(loss.terms["align"], torch.full((5,), -float(sign)), atol=1e-5)


def test_each_encoder_has_its_own_projector():
    """Two encoders of one width: swapping them changes the loss, swapping the projectors as well changes it back."""
    backbone, features = network(dims=(9, 9)), (*encoded(9), *encoded(9, seed=50))
    draws, objective = Draws(4).at(range(5)), build(label_dropout=0.0)

    def align(*features):
        return objective(backbone, DATA, draws, label=LABEL, features=features).terms["align"].detach()

    straight, swapped = align(*features), align(*reversed(features))
    assert float((straight - swapped).abs().min()) > 1e-4
    backbone.projectors = torch.nn.ModuleList(reversed(list(backbone.projectors)))
    assert torch.allclose(align(*reversed(features)), straight, atol=1e-6)


def test_without_its_part_the_loss_is_that_of_velocity():
    """Every option of ``velocity`` acts as there; an importance weighs the alignment too."""
    backbone, features = network(), encoded(9, 11)
    draws = Draws(4).at(range(5))
    options = dict(
        label_dropout=0.3,
        times={"name": "logit-normal", "mean": 0.5},
        loss="huber",
        delta=0.8,
        cosine=0.2,
        weighting="min-snr",
        interval=(0.2, 0.9),
    )
    assert "min-snr" in weightings.names()
    plain = objectives.build("velocity", interpolant=LINEAR, **options)(backbone, DATA, draws, label=LABEL)
    aligned = build(**options)(backbone, DATA, draws, label=LABEL, features=features)
    for name, term in plain.terms.items():
        assert torch.allclose(aligned.terms[name], term)
    assert torch.allclose(aligned.total - 0.5 * aligned.terms["align"].mean(), plain.total, atol=1e-6)
    traded = build(**options, wanted_times="uniform")(backbone, DATA, draws, label=LABEL, features=features)
    importance = (traded.terms["velocity"] / aligned.terms["velocity"]).detach()
    assert float(importance.std()) > 0.01
    assert torch.allclose(traded.terms["align"], importance * aligned.terms["align"], rtol=1e-4)
    assert torch.equal(traded.details["align"], aligned.details["align"])


def test_rows_do_not_depend_on_the_batch_they_are_in():
    backbone, features = network(), encoded(9, 11)
    whole = build()(backbone, DATA, Draws(0).at(range(5)), label=LABEL, features=features).terms
    rows = tuple(f[1:4] for f in features)
    part = build()(backbone, DATA[1:4], Draws(0).at(range(1, 4)), label=LABEL[1:4], features=rows).terms
    assert all(torch.allclose(part[name], value[1:4], atol=1e-5) for name, value in whole.items())


def test_the_cosine_is_float32_whatever_the_networks_precision():
    """Long bfloat16 tokens: the squared length is summed in float32 (REPA issue 46: NaN in half precision)."""
    backbone, objective, draws = network(dims=(9,)), build(label_dropout=0.0), Draws(0).at(range(5))
    exact = objective(backbone, DATA, draws, label=LABEL, features=encoded(9)).terms["align"].detach()
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(backbone, DATA, draws, label=LABEL, features=encoded(9))
    assert torch.allclose(loss.terms["align"].detach(), exact, atol=0.05)
    assert loss.total.dtype == loss.terms["align"].dtype == torch.float32
    long = (torch.full((5, TOKENS, 9), 300.0, dtype=torch.float16),)
    aligned = objectives.alignment.negative_cosine(long, long)
    assert torch.allclose(aligned, torch.full((5,), -1.0), atol=1e-6)


def test_on_a_path_with_latent_noise():
    path = interpolants.build("stochastic", gamma="sine-squared")
    objective = objectives.build("alignment", interpolant=path, label_dropout=0.0)
    draws, backbone = Draws(2).at(range(5)), network(dims=(9,))
    loss = objective(backbone, DATA, draws, label=LABEL, features=encoded(9))
    t, noise, z = draws.uniform("time"), draws.normal("noise", (3, 4, 6)), draws.normal("latent", (3, 4, 6))
    low, high = path.training_interval("velocity")
    t = low + (high - low) * t
    column = t[:, None, None, None]
    x = (1 - column) * DATA + column * noise + torch.sin(math.pi * column) ** 2 * z
    (projected,) = projected_by_hand(backbone, x, t, LABEL, 2)
    assert torch.allclose(loss.terms["align"], -cosine_by_hand(projected, encoded(9)[0]).mean(1), atol=1e-5)


def test_training_aligns():
    """Thirty steps on one batch: the features turn towards the encoder's, the velocity's error falls."""
    torch.manual_seed(0)
    backbone = backbones.build("sit", **TOY, align_layer=2, align_dims=(9,), align_width=32)
    optimizer = torch.optim.Adam(backbone.parameters(), lr=3e-3)
    objective, features = build(label_dropout=0.0), encoded(9)
    losses = []
    for _ in range(30):
        loss = objective(backbone, DATA, Draws(0).at(range(5)), label=LABEL, features=features)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append({name: float(term.mean().detach()) for name, term in loss.terms.items()})
    assert losses[-1]["align"] < losses[0]["align"] - 0.5 and losses[-1]["velocity"] < losses[0]["velocity"]


def call(backbone, features, **options):
    return build(label_dropout=0.0, **options)(backbone, DATA, Draws(0).at(range(5)), label=LABEL, features=features)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ((), "got features of 0 encoders for a backbone with 2 projectors"),
        (encoded(9), "got features of 1 encoders for a backbone with 2 projectors"),
        (encoded(9, 11, 9), "got features of 3 encoders for a backbone with 2 projectors"),
        (encoded(11, 9), r"\(5, 6, 11\) of encoder 0, expected floats \(5, T, 9\)"),
        (encoded(9, 11, count=4), r"\(4, 6, 9\) of encoder 0, expected floats \(5, T, 9\)"),
        ((encoded(9)[0], encoded(11)[0].long()), "features torch.int64 .* of encoder 1, expected floats"),
        ((encoded(9)[0], encoded(11)[0] * math.nan), "NaN or infinite values in the features of encoder 1"),
        (encoded(9, 11, tokens=4), r"encoder features of shape \(5, 4, 9\), expected \(5, 6, 9\)"),
    ],
)
def test_features_that_do_not_fit(features, message):
    with pytest.raises(InputError, match=message):
        call(network(), features)


def test_a_backbone_without_projectors_is_refused():
    plain = backbones.build("sit", **TOY)
    for backbone in (plain, backbones.build("mlp", dim=3, num_classes=7)):
        with pytest.raises(InputError, match="without projectors, expected a backbone to align"):
            call(backbone, encoded(9))
    with pytest.raises(InputError, match="got with_features for a network without projectors"):
        plain(DATA, torch.rand(5), label=LABEL, with_features=True)


@pytest.mark.parametrize("align", [0.0, -0.5, math.inf, math.nan])
def test_a_weight_out_of_range(align):
    with pytest.raises(InputError, match="expected a finite weight above 0; without alignment use"):
        build(align=align)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(align_dims=(9,)), r"got align_layer None and align_dims \(9,\); give both or neither"),
        (dict(align_layer=2), r"got align_layer 2 and align_dims \(\); give both or neither"),
        (dict(align_layer=0, align_dims=(9,)), "got align_layer 0, expected a number of blocks from 1 to 3"),
        (dict(align_layer=4, align_dims=(9,)), "got align_layer 4, expected a number of blocks from 1 to 3"),
        (dict(align_layer=1.0, align_dims=(9,)), "got align_layer 1.0"),
        (dict(align_layer=1, align_dims=(9, 0)), "expected positive whole numbers"),
        (dict(align_layer=1, align_dims=(9,), align_width=0), "expected positive whole numbers"),
    ],
)
def test_projectors_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        backbones.build("sit", **TOY, **options)


def test_agreement_with_torchs_cosine_on_a_batch_of_one():
    backbone, features = network(dims=(9,)), encoded(9, count=1)
    draws = Draws(7).at(range(3, 4))
    loss = build(label_dropout=0.0)(backbone, DATA[:1], draws, label=LABEL[:1], features=features)
    t, noise = draws.uniform("time"), draws.normal("noise", (3, 4, 6))
    out = backbone(LINEAR.interpolate(DATA[:1], noise, t), t, label=LABEL[:1], with_features=True)
    expected = -functional.cosine_similarity(out.features[0], features[0], dim=-1).mean(1)
    assert torch.allclose(loss.terms["align"], expected, atol=1e-6)


# --- after every cut of a branched network


@pytest.mark.parametrize("refiner", ["vera", "gap"])
def test_each_cut_and_encoder_of_a_branched_network_has_its_own_projector(refiner):
    """Three branches, two encoders of one width, so that no shape tells a wrong pair: against a loop over both."""
    width = {"acceleration_width": 5} if refiner == "vera" else {}
    options = dict(cuts=(1, 2), refiner=refiner, align_dims=(9, 9), align_width=13, **width)
    backbone = backbones.build("deepflow", **TOY, **options)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.2)
    refined = []
    for block in backbone.refiners:
        block.register_forward_hook(lambda _module, _given, out: refined.append(out[1]))
    features, draws = (*encoded(9), *encoded(9, seed=50)), Draws(4).at(range(5))
    objective = objectives.build("deepflow", interpolant=LINEAR, label_dropout=0.0, align=0.6, acceleration=0.0)
    loss = objective(backbone, DATA, draws, label=LABEL, features=features)
    found = torch.zeros(5)
    assert len(refined) == 2
    for cut in range(2):
        for encoder in range(2):
            first, _, second, _, third = backbone.projectors[cut][encoder]
            y = functional.silu(refined[cut] @ first.weight.T + first.bias)
            y = functional.silu(y @ second.weight.T + second.bias) @ third.weight.T + third.bias
            for token in range(TOKENS):
                found -= cosine_by_hand(y[:, token], features[encoder][:, token]) / (2 * 2 * TOKENS)
    assert torch.allclose(loss.terms["align"], found, atol=1e-5)
    deep = loss.terms["deep"]
    assert torch.allclose(loss.total, (deep + 0.6 * found).mean(), atol=1e-5)
    swapped = objective(backbone, DATA, draws, label=LABEL, features=features[::-1]).terms["align"]
    assert float((swapped - found).detach().abs().min()) > 1e-4
