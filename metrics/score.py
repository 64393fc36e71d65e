"""The Inception Score, by ADM's law or torch-fidelity's.

N samples, K classes of the network.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pathline.core.errors import InputError
from pathline.metrics.base import Record, registry
from pathline.metrics.features import Features
from pathline.metrics.neighbours import Collecting

__all__ = ["InceptionScore", "scores"]

BLOCK = 5000  # samples of a block in ADM's evaluator
SEED = 2020  # of torch-fidelity's shuffle


def scores(logits: Tensor, splits: int | None = None, *, shuffle: bool = False) -> Tensor:
    """Return the score of each split of (N, K) logits, exp of the mean KL divergence of p(y|x) from their mean p(y).

    Args:
        logits: of the samples in their order.
        splits: None for consecutive blocks of 5,000, the last of which may be smaller; a number for as many parts.
        shuffle: whether samples are first put in the order of numpy's Mersenne Twister with the seed 2020.
    """
    count = len(logits)
    if shuffle:
        logits = logits[torch.from_numpy(np.random.RandomState(SEED).permutation(count))]
    ends = range(BLOCK, count + BLOCK, BLOCK) if splits is None else [i * count // splits for i in range(1, splits + 1)]
    found, first = [], 0
    for end in ends:
        log_p = logits[first:end].double().log_softmax(1)
        p = log_p.exp()
        terms = torch.where(p > 0, p * (log_p - p.mean(0).log()), 0.0)  # 0·log 0 = 0, where a probability underflows
        divergence = terms.sum(1).mean()  # arXiv:1606.03498, Sec. 4
        found.append(divergence.exp())
        first = end
    return torch.stack(found)


@registry.register("inception-score")
class InceptionScore(Collecting):
    """Inception Score (arXiv:1606.03498), of logits without their bias: higher is better, 1 the least.

    By default it is that of ADM's evaluator, which papers on ImageNet tell: mean over consecutive blocks of 5,000
    samples in their order, so 10 of 50,000. It supposes that labels come in random order: of samples sorted by class a
    block has few classes, and a score far too low. ``splits=10, shuffle=True`` is torch-fidelity's.

    Args:
        features: a space that has logits.
        splits: number of parts; None for blocks of 5,000.
        shuffle: whether samples are shuffled first, as torch-fidelity does.

    Raises:
        InputError: fewer than one split, or a feature space without logits.
    """

    output: ClassVar[str] = "logits"

    def __init__(self, features: Features, splits: int | None = None, shuffle: bool = False) -> None:
        super().__init__(None, features)
        if splits is not None and (isinstance(splits, bool) or splits < 1):
            raise InputError(f"got splits {splits!r}, expected 1 or more, or None for blocks of {BLOCK}")
        self.splits, self.shuffle = splits, shuffle

    @property
    def least(self) -> int:
        """One sample a split."""
        return self.splits or 1

    def compute(self) -> Record:
        """Return the mean over splits, and their standard deviation."""
        self.need()
        features, _ = self.space()
        found = scores(self.kept, self.splits, shuffle=self.shuffle)
        cut = f"{self.splits} splits" if self.splits else f"consecutive blocks of {BLOCK}"
        return Record(
            f"inception-score, {features.name}, {cut}{', shuffled' if self.shuffle else ''}",
            self.count,
            {"score": float(found.mean())},
            {},
            0,
            {"score": "exp of the mean divergence of p(y|x) from p(y); higher is better, 1 the least"},
            uncertainty={"score": float(found.std(correction=0))} if len(found) > 1 else {},
            uncertainty_law=f"standard deviation over {len(found)} splits; no standard error",
            features=dict(features.manifest),
            warnings=self._doubts(),
        )

    def _doubts(self) -> tuple[str, ...]:
        """Say so where samples come sorted by their labels, and are not shuffled."""
        if self.shuffle or not len(self._labels):
            return ()
        labels = self.labels
        if int(labels[0]) == int(labels[-1]) or bool((labels.diff() < 0).any()):
            return ()
        return ("samples are sorted by label, so that a block has few classes: set shuffle",)
