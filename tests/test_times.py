"""Laws of time against their densities, integrated by scipy; shifts and strata against what they promise."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from pathline import Draws, InputError, UnknownNameError, interpolants
from pathline.objectives import times

COUNT = 100_000
LAWS = {
    "uniform": [{}],
    "logit-normal": [{}, {"mean": -0.7, "std": 0.6}],
    "mode": [{}, {"scale": -1.0}, {"scale": 1.7}, {"scale": 0.0}],
    "cosmap": [{}],
    "lognormal": [{}, {"mean": 0.3, "std": 0.8, "interpolant": "trigonometric"}, {"interpolant": "vp"}],
    "u-shaped": [{}, {"a": 1.5}],
    "shifted": [{"shift": 3.0}, {"law": "logit-normal", "shift": 0.3}, {"dimension": 256 * 768, "law": "mode"}],
    "stratified": [{}, {"law": {"name": "u-shaped", "a": 2.0}, "strata": 7}],
}
CASES = [(name, options) for name, all_options in LAWS.items() for options in all_options]
cases = pytest.mark.parametrize(("name", "options"), CASES)


@functools.cache
def cumulative(case):
    """∫₀ˣ density as a function of x, by Simpson's rule in θ of x = sin²(θ/2), for which ends may be infinite."""
    name, options = CASES[case]
    law = times.build(name, **options)
    angle = np.linspace(1e-5, np.pi - 1e-5, 40_001)
    x = np.sin(angle / 2) ** 2
    slope = law.density(torch.from_numpy(x)).numpy() * np.sin(angle) / 2
    values = integrate.cumulative_simpson(slope, x=angle, initial=0)
    return lambda y: np.interp(y, x, values)


def test_every_law_is_covered():
    assert set(LAWS) <= set(times.names())


@cases
def test_samples_follow_the_density(name, options):
    """Kolmogorov–Smirnov against the integrated density, on a grid of it; p = 0.001."""
    law = times.build(name, **options)
    t = law.sample(Draws(5).at(range(COUNT)))
    assert t.shape == (COUNT,) and t.dtype == torch.float32 and bool(((t >= 0) & (t <= 1)).all())
    grid, truth = np.linspace(0, 1, 201)[1:-1], cumulative(CASES.index((name, options)))
    empirical = np.searchsorted(np.sort(t.numpy()), grid, side="right") / COUNT
    bound = 1.95 / math.sqrt(COUNT)
    assert np.abs(empirical - truth(grid)).max() < bound
    assert truth(1.0) == pytest.approx(1, abs=2e-4)


@given(case=st.sampled_from(CASES), u=st.floats(0.001, 0.999))
def test_quantiles_invert_the_cumulative_density(case, u):
    law = times.build(case[0], **case[1])
    t = float(law.quantile(torch.tensor([u], dtype=torch.float64)))
    assert 0 <= t <= 1 and cumulative(CASES.index(case))(t) == pytest.approx(u, abs=1e-5)


@cases
def test_quantiles_reach_the_ends(name, options):
    law = times.build(name, **options)
    ends = law.quantile(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([0, 1], abs=1e-12)


@cases
def test_a_time_is_the_same_in_any_batch(name, options):
    law, draws = times.build(name, **options), Draws(3)
    whole = law.sample(draws.at(range(40, 140), 2))
    assert torch.equal(law.sample(draws.at(range(70, 90), 2)), whole[30:50])
    assert torch.equal(law.sample(draws.at(torch.tensor([99, 41]), 2)), whole[[59, 1]])
    assert not torch.equal(law.sample(draws.at(range(40, 140), 3)), whole)


def test_the_lognormal_law_is_edms():
    """σ/α is log-normal on every path; on the linear one the law is the logit-normal."""
    for path in ("linear", "trigonometric", "vp"):
        law = times.build("lognormal", mean=-0.4, std=0.5).bind(interpolants.build(path))
        at = interpolants.build(path).evaluate(law.sample(Draws(1).at(range(COUNT))).double())
        ratio = (at.sigma / at.alpha).log().numpy()
        assert stats.kstest((ratio + 0.4) / 0.5, "norm").statistic < 1.95 / math.sqrt(COUNT)
    u = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    theirs = times.build("logit-normal", mean=-1.2, std=1.2).quantile(u)
    assert torch.allclose(times.build("lognormal").quantile(u), theirs, atol=1e-12)
    bound = times.build("shifted", law="lognormal", shift=2.0).bind(interpolants.build("vp"))
    assert type(bound.law.interpolant).__name__ == "VariancePreserving"
    assert type(times.build("stratified", law="lognormal").bind(interpolants.build("vp")).law.interpolant) is not type(
        interpolants.build("linear")
    )


@given(u=st.floats(0.01, 0.99), a=st.floats(0.1, 10), b=st.floats(0.1, 10))
def test_shifts_compose_and_add_to_the_logit(u, a, b):
    u = torch.tensor(u, dtype=torch.float64)
    once = times.build("shifted", shift=a)
    twice = times.build("shifted", law=once, shift=b)
    assert float(torch.logit(once.quantile(u)) - torch.logit(u)) == pytest.approx(math.log(a), abs=1e-9)
    assert torch.allclose(twice.quantile(u), times.build("shifted", shift=a * b).quantile(u))
    # on the clock of LightningDiT, where data are at 1, the same map has the parameter 1/a (L6)
    theirs = 1 - times.build("shifted", shift=1 / a).quantile(1 - u)
    assert torch.allclose(once.quantile(u), theirs)


def test_shifts_by_dimension():
    """RAE's √(C·H·W/4096): 6.93 for 768 channels of 16×16."""
    assert times.build("shifted", dimension=768 * 256).shift == pytest.approx(math.sqrt(48))
    assert times.build("shifted", dimension=4 * 64 * 64, base=4 * 32 * 32).shift == pytest.approx(2)


def test_a_lognormal_law_keeps_the_path_it_is_built_with():
    """The law's own path is no option to be lost: σ/α of vp is log-normal, whatever path the objective has."""
    vp, linear = interpolants.build("vp"), interpolants.build("linear")
    law = times.build("lognormal", mean=-0.4, std=0.5, interpolant="vp").bind(linear)
    at = vp.evaluate(law.sample(Draws(1).at(range(COUNT))).double())
    assert stats.kstest((((at.sigma / at.alpha).log() + 0.4) / 0.5).numpy(), "norm").statistic < 1.95 / COUNT**0.5


@given(shift=st.floats(1e-3, 1e3))
def test_shifted_times_stay_in_the_interval(shift):
    """In float32 a·1/(1 + (a − 1)·1) may be 1.000001; a law far in the noise draws such ends."""
    far = {"name": "logit-normal", "mean": 17.0}
    for law in (far, {"name": "logit-normal", "mean": -60.0, "std": 30.0}):
        t = times.build("shifted", law=law, shift=shift).sample(Draws(0).at(range(50)))
        assert bool(((t >= 0) & (t <= 1)).all())


@pytest.mark.parametrize("strata", [4, 16])
def test_every_stratum_is_hit_once(strata):
    law = times.build("stratified", law="logit-normal", strata=strata)
    t = law.sample(Draws(2).at(range(5 * strata))).double()
    u = torch.special.ndtr(torch.logit(t)).reshape(5, strata)
    hit = (u * strata).floor().long().sort(1).values
    assert torch.equal(hit, torch.arange(strata).expand(5, -1))
    orders = {tuple((row * strata).floor().long().tolist()) for row in u}
    assert len(orders) > 1  # dealt anew for each block


def test_strata_reduce_the_variance_of_a_mean():
    plain, dealt = (
        torch.stack([times.build(name).sample(Draws(seed).at(range(64))).mean() for seed in range(200)])
        for name in ("uniform", "stratified")
    )
    assert float(dealt.std()) < 0.1 * float(plain.std())
    assert float(dealt.mean()) == pytest.approx(0.5, abs=0.001)


def test_bad_laws():
    for name, options, message in (
        ("mode", dict(scale=1.7520), "where the law is monotone"),
        ("mode", dict(scale=-1.01), "where the law is monotone"),
        ("mode", dict(scale=math.nan), "where the law is monotone"),
        ("u-shaped", dict(a=0), "got a 0"),
        ("u-shaped", dict(a=math.inf), "got a inf"),
        ("lognormal", dict(std=0.0), "got mean -1.2 and std 0"),
        ("lognormal", dict(mean=math.nan), "got mean nan"),
        ("shifted", dict(), "got shift None and dimension None"),
        ("shifted", dict(shift=2.0, dimension=4096), "expected one of the two"),
        ("shifted", dict(shift=0.0), "got a shift of 0"),
        ("shifted", dict(shift=math.inf), "got a shift of inf"),
        ("shifted", dict(dimension=-4), "got dimension -4 and base 4096"),
        ("shifted", dict(dimension=64, base=0), "got dimension 64 and base 0"),
        ("shifted", dict(shift=2.0, base=1024), "got base 1024 beside a shift"),
        ("stratified", dict(strata=1), "got strata 1"),
        ("stratified", dict(strata=2.5), "got strata 2.5, expected a whole number"),
        ("stratified", dict(law={"name": "stratified", "strata": 8}), "set strata once"),
        ("stratified", dict(law={"name": "shifted", "law": "stratified", "shift": 2.0}), "set strata once"),
    ):
        with pytest.raises(InputError, match=message):
            times.build(name, **options)
    times.build("mode", scale=2 / (math.pi - 2))
    with pytest.raises(UnknownNameError, match="unknown law of time 'beta'"):
        times.build("shifted", law="beta", shift=2.0)
