"""What samples are compared with, by name or place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pathline.metrics.base import Real, Reference

__all__ = ["Reference", "find"]


def find(source: str | Path | Mapping[str, Any]) -> Reference:
    """Return a reference.

    Args:
        source: a data set by name, whose halves ``train`` and ``held-out`` it then has.
    """
    return Real.of(source)
