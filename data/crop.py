"""The centre crop of ADM, by which reference statistics and released latents of ImageNet were made.

S the side of the square.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathline.core.errors import InputError

__all__ = ["CROP", "centre_crop"]

CROP = "adm-centre-crop"  # its name in manifests


def centre_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Return the middle of an image as a square, its shorter side scaled to S (Dhariwal and Nichol, arXiv:2105.05233).

    While the shorter side is 2·S or more, both are halved, rounded down, by averages over boxes; then the image is
    scaled by S over the shorter side with bicubic weights, and cut. A square of side S comes out as it went in.

    Args:
        image: of any mode that Pillow converts to RGB.
        size: S, in pixels.

    Returns:
        (S, S, 3), RGB.

    Raises:
        InputError: a size below 1, or an image so thin that scaling would make it larger than Pillow's limit.
    """
    if size < 1:
        raise InputError(f"got a size of {size} pixels, expected 1 or more")
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)  # halves to even, as Python rounds
    if width * height > (Image.MAX_IMAGE_PIXELS or width * height):
        raise InputError(
            f"got an image of {image.width} x {image.height} pixels, which scales to {width} x {height}, expected "
            f"{Image.MAX_IMAGE_PIXELS} pixels or fewer; leave it out"
        )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))
