"""Sources of images, by name: folders, archives, arrays and data sets of other libraries."""

from pathline.data.sources.base import ImageSource, registry
from pathline.data.sources.folder import Folder
from pathline.data.sources.zip import Zip

register, build, names = registry.register, registry.build, registry.names

__all__ = ["Folder", "ImageSource", "Zip", "build", "names", "register", "registry"]
