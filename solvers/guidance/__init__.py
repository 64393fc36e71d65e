"""Guidance: callables that turn a flow into another flow, by name. They never enter a solver's loop."""

from pathline.solvers.guidance.auto import Autoguidance
from pathline.solvers.guidance.base import Guidance, Moment, PairGuidance, registry
from pathline.solvers.guidance.flows import GuidedFlow
from pathline.solvers.guidance.label import AdaptiveProjected, CFGZero, ClassifierFree, LabelGuidance

register, build, names = registry.register, registry.build, registry.names

__all__ = [
    "AdaptiveProjected",
    "Autoguidance",
    "CFGZero",
    "ClassifierFree",
    "Guidance",
    "GuidedFlow",
    "LabelGuidance",
    "Moment",
    "PairGuidance",
    "build",
    "names",
    "register",
    "registry",
]
