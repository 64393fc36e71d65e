from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, distributed
from torch.distributions import MultivariateNormal

from pathline import (
    Flow,
    InputError,
    InputTypeError,
    OpenEndError,
    SolverError,
    UnknownNameError,
    backbones,
    interpolants,
    solvers,
)
from pathline import data as datasets
from pathline.interpolants import Interpolant
from pathline.solvers import guidance
from pathline.solvers.divergence import DivergenceFlow
from pathline.solvers.likelihood import Dequantization, log_likelihood, sharded
from pathline.testing import GaussianMixture

LINEAR = interpolants.build("linear")
EXACTLY = {"name": "dopri5", "rtol": 1e-10, "atol": 1e-10}
TIGHT = {"name": "dopri5", "rtol": 1e-6, "atol": 1e-6}
MIXTURE = GaussianMixture([[1.5, -0.5, 0.0], [-1.0, 1.0, 0.5]], [0.6, 0.4], weights=[0.3, 0.7], labels=[0, 1])


class Rotated(NamedTuple):
    """The exact flow of data N(mean, covariance), neither of which the coordinates' axes know, in any shape."""

    mean: Tensor
    covariance: Tensor
    shape: tuple[int, ...]
    path: Interpolant

    def at(self, t: float) -> tuple[Tensor, Tensor]:
        """Mean and covariance of x_t."""
        alpha, sigma, _, _ = self.path.evaluate(torch.tensor(t, dtype=torch.float64))
        return alpha * self.mean, alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.mean)).double()

    def density(self, x: Tensor, t: float = 0.0) -> Tensor:
        return MultivariateNormal(*self.at(t)).log_prob(x.flatten(1).double())

    def transported(self, x: Tensor, start: float = 0.0) -> Tensor:
        """x_1 of the state at ``start``: m_1 + C_1^½·C_0^(−½)·(x − m_0), since all C_t commute."""
        values, vectors = torch.linalg.eigh(self.covariance)
        alpha, sigma, _, _ = self.path.evaluate(torch.tensor([start, 1.0], dtype=torch.float64))
        scales = (alpha**2 * values[:, None] + sigma**2).sqrt()
        matrix = vectors @ torch.diag(scales[:, 1] / scales[:, 0]) @ vectors.T
        return (alpha[1] * self.mean + (x.flatten(1).double() - alpha[0] * self.mean) @ matrix.T).reshape_as(x)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[α'·data + σ'·noise | x] = α'·m + (α'αΣ + σ'σ)(α²Σ + σ²)⁻¹(x − α·m), by the regression of Gaussians."""
        alpha, sigma, alpha_rate, sigma_rate = (c[:, None, None] for c in self.path.evaluate(t.double()))
        one = torch.eye(len(self.mean)).double()
        joint = alpha_rate * alpha * self.covariance + sigma_rate * sigma * one
        own = alpha**2 * self.covariance + sigma**2 * one
        centred = x.flatten(1).double() - alpha[:, 0] * self.mean
        moved = alpha_rate[:, 0] * self.mean + (joint @ torch.linalg.solve(own, centred[..., None])).squeeze(-1)
        return moved.reshape(x.shape).to(x.dtype)

    def flow(self) -> Flow:
        return Flow(backbones.wrap(self.velocity, input_shape=self.shape), self.path)

    def sample(self, count: int) -> Tensor:
        return MultivariateNormal(self.mean, self.covariance).sample((count,)).reshape(count, *self.shape)


def rotated(shape: tuple[int, ...] = (3,), path: str = "linear") -> Rotated:
    size = math.prod(shape)
    rotation, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    stds = torch.linspace(0.3, 1.4, size, dtype=torch.float64)
    mean = torch.linspace(-1, 1.5, size, dtype=torch.float64)
    return Rotated(mean, rotation @ torch.diag(stds**2) @ rotation.T, shape, interpolants.build(path))


def scaled(rate: float = 0.7, **attributes) -> Flow:
    """dx/dt = rate·x, of divergence rate·D."""
    return Flow(backbones.wrap(lambda x, t: rate * x, **attributes), LINEAR)


def normal(x: Tensor) -> Tensor:
    return torch.distributions.Normal(0, 1).log_prob(x).flatten(1).sum(1)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["linear", "trigonometric"])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 5)])
def test_a_rotated_gaussian_exactly(shape, path):
    truth = rotated(shape, path)
    data = truth.sample(7)
    result = log_likelihood(truth.flow(), data, solver=EXACTLY, exact=True)
    assert torch.allclose(result.log_density, truth.density(data), rtol=0, atol=1e-6)
    assert torch.allclose(result.latent, truth.transported(data), rtol=0, atol=1e-7)
    assert result.latent.shape == (7, *shape) and result.log_density.shape == (7,)
    wanted = -result.log_density / (math.prod(shape) * math.log(2))
    assert torch.allclose(result.bits_per_dimension, wanted, rtol=1e-12)
    assert torch.equal(result.standard_error, torch.zeros(7).double()) and result.dequantization is None


@pytest.mark.parametrize("start", [1e-3, 0.02])
def test_vp_from_a_small_time_on(start):
    """log p_start with the path's own end as prior; with standard normal noise, off by what that end is off."""
    truth = rotated((3,), "vp")
    state = torch.randn(5, 3, dtype=torch.float64)
    solver = {**EXACTLY, "start": start}
    right = log_likelihood(truth.flow(), state, solver=solver, exact=True, prior=lambda x: truth.density(x, 1.0))
    assert torch.allclose(right.log_density, truth.density(state, start), rtol=0, atol=1e-6)
    plain = log_likelihood(truth.flow(), state, solver=solver, exact=True)
    end = truth.transported(state, start)
    off = normal(end) - truth.density(end, 1.0)
    assert torch.allclose(plain.log_density - right.log_density, off, rtol=0, atol=1e-6)
    assert float(off.abs().max()) < 0.1 and float(off.abs().min()) > 1e-5


@pytest.mark.parametrize("path", ["linear", "polynomial"])
def test_a_mixture(path):
    path = interpolants.build(path)
    data = MIXTURE.sample(11, seed=1)[0].double()
    result = log_likelihood(MIXTURE.flow(path), data, solver={**EXACTLY, "rtol": 1e-8}, exact=True)
    assert torch.allclose(result.log_density, MIXTURE.log_density(data, 0.0, path), rtol=0, atol=1e-5)


def ode_solvers():
    for name in solvers.names():
        if name == "taylor":  # needs accelerations, which a flow with divergences does not hand on
            continue
        options = solvers.registry.entry(name).options()
        given = {"steps": 40} if options.get("steps") and name != "ode" else {}
        built = solvers.build(name, **given)
        if built.needs == ("velocity",) and not built.one_way:
            yield pytest.param({"name": name, **given}, id=name)
    for method in ("rk4", "bosh3"):
        yield pytest.param({"name": "ode", "method": method, **({"steps": 40} if method == "rk4" else {})}, id=method)


@pytest.mark.parametrize("solver", [*ode_solvers()])
def test_every_ode_solver_runs_it(solver):
    """Within what its order lets expect, against the closed form."""
    truth = rotated()
    data, flow = truth.sample(5), truth.flow()
    result = log_likelihood(flow, data, solver=solver, exact=True)
    order = solvers.build(solver).order
    tolerance = {1: 0.4, 2: 0.02, 3: 2e-3}.get(order, 2e-4)
    assert torch.allclose(result.log_density, truth.density(data), rtol=0, atol=tolerance)
    assert result.nfe == flow.nfe


def test_the_order_of_a_method_is_kept():
    truth = rotated()
    data = truth.sample(5)
    for name, order in (("euler", 1), ("heun", 2), ("rk4", 4)):
        errors = [
            log_likelihood(truth.flow(), data, solver={"name": name, "steps": steps}, exact=True).log_density
            - truth.density(data)
            for steps in (40, 80)
        ]
        slope = math.log2(float(errors[0].abs().max() / errors[1].abs().max()))
        assert slope == pytest.approx(order, abs=0.2)


def test_conditions_bound_or_given():
    label = torch.tensor([0, 1, 1, 0, 1])
    data = MIXTURE.sample(5, seed=3)[0]
    wanted = MIXTURE.log_density(data.double(), 0.0, LINEAR, label=label)
    flow = MIXTURE.flow(LINEAR)
    given = log_likelihood(flow, data, solver=TIGHT, exact=True, label=label)
    bound = log_likelihood(flow.given(label=label), data, solver=TIGHT, exact=True)
    assert torch.allclose(given.log_density.double(), wanted, rtol=0, atol=1e-4)
    assert torch.equal(given.log_density, bound.log_density)
    with pytest.raises(InputError, match="got label 3"):
        log_likelihood(flow, data, label=label + 2)


def test_a_guided_flow():
    """Velocities a·x with a label and b·x without give (b + w(a − b))·x, of which all is known."""
    backbone = backbones.wrap(
        lambda x, t, label: torch.where(label == 1, -0.4, 0.8)[:, None] * x, num_classes=1, null_label=1
    )
    guided = guidance.build("classifier-free", scale=1.5)(Flow(backbone, LINEAR))
    data, rate = torch.randn(5, 3, dtype=torch.float64), -0.4 + 1.5 * 1.2
    result = log_likelihood(guided, data, solver=EXACTLY, label=torch.zeros(5).long())
    assert torch.allclose(result.latent, math.exp(rate) * data)
    assert torch.allclose(result.log_density, normal(math.exp(rate) * data) + 3 * rate)
    remembering = guidance.build("apg", scale=2.0, momentum=-0.5)(Flow(backbone, LINEAR))
    with pytest.raises(InputError, match="use one without momentum"):
        log_likelihood(remembering, data, label=torch.zeros(5).long())


def test_a_source_that_is_not_noise():
    """Between two data sets p_1 is the source's; the velocity of a plain scaling shows which."""
    path = interpolants.build("two-ended")
    flow, data = Flow(scaled().backbone, path), torch.randn(5, 3, dtype=torch.float64)
    prior = MultivariateNormal(torch.ones(3).double(), 2 * torch.eye(3).double()).log_prob
    result = log_likelihood(flow, data, solver=EXACTLY, prior=prior)
    assert torch.allclose(result.log_density, prior(math.exp(0.7) * data) + 2.1)
    with pytest.raises(InputError, match="flow on the TwoEnded path, whose source may be anything; give its prior"):
        log_likelihood(flow, data)
    with pytest.raises(InputError, match=r"log-densities of shape \(5, 1\) from the prior, expected \(5,\)"):
        log_likelihood(flow, data, prior=lambda x: prior(x)[:, None])


# --- probes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_probes_are_unbiased_with_the_spread_of_theory(probe):
    """The integrated Jacobian of a Gaussian's flow is B = −½·log Σ: Var[εᵀBε] = 2(‖B‖² − Σ B_ii² if ε = ±1)."""
    truth, solver = rotated(), {"name": "rk4", "steps": 10}
    data = truth.sample(1).expand(1000, 3)  # one sample under a thousand ids
    values, vectors = torch.linalg.eigh(truth.covariance)
    b = vectors @ torch.diag(-0.5 * values.log()) @ vectors.T
    variance = float(2 * (b.square().sum() - (b.diagonal().square().sum() if probe == "rademacher" else 0)))
    result = log_likelihood(truth.flow(), data, solver=solver, probes=4, probe=probe, seed=1)
    exact = log_likelihood(truth.flow(), data[:1], solver=solver, exact=True).log_density
    assert abs(float(result.log_density.mean() - exact)) < 4 * math.sqrt(variance / 4000)
    assert float(result.log_density.var()) == pytest.approx(variance / 4, rel=0.15)
    assert float(result.standard_error.square().mean()) == pytest.approx(variance / 4, rel=0.15)


def test_the_standard_error_covers_the_truth():
    """400 samples with 8 probes each: 95 % of Student's t of 7 degrees lie within 2.365."""
    truth = rotated((2, 3, 5))
    data, solver = truth.sample(400).float(), {"name": "rk4", "steps": 5}
    exact = log_likelihood(truth.flow(), data, solver=solver, exact=True).log_density
    result = log_likelihood(truth.flow(), data, solver=solver, probes=8, seed=2)
    z = (result.log_density - exact) / result.standard_error
    assert 0.91 < float((z.abs() < 2.365).float().mean()) < 0.985
    assert abs(float((result.log_density - exact).mean())) < 4 * float(result.standard_error.mean()) / 20


def test_one_probe_has_no_standard_error():
    assert log_likelihood(scaled(), torch.randn(2, 3)).standard_error is None


def test_more_probes_keep_the_first():
    truth = rotated()
    data, solver = truth.sample(5), {"name": "heun", "steps": 3}
    first, second, both = (
        log_likelihood(truth.flow(), data, solver=solver, probes=probes, seed=4).log_density for probes in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, both)
    three = log_likelihood(truth.flow(), data, solver=solver, probes=3, seed=4)
    exact = log_likelihood(truth.flow(), data, solver=solver, exact=True).log_density
    one, two = first - exact, 2 * both - first - exact  # each probe's own deviation
    third = 3 * (three.log_density - exact) - one - two
    assert torch.allclose(torch.stack((one, two, third)).std(0) / math.sqrt(3), three.standard_error)


def test_a_probe_is_held_fixed_so_that_an_adaptive_solver_finishes():
    """With a fresh probe a call the field is no function of time, and no step length is small enough."""
    flow = MIXTURE.flow(LINEAR)
    data = MIXTURE.sample(5)[0]
    plain = solvers.build("dopri5", start=0.0, end=1.0).solve(flow, data).nfe
    for options in ({"probes": 1}, {"probes": 3, "probe": "gaussian"}, {"exact": True}):
        assert log_likelihood(flow, data, **options).nfe < 2 * plain < 200
    used = log_likelihood(flow, data, solver={"name": "ode", "method": "dopri5"}).nfe
    assert used < 200


@pytest.mark.parametrize("solver", [{"name": "heun", "steps": 3}, {"name": "rk4", "steps": 2}, "dopri5"])
@pytest.mark.parametrize("options", [{}, {"probes": 3}, {"exact": True}])
def test_calls_of_the_network_are_the_solvers(solver, options):
    calls = []

    def counted(x, t):
        calls.append(t)
        return -x * t[:, None]

    flow = Flow(backbones.wrap(counted), LINEAR)
    result = log_likelihood(flow, torch.randn(2, 3), solver=solver, **options)
    assert result.nfe == flow.nfe == len(calls)
    if solver != "dopri5":
        assert result.nfe == solvers.build(solver).calls


# --- batches, precision, memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [{"name": "heun", "steps": 5}, TIGHT])
def test_a_sample_has_the_same_value_in_any_batch(solver):
    flow, (data, _) = MIXTURE.flow(LINEAR), MIXTURE.sample(11)
    whole = log_likelihood(flow, data, solver=solver, probes=2, seed=5)
    order = torch.tensor([9, 3, 4, 0, 7])
    part = log_likelihood(flow, data[order], solver=solver, probes=2, seed=5, sample_ids=order)
    for name in ("log_density", "standard_error", "latent", "bits_per_dimension"):
        assert torch.allclose(getattr(part, name), getattr(whole, name)[order], rtol=0, atol=2e-5)
    other = log_likelihood(flow, data[order], solver=solver, probes=2, seed=5)
    assert not torch.allclose(other.log_density, part.log_density, atol=1e-3)


def test_seed_none_follows_torchs_generator():
    flow, (data, _) = MIXTURE.flow(LINEAR), MIXTURE.sample(5)
    torch.manual_seed(3)
    first = log_likelihood(flow, data)
    torch.manual_seed(3)
    again = log_likelihood(flow, data)
    assert first.seed == again.seed and torch.equal(first.log_density, again.log_density)
    assert torch.equal(log_likelihood(flow, data, seed=first.seed).log_density, first.log_density)


@pytest.mark.parametrize("network", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_precisions(dtype, network):
    """The state is float32 or wider, the network in its own precision, data left as they came."""
    backbone = backbones.build("mlp", dim=3, hidden_size=8).to(network)
    seen = []
    backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    data = torch.randn(5, 3).to(dtype)
    before = data.clone()
    result = log_likelihood(Flow(backbone, LINEAR), data, solver={"name": "heun", "steps": 3}, probes=2, seed=0)
    wide = torch.promote_types(dtype, torch.float32)
    for value in (result.log_density, result.latent, result.standard_error, result.bits_per_dimension):
        assert value.dtype == wide and not value.requires_grad and bool(value.isfinite().all())
    assert set(seen) == {network} and torch.equal(data, before)
    reference = log_likelihood(
        Flow(backbone.double(), LINEAR), data.double(), solver={"name": "heun", "steps": 3}, probes=2, seed=0
    )
    tolerance = 0.1 if network == torch.bfloat16 else 2e-5
    assert torch.allclose(result.log_density.double(), reference.log_density, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_any_mode_of_autograd(mode):
    backbone = backbones.build("mlp", dim=3, hidden_size=8, num_classes=2)
    flow, options = Flow(backbone, LINEAR), {"solver": {"name": "heun", "steps": 3}, "seed": 1}
    data = torch.randn(5, 3)
    wanted = log_likelihood(flow, data, label=torch.tensor([0, 1, 1, 0, 1]), **options)
    leaf = data.clone().requires_grad_()
    with mode():
        label = torch.tensor([0, 1, 1, 0, 1])
        for given in (data * 1, leaf):
            result = log_likelihood(flow, given, label=label, **options)
            assert torch.equal(result.log_density, wanted.log_density) and not result.log_density.requires_grad
    assert leaf.grad is None and all(p.grad is None for p in backbone.parameters()) and torch.equal(leaf, data)


def test_transformers_images_and_a_batch_of_none():
    backbone = backbones.build(
        "sit", input_size=4, patch_size=2, in_channels=3, hidden_size=12, depth=2, num_heads=2, num_classes=0
    ).double()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    flow, images = Flow(backbone, LINEAR), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    solver = {"name": "rk4", "steps": 2}
    exact = log_likelihood(flow, images, solver=solver, exact=True).log_density
    step, t = 1e-5, torch.tensor(0.3, dtype=torch.float64)

    def trace_by_differences(x):
        basis = step * torch.eye(48, dtype=torch.float64).reshape(48, 3, 4, 4)
        moved = (flow(x + basis, t).velocity - flow(x - basis, t).velocity) / (2 * step)
        return moved.flatten(1).diagonal().sum()

    augmented = DivergenceFlow(flow, (3, 4, 4), None, False)
    rates = augmented.evaluate(augmented.begun(images), t, {}).velocity[:, -1]
    assert torch.allclose(rates, torch.stack([trace_by_differences(x) for x in images]), rtol=1e-6)
    many = log_likelihood(flow, images, solver=solver, probes=200, seed=0)
    assert bool(((many.log_density - exact).abs() < 4 * many.standard_error).all())
    assert log_likelihood(flow, images[:0], solver=solver).log_density.shape == (0,)
    gradients = log_likelihood(flow, images, solver=solver, gradients=True, seed=0)
    assert len(torch.autograd.grad(gradients.log_density.sum(), [*backbone.parameters()], allow_unused=True)) > 5


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [EXACTLY, {"name": "rk4", "steps": 100}])
@pytest.mark.parametrize("exact", [True, False])
def test_gradients_of_a_gaussian(solver, exact):
    """∇ log p = −Σ⁻¹(x − m), and +Σ⁻¹(x − m) for the mean as a parameter; probes leave both as they are."""
    truth = rotated()
    mean = truth.mean.clone().requires_grad_()
    flow = Flow(backbones.wrap(truth._replace(mean=mean).velocity), LINEAR)
    leaf = truth.sample(5).requires_grad_()
    result = log_likelihood(flow, leaf, solver=solver, exact=exact, gradients=True, seed=0)
    by_data, by_mean = torch.autograd.grad(result.log_density.sum(), (leaf, mean))
    score = -torch.linalg.solve(truth.covariance, (leaf.detach() - truth.mean).T).T
    assert torch.allclose(by_data, score, rtol=0, atol=1e-5)
    assert torch.allclose(by_mean, -score.sum(0), rtol=0, atol=1e-5)


def test_gradients_by_finite_differences():
    """Of a network, for data and parameters alike, in every part of the result."""
    backbone = backbones.build("mlp", dim=3, hidden_size=7).double()
    data, flow = torch.randn(5, 3, dtype=torch.float64), Flow(backbone, LINEAR)
    weight = backbone.hidden[0].weight
    options = {"solver": {"name": "heun", "steps": 3}, "probes": 3, "seed": 1}

    def scalar(data, gradients=False):
        result = log_likelihood(flow, data, gradients=gradients, **options)
        return (result.log_density.sin() + result.standard_error + result.latent.square().sum(1)).sum()

    leaf = data.clone().requires_grad_()
    by_data, by_weight = torch.autograd.grad(scalar(leaf, gradients=True), (leaf, weight))
    by_weight_alone = torch.autograd.grad(scalar(data, gradients=True), weight)[0]
    assert torch.equal(by_weight, by_weight_alone)
    d, e = 1e-6 * torch.randn_like(data), 1e-6 * torch.randn_like(weight)
    wanted = float(scalar(data + d) - scalar(data - d)) / 2
    assert float((by_data * d).sum()) == pytest.approx(wanted, rel=1e-5)
    with torch.no_grad():
        weight += e
        ahead = float(scalar(data))
        weight -= 2 * e
        wanted = (ahead - float(scalar(data))) / 2
    assert float((by_weight * e).sum()) == pytest.approx(wanted, rel=1e-5)


# --- discrete data ---------------------------------------------------------------------------------------------------


def test_a_uniform_density_loses_no_bits():
    """17 levels of one density: each has probability 1/17, log₂ 17 bits, whatever is drawn within its bin."""
    still = Flow(backbones.wrap(lambda x, t: 0 * x), LINEAR)
    levels = torch.arange(17.0).repeat(3)[:50].reshape(5, 2, 5) / 8 - 1
    width = 1 / 8
    total = 17 * width

    def uniform(x):
        assert float(x.abs().max()) <= total / 2
        return torch.full((len(x),), -10 * math.log(total), dtype=x.dtype)

    result = log_likelihood(still, levels, levels=17, prior=uniform, seed=0)
    assert torch.allclose(result.bits_per_dimension, torch.full((5,), math.log2(17)), rtol=1e-6)
    assert result.dequantization == Dequantization(17, (-1.0, 1.0)) and result.dequantization.width == width
    noise = (result.latent - levels) / width
    assert bool((noise.abs() <= 0.5).all()) and 0.4 < float(noise.std() * math.sqrt(12)) < 1.6
    part = log_likelihood(still, levels[3:], levels=17, prior=uniform, seed=0, sample_ids=[3, 4])
    assert torch.equal(part.latent, result.latent[3:])
    assert torch.equal(log_likelihood(still, levels, prior=uniform).latent, levels)


def test_bits_of_a_normal_density_are_near_those_of_its_bins():
    """−log₂ P of 65 levels of a standard normal, by its distribution function; a bin is 1/8 of a deviation wide."""
    still = Flow(backbones.wrap(lambda x, t: 0 * x), LINEAR)
    data = (8 * torch.randn(400, 7, dtype=torch.float64)).round().clamp(-32, 32) / 8
    result = log_likelihood(still, data, levels=65, interval=(-4.0, 4.0), seed=1)
    cdf = torch.distributions.Normal(0, 1).cdf
    exact = -(cdf(data + 1 / 16) - cdf(data - 1 / 16)).log2().mean(1)
    gap = result.bits_per_dimension - exact
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / 20 + 1e-3 and float(gap.std()) < 0.03


def test_noise_fills_the_bins_evenly():
    noised = Dequantization(256).apply(torch.zeros(2000, 5) + 1 / 255, 7, range(2000))
    share = (noised - 1 / 255) * 255 / 2
    assert abs(float(share.mean())) < 0.01 and float(share.var()) == pytest.approx(1 / 12, rel=0.05)


def test_digits_have_seventeen_levels():
    digits = datasets.build("digits", split="all")
    images = digits.batch(range(len(digits)))["data"]
    assert images.unique().numel() == 17
    noised = Dequantization(17).apply(images, 0, range(len(images)))
    assert torch.equal((noised * 8).round().clamp(-8, 8) / 8, images)


def test_values_off_the_levels():
    for data, levels, interval in (
        (torch.tensor([[0.0, 0.05]]), 17, (-1.0, 1.0)),
        (torch.tensor([[1.125, 0.0]]), 17, (-1.0, 1.0)),
        (torch.tensor([[-1.125, 0.0]]), 17, (-1.0, 1.0)),
        (torch.tensor([[0.0, math.nan]]), 17, (-1.0, 1.0)),
        (torch.tensor([[0.0, 0.5]]), 256, (0.0, 255.0)),
    ):
        with pytest.raises(InputError, match=f"expected one of {levels} levels from .* both ends included"):
            log_likelihood(scaled(), data, levels=levels, interval=interval)
    result = log_likelihood(scaled(), torch.arange(256.0)[:, None], levels=256, interval=(0, 255))
    assert result.dequantization.width == 1
    for levels in (1, 2.0, True):
        with pytest.raises(InputError, match="expected a whole number of 2 or more, or None"):
            log_likelihood(scaled(), torch.zeros(2, 3), levels=levels)
    for interval in ((1.0, -1.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(InputError, match="got interval"):
            log_likelihood(scaled(), torch.zeros(2, 3), levels=3, interval=interval)


# --- solvers and their direction -------------------------------------------------------------------------------------


def test_a_solver_that_samples_is_run_backwards():
    """The same steps, from data to noise: on a grid that is not symmetric, too."""
    truth = rotated()
    data = truth.sample(5)
    sampler = solvers.build("heun", steps=7, grid={"name": "shifted", "shift": 3.0})
    forward = solvers.build("heun", steps=7, grid={"name": "custom", "points": sampler.times[::-1]}, start=0.0, end=1.0)
    one, other = (log_likelihood(truth.flow(), data, solver=s, exact=True) for s in (sampler, forward))
    assert torch.equal(one.log_density, other.log_density) and sampler.start == 1.0
    mapped = {"name": "heun", "steps": 7, "grid": {"name": "shifted", "shift": 3.0}, "start": 1.0, "end": 0.0}
    assert torch.equal(log_likelihood(truth.flow(), data, solver=mapped, exact=True).latent, one.latent)
    assert torch.equal(sampler.reversed()(truth.flow(), data), one.latent)


def test_solvers_that_do_not_fit():
    flow, data = scaled(), torch.randn(2, 3)
    for name, options in (("euler-maruyama", {"steps": 3}), ("exponential", {"steps": 3, "eta": 0.0})):
        with pytest.raises(InputError, match="a likelihood needs one for the ODE of a velocity, as 'dopri5' or 'heun'"):
            log_likelihood(flow, data, solver={"name": name, **options})
    for name in ("dpm++", "mean-flow", "churn"):
        with pytest.raises(InputError, match="runs? from noise to data"):
            log_likelihood(flow, data, solver={"name": name, "steps": 3})
    with pytest.raises(InputError, match=r"ends at t = 0.9, expected 1, noise; or give the prior"):
        log_likelihood(flow, data, solver={"name": "heun", "steps": 3, "end": 0.9})
    with pytest.raises(UnknownNameError, match="unknown solver 'dopri6'"):
        log_likelihood(flow, data, solver="dopri6")
    with pytest.raises(InputTypeError, match="got NoneType for a solver"):
        log_likelihood(flow, data, solver=None)
    with pytest.raises(OpenEndError, match="evaluates t = 0, where the VariancePreserving path has no velocity"):
        log_likelihood(Flow(flow.backbone, interpolants.build("vp"), predicts="noise"), data)
    assert flow.nfe == 0


def test_bad_input():
    flow, data = scaled(input_shape=(3,)), torch.randn(2, 3)
    with pytest.raises(InputTypeError, match=r"expected a flow; use Flow\(backbone, interpolant\)"):
        log_likelihood(flow.backbone, data)
    with pytest.raises(InputTypeError, match=r"got data of type torch.int64 .* call data.float\(\)"):
        log_likelihood(flow, data.long())
    with pytest.raises(InputTypeError, match="got data of type list"):
        log_likelihood(flow, [[1.0, 2.0]])
    with pytest.raises(InputError, match=r"got a state of shape \(2, 5\), expected \(N, 3\)"):
        log_likelihood(flow, torch.zeros(2, 5))
    with pytest.raises(InputError, match="NaN or infinite values in the state"):
        log_likelihood(flow, torch.tensor([[1.0, math.nan, 0.0]]))
    with pytest.raises(InputError, match="got 3 sample ids for 2 samples"):
        log_likelihood(flow, data, sample_ids=range(3))
    for probes in (0, 1.5, True):
        with pytest.raises(InputError, match="expected a whole number of 1 or more"):
            log_likelihood(flow, data, probes=probes)
    with pytest.raises(UnknownNameError, match="unknown probe 'rademaker'; did you mean 'rademacher'"):
        log_likelihood(flow, data, probe="rademaker")
    with pytest.raises(InputError, match="3 probes for an exact divergence"):
        log_likelihood(flow, data, probes=3, exact=True)
    with pytest.raises(InputError, match=r"samples of 4100 values, expected at most 4096.*use probes"):
        log_likelihood(scaled(), torch.zeros(1, 4100), exact=True)
    with pytest.raises(InputError, match="got seed -1"):
        log_likelihood(flow, data, seed=-1)
    assert flow.nfe == 0
    detached = Flow(backbones.wrap(lambda x, t: x.detach()), LINEAR)
    with pytest.raises(InputError, match="got a velocity without a graph"):
        log_likelihood(detached, data)
    with pytest.raises(SolverError, match="became NaN or infinite"):
        log_likelihood(
            Flow(backbones.wrap(lambda x, t: x * math.nan), LINEAR), data, solver={"name": "euler", "steps": 2}
        )


# --- inversion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [("heun", {"steps": 40}, 5e-3), ("rk4", {"steps": 40}, 1e-5), ("dopri5", {"rtol": 1e-8, "atol": 1e-8}, 1e-7)],
)
@pytest.mark.parametrize("shape", [(3,), (2, 3, 5)])
def test_data_to_noise_and_back(name, options, tolerance, shape):
    truth = rotated(shape)
    flow, data = truth.flow(), truth.sample(7)
    sampler = solvers.build(name, **options)
    noise = sampler.reversed()(flow, data)
    assert torch.allclose(noise, truth.transported(data), rtol=0, atol=tolerance)
    assert torch.allclose(sampler(flow, noise), data, rtol=0, atol=tolerance)


def test_inverted_data_are_noise():
    """Of 2,000 images the inverse has mean 0 and covariance 1, within four standard errors."""
    truth = rotated((2, 3))
    noise = solvers.build("rk4", steps=20).reversed()(truth.flow(), truth.sample(2000)).flatten(1)
    assert float(noise.mean(0).abs().max()) < 4 / math.sqrt(2000)
    assert float((noise.T.cov() - torch.eye(6)).abs().max()) < 4 * math.sqrt(2 / 2000)


# --- several processes -----------------------------------------------------------------------------------------------


def _process(rank, folder, work):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save(work(rank), folder / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def in_two_processes(folder, work):
    folder.mkdir()
    torch.multiprocessing.start_processes(_process, (folder, work), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_processes_equal_one(tmp_path):
    """For a number of samples that two do not divide, and for one sample alone."""
    flow, data = MIXTURE.flow(LINEAR), MIXTURE.sample(7)[0]
    label = torch.tensor([0, 1, 1, 0, 1, 2, 0])
    ids, strength = torch.tensor([4, 9, 2, 11, 30, 5, 6]), {"probes": 3, "solver": TIGHT}

    def work(rank):
        torch.manual_seed(rank)
        whole = sharded(flow, data, seed=2**64 - 3, sample_ids=ids, label=label, **strength)
        exact = sharded(flow, data[:1], label=label[:1], exact=True, solver=TIGHT)
        return vars(whole), vars(exact), sharded(flow, data, solver={"name": "heun", "steps": 2}, label=label).seed

    (first, first_alone, seed), (second, second_alone, other_seed) = in_two_processes(tmp_path / "both", work)
    wanted = log_likelihood(flow, data, seed=2**64 - 3, sample_ids=ids, label=label, **strength)
    alone = log_likelihood(flow, data[:1], label=label[:1], exact=True, solver=TIGHT)
    for given, truth in ((first, wanted), (second, wanted), (first_alone, alone), (second_alone, alone)):
        for name in ("log_density", "bits_per_dimension", "standard_error", "latent"):
            assert torch.allclose(given[name], getattr(truth, name), rtol=0, atol=2e-5)
        assert given["nfe"] == truth.nfe
    assert first["seed"] == second["seed"] == 2**64 - 3 and seed == other_seed
    assert all(torch.equal(first[name], second[name]) for name in ("log_density", "latent"))


def test_one_failure_ends_both_processes(tmp_path):
    """NaN among the second process's samples: it says so, and the first does not wait for it."""
    data = torch.zeros(5, 3)
    data[4] = math.nan

    def work(rank):
        try:
            sharded(scaled(), data, seed=0)
        except (InputError, SolverError) as error:
            return type(error).__name__, str(error)

    first, second = in_two_processes(tmp_path / "both", work)
    assert first[0] == "SolverError" and "another process" in first[1]
    assert second[0] == "InputError" and "NaN" in second[1]


def test_without_processes_sharded_is_the_plain_one():
    flow, data = MIXTURE.flow(LINEAR), MIXTURE.sample(5)[0]
    assert torch.equal(sharded(flow, data, seed=1).log_density, log_likelihood(flow, data, seed=1).log_density)
    with pytest.raises(InputError, match="use log_likelihood in each process"):
        sharded(flow, data, gradients=True)
