"""Names of the files that samples are written to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pathline.training.record import Order, digest
from pathline.training.released import ReleasedConfiguration

__all__ = ["default_name"]


def default_name(order: Order) -> str:
    """Return a file name that no other drawing has: what is asked for in words, and by the hash of all of it.

    Words tell solver, steps, guidance, average and seed; of another program's weights also their file, family, key and
    defects.
    """
    c = order.configuration
    words: list[Any] = ["samples"]
    if isinstance(c, ReleasedConfiguration):
        words += [Path(c.weights.file).stem, c.weights.family, c.weights.key, *c.weights.defects]
    words += [c.solver["name"], c.solver.get("steps")]
    for item in c.guidance:
        if item.get("scale") != 1:
            words += [item["name"], _scale(item["scale"]) if "scale" in item else None]
    words += [c.sample.average, f"seed-{c.sample.seed}", digest(order.request)[:8]]
    return "-".join(str(word) for word in words if word is not None) + ".npz"


def _scale(scale: float | list[float]) -> str:
    return f"{min(scale):g}-to-{max(scale):g}" if isinstance(scale, list) else f"{scale:g}"
