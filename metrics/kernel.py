"""The kernel distance of Inception's features, KID: an unbiased squared maximum mean discrepancy.

n samples of a subset, D features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pathline.core.errors import InputError
from pathline.metrics.base import Record, Reference, registry
from pathline.metrics.features import Features
from pathline.metrics.neighbours import Collecting

__all__ = ["KernelInception", "discrepancies", "discrepancy"]


def discrepancy(first: Tensor, second: Tensor) -> float:
    """Return the unbiased estimate of the squared discrepancy of (n, D) and (m, D) features, which may be negative.

    The kernel is k(x, y) = (x·y/D + 1)³; arXiv:1801.01401, Sec. 3 and Eq. 4 of its appendix.
    """
    x, y = first.double(), second.double()
    n, m = len(x), len(y)
    own = _kernel(x, x), _kernel(y, y)
    within = sum((k.sum() - k.trace()) / (c * (c - 1)) for k, c in zip(own, (n, m), strict=True))
    return float(within - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def discrepancies(first: Tensor, second: Tensor, *, subsets: int, size: int, seed: int) -> Tensor:
    """Return the estimates of random subsets of both, drawn without replacement, (subsets,).

    They are drawn as torch-fidelity draws them, from numpy's Mersenne Twister, so that the same features and seed give
    the same value.
    """
    generator = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        chosen = [
            part[torch.from_numpy(generator.choice(len(part), size, replace=False)).to(part.device)]
            for part in (first, second)
        ]
        found.append(discrepancy(*chosen))
    return torch.tensor(found, dtype=torch.float64)


@registry.register("kid")
class KernelInception(Collecting):
    """Kernel Inception distance (arXiv:1801.01401): mean over subsets of the squared discrepancy of the features.

    Unbiased for any number of samples, and so at times below 0. Beside a ``Real`` is that of as many training images.

    Args:
        real: what to compare with.
        features: the feature space.
        subsets: number of subsets.
        size: of each, at most the number of samples and of reference images.
        seed: of the subsets.
        references: number of reference images that they are drawn from; fewer where there are no more.

    Raises:
        InputError: no subset, or one of fewer than two.
    """

    def __init__(
        self,
        real: Reference,
        features: Features,
        subsets: int = 100,
        size: int = 1000,
        seed: int = 2020,
        references: int = 10_000,
    ) -> None:
        super().__init__(real, features)
        if subsets < 1 or size < 2 or references < size:
            raise InputError(
                f"got subsets {subsets} of size {size} from references {references}, expected 1 or more of 2 or more, "
                "and no fewer references"
            )
        self.subsets, self.size, self.seed, self.references = subsets, size, seed, references

    @property
    def least(self) -> int:
        """Samples of a subset."""
        return self.size

    def advice(self) -> str:
        """See ``Metric``."""
        return "draw more, or set kid.size to fewer"

    def expects(self, count: int, *, labelled: bool) -> None:
        """See ``Metric``."""
        super().expects(count, labelled=labelled)
        self.compared().prepare(*self.space(), vectors=self.size)

    def compute(self) -> Record:
        """Return the mean over subsets, and their standard deviation."""
        self.need()
        reference, (features, output) = self.compared(), self.space()
        real = reference.vectors(features, output, self.references)
        if len(real) < self.size:
            raise InputError(f"got {len(real)} reference images for subsets of {self.size}; set kid.size to fewer")
        real = real.to(features.device)
        found = self._of(self.kept, real)
        training = reference.stand_in(features, output, self.count)
        fits = training is not None and len(training) >= self.size
        return Record(
            f"kid, {features.name}",
            self.count,
            {"distance": float(found.mean())},
            {"distance": float(self._of(training, real).mean())} if fits and training is not None else {},
            len(training) if fits and training is not None else 0,
            {"distance": "squared discrepancy to the reference; 0 is equal, below 0 is chance"},
            uncertainty={"distance": float(found.std(correction=0))},
            uncertainty_law=f"standard deviation over {self.subsets} subsets of {self.size}; no standard error",
            reference={**reference.manifest, "vectors": len(real)},
            features=dict(features.manifest),
            warnings=reference.doubts(features),
        )

    def _of(self, generated: Tensor, real: Tensor) -> Tensor:
        given = generated.to(real.device)
        return discrepancies(given, real, subsets=self.subsets, size=self.size, seed=self.seed)
