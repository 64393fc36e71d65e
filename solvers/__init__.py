"""Solvers by name, with their grids, diffusion coefficients and guidance."""

from pathline.solvers import diffusions, grids, guidance
from pathline.solvers.base import Solution, Solver, registry
from pathline.solvers.fixed import Euler, Heun
from pathline.solvers.stochastic import EulerMaruyama

register, build, names = registry.register, registry.build, registry.names

__all__ = [
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Solution",
    "Solver",
    "build",
    "diffusions",
    "grids",
    "guidance",
    "names",
    "register",
    "registry",
]
