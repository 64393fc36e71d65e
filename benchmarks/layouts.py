"""The same made-up samples in several layouts: packed by ``pathline.data.prepare`` itself, and a file each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from pathline import data
from pathline.data import Dataset
from pathline.data.prepare import Options
from pathline.data.prepare.command import prepare
from pathline.data.sources import ImageSource
from pathline.encoders.autoencoders import Autoencoder, Moments

SHAPE = (4, 32, 32)
SEED = 0


class Pictures(ImageSource):
    """Noise, in ten classes."""

    def __init__(self, number: int, side: int) -> None:
        self.keys = [f"{index:07d}.png" for index in range(number)]
        self.labels = [index % 10 for index in range(number)]
        self.class_names = [f"class {index}" for index in range(10)]
        self.noise = np.random.default_rng(SEED).bytes(3 * side**2 + number)
        self.side = side

    def read(self, index: int) -> Image.Image:
        return Image.frombytes("RGB", (self.side, self.side), self.noise[index : index + 3 * self.side**2])

    @property
    def manifest(self) -> dict[str, Any]:
        return {"name": "noise", "count": len(self.keys)}


class Copy(Autoencoder):
    """Gives pixels as latents of four channels, with a posterior or without."""

    def __init__(self, *, posterior: bool) -> None:
        super().__init__()
        self.posterior = posterior
        scaling = {"mean": [0.0] * 4, "std": [2.0] * 4, "source": "made up"}
        self.manifest = {"name": "copy", "class": "Copy", "sha256": "0" * 64, "dtype": "float32", "scaling": scaling}

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        return (4, resolution, resolution)

    def moments(self, images: Tensor) -> Moments:
        mean = images.float()[:, [0, 1, 2, 0]] / 127.5 - 1
        return Moments(mean, mean.abs() if self.posterior else None)

    def to_model(self, z: Tensor) -> Tensor:
        return z / 2

    def to_autoencoder(self, z: Tensor) -> Tensor:
        return z * 2

    decode = to_model  # which nobody calls


class Layouts:
    """The same number of samples in several layouts.

    Args:
        folder: to write to.
        number: of samples that are packed.
        files: number of samples that are files of their own.
    """

    def __init__(self, folder: Path, number: int, files: int) -> None:
        self.number, self.folder, self.files = number, folder, folder / "files"
        self.means, self.moments, self.pixels = (folder / name for name in ("means", "moments", "pixels"))
        options = Options(SHAPE[1], flip=True)
        prepare(Pictures(number, SHAPE[1]), self.means, options, autoencoder=Copy(posterior=False))
        prepare(Pictures(number, SHAPE[1]), self.moments, options, autoencoder=Copy(posterior=True))
        prepare(Pictures(number, 64), self.pixels, Options(64, flip=True))
        self.files.mkdir()
        rng = np.random.default_rng(SEED)
        for index in range(files):
            values = rng.standard_normal((2 * SHAPE[0], *SHAPE[1:]), np.float32)
            np.save(self.files / f"img-mean-std-{index:08d}.npy", values)

    def latents(self, **options: Any) -> Dataset:
        return data.build("prepared", path=str(self.means), **options)

    def bare(self) -> NDArray[np.float16]:
        """Map the latents of the first shard as one would without any framework."""
        path = next(iter(sorted(self.means.glob("*.safetensors"))))
        start = 8 + int.from_bytes(path.open("rb").read(8), "little")
        rows = self.latents(flip=False).told.shards[0].rows  # type: ignore[attr-defined]  # of prepared
        return np.memmap(path, np.float16, "r", start, (rows, *SHAPE))


class Files(TorchDataset[Tensor]):
    """One file a sample, as REPA's program reads them."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.npy"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.load(self.paths[index]))
