"""Couplings against brute force, scipy and POT; C1 to C7 are the defects of FIELD that each test would find."""

from __future__ import annotations

import itertools
import math
import random
import sys

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pathline import ConvergenceError, Draws, InputError, InputTypeError, MissingPackageError, UnknownNameError
from pathline.interpolants import couplings

NAMES = ("independent", "exact", "sinkhorn", "class-conditional", "conditional", "partial")
every = pytest.mark.parametrize("name", NAMES)


def batch(count, shape=(2,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    data, noise = (torch.randn(count, *shape, generator=generator) for _ in range(2))
    label = torch.randint(3, (count,), generator=generator)
    return data, noise, dict(label=label, condition=torch.randn(count, 4, generator=generator))


def cost_of(order, data, noise, condition=None, weight=0.0):
    order = torch.as_tensor(order)
    cost = (data.double() - noise.double()[order]).flatten(1).square().sum(1)
    if condition is not None:
        cost = cost + weight * (condition.double() - condition.double()[order]).square().sum(1)
    return float(cost.mean())


def cheapest(data, noise, **options):
    return min(cost_of(order, data, noise, **options) for order in itertools.permutations(range(len(data))))


def test_names():
    assert set(NAMES) <= set(couplings.names())


@every
@given(count=st.integers(1, 9), shape=st.sampled_from([(1,), (3,), (2, 3, 5)]), seed=st.integers(0, 99))
def test_every_coupling_is_a_permutation_that_the_draws_fix(name, count, shape, seed):
    """C1: all data and all noise survive. C3: the same draws, the same pairing."""
    data, noise, given_ = batch(count, shape, seed)
    coupling = couplings.build(name)
    first, again = (coupling.pair(data, noise, **given_, draws=Draws(seed).at(range(count))) for _ in range(2))
    assert sorted(first.indices.tolist()) == list(range(count)) and first.indices.dtype == torch.int64
    assert torch.equal(first.indices, again.indices)
    assert first.cost == pytest.approx(cost_of(first.indices, data, noise), rel=1e-9, abs=1e-12)


@given(count=st.integers(1, 12), seed=st.integers(0, 99), within=st.sampled_from(["exact", "sinkhorn", "independent"]))
def test_labels_never_mix(count, seed, within):
    data, noise, given_ = batch(count, (3,), seed)
    pairing = couplings.build("class-conditional", within=within).pair(data, noise, **given_)
    assert torch.equal(given_["label"][pairing.indices], given_["label"])


@given(count=st.integers(1, 6), seed=st.integers(0, 99))
def test_exact_against_all_permutations(count, seed):
    data, noise, _ = batch(count, (2, 3), seed)
    exact = couplings.build("exact").pair(data, noise)
    assert exact.cost == pytest.approx(cheapest(data, noise), rel=1e-9)
    assert exact.cost <= couplings.build("independent").pair(data, noise).cost * (1 + 1e-12)
    assert torch.equal(
        couplings.build("conditional", weight=0.0).pair(data, noise, condition=data).indices, exact.indices
    )


@given(count=st.integers(1, 6), seed=st.integers(0, 99))
def test_class_conditional_against_all_permutations_that_keep_labels(count, seed):
    data, noise, given_ = batch(count, (2,), seed)
    label = given_["label"].tolist()
    kept = [order for order in itertools.permutations(range(count)) if [label[i] for i in order] == label]
    best = min(cost_of(order, data, noise) for order in kept)
    assert couplings.build("class-conditional").pair(data, noise, **given_).cost == pytest.approx(best, rel=1e-9)


@given(count=st.integers(1, 6), seed=st.integers(0, 99), weight=st.sampled_from([0.0, 0.3, 5.0]))
def test_conditional_against_all_permutations(count, seed, weight):
    data, noise, given_ = batch(count, (2,), seed)
    condition = given_["condition"]
    order = couplings.build("conditional", weight=weight).pair(data, noise, condition=condition).indices
    best = cheapest(data, noise, condition=condition, weight=weight)
    assert cost_of(order, data, noise, condition, weight) == pytest.approx(best, rel=1e-9)


@given(count=st.integers(1, 5), seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]))
def test_partial_against_all_choices(count, seed, share):
    """The pairs transported are the cheapest k of all; the rest keeps its own noise, or takes what remains in order."""
    data, noise, _ = batch(count, (2,), seed)
    matrix = torch.cdist(data.double(), noise.double()).square().numpy()
    choices = itertools.product(
        itertools.combinations(range(count), round(share * count)),
        itertools.permutations(range(count), round(share * count)),
    )
    rows, columns = min(choices, key=lambda choice: sum(matrix[i, j] for i, j in zip(*choice, strict=True)))
    expected = dict(zip(rows, columns, strict=True))
    expected |= {i: i for i in set(range(count)) - set(rows) - set(columns)}
    homeless, unused = (sorted(set(range(count)) - set(ids)) for ids in (expected, expected.values()))
    expected |= dict(zip(homeless, unused, strict=True))
    indices = couplings.build("partial", share=share).pair(data, noise).indices.tolist()
    assert indices == [expected[i] for i in range(count)]


def test_partial_ends_at_exact_and_independent():
    data, noise, _ = batch(40)
    build = couplings.build
    assert build("partial", share=1.0).pair(data, noise).cost == pytest.approx(build("exact").pair(data, noise).cost)
    assert build("partial", share=0.0).pair(data, noise).indices.tolist() == list(range(40))
    costs = [build("partial", share=share).pair(data, noise).cost for share in (0.0, 0.3, 0.7, 1.0)]
    assert costs == sorted(costs, reverse=True)


def test_exact_against_pot():
    data, noise, _ = batch(64, (5,))
    weights = np.full(64, 1 / 64)
    truth = ot.emd2(weights, weights, torch.cdist(data.double(), noise.double()).square().numpy())
    assert couplings.build("exact").pair(data, noise).cost == pytest.approx(truth, rel=1e-9)


def test_a_heavy_condition_is_never_left():
    """With two conditions far apart the coupling is that of each alone."""
    data, noise, _ = batch(30)
    label = torch.arange(30) % 2
    order = couplings.build("conditional", weight=1e6).pair(data, noise, condition=label[:, None].float()).indices
    assert torch.equal(label[order], label)
    split = couplings.build("class-conditional").pair(data, noise, label=label)
    assert cost_of(order, data, noise) == pytest.approx(split.cost, rel=1e-9)


# --- Sinkhorn --------------------------------------------------------------------------------------------------------


def plain_plan(cost, weight, iterations=5000):
    """The same plan by the textbook iteration on potentials, written out in the log domain."""
    n = len(cost)
    f, g = torch.zeros(n).double(), torch.zeros(n).double()
    for _ in range(iterations):
        f = -weight * torch.logsumexp((g[None] - cost) / weight - math.log(n), 1)
        g = -weight * torch.logsumexp((f[:, None] - cost) / weight - math.log(n), 0)
    return (f[:, None] + g[None] - cost) / weight - 2 * math.log(n)


@pytest.mark.parametrize(("dim", "scale"), [(2, 1.0), (2, 0.1), (512, 1.0), (3000, 1.0)])
def test_plans_do_not_underflow(dim, scale):
    """C5: torchcfm's plan is uniform at d = 512; ours is the textbook's, at any dimension and scale."""
    generator = torch.Generator().manual_seed(1)
    data, noise = (scale * torch.randn(12, dim, generator=generator) for _ in range(2))
    cost = couplings.squared_distances(data, noise)
    sinkhorn = couplings.build("sinkhorn", regularisation=0.05, tolerance=1e-6, iterations=20_000)
    log_plan, report = sinkhorn.log_plan(cost)
    truth = plain_plan(cost, 0.05 * float(cost.mean()))
    assert torch.allclose(log_plan.exp(), truth.exp(), atol=1e-6)
    assert report.marginal_error <= 1e-6 and report.iterations > 1
    assert float((log_plan.exp() * 144 - 1).abs().max()) > 0.3  # far from uniform


def test_a_bridge_in_many_dimensions_does_not_underflow():
    """C5: the regularisation 2·scale² of a bridge at d = 512, whose kernel exp(−cost/2) is below float64's 1e-308."""
    generator = torch.Generator().manual_seed(1)
    data, noise = (torch.randn(7, 512, generator=generator) * spread for spread in (1.0, 1.5))
    cost = couplings.squared_distances(data, noise)
    sinkhorn = couplings.build("sinkhorn", regularisation=2.0, relative=False, iterations=100_000)
    assert float((-cost / 2).exp().max()) < 1e-300
    log_plan, _ = sinkhorn.log_plan(cost)
    assert torch.allclose(log_plan.exp(), plain_plan(cost, 2.0, 20_000).exp(), atol=1e-3)
    assert float(log_plan.exp().max()) > 0.9 / 7  # 1/49 if uniform


def test_a_plan_against_pot_outside_the_log_domain():
    data, noise, _ = batch(11, (3,))
    cost = couplings.squared_distances(data, noise)
    log_plan, _ = couplings.build("sinkhorn", regularisation=2.0, relative=False, tolerance=1e-9).log_plan(cost)
    weights = np.full(11, 1 / 11)
    truth = ot.sinkhorn(weights, weights, cost.numpy(), 2.0, method="sinkhorn", stopThr=1e-12)
    assert np.allclose(log_plan.exp().numpy(), truth, atol=1e-10)


@given(count=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_permutation_is_the_most_likely_one_of_the_perturbed_plan(count, seed):
    data, noise, _ = batch(count, (3,), seed)
    indices = (
        couplings.build("sinkhorn", regularisation=0.5).pair(data, noise, draws=Draws(seed).at(range(count))).indices
    )
    cost = torch.cdist(data.double(), noise.double()).square()
    uniform = Draws(seed).uniform("coupling", range(count), (count,)).double()
    perturbed = plain_plan(cost, 0.5 * float(cost.mean()), 500) - torch.log(-torch.log(uniform))
    orders = itertools.permutations(range(count))
    best = max(float(perturbed[range(count), list(order)].sum()) for order in orders)
    assert float(perturbed[range(count), indices].sum()) == pytest.approx(best, abs=1e-2)  # 1e-3 of every marginal


def test_class_conditional_reports_the_worst_of_its_classes():
    data, noise, given_ = batch(14)
    within = {"name": "sinkhorn", "regularisation": 0.3, "draw": "rows"}
    pairing = couplings.build("class-conditional", within=within).pair(data, noise, **given_)
    reports = []
    for label in given_["label"].unique():
        mine = given_["label"] == label
        reports.append(couplings.build(within).pair(data[mine], noise[mine]).report)
    assert pairing.report == tuple(map(max, zip(*reports, strict=True)))
    assert torch.equal(given_["label"][pairing.indices], given_["label"])
    assert couplings.build("class-conditional").pair(data, noise, **given_).report is None


def test_draws_belong_to_sample_ids():
    """In a class-conditional coupling a sample draws with its own id, whatever the order of the ids."""
    data, noise, _ = batch(7)
    ids, label = torch.tensor([40, 3, 17, 5, 99, 1, 12]), torch.tensor([0, 1, 0, 1, 1, 0, 0])
    sinkhorn = couplings.build("sinkhorn", regularisation=1.0, draw="rows")
    whole = couplings.build("class-conditional", within=sinkhorn)
    indices = whole.pair(data, noise, label=label, draws=Draws(2).at(ids, 6)).indices
    for value in (0, 1):
        mine = torch.nonzero(label == value).flatten()
        alone = sinkhorn.pair(data[mine], noise[mine], draws=Draws(2).at(ids[mine].tolist(), 6)).indices
        assert torch.equal(indices[mine], mine[alone])


def test_the_regularisation_is_absolute_or_in_units_of_the_mean_cost():
    data, noise, _ = batch(10)
    cost = couplings.squared_distances(data, noise)
    build = couplings.build
    relative = build("sinkhorn", regularisation=0.3).log_plan(cost)[0]
    absolute = build("sinkhorn", regularisation=0.3 * float(cost.mean()), relative=False).log_plan(cost)[0]
    assert torch.allclose(relative, absolute, atol=1e-9)


def test_limits_of_the_regularisation():
    data, noise, _ = batch(7)
    exact = couplings.build("exact").pair(data, noise)
    near = couplings.build("sinkhorn", regularisation=2e-3, iterations=100_000).pair(
        data, noise, draws=Draws(0).at(range(7))
    )
    assert torch.equal(near.indices, exact.indices) and near.report.marginal_error <= 1e-3
    far = couplings.build("sinkhorn", regularisation=1e6)
    counts = np.zeros((3, 3))
    data, noise, _ = batch(3)
    seen = {}
    for seed in range(1200):
        order = tuple(far.pair(data, noise, draws=Draws(seed).at(range(3))).indices.tolist())
        seen[order] = seen.get(order, 0) + 1
        counts[range(3), order] += 1
    assert len(seen) == 6 and stats.chisquare(list(seen.values())).pvalue > 1e-3  # uniform over all permutations


def test_rows_are_drawn_from_the_plan():
    data, noise, _ = batch(4)
    sinkhorn = couplings.build("sinkhorn", regularisation=0.5, draw="rows", tolerance=1e-6)
    plan = sinkhorn.log_plan(couplings.squared_distances(data, noise))[0].softmax(1).numpy()
    counts, draws = np.zeros((4, 4)), 1500
    for seed in range(draws):
        counts[range(4), sinkhorn.pair(data, noise, draws=Draws(seed).at(range(4))).indices.numpy()] += 1
    for row in range(4):
        assert stats.chisquare(counts[row], plan[row] / plan[row].sum() * draws).pvalue > 1e-3


def test_a_sinkhorn_that_does_not_converge():
    data, noise, _ = batch(40)
    with pytest.raises(ConvergenceError, match=r"marginals are off by .* after 3 iterations .* raise one or the other"):
        couplings.build("sinkhorn", regularisation=1e-4, iterations=3).pair(data, noise)


# --- types, randomness and bad input ---------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_inputs_are_left_as_they_are(name, dtype):
    """C2, C7: images of any float type; only indices come back."""
    data, noise, given_ = batch(8, (3, 4, 4))
    data, noise = data.to(dtype), noise.to(dtype)
    before = data.clone(), noise.clone()
    pairing = couplings.build(name).pair(data, noise, **given_)
    assert torch.equal(data, before[0]) and torch.equal(noise, before[1]) and noise[pairing.indices].shape == data.shape
    exact = couplings.build(name).pair(data.double(), noise.double(), **given_, draws=Draws(0).at(range(8)))
    ours = couplings.build(name).pair(data, noise, **given_, draws=Draws(0).at(range(8)))
    assert torch.equal(ours.indices, exact.indices)


def test_other_generators_are_neither_used_nor_moved():
    """C3, L4: numpy's and Python's global generators do not matter; torch's governs where no draws are given."""
    data, noise, _ = batch(9)
    sinkhorn = couplings.build("sinkhorn", regularisation=1.0)
    np.random.seed(0)
    before = np.random.get_state()[1].copy(), random.getstate()
    torch.manual_seed(4)
    first = sinkhorn.pair(data, noise).indices
    assert (np.random.get_state()[1] == before[0]).all() and random.getstate() == before[1]
    np.random.seed(9)
    torch.manual_seed(4)
    assert torch.equal(sinkhorn.pair(data, noise).indices, first)
    orders = {tuple(sinkhorn.pair(data, noise).indices.tolist()) for _ in range(20)}
    assert len(orders) > 10
    state = torch.get_rng_state()
    one, two = (sinkhorn.pair(data, noise, draws=torch.Generator().manual_seed(3)).indices for _ in range(2))
    sinkhorn.pair(data, noise, draws=Draws(3).at(range(9)))
    assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), state)


@every
def test_a_batch_of_one(name):
    data, noise, given_ = batch(1, (2, 3))
    pairing = couplings.build(name).pair(data, noise, **given_)
    assert pairing.indices.tolist() == [0] and pairing.cost == pytest.approx(cost_of([0], data, noise))


@every
def test_equal_samples(name):
    """All costs 0: nothing to prefer, nothing to divide by."""
    data, noise = torch.ones(5, 3), torch.ones(5, 3)
    label, condition = torch.tensor([0, 1, 1, 0, 7]), torch.zeros(5)
    pairing = couplings.build(name).pair(data, noise, label=label, condition=condition)
    assert sorted(pairing.indices.tolist()) == list(range(5)) and pairing.cost == 0


def test_a_common_offset_does_not_cancel():
    data, noise, _ = batch(23, (3,))
    data, noise = data.double(), noise.double()
    costs = couplings.squared_distances(data + 1e6, noise + 1e6)
    assert torch.allclose(costs, torch.cdist(data, noise).square(), atol=1e-8)  # 1e-10 is what 1e6 + x leaves of x


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every
def test_on_a_device(name):
    data, noise, given_ = batch(9, (3, 2))
    there = {key: value.cuda() for key, value in given_.items()}
    coupling, draws = couplings.build(name), Draws(1).at(range(9))
    pairing = coupling.pair(data.cuda(), noise.cuda(), **there, draws=draws)
    assert pairing.indices.device.type == "cpu"
    assert torch.equal(pairing.indices, coupling.pair(data, noise, **given_, draws=draws).indices)
    on_device = (
        coupling.pair(data.cuda(), noise.cuda(), **there, draws=torch.Generator("cuda").manual_seed(2)) for _ in "ab"
    )
    assert torch.equal(*(found.indices for found in on_device))


def test_bad_inputs():
    data, noise, given_ = batch(5)
    build = couplings.build
    with pytest.raises(InputError, match=r"got data \(5, 2\) and noise \(4, 2\)"):
        build("exact").pair(data, noise[:4])
    with pytest.raises(InputError, match="NaN or infinite values in noise"):
        build("exact").pair(data, noise * math.nan)
    with pytest.raises(InputTypeError, match=r"got noise torch.int64 \(5, 2\), expected a floating"):
        build("exact").pair(data, noise.long())
    with pytest.raises(InputError, match=r"expected one shape \(N, \*S\) with N > 0"):
        build("exact").pair(data[:0], noise[:0])
    with pytest.raises(InputError, match="got draws for 3 samples beside 5"):
        build("sinkhorn").pair(data, noise, draws=Draws(0).at(range(3)))
    with pytest.raises(InputTypeError, match="got data list, expected a floating"):
        build("independent").pair([1.0], noise)
    with pytest.raises(InputError, match="got no labels for the coupling 'class-conditional'; pass label"):
        build("class-conditional").pair(data, noise)
    with pytest.raises(InputError, match=r"got labels of shape \(4,\), expected \(5,\)"):
        build("class-conditional").pair(data, noise, label=given_["label"][:4])
    with pytest.raises(InputTypeError, match="got labels of type torch.float32, expected an integer"):
        build("class-conditional").pair(data, noise, label=given_["label"].float())
    with pytest.raises(InputError, match="got no condition for the coupling 'conditional'; pass condition"):
        build("conditional").pair(data, noise)
    with pytest.raises(InputError, match="got 4 conditions for 5 samples"):
        build("conditional").pair(data, noise, condition=given_["condition"][:4])
    with pytest.raises(InputTypeError, match="got the condition torch.int64"):
        build("conditional").pair(data, noise, condition=given_["label"])
    with pytest.raises(InputError, match="infinite values in the squared distances"):
        build("exact").pair(data.double() * 1e200, noise.double())
    with pytest.raises(InputError, match=r"got weight 1e\+308, whose cost is infinite"):
        build("conditional", weight=1e308).pair(data, noise, condition=given_["condition"])
    with pytest.raises(InputError, match="NaN or infinite values in the condition"):
        build("conditional").pair(data, noise, condition=given_["condition"] * math.inf)
    for name, options in (
        ("sinkhorn", dict(regularisation=0)),
        ("sinkhorn", dict(regularisation=math.nan)),
        ("sinkhorn", dict(iterations=0)),
        ("sinkhorn", dict(tolerance=1.0)),
        ("sinkhorn", dict(draw="columns")),
        ("partial", dict(share=1.1)),
        ("partial", dict(share=math.nan)),
        ("conditional", dict(weight=-1)),
        ("conditional", dict(weight=math.inf)),
    ):
        with pytest.raises(InputError, match=f"got .*{next(iter(options))}"):
            build(name, **options)
    with pytest.raises(UnknownNameError, match="unknown coupling 'optimal'"):
        build("optimal")


@pytest.mark.parametrize(("name", "module"), [("exact", "scipy.optimize"), ("sinkhorn", "ot")])
def test_a_missing_library_is_named(name, module, monkeypatch):
    data, noise, _ = batch(3)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=r"pip install 'pathline\[transport\]'"):
        couplings.build(name).pair(data, noise)
    assert couplings.build("independent").pair(data, noise).cost > 0
