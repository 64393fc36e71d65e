"""Solvers by name, with their grids, diffusion coefficients and guidance."""

from pathline.solvers import diffusions, grids, guidance, likelihood
from pathline.solvers.adaptive import DormandPrince
from pathline.solvers.base import Solution, Solver, registry
from pathline.solvers.fixed import RK4, Euler, Heun, Midpoint
from pathline.solvers.multistep import AdamsBashforth2, AdamsBashforth3, DPMSolver, UniPC
from pathline.solvers.ode import AdaptiveODE, FixedODE
from pathline.solvers.sde import TorchSDE
from pathline.solvers.stochastic import EulerMaruyama, StochasticHeun, StochasticRungeKutta
from pathline.solvers.transitions import Churn, Exponential, PredictorCorrector

register, build, names = registry.register, registry.build, registry.names

__all__ = [
    "RK4",
    "AdamsBashforth2",
    "AdamsBashforth3",
    "AdaptiveODE",
    "Churn",
    "DPMSolver",
    "DormandPrince",
    "Euler",
    "EulerMaruyama",
    "Exponential",
    "FixedODE",
    "Heun",
    "Midpoint",
    "PredictorCorrector",
    "Solution",
    "Solver",
    "StochasticHeun",
    "StochasticRungeKutta",
    "TorchSDE",
    "UniPC",
    "build",
    "diffusions",
    "grids",
    "guidance",
    "likelihood",
    "names",
    "register",
    "registry",
]
