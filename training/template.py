"""The metrics of a run: built, and checked before it starts."""

from __future__ import annotations

import torch

from pathline.core.config import Configuration
from pathline.core.errors import ConfigurationError, PathlineError
from pathline.metrics import Reference, features
from pathline.metrics.evaluation import Evaluation
from pathline.metrics.sets import KEPT, ImageReference
from pathline.training.log import warn
from pathline.training.parts import Parts
from pathline.training.state import State

__all__ = ["template"]


def template(state: State) -> Evaluation:
    """Build the metrics of a run, which are copied for every evaluation.

    Raises:
        ConfigurationError: they do not fit the data, or the reference.
    """
    c, parts = state.parts.configuration, state.parts
    s = c.evaluation
    if not parts.can_draw:
        raise ConfigurationError(
            "evaluation.every: got data that are no images, without an autoencoder to decode samples; set autoencoder, "
            "or leave it out"
        )
    try:
        for name in s.features:
            features.registry.entry(name)
        reference = _reference(parts)
        evaluation = Evaluation(s.metrics, reference, state.fabric.device, features=s.features)
        if reference is not None and parts.autoencoder is None:
            reference.check({"data": torch.zeros(1, *parts.dataset.shape)})
        evaluation.expects(s.count, labelled=bool(getattr(parts.backbone, "num_classes", 0)) and s.labels != "none")
    except (PathlineError, OSError) as error:
        raise ConfigurationError(f"evaluation: {error}") from error
    if state.fabric.is_global_zero and isinstance(reference, ImageReference) and reference.count > KEPT:
        warn(_slow(reference, c))
    return evaluation


def _reference(parts: Parts) -> Reference | None:
    """Return what samples are compared with; None where the data are latents and nothing is named."""
    c = parts.configuration
    if c.evaluation.reference is not None:
        return Reference.of(c.evaluation.reference)
    if not parts.dataset.data_are_images:
        return None
    return Reference.of({key: value for key, value in c.data.items() if key != "split"})


def _slow(reference: ImageReference, configuration: Configuration) -> str:
    """Say what a large reference costs, and the command that has it only once."""
    entries = (str(value) if key == "name" else f"{key}={value}" for key, value in configuration.data.items())
    source = configuration.evaluation.reference or " ".join(entries)
    return (
        f"evaluation: {reference.count:,} images of the reference pass through each feature space once at every start; "
        f"write them down by python -m pathline.metrics.reference {source} statistics.safetensors --features …, and "
        "set evaluation.reference to that file"
    )
