"""A first measure of quality: all metrics that a small labelled data set allows, each beside its real reference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from pathline import data, metrics
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
    def of(cls, name: str = "digits") -> Judge:
        """Take the halves ``train`` and ``held-out`` of a data set by name, and train the classifier."""
        real = Real(data.build(name, split="train"), data.build(name, split="held-out"))
        classifier = DigitsCNN(real.training)
        return cls(real, classifier, classifier.accuracy(real.held_out))

    def report(self, images: Tensor, labels: Tensor) -> list[Record]:
        """Measure samples (N, C, H, W) in [−1, 1] with their asked labels (N,).

        Only as many samples as there are training images are used, the first: real and generated counts are then equal.
        """
        count = min(len(images), len(self.real.training))
        batch = {"data": images[:count], "label": labels[:count]}
        spaces = [features.build(name, training=self.real.training) for name in ("pixels", "pca")]
        asked = [metrics.build("frechet", real=self.real, features=space) for space in (*spaces, self.classifier)]
        asked += [
            metrics.build("label-agreement", real=self.real, classifier=self.classifier),
            metrics.build("precision-recall", real=self.real, features=self.classifier),
            metrics.build("memorisation", real=self.real),
        ]
        for metric in asked:
            metric.update(batch)
        return [metric.compute() for metric in asked]


def table(records: Iterable[Record]) -> str:
    """Lay records out as lines: metric, figure, samples, real samples in their place, and what it says."""
    rows = [("metric", "figure", "samples", "real", "meaning")]
    for record in records:
        for name, value in record.values.items():
            rows.append((record.metric, name, f"{value:.3f}", f"{record.real[name]:.3f}", record.about[name]))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}  {row[4]}"
        for row in rows
    )
