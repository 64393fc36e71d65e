"""Data sets of torchvision, by the name of their class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pathline.core.checks import require
from pathline.core.errors import DataError, MissingPackageError, UnknownNameError, suggest
from pathline.data.decode import decode, rgb, rules
from pathline.data.sources.arrays import row_keys
from pathline.data.sources.base import ImageSource, check_options, registry
from pathline.data.sources.files import as_path, read_file
from pathline.data.sources.keys import Labels, fingerprint, numbered

__all__ = ["TorchVision"]

_TARGETS = ("targets", "labels", "_labels", "_targets")  # what its classes call them, for most


@registry.register("torchvision")
class TorchVision(ImageSource):
    """A data set of ``torchvision.datasets`` whose samples are pairs of an image and a class.

    Classes that take a loader of files, as ImageFolder, are given the one of other sources. Elsewhere, how files are
    read is torchvision's affair: that of CIFAR-10, for one, unpickles files whose checksums it knows.
    Samples are asked for by several threads at once, where the one who asks has several.

    Args:
        path: root of the files.
        dataset: name of the class, as ``Flowers102``.
        options: arguments of the class besides its root, as ``{split: train}``.
        download: whether what is missing is fetched from where torchvision knows it to be.

    Raises:
        DataError: files that are not there, or samples that are no such pairs.
        InputTypeError: an option of another type.
        MissingPackageError: torchvision is not installed, or is of another torch build.
        UnknownNameError: it has no such class.
    """

    def __init__(
        self, path: str, *, dataset: str, options: Mapping[str, Any] | None = None, download: bool = False
    ) -> None:
        check_options(bool, download=download)
        check_options(str, dataset=dataset)
        check_options(Mapping, options={} if options is None else options)
        root = as_path(path)
        self.dataset, self.options = dataset, dict(options or {})
        given, found = dict(self.options), _class(dataset)
        known = inspect.signature(found).parameters
        if "download" in known:
            given["download"] = download
        self._decodes = _takes_loader(found)
        if self._decodes:
            given.setdefault("loader", _load)
        try:
            self._images: Any = found(**({"root": str(root)} if "root" in known else {}), **given)
        except Exception as error:  # each class has its own: of a type, of a file, of the network
            raise DataError(
                f"got no data set {dataset} with the options {self.options} in {root}: {error}; check path and "
                "options, or set download=true where the network is open"
            ) from error
        self.keys = row_keys(len(self._images))
        if not self.keys:
            raise DataError(f"got no images in the data set {dataset} in {root}; check path and options")
        self.labels, self.class_names = self._labels()

    def read(self, index: int) -> Image.Image:
        """Return an image in RGB; raises DataError if the data set cannot give it."""
        return rgb(self._sample(index)[0], self._name(index))

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Name, class and its options, number of images and classes, hash of labels, rules of decoding."""
        return {
            "name": "torchvision",
            "dataset": self.dataset,
            "options": self.options,
            "count": len(self),
            "num_classes": len(self.class_names),
            "sha256": fingerprint(self.keys, self.labels),
            "decoding": rules(exif=False) if self._decodes else "torchvision's",
        }

    def _name(self, index: int) -> str:
        return f"sample {index} of the data set {self.dataset}"

    def _sample(self, index: int) -> tuple[Image.Image, Any]:
        try:
            image, target = self._images[index][:2]
        except DataError:
            raise
        except Exception as error:  # damaged files make decoders raise nearly anything
            raise DataError(f"got {self._name(index)}, which cannot be read: {error!r}; check its files") from error
        if not isinstance(image, Image.Image):
            raise DataError(f"got {self._name(index)} of type {type(image).__name__}, expected an image of Pillow")
        return image, target

    def _labels(self) -> Labels:
        """Return the labels that the data set lists, or else those of its samples; none if they are no classes."""
        if not _is_class(self._sample(0)[1]):
            return Labels(None, [])
        given = (_numbers(getattr(self._images, name, None)) for name in _TARGETS)
        listed = next((numbers for numbers in given if len(numbers) == len(self.keys)), None)
        if listed is None:
            listed = [int(self._sample(index)[1]) for index in range(len(self.keys))]
        labels, names = numbered(listed, f"the data set {self.dataset}")
        told = [str(name) for name in getattr(self._images, "classes", ())]
        return Labels(labels, told if len(told) >= len(names) else names)


def _class(name: str) -> Any:
    """Return a class of data sets by its name; torchvision is imported here."""
    try:
        datasets = require("torchvision.datasets", "encoders")
    except RuntimeError as error:
        if "torchvision" not in str(error):
            raise
        raise MissingPackageError(
            f"got torchvision {version('torchvision')} built for another torch than {torch.__version__} ({error}); "
            "install the torchvision built for this torch (pip install torchvision --index-url of the same index as "
            "torch's)"
        ) from error
    known = [word for word in datasets.__all__ if inspect.isclass(getattr(datasets, word))]
    if name not in known:
        raise UnknownNameError(f"torchvision has no data set {name!r}; {suggest(name, known)}")
    return getattr(datasets, name)


def _takes_loader(found: Any) -> bool:
    """Whether a class of data sets takes a function that reads a file, or hands it on to one that does, as ImageNet."""
    known = inspect.signature(found).parameters
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    return "loader" in known or (hands_on and any(base.__name__ == "DatasetFolder" for base in found.__mro__))


def _load(path: str | Path) -> Image.Image:
    return decode(read_file(Path(path)), str(path))


def _is_class(target: Any) -> bool:
    return isinstance(target, int | np.integer) or (isinstance(target, torch.Tensor) and target.ndim == 0)


def _numbers(values: Any) -> list[int]:
    """Return a list of classes as whole numbers; an empty one if it is something else."""
    if not isinstance(values, Sequence | np.ndarray | torch.Tensor):
        return []
    found = np.asarray(values)
    return found.tolist() if found.ndim == 1 and found.dtype.kind in "iu" else []
