"""DeepFlow's options: each changes what it should and nothing else, and only what is asked for is computed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from pathline import InputError, InputTypeError, backbones
from pathline.core.config import resolve
from pathline.plugins.deepflow import Branches, Spoken
from pathline.training.network import units
from pathline.training.optim import matrices_of_blocks

TOY = dict(input_size=4, patch_size=2, in_channels=3, hidden_size=24, depth=5, num_heads=2, num_classes=7)
D, HEADS, CUTS = 24, 2, (1, 3)
REFINERS = {  # refiner -> what its output can be added to
    "vera": (None, "normed-query", "query", "velocity"),
    "addition": (None, "normed-query", "query", "velocity"),
    "acceleration": (None, "velocity"),
    "gap": (None, "velocity"),
    "none": (None,),
}
ACCELERATING = ("vera", "addition", "acceleration")
COMBINATIONS = [(refiner, residual) for refiner, residuals in REFINERS.items() for residual in residuals]


def build(**options):
    if options.get("refiner", "vera") in ACCELERATING:
        options = {"acceleration_width": 10, **options}
    return backbones.build("deepflow", **{**TOY, "cuts": CUTS, **options})


def shuffled(backbone, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return backbone


def called(backbone, *inputs, **options):
    """Return the names of the modules that a call runs, as often as they run."""
    names = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: names.append(name))
        for name, module in backbone.named_modules()
    ]
    backbone(*inputs, **options)
    for hook in hooks:
        hook.remove()
    return names


def shapes(backbone):
    return {name: tuple(value.shape) for name, value in backbone.state_dict().items()}


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(5))
T, LABEL = torch.tensor([0.3, 0.8]), torch.tensor([1, 7])
LATER = (torch.tensor([0.35, 0.6]), torch.tensor([0.5, 0.55]))


# --- the formulas, from the weights alone -------------------------------------------------------------------------


class Formulas:
    """What the branches say, by torch's functions of the weights; the trunk's own parts are taken as they are."""

    def __init__(self, backbone, refiner, residual, gap_scale=1.0, clamp=False, shared=True):
        self.backbone, self.refiner, self.residual = backbone, refiner, residual
        self.gap_scale, self.clamp, self.shared = gap_scale, clamp, shared
        self.w = backbone.state_dict()

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def embedded(self, gap):
        angles = (
            self.gap_scale * gap[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
        )
        hidden = self.linear("gap.hidden", torch.cat((angles.cos(), angles.sin()), 1).to(gap))
        return self.linear("gap.output", hidden * hidden.sigmoid())

    def accelerated(self, i, h):
        layers = sorted(
            int(key.split(".")[3]) for key in self.w if f"refiners.{i}.acceleration" in key and "weight" in key
        )
        for layer in layers:
            h = self.linear(f"refiners.{i}.acceleration.{layer}", h)
            h = h * h.sigmoid() if layer != layers[-1] else h
        return h

    def modulated(self, i, u, g):
        shift, scale = self.linear(f"refiners.{i}.gap_modulation.modulation.linear", g * g.sigmoid()).chunk(2, 1)
        scale = scale.clip(-5, 5) if self.clamp else scale
        return functional.layer_norm(u, u.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def merged(self, i, u, g):
        hidden = self.linear(f"refiners.{i}.gap_modulation.mlp.hidden", self.modulated(i, u, g))
        return self.linear(f"refiners.{i}.gap_modulation.mlp.output", functional.gelu(hidden, approximate="tanh"))

    def crossed(self, i, s, m):
        """Return the normed query, and torch's own multi-head attention to m, batch second."""
        name = f"refiners.{i}.cross_space"
        q, kv = (
            functional.layer_norm(x, (D,), self.w[f"{name}.norm.weight"], self.w[f"{name}.norm.bias"]) for x in (s, m)
        )
        attended, _ = functional.multi_head_attention_forward(
            *(x.transpose(0, 1) for x in (q, kv, kv)), D, HEADS,
            self.w[f"{name}.query_key_value.weight"], self.w[f"{name}.query_key_value.bias"], None, None, False, 0.0,
            self.w[f"{name}.output.weight"], self.w[f"{name}.output.bias"],
        )  # fmt: skip
        return q, attended.transpose(0, 1)

    def refined(self, i, h, s, gap):
        if self.refiner == "none":
            return None, h
        g, a = self.embedded(gap), self.accelerated(i, h) if self.refiner in ACCELERATING else None
        if self.refiner == "gap":
            out = self.merged(i, h, g)
        elif self.refiner == "addition":
            out = h + self.modulated(i, a, g)
        else:
            out = self.merged(i, torch.cat((h, a), -1), g)
        if self.refiner in ("vera", "addition"):
            query, attended = self.crossed(i, s, out)
            return a, attended + {None: query, "normed-query": query, "query": s, "velocity": h}[self.residual]
        return a, out if self.residual is None else h + out

    def read(self, name, i, tokens, c):
        name = name if self.shared else f"{name}s.{i}"
        shift, scale = self.linear(f"{name}.modulation.linear", c * c.sigmoid()).chunk(2, 1)
        normed = functional.layer_norm(tokens, (D,), eps=1e-6)
        return self.backbone.trunk.unpatchify(
            self.linear(f"{name}.linear", normed * (1 + scale[:, None]) + shift[:, None])
        )

    def __call__(self, x, times, label):
        trunk, velocities, accelerations = self.backbone.trunk, [], []
        h = s = trunk.embed(x)
        for number, block in enumerate(trunk.blocks, start=1):
            i = sum(cut < number for cut in CUTS)
            c = trunk.condition(times[i], label=label)
            h, _ = block(h, None, c)
            if number in CUTS:
                velocities.append(self.read("middle_head", i, h, c))
                a, h = self.refined(i, h, s, times[i + 1] - times[i])
                accelerations += [] if a is None else [self.read("acceleration_head", i, a, c)]
        return Branches((*velocities, trunk.unpatchify(trunk.head(h, c))), tuple(accelerations), ())


def check_formulas(refiner, residual, formulas=None, **options):
    backbone = shuffled(build(refiner=refiner, residual=residual, **options)).double()
    times = [t.double() for t in (T, *LATER)]
    out = backbone(X.double(), times[0], label=LABEL, branch_times=times[1:])
    wanted = Formulas(backbone, refiner, residual, **(formulas or {}))(X.double(), times, LABEL)
    assert len(out.velocities) == 3 and len(out.accelerations) == (2 if refiner in ACCELERATING else 0)
    for ours, theirs in zip((*out.velocities, *out.accelerations), (*wanted[0], *wanted[1]), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("refiner", "residual"), COMBINATIONS)
def test_refiners_by_their_formulas(refiner, residual):
    check_formulas(refiner, residual)


@pytest.mark.parametrize("refiner", REFINERS)
def test_other_options_by_their_formulas(refiner):
    check_formulas(refiner, None, {"shared": False}, shared_heads=False)
    if refiner != "none":
        check_formulas(refiner, None, {"gap_scale": 50.0}, gap_scale=50.0)
        check_formulas(refiner, None, {"clamp": True}, clamp_gap=True)
    if refiner in ACCELERATING:
        check_formulas(refiner, None, acceleration_width=(9,))
        check_formulas(refiner, None, acceleration_width=[9, 5])


def test_the_formulas_see_a_difference():
    for refiner, residual, formulas in (
        ("vera", "query", {}),
        ("vera", None, {"gap_scale": 2.0}),
        ("addition", None, {"clamp": True}),
    ):
        backbone = shuffled(build(refiner=refiner)).double()
        times = [t.double() for t in (T, *LATER)]
        out = backbone(X.double(), times[0], label=LABEL, branch_times=times[1:])
        other = Formulas(backbone, refiner, residual, **formulas)(X.double(), times, LABEL)
        assert torch.allclose(out.velocities[0], other.velocities[0])
        assert not torch.allclose(out.velocities[-1], other.velocities[-1], atol=1e-4)


def test_the_scale_of_time():
    """Features of scale·t are those of a raw time that is that much longer; the gap's are left alone."""
    for name, cuts in (("sit", {}), ("deepflow", {"cuts": CUTS, "acceleration_width": 10})):
        scaled, raw = (shuffled(backbones.build(name, **TOY, **cuts, time_scale=s)) for s in (1000.0, 1.0))
        assert torch.allclose(scaled(X, T, label=LABEL), raw(X, T * 1000, label=LABEL), atol=1e-5)
        assert not torch.allclose(scaled(X, T, label=LABEL), raw(X, T, label=LABEL), atol=1e-2)
    check_formulas(
        "vera", None, time_scale=3.0
    )  # the trunk's condition is scaled there, the gap in the formulas is not


# --- what an option adds, and what it leaves ----------------------------------------------------------------------


def test_what_each_option_adds_to_the_state():
    plain = shapes(build())
    refined = {key for key in plain if key.startswith("refiners.")}
    for unchanged in ({"residual": "query"}, {"residual": "velocity", "zero_output": True}, {"gap_scale": 7.0}):
        assert shapes(build(**unchanged)) == plain
    assert shapes(build(time_scale=9.0)) == shapes(build(clamp_gap=True)) == plain
    separate = shapes(build(shared_heads=False))
    heads = {"middle_head": "middle_heads", "acceleration_head": "acceleration_heads"}
    for one, several in heads.items():
        for key in [key for key in plain if key.startswith(f"{one}.")]:
            rest = key.removeprefix(one)
            assert [separate.pop(f"{several}.{i}{rest}") for i in range(2)] == [plain[key]] * 2
    assert separate == {key: shape for key, shape in plain.items() if not key.startswith(tuple(f"{h}." for h in heads))}
    shallow = shapes(build(acceleration_width=(9,)))
    assert shallow["refiners.1.acceleration.0.weight"] == (9, D) and shallow["refiners.1.acceleration.2.bias"] == (D,)
    assert {key for key in plain if plain[key] != shallow.get(key)} == {key for key in plain if ".acceleration." in key}
    without = shapes(build(refiner="acceleration"))
    assert without == {key: shape for key, shape in plain.items() if "cross_space" not in key}
    added = shapes(build(refiner="addition"))
    assert {key for key in plain if key not in added} == {key for key in refined if "gap_modulation.mlp" in key}
    assert {key for key in added if added[key] != plain[key]} == {
        *(f"gap.{layer}.{kind}" for layer in ("hidden", "output") for kind in ("weight", "bias")),
        *(f"refiners.{i}.gap_modulation.modulation.linear.{kind}" for i in range(2) for kind in ("weight", "bias")),
    }
    gap = shapes(build(refiner="gap"))
    gone = ("cross_space", ".acceleration.", "acceleration_head")
    assert set(gap) == {key for key in plain if not any(word in key for word in gone)}
    assert gap["gap.output.weight"] == (D, D) and gap["refiners.0.gap_modulation.mlp.hidden.weight"] == (D, D)
    none = shapes(build(refiner="none"))
    assert none == {k: s for k, s in plain.items() if not k.startswith(("refiners", "gap", "acceleration_head"))}


def test_first_weights_are_drawn_in_the_same_order_as_ever():
    """Trunk, the two heads, gap embedder, refiners: with torch's own layers, each drawn as torch draws it."""

    def linear(entering, leaving, then=None):
        layer = nn.Linear(entering, leaving)  # draws, whatever follows
        if then is not None:
            then(layer.weight)
        return layer

    torch.manual_seed(3)
    trunk, wanted = backbones.build("sit", **TOY), {}
    for name in ("middle_head", "acceleration_head"):
        wanted |= {f"{name}.modulation.linear": linear(D, 2 * D, nn.init.zeros_)}
        wanted |= {f"{name}.linear": linear(D, 12, nn.init.zeros_)}

    def drawn(prefix, sizes, law):
        layers = {f"{prefix}{name}": linear(*size) for name, size in sizes.items()}
        for layer in layers.values():
            law(layer.weight)
        return layers

    def normal(weight):
        return nn.init.normal_(weight, std=0.02)

    xavier = nn.init.xavier_uniform_
    wanted |= drawn("gap.", {"hidden": (256, 2 * D), "output": (2 * D, 2 * D)}, normal)
    for i in range(2):
        wanted |= drawn(f"refiners.{i}.acceleration.", {0: (D, 10), 2: (10, 20), 4: (20, 10), 6: (10, D)}, xavier)
        wanted |= drawn(f"refiners.{i}.gap_modulation.modulation.", {"linear": (2 * D, 4 * D)}, nn.init.zeros_)
        wanted |= drawn(f"refiners.{i}.gap_modulation.mlp.", {"hidden": (2 * D, 2 * D), "output": (2 * D, D)}, xavier)
        wanted |= drawn(f"refiners.{i}.cross_space.", {"query_key_value": (D, 3 * D), "output": (D, D)}, xavier)
    for options in ({}, {"residual": "query"}, {"residual": "velocity", "zero_output": True}, {"gap_scale": 7.0}):
        torch.manual_seed(3)
        state = build(**options).state_dict()
        for key, value in trunk.state_dict().items():
            assert torch.equal(state[f"trunk.{key}"], value)
        for name, layer in wanted.items():
            zero = "zero_output" in options and name.endswith("cross_space.output")
            assert torch.equal(state[f"{name}.weight"], layer.weight * (0 if zero else 1)), name
            assert not state[f"{name}.bias"].any()


@pytest.mark.parametrize(("refiner", "residual"), COMBINATIONS)
def test_a_zero_output_passes_its_residual_on(refiner, residual):
    if refiner == "none":
        plain = shuffled(build(refiner="none"))
        assert torch.equal(plain(X, T, label=LABEL), plain.trunk(X, T, label=LABEL))
        return
    if residual is None and refiner in ("gap", "acceleration"):
        return  # refused, see below
    backbone = build(refiner=refiner, residual=residual, zero_output=True)
    h, s, g = torch.randn(2, 5, D), torch.randn(2, 5, D), torch.randn(2, backbone.gap.output.out_features)
    kept = {"velocity": h, "query": s}.get(residual, functional.layer_norm(s, (D,)))
    assert torch.allclose(backbone.refiners[1](h, s, g)[1], kept, atol=1e-6)
    if residual == "velocity":
        shuffled(backbone.trunk)
        assert torch.equal(backbone(X, T, label=LABEL), backbone.trunk(X, T, label=LABEL))


# rung of the ladder on the digits: its number of parameters, counted in another program
LADDER = [
    (dict(branches=1), 328964),
    (dict(refiner="none"), 337544),
    (dict(refiner="gap"), 374792),
    (dict(refiner="acceleration", acceleration_width=64), 478220),
    (dict(acceleration_width=64), 494988),
]


@pytest.mark.parametrize(("options", "parameters"), LADDER)
def test_parameters_of_the_ladder(options, parameters):
    sizes = dict(input_size=8, in_channels=1, hidden_size=64, depth=4, num_heads=4, num_classes=10)
    backbone = backbones.build("deepflow", **sizes, **options)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == parameters


@pytest.mark.parametrize(("refiner", "residual"), COMBINATIONS)
@pytest.mark.parametrize("shared", [True, False])
def test_every_parameter_has_a_gradient(refiner, residual, shared):
    """Data parallelism waits for all of them."""
    backbone = shuffled(build(refiner=refiner, residual=residual, shared_heads=shared, align_dims=(5,), align_width=6))
    out = backbone(X, T, label=LABEL, branch_times=LATER)
    said = (*out.velocities, *out.accelerations, *(f for features in out.features for f in features))
    sum(tensor.square().sum() for tensor in said).backward()
    assert not [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]


def test_heads_are_no_blocks_in_training():
    """Separate heads are compiled, sharded and orthogonalised like shared ones: not by themselves."""
    for shared in (True, False):
        backbone = build(shared_heads=shared, align_dims=(5,), align_width=6)
        assert units(backbone) == [*backbone.trunk.blocks, *backbone.refiners, *(p[0] for p in backbone.projectors)]
        weights = matrices_of_blocks(backbone)
        named = {name for name, parameter in backbone.named_parameters() if parameter in weights}
        assert named == {
            name for name, p in backbone.named_parameters()
            if p.ndim == 2 and name.startswith(("trunk.blocks.", "refiners.", "projectors."))
        }  # fmt: skip


def test_a_configuration_can_name_every_option():
    options = dict(refiner="addition", residual="velocity", zero_output=True, acceleration_width=[9])
    options |= dict(shared_heads=False, gap_scale=1e3, time_scale=1000, cuts=[1, 3])
    sizes = {key: value for key, value in TOY.items() if key not in ("num_classes", "input_size")}
    given = {"data": "digits", "backbone": {"name": "deepflow", **sizes, **options}, "objective": "deepflow"}
    resolved = resolve({**given, "train": {"steps": 1, "folder": "."}}).backbone
    assert {key: resolved[key] for key in options} == options


# --- who speaks ---------------------------------------------------------------------------------------------------


def test_depth_and_blocks_of_a_branch():
    backbone = build()
    assert (backbone.depth, backbone.branch_count, backbone.align_dims) == (5, 3, ())
    assert [backbone.blocks_until(branch) for branch in (1, 2, 3)] == [1, 3, 5]
    assert build(align_dims=[5, 9]).align_dims == (5, 9) and build(cuts=()).align_dims == ()
    assert backbones.build("sit", **TOY).depth == build(cuts=()).blocks_until(1) == 5
    assert backbones.build("mlp", dim=2, depth=4).depth is None and backbones.wrap(lambda x, t: x).depth is None
    for refiner in REFINERS:
        made = build(refiner=refiner)
        assert made.refiner == refiner and made.has_acceleration == (refiner in ACCELERATING)
    assert not build(cuts=()).has_acceleration
    for branch in (0, 4, -1, 1.5):
        with pytest.raises(InputError, match=r"expected ascending, distinct branches of 1 … 3"):
            backbone.blocks_until(branch)


@pytest.mark.parametrize(("refiner", "residual"), COMBINATIONS)
def test_who_is_asked_says_the_same_as_among_all(refiner, residual):
    backbone = shuffled(build(refiner=refiner, residual=residual))
    last = backbone(X, T, label=LABEL, spoken=Spoken(velocities=(3,)))
    assert last == Branches((last.velocities[0],), (), ()) and torch.equal(
        last.velocities[0], backbone(X, T, label=LABEL)
    )
    some = [Spoken((1,)), Spoken((2, 3)), Spoken((1, 2, 3))]
    if refiner in ACCELERATING:
        some += [Spoken((), (1,)), Spoken((), (1, 2)), Spoken((1,), (2,)), Spoken((3,), (2,)), Spoken((1, 3), (1,))]
    for times, given in (((T, T), {}), (LATER, {"branch_times": LATER})):
        everything = backbone(X, T, label=LABEL, branch_times=times)
        for spoken in some:
            out = backbone(X, T, label=LABEL, spoken=spoken, **given)
            assert out.features == () and len(out.velocities) == len(spoken.velocities)
            for branch, velocity in zip(spoken.velocities, out.velocities, strict=True):
                assert torch.equal(velocity, everything.velocities[branch - 1])
            for branch, acceleration in zip(spoken.accelerations, out.accelerations, strict=True):
                assert torch.equal(acceleration, everything.accelerations[branch - 1])


@pytest.mark.parametrize(
    ("spoken", "blocks", "refiners", "heads"),
    [
        (Spoken((1,)), 1, (), ["middle_head"]),
        (Spoken((2,)), 3, (0,), ["middle_head"]),
        (Spoken((3,)), 5, (0, 1), ["trunk.head"]),
        (Spoken((1, 3)), 5, (0, 1), ["middle_head", "trunk.head"]),
        (Spoken((3,), (2,)), 5, (0, 1), ["acceleration_head", "trunk.head"]),
        (Spoken((2,), (1,)), 3, (0,), ["acceleration_head", "middle_head"]),
    ],
)
def test_only_what_is_asked_for_runs(spoken, blocks, refiners, heads):
    backbone = shuffled(build(align_dims=(5,), align_width=6))
    names = called(backbone, X, T, label=LABEL, spoken=spoken)
    assert [n for n in names if n.startswith("trunk.blocks.") and n.count(".") == 2] == [
        f"trunk.blocks.{i}" for i in range(blocks)
    ]
    assert [name for name in names if name.startswith("refiners.") and name.count(".") == 1] == [
        f"refiners.{i}" for i in refiners
    ]
    assert [name for name in names if name.endswith("_head") or name == "trunk.head"] == heads
    assert names.count("gap") == min(1, len(refiners)) and names.count("trunk.time") == 1
    assert not [name for name in names if name.startswith("projectors")]


def test_an_acceleration_alone_needs_neither_gap_nor_attention():
    backbone = shuffled(build())
    names = called(backbone, X, T, label=LABEL, spoken=Spoken(accelerations=(1,)))
    assert "refiners.0.acceleration" in names and "acceleration_head" in names
    assert not [name for name in names if "gap" in name or "cross_space" in name or name.startswith("trunk.blocks.1")]


def test_a_gap_of_zero_is_embedded_once():
    backbone = shuffled(build(cuts=(1, 2, 4)))
    assert called(backbone, X, T, label=LABEL).count("gap") == 1
    assert called(backbone, X, T, label=LABEL, branch_times=(T, T, T)).count("gap") == 3


@pytest.mark.parametrize("refiner", REFINERS)
def test_no_norm_is_taken_twice(refiner):
    """One norm of each kind a block and a head, and two of the cross-space attention's: of query and of features."""
    backbone = shuffled(build(refiner=refiner))
    names = called(backbone, X, T, label=LABEL)
    crossing = 2 if refiner in ("vera", "addition") else 0
    assert len([name for name in names if name.endswith("norm")]) == 2 * 5 + 1 + (refiner != "none") * 2 + 2 * crossing


def test_one_branch():
    backbone = shuffled(build(cuts=()))
    out = backbone(X, T, label=LABEL, spoken=Spoken((1,)))
    assert torch.equal(out.velocities[0], backbone(X, T, label=LABEL))
    with pytest.raises(InputError, match=r"got accelerations \(1,\) in spoken, expected none"):
        backbone(X, T, label=LABEL, spoken=Spoken((1,), (1,)))


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoken", "message"),
    [
        (Spoken(), "got spoken .*, expected at least one branch of 1 … 3"),
        (Spoken((0,)), r"got velocities \(0,\) in spoken, expected ascending, distinct branches of 1 … 3"),
        (Spoken((4,)), r"got velocities \(4,\)"),
        (Spoken((-1,)), r"got velocities \(-1,\)"),
        (Spoken((3, 1)), r"got velocities \(3, 1\)"),
        (Spoken((1, 1)), r"got velocities \(1, 1\)"),
        (Spoken((True,)), r"got velocities \(True,\)"),
        (Spoken((1,), (3,)), r"got accelerations \(3,\) in spoken, expected ascending, distinct branches of 1 … 2"),
        (Spoken((), (2, 1)), r"got accelerations \(2, 1\)"),
    ],
)
def test_branches_that_cannot_speak(spoken, message):
    with pytest.raises(InputError, match=message):
        build()(X, T, label=LABEL, spoken=spoken)


def test_no_acceleration_of_a_refiner_without_one():
    for refiner in ("gap", "none"):
        with pytest.raises(InputError, match=r"got accelerations \(1,\) in spoken, expected none: no branch has one"):
            build(refiner=refiner)(X, T, label=LABEL, spoken=Spoken((3,), (1,)))
    with pytest.raises(InputError, match="got 1 branch times, expected 2"):
        build()(X, T, label=LABEL, branch_times=(T,), spoken=Spoken((1,)))
    for spoken in ((), (1,), 1):
        with pytest.raises(InputTypeError, match=r"got spoken .*, expected Spoken\(velocities=…, accelerations=…\)"):
            build()(X, T, label=LABEL, spoken=spoken)


def test_the_projectors_width_by_default():
    assert shapes(build(align_dims=(5,))) == shapes(build(align_dims=(5,), align_width=2048))
    assert build(align_dims=(5,)).projectors[1][0][0].out_features == 2048


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(refiner="gap"), "refiner 'gap'"),
        (dict(residual="query"), "residual 'query'"),
        (dict(residual="velocity", zero_output=True), "residual 'velocity', zero_output True"),
        (dict(shared_heads=False), "shared_heads False"),
        (dict(gap_scale=1000.0, clamp_gap=True), "gap_scale 1000.0, clamp_gap True"),
        (dict(align_dims=[5]), r"align_dims \(5,\)"),
    ],
)
def test_options_of_cuts_that_there_are_not(options, named):
    for one in (dict(cuts=()), dict(cuts=None, branches=1)):
        with pytest.raises(InputError, match=f"got {named} for a backbone of one branch, which has no cut; leave out"):
            build(**one, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(refiner="merge"), "got refiner 'merge', expected one of vera, addition, acceleration, gap, none"),
        (
            dict(residual="none"),
            "got residual 'none' for refiner 'vera', expected None or normed-query or query or vel",
        ),
        (dict(refiner="gap", residual="query"), "residual 'query' for refiner 'gap', expected None or velocity"),
        (dict(refiner="acceleration", residual="normed-query"), "expected None or velocity"),
        (dict(refiner="none", residual="velocity"), "residual 'velocity' for refiner 'none', expected None"),
        (dict(refiner="gap", zero_output=True), "got zero_output for refiner 'gap' without a residual"),
        (dict(refiner="acceleration", zero_output=True), "give residual='velocity'"),
        (dict(refiner="none", zero_output=True), "got zero_output for refiner 'none'"),
        (dict(refiner="gap", acceleration_width=10), "got acceleration_width 10 for refiner 'gap', which has no acc"),
        (dict(refiner="none", acceleration_width=[2048]), r"got acceleration_width \[2048\] for refiner 'none'"),
        (dict(refiner="none", clamp_gap=True), "got clamp_gap True and gap_scale 1.0 for refiner 'none'"),
        (dict(refiner="none", gap_scale=2.0), "got clamp_gap False and gap_scale 2.0 for refiner 'none'"),
        (dict(acceleration_width=()), r"got acceleration_width \(\), expected positive numbers"),
        (dict(acceleration_width=(5, 0)), "expected positive numbers"),
        (dict(acceleration_width=(5, 1.5)), "expected positive numbers"),
        *[(dict(acceleration_width=value), f"acceleration_width {value}, expected posi") for value in (20.5, True)],
        (dict(acceleration_width="20"), "got acceleration_width 20, expected positive numbers"),
        (dict(gap_scale="a"), "got gap_scale a, expected a positive finite number"),
        *[(dict(cuts=None, branches=value), f"got branches {value} and depth 5") for value in (5.0, True, "5")],
        (dict(cuts=[1.5]), r"got cuts \(1.5,\), expected ascending, distinct block counts from 1 to 4"),
        (dict(cuts=1.5), "got cuts 1.5, expected a sequence of block counts"),
        (dict(align_dims=384), "align_dims 384; expected positive numbers"),
        (dict(align_dims=[384.5]), r"align_dims \[384.5\]; expected positive numbers"),
        (dict(align_dims=[5], align_width=6.0), r"align_width 6.0, align_dims \[5\]; expected positive numbers"),
        (dict(align_width=77), "got align_width 77 without align_dims, which alone use it; give both or neither"),
        (dict(align_dims=[5], align_layer=2), "got align_layer 2 for a branched backbone, whose projectors stand afte"),
        (dict(align_layer=2), "leave it out and give align_dims alone"),
        *[
            (dict(gap_scale=value), "got gap_scale .*, expected a positive finite number")
            for value in (0, -1, math.inf)
        ],
        *[(dict(time_scale=value), "got time_scale .*, expected a positive finite number") for value in (0, math.nan)],
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)
