"""Measuring over several processes, and measuring trained models on what they have not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from safetensors.torch import load, save

from pathline import data
from pathline.core.errors import ConfigurationError
from pathline.core.flow import Flow
from pathline.data import Dataset
from pathline.metrics.base import Record
from pathline.metrics.evaluation import Evaluation
from pathline.metrics.report import compute, take_in
from pathline.metrics.samples import Samples
from pathline.training import sampling
from pathline.training.released import ReleasedConfiguration
from pathline.training.trained import average_of, identity
from pathline.training.workers import Workers

__all__ = ["Unseen", "device_of", "measure_in_all", "workers_for"]


def device_of(name: str | None) -> torch.device:
    """Return a device by name; of None the first GPU, or the processor. Raises ConfigurationError if it is not here."""
    if name is None:
        return Fabric(accelerator="auto", devices=1).device
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the second is torch's word for a build without CUDA
        raise ConfigurationError(f"got device {name!r}, which is not here; leave it out, or use cpu") from error


def workers_for(devices: int | None, kind: str | None, fewest: int) -> Workers | None:
    """Return the processes that share samples; None for this one alone.

    Args:
        devices: number of them.
        kind: ``cpu`` or ``cuda``; None is whatever there is.
        fewest: samples that they share.

    Raises:
        ConfigurationError: more processes than samples, or devices that are not here.
    """
    if devices is None or devices == 1:
        return None
    if fewest < devices:
        raise ConfigurationError(f"got --devices {devices} for {fewest} samples; set it lower")
    return Workers(devices, kind or "auto", "--devices")


def measure_in_all(
    evaluation: Evaluation, samples: Samples, count: int, batch: int, workers: Workers
) -> list[Record] | None:
    """Measure the first samples of a file, each process a share of them.

    Args:
        evaluation: fresh, on this process's device.
        samples: of the file.
        count: number of samples, from one a process to all.
        batch: samples at once.
        workers: the processes.

    Returns:
        The records in the first process, None in the others.

    Raises:
        DataError: samples that do not fit the reference or a metric; the file is named.
        Told: in the other processes, in the place of what the first one raises.
    """
    share = range(count * workers.rank // workers.count, count * (workers.rank + 1) // workers.count)
    workers.every(lambda: take_in(evaluation, samples, share, batch, count))
    states = workers.collect(save({name: tensor.contiguous() for name, tensor in evaluation.state().items()}))
    for state in states[1:]:
        evaluation.merge_state(load(state))
    found: list[list[Record]] = []

    def computed() -> None:
        samples.check_hash()  # which no process has seen all of
        found.append(compute(evaluation, samples))

    workers.first(computed)
    return found[0] if found else None


@dataclass(frozen=True)
class Unseen:
    """A trained model beside data that it has not seen, where its data set has such; else what it was trained on.

    Attributes:
        flow: of its averaged weights.
        dataset: the data.
        known: what identifies both: checkpoint, entry ``data`` and configuration.
    """

    flow: Flow
    dataset: Dataset
    known: Mapping[str, Any]

    @classmethod
    def of(cls, path: Path, words: Sequence[str], device: torch.device) -> Unseen:
        """Load a model.

        Args:
            path: of its weights, as ``sampling.find`` returns it.
            words: of the configuration, as ``data.split=train``.
            device: of the model.

        Raises:
            PathlineError: what ``sampling.load`` and the data set raise.
        """
        configuration, parts = sampling.load(path, words)
        entry, chosen = configuration.data, any(word.startswith("data.split=") for word in words)
        if "split" in data.registry.entry(entry["name"]).options() and not chosen:
            entry = {**entry, "split": "held-out"}
        backbone = parts.backbone.to(device)
        flow = Flow(backbone, parts.interpolant, parts.objective.predicts)  # type: ignore[arg-type]  # checked there
        if isinstance(configuration, ReleasedConfiguration):
            checkpoint: Any = configuration.weights.model_dump(mode="json")
        else:
            checkpoint = identity(path, average_of(configuration))
        known = {"checkpoint": checkpoint, "data": entry, "configuration": configuration.model_dump(mode="json")}
        return cls(flow, data.build(entry), known)
