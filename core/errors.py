"""The typed errors of pathline: each says what came, what was wanted, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "ConvergenceError",
    "DataError",
    "DivergedError",
    "InputError",
    "InputTypeError",
    "MissingPackageError",
    "OpenEndError",
    "PathlineError",
    "PluginError",
    "ProcessError",
    "SolverError",
    "UnknownNameError",
    "UnknownOptionError",
    "WeightsError",
    "suggest",
]


class PathlineError(Exception):
    """Parent of every error that pathline raises on purpose."""


class InputError(PathlineError, ValueError):
    """A value or shape that a component cannot take."""


class InputTypeError(PathlineError, TypeError):
    """A value of a type that a component cannot take."""


class OpenEndError(InputError):
    """A quantity asked for at an end of the path where it does not exist, as the score of data at t = 0."""


class UnknownNameError(PathlineError, ValueError):
    """A component name that no registry entry has."""


class UnknownOptionError(PathlineError, TypeError):
    """An option that a component does not have, or a missing one that it needs."""


class PluginError(PathlineError, ImportError):
    """A plugin that failed to import, asked for by name."""


class ConfigurationError(PathlineError, ValueError):
    """Unknown, missing or contradictory configuration entries; lists all of them."""


class DataError(PathlineError, ValueError):
    """Data that cannot be read or does not fit the model."""


class MissingPackageError(PathlineError, ImportError):
    """An optional package that a component needs and that is not installed."""


class ConvergenceError(PathlineError, RuntimeError):
    """An iteration that did not converge within its budget."""


class CheckpointError(PathlineError, ValueError):
    """A checkpoint that is missing, damaged, or belongs to another configuration."""


class ProcessError(PathlineError, RuntimeError):
    """Another process of the run is gone, or has been silent for too long."""


class DivergedError(PathlineError, RuntimeError):
    """Training that no roll-back could save: its numbers are not finite, or its loss keeps jumping."""


class WeightsError(PathlineError, ValueError):
    """A state dictionary whose layout is unknown or does not fit."""


class SolverError(PathlineError, RuntimeError):
    """A solve that failed.

    Attributes:
        t: time at which it failed, in [0, 1].
        step: number of the failing step, counted from 0.
        nfe: network calls made up to then.
    """

    def __init__(self, message: str, *, t: float, step: int, nfe: int) -> None:
        super().__init__(f"{message} (t = {t:g}, step {step}, after {nfe} network calls)")
        self.t, self.step, self.nfe = t, step, nfe


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ``did you mean …? Known: …`` for an unknown word; the nearest match first, then the full list."""
    names = sorted(known)
    near = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(names) if names else 'none'}"
