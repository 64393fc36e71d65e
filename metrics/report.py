"""Measuring a whole: all metrics that a small labelled data set allows, files of samples by any metrics, and models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pathline import metrics
from pathline.core.draws import Draws
from pathline.core.errors import DataError, InputError
from pathline.core.flow import BaseFlow
from pathline.data import Dataset
from pathline.metrics import features
from pathline.metrics.base import Real, Record
from pathline.metrics.evaluation import Evaluation
from pathline.metrics.features import DigitsCNN
from pathline.metrics.models import ModelMetric, ModelRecord
from pathline.metrics.samples import Samples

__all__ = ["Judge", "compute", "measure_model", "measure_samples", "summary", "table", "take_in"]


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
            metric.expects(count, labelled=labels is not None)
        for metric in asked:
            metric.update(batch)
        return [metric.compute() for metric in asked]


def measure_samples(evaluation: Evaluation, samples: Samples, count: int, batch: int) -> list[Record]:
    """Measure the first samples of a file by any metrics.

    Args:
        evaluation: fresh, its reference of the samples' kind.
        samples: of the file.
        count: number of samples, from 1 to all.
        batch: samples at once.

    Raises:
        DataError: samples that do not fit the reference or a metric; the file is named.
    """
    take_in(evaluation, samples, range(count), batch, count)
    return compute(evaluation, samples)


def take_in(evaluation: Evaluation, samples: Samples, ids: range, batch: int, count: int) -> None:
    """Let metrics see samples of a file by number, of ``count`` that all processes see; as ``measure_samples`` does."""
    done = ids.start
    with (
        _named(samples),
        tqdm(
            total=len(ids), desc=samples.path.name, unit="sample", disable=True if ids.start else None, leave=False
        ) as shown,
    ):
        evaluation.expects(count, labelled=samples.labelled)
        for images, labels in samples.batches(batch, len(ids), ids.start) if ids else ():
            evaluation.update(images, labels, torch.arange(done, done + len(images)))
            done += len(images)
            shown.update(len(images))


def compute(evaluation: Evaluation, samples: Samples) -> list[Record]:
    """Return the records of what metrics have seen of a file."""
    with _named(samples):
        return evaluation.compute()


@contextmanager
def _named(samples: Samples) -> Iterator[None]:
    """Name the file in what is wrong with samples."""
    try:
        yield
    except InputError as error:
        raise DataError(f"{error}; in {samples.path}") from error


def measure_model(
    metric: ModelMetric, flow: BaseFlow, dataset: Dataset, count: int, *, seed: int = 0, batch: int = 64
) -> ModelRecord:
    """Measure a flow on the first samples of a data set.

    Args:
        metric: fresh.
        flow: its backbone in evaluation mode.
        dataset: unseen data, where there are some.
        count: number of samples, from 2 to all.
        seed: with a sample's number fixes what is drawn for it.
        batch: samples at once, 1 or more; changes nothing but rounding.

    Raises:
        InputError: a number out of range, or a flow or data that do not fit the metric.
    """
    if not 2 <= count <= len(dataset) or batch < 1:
        raise InputError(
            f"got count {count} and batch {batch}, expected 2 to {len(dataset)} samples, 1 or more at once"
        )
    for first in range(0, count, batch):
        ids = range(first, min(first + batch, count))
        metric.update(flow, dataset.batch(ids), Draws(seed).at(ids))
    return metric.compute()


def summary(record: ModelRecord, data: Mapping[str, Any]) -> Record:
    """Return a record of a model as one of a value a row, the mean over the times with its standard error.

    Args:
        record: of the model.
        data: manifest of what it was measured on, which stands in the place of a reference.
    """
    return Record(
        record.metric,
        record.count,
        values={row.name: row.mean for row in record.rows},
        real={},
        real_count=0,
        about={row.name: f"{record.about} ({record.unit})" for row in record.rows},
        uncertainty={row.name: row.error for row in record.rows},
        uncertainty_law="standard error of the mean over samples",
        reference=data,
    )


def table(records: Iterable[Record]) -> str:
    """Lay records out as lines: metric, figure, samples, real samples in their place, both counts, what it says."""
    rows = [("metric", "figure", "samples", "real", "counts", "meaning")]
    for record in records:
        counts = f"{record.count}, {record.real_count}" if record.real_count else str(record.count)
        for name, value in record.values.items():
            error = record.uncertainty.get(name)
            figure = f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
            real = f"{record.real[name]:.3f}" if name in record.real else "—"
            rows.append((record.metric, name, figure, real, counts, record.about.get(name, "")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, "<<>>><", widths, strict=True)).rstrip()
        for row in rows
    )
