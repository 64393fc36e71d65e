"""torchdiffeq's methods: against our own loops, closed solutions and the library itself, and what must not get through.

Rows TD… of the comments are the library's measured edges, named so that each keeps its test.
"""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torchdiffeq import odeint

from pathline import (
    Flow,
    InputError,
    InputTypeError,
    MissingPackageError,
    OpenEndError,
    SolverError,
    UnknownOptionError,
    backbones,
    interpolants,
    solvers,
)
from pathline.solvers import guidance
from pathline.testing import GaussianMixture

LINEAR, TRIGONOMETRIC = interpolants.build("linear"), interpolants.build("trigonometric")
# order, calls a step, whether the end is evaluated: measured on the library
FIXED = {
    "euler": (1, 1, False),
    "midpoint": (2, 2, False),
    "heun2": (2, 2, True),
    "heun3": (3, 3, False),
    "rk4": (4, 4, True),
    "explicit_adams": (4, 1, False),
}
ADAPTIVE = {"dopri5": (5, 6), "bosh3": (3, 3), "dopri8": (8, 13)}
DIRECTIONS = [(1.0, 0.0), (0.0, 1.0), (0.9, 0.2)]
MIXTURE = GaussianMixture([[1.0, -1.0, 0.5], [-2.0, 0.5, 0.0]], [0.5, 0.3], weights=[0.4, 0.6])


@pytest.fixture(autouse=True)
def no_warnings():
    """The library's warnings tell of options that it ignores and of tensors that it moves (TD14, TD21)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def build(method, **options):
    return solvers.build("ode", method=method, **options)


def flow_of(velocity, path=LINEAR):
    return Flow(backbones.wrap(velocity), path)


def slope(steps, errors):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


# --- the methods of given steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3, 7), (1, 3)])
@pytest.mark.parametrize(("start", "end"), DIRECTIONS)
@pytest.mark.parametrize(("method", "own"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun2", "heun")])
def test_our_own_loops_give_the_same(method, own, start, end, shape, gaussian):
    """TD5, TD1: either direction, any shape, an uneven grid, every state and every time, in float64."""
    flow, x = gaussian("trigonometric").flow(), torch.randn(shape, dtype=torch.float64)
    grid = {"grid": "uniform" if start < end else {"name": "paper", "last": 0.1}, "start": start, "end": end}
    ours = solvers.build(own, steps=7, **grid).solve(flow, x, trajectory=True)
    theirs = build(method, steps=7, **grid).solve(flow, x, trajectory=True)
    assert torch.allclose(theirs.x, ours.x, rtol=0, atol=1e-12)
    assert torch.allclose(theirs.trajectory, ours.trajectory, rtol=0, atol=1e-12)
    assert torch.equal(theirs.trajectory[0], x) and torch.equal(theirs.trajectory[-1], theirs.x)
    assert torch.allclose(theirs.times, ours.times, rtol=0, atol=1e-15) and theirs.nfe == ours.nfe


@pytest.mark.parametrize(("start", "end"), DIRECTIONS)
@pytest.mark.parametrize("method", FIXED)
def test_the_library_itself_gives_the_same(method, start, end):
    """Called by hand in its simplest form; it negates times itself and nudges none of them."""
    x = torch.randn(5, 3, dtype=torch.float64)
    grid = torch.linspace(start, end, 9, dtype=torch.float64)
    truth = MIXTURE.flow(TRIGONOMETRIC)
    options = {"max_order": 5} if method == "explicit_adams" else {}
    states = odeint(lambda t, x: truth(x, t).velocity, x, grid, method=method, options=options)
    solution = build(method, steps=8, start=start, end=end).solve(MIXTURE.flow(TRIGONOMETRIC), x, trajectory=True)
    assert torch.allclose(solution.trajectory, states, rtol=0, atol=1e-12)
    assert solution.nfe == truth.nfe


@pytest.mark.parametrize("method", FIXED)
def test_order_against_the_closed_solution(method, gaussian):
    exact, x = gaussian("trigonometric"), torch.randn(7, 3, dtype=torch.float64)
    counts = (40, 80, 160)
    for start, end in DIRECTIONS[:2]:
        errors = [
            float(
                (build(method, steps=n, start=start, end=end)(exact.flow(), x) - exact.transported(x, start, end))
                .abs()
                .max()
            )
            for n in counts
        ]
        assert abs(slope(counts, errors) - FIXED[method][0]) < 0.3
    assert build(method, steps=1).order == FIXED[method][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", FIXED)
def test_steps_are_steps(method, dtype, gaussian):
    """TD2: a step length of 1/N makes N + 1 steps for N = 49 and 61. TD7, TD13: times are the grid's own."""
    _, calls, evaluates_end = FIXED[method]
    for steps in (1, 2, 3, 6, 49, 61):
        for start, end in ((1.0, 0.0), (0.0, 1.0)):
            solver, flow = build(method, steps=steps, start=start, end=end), gaussian().flow()
            solution = solver.solve(flow, torch.randn(2, 3, dtype=dtype))
            if method == "explicit_adams":
                expected = 4 * min(steps, 2) + max(steps - 2, 0)
                evaluates_end = steps <= 2
            else:
                expected = steps * calls
            assert solution.nfe == flow.nfe == len(solution.times) == solver.calls == expected
            assert solver.calls_per_step == calls and solver.evaluates_end == evaluates_end
            assert bool((solution.times == end).any()) == evaluates_end and solution.times[0] == start
            whole = set(solution.times.tolist()) >= set(solver.times[:-1])  # every grid point is evaluated, exactly
            assert whole and len(solver.times) == steps + 1 and not torch.signbit(solution.times).any()


def test_adams_is_that_of_order_four():
    """TD3: with the library's default order the solution of x' = −5x is wrong by 8e19. Unequal steps are refused."""
    flow = flow_of(lambda x, t: -5 * x)
    x = build("explicit_adams", steps=100, start=0.0, end=1.0)(flow, torch.ones(1, 2, dtype=torch.float64))
    assert torch.allclose(x, torch.tensor(math.exp(-5), dtype=torch.float64), rtol=0, atol=2e-7)
    with pytest.raises(
        InputError, match="got steps of length 0.04 to 0.1.*expected equal ones; use the grid 'uniform'"
    ):
        build("explicit_adams", steps=9, grid="paper")
    build("explicit_adams", steps=9).reversed()


def test_reversed_solvers_go_back(gaussian):
    flow, x = gaussian("trigonometric").flow(), torch.randn(3, 2, dtype=torch.float64)
    there = build("heun3", steps=40, grid="paper")
    back = there.reversed()
    assert back.times == there.times[::-1]
    assert torch.allclose(back(flow, there(flow, x)), x, rtol=0, atol=2e-4)
    exact = build("dopri5", rtol=1e-9, atol=1e-9, start=0.9, end=0.1)
    assert torch.allclose(exact.reversed()(flow, exact(flow, x)), x, rtol=0, atol=1e-7)


@pytest.mark.parametrize("predicts", ["score", "noise", "data"])
@pytest.mark.parametrize("method", ["heun3", "bosh3"])
def test_what_the_network_predicts_does_not_matter(method, predicts):
    options = {"steps": 9} if method in FIXED else {}
    solver, x = build(method, start=0.95, end=0.05, **options), torch.randn(5, 3, dtype=torch.float64)
    expected = solver(MIXTURE.flow(TRIGONOMETRIC), x)
    assert torch.allclose(solver(MIXTURE.flow(TRIGONOMETRIC, predicts), x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["euler", "heun2", "heun3", "rk4", "explicit_adams", "dopri5", "dopri8"])
def test_buffers_of_the_network_and_of_the_caller(method):
    """TD15: a reused output buffer makes rk4 wrong by 2e-2; a network that writes to its input reached the caller's."""
    buffer, options = torch.empty(4, 3), {"steps": 6} if method in FIXED else {}
    plain = flow_of(lambda x, t: torch.sin(3 * x) + t[:, None])
    reused = flow_of(lambda x, t: torch.sin(3 * x, out=buffer).add_(t[:, None]))
    for start, end in ((1.0, 0.0), (0.0, 1.0)):
        x, solver = torch.randn(4, 3), build(method, start=start, end=end, **options)
        assert torch.equal(solver(plain, x), solver(reused, x))
    before = x.clone()
    build(method, **options)(flow_of(lambda x, t: x.mul_(0.999)), x)
    assert torch.equal(x, before)


def test_the_result_keeps_no_other_state_alive():
    """TD20."""
    x = torch.randn(2, 3)
    for solver in (build("heun2", steps=5), build("dopri5")):
        result = solver.solve(MIXTURE.flow(LINEAR), x).x
        assert result.untyped_storage().nbytes() == x.untyped_storage().nbytes()


def test_progress(capsys):
    build("heun2", steps=3).solve(MIXTURE.flow(LINEAR), torch.randn(2, 3), progress=True)
    assert "3/3" in capsys.readouterr().err


def test_a_step_that_fails_is_found():
    """TD9: given steps compute with NaN to the end; a second, careful run finds where it began."""
    for method in FIXED:
        flow = flow_of(lambda x, t: torch.where(t[:, None] < 0.45, math.nan, x))
        with pytest.raises(SolverError, match="became NaN or infinite") as caught:
            build(method, steps=5)(flow, torch.ones(2, 3))
        assert caught.value.step == (2 if method in ("heun2", "rk4") else 3)
        assert caught.value.t == pytest.approx(0.8 - 0.2 * caught.value.step)
    with pytest.raises(SolverError) as caught:  # in the last step
        build("heun2", steps=5)(flow_of(lambda x, t: torch.where(t[:, None] == 0, math.nan, x)), torch.ones(2, 3))
    assert caught.value.step == 4 and caught.value.t == 0 and caught.value.nfe == 10


# --- the adaptive methods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), DIRECTIONS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_methods_against_the_closed_solution(method, start, end, gaussian):
    """TD6: no call outside of the interval, and a landing on its end without interpolation. TD5, TD7, TD22."""
    exact = gaussian("trigonometric")
    for shape, dtype in (((7,), torch.float64), ((1, 3), torch.float64), ((5, 2, 3, 7), torch.float32)):
        x = torch.randn(shape, dtype=dtype)
        tolerance = 1e-9 if dtype == torch.float64 else 1e-6
        solver = build(method, rtol=tolerance, atol=tolerance, start=start, end=end)
        flow = exact.flow()
        solution = solver.solve(flow, x, trajectory=True)
        assert float((solution.x - exact.transported(x.double(), start, end)).abs().max()) < 20 * tolerance
        assert solution.x.dtype == dtype and solution.x.shape == x.shape
        assert torch.equal(solution.trajectory, torch.stack((x, solution.x)))
        assert solution.nfe == flow.nfe == len(solution.times) and solver.calls is None
        order, calls = ADAPTIVE[method]
        assert (solution.nfe - 2) % calls == 0 and solver.calls_per_step == calls and solver.order == order
        low, high = sorted((start, end))
        assert bool(((solution.times >= low) & (solution.times <= high)).all())
        assert solution.times[0] == start and solution.times[-1] == end and not torch.signbit(solution.times).any()


def test_defaults_are_ten_to_the_minus_five(gaussian):
    """TD22: the library's own 1e-7 and 1e-9 ask for more than networks in float32 have."""
    x, flow = torch.randn(3, 2, dtype=torch.float64), gaussian("trigonometric").flow()
    default = solvers.build("ode").solve(flow, x)
    assert torch.equal(default.x, build("dopri5", rtol=1e-5, atol=1e-5).solve(flow, x).x)
    for options in ({"rtol": 1e-6}, {"atol": 1e-6}):
        assert not torch.equal(default.x, build("dopri5", **options)(flow, x))
    assert default.nfe < build("dopri5", rtol=1e-7, atol=1e-9).solve(flow, x).nfe


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_velocity_that_ends_with_the_interval(method):
    """TD6: √t below 0 and √(1 − t) above 1 are NaN; a constant one makes the library try a first step of 2.36."""
    for velocity, start, end, truth in (
        (lambda x, t: torch.sqrt(t)[:, None].expand_as(x), 1.0, 0.0, -2 / 3),
        (lambda x, t: torch.sqrt(1 - t)[:, None].expand_as(x), 0.0, 1.0, 2 / 3),
        (lambda x, t: torch.where((t >= 0) & (t <= 1), 1e-3, math.nan)[:, None].expand_as(x), 0.0, 1.0, 1e-3),
    ):
        x = build(method, start=start, end=end)(flow_of(velocity), torch.ones(2, 1, dtype=torch.float64))
        assert torch.allclose(x, torch.tensor(1 + truth, dtype=torch.float64), rtol=0, atol=1e-4)


def stiff(rates):
    """x' = −rate·(x − cos t): one rate a sample. Upwards from t = 0."""
    return flow_of(lambda x, t: -rates.to(x)[:, None] * (x - torch.cos(t)[:, None]))


def solved(rates, x, **options):
    return build("dopri5", start=0.0, end=1.0, **options).solve(stiff(rates), x)


def test_the_error_is_that_of_each_sample():
    """TD8: over the batch, a stiff sample's error is diluted, from 1.6e-4 alone to 5.8e-3 among 1024."""
    rates, x = torch.ones(128), torch.full((128, 2), 0.5, dtype=torch.float64)
    rates[7], x[7] = 100.0, 5.0
    tolerances = {"rtol": 1e-5, "atol": 1e-5}
    reference = solved(rates, x, rtol=1e-11, atol=1e-11, max_nfe=100_000).x
    alone = solved(rates[7:8], x[7:8], **tolerances)
    easy = solved(rates[8:9], x[8:9], **tolerances)
    together = solved(rates, x, **tolerances)
    assert torch.allclose(together.x[7], alone.x[0], rtol=0, atol=1e-12) and together.nfe == alone.nfe
    assert float((together.x[8] - easy.x[0]).abs().max()) < 1e-5 and easy.nfe < together.nfe
    assert float((together.x - reference).abs().max()) < 5e-5
    mean = solved(rates, x, **tolerances, per_sample=False)
    assert mean.nfe < together.nfe
    worse, better = (float((y.x[7] - reference[7]).abs().max()) for y in (mean, together))
    assert worse > 8 * better
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    drift = stiff(rates)
    by_hand = odeint(  # whose own norm is the mean
        lambda t, x: drift(x, t).velocity, x, ends, method="dopri5", **tolerances, options={"step_t": ends[1:]}
    )
    assert torch.allclose(by_hand[-1], mean.x, rtol=0, atol=1e-9) and drift.nfe == mean.nfe


PROGRAM = """
import math, time
import torch
from pathline import Flow, SolverError, backbones, interpolants, solvers

def nan_later(x, t):
    return torch.where(t[:, None] < 0.5, math.nan, x)

def one_bad_sample(x, t):
    return torch.where(torch.arange(len(x))[:, None] == 1, math.inf, x)

def jumps(x, t):
    return torch.sign(torch.sin(1000 * t))[:, None].expand_as(x)

def reciprocal(x, t):  # x of 2 is infinite at t = 0.5
    return -(x**2)

linear = interpolants.build("linear")
for method, dtype in (("dopri5", torch.float64), ("bosh3", torch.float32), ("dopri8", torch.float32)):
    for velocity, options in ((nan_later, {}), (one_bad_sample, {}), (jumps, dict(max_nfe=200, rtol=1e-9, atol=1e-9)),
                              (reciprocal, {}), (reciprocal, dict(per_sample=False))):
        flow, began = Flow(backbones.wrap(velocity), linear), time.perf_counter()
        x = torch.tensor([[2.0], [0.1]], dtype=dtype) if velocity is reciprocal else torch.zeros(2, 1, dtype=dtype)
        try:
            solvers.build("ode", method=method, **options)(flow, x + 0.5 * (velocity is nan_later))
            print(method, velocity.__name__, "came back")
        except SolverError as error:
            kind = next(k for k in ("NaN", "vanishes", "budget", "?") if k in str(error) or k == "?")
            fits = error.nfe == flow.nfe and method in str(error)
            print(method, velocity.__name__, kind, f"{error.t:.3f}", error.step, error.nfe, fits,
                  time.perf_counter() - began < 10)
"""


@pytest.mark.parametrize("optimised", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_endless_loop_and_no_nan(optimised, capsys):
    """TD9, TD10, TD11: the library's guards are assertions; without them it ran on for ever on each of these."""
    if optimised:
        command = [sys.executable, "-O", "-W", "error", "-c", PROGRAM]
        printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    else:
        exec(PROGRAM, {})
        printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert len(lines) == 3 * 5
    for method, velocity, kind, t, step, nfe, fits, soon in lines:
        wanted = {"nan_later": ("NaN",), "one_bad_sample": ("NaN",), "jumps": ("budget",)}
        assert kind in wanted.get(velocity, ("NaN", "vanishes")), (method, velocity, kind)
        assert fits == soon == "True"
        if velocity == "reciprocal":
            assert abs(float(t) - 0.5) < 2e-3 and int(step) > 3
        if velocity == "one_bad_sample":
            assert float(t) == 1 and int(nfe) == 1
        if velocity == "nan_later":
            assert float(t) < 0.5
        if velocity == "jumps":
            assert int(nfe) == 200


def test_the_budget_is_one_of_calls():
    """TD11: the library's counts steps of one output interval. A solve that needs just the budget ends well."""
    flow = MIXTURE.flow(TRIGONOMETRIC)
    nfe = build("dopri5").solve(flow, torch.zeros(2, 3)).nfe
    assert build("dopri5", max_nfe=nfe).solve(flow, torch.zeros(2, 3)).nfe == nfe
    with pytest.raises(SolverError, match=f"budget of {nfe - 1} network calls is spent; raise max_nfe") as caught:
        build("dopri5", max_nfe=nfe - 1)(flow, torch.zeros(2, 3))
    assert caught.value.nfe == nfe - 1 and 0 <= caught.value.t <= 1


def test_gradients_of_an_adaptive_solve(gaussian):
    """TD18: by the closed solution, which is affine in the start; without the option there is no graph."""
    exact = gaussian("trigonometric")
    for method, options in (("rk4", {"steps": 80}), ("dopri5", {"rtol": 1e-8, "atol": 1e-8})):
        x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
        solver = build(method, **options)
        assert not solver.solve(exact.flow(), x).x.requires_grad
        (gradient,) = torch.autograd.grad(solver.solve(exact.flow(), x, gradients=True).x.square().sum(), x)
        end = exact.transported(x.detach(), 1.0, 0.0)
        assert torch.allclose(gradient, 2 * end * exact.std, rtol=0, atol=1e-5)


def test_a_network_in_bfloat16(gaussian):
    """TD13: a state in bfloat16 stands still; ours is float32 whatever the network's precision."""
    backbone = backbones.build("mlp", dim=3, hidden_size=8).bfloat16()
    for solver in (build("heun3", steps=7), build("bosh3", rtol=1e-2, atol=1e-2)):
        assert solver(Flow(backbone, LINEAR), torch.randn(2, 3)).dtype == torch.float32
    decay = flow_of(lambda x, t: -x.bfloat16())
    x = build("euler", steps=1000, start=0.0, end=1.0)(decay, torch.ones(2, 3))
    assert torch.allclose(x, torch.tensor(math.exp(-1)), rtol=0, atol=1e-3)


def test_empty_batches(gaussian):
    for solver in (build("heun2", steps=2), build("dopri5")):
        assert solver.solve(gaussian().flow(), torch.zeros(0, 3)).x.shape == (0, 3)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_bad_options():
    """TD1, TD4, TD12, TD14, TD16: refused when the solver is built, with our own errors."""
    for method in ("adaptive_heun", "implicit_adams", "fixed_adams", "scipy_solver", "fehlberg2", "tsit5", "", None):
        with pytest.raises(InputError, match=r"got method .*, expected one of euler, .*, dopri8"):
            build(method, steps=3)
    for method in FIXED:
        for option, value in (("rtol", 1e-3), ("atol", 1e-3), ("max_nfe", 100), ("per_sample", True)):
            with pytest.raises(InputError, match=f"got {option} for the method '{method}', which takes given steps"):
                build(method, steps=3, **{option: value})
        with pytest.raises(InputError, match="takes given steps; give steps"):
            build(method)
        for steps in (0, -1, 2.0, True):
            with pytest.raises(InputError, match="whole number of 1 or more"):
                build(method, steps=steps)
    for method in ADAPTIVE:
        for option, value in (("steps", 3), ("grid", "uniform")):
            with pytest.raises(
                InputError, match=f"got {option} for the method '{method}', which takes steps of its own"
            ):
                build(method, **{option: value})
        for option in ("rtol", "atol"):
            for value in (0.0, -1e-3, math.nan, math.inf):
                with pytest.raises(InputError, match=f"got {option} {value}, expected a finite number above 0"):
                    build(method, **{option: value})
        with pytest.raises(InputError, match="got max_nfe 3, expected"):
            build(method, max_nfe=3)
    for option in ("step_size", "interp", "perturb", "options"):
        with pytest.raises(UnknownOptionError, match=f"has no option '{option}'"):
            build("euler", steps=3, **{option: 1})
    for start, end in ((1.5, 0.0), (0.5, 0.5), (math.nan, 0.0)):
        for solver in ({"method": "euler", "steps": 2}, {"method": "dopri5"}):
            with pytest.raises(InputError, match="expected two different times"):
                solvers.build("ode", **solver, start=start, end=end)


def test_bad_states_and_networks():
    """TD13, TD14, TD17: half, whole and tuple states; a velocity that the library would broadcast."""
    for solver in (build("euler", steps=2), build("dopri5")):
        flow = MIXTURE.flow(LINEAR)
        for dtype in (torch.bfloat16, torch.float16, torch.int64):
            with pytest.raises(InputTypeError, match=f"state of type {dtype}"):
                solver(flow, torch.zeros(2, 3, dtype=dtype))
        with pytest.raises(InputTypeError, match="got a state of type tuple"):
            solver(flow, (torch.zeros(2, 3),))
        with pytest.raises(InputError, match="NaN or infinite values in the state"):
            solver(flow, torch.full((2, 3), math.nan))
        with pytest.raises(InputError, match=r"prediction of shape \(3,\) from the backbone, expected \(2, 3\)"):
            solver(flow_of(lambda x, t: x[0]), torch.zeros(2, 3))
        with pytest.raises(InputError, match="which draws no noise"):
            solver(flow, torch.zeros(2, 3), increments=torch.zeros(1, 2, 3))
        assert solver(flow_of(lambda x, t: -x.double()), torch.zeros(2, 3)).dtype == torch.float32


def test_an_exception_of_the_network_passes_through():
    def broken(x, t):
        raise AssertionError("from the network")

    for solver in (build("heun2", steps=2), build("dopri5")):
        with pytest.raises(AssertionError, match="from the network"):
            solver(flow_of(broken), torch.zeros(2, 3))


def test_open_ends_are_refused_before_the_first_call():
    flow = MIXTURE.flow(LINEAR, "data")  # no velocity at t = 0
    for method in ("heun2", "rk4", "dopri5", "bosh3", "dopri8"):
        options = {"steps": 4} if method in FIXED else {}
        with pytest.raises(OpenEndError, match="evaluates t = 0, where the Linear path has no velocity"):
            build(method, **options)(flow, torch.zeros(2, 3))
    assert flow.nfe == 0
    for method in ("euler", "midpoint", "heun3"):
        build(method, steps=4)(flow, torch.zeros(2, 3))


def test_a_flow_that_remembers_needs_given_steps():
    labelled = GaussianMixture([[1.0, 0.0], [-1.0, 2.0]], [0.5, 0.3], labels=[0, 1])
    flow = guidance.build("apg", scale=2.0, momentum=-0.5)(labelled.flow(LINEAR))
    x, label = torch.randn(2, 2), torch.tensor([0, 1])
    assert build("heun2", steps=3, end=0.1)(flow, x, label=label).isfinite().all()
    with pytest.raises(InputError, match="depends on earlier calls"):
        build("dopri5", end=0.1)(flow, x, label=label)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    for options in ({"method": "dopri5"}, {"method": "euler", "steps": 3}):
        with pytest.raises(MissingPackageError, match=r"no package 'torchdiffeq'.*pip install 'pathline\[solvers\]'"):
            solvers.build("ode", **options)
