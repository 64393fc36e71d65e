"""Frozen feature encoders, by name."""

from pathline.encoders.base import Encoder, registry

register, build, names = registry.register, registry.build, registry.names

__all__ = ["Encoder", "build", "names", "register", "registry"]
