"""Autoencoders between images and latents, by name."""

from pathline.encoders.autoencoders.base import Autoencoder, Moments, registry
from pathline.encoders.autoencoders.diffusers import DiffusersAutoencoder
from pathline.encoders.autoencoders.presets import PRESETS, Preset

register, build, names = registry.register, registry.build, registry.names

__all__ = [
    "PRESETS",
    "Autoencoder",
    "DiffusersAutoencoder",
    "Moments",
    "Preset",
    "build",
    "names",
    "register",
    "registry",
]
