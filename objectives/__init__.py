"""Training objectives, by name; laws of time in ``times`` and ``derived_times``, weights in ``weightings``."""

from pathline.objectives import derived_times, times, weightings
from pathline.objectives.alignment import Alignment
from pathline.objectives.base import Loss, Objective, registry
from pathline.objectives.contrastive import Contrastive
from pathline.objectives.velocity import Data, Drift, Noise, Regression, Score, Velocity

register, build, names = registry.register, registry.build, registry.names

__all__ = [
    "Alignment",
    "Contrastive",
    "Data",
    "Drift",
    "Loss",
    "Noise",
    "Objective",
    "Regression",
    "Score",
    "Velocity",
    "build",
    "derived_times",
    "names",
    "register",
    "registry",
    "times",
    "weightings",
]
