"""Measures of generated samples, by name, in feature spaces of ``metrics.features``; of flows in ``metrics.models``."""

from pathline.metrics import features, models
from pathline.metrics.base import Metric, Real, Record, Reference, registry
from pathline.metrics.bits import BitsPerDimension
from pathline.metrics.feature_distance import FeatureDistance
from pathline.metrics.frechet import Frechet, FrechetInception, SpatialFrechet
from pathline.metrics.inception import Inception
from pathline.metrics.kernel import KernelInception
from pathline.metrics.loss_by_time import LossByTime
from pathline.metrics.models import ModelMetric, ModelRecord
from pathline.metrics.neighbours import LabelAgreement, Memorisation, PrecisionRecall
from pathline.metrics.score import InceptionScore
from pathline.metrics.vision import VisionTransformer

register, build, names = registry.register, registry.build, registry.names

__all__ = [
    "BitsPerDimension",
    "FeatureDistance",
    "Frechet",
    "FrechetInception",
    "Inception",
    "InceptionScore",
    "KernelInception",
    "LabelAgreement",
    "LossByTime",
    "Memorisation",
    "Metric",
    "ModelMetric",
    "ModelRecord",
    "PrecisionRecall",
    "Real",
    "Record",
    "Reference",
    "SpatialFrechet",
    "VisionTransformer",
    "build",
    "features",
    "models",
    "names",
    "register",
    "registry",
]
