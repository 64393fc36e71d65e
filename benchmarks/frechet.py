"""Fréchet distances by several roots of a matrix: their errors and seconds. ``python benchmarks/frechet.py [--large]``.

Truth is the nuclear norm of the centred samples, which needs no covariance and no square root: with X = QR for both
sets, tr (Σ₁Σ₂)^½ is the sum of the singular values of R₁R₂ᵀ, exact for any number of samples.

N samples of each set, D features.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pathline.metrics.frechet import Moments, frechet_distance, trace_by_eigenvalues, trace_by_factors


class Case(NamedTuple):
    """Two sets; ``falling`` variances over six orders, as those of networks' features, or all alike."""

    count: int
    dimension: int
    falling: bool = False
    same: bool = False
    half: bool = False  # covariances in float32

    def __str__(self) -> str:
        words = [f"D = {self.dimension}, N = {self.count}"]
        words += ["falling variances"] * self.falling + ["the same set twice"] * self.same
        return ", ".join(words + ["float32 covariances"] * self.half)

    def samples(self) -> tuple[Tensor, Tensor]:
        """Return both, (N, D)."""
        generator = torch.Generator().manual_seed(self.dimension + self.count)
        scales = 10 ** -torch.linspace(0, 3, self.dimension).double() if self.falling else torch.ones(self.dimension)
        x, y = torch.randn(2, self.count, self.dimension, generator=generator, dtype=torch.float64) * scales
        return x, x if self.same else 1.2 * y + 0.05 * scales


CASES = [
    Case(5000, 64, falling=True),
    Case(2000, 256),
    Case(2000, 256, falling=True),
    Case(50, 256),
    Case(50, 256, same=True),
    Case(100, 512),
    Case(128, 256, half=True),
]
LARGE = [Case(6000, 2048, falling=True), Case(500, 2048, falling=True)]


def truth(x: Tensor, y: Tensor) -> float:
    """The distance by the samples themselves."""
    centred = [(z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y)]
    roots = [torch.linalg.qr(z).R for z in centred]
    cross = float(torch.linalg.svdvals(roots[0] @ roots[1].T).sum())
    return float((x.mean(0) - y.mean(0)).square().sum()) + float(sum(z.square().sum() for z in centred)) - 2 * cross


class Pair(NamedTuple):
    """Statistics of both sets."""

    first: Moments
    second: Moments

    def joined(self, cross: float | None) -> float:
        """The distance with a given tr (Σ₁Σ₂)^½."""
        if cross is None:
            return math.nan
        shift = (self.first.mean - self.second.mean).square().sum()
        return float(shift + self.first.covariance.trace() + self.second.covariance.trace()) - 2 * cross

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Both covariances."""
        return self.first.covariance.numpy(), self.second.covariance.numpy()


def pathline(pair: Pair) -> float:
    return frechet_distance(pair.first, pair.second)


def eigenvalues(pair: Pair) -> float:
    return pair.joined(trace_by_eigenvalues(pair.first.covariance, pair.second.covariance, math.inf))


def factors(pair: Pair) -> float:
    return pair.joined(trace_by_factors(pair.first.covariance, pair.second.covariance))


def scipy(pair: Pair) -> float:
    """What ADM, EDM2, clean-fid and pytorch-fid call."""
    from scipy import linalg

    one, two = pair.arrays()
    return pair.joined(float(np.trace(linalg.sqrtm(one @ two)).real))


def torch_fidelity(pair: Pair) -> float:
    """Its own function; NaN where it cannot be imported, as with a torchvision of another build."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    told = [{"mu": m.mean.numpy(), "sigma": s} for m, s in zip(pair, pair.arrays(), strict=True)]
    return float(fid_statistics_to_metric(*told, False)["frechet_inception_distance"])


WAYS: dict[str, Callable[[Pair], float]] = {
    "pathline": pathline,
    "eigenvalues": eigenvalues,
    "factors": factors,
    "scipy sqrtm": scipy,
    "torch-fidelity": torch_fidelity,
}


def moments(x: Tensor, half: bool) -> Moments:
    """Statistics of (N, D) samples."""
    found = Moments()
    found.update(x)
    if half:
        found.scatter = found.scatter.float().double()
    return found


def row(case: Case) -> list[str]:
    """One line of the table: error and seconds of each way."""
    x, y = case.samples()
    exact = truth(x, y)
    pair = Pair(moments(x, case.half), moments(y, case.half))
    cells = [str(case), f"{exact:.6g}"]
    for way in WAYS.values():
        began = time.perf_counter()
        try:
            found = way(pair)
        except (ImportError, RuntimeError) as error:
            cells.append(f"none ({type(error).__name__})")
            continue
        seconds = time.perf_counter() - began
        cells.append("refused" if math.isnan(found) else f"{found - exact:+.1e}, {seconds:.2g} s")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ways to a Fréchet distance.")
    parser.add_argument("--large", action="store_true", help="2048 features as well, which takes minutes")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    print(f"| case | truth | {' | '.join(WAYS)} |\n|{'---|' * (2 + len(WAYS))}")
    for case in CASES + LARGE * given.large:
        print(f"| {' | '.join(row(case))} |", flush=True)


if __name__ == "__main__":
    main()
