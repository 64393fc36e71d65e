"""Networks that predict a velocity (or another quantity) from (x, t), by name."""

from pathline.backbones.base import Backbone, Trunk, registry, wrap
from pathline.backbones.clocks import DiTClock, ReversedClock
from pathline.backbones.mlp import MLP
from pathline.backbones.sit import SiT

register, build, names = registry.register, registry.build, registry.names

__all__ = [
    "MLP",
    "Backbone",
    "DiTClock",
    "ReversedClock",
    "SiT",
    "Trunk",
    "build",
    "names",
    "register",
    "registry",
    "wrap",
]
