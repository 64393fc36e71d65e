"""Training objectives, by name; laws of time in ``objectives.times``."""

from pathline.objectives import times
from pathline.objectives.base import Loss, Objective, registry
from pathline.objectives.velocity import Velocity

register, build, names = registry.register, registry.build, registry.names

__all__ = ["Loss", "Objective", "Velocity", "build", "names", "register", "registry", "times"]
