"""Feature spaces by name: those here are fitted on a training set, in seconds, and need no download.

N images, D features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pathline import data
from pathline.core.draws import Draws
from pathline.core.errors import InputError
from pathline.core.registry import Registry
from pathline.data import Dataset

__all__ = [
    "DigitsCNN",
    "Features",
    "Images",
    "PrincipalComponents",
    "as_floats",
    "as_levels",
    "build",
    "full_precision",
    "names",
    "one_thread",
    "register",
    "registry",
]

_PLACES = ("file", "path")  # entries of manifests that tell where, not what
_MOST = 2**27  # values of all images that axes are fitted on, 1 GiB in float64


class Images(Protocol):
    """Images to fit a feature space on, as a reference has them: all, whenever ``batches`` is called."""

    shape: tuple[int, int, int] | None
    count: int

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What they are."""

    def batches(self) -> Iterator[Tensor]:
        """Yield all of them, (n, C, H, W)."""


Training = Dataset | Images | str | Path | Mapping[str, Any]


class Features(ABC):
    """A map from images to vectors.

    Attributes:
        name: of the space.
        sizes: output -> D; ``features`` is the one that most metrics are of.
        manifest: name and sizes, with a hash of the weights that were loaded, or with what the space was fitted on and
            how, as the last digits of what is fitted are the machine's; statistics of another are refused.
        device: where it computes, wherever images lie.
    """

    name: str
    sizes: Mapping[str, int]
    manifest: Mapping[str, Any]
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W), uint8 or floats in [−1, 1], to (N, D) features."""

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return every output by name, (N, D) each, from one pass."""
        return {"features": self(images)}

    def to(self, device: torch.device) -> None:
        """Move to a device, where it is worth the while; small spaces stay on the host."""
        return


def as_floats(images: Tensor) -> Tensor:
    """Return images in [−1, 1] as they are, levels a of 0 … 255 as a/127.5 − 1."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def as_levels(images: Tensor) -> Tensor:
    """Return levels as they are, images x in [−1, 1] as round((x + 1)·127.5), clamped, in float32."""
    if images.dtype == torch.uint8:
        return images
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 without TF32 on devices that have it: features must not depend on how a model is trained."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread, so that sums have one order however many a run has."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)


registry: Registry[Features] = Registry("feature space", "metrics.features", Features)
register, build, names = registry.register, registry.build, registry.names


@registry.register("pixels")
class Pixels(Features):
    """The values themselves.

    Args:
        training: images of the shape: a data set or a reference, as it is or by name or place; None where ``shape``
            tells.
        shape: (C, H, W) of an image.

    Raises:
        InputError: neither.
    """

    name = "pixels"

    def __init__(self, training: Training | None = None, shape: Sequence[int] | None = None) -> None:
        if shape is None and training is None:
            raise InputError("got no shape for pixels, expected that of an image; set pixels.shape, as [3, 32, 32]")
        told = _images(training).shape if training is not None else tuple(shape or ())
        self.sizes = {"features": math.prod(told or ())}
        self.manifest = {"name": self.name, "sizes": self.sizes}

    def __call__(self, images: Tensor) -> Tensor:
        """Flatten."""
        return as_floats(images.cpu()).flatten(1).double()


@registry.register("pca")
class PrincipalComponents(Features):
    """Coordinates along the first principal axes of the training images, each with its largest entry above zero.

    Args:
        training: what to fit on: a data set, its name or ``{"name": …, **options}``, or a reference of images or where
            these are.
        axes: how many, at most the number of values of an image, and of images.

    Raises:
        InputError: another number of axes, or more images than can be fitted at once.
    """

    name = "pca"

    def __init__(self, training: Training, axes: int = 20) -> None:
        training = _images(training)
        values = math.prod(training.shape or ())
        if training.count * values > _MOST:
            raise InputError(
                f"got {training.count} images of {values} values for pca, expected at most {_MOST} values in all; fit "
                "on fewer or smaller images"
            )
        if not 1 <= axes <= min(values, training.count):
            raise InputError(f"got axes {axes}, expected 1 to {min(values, training.count)}")
        images = torch.cat([as_floats(part).flatten(1).double() for part in training.batches()])
        with one_thread():
            self.mean = images.mean(0)
            found = torch.linalg.svd(images - self.mean, full_matrices=False).Vh[:axes]
        self.axes = found * found.gather(1, found.abs().argmax(1, keepdim=True)).sign()
        self.sizes = {"features": axes}
        self.manifest = {"name": self.name, "sizes": self.sizes, "training": _told(training.manifest)}

    def __call__(self, images: Tensor) -> Tensor:
        """Project."""
        projected: Tensor = (as_floats(images.cpu()).flatten(1).double() - self.mean) @ self.axes.T
        return projected


@registry.register("digits-cnn")
class DigitsCNN(Features):
    """The 64 last hidden values of a small convolutional classifier, trained in a few seconds on the training images.

    Convolutions to 32 and, with stride 2, 64 channels, a hidden layer of 64, ReLU throughout; AdamW 2e-3.

    Args:
        training: what to train on: a data set of labelled images of 8 × 8 pixels, or its name or ``{"name": …}``.
        epochs: passes over the training images.
        seed: of the first weights and of the order.

    Raises:
        InputError: other images, or such without labels.
    """

    name = "digits-cnn"

    def __init__(self, training: Training, epochs: int = 30, seed: int = 0) -> None:
        if not isinstance(training, Dataset | str | Mapping):
            raise InputError(
                "got images without labels for digits-cnn, expected a labelled data set; set digits-cnn.training, as "
                "digits"
            )
        training = data.build(training)
        if tuple(training.shape) != (1, 8, 8) or not training.num_classes:
            raise InputError(f"got data of shape {tuple(training.shape)}, expected labelled images of shape (1, 8, 8)")
        with torch.device("meta"):  # weights come from a generator of our own below
            self.body = nn.Sequential(
                nn.Conv2d(1, 32, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(32, 64, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(1024, 64),
                nn.ReLU(),
            )
            self.head = nn.Linear(64, training.num_classes)
        self._initialize(torch.Generator().manual_seed(Draws(seed).torch_seed("classifier")))
        with one_thread():
            self._train(training, epochs, seed)
        self.sizes = {"features": 64}
        self.manifest = {
            "name": self.name,
            "sizes": self.sizes,
            "training": _told(training.manifest),
            "epochs": epochs,
            "seed": seed,
        }

    def __call__(self, images: Tensor) -> Tensor:
        """Return the last hidden layer's values."""
        with torch.no_grad():
            features: Tensor = self.body(as_floats(images.cpu()).float())
        return features.double()

    def classify(self, images: Tensor) -> Tensor:
        """Return the likeliest class of each image, (N,)."""
        with torch.no_grad():
            classes: Tensor = self.head(self.body(as_floats(images.cpu()).float())).argmax(1)
        return classes

    def accuracy(self, dataset: Dataset) -> float:
        """Share of a labelled data set's images that are classified as labelled."""
        batch = dataset.batch(range(len(dataset)))
        return float((self.classify(batch["data"]) == batch["label"]).double().mean())

    def _initialize(self, generator: torch.Generator) -> None:
        """Draw weights and biases uniformly in ± 1/√(inputs of a unit), torch's own law."""
        for module in (*self.body, self.head):
            module.to_empty(device="cpu")
            if isinstance(module, nn.Conv2d | nn.Linear):
                bound = 1 / math.sqrt(module.weight[0].numel())
                for parameter in module.parameters():
                    nn.init.uniform_(parameter, -bound, bound, generator)

    def _train(self, training: Dataset, epochs: int, seed: int) -> None:
        parameters = [*self.body.parameters(), *self.head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=2e-3, fused=True)
        size = 32
        for batch in training.batches(size, epochs * len(training) // size, seed):
            loss = functional.cross_entropy(self.head(self.body(batch["data"])), batch["label"])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
            optimizer.step()
        for parameter in parameters:
            parameter.requires_grad_(False)


def _images(training: Training) -> Images:
    """Return images to fit on.

    Raises:
        DataError: nothing of that name or at that place, or data without images.
    """
    from pathline.metrics.reference import images_of  # which knows the kinds of references, made of what is here

    return images_of(training) if isinstance(training, Dataset | str | Path | Mapping) else training


def _told(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a manifest tells of the images, wherever they lie."""
    return {key: value for key, value in manifest.items() if key not in _PLACES}
