"""Options of metrics and feature spaces as words of a command: ``kid.subsets=50 inception.weights=FILE``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pathline.core import overrides
from pathline.core.errors import UnknownNameError, suggest
from pathline.metrics import features
from pathline.metrics.evaluation import component

__all__ = ["options_of", "with_options"]

Options = dict[str, dict[str, Any]]


def options_of(words: Sequence[str], names: Sequence[str]) -> Options:
    """Return options by the names of metrics, of those that are asked for, and of feature spaces.

    Raises:
        ConfigurationError: words that are none.
        UnknownNameError: options of something else.
    """
    options = overrides.apply({}, list(words))
    known = {*(component(name)["name"] for name in names), *features.names()}
    for name, given in options.items():
        if name not in known or not isinstance(given, dict):
            raise UnknownNameError(f"got options of {name!r}, which is not asked for; {suggest(name, known)}")
    return options


def with_options(names: Sequence[str], options: Options) -> list[dict[str, Any]]:
    """Return metrics by name as components, with their options."""
    named = [component(name) for name in names]
    return [{**metric, **options.get(metric["name"], {})} for metric in named]
