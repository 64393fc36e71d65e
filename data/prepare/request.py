"""What is asked of preparing data: options, and with source and networks the request that the shards answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import PIL
import torch

from pathline.core.errors import ConfigurationError, DataError
from pathline.data.crop import CROP
from pathline.data.prepare.manifest import Request
from pathline.data.sources import ImageSource

__all__ = ["Options", "request_of"]


@dataclass(frozen=True)
class Options:
    """What is asked for beside source, autoencoder and encoders.

    Attributes:
        resolution: side R of the images.
        flip: whether the mirror image is encoded as well.
        images: whether pixels are stored beside latents.
        rows_per_shard: images of a shard.
        dtype: of stored latents.
        seed: of the choice that ``limit`` makes.
        limit: number of images to prepare; None for all.
        on_error: ``stop`` at an image that cannot be read or stored, or ``drop`` it and write its name down.
        licence: a note to keep with the data.
    """

    resolution: int
    flip: bool = False
    images: bool = False
    rows_per_shard: int = 50_000
    dtype: str = "float16"
    seed: int = 0
    limit: int | None = None
    on_error: str = "stop"
    licence: str | None = None

    def check(self, *, pixels: bool) -> None:
        """Raise ConfigurationError for values that cannot be, or have no effect."""
        numbers = {"resolution": self.resolution, "rows-per-shard": self.rows_per_shard, "limit": self.limit}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ConfigurationError(f"got --{name} {value}, expected 1 or more")
        if not 0 <= self.seed < 2**64:
            raise ConfigurationError(f"got --seed {self.seed}, expected 0 <= seed < 2**64")
        if pixels and (self.images or self.dtype != "float16"):
            raise ConfigurationError(
                f"got {'--images' if self.images else '--dtype ' + self.dtype} without an autoencoder: pixels are "
                "stored then, in uint8; leave it out"
            )


def request_of(
    source: ImageSource,
    count: int,
    options: Options,
    autoencoder: Mapping[str, Any] | None,
    encoders: Mapping[str, Mapping[str, Any]],
    *,
    together: int,
    device: str,
) -> Request:
    """Return a request.

    Args:
        source: of the images.
        count: number of those asked for.
        options: of what is written.
        autoencoder: what it tells of itself; None for pixels.
        encoders: by name, their entry in a configuration as ``component``, and what they tell as ``encoder``.
        together: images that are encoded at once.
        device: kind of what computes.

    Raises:
        DataError: a name that JSON cannot hold.
    """
    told = {
        **asdict(options),
        "source": source.manifest,
        "class_names": list(source.class_names),
        "count": count,
        "crop": {"algorithm": CROP, "pillow": PIL.__version__},
        "autoencoder": autoencoder,
        "encoders": encoders,
        "encoded_together": together,
        "device": device,
        "creator": {"pathline": version("pathline"), "torch": torch.__version__},
    }
    text = json.dumps(told, default=dict, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        name = text[max(error.start - 40, 0) : error.end + 40].encode(errors="backslashreplace").decode()
        raise DataError(
            f"got …{name}…, which is not UTF-8, in a path or the name of a class; give it another name"
        ) from error
    return Request.model_validate(json.loads(text))
