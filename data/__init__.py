"""Data sets, by name."""

from pathline.data.base import Batch, Dataset, registry
from pathline.data.digits import Digits

register, build, names = registry.register, registry.build, registry.names

__all__ = ["Batch", "Dataset", "Digits", "build", "names", "register", "registry"]
