"""Names of the files that samples are written to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pathline.core.config import Configuration
from pathline.training.released import Released, ReleasedConfiguration

__all__ = ["default_name"]


def default_name(configuration: Configuration) -> str:
    """Return a file name of solver, steps, guidance, average and seed, so that one drawing does not replace another.

    For another program's weights also of their file, family, key and defects, and of a hash of file and network.
    """
    solver = configuration.solver
    released = configuration.weights if isinstance(configuration, ReleasedConfiguration) else None
    words = ["samples", *(_model_words(released, configuration.backbone) if released else ())]
    words += [solver["name"], solver.get("steps")]
    words += [_guidance_words(item) for item in configuration.guidance if item.get("scale") != 1]
    words.append(configuration.sample.average)
    return "-".join(str(word) for word in (*words, f"seed-{configuration.sample.seed}") if word is not None) + ".npz"


def _model_words(released: Released, backbone: dict[str, Any]) -> list[str | None]:
    told = _hash([released.sha256, backbone])[:8]
    return [Path(released.file).stem, released.family, released.key, *released.defects, told]


def _guidance_words(item: dict[str, Any]) -> str:
    """Return the name of a guidance with its scale, or with a hash of its options if it has none."""
    return f"{item['name']}-{_scale(item['scale']) if 'scale' in item else _hash(item)[:4]}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _scale(scale: float | list[float]) -> str:
    return f"{min(scale):g}-to-{max(scale):g}" if isinstance(scale, list) else f"{scale:g}"
