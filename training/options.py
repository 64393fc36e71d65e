"""Options of metrics and feature spaces as words of a command: ``kid.subsets=50 inception.weights=FILE``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pathline.core import overrides
from pathline.core.errors import ConfigurationError, UnknownNameError, suggest
from pathline.metrics import features, models
from pathline.metrics.base import registry
from pathline.metrics.evaluation import component

__all__ = ["are_of_models", "options_of", "with_options"]

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


def are_of_models(names: Sequence[str]) -> bool:
    """Whether metrics are of models, not of samples.

    Raises:
        UnknownNameError: one is neither.
        ConfigurationError: some are, others not.
    """
    of_models, of_samples = set(models.registry.names()), set(registry.names())
    bare = [component(name)["name"] for name in names]
    unknown = [name for name in bare if name not in of_models | of_samples | registry.aliases().keys()]
    if unknown:
        raise UnknownNameError(f"unknown metric {unknown[0]!r}; {suggest(unknown[0], of_models | of_samples)}")
    told = [name for name in bare if name in of_models]
    if told and len(told) < len(bare):
        raise ConfigurationError(f"got {', '.join(told)} of models beside metrics of samples; call one after the other")
    return bool(told)
