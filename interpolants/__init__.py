"""Paths between data and noise, by name."""

from pathline.interpolants.base import Coefficients, Interpolant, registry
from pathline.interpolants.linear import Linear

register, build, names = registry.register, registry.build, registry.names

__all__ = ["Coefficients", "Interpolant", "Linear", "build", "names", "register", "registry"]
