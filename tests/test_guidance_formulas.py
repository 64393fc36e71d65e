"""CFG-Zero* and adaptive projected guidance by their formulas, in float64, and where these divide by zero."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pathline import Flow, InputError, backbones, interpolants, solvers
from pathline.solvers import guidance
from pathline.testing import GaussianMixture

LINEAR = interpolants.build("linear")
Y = torch.tensor([1, 0, 2])
STATE = torch.randn(3, 5, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
T = torch.tensor(0.4, dtype=torch.float64)
MIXTURE = GaussianMixture([[1.0, -2.0], [-1.5, 0.5], [2.0, 2.0]], [0.5, 0.8, 0.3], labels=[0, 1, 2])


def flow_of(given, null, predicts="velocity"):
    """A flow whose two predictions are any functions of x."""

    def network(x, t, label):
        mask = (label == 3).reshape(-1, *(1,) * (x.ndim - 1))
        return torch.where(mask, null(x), given(x))

    return Flow(backbones.wrap(network, num_classes=3, null_label=3), LINEAR, predicts)


def close(ours, theirs, tolerance=1e-12):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert float((ours - theirs).abs().max()) <= tolerance


def cosine(x):
    return torch.cos(2 * x) - 0.3 * x


# --- CFG-Zero* --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 2.5, [0.5, 4.0, 3.0]])
def test_cfg_zero_by_hand(scale):
    out = guidance.build("cfg-zero", scale=scale)(flow_of(torch.sin, cosine))(STATE, T, label=Y)
    assert out.kind == "velocity"
    for i, w in enumerate(scale if isinstance(scale, list) else [scale] * 3):
        c, n = torch.sin(STATE[i]).numpy(), cosine(STATE[i]).numpy()
        fitted = np.vdot(c, n) / (np.vdot(n, n) + 1e-8) * n
        close(out.velocity[i], torch.from_numpy(fitted + w * (c - fitted)))


def test_the_fit_is_the_best_one():
    """At scale 0 what is left is s·n: no other multiple of n is nearer to c."""
    fitted = guidance.build("cfg-zero", scale=0.0)(flow_of(torch.sin, cosine))(STATE, T, label=Y).velocity
    c, n = torch.sin(STATE), cosine(STATE)
    for shift in (-1e-3, 1e-3):
        nearer = (fitted + shift * n - c).flatten(1).norm(dim=1) - (fitted - c).flatten(1).norm(dim=1)
        assert bool((nearer > 0).all())


def test_cfg_zero_with_a_fit_of_one_is_classifier_free():
    """Where c is n and something orthogonal to it, s is 1."""

    def given(x):
        across = torch.cos(x)
        n = torch.sin(x)
        share = (across * n).flatten(1).sum(1) / (n * n).flatten(1).sum(1)
        return n + across - share[:, None, None, None] * n

    flow = flow_of(given, torch.sin)
    ours, theirs = (guidance.build(name, scale=3.0)(flow)(STATE, T, label=Y).velocity for name in ("cfg-zero", "cfg"))
    close(ours, theirs, 1e-8)  # the 1e-8 beside ‖n‖²


def test_cfg_zero_on_what_the_network_predicts():
    ours = guidance.build("cfg-zero", scale=3.0, quantity=None)(flow_of(torch.sin, cosine, "data"))
    theirs = guidance.build("cfg-zero", scale=3.0)(flow_of(torch.sin, cosine))
    close(ours(STATE, T, label=Y).data, theirs(STATE, T, label=Y).velocity)


def test_zero_start():
    """Two steps of Euler's method stand still: velocities vanish above the third time, not at it."""
    solver = solvers.build("euler", steps=5)
    guide = guidance.build("cfg-zero", scale=2.0, zero_above=solver.times[2])
    plain, flow = guidance.build("cfg-zero", scale=2.0), flow_of(torch.sin, cosine)
    solution = solver.solve(guide(flow), STATE, label=Y, trajectory=True)
    assert torch.equal(solution.trajectory[2], STATE) and solution.nfe == len(solution.times) == 5
    rest = solvers.build("euler", steps=3, start=solver.times[2])(plain(flow), STATE, label=Y)
    close(solution.x, rest, 1e-12)
    t = torch.tensor([0.3, 0.6, 0.61], dtype=torch.float64)
    guide = guidance.build("cfg-zero", scale=2.0, zero_above=0.6)
    ours, theirs = (g(flow)(STATE, t, label=Y).velocity for g in (guide, plain))
    close(ours[:2], theirs[:2])
    assert not ours[2].any()


def test_zero_start_is_for_velocities():
    for zero_above in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="zero_above"):
            guidance.build("cfg-zero", zero_above=zero_above)
    with pytest.raises(InputError, match="velocities are zeroed"):
        guidance.build("cfg-zero", zero_above=0.5, quantity="data")


# --- adaptive projected guidance ------------------------------------------------------------------------------------


def projected(c, n, w, eta=0.0, norm=None):
    """One sample, as vectors, from the unit vector along c."""
    d = (c - n).ravel()
    if norm is not None and np.linalg.norm(d) > norm:
        d = d * norm / np.linalg.norm(d)
    unit = c.ravel() / np.linalg.norm(c)
    along = np.dot(d, unit) * unit
    return c + (w - 1) * (d - along + eta * along).reshape(c.shape)


@pytest.mark.parametrize("scale", [0.0, 2.5, [0.5, 4.0, 3.0]])
@pytest.mark.parametrize(("eta", "norm"), [(0.0, None), (0.3, None), (0.0, 2.0), (-0.5, 5.0), (1.0, 2.0)])
def test_apg_by_hand(scale, eta, norm):
    guide = guidance.build("apg", scale=scale, eta=eta, norm=norm)
    out = guide(flow_of(torch.sin, cosine, "data"))(STATE, T, label=Y)
    assert out.kind == "data"
    for i, w in enumerate(scale if isinstance(scale, list) else [scale] * 3):
        c, n = torch.sin(STATE[i]).numpy(), cosine(STATE[i]).numpy()
        close(out.data[i], torch.from_numpy(projected(c, n, w, eta, norm)))


def test_apg_is_orthogonal_and_bounded():
    c = torch.sin(STATE)
    out = guidance.build("apg", scale=4.0, norm=0.7)(flow_of(torch.sin, cosine, "data"))(STATE, T, label=Y).data
    moved = (out - c).flatten(1)
    assert float((moved * c.flatten(1)).sum(1).abs().max()) < 1e-11
    assert bool((moved.norm(dim=1) <= 3.0 * 0.7 + 1e-12).all()) and bool((moved.norm(dim=1) > 0.5).all())


@pytest.mark.parametrize("quantity", [None, "velocity", "noise", "data"])
def test_apg_with_all_of_the_parallel_part_is_classifier_free(quantity):
    flow, label = MIXTURE.flow(LINEAR), torch.tensor([1, 0, 2, 1, 0])
    x = torch.randn(5, 2, dtype=torch.float64)
    ours = guidance.build("apg", scale=3.0, eta=1.0, quantity=quantity)(flow)
    theirs = guidance.build("cfg", scale=3.0)(flow)
    for t in (0.3, torch.tensor([0.2, 0.4, 0.6, 0.8, 0.9], dtype=torch.float64)):
        close(ours(x, t, label=label).velocity, theirs(x, t, label=label).velocity, 1e-11)
    midpoint = solvers.build("midpoint", steps=7, start=0.98, end=0.02)
    close(midpoint(ours, x, label=label), midpoint(theirs, x, label=label), 1e-9)


def test_apg_acts_on_data_whatever_the_network_predicts():
    label, x = torch.tensor([1, 0, 2, 1, 0]), torch.randn(5, 2, dtype=torch.float64)
    c, n = (MIXTURE.value("data", x, T, LINEAR, label=given) for given in (label, torch.full((5,), 3)))
    wanted = torch.stack(
        [torch.from_numpy(projected(a.numpy(), b.numpy(), 3.0, norm=0.4)) for a, b in zip(c, n, strict=True)]
    )
    for predicts in ("velocity", "score", "noise", "data"):
        guide = guidance.build("apg", scale=3.0, norm=0.4)
        close(guide(MIXTURE.flow(LINEAR, predicts))(x, T, label=label).data, wanted, 1e-10)


def test_apg_options():
    for options, message in (
        (dict(eta=math.inf), "got eta inf, expected a finite number"),
        (dict(momentum=math.nan), "got momentum nan"),
        (dict(momentum="heavy"), "got momentum 'heavy'"),
        (dict(norm=0.0), "got norm 0.0, expected a length above 0"),
        (dict(norm=math.inf), "got norm inf, expected a finite number"),
    ):
        with pytest.raises(InputError, match=message):
            guidance.build("apg", **options)


# --- nothing divided by nothing -------------------------------------------------------------------------------------


def zero(x):
    return torch.zeros_like(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("name", ["classifier-free", "cfg-zero", "apg"])
@pytest.mark.parametrize("rescale", [0.0, 1.0])
def test_what_vanishes_stays_finite(name, rescale, dtype):
    """‖c‖ = 0, ‖n‖ = 0, ‖d‖ = 0 and all of them; and predictions whose squares are not representable."""
    options = dict(norm=0.5) if name == "apg" else {}
    guide = guidance.build(name, scale=3.0, rescale=rescale, quantity="velocity", **options)

    def faint(x):
        return torch.full_like(x, torch.finfo(x.dtype).tiny)

    for given, null in ((zero, torch.sin), (torch.sin, zero), (torch.sin, torch.sin), (zero, zero), (faint, faint)):
        x = STATE.to(dtype)
        out = guide(flow_of(given, null))(x, 0.4, label=Y).velocity
        assert out.dtype == dtype and bool(out.isfinite().all())
        if given is null:
            close(out.double(), given(x).double(), 1e-3 if dtype == torch.float16 else 1e-5)
    x = torch.zeros(3, 5, dtype=torch.float64)
    assert not guide(flow_of(zero, zero))(x, 0.4, label=Y).velocity.any()
    one = torch.randn(3, dtype=torch.float64)  # samples of one number, which have no spread
    assert bool(guide(flow_of(torch.sin, torch.cos))(one, 0.4, label=Y).velocity.isfinite().all())


def test_limits_where_a_direction_vanishes():
    """No direction to project from: d stays whole. Nothing to fit: n counts as nothing."""
    c, n = zero(STATE), torch.sin(STATE)
    out = guidance.build("apg", scale=3.0, quantity="velocity")(flow_of(zero, torch.sin))(STATE, T, label=Y).velocity
    close(out, c + 2.0 * (c - n))
    out = guidance.build("cfg-zero", scale=3.0)(flow_of(torch.sin, zero))(STATE, T, label=Y).velocity
    close(out, 3.0 * torch.sin(STATE))


def test_gradients_pass():
    """Through every formula, also with respect to the state, against differences."""
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([1, 0])
    for name, options in (("cfg", {}), ("cfg-zero", {}), ("apg", dict(norm=0.5, eta=0.2))):
        guide = guidance.build(name, scale=2.5, rescale=0.4, **options)
        flow = guide(flow_of(torch.sin, lambda x: torch.cos(2 * x)))
        assert torch.autograd.gradcheck(lambda x, flow=flow: flow.evaluate(x, T, {"label": label}).velocity, (x,))
