"""Encoded images to RGB of 8 bits a channel, by one set of rules for whatever a researcher's folder holds."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from pathline.core.errors import DataError

__all__ = ["EXTENSIONS", "decode", "is_image", "rgb", "rules", "size_in"]

EXTENSIONS = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no other decoder of Pillow is ever tried
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr"}
_WIDE = {"I", "I;16", "I;16B", "I;16L", "I;16N"}  # grey, 16 bits
_SCALED = {"L;2": 85, "L;4": 17}  # by what Pillow multiplies grey of 2 and of 4 bits
_WHITE_IS_HIGHEST = 1  # tag 262 of TIFF


def is_image(name: str) -> bool:
    """Whether the name of a file, or its path with ``/``, is that of an image: by its ending, and not hidden."""
    parts = name.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and "." in parts[-1] and "." + parts[-1].rpartition(".")[2].lower() in EXTENSIONS


def rules(*, exif: bool) -> dict[str, Any]:
    """Return what ``decode`` does with images that are not plain RGB; fit for manifests."""
    return {
        "exif orientation": "applied" if exif else "ignored",
        "transparency": "over white",
        "16 bits": "grey: round(x/257); colour, and grey with an alpha channel: the high byte",
        "cmyk": "Pillow's conversion, profiles ignored",
        "animation": "first frame",
    }


def decode(content: bytes, name: str, *, exif: bool = False) -> Image.Image:
    """Return an image in RGB, 8 bits a channel; its rules are those that ``rules`` tells of.

    JPEG is decoded at its full size. Colour profiles are ignored. An orientation in TIFF is part of that format, and
    applied in any case.

    Args:
        content: bytes of a file: BMP, GIF, JPEG, PNG, PPM, TIFF or WebP, whatever its name ends with.
        name: of the file, and of its archive, for errors.
        exif: whether an orientation that a camera noted is applied; ADM's, DiT's and REPA's programs ignore it.

    Raises:
        DataError: truncated, no image, larger than Pillow's limit, or of a kind that has no one meaning in 8 bits.
    """
    with _opened(content, name) as image:
        clear = _transparent(image)
        image.load()
        if clear is not None:
            image.info["transparency"] = clear
        turned = ImageOps.exif_transpose(image) if exif else image
        return rgb(turned, name)


def size_in(content: bytes | Path, name: str) -> tuple[int, int]:
    """Return width and height that an image's header tells, before any orientation; raises DataError as ``decode``."""
    with _opened(content, name) as image:
        return image.size


def rgb(image: Image.Image, name: str) -> Image.Image:
    """Return a decoded image in RGB, 8 bits a channel.

    Transparent colours lie over white, where Pillow's own conversion would drop the transparency. Grey of 16 bits is
    scaled, where Pillow's own would cut it at 255.

    Raises:
        DataError: floats, whole numbers of 32 bits, grey of 12 bits, or a colour space that Pillow does not convert.
    """
    if image.mode in _WIDE:
        return _scaled(image, name).convert("RGB")
    if image.mode not in _MODES:
        raise DataError(
            f"got {name} with pixels of Pillow's mode {image.mode}, expected 8 or 16 bits of grey or colour; convert it"
        )
    if "transparency" in image.info or image.mode[-1] in "Aa":
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _opened(content: bytes | Path, name: str) -> Iterator[ImageFile.ImageFile]:
    """Open an image, its pixels not decoded yet; what is raised meanwhile becomes a DataError that names it."""
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=_FORMATS) as image:
            _check_size(image, name)
            yield image
    except DataError:
        raise
    except UnidentifiedImageError as error:
        size = f" of {len(content)} bytes" if isinstance(content, bytes) else ""
        raise DataError(
            f"got {name}{size}, which is no image of the kinds {', '.join(_FORMATS)}, or whose first bytes are "
            "damaged; replace it, or leave it out"
        ) from error
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise DataError(f"got {name}, which cannot be decoded: {error}; replace it, or leave it out") from error


def _scaled(image: Image.Image, name: str) -> Image.Image:
    """Return grey of 16 bits in 8: round(x/257), which takes 0 to 0 and 65535 to 255."""
    tags = getattr(image, "tag_v2", None)  # of TIFF
    if tags is not None and (image.mode == "I" or tags.get(258) != (16,) or tags.get(262) != _WHITE_IS_HIGHEST):
        raise DataError(
            f"got {name} with {tags.get(258)} bits a pixel of TIFF's photometric kind {tags.get(262)}, expected 8 "
            "bits, or 16 without a sign and with white the highest; convert it"
        )
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise DataError(f"got {name} with levels from {levels.min()} to {levels.max()}, expected 16 bits; convert it")
    levels[levels == image.info.get("transparency")] = 65535  # PNG may call one level transparent
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))


def _transparent(image: ImageFile.ImageFile) -> Any:
    """Return the transparent level or colour of an image that is opened, as its pixels will have it once decoded.

    PNG tells of it as it is stored: grey of 2 and 4 bits is scaled, and of colours of 16 bits the high byte is kept,
    by Pillow, which leaves what is told as it is. None for an image without, or where that needs no change.
    """
    told, stored = image.info.get("transparency"), image.tile[0][3] if image.tile else None
    if isinstance(told, int) and stored in _SCALED:
        return told * _SCALED[stored]
    return tuple(level >> 8 for level in told) if isinstance(told, tuple) and stored == "RGB;16B" else None


def _check_size(image: Image.Image, name: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise DataError(
            f"got {name} of {image.width} x {image.height} pixels, expected {limit} or fewer in all; scale it down, or "
            "raise PIL.Image.MAX_IMAGE_PIXELS where it comes from a source that you trust"
        )
