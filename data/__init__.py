"""Data sets, by name."""

from pathline.data.base import Batch, Dataset, registry
from pathline.data.digits import Digits
from pathline.data.images import Images
from pathline.data.latents import Latents
from pathline.data.layouts import Edm2, FastDit, LightningDit, Repa, WebDataset
from pathline.data.prepared import Prepared
from pathline.data.synthetic import Synthetic

register, build, names = registry.register, registry.build, registry.names

__all__ = [
    "Batch",
    "Dataset",
    "Digits",
    "Edm2",
    "FastDit",
    "Images",
    "Latents",
    "LightningDit",
    "Prepared",
    "Repa",
    "Synthetic",
    "WebDataset",
    "build",
    "names",
    "register",
    "registry",
]
