"""pathline: flow matching and stochastic interpolants, every part chosen by name.

t = 0 is data and t = 1 is noise, everywhere.
"""

from pathline.core import weights
from pathline.core.composed import Rescheduled, SplitFlow
from pathline.core.draws import Draws
from pathline.core.errors import (
    CheckpointError,
    ConfigurationError,
    ConvergenceError,
    DataError,
    InputError,
    InputTypeError,
    MissingPackageError,
    OpenEndError,
    PathlineError,
    PluginError,
    SolverError,
    UnknownNameError,
    UnknownOptionError,
    WeightsError,
)
from pathline.core.flow import Flow, Prediction

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "ConvergenceError",
    "DataError",
    "Draws",
    "Flow",
    "InputError",
    "InputTypeError",
    "MissingPackageError",
    "OpenEndError",
    "PathlineError",
    "PluginError",
    "Prediction",
    "Rescheduled",
    "SolverError",
    "SplitFlow",
    "UnknownNameError",
    "UnknownOptionError",
    "WeightsError",
    "weights",
]
