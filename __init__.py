"""pathline: flow matching and stochastic interpolants, every part chosen by name.

t = 0 is data and t = 1 is noise, everywhere.
"""

from pathline.core import weights
from pathline.core.draws import Draws
from pathline.core.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    InputError,
    InputTypeError,
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
    "DataError",
    "Draws",
    "Flow",
    "InputError",
    "InputTypeError",
    "OpenEndError",
    "PathlineError",
    "PluginError",
    "Prediction",
    "SolverError",
    "UnknownNameError",
    "UnknownOptionError",
    "WeightsError",
    "weights",
]
