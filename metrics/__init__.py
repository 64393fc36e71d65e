"""Measures of generated samples, by name; feature spaces in ``metrics.features``."""

from pathline.metrics import features
from pathline.metrics.base import Metric, Real, Record, registry
from pathline.metrics.frechet import Frechet
from pathline.metrics.neighbours import LabelAgreement, Memorisation, PrecisionRecall

register, build, names = registry.register, registry.build, registry.names

__all__ = [
    "Frechet",
    "LabelAgreement",
    "Memorisation",
    "Metric",
    "PrecisionRecall",
    "Real",
    "Record",
    "build",
    "features",
    "names",
    "register",
    "registry",
]
