from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pathline import (
    Draws,
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

LINEAR = interpolants.build("linear")
ODE = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
TRIGONOMETRIC = interpolants.build("trigonometric")


def constant(value=0.0, **attributes):
    return Flow(backbones.wrap(lambda x, t, **_: torch.full_like(x, value), **attributes), LINEAR)


def slope(steps, errors):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("name", ODE)
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.0, 1.0), (0.9, 0.2)])
def test_order_of_the_ode_methods(name, start, end, gaussian):
    exact = gaussian("trigonometric")
    x = torch.randn(7, 3, dtype=torch.float64)
    counts, errors = (20, 40, 80, 160), []
    for steps in counts:
        solution = solvers.build(name, steps=steps, start=start, end=end).solve(exact.flow(), x)
        errors.append(float((solution.x - exact.transported(x, start, end)).abs().max()))
    assert abs(slope(counts, errors) - ODE[name]) < 0.2
    assert solvers.build(name, steps=1).order == ODE[name]


def taking_gaps(function):
    """A network that takes a gap as well, without which ``mean-flow`` cannot run, and makes nothing of it."""
    return backbones.wrap(lambda x, t, gap=None: function(x, t))


def exact_flow(gaussian):
    return Flow(taking_gaps(gaussian().velocity), LINEAR)


@pytest.mark.parametrize("name", solvers.names())
class TestContract:
    def test_steps_are_steps_and_nfe_is_counted(self, name, gaussian):
        solver = solvers.build(name, steps=7)
        flow = exact_flow(gaussian)
        solution = solver.solve(flow, torch.randn(5, 2))
        assert solution.nfe == solver.calls == flow.nfe == len(solution.times)
        assert solver.solve(flow, torch.randn(5, 2)).nfe == solution.nfe
        assert len(solver.times) == 8
        evaluated = set(solution.times.tolist())
        assert 1.0 in evaluated and (0.0 in evaluated) == solver.evaluates_end

    def test_state_keeps_type_and_input_is_left_alone(self, name, gaussian):
        for dtype in (torch.float32, torch.float64):
            x = torch.randn(3, 2, 5, dtype=dtype)
            before = x.clone()
            solution = solvers.build(name, steps=3).solve(exact_flow(gaussian), x)
            assert solution.x.dtype == dtype and solution.x.shape == x.shape
            assert torch.equal(x, before) and not solution.x.requires_grad

    def test_trajectory_has_both_ends(self, name, gaussian):
        x = torch.randn(3, 2)
        solution = solvers.build(name, steps=4).solve(exact_flow(gaussian), x, seed=1, trajectory=True)
        assert solution.trajectory.shape == (5, 3, 2)
        assert torch.equal(solution.trajectory[0], x) and torch.equal(solution.trajectory[-1], solution.x)
        assert solvers.build(name, steps=4).solve(exact_flow(gaussian), x).trajectory is None

    def test_batches_do_not_matter(self, name, gaussian):
        solver, flow, x = solvers.build(name, steps=5), exact_flow(gaussian), torch.randn(7, 3)
        whole = solver(flow, x, seed=3)
        parts = [solver(flow, x[i : i + 2], seed=3, sample_ids=range(i, min(i + 2, 7))) for i in range(0, 7, 2)]
        assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
        assert torch.equal(solver(flow, x, seed=3), whole)

    def test_seed_none_follows_torchs_generator(self, name, gaussian):
        solver, flow, x = solvers.build(name, steps=5), exact_flow(gaussian), torch.randn(4, 3)
        torch.manual_seed(5)
        first = solver.solve(flow, x)
        torch.manual_seed(5)
        again = solver.solve(flow, x)
        assert first.seed == again.seed and torch.equal(first.x, again.x)
        assert torch.equal(solver(flow, x, seed=first.seed), first.x)

    def test_a_network_in_bfloat16_with_a_float32_state(self, name):
        backbone = backbones.build("mlp", dim=3, hidden_size=8, takes_gap=True).bfloat16()
        seen = {}
        backbone.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].dtype, t=args[1].dtype))
        assert solvers.build(name, steps=2)(Flow(backbone, LINEAR), torch.randn(2, 3)).dtype == torch.float32
        assert seen == {"x": torch.bfloat16, "t": torch.float32}

    def test_nan_is_found_with_its_time_and_step(self, name):
        def breaks(x, t):
            return torch.where(t[:, None] < 0.55, math.nan, x)

        solver = solvers.build(name, steps=10, grid="uniform")
        with pytest.raises(SolverError, match="became NaN or infinite") as caught:
            solver(Flow(taking_gaps(breaks), LINEAR), torch.ones(2, 3))
        error = caught.value
        first = next(t for t in solver.times if t < 0.55)
        # a method that looks ahead meets the fault one step earlier
        assert error.t == pytest.approx(first if solver.evaluates_end else first - 0.1)
        assert error.step == solver.times.index(error.t) - 1
        assert error.nfe == (error.step + 1) * solver.calls_per_step

    def test_conditions_reach_the_backbone(self, name):
        backbone = backbones.wrap(
            lambda x, t, label, strength, gap=None: x * 0 + label[:, None] * strength, num_classes=3
        )
        flow = Flow(backbone, LINEAR).given(strength=torch.tensor(2.0))
        x = torch.zeros(2, 5)
        if name == "euler-maruyama":
            x = solvers.build(name, steps=2)(flow, x, label=torch.tensor([0, 2]), seed=0)
            assert x.shape == (2, 5)
        else:
            assert solvers.build(name, steps=2)(flow, x, label=torch.tensor([0, 2]))[:, 0].tolist() == [0, -4]

    def test_bad_inputs(self, name, gaussian):
        solver, flow = solvers.build(name, steps=2), exact_flow(gaussian)
        with pytest.raises(InputTypeError, match=r"state of type torch.bfloat16.*call x.float\(\)"):
            solver(flow, torch.zeros(2, 3, dtype=torch.bfloat16))
        with pytest.raises(InputTypeError, match="state of type torch.int64"):
            solver(flow, torch.zeros(2, 3, dtype=torch.long))
        with pytest.raises(InputError, match="NaN or infinite values in the state"):
            solver(flow, torch.tensor([[1.0, math.inf]]))
        with pytest.raises(InputTypeError, match=r"expected a flow; use Flow\(backbone, interpolant\)"):
            solver(torch.nn.Identity(), torch.zeros(2, 3))
        with pytest.raises(InputError, match="got 3 sample ids for 2 samples"):
            solver(flow, torch.zeros(2, 3), sample_ids=range(3))
        with pytest.raises(InputError, match="got increments"):
            solver(flow, torch.zeros(2, 3), increments=torch.zeros(5, 2, 3))
        with pytest.raises(InputError, match=r"prediction of shape \(2, 1\) from the backbone, expected \(2, 3\)"):
            solver(Flow(taking_gaps(lambda x, t: x[:, :1]), LINEAR), torch.zeros(2, 3))
        for steps in (0, -1, 2.0, True):
            with pytest.raises(InputError, match="expected a whole number of 1 or more"):
                solvers.build(name, steps=steps)
        for start, end in ((1.5, 0.0), (0.5, 0.5), (math.nan, 0.0)):
            with pytest.raises(InputError, match="expected two different times"):
                solvers.build(name, steps=2, start=start, end=end)
        with pytest.raises(UnknownNameError, match="unknown grid 'uniformly'"):
            solvers.build(name, steps=2, grid="uniformly")


def test_labels_are_checked_once_at_the_entry():
    flow = constant(num_classes=3, null_label=3, input_shape=(2,))
    euler = solvers.build("euler", steps=2)
    for label, message in (
        (torch.tensor([0, 4]), r"got label 4, expected 0 to 3 \(3 is the null label\)"),
        (torch.tensor([-1, 0]), "got label -1"),
        (torch.tensor([0]), r"got labels of shape \(1,\), expected \(2,\)"),
    ):
        with pytest.raises(InputError, match=message):
            euler(flow, torch.zeros(2, 2), label=label)
    with pytest.raises(InputError, match=r"state of shape \(2, 5\), expected \(N, 2\)"):
        euler(flow, torch.zeros(2, 5))


def test_a_path_without_what_the_solver_needs_is_refused_before_any_call():
    flow = constant()
    with pytest.raises(OpenEndError, match="evaluates t = 0, where the Linear path has no score"):
        solvers.build("euler-maruyama", steps=3, start=0.0, end=1.0)(flow, torch.zeros(2, 3))
    with pytest.raises(OpenEndError, match="has no velocity from a predicted data"):
        solvers.build("heun", steps=3)(Flow(flow.backbone, LINEAR, predicts="data"), torch.zeros(2, 3))
    assert flow.nfe == 0


@pytest.mark.parametrize("kind", ["noise", "score", "data"])
def test_what_the_backbone_predicts_does_not_matter(kind, gaussian):
    exact = gaussian()
    x = torch.randn(3, 2, dtype=torch.float64)

    def predict(x, t):
        column = t[:, None]
        return LINEAR.convert(exact.velocity(x, t), x, column[:, 0], source="velocity", target=kind)

    euler = solvers.build("euler", steps=9, start=0.95)
    expected = euler(exact.flow(), x)
    assert torch.allclose(euler(Flow(backbones.wrap(predict), LINEAR, predicts=kind), x), expected)


def test_flow_gives_every_quantity_in_one_call(gaussian):
    exact = gaussian()
    flow = exact.flow()
    x, t = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    prediction = flow(x, t)
    assert flow.nfe == 1
    column = t[:, None]
    score = -(x - (1 - column) * 2.0) / ((1 - column) ** 2 * 0.25 + column**2)
    assert torch.allclose(prediction.score, score)
    assert torch.allclose(prediction.noise, -column * score)
    assert torch.allclose(prediction.data, (x + column**2 * score) / (1 - column))
    assert torch.allclose(prediction.velocity, prediction.noise - prediction.data)
    assert flow.nfe == 1
    with pytest.raises(InputError, match=r"got t = 1.5, expected times in \[0, 1\]"):
        flow(x, 1.5)
    with pytest.raises(InputError, match=r"got t of shape \(3, 1\), expected \(3,\) or \(\)"):
        flow(x, column)


def test_bad_flows():
    with pytest.raises(InputTypeError, match=r"use interpolants.build\(name\)"):
        Flow(torch.nn.Identity(), "linear")
    with pytest.raises(UnknownNameError, match="unknown prediction 'speed'"):
        Flow(torch.nn.Identity(), LINEAR, predicts="speed")


# --- the stochastic sampler ---------------------------------------------------------------------------------------


def test_the_papers_sampler_is_the_default():
    solver = solvers.build("euler-maruyama")
    assert solver.steps == 250 and solver.last_step == "mean"
    assert solver.times[0] == 1.0 and solver.times[-2] == pytest.approx(0.04) and solver.times[-1] == 0.0
    assert np.allclose(np.diff(solver.times[:-1]), -0.96 / 249)
    t = torch.tensor(0.3, dtype=torch.float64)
    assert float(solver.diffusion.squared(t, LINEAR)) == pytest.approx(0.6)


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (1.0, 0.3), (0.3, 1.0)])
@pytest.mark.parametrize("norm", [1.0, 0.5])
def test_the_sde_has_the_paths_marginal(start, end, norm, gaussian):
    """Either direction, two diffusions: mean and spread are those of N(α·mean, α²·std² + σ²)."""
    exact, count = gaussian(), 40_000
    alpha0, alpha1 = 1 - start, 1 - end
    std0, std1 = ((a**2 * 0.25 + (1 - a) ** 2) ** 0.5 for a in (alpha0, alpha1))
    x = 2.0 * alpha0 + std0 * Draws(1).normal("start", range(count), (1,)).double()
    solver = solvers.build(
        "euler-maruyama", steps=400, grid="uniform", diffusion={"name": "linear", "norm": norm}, start=start, end=end
    )
    out = solver(exact.flow(), x, seed=2)
    # four standard errors, and a discretisation error of first order in 1/400
    assert abs(float(out.mean()) - 2.0 * alpha1) < 4 * std1 / math.sqrt(count) + 0.005
    assert abs(float(out.std()) - std1) < 4 * std1 / math.sqrt(2 * count) + 0.01


@pytest.mark.parametrize("last_step", ["mean", "tweedie"])
def test_last_steps_by_their_formula(last_step, gaussian):
    exact = gaussian()
    x = torch.randn(5, 2, dtype=torch.float64)
    solver = solvers.build("euler-maruyama", steps=1, last_step=last_step, start=0.3)
    out = solver(exact.flow(), x)
    t = torch.tensor(0.3, dtype=torch.float64)
    velocity, score = exact.velocity(x, t), exact.score(x, t)
    expected = x - 0.3 * (velocity - 0.3 * score) if last_step == "mean" else (x + 0.09 * score) / 0.7
    assert torch.allclose(out, expected)


def test_mean_last_step_is_an_euler_maruyama_loop_without_its_noise(gaussian):
    """The whole default sampler, written out again from the published formulas."""
    exact, steps = gaussian(), 12
    x = torch.randn(3, 2, dtype=torch.float64)
    w = torch.randn(steps - 1, 3, 2, dtype=torch.float64)
    grid = [*np.linspace(1, 0.04, steps), 0.0]
    y = x.clone()
    for i in range(steps):
        t, dt = grid[i], grid[i + 1] - grid[i]
        v = exact.velocity(y, torch.tensor(t, dtype=torch.float64))
        score = -(y + (1 - t) * v) / t
        y = y + (v - t * score) * dt
        if i < steps - 1:
            y = y + math.sqrt(2 * t * -dt) * w[i]
    solution = solvers.build("euler-maruyama", steps=steps).solve(exact.flow(), x, increments=w)
    assert torch.allclose(solution.x, y, atol=1e-12)


def test_strong_order_of_euler_maruyama_for_additive_noise(gaussian):
    """On one Brownian path, with g a function of t alone, the method has strong order 1."""
    exact, finest = gaussian(), 512
    x = torch.randn(400, 1, dtype=torch.float64)
    fine = torch.randn(finest, 400, 1, dtype=torch.float64)

    def state_half_way(steps):
        coarse = fine.reshape(steps, finest // steps, 400, 1).sum(1) / math.sqrt(finest // steps)
        solver = solvers.build("euler-maruyama", steps=steps, grid="uniform", start=0.9, end=0.1)
        return solver.solve(exact.flow(), x, increments=coarse[:-1], trajectory=True).trajectory[steps // 2]

    counts = (16, 32, 64)
    reference = state_half_way(finest)
    errors = [float((state_half_way(steps) - reference).square().mean().sqrt()) for steps in counts]
    assert abs(slope(counts, errors) - 1) < 0.25


def test_stochastic_options():
    build = solvers.build
    with pytest.raises(InputError, match="last_step 'nothing', expected 'mean' or 'tweedie'"):
        build("euler-maruyama", last_step="nothing")
    with pytest.raises(InputError, match="it needs end=0"):
        build("euler-maruyama", last_step="tweedie", end=0.1)
    for norm in (0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"got norm {norm}, expected a finite number above 0"):
            build("euler-maruyama", diffusion={"name": "linear", "norm": norm})
    with pytest.raises(InputError, match="use the grid 'uniform'"):
        build("euler-maruyama", steps=3, start=0.03)
    with pytest.raises(InputError, match="got last 1.5"):
        build("euler", steps=3, grid={"name": "paper", "last": 1.5})
    with pytest.raises(InputError, match="does not go from 1 to 0"):
        build("euler", steps=1, grid=Backwards())


class Backwards(solvers.grids.Grid):
    def times(self, steps, start, end):
        return torch.zeros(steps + 1, dtype=torch.float64)


@pytest.mark.parametrize("name", solvers.grids.names())
def test_grids_have_their_ends_in_either_direction(name):
    grid = solvers.grids.build(name)
    for start, end in ((1.0, 0.0), (0.0, 1.0), (0.8, 0.3)):
        for steps in (1, 2, 7):
            times = grid.times(steps, start, end)
            assert times.dtype == torch.float64 and len(times) == steps + 1
            assert times[0] == start and times[-1] == end
            assert bool((times.diff() * (end - start) > 0).all())


def test_diffusions_against_their_formulas_and_their_ends():
    """SiT's forms are g²/2: sbdm t/(1 − t) on the linear path. An infinite g is refused before the first call."""
    t = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    linear, vp = interpolants.build("linear"), interpolants.build("vp")
    build = solvers.diffusions.build
    assert torch.allclose(build("sbdm", norm=0.6).squared(t, linear), 2 * 0.6 * t / (1 - t))
    assert torch.allclose(build("constant", norm=0.6).squared(t, linear), torch.full_like(t, 1.2))
    assert build("sbdm").open_ends(linear) == (1.0,) and build("sbdm").open_ends(vp) == (0.0,)
    assert build("constant").open_ends(linear) == build("linear").open_ends(vp) == ()
    for name in ("sbdm", "constant"):
        with pytest.raises(InputError, match="got norm 0"):
            build(name, norm=0)


@pytest.mark.parametrize("diffusion", [{"name": "constant", "norm": 0.5}, "sbdm", "linear"])
def test_marginals_do_not_depend_on_the_diffusion(diffusion, gaussian):
    truth = gaussian("linear")
    solver = solvers.build("euler-maruyama", steps=400, diffusion=diffusion, start=0.99, last_step="tweedie")
    x = truth.transported(torch.randn(20_000, 1), 1.0, 0.99).float()
    solution = solver.solve(truth.flow(), x, seed=3)
    assert float(solution.x.mean()) == pytest.approx(2.0, abs=0.02)
    assert float(solution.x.std()) == pytest.approx(0.5, abs=0.02)


def test_an_infinite_diffusion_is_refused_before_the_first_call(gaussian):
    flow = gaussian("linear").flow()
    with pytest.raises(OpenEndError, match="evaluates t = 1, where the diffusion Own is infinite on the Linear path"):
        solvers.build("euler-maruyama", diffusion="sbdm")(flow, torch.zeros(2, 1))
    assert flow.nfe == 0
