"""Sources of images, by name: folders, archives, arrays and data sets of other libraries."""

from pathline.data.sources.base import ImageSource, registry
from pathline.data.sources.cifar import Cifar
from pathline.data.sources.folder import Folder
from pathline.data.sources.huggingface import HuggingFace
from pathline.data.sources.idx import Idx
from pathline.data.sources.npz import Npz
from pathline.data.sources.recognise import source_of
from pathline.data.sources.tar import Tar
from pathline.data.sources.torchvision import TorchVision
from pathline.data.sources.zip import Zip

register, build, names = registry.register, registry.build, registry.names

__all__ = [
    "Cifar",
    "Folder",
    "HuggingFace",
    "Idx",
    "ImageSource",
    "Npz",
    "Tar",
    "TorchVision",
    "Zip",
    "build",
    "names",
    "register",
    "registry",
    "source_of",
]
