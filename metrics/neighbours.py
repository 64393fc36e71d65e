"""Metrics by nearest neighbours: labels, precision and recall, memorisation.

N samples, M real samples, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pathline.core.errors import InputError
from pathline.metrics.base import Metric, Real, Record, Reference, registry
from pathline.metrics.features import DigitsCNN, Features, as_floats
from pathline.metrics.moments import Rows

__all__ = [
    "Collecting",
    "LabelAgreement",
    "Memorisation",
    "PrecisionRecall",
    "nearest",
    "precision_recall",
    "two_sample_accuracy",
]

_CELLS = 2**24  # of a distance matrix that are held at once, 128 MiB
_NARROW = 64  # features up to which differences are summed one by one; wider ones are multiplied out


class Collecting(Metric):
    """A metric that keeps rows of its samples, and the labels asked for."""

    def __init__(self, real: Reference | None, features: Features | None = None) -> None:
        super().__init__(real, features)
        self._kept, self._labels = Rows(), Rows()

    def rows(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        """Return what is kept of a batch, (N, …)."""
        return outputs[self.output] if outputs else as_floats(batch["data"])

    def take(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Keep the samples."""
        self._kept.add(self.rows(batch, outputs), batch.get("index"))
        if "label" in batch:
            self._labels.add(batch["label"], batch.get("index"))

    def merge(self, other: Collecting) -> None:
        """Keep the other's samples as well."""
        self.count += other.count
        self._kept.merge(other._kept)
        self._labels.merge(other._labels)

    def state(self) -> dict[str, Tensor]:
        """Return rows, labels and numbers."""
        parts = {"kept": self._kept.state(), "labels": self._labels.state()}
        return {f"{part}.{key}": value for part, found in parts.items() for key, value in found.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take them over."""
        self._kept, self._labels = Rows(), Rows()
        for part, rows in (("kept.", self._kept), ("labels.", self._labels)):
            rows.load({key.removeprefix(part): value for key, value in state.items() if key.startswith(part)})
        self.count = len(self._kept)

    @property
    def kept(self) -> Tensor:
        """All rows so far, in the order of the samples."""
        return self._kept.all()

    @property
    def labels(self) -> Tensor:
        """The labels that were asked for, (N,)."""
        if len(self._labels) != self.count:
            raise InputError(f"got {len(self._labels)} labels for {self.count} samples, expected one each")
        return self._labels.all()


class _Points:
    """Points (M, D) that distances of many others are asked to, made ready for it once."""

    def __init__(self, points: Tensor) -> None:
        self._points = points.double()
        self._centre: Tensor | None = None
        if points.shape[1] > _NARROW:
            self._centre = self._points.mean(0)  # an offset that all share would cost digits
            self._points = self._points - self._centre
            self._squares = self._points.square().sum(1)

    def __len__(self) -> int:
        return len(self._points)

    def distances(self, others: Tensor) -> Iterator[Tensor]:
        """Yield Euclidean distances (n, M) in float64 of (N, D) others, for so many at once as memory allows."""
        for rows in torch.split(others, max(1, _CELLS // len(self))):
            yield self._of(rows.double())

    def _of(self, x: Tensor) -> Tensor:
        """Return distances, those of wide points as the root of |x|² + |y|² − 2·x·y."""
        if self._centre is None:
            return torch.cdist(x, self._points, compute_mode="donot_use_mm_for_euclid_dist")
        x = x - self._centre
        squares = torch.addmm(self._squares, x, self._points.T, alpha=-2).add_(x.square().sum(1, keepdim=True))
        return squares.clamp_(min=0).sqrt_()


def nearest(points: Tensor, others: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Return distance to and index of the k-th nearest of (M, D) others for each of (N, D) points, (N,) each."""
    return _nearest(points, _Points(others), k)


def _nearest(points: Tensor, others: _Points, k: int) -> tuple[Tensor, Tensor]:
    if k > len(others):
        raise InputError(f"got {len(others)} points, expected at least {k} to find the neighbour number {k}")
    parts = [distances.kthvalue(k, dim=1) for distances in others.distances(points)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def precision_recall(generated: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """Return precision and recall of (N, D) generated features against (M, D) real ones (arXiv:1904.06991).

    Precision is the share of generated points inside any real point's ball, whose radius reaches its k-th nearest
    real neighbour; recall is the converse.
    """
    return _covered(generated, real, k), _covered(real, generated, k)


def _covered(points: Tensor, centres: Tensor, k: int) -> float:
    ready = _Points(centres)
    radii, _ = _nearest(centres, ready, k + 1)  # the nearest is the point itself
    inside = [(distances <= radii).any(1) for distances in ready.distances(points)]
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


class _OfHalves(Collecting):
    """A metric of images and labels, which needs both halves of a data set."""

    real: Real

    def __init__(self, real: Reference) -> None:
        if not isinstance(real, Real):
            raise InputError(
                f"got {type(real).__name__} as what {type(self).__name__} compares with, which needs the halves train "
                "and held-out of a labelled data set; name one, as digits"
            )
        super().__init__(real)


@registry.register("label-agreement")
class LabelAgreement(_OfHalves):
    """Share of samples that show the label asked for, to a classifier and to the nearest training image.

    Real samples in their place are the held-out images.

    Args:
        real: the two halves of the data.
        classifier: trained on the first.
    """

    labelled = True

    def __init__(self, real: Reference, classifier: DigitsCNN) -> None:
        super().__init__(real)
        self.classifier = classifier

    def compute(self) -> Record:
        """Return both shares."""
        self.need()
        return Record(
            "label agreement",
            self.count,
            self._shares(self.kept, self.labels),
            self._shares(self.real.images("held_out"), self.real.labels("held_out")),
            len(self.real.held_out),
            {"classifier": "share classified as asked", "neighbour": "share whose nearest training image is as asked"},
            reference=dict(self.real.manifest),
            features=dict(self.classifier.manifest),
        )

    def _shares(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        _, index = nearest(images.flatten(1), self.real.images("training").flatten(1))
        found = {"classifier": self.classifier.classify(images), "neighbour": self.real.labels("training")[index]}
        return {name: float((said == labels).double().mean()) for name, said in found.items()}


@registry.register("precision-recall")
class PrecisionRecall(Collecting):
    """Precision and recall against real images, by balls that reach the k-th neighbour (arXiv:1904.06991).

    All samples are compared with 10,000 reference images, as ADM's evaluator does; distances are in float64, where
    that one has float16. Beside a ``Real`` are those of as many training images.

    Args:
        real: what to compare with.
        features: the feature space.
        k: which neighbour gives the radius.
        references: number of reference images: the first of the held-out half beside a ``Real``, of other images the
            first of a permutation, and of a file those that it holds; fewer where there are no more.
    """

    def __init__(self, real: Reference, features: Features, k: int = 3, references: int = 10_000) -> None:
        if k < 1 or references <= k:
            raise InputError(f"got k {k} and references {references}, expected 1 or more, and more references than k")
        super().__init__(real, features)
        self.k, self.references = k, references

    @property
    def least(self) -> int:
        """A sample and its neighbours."""
        return self.k + 1

    def expects(self, count: int, *, labelled: bool) -> None:
        """See ``Metric``."""
        super().expects(count, labelled=labelled)
        self.compared().prepare(*self.space(), vectors=self.least)

    def compute(self) -> Record:
        """Return precision and recall."""
        self.need()
        reference, (features, output) = self.compared(), self.space()
        real = reference.vectors(features, output, self.references)
        training = reference.stand_in(features, output, self.count)
        return Record(
            f"precision-recall, {features.name}, k={self.k}",
            self.count,
            self._both(self.kept, real, features.device),
            {} if training is None else self._both(training, real, features.device),
            0 if training is None else len(training),
            {
                "precision": "share of samples among real ones",
                "recall": "share of real ones among samples",
            },
            reference={**reference.manifest, "vectors": len(real)},
            features=dict(features.manifest),
            warnings=reference.doubts(features),
        )

    def _both(self, generated: Tensor, real: Tensor, device: torch.device) -> dict[str, float]:
        precision, recall = precision_recall(generated.to(device), real.to(device), self.k)
        return {"precision": precision, "recall": recall}


@registry.register("memorisation")
class Memorisation(_OfHalves):
    """Whether samples lie nearer to training images than unseen real images do, by distances of pixels in [−1, 1].

    Real samples in their place are as many held-out images; for these, the held-out image next to one is another one.
    """

    @property
    def least(self) -> int:
        """Two, which are told from two others."""
        return 2

    def compute(self) -> Record:
        """Return the smallest distance and three shares."""
        self.need()
        held_out = self.real.images("held_out", self.count).flatten(1)
        return Record(
            "memorisation, pixels",
            self.count,
            self._figures(self.kept.flatten(1), k=1),
            self._figures(held_out, k=2),  # the nearest held-out image of a held-out one is itself
            len(held_out),
            {
                "smallest distance": "to a training image; 0 is a copy",
                "nearer to training": "share nearer to a training than a held-out image; ideal 0.5",
                "below real 5 %": "share nearer to training than 5 % of held-out are; ideal 0.05",
                "two-sample accuracy": "told from training by the nearest neighbour; ideal 0.5",
            },
            reference=dict(self.real.manifest),
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
