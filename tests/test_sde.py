"""torchsde's methods: against our own loops and textbook ones on the same increments, and what must not get through.

Rows TS… of the comments are the library's measured edges, named so that each keeps its test.
"""

from __future__ import annotations

import math
import sys
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch

from pathline import (
    Draws,
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
from pathline.testing import GaussianMixture

LINEAR, TRIGONOMETRIC = interpolants.build("linear"), interpolants.build("trigonometric")
# its reading of the SDE, network calls a step, draws a step, whether the end is evaluated
METHODS = {
    "euler": ("ito", 1, 1, False),
    "milstein": ("ito", 1, 1, False),
    "srk": ("ito", 2, 2, False),
    "heun": ("stratonovich", 2, 1, True),
    "midpoint": ("stratonovich", 2, 1, False),
    "euler_heun": ("stratonovich", 1, 1, False),
}
DIRECTIONS = [(1.0, 0.0), (0.1, 1.0), (0.9, 0.2)]
MIXTURE = GaussianMixture([[1.0, -1.0, 0.5], [-2.0, 0.5, 0.0]], [0.5, 0.3], weights=[0.4, 0.6])


@pytest.fixture(autouse=True)
def no_warnings():
    """The library's warnings tell of options that it ignores and of a step that became too small (TS6, TS11)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def build(method="euler", **options):
    return solvers.build("sde", method=method, convention=METHODS[method][0], **options)


def flow_of(velocity, path=LINEAR):
    return Flow(backbones.wrap(velocity), path)


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler", "none"])
@pytest.mark.parametrize(("start", "end"), DIRECTIONS)
@pytest.mark.parametrize(
    ("method", "own"), [("euler", "euler-maruyama"), ("milstein", "euler-maruyama"), ("srk", "srk")]
)
def test_our_own_loops_give_the_same(method, own, start, end, last_step):
    """TS3, TS4, TS5, TS7, TS9, TS12: either direction, an uneven grid, every state, by seed and by increments."""
    end = 0.05 if last_step == "none" and end == 0 else end
    options = {"grid": {"name": "paper", "last": 0.1}, "diffusion": "sbdm" if start < 1 else "sigma"}
    if end == 1:
        options["diffusion"] = lambda t: 0.3 + t
    options |= {"steps": 7, "last_step": last_step, "start": start, "end": end}
    x = torch.randn(5, 3, dtype=torch.float64)
    ours, theirs = solvers.build(own, **options), build(method, **options)
    increments = torch.randn(ours.increments_shape(x), dtype=torch.float64)
    assert theirs.increments_shape(x) == ours.increments_shape(x) and theirs.times == ours.times
    for given in ({"seed": 3}, {"increments": increments}):
        a = ours.solve(MIXTURE.flow(TRIGONOMETRIC), x, trajectory=True, **given)
        b = theirs.solve(MIXTURE.flow(TRIGONOMETRIC), x, trajectory=True, **given)
        assert torch.allclose(b.x, a.x, rtol=0, atol=1e-12)
        assert torch.allclose(b.trajectory, a.trajectory, rtol=0, atol=1e-12)
        assert torch.equal(b.trajectory[0], x) and torch.equal(b.trajectory[-1], b.x)
        assert torch.allclose(b.times, a.times, rtol=0, atol=1e-15) and b.nfe == a.nfe == theirs.calls


def by_hand(method, exact, x, increments, grid, g):
    """The textbook methods for additive noise, in the direction of the solve; dW = √h·z."""
    for (t, t_next), z in zip(pairwise(grid), increments, strict=True):
        h, noise = abs(t_next - t), math.sqrt(abs(t_next - t)) * z

        def drift(x, s, sign=1.0 if t_next > t else -1.0):
            s = torch.tensor(s, dtype=torch.float64)
            return sign * exact.velocity(x, s) + 0.5 * g(s) ** 2 * exact.score(x, s)

        middle, at = 0.5 * (t + t_next), lambda s: float(g(torch.tensor(s, dtype=torch.float64)))
        if method == "heun":
            ahead = x + h * drift(x, t) + at(t) * noise
            x = x + 0.5 * h * (drift(x, t) + drift(ahead, t_next)) + 0.5 * (at(t) + at(t_next)) * noise
        elif method == "midpoint":
            half = x + 0.5 * h * drift(x, t) + 0.5 * at(t) * noise
            x = x + h * drift(half, middle) + at(middle) * noise
        elif method == "euler_heun":
            x = x + h * drift(x, t) + 0.5 * (at(t) + at(t_next)) * noise
        else:
            x = x + h * drift(x, t) + at(t) * noise
    return x


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3, 7), (1, 3)])
@pytest.mark.parametrize(("start", "end"), [(0.95, 0.05), (0.1, 0.9)])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "srk"])
def test_textbook_loops_give_the_same(method, start, end, shape, gaussian):
    """TS2, TS7: states of any shape; the library's are (N, d). g changes over a step, which tells where it is taken."""
    exact, x = gaussian("trigonometric"), torch.randn(shape, dtype=torch.float64)
    g = lambda t: 0.4 + torch.sin(2 * t)  # noqa: E731  (handed on as an option)
    solver = build(method, steps=6, grid="uniform", diffusion=g, last_step="none", start=start, end=end)
    increments = torch.randn(6, *shape, dtype=torch.float64)
    solution = solver.solve(exact.flow(), x, increments=increments)
    grid = torch.linspace(start, end, 7, dtype=torch.float64).tolist()
    assert torch.allclose(solution.x, by_hand(method, exact, x, increments, grid, g), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_strong_order(method, gaussian):
    """Errors on one Brownian path against a fine solve by our own loop; a coarse path's second draws are its ∫W dt."""
    exact, finest, count = gaussian("trigonometric"), 512, 300
    x = torch.randn(count, 1, dtype=torch.float64)
    fine = torch.randn(finest, 2, count, 1, dtype=torch.float64)
    options = {"grid": "uniform", "diffusion": "linear", "last_step": "none", "start": 0.9, "end": 0.1}

    def coarse(steps):
        """Increments I and integrals J = ∫(W − W₀)dt of coarse steps from those of fine ones, as normal draws."""
        h, ratio = 1 / steps, finest // steps
        increment = fine[:, 0] / math.sqrt(finest)
        integral = (0.5 * increment + fine[:, 1] / math.sqrt(12 * finest)) / finest
        increment, integral = (v.reshape(steps, ratio, count, 1) for v in (increment, integral))
        before = increment.cumsum(1) - increment
        total, area = increment.sum(1), (integral + before / finest).sum(1)
        first = total / math.sqrt(h)
        return torch.stack((first, (area / h - 0.5 * total) * math.sqrt(12 / h)), 1)

    def solve(name, steps, build=build):
        draws = coarse(steps)
        draws = draws.flatten(0, 1) if name == "srk" else draws[:, 0]
        return build(name, steps=steps, **options).solve(exact.flow(), x, increments=draws).x

    reference, counts = solve("srk", finest, solvers.build), (8, 16, 32)
    errors = [float((solve(method, steps) - reference).square().mean().sqrt()) for steps in counts]
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    claimed = build(method, steps=1).order
    assert claimed == (1.5 if method == "srk" else 1)
    assert claimed - 0.25 < order < claimed + 0.75  # srk reaches 2 where the drift is nearly linear


def test_the_sde_has_the_paths_marginal(gaussian):
    """Either direction: mean and spread are those of N(α·mean, α²·std² + σ²), within four standard errors."""
    exact, count = gaussian(), 20_000
    for method, start, end in (("euler", 1.0, 0.3), ("srk", 0.3, 1.0), ("heun", 0.95, 0.2)):
        (a0, s0), (a1, s1) = ((1 - t, math.sqrt((1 - t) ** 2 * exact.std**2 + t**2)) for t in (start, end))
        x = exact.mean * a0 + s0 * Draws(1).normal("start", range(count), (1,)).double()
        x = build(method, steps=100, diffusion="linear", last_step="none", start=start, end=end)(
            exact.flow(), x, seed=2
        )
        assert abs(float(x.mean()) - exact.mean * a1) < 4 * s1 / math.sqrt(count) + 0.01
        assert abs(float(x.std()) - s1) < 4 * s1 / math.sqrt(2 * count) + 0.01


# --- counts, draws and what is left alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_steps_are_steps(method, dtype):
    """TS1, TS5, TS9: dt = 1/N makes N + 1 steps for N = 6 and 10; a call to check shapes does not reach the network."""
    _, calls, draws, evaluates_end = METHODS[method]
    seen = []
    for steps in (1, 2, 6, 10, 100):
        for start, end in ((0.95, 0.0), (0.05, 1.0)):
            for last_step in ("none", "mean"):
                if last_step == "none" and evaluates_end and end == 0:
                    continue  # no score there
                seen.clear()
                flow = flow_of(lambda x, t: seen.append(float(t[0])) or 0.1 * x)
                options = {"diffusion": "linear", "last_step": last_step, "start": start, "end": end}
                solver = build(method, steps=steps, **options)
                solution = solver.solve(flow, torch.randn(2, 3, dtype=dtype), seed=0)
                noisy = steps - (last_step == "mean")
                assert solution.nfe == flow.nfe == len(seen) == solver.calls == noisy * calls + steps - noisy
                assert seen == pytest.approx(solution.times.tolist(), abs=1e-7) and solution.times[0] == start
                touched = evaluates_end and last_step == "none"
                assert bool((solution.times == end).any()) == solver.evaluates_end == touched
                assert set(solution.times.tolist()) >= set(solver.times[:-1])
                assert solver.increments_shape(torch.zeros(2, 3)) == (noisy * draws, 2, 3)
                assert solution.x.dtype == dtype


@pytest.mark.parametrize("method", METHODS)
def test_noise_is_keyed_by_seed_and_sample(method):
    """TS10, TS12: neither torch's generator nor numpy's gives a draw or moves; a sample is the same in any batch."""
    flow, x = MIXTURE.flow(LINEAR), torch.randn(7, 3)
    solver = build(method, steps=5)
    states = torch.get_rng_state(), np.random.get_state()
    whole = solver(flow, x, seed=2**40 + 5)
    after = torch.get_rng_state(), np.random.get_state()
    assert (
        torch.equal(after[0], states[0]) and np.array_equal(after[1][1], states[1][1]) and after[1][2] == states[1][2]
    )
    assert torch.equal(solver(flow, x, seed=2**40 + 5), whole) and not torch.equal(solver(flow, x, seed=5), whole)
    for size in (1, 2, 4):
        parts = [
            solver(flow, x[i : i + size], seed=2**40 + 5, sample_ids=range(7)[i : i + size]) for i in range(0, 7, size)
        ]
        assert torch.allclose(torch.cat(parts), whole, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_many_short_steps():
    """TS11: with the library's own Brownian motion 20,000 steps exceed the depth of recursion."""
    solver = build(steps=20_000, diffusion="linear", start=0.9, end=0.1)
    assert solver.solve(flow_of(lambda x, t: -x), torch.ones(1, 1), seed=0).nfe == 20_000


@pytest.mark.parametrize("method", METHODS)
def test_buffers_of_the_network_and_of_the_caller(method):
    """A network may return one buffer every time; the caller's state is not written to; one result is kept alive."""
    buffer, x = torch.empty(4, 3), torch.randn(4, 3)
    plain = flow_of(lambda x, t: torch.sin(3 * x) + t[:, None])
    reused = flow_of(lambda x, t: torch.sin(3 * x, out=buffer).add_(t[:, None]))
    before, solver = x.clone(), build(method, steps=6)
    result = solver(plain, x, seed=0)
    assert torch.equal(result, solver(reused, x, seed=0)) and torch.equal(x, before)
    assert result.untyped_storage().nbytes() == x.untyped_storage().nbytes()


@pytest.mark.parametrize("predicts", ["score", "noise", "data"])
@pytest.mark.parametrize("method", ["euler", "srk", "heun"])
def test_what_the_network_predicts_does_not_matter(method, predicts):
    solver, x = build(method, steps=9, start=0.95, end=0.05), torch.randn(5, 3, dtype=torch.float64)
    expected = solver(MIXTURE.flow(TRIGONOMETRIC), x, seed=1)
    assert torch.allclose(solver(MIXTURE.flow(TRIGONOMETRIC, predicts), x, seed=1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_on_request(method, gaussian):
    """TS16: without the option there is no graph; with it, the result is affine in the start: by two solves."""
    flow, x = gaussian("trigonometric").flow(), torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    solver = build(method, steps=4)
    assert not solver(flow, x, seed=0).requires_grad
    (gradient,) = torch.autograd.grad(solver.solve(flow, x, seed=0, gradients=True).x.sum(), x)
    with torch.no_grad():
        difference = solver(flow, x + 1, seed=0) - solver(flow, x, seed=0)
    assert torch.allclose(gradient, difference, rtol=0, atol=1e-10)


def test_precision():
    """TS12, TS14: a float32 state stays so with float64 increments, and with a network in float64 or bfloat16."""
    x, increments = torch.randn(2, 3), torch.randn(4, 2, 3, dtype=torch.float64)
    solver = build(steps=5)
    assert solver.solve(MIXTURE.flow(LINEAR), x, increments=increments).x.dtype == torch.float32
    assert solver(flow_of(lambda x, t: -x.double()), x, seed=0).dtype == torch.float32
    backbone = backbones.build("mlp", dim=3, hidden_size=8).bfloat16()
    assert build("srk", steps=3)(Flow(backbone, LINEAR), x, seed=0).dtype == torch.float32
    assert build("heun", steps=2)(flow_of(lambda x, t: -x), torch.zeros(0, 3), seed=0).shape == (0, 3)


def test_reversed_solvers_walk_back(capsys):
    solver = build("srk", steps=5, start=0.9, end=0.1)
    assert solver.reversed().times == solver.times[::-1]
    solution = solver.reversed().solve(MIXTURE.flow(LINEAR), torch.randn(2, 3), seed=0, progress=True)
    assert solution.times[0] == 0.1 and "5/5" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_fails_is_found(method):
    """TS13, TS14: NaN runs to the end in silence; a second, careful run finds where it began."""
    _, calls, _, _ = METHODS[method]
    for last_step in ("none", "mean"):
        flow = flow_of(lambda x, t: torch.where(t[:, None] < 0.25, math.nan, x))
        with pytest.raises(SolverError, match="became NaN or infinite") as caught:
            build(method, steps=10, start=1.0, end=0.1, last_step=last_step)(flow, torch.ones(2, 3), seed=0)
        error = caught.value
        assert error.step == (8 if method in ("srk", "heun", "midpoint") else 9)  # those look beyond t = 0.28
        assert error.t == pytest.approx(1 - 0.09 * (error.step + 1))
        assert error.nfe <= 10 * calls


# --- what is refused --------------------------------------------------------------------------------------------------


def test_conventions_are_asked_for():
    """TS8: with its reading mislabelled the library is silently wrong by 39% for multiplicative noise."""
    sde = lambda **options: solvers.build("sde", steps=3, **options)  # noqa: E731
    assert sde().method == "euler" and sde().convention == "ito"
    for method, (convention, *_) in METHODS.items():
        assert sde(method=method, convention=convention).convention == convention
        other = {"ito": "stratonovich", "stratonovich": "ito"}[convention]
        if method == "milstein":
            assert sde(method=method, convention=other).convention == other
            continue
        with pytest.raises(
            InputError, match=f"method '{method}' with convention '{other}', but it solves SDEs read as {convention};"
        ):
            sde(method=method, convention=other)
    with pytest.raises(InputError, match="give convention='stratonovich', or one of euler, milstein, srk"):
        sde(method="heun")
    x = torch.randn(2, 3)
    ito, stratonovich = (sde(method="milstein", convention=name) for name in ("ito", "stratonovich"))
    flow = MIXTURE.flow(LINEAR)
    assert torch.equal(ito(flow, x, seed=0), stratonovich(flow, x, seed=0))


def test_bad_options():
    """TS1, TS6, TS13, TS15: refused when the solver is built, with our own errors."""
    for method in ("reversible_heun", "adjoint_reversible_heun", "log_ode", "Euler", "", None):
        with pytest.raises(InputError, match=r"got method .*, expected one of euler, milstein, srk, heun, midpoint"):
            solvers.build("sde", steps=3, method=method)
    with pytest.raises(InputError, match="got convention 'Ito', expected one of ito, stratonovich"):
        solvers.build("sde", steps=3, convention="Ito")
    for steps in (0, -1, 2.0, math.nan, math.inf, True):
        with pytest.raises(InputError, match="whole number of 1 or more"):
            build(steps=steps)
    with pytest.raises(InputError, match="got last_step 'nothing'"):
        build(steps=3, last_step="nothing")
    with pytest.raises(UnknownOptionError, match="needs the option 'steps'"):
        solvers.build("sde")
    for option in ("dt", "adaptive", "names", "logqp", "noise_type", "bm"):
        with pytest.raises(UnknownOptionError, match=f"has no option '{option}'"):
            build(steps=3, **{option: 1})
    for start, end in ((1.5, 0.0), (0.5, 0.5), (math.nan, 0.0)):
        with pytest.raises(InputError, match="expected two different times"):
            build(steps=2, start=start, end=end)


def test_bad_states_and_networks():
    """TS2, TS14."""
    solver, flow = build(steps=3), MIXTURE.flow(LINEAR)
    for dtype in (torch.bfloat16, torch.int64, torch.complex64):
        with pytest.raises(InputTypeError, match=f"state of type {dtype}"):
            solver(flow, torch.zeros(2, 3, dtype=dtype))
    with pytest.raises(InputError, match=r"increments of shape \(5, 2, 3\), expected \(2, 2, 3\)"):
        solver(flow, torch.zeros(2, 3), increments=torch.zeros(5, 2, 3))
    with pytest.raises(InputError, match=r"prediction of shape \(2, 1\) from the backbone, expected \(2, 3\)"):
        solver(flow_of(lambda x, t: x[:, :1]), torch.zeros(2, 3))


def test_open_ends_are_refused_before_the_first_call():
    """srk, heun and euler_heun evaluate g at the end of a step, the network at it or not."""
    flow = MIXTURE.flow(LINEAR)
    up = {"steps": 4, "diffusion": "sbdm", "last_step": "none", "start": 0.2, "end": 1.0}  # g is infinite at t = 1
    for method in ("srk", "heun", "euler_heun"):
        with pytest.raises(
            OpenEndError, match="evaluates t = 1, where the diffusion Own is infinite on the Linear path"
        ):
            build(method, **up)(flow, torch.zeros(2, 3))
    with pytest.raises(OpenEndError, match="evaluates t = 0, where the Linear path has no score"):
        build("heun", steps=4, last_step="none")(flow, torch.zeros(2, 3))
    assert flow.nfe == 0
    for method in ("euler", "milstein", "midpoint"):
        assert build(method, **up)(flow, torch.zeros(2, 3), seed=0).isfinite().all()


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(MissingPackageError, match=r"no package 'torchsde'.*pip install 'pathline\[solvers\]'"):
        build(steps=3)
