"""Objectives on what they must minimise, what they must not depend on, and equalities that hold in expectation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pathline import Draws, Flow, InputError, backbones, interpolants, objectives
from pathline.interpolants import couplings
from pathline.objectives import times
from pathline.testing import GaussianMixture, check_objective

MIXTURE = GaussianMixture([[1.0, -1.0], [-2.0, 0.5]], [0.5, 0.3])
LINEAR = interpolants.build("linear")
PATHS = [interpolants.build(name) for name in ("linear", "trigonometric", "vp", "polynomial", "linear-vp", "two-ended")]
LATENT = [interpolants.build("bridge", scale=0.7), interpolants.build("stochastic", gamma="sine-squared")]


def build(name, path=LINEAR, **options):
    return objectives.build(name, interpolant=path, **{"coupling": "independent", **options})


def kinds(path):
    if path.latent_noise:
        return ["velocity", "drift", "noise", "score"]
    return ["velocity", "noise", "data"] + ([] if type(path).__name__ == "TwoEnded" else ["score"])


CASES = [(path, kind) for path in (*PATHS, *LATENT) for kind in kinds(path)]


@pytest.mark.parametrize(("path", "kind"), CASES, ids=[f"{type(p).__name__}-{k}" for p, k in CASES])
def test_the_truth_is_the_minimum(path, kind):
    """The exact prediction of a mixture beats those around it, on every path and for every kind."""
    options = {"interval": (0.05, 0.95)}  # the same networks at all times: no end dominates
    exact = MIXTURE.backbone(path, kind)
    check_objective(build(kind, path, **options), exact=exact, data=MIXTURE)
    if kind in ("velocity", "data", "drift"):
        check_objective(build(kind, path, cosine=0.5, **options), data=MIXTURE)
    assert build(kind, path, **options).predicts == kind


@pytest.mark.parametrize(("path", "kind"), CASES, ids=[f"{type(p).__name__}-{k}" for p, k in CASES])
def test_losses_by_hand(path, kind):
    """Times, noise, latent noise and target written out from the definitions."""
    data, draws = torch.randn(5, 3), Draws(3).at(range(10, 15))
    loss = build(kind, path)(backbones.wrap(lambda x, t: 0.7 * x + t[:, None]), data, draws)
    low, high = path.training_interval(kind)
    t = low + (high - low) * draws.uniform("time")
    noise, z = draws.normal("noise", (3,)), draws.normal("latent", (3,))
    alpha, sigma, alpha_rate, sigma_rate = (c[:, None] for c in path.evaluate(t))
    x, drift = alpha * data + sigma * noise, alpha_rate * data + sigma_rate * noise
    velocity, spread = drift, sigma
    if path.latent_noise:
        gamma, rate = (c[:, None] for c in path.latent(t))
        x, velocity, noise, spread = x + gamma * z, drift + rate * z, z, gamma
    prediction = 0.7 * x + t[:, None]
    target = {"velocity": velocity, "drift": drift, "noise": noise, "data": data, "score": -noise}[kind]
    error = ((prediction * (spread if kind == "score" else 1) - target) ** 2).mean(1)
    assert torch.allclose(loss.terms[kind], error, rtol=1e-4)
    assert torch.allclose(loss.total, error.mean(), rtol=1e-4) and torch.allclose(loss.times, t)


def test_a_model_of_any_prediction_samples_with_flow():
    for kind in ("velocity", "noise", "data", "score"):
        flow = Flow(MIXTURE.backbone(LINEAR, kind), LINEAR, build(kind).predicts)
        x, t = torch.randn(4, 2), torch.tensor([0.2, 0.4, 0.6, 0.8])
        assert torch.allclose(flow(x, t).velocity, MIXTURE.value("velocity", x, t, LINEAR), atol=1e-4)


@pytest.mark.parametrize("kind", ["noise", "data", "score"])
@pytest.mark.parametrize("path", PATHS[:5], ids=lambda path: type(path).__name__)
def test_velocity_weighting_gives_the_velocity_loss(kind, path):
    """The same network, read as each prediction: with the weighting ``velocity`` all have the loss of its velocity."""
    data, noise = torch.randn(2, 6, 3, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    x, velocity = path.interpolate(data, noise, t), torch.randn(6, 3, dtype=torch.float64)
    converted = path.convert(velocity, x, t, source="velocity", target=kind)
    weighted = build(kind, path, weighting="velocity", interval=(0.05, 0.95)).terms(converted, data, noise, t)[kind]
    assert torch.allclose(weighted, build("velocity", path).terms(velocity, data, noise, t)["velocity"], rtol=1e-8)


def test_huber_and_cosine():
    data, draws = torch.randn(5, 3, 2), Draws(3).at(range(5))
    backbone = backbones.wrap(lambda x, t: 0.7 * x)
    t, noise = draws.uniform("time"), draws.normal("noise", (3, 2))
    prediction = 0.7 * LINEAR.interpolate(data, noise, t)
    target = noise - data
    for delta in (None, 0.3):
        d, e = delta or 1.0, (prediction - target).abs()
        huber = torch.where(e <= d, 0.5 * e**2, d * (e - 0.5 * d)).mean((1, 2))
        loss = build("velocity", loss="huber", delta=delta)(backbone, data, draws)
        assert torch.allclose(loss.terms["velocity"], huber)
        assert torch.allclose(loss.details["velocity"], ((prediction - target) ** 2).mean((1, 2)))  # plain, for the log
    loss = build("velocity", cosine=0.4)(backbone, data, draws)
    a, b = prediction.flatten(1), target.flatten(1)
    cosine = 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    assert torch.allclose(loss.terms["cosine"], cosine, atol=1e-6)
    assert torch.allclose(loss.total, (loss.terms["velocity"] + 0.4 * cosine).mean())


LAWS = [
    "uniform",
    {"name": "logit-normal", "mean": 0.3},
    {"name": "u-shaped", "a": 2.0},
    {"name": "mode", "scale": 1.0},
]


@pytest.mark.parametrize("drawn", LAWS[:1] + LAWS[2:], ids=lambda law: law if isinstance(law, str) else law["name"])
@pytest.mark.parametrize("wanted", LAWS, ids=lambda law: law if isinstance(law, str) else law["name"])
def test_a_law_traded_for_a_weight_has_the_same_expectation(drawn, wanted):
    """Monte Carlo, within four standard errors: drawing by one law with weights is drawing by the other."""
    count = 200_000
    data, _ = MIXTURE.sample(count, seed=4)
    network = backbones.wrap(lambda x, t: 0.5 * x - t[:, None])
    traded = build("velocity", times=drawn, wanted_times=wanted)(network, data, Draws(1).at(range(count)))
    direct = build("velocity", times=wanted)(network, data, Draws(2).at(range(count)))
    first, second = (loss.terms["velocity"].double().numpy() for loss in (traded, direct))
    margin = 4 * math.sqrt((first.var() + second.var()) / count)
    assert abs(first.mean() - second.mean()) < margin
    weights = build("velocity", times=drawn, wanted_times=wanted).draw_times(Draws(5).at(range(count)))[1].numpy()
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(count) + 1e-6


def test_a_traded_law_by_quadrature():
    """E_wanted[f] = E_drawn[w·f] to six digits, without any draws."""
    drawn, wanted = times.build("u-shaped", a=2.0), times.build("logit-normal", mean=0.5)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    t = torch.from_numpy(0.5 + 0.5 * nodes)
    ratio = wanted.density(t) / drawn.density(t)
    for f in (torch.sin(3 * t), t**2, torch.exp(-t)):
        left = float((wanted.density(t) * f * torch.from_numpy(weights)).sum() / 2)
        right = float((drawn.density(t) * ratio * f * torch.from_numpy(weights)).sum() / 2)
        u = torch.from_numpy(0.5 + 0.5 * nodes)
        by_quantile = float((f.new_tensor(np.interp(wanted.quantile(u), t, f)) * torch.from_numpy(weights)).sum() / 2)
        assert left == pytest.approx(right, rel=1e-9) and left == pytest.approx(by_quantile, abs=1e-4)


def test_times_keep_to_their_interval():
    objective = build("velocity", interval=(0.2, 0.6), times="logit-normal")
    t, _ = objective.draw_times(Draws(0).at(range(10_000)))
    assert 0.2 <= float(t.min()) < 0.25 and 0.55 < float(t.max()) <= 0.6
    vp = build("velocity", interpolants.build("vp"))
    assert float(vp.draw_times(Draws(0).at(range(1000)))[0].min()) >= 1e-5
    bound = build("velocity", interpolants.build("vp"), times="lognormal").times
    assert type(bound.interpolant).__name__ == "VariancePreserving"


@pytest.mark.parametrize("drawn", [{"name": "logit-normal"}, {"name": "lognormal", "mean": -0.4}, "cosmap"], ids=str)
def test_a_traded_law_of_unbounded_density_ratio_is_taken(drawn):
    """Laws that vanish at an end can stand for the uniform one; what they miss is what no draw can reach."""
    objective = build("velocity", times=drawn, wanted_times="uniform")
    t, weights = objective.draw_times(Draws(5).at(range(200_000)))
    inside = (t > 0.05) & (t < 0.95)
    share = (weights * inside).double()
    assert abs(float(share.mean()) - 0.9) < 4 * float(share.std()) / math.sqrt(len(t))


# --- couplings and sources -------------------------------------------------------------------------------------------


class Listener(torch.nn.Module):
    """Remembers x and t; predicts zeros."""

    num_classes, null_label = 3, 3

    def forward(self, x, t, label=None):
        self.x, self.t, self.label = x, t, label
        return torch.zeros_like(x)


@pytest.mark.parametrize("name", ["exact", "class-conditional", "partial", "sinkhorn"])
@pytest.mark.parametrize("objective", ["velocity", "contrastive", "deepflow"])
def test_noise_is_reordered_and_data_stay(name, objective):
    """What the network sees is α·data + σ·noise[indices], with the coupling's own indices; data and labels stay."""
    if objective == "deepflow":
        pytest.importorskip("pathline.plugins.deepflow")
    data, label, draws = torch.randn(9, 1, 2, 2), torch.arange(9) % 3, Draws(2).at(range(9))
    network = Listener()
    options = {"acceleration": 0.0} if objective == "deepflow" else {}
    if objective == "deepflow":
        network.cuts = ()
        network.forward = lambda x, t, branch_times=(), label=None: _branches(network, x, t, label)
    built = build(objective, coupling=name, label_dropout=0.0, **options)
    built(network, data, draws, label=label)
    noise = draws.normal("noise", (1, 2, 2))
    indices = couplings.build(name).pair(data, noise, label=label, draws=draws).indices
    expected = LINEAR.interpolate(data, noise[indices], network.t)
    assert torch.allclose(network.x, expected) and torch.equal(network.label, label)
    assert sorted(indices.tolist()) == list(range(9)) and indices.tolist() != list(range(9))


def _branches(network, x, t, label):
    from pathline.plugins.deepflow.backbone import Branches

    network.x, network.t, network.label = x, t, label
    return Branches((torch.zeros_like(x),), (), ())


def test_sources_take_the_place_of_noise():
    path = interpolants.build("two-ended")
    data, source, network = torch.randn(4, 3), torch.randn(4, 3) + 5, Listener()
    build("velocity", path)(network, data, Draws(0).at(range(4)), source=source)
    assert torch.allclose(network.x, path.interpolate(data, source, network.t))
    paired = build("velocity", path, coupling="conditional")
    condition = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None]
    paired(network, data, Draws(0).at(range(4)), source=source, coupling_condition=condition)
    indices = couplings.build("conditional").pair(data, source, condition=condition).indices
    assert torch.allclose(network.x, path.interpolate(data, source[indices], network.t))


def test_a_bridge_couples_by_entropy_unless_told_otherwise():
    bridge = interpolants.build("bridge", scale=0.5)
    own = objectives.build("drift", interpolant=bridge).coupling
    assert isinstance(own, couplings.Sinkhorn) and own.regularisation == 0.5 and not own.relative  # C4
    assert isinstance(objectives.build("drift", interpolant=bridge, coupling="exact").coupling, couplings.Exact)
    assert isinstance(objectives.build("velocity", interpolant=LINEAR).coupling, couplings.Independent)


# --- contrastive -----------------------------------------------------------------------------------------------------


def test_contrastive_by_hand():
    data, label, draws, network = torch.randn(9, 3), torch.arange(9) % 3, Draws(3).at(range(9)), Listener()
    for strength in (0.05, 0.4):
        loss = build("contrastive", strength=strength, label_dropout=0.5)(network, data, draws, label=label)
        noise = draws.normal("noise", (3,))
        u = noise - data
        kept = (network.label != 3).float()
        assert 0 < kept.sum() < 9
        contrast = (u.roll(-1, 0) ** 2).mean(1) * kept
        assert torch.allclose(loss.terms["contrast"], contrast, rtol=1e-5)
        assert torch.allclose(loss.total, ((u**2).mean(1) - strength * contrast).mean(), rtol=1e-5)


def test_contrastive_minimum_is_shifted_as_its_docstring_says():
    """(E[u|x] − λ·E[ũ])/(1 − λ), with E[ũ] = −E[data] on the linear path: better than the exact velocity itself."""
    data, _ = MIXTURE.sample(20_000, seed=8)
    draws, mean = Draws(1).at(range(20_000)), -(0.5 * MIXTURE.means.sum(0)).float()

    def shifted(x, t):
        return (MIXTURE.value("velocity", x, t, LINEAR) - 0.3 * mean) / 0.7

    objective = build("contrastive", strength=0.3)
    check_objective(objective, exact=backbones.wrap(shifted), data=MIXTURE)
    best = objective(backbones.wrap(shifted), data, draws).total
    assert float(best) < float(objective(MIXTURE.backbone(LINEAR), data, draws).total)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path", "options", "message"),
    [
        ("velocity", "linear", dict(loss="l1"), "got loss 'l1', expected 'mse' or 'huber'"),
        ("velocity", "linear", dict(delta=0.5), "got delta 0.5 with loss 'mse'; it belongs to 'huber'"),
        ("velocity", "linear", dict(loss="huber", delta=0.0), "got delta 0.0 with loss 'huber'"),
        ("velocity", "linear", dict(cosine=-1), "got cosine -1"),
        ("velocity", "linear", dict(interval=(0.5, 0.2)), "expected .low, high. with 0 <= low < high <= 1"),
        ("velocity", "linear", dict(interval=(0.5,)), "expected .low, high."),
        ("velocity", "linear", dict(interval=0.5), "got interval 0.5, expected .low, high."),
        ("velocity", "linear", dict(interval=(math.nan, 1)), "expected .low, high."),
        ("velocity", "vp", dict(interval=(0.0, 1.0)), "VariancePreserving path has no velocity at one of its ends"),
        ("score", "linear", dict(interval=(0.0, 0.9)), "Linear path has no score at one of its ends"),
        ("velocity", "bridge", dict(interval=(0.1, 1.0)), "Bridge path has no velocity at one of its ends"),
        ("noise", "linear", dict(weighting="velocity"), "infinite at t = 1; keep the objective's interval away"),
        ("velocity", "linear", dict(weighting="sigma-sqrt"), "infinite at t = 0"),
        ("velocity", "bridge", dict(weighting="min-snr"), "weighting on a path with latent noise"),
        (
            "velocity",
            "linear",
            dict(times={"name": "logit-normal", "mean": -30.0, "std": 0.5}, wanted_times="u-shaped"),
            "got times LogitNormal for wanted_times UShaped, with weights of mean .*e.[0-9]+ in 4,096 draws",
        ),
        (
            "velocity",
            "linear",
            dict(times={"name": "logit-normal", "std": 0.01}, wanted_times="uniform"),
            "with weights of mean 0.0[0-9]+ in 4,096 draws, expected about 1",
        ),
        ("drift", "linear", {}, "got the Linear path, without latent noise; use the objective 'velocity'"),
        ("score", "two-ended", {}, "no known score"),
        ("data", "bridge", {}, "got data from a predicted noise on a path with latent noise"),
        ("contrastive", "bridge", {}, "on which the contrastive objective is not defined"),
        ("contrastive", "linear", dict(strength=1.0), "got strength 1.0"),
        ("contrastive", "linear", dict(strength=-0.1), "got strength -0.1"),
    ],
)
def test_bad_options(name, path, options, message):
    with pytest.raises(InputError, match=message):
        build(name, interpolants.build(path), **options)


def test_bad_batches():
    data, draws = torch.randn(4, 2), Draws(0).at(range(4))
    network = backbones.wrap(lambda x, t: x)
    with pytest.raises(InputError, match="got a batch of one"):
        build("contrastive")(network, data[:1], Draws(0).at(range(1)))
    two = build("velocity", interpolants.build("two-ended"))
    with pytest.raises(InputError, match=r"got a source torch.float32 \(3, 2\), expected floats of the data's shape"):
        two(network, data, draws, source=data[:3])
    with pytest.raises(InputError, match="NaN or infinite values in the source"):
        two(network, data, draws, source=data * math.nan)
    with pytest.raises(InputError, match="got a source on the Linear path, whose other end is Gaussian noise"):
        build("velocity")(network, data, draws, source=data)
    blind = {"Independent": "independent", "Exact": "exact", "Partial": "partial", "Sinkhorn": "sinkhorn"}
    for said, coupling in (*blind.items(), ("ClassConditional", "class-conditional")):
        with pytest.raises(InputError, match=f"a coupling_condition for the coupling {said}, which does not use it"):
            build("velocity", coupling=coupling)(network, data, draws, coupling_condition=data)
    inner = {"name": "class-conditional", "within": "conditional"}  # uses both
    paired, label = build("velocity", coupling=inner), torch.tensor([0, 1, 0, 1])
    assert bool(paired(Listener(), data, draws, label=label, coupling_condition=data).total.isfinite())
    with pytest.raises(InputError, match="got no labels for the coupling 'class-conditional'"):
        build("velocity", coupling="class-conditional")(network, data, draws)
    with pytest.raises(InputError, match="the noise objective does not use"):
        build("noise")(network, data, draws, features=(data,))


def test_float32_from_the_error_on():
    for name in ("velocity", "noise", "data", "score", "contrastive"):
        network = backbones.wrap(lambda x, t: (0.5 * x).bfloat16())
        loss = build(name, **({} if name == "contrastive" else {"cosine": 0.1}))(network, torch.randn(4, 6))
        assert loss.total.dtype == torch.float32
        assert all(term.dtype == torch.float32 for term in loss.terms.values())


# --- defects of others that would come back here ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["velocity", "noise", "contrastive", "deepflow"])
def test_times_stay_float32_for_half_precision_data(name):
    """S12: times cast to bf16 have 1,295 values in 10⁵ draws and reach t = 1; ours keep their own precision."""
    network = Listener()
    options = {"acceleration": 0.0} if name == "deepflow" else {}
    if name == "deepflow":
        network.cuts = ()
        network.forward = lambda x, t, branch_times=(), label=None: _branches(network, x, t, label)
    data = torch.zeros(100_000, 1, 1, 1, dtype=torch.bfloat16)
    build(name, **options)(network, data, Draws(0).at(range(100_000)))
    assert network.t.dtype == torch.float32 and len(network.t.unique()) > 90_000 and float(network.t.max()) < 1


def test_times_are_drawn_for_each_sample():
    """L7: one coin for a whole batch would put all times on one side."""
    for law in times.names():
        options = {"shifted": {"shift": 2.0}}.get(law, {})
        t = times.build(law, **options).sample(Draws(0).at(range(64)))
        assert len(t.unique()) > 60 and float(t.max()) - float(t.min()) > 0.3, law


@pytest.mark.parametrize("path", PATHS[:5], ids=lambda path: type(path).__name__)
def test_no_diffusion_is_negative(path):
    """R1: a form copied into the reversed clock without its sign is −0.33, −1, −3 …"""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    from pathline.solvers import diffusions

    for name in diffusions.names():
        squared = diffusions.build(name).squared(t, path)
        assert bool((squared >= 0).all()) and bool(squared.isfinite().all()), name


@pytest.mark.parametrize("shape", [(3,), (3, 2, 5)])
def test_a_network_always_gets_one_time_a_sample(shape):
    """F12: 0-dimensional in sampling and (N,) in training would be two contracts."""
    from pathline import solvers

    seen = []

    def network(x, t):
        seen.append(t.shape)
        return x

    data = torch.randn(4, *shape)
    build("velocity")(backbones.wrap(network), data)
    solvers.build("heun", steps=2)(Flow(backbones.wrap(network), LINEAR), data)
    assert set(seen) == {(4,)}
