"""Sources of images, by name: folders, archives, arrays and data sets of other libraries."""

from pathline.data.sources.base import ImageSource, registry

register, build, names = registry.register, registry.build, registry.names

__all__ = ["ImageSource", "build", "names", "register", "registry"]
