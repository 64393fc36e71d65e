"""Training objectives, by name; laws of time in ``objectives.times``, weights in ``objectives.weightings``."""

from pathline.objectives import times, weightings
from pathline.objectives.alignment import Alignment
from pathline.objectives.base import Loss, Objective, registry
from pathline.objectives.contrastive import Contrastive
from pathline.objectives.derived_times import Shifted, Stratified
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
    "Shifted",
    "Stratified",
    "Velocity",
    "build",
    "names",
    "register",
    "registry",
    "times",
    "weightings",
]
