"""A first measure of quality: all metrics that a small labelled data set allows, each beside its real reference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from pathline import metrics
from pathline.metrics import features
from pathline.metrics.base import Real, Record
from pathline.metrics.features import DigitsCNN

__all__ = ["Judge", "table"]


@dataclass(frozen=True)
class Judge:
    """The real halves of a data set, and the classifier trained on the first.

    Attributes:
        accuracy: the classifier's own, on the held-out half.
    """

    real: Real
    classifier: DigitsCNN
    accuracy: float

    @classmethod
    def of(cls, real: Real) -> Judge:
        """Train the classifier on the training half."""
        classifier = DigitsCNN(real.training)
        return cls(real, classifier, classifier.accuracy(real.held_out))

    def report(self, images: Tensor, labels: Tensor | None) -> list[Record]:
        """Measure samples (N, C, H, W) in [−1, 1] with their asked labels (N,); None leaves label agreement out.

        Only as many samples as there are training images are used, the first: real and generated counts are then equal.
        """
        count = min(len(images), len(self.real.training))
        batch = {"data": images[:count]} if labels is None else {"data": images[:count], "label": labels[:count]}
        spaces = [features.build(name, training=self.real.training) for name in ("pixels", "pca")]
        asked = [metrics.build("frechet", real=self.real, features=space) for space in (*spaces, self.classifier)]
        if labels is not None:
            asked.append(metrics.build("label-agreement", real=self.real, classifier=self.classifier))
        asked += [
            metrics.build("precision-recall", real=self.real, features=self.classifier),
            metrics.build("memorisation", real=self.real),
        ]
        for metric in asked:
            metric.update(batch)
        return [metric.compute() for metric in asked]


def table(records: Iterable[Record]) -> str:
    """Lay records out as lines: metric, figure, samples, real samples in their place, both counts, what it says."""
    rows = [("metric", "figure", "samples", "real", "counts", "meaning")]
    for record in records:
        counts = f"{record.count}, {record.real_count}"
        for name, value in record.values.items():
            rows.append((record.metric, name, f"{value:.3f}", f"{record.real[name]:.3f}", counts, record.about[name]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, "<<>>><", widths, strict=True)).rstrip()
        for row in rows
    )
