from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from pathline import Draws, InputError


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("shape", [(), (2,), (3, 5), (1, 8, 8), (4, 7, 3)])
def test_rows_alone_equal_rows_of_the_whole_batch(kind, shape):
    draw = getattr(Draws(7), kind)
    whole = draw("noise", range(512), shape, counter=3)
    assert whole.shape == (512, *shape) and whole.dtype == torch.float32
    assert torch.equal(draw("noise", range(128, 192), shape, counter=3), whole[128:192])
    for start, length in itertools.product((0, 1, 5, 130), (1, 2, 3, 7, 61)):
        assert torch.equal(draw("noise", range(start, start + length), shape, counter=3), whole[start : start + length])


def test_order_and_gaps_of_ids_do_not_matter():
    draws = Draws(3)
    ids = [5, 6, 7, 2, 1, 2, 900]
    expected = torch.stack([draws.normal("x", [i], (5,))[0] for i in ids])
    assert torch.equal(draws.normal("x", ids, (5,)), expected)
    assert torch.equal(draws.normal("x", torch.tensor(ids), (5,)), expected)
    assert torch.equal(draws.normal("x", np.array(ids), (5,)), expected)
    assert draws.normal("x", [], (5,)).shape == (0, 5)


def test_another_process_draws_the_same():
    program = (
        "import json; from pathline import Draws;"
        "print(json.dumps(Draws(11).normal('noise', range(4), (3,), counter=2).double().tolist()))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert torch.equal(
        torch.tensor(json.loads(printed), dtype=torch.float64),
        Draws(11).normal("noise", range(4), (3,), counter=2).double(),
    )


def test_words_are_those_of_numpys_philox():
    """An id's draws are words of one Philox-4x64 stream, at a place fixed by the id."""
    from hashlib import blake2b

    key = np.array([9, int.from_bytes(blake2b(b"u", digest_size=8).digest(), "little")], np.uint64)
    words = np.random.Philox(key=key, counter=np.array([0, 0, 4, 0], np.uint64)).random_raw(3 * 7)
    expected = (words.view(np.uint32) >> 8) * 2.0**-24
    drawn = Draws(9).uniform("u", range(7), (6,), counter=4)
    assert np.array_equal(drawn.numpy().ravel().astype(np.float64), expected)


CLOSE = [
    (dict(seed=1), dict(seed=2)),
    (dict(seed=5), dict(seed=5 + 2**32)),
    (dict(seed=5), dict(seed=5 + 2**63)),
    (dict(stream="noise"), dict(stream="time")),
    (dict(counter=0), dict(counter=1)),
    (dict(counter=1), dict(counter=1 + 2**32)),
    (dict(first=0), dict(first=1_000_000)),
]


@pytest.mark.parametrize(("one", "other"), CLOSE)
def test_different_keys_are_independent(one, other):
    def draw(seed=5, stream="noise", counter=0, first=0):
        return Draws(seed).normal(stream, range(first, first + 20_000), (5,), counter=counter).double().flatten()

    a, b = draw(**one), draw(**other)
    assert not torch.equal(a, b)
    count = len(a)
    bound = 5 / math.sqrt(count)  # five standard errors of a correlation of independent draws
    assert abs(float((a * b).mean())) < bound
    assert abs(float((a * b.roll(1)).mean())) < bound
    # squares: Var(a²b²) = 9 − 1, so that dependence of magnitudes shows as well
    assert abs(float((a**2 * b**2).mean()) - 1) < 5 * math.sqrt(8 / count)


def test_moments_and_distribution_of_normals():
    x = Draws(0).normal("noise", range(250_000), (4,)).double().flatten()
    n = len(x)
    assert n == 10**6
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - moment) < 5 * math.sqrt(variance / n)
    assert kolmogorov_distance(0.5 * (1 + torch.erf(x / math.sqrt(2)))) < 1.95 / math.sqrt(n)  # p = 0.001
    assert 4.5 < float(x.abs().max()) < 6.7


def test_distribution_of_uniforms():
    x = Draws(0).uniform("time", range(200_000), (5,)).double().flatten()
    assert float(x.min()) >= 0 and float(x.max()) < 1
    assert kolmogorov_distance(x) < 1.95 / math.sqrt(len(x))


def kolmogorov_distance(probabilities: torch.Tensor) -> float:
    ordered, n = probabilities.sort().values, len(probabilities)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max())


def test_coordinates_of_one_sample_are_independent():
    x = Draws(1).normal("noise", range(100_000), (6,)).double()
    correlations = (x.T @ x / len(x)).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 5 / math.sqrt(len(x))


def test_permutation_is_one_and_is_uniform():
    draws = Draws(2)
    orders = np.stack([draws.permutation("order", 7, counter=i) for i in range(7000)])
    assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(7), (7000, 1)))
    first = np.bincount(orders[:, 0], minlength=7)
    assert ((first - 1000) ** 2 / 1000).sum() < 24.3  # χ² with 6 degrees, p = 0.0005


def test_bound_draws_key_samples_and_the_batch_apart():
    draws = Draws(4)
    whole = draws.at(range(6), step=3)
    part = draws.at(range(2, 5), step=3)
    assert len(part) == 3
    assert torch.equal(part.normal("noise", (2,)), whole.normal("noise", (2,))[2:5])
    assert part.shared_uniform("sign") == whole.shared_uniform("sign")
    later = draws.at(range(6), step=4)
    assert torch.equal(later.uniform("time"), whole.uniform("time"))  # a position's draws do not depend on the step
    assert later.shared_uniform("sign") != whole.shared_uniform("sign")
    assert not torch.equal(draws.at(range(6), 1).uniform("time"), whole.uniform("time"))
    assert draws.at(range(6), 5).shared_uniform("sign") == draws.at(range(6), step=5).shared_uniform("sign")


def test_torchs_generator_governs_unseeded_draws():
    torch.manual_seed(1)
    first = Draws.from_torch().seed
    assert Draws.from_torch().seed != first
    torch.manual_seed(1)
    assert Draws.from_torch().seed == first


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_bad_seed(seed):
    with pytest.raises(InputError, match=r"got seed .* expected 0 <= seed < 2\*\*64"):
        Draws(seed)


def test_bad_ids_and_counter():
    with pytest.raises(InputError, match="got sample id -2"):
        Draws(0).normal("x", [1, -2])
    with pytest.raises(InputError, match="got sample id -1"):
        Draws(0).normal("x", range(-1, 3))
    with pytest.raises(InputError, match="got counter -1"):
        Draws(0).normal("x", [1], counter=-1)
    with pytest.raises(InputError, match=r"got sample ids of shape \(1, 2\)"):
        Draws(0).normal("x", [[1, 2]])


@pytest.mark.slow
@pytest.mark.parametrize("count", [10**6, 4 * 10**6])
@pytest.mark.parametrize("size", [1, 4096])
def test_large_draws_cost_at_most_three_times_torchs_own(count, size):
    """CPU time on one thread, medians of alternating runs."""
    draws, shape = Draws(0), () if size == 1 else (size,)
    ours, torchs = [], []
    for _ in range(9):
        ours.append(seconds(lambda: draws.normal("noise", range(count // size), shape)))
        torchs.append(seconds(lambda: torch.randn(count // size, size)))
    assert sorted(ours)[4] <= 3 * sorted(torchs)[4]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "shape"), [(1, ()), (32, (1, 8, 8)), (256, (2,))])
def test_small_draws_cost_at_most_250_microseconds(count, shape):
    draws = Draws(0)
    for draw in (draws.normal, draws.uniform):
        times = sorted(seconds(lambda draw=draw: draw("noise", range(count), shape)) for _ in range(51))
        assert times[25] <= 250e-6


def seconds(function) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began
