"""Names of the files that samples are written to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pathline import solvers
from pathline.core.config import Configuration, filled
from pathline.core.registry import Registry
from pathline.solvers import guidance
from pathline.training.released import Released, ReleasedConfiguration

__all__ = ["default_name"]


def default_name(configuration: Configuration) -> str:
    """Return a file name of solver, steps, guidance, average, seed, and number of many samples, so that one drawing
    does not replace another.

    Further options of solver and guidance are told by a hash. For another program's weights also of their file, family,
    key and defects, and of a hash of file and network.
    """
    solver = configuration.solver
    released = configuration.weights if isinstance(configuration, ReleasedConfiguration) else None
    words = ["samples", *(_model_words(released, configuration.backbone) if released else ())]
    words += [solver["name"], solver.get("steps"), _others(solver, solvers.registry, "steps")]
    for item in configuration.guidance:
        others = _others(item, guidance.registry, "scale")
        if item.get("scale") != 1 or others:
            words += [item["name"], _scale(item["scale"]) if "scale" in item else None, others]
    words.append(configuration.sample.average)
    if configuration.sample.count > configuration.sample.shard:  # no few samples in the place of many
        words.append(configuration.sample.count)
    return "-".join(str(word) for word in (*words, f"seed-{configuration.sample.seed}") if word is not None) + ".npz"


def _model_words(released: Released, backbone: dict[str, Any]) -> list[str | None]:
    told = _hash([released.sha256, backbone])[:8]
    return [Path(released.file).stem, released.family, released.key, *released.defects, told]


def _others(item: dict[str, Any], registry: Registry[Any], told: str) -> str | None:
    """Return a hash of a component if its options differ from their defaults in more than the one that is told."""
    plain = filled({key: item[key] for key in ("name", told) if key in item}, registry)
    return None if plain == item else _hash(item)[:4]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _scale(scale: float | list[float]) -> str:
    return f"{min(scale):g}-to-{max(scale):g}" if isinstance(scale, list) else f"{scale:g}"
