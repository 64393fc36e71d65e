"""Couplings: which noise (or source) sample goes with which data sample of a batch, by name."""

from pathline.interpolants.couplings.assignments import ClassConditional, Conditional, Exact, Independent, Partial
from pathline.interpolants.couplings.base import (
    Batch,
    Coupling,
    CouplingSpec,
    Pairing,
    Randomness,
    Report,
    registry,
    squared_distances,
)
from pathline.interpolants.couplings.entropic import Sinkhorn

register, build, names = registry.register, registry.build, registry.names

__all__ = [
    "Batch",
    "ClassConditional",
    "Conditional",
    "Coupling",
    "CouplingSpec",
    "Exact",
    "Independent",
    "Pairing",
    "Partial",
    "Randomness",
    "Report",
    "Sinkhorn",
    "build",
    "names",
    "register",
    "registry",
    "squared_distances",
]
