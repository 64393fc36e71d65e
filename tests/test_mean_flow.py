"""MeanFlow against the average velocity of a Gaussian, known in closed form, and on a mixture in two dimensions."""

from __future__ import annotations

import math

import pytest
import torch

from pathline import Draws, Flow, InputError, Rescheduled, backbones, interpolants, objectives, solvers
from pathline.solvers import guidance
from pathline.testing import GaussianMixture, check_backbone, check_objective

LINEAR = interpolants.build("linear")
MEAN, STD = 1.5, 0.4
IMAGES = dict(input_size=4, patch_size=2, in_channels=1, hidden_size=16, num_heads=2, depth=2, num_classes=3)


def moments(path, t):
    at = path.evaluate(t)
    return at.alpha * MEAN, torch.sqrt((at.alpha * STD) ** 2 + at.sigma**2)


def average(path):
    """The exact u of data N(MEAN, STD²): the ODE keeps the standardised state, so x_r is affine in x_t."""

    def u(x, t, gap=None):
        gap = torch.zeros_like(t) if gap is None else gap
        r = t - gap
        (m_t, s_t), (m_r, s_r) = ((c.reshape(-1, 1) for c in moments(path, time)) for time in (t, r))
        x_r = m_r + s_r / s_t * (x - m_t)
        velocity = GaussianMixture([[MEAN]], STD).value("velocity", x, t, path)
        same = (gap < 1e-12).reshape(-1, 1)
        return torch.where(same, velocity, (x - x_r) / torch.where(same, 1.0, gap.reshape(-1, 1)))

    return u


def build(**options):
    return objectives.build("mean-flow", interpolant=options.pop("path", LINEAR), **options)


@pytest.mark.parametrize("path", [LINEAR, interpolants.build("trigonometric")], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("derivative", ["jvp", "finite-difference"])
def test_the_exact_average_is_its_own_target(path, derivative):
    """u = v − (t − r)·du/dt with the flow's own (marginal) velocity v: the identity of the paper, Eq. 6."""
    x, t = torch.randn(7, 1, dtype=torch.float64), torch.linspace(0.3, 0.95, 7, dtype=torch.float64)
    r, exact = t - torch.tensor([0.0, 0.05, 0.1, 0.2, 0.25, 0.28, 0.29], dtype=torch.float64), average(path)
    v = GaussianMixture([[MEAN]], STD).value("velocity", x, t, path)
    objective = build(path=path, derivative=derivative, step=1e-4 if derivative != "jvp" else None)
    u, rate = objective.derive(backbones.wrap(exact), x, v, t, r, {})
    tolerance = 1e-10 if derivative == "jvp" else 1e-6
    keep = (t - r > 0.01)[:, None]  # at r = t the rate has no weight
    target = v - (t - r)[:, None] * rate
    assert float(((u - target) * keep).abs().max()) < tolerance
    assert torch.allclose(u[0], v[0])


@pytest.mark.parametrize("derivative", ["jvp", "finite-difference"])
def test_the_exact_average_is_stationary_in_expectation(derivative):
    """The loss uses the samples' own velocities; their mean given x is the flow's, so that no direction leads down."""
    count, exact = 20_000, average(LINEAR)
    along = torch.zeros(4, count, dtype=torch.float64, requires_grad=True)  # one weight a sample: gradients a sample

    def moved(x, t, gap):
        directions = torch.stack((torch.ones_like(x), x, gap[:, None], t[:, None].sin()))[..., 0]
        return exact(x, t, gap) + (along * directions).sum(0)[:, None]

    data = MEAN + STD * Draws(5).normal("data", range(count), (1,)).double()
    step = 1e-3 if derivative != "jvp" else None
    objective = build(share=1.0, power=0.0, times="uniform", derivative=derivative, step=step)
    loss = objective(backbones.wrap(moved), data, Draws(6).at(range(count)))
    loss.terms["mean-flow"].sum().backward()
    errors = along.grad.mean(1) / (along.grad.std(1) / math.sqrt(count))
    assert float(errors.abs().max()) < 4  # standard errors
    shifted = objective(backbones.wrap(lambda x, t, gap: moved(x, t, gap) + 0.1), data, Draws(6).at(range(count)))
    along.grad = None
    shifted.terms["mean-flow"].sum().backward()
    assert float(along.grad[0].mean() / (along.grad[0].std() / math.sqrt(count))) > 8  # a wrong average is seen


@pytest.mark.parametrize("name", ["mlp", "sit", "deepflow"])
def test_jvp_and_differences_agree_on_networks(name):
    """Also through attention; and the gradient of the loss flows through u alone."""
    options = {
        "mlp": dict(dim=3, hidden_size=16),
        "sit": IMAGES,
        "deepflow": dict(**IMAGES, cuts=(1,), acceleration_width=5),
    }[name]
    network = backbones.build(name, **options, takes_gap=True).double()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    shape = (3,) if name == "mlp" else (1, 4, 4)
    given = {} if name == "mlp" else {"label": torch.tensor([0, 1, 2, 3, 0])}
    x, v = torch.randn(2, 5, *shape, dtype=torch.float64)
    t, r = torch.linspace(0.4, 0.9, 5, dtype=torch.float64), torch.linspace(0.1, 0.8, 5, dtype=torch.float64)
    exact = build().derive(network, x, v, t, r, given)
    close = build(derivative="finite-difference", step=1e-5).derive(network, x, v, t, r, given)
    assert torch.equal(close[0], network(x, t, gap=t - r, **given))
    assert torch.allclose(exact[0], close[0], atol=1e-12) and torch.allclose(exact[1], close[1], atol=1e-6)
    assert exact[0].requires_grad
    float_network = network.float()
    loss = build(label_dropout=0.0)(float_network, x.float(), Draws(0).at(range(5)), **given)
    loss.total.backward()
    silent = ("middle_head", "acceleration_head")  # of DeepFlow's first branch, which one velocity does not ask
    called = [p.grad for key, p in float_network.named_parameters() if not key.startswith(silent)]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in called)


def test_differences_stay_between_r_and_the_end():
    """Up to the ends, 0 and 1, and at r = t, the network is called at 0 ≤ r ≤ t ≤ 1 alone; the rate is finite."""
    seen = []

    def network(x, t, gap):
        seen.append((t, gap))
        return x * t[:, None] ** 2 + 3 * gap[:, None]

    t = torch.tensor([0.0, 1e-4, 0.5, 0.5, 0.5, 0.9999, 1.0, 1.0], dtype=torch.float64)
    r = torch.tensor([0.0, 0.0, 0.5, 0.4999, 0.2, 0.3, 0.4, 1.0], dtype=torch.float64)
    x, v = torch.randn(2, 8, 3, dtype=torch.float64)
    objective = build(derivative="finite-difference", step=1e-3)
    _, rate = objective.derive(backbones.wrap(network), x, v, t, r, {})
    assert len(seen) == 3
    for time, gap in seen:
        assert float(time.min()) >= 0 and float(time.max()) <= 1 and float(gap.min()) > -1e-15
    truth = v * t[:, None] ** 2 + 2 * x * t[:, None] + 3
    weighted = (t - r)[:, None] * (rate - truth)
    central = 4  # the one sample with room on both sides
    assert bool(rate.isfinite().all()) and float(weighted.abs().max()) < 1e-2  # one-sided: of first order in the step
    assert float(weighted[central].abs().max()) < 1e-5


def test_loss_by_hand():
    data, draws = torch.randn(40, 2), Draws(3).at(range(40))
    network = backbones.wrap(lambda x, t, gap: 0.7 * x + t[:, None] + 2 * gap[:, None])
    objective = build(share=0.5, power=0.5, epsilon=0.1, times="uniform")
    loss = objective(network, data, draws)
    r, t = objective.draw_times(draws)
    assert bool((r <= t).all()) and 8 < int((r < t).sum()) < 32 and torch.equal(loss.times, t)
    noise = draws.normal("noise", (2,))
    x, v = (1 - t)[:, None] * data + t[:, None] * noise, noise - data
    u = 0.7 * x + t[:, None] + 2 * (t - r)[:, None]
    rate = 0.7 * v + 1 + 2  # ∂u/∂x·v + ∂u/∂t + ∂u/∂gap
    squares = (u - (v - (t - r)[:, None] * rate)) ** 2
    total = squares.sum(1)
    assert torch.allclose(loss.terms["mean-flow"], total / (total + 0.1) ** 0.5, rtol=1e-4)
    assert torch.allclose(loss.details["velocity"], squares.mean(1), rtol=1e-4)
    plain = build(share=0.0, power=0.0, times="uniform")
    r, t = plain.draw_times(draws)
    assert torch.equal(r, t)  # flow matching
    whole = plain(network, data, draws).terms["mean-flow"]
    part = plain(network, data[5:9], Draws(3).at(range(5, 9))).terms["mean-flow"]
    assert torch.allclose(part, whole[5:9], rtol=1e-5)
    check_objective(build(), backbone=network)


@pytest.mark.parametrize("derivative", ["jvp", "finite-difference"])
def test_precision_and_shapes(derivative):
    """float64 stays float64; a prediction of another shape is refused, not broadcast."""
    network, data, draws = backbones.build("mlp", dim=3, takes_gap=True), torch.randn(5, 3), Draws(0).at(range(5))
    objective = build(derivative=derivative, power=0.0)
    wide, narrow = objective(network.double(), data.double(), draws), objective(network.float(), data, draws)
    assert wide.total.dtype == torch.float64 and narrow.total.dtype == torch.float32
    tolerance = 1e-5 if derivative == "jvp" else 1e-2  # differences of float32 values
    assert torch.allclose(wide.total.float(), narrow.total, rtol=tolerance)
    for cut in (lambda x: x[:, :1], lambda x: torch.cat((x, x), 1)):
        with pytest.raises(
            InputError, match=r"got a prediction of shape \(5, [16]\) from the backbone, expected \(5, 3\)"
        ):
            objective(backbones.wrap(lambda x, t, gap, cut=cut: cut(x)), data, draws)


@pytest.mark.parametrize("name", ["uniform", "stratified"])
def test_two_times_are_independent_draws_of_the_law(name):
    objective, count = build(share=1.0, times=name), 100_000
    r, t = objective.draw_times(Draws(1).at(range(count)))
    assert float(t.mean()) == pytest.approx(2 / 3, abs=0.005)  # the larger and the smaller of two uniform draws
    assert float(r.mean()) == pytest.approx(1 / 3, abs=0.005)
    assert float(((t - 2 / 3) * (r - 1 / 3)).mean()) == pytest.approx(1 / 36, abs=0.002)


def test_one_step_of_the_exact_average_is_the_exact_transport():
    flow = Flow(backbones.wrap(average(LINEAR)), LINEAR)
    noise = torch.randn(50, 1, dtype=torch.float64)
    for steps in (1, 3):
        solution = solvers.build("mean-flow", steps=steps).solve(flow, noise)
        assert torch.allclose(solution.x, MEAN + STD * noise, atol=1e-10)
        assert solution.nfe == steps and solution.times.tolist() == pytest.approx([1 - i / steps for i in range(steps)])
    half = solvers.build("mean-flow", steps=1, start=0.8, end=0.3)(flow, noise)
    (m_0, s_0), (m_1, s_1) = (moments(LINEAR, torch.tensor(t, dtype=torch.float64)) for t in (0.8, 0.3))
    assert torch.allclose(half, m_1 + s_1 / s_0 * (noise - m_0), atol=1e-10)


def test_without_a_gap_it_is_a_velocity_for_any_solver_and_guidance():
    network = backbones.build("mlp", dim=2, num_classes=3, takes_gap=True)
    check_backbone(network)
    x, label = torch.randn(4, 2), torch.tensor([0, 1, 2, 3])
    t, zero = torch.full((4,), 0.5), torch.zeros(4)
    assert torch.equal(network(x, t, label=label), network(x, t, label=label, gap=zero))
    assert not torch.equal(network(x, t, label=label), network(x, t, label=label, gap=zero + 0.3))
    guided = guidance.build("classifier-free", scale=2.0)(Flow(network, LINEAR))
    one = solvers.build("mean-flow")(guided, x, label=label)
    both = [network(x, torch.ones(4), label=y, gap=torch.ones(4)) for y in (label, torch.full((4,), 3))]
    assert torch.allclose(one, x - (both[1] + 2 * (both[0] - both[1])), atol=1e-5)
    assert bool(solvers.build("heun", steps=3)(guided, x, label=label).isfinite().all())


def test_other_networks_keep_their_parameters_and_refuse_gaps():
    for name, options in (
        ("mlp", {}),
        ("sit", dict(input_size=4, patch_size=2, in_channels=1, hidden_size=8, num_heads=2, depth=1, num_classes=0)),
    ):
        without, with_it = backbones.build(name, **options), backbones.build(name, **options, takes_gap=True)
        added = set(with_it.state_dict()) - set(without.state_dict())
        assert added and all(key.startswith("gap.") for key in added)
        shape = without.input_shape
        with pytest.raises(
            InputError, match="got a gap, which this backbone does not take; build it with takes_gap=True"
        ):
            without(torch.zeros(2, *shape), torch.zeros(2), gap=torch.zeros(2))
        with pytest.raises(InputError, match=r"got a gap of shape \(3,\), expected \(2,\)"):
            with_it(torch.zeros(2, *shape), torch.zeros(2), gap=torch.zeros(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(share=1.5), "expected a share in"),
        (dict(power=-1), "a finite power of 0 or more"),
        (dict(epsilon=0), "a finite epsilon above 0"),
        (dict(epsilon=math.nan), "a finite epsilon above 0"),
        (dict(derivative="autograd"), "got derivative 'autograd'"),
        (dict(step=0.01), "got step 0.01 with derivative 'jvp'"),
        (dict(derivative="finite-difference", step=0.5), "got step 0.5"),
        (dict(path=interpolants.build("bridge")), "path with latent noise"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


def test_bad_solves():
    with pytest.raises(InputError, match="MeanFlow runs from noise to data"):
        solvers.build("mean-flow", start=0.0, end=1.0)
    with pytest.raises(InputError, match="takes_gap=True"):
        solvers.build("mean-flow")(Flow(backbones.build("mlp"), LINEAR), torch.zeros(2, 2))
    network, noise = backbones.wrap(average(LINEAR)), torch.randn(3, 1)
    other = Rescheduled(Flow(network, LINEAR), interpolants.build("trigonometric"))
    for flow, kind in ((other, "data"), (Flow(network, LINEAR, "noise"), "noise")):
        with pytest.raises(InputError, match=f"predicts {kind}, expected average velocities on the path"):
            solvers.build("mean-flow")(flow, noise)


# --- two objectives end to end ---------------------------------------------------------------------------------------

MIXTURE = GaussianMixture([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]], 0.25)


def energy_distance(x, y):
    """2·E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖, 0 for equal laws."""
    n, m = len(x), len(y)
    within = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return float(2 * torch.cdist(x, y).mean() - within)


def trained(name, steps, **options):
    torch.manual_seed(0)
    network = backbones.build("mlp", dim=2, hidden_size=96, depth=3, takes_gap=True)
    objective = objectives.build(name, interpolant=LINEAR, **options)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for step in range(steps):
        data, _ = MIXTURE.sample(256, seed=step)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        loss = objective(network, data, Draws(0).at(range(256 * step, 256 * step + 256)))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    return Flow(network.eval(), LINEAR)


def distances(steps):
    truth, noise = MIXTURE.sample(3000, seed=10**6)[0], Draws(9).normal("noise", range(3000), (2,))
    velocity, mean = trained("velocity", steps), trained("mean-flow", steps, times="uniform", share=0.5, power=0.0)
    heun, one = solvers.build("heun", steps=25), solvers.build("mean-flow")
    drawn = {
        "exact flow, Heun 25": heun(MIXTURE.flow(LINEAR), noise),
        "velocity, Heun 25": heun(velocity, noise),
        "velocity, Euler 1": solvers.build("euler", steps=1)(velocity, noise),
        "mean-flow, 1 step": one(mean, noise),
        "noise": noise,
    }
    return {name: energy_distance(x, truth) for name, x in drawn.items()}


@pytest.mark.slow
def test_both_objectives_learn_a_mixture():
    """A short run: learned flows lie far below the noise they start from, and one step of averages below Euler's."""
    found = distances(400)
    assert abs(found["exact flow, Heun 25"]) < 0.01
    assert found["velocity, Heun 25"] < 0.1 * found["noise"]
    assert found["mean-flow, 1 step"] < 0.5 * found["velocity, Euler 1"]


@pytest.mark.slow
def test_both_objectives_reach_the_exact_flow():
    """Energy distance to fresh data, beside that of the exact flow (2,500 steps each)."""
    found = distances(2500)
    print({name: round(value, 5) for name, value in found.items()})
    assert found["velocity, Heun 25"] < 0.01
    assert found["mean-flow, 1 step"] < 0.03
    assert found["velocity, Euler 1"] > 0.3
