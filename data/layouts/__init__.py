"""Data sets in the layouts of other programs."""

from pathline.data.layouts.edm2 import Edm2
from pathline.data.layouts.fast_dit import FastDit
from pathline.data.layouts.lightning_dit import LightningDit
from pathline.data.layouts.repa import Repa
from pathline.data.layouts.webdataset import WebDataset

__all__ = ["Edm2", "FastDit", "LightningDit", "Repa", "WebDataset"]
