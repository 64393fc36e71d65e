"""What the tests of prepared data share: a source, an autoencoder and an encoder that are small, and exact to tell."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from pathline import DataError, InputError
from pathline.data.sources import ImageSource
from pathline.encoders import Encoder
from pathline.encoders.autoencoders import Autoencoder, Moments

MEAN, STD = [0.5, -0.25], [2.0, 4.0]  # of the scaling


class Pictures(ImageSource):
    """Noise of several sizes, sides from 10 to 24 pixels, in three classes or none; some cannot be read."""

    def __init__(self, count=37, *, broken=(), labelled=True, seconds=0.0):
        self.keys = [f"{number:03d}.png" for number in range(count)]
        self.labels = [(7 * number) % 3 for number in range(count)] if labelled else None
        self.class_names = ["ant", "bee", "cat"] if labelled else []
        self.broken, self.seconds, self.reads = set(broken), seconds, []

    def picture(self, index):
        draw = np.random.default_rng(index)
        width, height = draw.integers(10, 25, 2)
        return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))

    def read(self, index):
        self.reads.append(index)
        time.sleep(self.seconds)
        if index in self.broken:
            raise DataError(f"got {self.keys[index]}, which is truncated")
        return self.picture(index)

    @property
    def manifest(self):
        return {"name": "pictures", "count": len(self.keys), "exif": False}


class Coder(Autoencoder):
    """A convolution of stride 2 to C = 2 channels, with a standard deviation or without one; of even sides alone."""

    def __init__(self, *, deterministic=False, overflows=None):
        super().__init__()
        self.deterministic, self.overflows = deterministic, overflows
        generator = torch.Generator().manual_seed(1)
        self.net = nn.Conv2d(3, 4, 2, stride=2)
        for parameter in self.net.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.manifest = {"name": "coder", "class": "Coder", "sha256": "c0de", "dtype": "float32"}
        self.manifest |= {"input_range": [-1.0, 1.0], "scaling": {"mean": MEAN, "std": STD, "source": "a test"}}

    def latent_shape(self, resolution):
        if resolution % 2:
            raise InputError(f"got images of {resolution} x {resolution}, expected an even side")
        return 2, resolution // 2, resolution // 2

    @torch.no_grad()
    def moments(self, images):
        assert images.dtype == torch.uint8
        if self.overflows is not None and bool((images[:, 0, 0, 0] == self.overflows).any()):
            raise InputError("got values that float16 cannot hold")
        mean, rest = self.net(images.float() / 127.5 - 1).chunk(2, dim=1)
        return Moments(mean, None if self.deterministic else 0.1 + rest.abs())

    def to_model(self, z):
        return (z - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]

    def to_autoencoder(self, z):
        return z * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]

    def decode(self, z):
        raise NotImplementedError


class Tokens(Encoder):
    """Means over boxes: 2 x 2 tokens of width 3."""

    dim, grid = 3, (2, 2)

    def __init__(self):
        super().__init__()
        self.manifest = {"name": "tokens", "dim": 3, "grid": [2, 2], "weights": "hub", "sha256": "e1"}

    def forward(self, images):
        unit = images.float() / 255
        return nn.functional.adaptive_avg_pool2d(unit, 2).flatten(2).transpose(1, 2)


TOKENS = {"name": "tokens", "resolution": 10, "weights": None}  # its entry in a configuration


def contents(folder: Path) -> dict[str, bytes]:
    """Return all that a folder holds, by path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def header(path: Path) -> tuple[dict, int]:
    """Return the header of a safetensors file and where its tensors begin."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), 8 + length
