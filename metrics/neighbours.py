"""Metrics by nearest neighbours: labels, precision and recall, memorisation.

N samples, M real samples, D features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pathline.core.errors import InputError
from pathline.metrics.base import Metric, Real, Record, registry
from pathline.metrics.features import DigitsCNN, Features

__all__ = ["LabelAgreement", "Memorisation", "PrecisionRecall", "nearest", "precision_recall", "two_sample_accuracy"]

_ROWS = 1024  # rows of a distance matrix that are held at once


class _Collecting(Metric):
    """A metric that keeps its samples."""

    def __init__(self, real: Real) -> None:
        super().__init__(real)
        self._images: list[Tensor] = []
        self._labels: list[Tensor] = []

    def take(self, batch: Mapping[str, Tensor]) -> None:
        """Keep the samples."""
        self._images.append(batch["data"])
        if "label" in batch:
            self._labels.append(batch["label"])

    def merge(self, other: _Collecting) -> None:
        """Keep the other's samples as well."""
        self.count += other.count
        self._images += other._images
        self._labels += other._labels

    @property
    def images(self) -> Tensor:
        """All samples so far, (N, C, H, W)."""
        return torch.cat(self._images)

    @property
    def labels(self) -> Tensor:
        """The labels that were asked for, (N,)."""
        if sum(map(len, self._labels)) != self.count:
            raise InputError(f"got {sum(map(len, self._labels))} labels for {self.count} samples, expected one each")
        return torch.cat(self._labels)


def nearest(points: Tensor, others: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Return distance to and index of the k-th nearest of (M, D) others for each of (N, D) points, (N,) each."""
    if k > len(others):
        raise InputError(f"got {len(others)} points, expected at least {k} to find the neighbour number {k}")
    parts = [_distances(rows, others).kthvalue(k, dim=1) for rows in torch.split(points, _ROWS)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _distances(points: Tensor, others: Tensor) -> Tensor:
    return torch.cdist(points.double(), others.double(), compute_mode="donot_use_mm_for_euclid_dist")


def precision_recall(generated: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """Return precision and recall of (N, D) generated features against (M, D) real ones (arXiv:1904.06991).

    Precision is the share of generated points inside any real point's ball, whose radius reaches its k-th nearest
    real neighbour; recall is the converse.
    """
    return _covered(generated, real, k), _covered(real, generated, k)


def _covered(points: Tensor, centres: Tensor, k: int) -> float:
    radii, _ = nearest(centres, centres, k + 1)  # the nearest is the point itself
    inside = [(_distances(rows, centres) <= radii).any(1) for rows in torch.split(points, _ROWS)]
    return float(torch.cat(inside).double().mean())


def two_sample_accuracy(first: Tensor, second: Tensor) -> float:
    """Leave-one-out accuracy of telling two sets of points apart by the nearest neighbour: 0.5 if they are alike.

    Copies of one set in the other push it towards 0 (arXiv:1610.06545).
    """
    points = torch.cat((first, second))
    side = torch.arange(len(points)) < len(first)
    _, neighbour = nearest(points, points, 2)
    own = torch.arange(len(points))
    _, itself = nearest(points, points, 1)
    neighbour = torch.where(neighbour == own, itself, neighbour)  # among equal points the order is arbitrary
    return float((side[neighbour] == side).double().mean())


@registry.register("label-agreement")
class LabelAgreement(_Collecting):
    """Share of samples that show the label asked for, to a classifier and to the nearest training image.

    Real samples in their place are the held-out images.
    """

    def __init__(self, real: Real, classifier: DigitsCNN) -> None:
        super().__init__(real)
        self.classifier = classifier

    def compute(self) -> Record:
        """Return both shares."""
        self.need(1)
        return Record(
            "label agreement",
            self.count,
            self._shares(self.images, self.labels),
            self._shares(self.real.images("held_out"), self.real.labels("held_out")),
            len(self.real.held_out),
            {"classifier": "share classified as asked", "neighbour": "share whose nearest training image is as asked"},
        )

    def _shares(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        _, index = nearest(images.flatten(1), self.real.images("training").flatten(1))
        found = {"classifier": self.classifier.classify(images), "neighbour": self.real.labels("training")[index]}
        return {name: float((said == labels).double().mean()) for name, said in found.items()}


@registry.register("precision-recall")
class PrecisionRecall(_Collecting):
    """Precision and recall against the held-out half, beside those of as many training images.

    Args:
        real: the two halves of the data.
        features: the feature space.
        k: which neighbour gives the radius.
    """

    def __init__(self, real: Real, features: Features, k: int = 3) -> None:
        super().__init__(real)
        self.features, self.k = features, k

    def compute(self) -> Record:
        """Return precision and recall."""
        self.need(self.k + 1)
        training = self.real.images("training", self.count)
        return Record(
            f"precision-recall, {self.features.name}, k={self.k}",
            self.count,
            self._both(self.images),
            self._both(training),
            len(training),
            {"precision": "share of samples among real ones", "recall": "share of real ones among samples"},
        )

    def _both(self, images: Tensor) -> dict[str, float]:
        real = self.features(self.real.images("held_out"))
        precision, recall = precision_recall(self.features(images), real, self.k)
        return {"precision": precision, "recall": recall}


@registry.register("memorisation")
class Memorisation(_Collecting):
    """Whether samples lie nearer to training images than unseen real images do, by distances of pixels in [−1, 1].

    Real samples in their place are as many held-out images; for these, the held-out image next to one is another one.
    """

    def compute(self) -> Record:
        """Return the smallest distance and three shares."""
        self.need(2)
        held_out = self.real.images("held_out", self.count).flatten(1)
        return Record(
            "memorisation, pixels",
            self.count,
            self._figures(self.images.flatten(1), k=1),
            self._figures(held_out, k=2),  # the nearest held-out image of a held-out one is itself
            len(held_out),
            {
                "smallest distance": "to a training image; 0 is a copy",
                "nearer to training": "share nearer to a training than a held-out image; ideal 0.5",
                "below real 5 %": "share nearer to training than 5 % of held-out are; ideal 0.05",
                "two-sample accuracy": "told from training by the nearest neighbour; ideal 0.5",
            },
        )

    def _figures(self, images: Tensor, k: int) -> dict[str, float]:
        """Figures of (N, D) images, whose neighbour number ``k`` is the nearest other held-out image."""
        training, held_out = (self.real.images(half).flatten(1) for half in ("training", "held_out"))
        to_training = nearest(images, training)[0]
        bound = torch.quantile(nearest(held_out, training)[0], 0.05)
        return {
            "smallest distance": float(to_training.min()),
            "nearer to training": float((to_training < nearest(images, held_out, k)[0]).double().mean()),
            "below real 5 %": float((to_training < bound).double().mean()),
            "two-sample accuracy": two_sample_accuracy(images, training[: self.count]),
        }
