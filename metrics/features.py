"""Feature spaces by name: those here are fitted on a training set, in seconds, and need no download.

N images, D features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pathline import data
from pathline.core.draws import Draws
from pathline.core.errors import InputError
from pathline.core.registry import Registry
from pathline.data import Dataset
from pathline.encoders.networks import hash_of_tensors

__all__ = [
    "DigitsCNN",
    "Features",
    "PrincipalComponents",
    "as_floats",
    "as_levels",
    "build",
    "full_precision",
    "names",
    "register",
    "registry",
]

Training = Dataset | str | Mapping[str, Any]


class Features(ABC):
    """A map from images to vectors.

    Attributes:
        name: of the space.
        sizes: output -> D; ``features`` is the one that most metrics are of.
        manifest: name and sizes, with a hash of the weights where there are any; statistics of another are refused.
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


registry: Registry[Features] = Registry("feature space", "metrics.features", Features)
register, build, names = registry.register, registry.build, registry.names


@registry.register("pixels")
class Pixels(Features):
    """The values themselves."""

    name = "pixels"

    def __init__(self, training: Training) -> None:
        self.sizes = {"features": math.prod(data.build(training).shape)}
        self.manifest = {"name": self.name, "sizes": self.sizes}

    def __call__(self, images: Tensor) -> Tensor:
        """Flatten."""
        return as_floats(images.cpu()).flatten(1).double()


@registry.register("pca")
class PrincipalComponents(Features):
    """Coordinates along the first principal axes of the training images.

    Args:
        training: what to fit on: a data set, its name or ``{"name": …, **options}``.
        axes: how many, at most the number of values of an image.
    """

    name = "pca"

    def __init__(self, training: Training, axes: int = 20) -> None:
        training = data.build(training)
        images = training.batch(range(len(training)))["data"].flatten(1).double()
        if not 1 <= axes <= images.shape[1]:
            raise InputError(f"got axes {axes}, expected 1 to {images.shape[1]}")
        self.mean = images.mean(0)
        self.axes = torch.linalg.svd(images - self.mean, full_matrices=False).Vh[:axes]
        self.sizes = {"features": axes}
        self.manifest = {
            "name": self.name,
            "sizes": self.sizes,
            "sha256": hash_of_tensors({"mean": self.mean, "axes": self.axes}),
        }

    def __call__(self, images: Tensor) -> Tensor:
        """Project."""
        projected: Tensor = (as_floats(images.cpu()).flatten(1).double() - self.mean) @ self.axes.T
        return projected


@registry.register("digits-cnn")
class DigitsCNN(Features):
    """The 64 last hidden values of a small convolutional classifier, trained in a few seconds on the training images.

    Convolutions to 32 and, with stride 2, 64 channels, a hidden layer of 64, ReLU throughout; AdamW 2e-3.

    Args:
        training: what to train on, as for ``pca``; labelled images of 8 × 8 pixels.
        epochs: passes over the training images.
        seed: of the first weights and of the order.
    """

    name = "digits-cnn"

    def __init__(self, training: Training, epochs: int = 30, seed: int = 0) -> None:
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
        self._train(training, epochs, seed)
        self.sizes = {"features": 64}
        state = {f"{part}.{key}": value for part in ("body", "head") for key, value in self._part(part)}
        self.manifest = {"name": self.name, "sizes": self.sizes, "sha256": hash_of_tensors(state)}

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

    def _part(self, part: str) -> list[tuple[str, Tensor]]:
        module: nn.Module = getattr(self, part)
        return list(module.state_dict().items())

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
