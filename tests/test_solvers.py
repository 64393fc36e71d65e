from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
from pathline.solvers.run import Run
from pathline.testing import GaussianMixture

LINEAR = interpolants.build("linear")
UNFIT = ("taylor",)  # needs accelerations; see test_deepflow_inference.py
STEPPED = [n for n in solvers.names() if n not in UNFIT and "grid" in solvers.registry.entry(n).options()]
FEATURES = {"ode": {"method": "heun2"}}  # options without which a name has no given steps


def constant(value=0.0, **attributes):
    return Flow(backbones.wrap(lambda x, t, **_: torch.full_like(x, value), **attributes), LINEAR)


def build(name, **options):
    return solvers.build(name, **FEATURES.get(name, {}), **options)


def taking_gaps(function):
    """A network that takes a gap as well, without which ``mean-flow`` cannot run, and makes nothing of it."""
    return backbones.wrap(lambda x, t, gap=None: function(x, t))


def exact_flow(gaussian):
    return Flow(taking_gaps(gaussian().velocity), LINEAR)


@pytest.mark.parametrize("name", STEPPED)
class TestContract:
    def test_steps_are_steps_and_nfe_is_counted(self, name, gaussian):
        solver = build(name, steps=7)
        flow = exact_flow(gaussian)
        solution = solver.solve(flow, torch.randn(5, 2))
        assert solution.nfe == solver.calls == flow.nfe == len(solution.times)
        assert solver.solve(flow, torch.randn(5, 2)).nfe == solution.nfe
        assert len(solver.times) == 8
        evaluated = set(solution.times.tolist())
        assert 1.0 in evaluated and (0.0 in evaluated) == solver.evaluates_end

    def test_state_keeps_type_and_input_is_left_alone(self, name, gaussian):
        for dtype in (torch.float32, torch.float64):
            x = torch.randn(3, 2, 5, 7, dtype=dtype)
            before = x.clone()
            solution = build(name, steps=3).solve(exact_flow(gaussian), x)
            assert solution.x.dtype == dtype and solution.x.shape == x.shape
            assert torch.equal(x, before) and not solution.x.requires_grad

    def test_trajectory_has_both_ends(self, name, gaussian):
        x = torch.randn(3, 2)
        solution = build(name, steps=4).solve(exact_flow(gaussian), x, seed=1, trajectory=True)
        assert solution.trajectory.shape == (5, 3, 2)
        assert torch.equal(solution.trajectory[0], x) and torch.equal(solution.trajectory[-1], solution.x)
        assert build(name, steps=4).solve(exact_flow(gaussian), x).trajectory is None

    def test_batches_do_not_matter(self, name, gaussian):
        solver, flow, x = build(name, steps=5), exact_flow(gaussian), torch.randn(64, 3)
        whole = solver(flow, x, seed=3)
        for size in (1, 2, 7):
            parts = [
                solver(flow, x[i : i + size], seed=3, sample_ids=range(64)[i : i + size]) for i in range(0, 64, size)
            ]
            assert torch.allclose(torch.cat(parts), whole, rtol=0, atol=1e-5)
        assert torch.equal(solver(flow, x, seed=3), whole)

    def test_seed_none_follows_torchs_generator(self, name, gaussian):
        solver, flow, x = build(name, steps=5), exact_flow(gaussian), torch.randn(4, 3)
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
        assert build(name, steps=2)(Flow(backbone, LINEAR), torch.randn(2, 3)).dtype == torch.float32
        assert seen == {"x": torch.bfloat16, "t": torch.float32}

    def test_nan_is_found_with_its_time_and_step(self, name):
        seen = []

        def breaks(x, t):
            seen.append(float(t[0]))
            return torch.where(t[:, None] < 0.55, math.nan, x)

        solver = build(name, steps=10, grid="uniform")
        with pytest.raises(SolverError, match="became NaN or infinite") as caught:
            solver(Flow(taking_gaps(breaks), LINEAR), torch.ones(2, 3))
        error, again = caught.value, seen[solver.calls :]  # those of the second run, which looks for the step
        first = next(i for i, t in enumerate(again) if t < 0.55)
        assert error.nfe == len(again) and 0 <= error.nfe - 1 - first < solver.calls_per_step
        assert error.t == solver.times[error.step + 1] and error.t <= again[first] + 0.1

    def test_a_network_may_return_the_same_buffer_every_time(self, name):
        buffer = torch.empty(4, 3)
        plain = Flow(taking_gaps(lambda x, t: torch.sin(3 * x) + t[:, None]), LINEAR)
        reused = Flow(taking_gaps(lambda x, t: torch.sin(3 * x, out=buffer).add_(t[:, None])), LINEAR)
        x, solver = torch.randn(4, 3), build(name, steps=6)
        assert torch.equal(solver(plain, x, seed=0), solver(reused, x, seed=0))

    def test_gradients_on_request(self, name, gaussian):
        """By central differences in float64."""
        solver, flow = build(name, steps=3), exact_flow(gaussian)
        x, d = torch.randn(2, 3, dtype=torch.float64), 1e-6 * torch.randn(2, 3, dtype=torch.float64)
        leaf = x.clone().requires_grad_()
        solution = solver.solve(flow, leaf, seed=0, gradients=True)
        (gradient,) = torch.autograd.grad(solution.x.sin().sum(), leaf)
        ahead, behind = (solver(flow, x + sign * d, seed=0).sin().sum() for sign in (1, -1))
        assert float((gradient * d).sum()) == pytest.approx(float(ahead - behind) / 2, rel=1e-6)
        assert torch.equal(solver(flow, x, seed=0), solution.x) and torch.equal(leaf, x)

    def test_conditions_reach_the_backbone(self, name):
        backbone = backbones.wrap(
            lambda x, t, label, strength, gap=None: x * 0 + label[:, None] * strength, num_classes=3
        )
        flow = Flow(backbone, LINEAR).given(strength=torch.tensor(2.0))
        x = torch.zeros(2, 5)
        solver = build(name, steps=2)
        result = solver(flow, x, label=torch.tensor([0, 2]), seed=0)
        assert result.shape == (2, 5)
        if solver.increments_shape(x) is None:  # a constant velocity takes every method for ODEs straight to the end
            assert torch.allclose(result[:, 0], torch.tensor([0.0, -4.0]))

    def test_bad_inputs(self, name, gaussian):
        solver, flow = build(name, steps=2), exact_flow(gaussian)
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
                build(name, steps=steps)
        for start, end in ((1.5, 0.0), (0.5, 0.5), (math.nan, 0.0)):
            with pytest.raises(InputError, match="expected two different times"):
                build(name, steps=2, start=start, end=end)
        with pytest.raises(UnknownNameError, match="unknown grid 'uniformly'"):
            build(name, steps=2, grid="uniformly")


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


def test_noise_belongs_to_samples_bit_for_bit():
    """Batches of 1, 2, 7 and 64: a sample's draws are the same in all."""
    flow = Flow(backbones.wrap(lambda x, t: torch.zeros_like(x)), LINEAR)
    x = torch.zeros(64, 3)
    whole = Run(flow, {}, seed=5, sample_ids=range(64)).normal(x, 4)
    for size in (1, 2, 7):
        for i in range(0, 64, size):
            ids = range(i, min(i + size, 64))
            part = Run(flow, {}, seed=5, sample_ids=ids).normal(x[i : i + size], 4)
            assert torch.equal(part, whole[i : i + size])


BAD_INPUT = """
import math, torch
from pathline import Flow, PathlineError, backbones, interpolants, solvers

flow = Flow(backbones.wrap(lambda x, t: x * math.nan), interpolants.build("linear"))
x, kept = torch.ones(2, 3), []
custom = lambda *points: {"name": "custom", "points": points}
for make in (
    lambda: solvers.build("eulr"),
    lambda: solvers.build("euler", step=3),
    lambda: solvers.build("dopri5", steps=3),
    lambda: solvers.build("euler", steps=0),
    lambda: solvers.build("euler", steps=2, grid=custom(1, 0.2, 0.4)),
    lambda: solvers.build("euler", steps=2, grid=custom(1.5, 0.2, 0)),
    lambda: solvers.build("euler", steps=2)(flow, x.bfloat16()),
    lambda: solvers.build("euler", steps=2)(flow, x.half()),
    lambda: solvers.build("euler-maruyama", diffusion=lambda t: t[:, None]),
    lambda: solvers.build("heun", steps=3)(flow, x),
    lambda: solvers.build("dopri5")(flow, x),
    lambda: solvers.build("euler-maruyama", diffusion="sbdm")(flow, x),
    lambda: solvers.build("dpm++", steps=3).reversed(),
):
    try:
        make()
        print("nothing raised")
    except PathlineError as error:
        print(type(error).__name__)
"""


def test_bad_input_raises_the_same_when_python_drops_its_assertions():
    """Under ``python -O`` too, and without a hang."""
    expected = ["UnknownNameError", "UnknownOptionError", "UnknownOptionError", *["InputError"] * 3]
    expected += [*["InputTypeError"] * 2, "InputError", *["SolverError"] * 2, "OpenEndError", "InputError"]
    run = subprocess.run(
        [sys.executable, "-O", "-c", BAD_INPUT], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.stdout.split() == expected, run.stderr


ANY = [name for name in STEPPED if name not in ("ode", "sde", "mean-flow")]
MIXTURE = GaussianMixture([[1.0, -1.0, 0.5], [-2.0, 0.5, 0.0]], [0.5, 0.3], weights=[0.4, 0.6])


@given(
    name=st.sampled_from(ANY),
    grid=st.sampled_from(["uniform", "shifted", "paper", "edm", "terminal"]),
    path=st.sampled_from(["linear", "trigonometric", "vp", "linear-vp", "polynomial"]),
    predicts=st.sampled_from(["velocity", "noise", "data", "score"]),
    steps=st.integers(1, 12),
    ends=st.tuples(st.floats(0.55, 0.97), st.floats(0.005, 0.015)),
    size=st.integers(1, 4),
)
def test_any_solver_on_any_grid_path_and_prediction(name, grid, path, predicts, steps, ends, size):
    """NFE and times are as announced, results finite, and the prediction's kind makes no difference."""
    options = {"grid": grid, "start": ends[0], "end": ends[1]}
    solver = solvers.build(name, steps=steps, **options)
    interpolant = interpolants.build(path)
    x = torch.randn(size, 3, dtype=torch.float64)
    solution = solver.solve(MIXTURE.flow(interpolant, predicts), x, seed=1, trajectory=True)
    assert solution.nfe == solver.calls == len(solution.times)
    assert solution.trajectory.shape == (steps + 1, size, 3) and bool(solution.trajectory.isfinite().all())
    highest = 1.0 if name == "churn" else ends[0]  # it goes back to a later time first
    assert ends[1] <= float(solution.times.min()) and float(solution.times.max()) <= highest
    other = solver.solve(MIXTURE.flow(interpolant), x, seed=1)
    scale = 1 + float(other.x.abs().max())
    assert float((solution.x - other.x).abs().max()) < 1e-6 * scale
    if not solver.one_way and not (name == "exponential"):
        back = solver.reversed()
        assert back.times == solver.times[::-1] and back.calls == solver.calls
