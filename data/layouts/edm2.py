"""Latents as EDM2's tool writes them (arXiv:2312.02696): a folder, or a zip archive."""

from __future__ import annotations

from pathline.core.errors import DataError
from pathline.data.base import registry
from pathline.data.layouts.base import LatentScaling, check_options
from pathline.data.layouts.repa import MomentTree
from pathline.data.layouts.stores import store_at
from pathline.data.sources.files import as_path

__all__ = ["Edm2"]

# of Stable Diffusion's autoencoder on images in [0, 1], channel by channel (the code of arXiv:2312.02696)
RAW_MEAN = (5.81, 3.25, 0.12, -2.15)
RAW_STD = (4.17, 4.62, 3.71, 3.28)
TARGET_STD = 0.5


@registry.register("edm2")
class Edm2(MomentTree):
    """Moments of latents in ``00000/img-mean-std-00000000.npy`` with ``dataset.json``, in a folder or a zip archive.

    The names are those of REPA's tree, the contents are not: EDM2's autoencoder was fed images in [0, 1], and its drawn
    latents are (z − mean)/std·0.5 with a mean and a std for each of its four channels. Its file of statistics is a
    pickle, and never read. The images that the tool writes in the same way are read by the data set ``images``.

    Args:
        path: folder, or ``.zip`` file.
        num_classes: class labels 0 … num_classes − 1; 0 for data without labels.
        workers: threads that read files.

    Raises:
        DataError: files or labels that are missing, beside others, or not what they should be; names them.
        InputError: an option out of range.
        InputTypeError: an option of another type.
    """

    name = "edm2"

    def __init__(self, path: str, *, num_classes: int = 1000, workers: int = 4) -> None:
        check_options(num_classes)
        super().__init__(store_at(as_path(path)), num_classes, workers)
        if self.shape[0] != len(RAW_MEAN):
            raise DataError(f"got moments of {self.shape[0]} channels in {path}, expected {len(RAW_MEAN)}, as EDM2's")
        std = tuple(raw / TARGET_STD for raw in RAW_STD)
        self._set_scaling(
            LatentScaling(RAW_MEAN, std, "EDM2's means and deviations of raw latents, to a deviation of 0.5"),
            input_range=[0, 1],
        )
