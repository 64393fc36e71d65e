"""Paths between data and noise, by name."""

from pathline.interpolants import clocks, couplings
from pathline.interpolants.base import Coefficients, Interpolant, InterpolantSpec, registry
from pathline.interpolants.bridge import Bridge, Stochastic, TwoEnded
from pathline.interpolants.linear import Linear
from pathline.interpolants.polynomial import Polynomial
from pathline.interpolants.trigonometric import Trigonometric
from pathline.interpolants.variance_preserving import LinearVariancePreserving, VariancePreserving

register, build, names = registry.register, registry.build, registry.names

__all__ = [
    "Bridge",
    "Coefficients",
    "Interpolant",
    "InterpolantSpec",
    "Linear",
    "LinearVariancePreserving",
    "Polynomial",
    "Stochastic",
    "Trigonometric",
    "TwoEnded",
    "VariancePreserving",
    "build",
    "clocks",
    "couplings",
    "names",
    "register",
    "registry",
]
