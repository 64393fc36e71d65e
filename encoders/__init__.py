"""Frozen feature encoders, by name."""

from pathline.encoders.base import Encoder, registry
from pathline.encoders.grids import on_grid
from pathline.encoders.presets import PRESETS, Preset
from pathline.encoders.sources import Cached, Computed, Source
from pathline.encoders.vit import PatchEncoder

register, build, names = registry.register, registry.build, registry.names

__all__ = [
    "PRESETS",
    "Cached",
    "Computed",
    "Encoder",
    "PatchEncoder",
    "Preset",
    "Source",
    "build",
    "names",
    "on_grid",
    "register",
    "registry",
]
