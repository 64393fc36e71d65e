"""Samples as bytes and as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pathline.core.errors import DataError

__all__ = ["ROUNDING", "grid", "levels", "save_grid", "save_levels", "shown", "to_uint8"]

ROUNDING = "float32, clamp to [-1, 1], round(127.5 x + 127.5)"
COLUMNS = 10
SMALLEST = 32  # pixels of a side, as an image is shown
LARGEST = 2**25  # pixels of a picture's images: of more rows the first are drawn


def levels(x: Tensor) -> Tensor:
    """Turn images in [−1, 1] into bytes of the same shape and device: clamped, then rounded, in float32."""
    return x.detach().float().clamp(-1, 1).mul(127.5).add(127.5).round().to(torch.uint8)


def to_uint8(x: Tensor) -> NDArray[np.uint8]:
    """Turn images (N, C, H, W) in [−1, 1] into bytes (N, H, W, C), by the rule of ``levels``."""
    return rearrange(levels(x), "n c h w -> n h w c").cpu().numpy()


def shown(count: int, labels: Tensor | None, size: tuple[int, int], *, columns: int = COLUMNS) -> list[list[int]]:
    """Return the numbers of the images in each row of a picture: one class a row, at most ``columns`` of each.

    Args:
        count: number of images.
        labels: (count,); None fills row after row.
        size: height and width of an image; rows beyond ``LARGEST`` pixels are left out.
        columns: images a row.
    """
    most = max(1, LARGEST // (columns * max(SMALLEST, size[0]) * max(SMALLEST, size[1])))
    if labels is None:
        return [list(range(i, min(i + columns, count))) for i in range(0, min(count, most * columns), columns)]
    given = labels.numpy()
    return [np.flatnonzero(given == label)[:columns].tolist() for label in np.unique(given)[:most]]


def grid(images: NDArray[np.uint8], labels: Tensor | None, *, columns: int = COLUMNS) -> NDArray[np.uint8]:
    """Lay images (N, H, W, C) out on a white sheet, in rows as ``shown`` says; (H', W', C)."""
    count, height, width, channels = images.shape
    rows = shown(count, labels, (height, width), columns=columns)
    gap = max(1, height // 8)
    sheet = np.full((len(rows) * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, number in enumerate(row):
            top, left = gap + i * (height + gap), gap + j * (width + gap)
            sheet[top : top + height, left : left + width] = images[number]
    return sheet


def save_grid(path: Path, x: Tensor, labels: Tensor | None) -> None:
    """Write images (N, C, H, W) in [−1, 1] as one PNG, as ``save_levels`` does.

    Raises:
        DataError: neither one nor three channels.
    """
    if x.shape[1] not in (1, 3):
        raise DataError(f"got images of {x.shape[1]} channels, expected 1 or 3 for a picture; decode latents first")
    save_levels(path, to_uint8(x), labels)


def save_levels(place: Path | IO[bytes], images: NDArray[np.uint8], labels: Tensor | None) -> None:
    """Write images (N, H, W, C) of one or three channels as one PNG, small ones enlarged to 32 pixels a side."""
    sheet = grid(images, labels)
    scale = max(1, -(-SMALLEST // images.shape[1]))
    picture = Image.fromarray(sheet[..., 0] if sheet.shape[2] == 1 else sheet)
    larger = picture.resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST)
    larger.save(place, format="PNG")
