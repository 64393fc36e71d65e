"""Autoencoders between images and latents, by name."""

from pathline.encoders.autoencoders.base import Autoencoder, Moments, registry

register, build, names = registry.register, registry.build, registry.names

__all__ = ["Autoencoder", "Moments", "build", "names", "register", "registry"]
