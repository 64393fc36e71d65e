"""The Fréchet distance against closed forms, scipy, torch-fidelity and the nuclear norm of the samples themselves."""

from __future__ import annotations

import math
import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch

from pathline import Draws, InputError, data, metrics
from pathline.metrics import features
from pathline.metrics.frechet import frechet_distance, trace_by_eigenvalues, trace_by_factors
from pathline.metrics.moments import Moments, Statistics
from pathline.metrics.real import Reference


def moments(x):
    found = Moments()
    found.update(x)
    return found


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_by_chunks_against_numpy(offset):
    x = torch.randn(997, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + offset
    whole, first, second = Moments(), Moments(), Moments()
    for chunk in x.split(100):
        whole.update(chunk)
    first.update(x[:300])
    second.update(x[300:])
    first.merge(second)
    first.merge(Moments())
    first.update(x[:0])
    for found in (whole, first):
        assert found.count == 997
        assert np.allclose(found.mean.numpy(), x.numpy().mean(0), rtol=1e-13)
        assert np.allclose(found.covariance.numpy(), np.cov(x.numpy().T), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite(value):
    with pytest.raises(InputError, match="NaN or infinite values in features"):
        moments(torch.tensor([[0.0, 1.0, 2.0], [3.0, value, 4.0]]))


def exact_moments(mean, covariance):
    found = Moments()
    found.count, found.mean, found.scatter = 10**6, mean, covariance * (10**6 - 1)
    return found


def test_distance_of_commuting_gaussians_in_closed_form():
    """For covariances with common axes, tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) = Σ (√λ₁ − √λ₂)²."""
    axes = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    first, second = torch.rand(2, 7, dtype=torch.float64) + 0.1
    mean = torch.randn(2, 7, dtype=torch.float64)
    distance = frechet_distance(
        exact_moments(mean[0], axes * first @ axes.T), exact_moments(mean[1], axes * second @ axes.T)
    )
    expected = (mean[0] - mean[1]).square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    assert distance == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(("count", "dimension"), [(500, 6), (200, 37)])
def test_distance_against_scipy(count, dimension):
    linalg = pytest.importorskip("scipy.linalg")
    x, y = (
        torch.randn(count, dimension, dtype=torch.float64) @ torch.randn(dimension, dimension).double() for _ in "ab"
    )
    one, two = np.cov(x.numpy().T), np.cov(y.numpy().T)
    shift = x.numpy().mean(0) - y.numpy().mean(0)
    expected = shift @ shift + np.trace(one + two - 2 * np.real(linalg.sqrtm(one @ two)))
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-9)


def test_rank_deficient_and_equal_sets():
    """Truth for any rank: tr (Σ₁Σ₂)^½ is the nuclear norm of X₁ᵀ... formed from the centred samples themselves."""
    x, y = torch.randn(2, 23, 60, dtype=torch.float64)
    y = 1.7 * y + 0.3
    centred = [(z - z.mean(0)) / math.sqrt(22) for z in (x, y)]
    cross = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + sum(z.square().sum() for z in centred) - 2 * cross
    with pytest.warns(UserWarning, match="23 samples for 60 features: the distance is biased upwards"):
        assert frechet_distance(moments(x), moments(y)) == pytest.approx(float(expected), rel=1e-10)
        assert frechet_distance(moments(x), moments(x)) == pytest.approx(0, abs=1e-11)
    digits = data.build("digits", split="all").batch(range(1797))["data"].flatten(1)
    assert torch.linalg.matrix_rank(moments(digits).covariance) == 61  # three pixels are always empty
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 <= frechet_distance(moments(digits), moments(digits)) < 1e-9


def test_dead_features_do_no_harm():
    x, y = torch.randn(2, 50, 4, dtype=torch.float64)
    wide = [torch.cat((z, torch.ones(50, 3, dtype=torch.float64)), dim=1) for z in (x, y)]
    assert frechet_distance(*map(moments, wide)) == pytest.approx(frechet_distance(moments(x), moments(y)), rel=1e-9)


def test_too_few_samples():
    with pytest.raises(InputError, match="got 1 samples, expected at least 2"):
        _ = moments(torch.zeros(1, 3)).covariance


def test_what_is_no_covariance():
    """Either may be it, and whatever the distance would be: of the identity and a saddle the traces give 0."""
    whole = Statistics(torch.zeros(5), torch.eye(5).double(), None)
    skew = torch.eye(5).double()
    skew[1, 3] = 0.01
    saddle = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0]).double().diag()
    below = torch.tensor([1.0, 1e-9, 1.0, -1e-5, 1.0]).double().diag()
    missing = torch.full((5, 5), math.nan).double()
    for matrix, message in (
        (saddle, "a covariance with a negative eigenvalue"),
        (-torch.eye(5).double(), "a covariance with a negative eigenvalue"),
        (below, "a covariance with a negative eigenvalue"),
        (skew, "a covariance that is not symmetric"),
        (missing, "NaN or infinite values in a covariance"),
    ):
        wrong = Statistics(torch.zeros(5), matrix, None)
        for pair in ((whole, wrong), (wrong, whole), (wrong, wrong)):
            with pytest.raises(InputError, match=message):
                frechet_distance(*pair)
    with pytest.raises(InputError, match="NaN or infinite values in a mean"):
        frechet_distance(whole, Statistics(missing[0], whole.covariance, None))


def test_a_set_of_one_image_has_a_covariance_of_zeros():
    zeros = Statistics(torch.zeros(4), torch.zeros(4, 4).double(), None)
    assert frechet_distance(zeros, Statistics(torch.ones(4), torch.eye(4).double() * 9, None)) == pytest.approx(40)


# --- both forms of the trace ------------------------------------------------------------------------------------------


def nuclear(x, y):
    """The distance by the samples themselves, exact for any number: tr (Σ₁Σ₂)^½ is a nuclear norm of X₁X₂ᵀ."""
    centred = [(z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y)]
    cross = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + sum(z.square().sum() for z in centred) - 2 * cross)


def decaying(count, dimension, seed):
    """Samples whose variances fall over six orders, as those of networks' features do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)).Q
    return x * 10 ** -torch.linspace(0, 3, dimension, dtype=torch.float64) @ axes


@pytest.mark.parametrize(
    ("count", "dimension", "same"), [(300, 48, False), (40, 96, False), (40, 96, True), (2, 7, False), (3, 500, False)]
)
@pytest.mark.parametrize("make", [decaying, lambda n, d, s: torch.randn(n, d, dtype=torch.float64)])
def test_any_number_of_samples_against_the_nuclear_norm(make, count, dimension, same):
    x = make(count, dimension, 1)
    y = x if same else 1.2 * make(count + 1, dimension, 2) + 0.1
    expected = nuclear(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = frechet_distance(moments(x), moments(y))
    traces = float(moments(x).covariance.trace() + moments(y).covariance.trace())
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-11 * traces)


def test_both_forms_agree_where_ranks_are_full():
    x, y = torch.randn(400, 37, dtype=torch.float64), torch.randn(500, 37, dtype=torch.float64) * 1.3
    one, two = moments(x).covariance, moments(y).covariance
    factors = trace_by_factors(one, two)
    assert trace_by_eigenvalues(one, two, 1e-7) == pytest.approx(factors, rel=1e-13)
    assert trace_by_factors(two, one) == pytest.approx(factors, rel=1e-13)


def test_the_cheaper_form_is_refused_where_it_would_err():
    """Of rank 39 of 96 it errs by √ε a missing direction; it must say so rather than return that."""
    x, y = decaying(40, 96, 3), decaying(41, 96, 4)
    one, two = moments(x).covariance, moments(y).covariance
    assert trace_by_eigenvalues(one, two, 1e-7 * float((one + two).trace())) is None
    ridge = 1e-14 * torch.eye(96, dtype=torch.float64)
    assert trace_by_eigenvalues(one + ridge, two + ridge, 1e-9) is None


def test_the_cheaper_form_is_taken_for_many_samples(monkeypatch):
    x, y = torch.randn(2, 300, 24, dtype=torch.float64)
    expected = nuclear(x, y)
    monkeypatch.setattr("pathline.metrics.frechet.trace_by_factors", lambda *_: pytest.fail("the dear form was taken"))
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("count", "dimension"), [(700, 32), (60, 128)])
def test_distance_against_torch_fidelity(count, dimension, torchvision_operators):
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = (decaying(count, dimension, seed) + 0.3 * seed for seed in (1, 2))
    theirs = [metric_fid.fid_features_to_statistics(z) for z in (x, y)]
    expected = metric_fid.fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = frechet_distance(moments(x), moments(y))
    # theirs sums roots of eigenvalues, good to √ε a direction
    assert found == pytest.approx(expected, abs=dimension * 2e-8 * float(moments(x).covariance.trace()))


def test_gaussians_in_closed_form_with_other_axes():
    """In two dimensions tr (Σ₁Σ₂)^½ = √(tr Σ₁Σ₂ + 2·√(det Σ₁ det Σ₂))."""
    one = torch.tensor([[2.0, 0.3], [0.3, 0.5]]).double()
    two = torch.tensor([[1.0, -0.4], [-0.4, 3.0]]).double()
    cross = math.sqrt(float((one @ two).trace()) + 2 * math.sqrt(float(one.det() * two.det())))
    expected = 25 + float((one + two).trace()) - 2 * cross
    mean = torch.tensor([3.0, 4.0]).double()
    found = frechet_distance(Statistics(mean, one, None), Statistics(0 * mean, two, None))
    assert found == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(("count", "dimension"), [(128, 256), (400, 64)])
def test_covariances_of_float32(count, dimension):
    """Those of ADM's evaluator and others, symmetric up to rounding: finite, real and near."""
    x = torch.randn(count, dimension, dtype=torch.float64)
    y = 1.1 * torch.randn(count, dimension, dtype=torch.float64)
    rough = [Statistics(z.mean(0).float(), torch.from_numpy(np.cov(z.numpy().T)).float(), count) for z in (x, y)]
    rough[0].covariance[0, 1] += 1e-7
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert frechet_distance(*rough) == pytest.approx(nuclear(x, y), rel=1e-4)
        assert 0 <= frechet_distance(rough[1], rough[1]) < 1e-3


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_huge_offsets_cost_no_more_than_their_digits(offset):
    x, y = torch.randn(2, 500, 12, dtype=torch.float64)
    expected = nuclear(x, y)
    shifted = [Moments(), Moments()]
    for found, z in zip(shifted, (x, y), strict=True):
        for chunk in (z + offset).split(7):
            found.update(chunk)
    assert frechet_distance(*shifted) == pytest.approx(expected, rel=1e-15 * offset * 100)


def test_chunks_of_any_order_and_size_give_one_result():
    x = decaying(501, 20, 5) + 7
    whole, y = moments(x), moments(decaying(300, 20, 6))
    expected = frechet_distance(whole, y)
    for size, order in ((1, 1), (13, -1), (200, 1)):
        found = Moments()
        for chunk in list(x.split(size))[::order]:
            found.update(chunk)
        assert torch.allclose(found.scatter, whole.scatter, rtol=1e-12, atol=1e-12)
        assert frechet_distance(found, y) == pytest.approx(expected, rel=1e-12)


def test_what_a_state_holds_is_all():
    found, again = moments(torch.randn(9, 4)), Moments()
    again.load(found.state())
    again.update(torch.ones(2, 4))
    assert found.count == 9 and again.count == 11  # no tensor is shared
    assert not torch.equal(found.mean, again.mean)


def test_a_tiny_negative_is_zero_and_a_large_one_an_error():
    covariance = torch.eye(3).double()
    slightly = torch.diag(torch.tensor([1.0, 1.0, -1e-8])).double()
    assert frechet_distance(Statistics(torch.zeros(3), slightly, None), Statistics(torch.zeros(3), slightly, None)) == 0
    with pytest.raises(InputError, match="with a negative eigenvalue"):
        wrong = Statistics(torch.zeros(3), covariance - 1.1 * torch.ones(3, 3), None)
        frechet_distance(wrong, wrong)
    with pytest.raises(InputError, match="got statistics of 3 and 4 features"):
        frechet_distance(Statistics(torch.zeros(3), covariance, None), moments(torch.randn(9, 4)))


# --- the metric -----------------------------------------------------------------------------------------------------


class Pixels(features.Features):
    name = "values"
    sizes: ClassVar = {"features": 12}
    manifest: ClassVar = {"name": "values", "sizes": sizes}

    def __call__(self, images):
        return images.flatten(1)


class Exact(Reference):
    """A standard normal reference of an unknown number of images."""

    manifest: ClassVar = {"kind": "exact"}

    def statistics(self, space, output):
        return Statistics(torch.zeros(12), 0.01 * torch.eye(12).double(), None)

    def vectors(self, space, output, count=None):
        raise NotImplementedError


def drawn(count, seed=0):
    x = torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    return (0.1 * x).clamp(-1, 1)


@pytest.mark.parametrize(("shift", "factor"), [(0.2, 1.0), (0.0, math.sqrt(2))])
def test_the_jackknife_is_the_spread_of_repeated_draws(shift, factor):
    """Its standard error, mean over 40 draws, against the standard deviation of 300.

    Where both laws are the same the distance is quadratic in the samples' errors, and the jackknife √2 too large.
    """
    distances, errors = [], []
    for seed in range(300):
        metric = metrics.build("frechet", real=Exact(), features=Pixels(), groups=10 if seed < 40 else 0)
        metric.update({"data": drawn(400, seed) + shift})
        record = metric.compute()
        distances.append(record.values["distance"])
        errors += record.uncertainty.values()
        assert ("jackknife over 10 groups" if seed < 40 else "draw 3 times") in record.uncertainty_law
    assert len(errors) == 40
    assert np.mean(errors) == pytest.approx(factor * np.std(distances, ddof=1), rel=0.15)


def test_the_jackknife_against_its_formula():
    """Groups drawn by the samples' numbers, whatever the batches: delete-one-group distances by plain numpy."""
    metric = metrics.build("frechet", real=Exact(), features=Pixels(), groups=3)
    x = drawn(50)
    for part in (range(20, 50), range(20)):
        metric.update({"data": x[list(part)], "index": torch.tensor(part)})
    groups = (3 * Draws(0).uniform("jackknife", range(50))).floor()
    rest = [nuclear_against_exact(x[groups != group].flatten(1).double()) for group in range(3)]
    expected = math.sqrt(2 / 3 * sum((d - np.mean(rest)) ** 2 for d in rest))
    assert metric.compute().uncertainty["distance"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("groups", [5, 10])
def test_the_jackknife_of_balanced_labels(groups):
    """Of labels i mod K a group by i mod K would be one class, or two, and the error tell how classes differ."""
    centres = 0.2 * torch.randn(10, 3, 2, 2)
    label = torch.arange(400) % 10
    distances, errors = [], []
    for seed in range(60):
        metric = metrics.build("frechet", real=Exact(), features=Pixels(), groups=groups)
        metric.update({"data": (centres[label] + drawn(400, seed)).clamp(-1, 1), "label": label})
        record = metric.compute()
        distances.append(record.values["distance"])
        errors += record.uncertainty.values()
    assert 0.9 * np.std(distances, ddof=1) < np.mean(errors) < 4 * np.std(distances, ddof=1)


def test_groups_of_few_samples_are_refused():
    metric = metrics.build("frechet", real=Exact(), features=Pixels(), groups=4)
    metric.update({"data": drawn(39)})
    with pytest.raises(InputError, match="got 39 samples, expected at least 40; draw more, or set groups to fewer"):
        metric.compute()


def nuclear_against_exact(x):
    values = np.linalg.eigvalsh(np.cov(x.numpy().T))
    return float(x.mean(0).square().sum()) + sum((math.sqrt(v) - 0.1) ** 2 for v in values)


def test_few_samples_are_told_in_the_record():
    metric = metrics.build("frechet", real=Exact(), features=Pixels())
    metric.update({"data": drawn(9)})
    with pytest.warns(UserWarning, match="9 samples for 12 features"):
        record = metric.compute()
    assert record.warnings == ("9 samples for 12 features: the distance is biased upwards",)
    assert record.real == {} and record.reference == {"kind": "exact", "count": None}
    metric.update({"data": drawn(9, 1)})
    assert metric.compute().warnings == ()
