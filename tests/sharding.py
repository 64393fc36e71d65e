"""What the tests of WebDataset's shards share: shards of latents, packed as that library reads them."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from pathline import DataError, data

SHAPE = (4, 3, 5)
COUNTS = (5, 2, 7, 3, 4, 1, 6)  # samples of each shard, 28 in all


def value(number: int, shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(number).normal(size=shape).astype(np.float16)


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def pixels(number: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def png(array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


def pack(path, members) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def shard_name(number: int) -> str:
    return f"x-{number:06d}.tar"


def write(folder, counts=COUNTS, shape=SHAPE) -> None:
    """Shards of latents; sample i of all has the label 3·i mod 11."""
    folder.mkdir(exist_ok=True)
    first = 0
    for number, count in enumerate(counts):
        members = [
            (f"s/{i:05d}.{kind}", content)
            for i in range(first, first + count)
            for kind, content in (
                ("npy", npy(value(i, shape))),
                ("cls", f"{3 * i % 11}\n".encode()),
                ("pth", b"never read"),
                ("pyd", b"never read"),
            )
        ]
        pack(folder / shard_name(number), [("README", b"no sample"), *members])
        first += count


def build(path, **options):
    return data.build("webdataset", path=str(path), **{"kind": "latents", "num_classes": 11, **options})


def refusal(path, **options) -> str:
    with pytest.raises(DataError) as error:
        build(path, **options)
    return str(error.value)


def pattern(folder) -> str:
    return f"{folder}/x-{{000000..{len(COUNTS) - 1:06d}}}.tar"
