"""Samples as bytes and as pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pathline.core.errors import DataError

__all__ = ["ROUNDING", "grid", "levels", "save_grid", "to_uint8"]

ROUNDING = "float32, clamp to [-1, 1], round(127.5 x + 127.5)"


def levels(x: Tensor) -> Tensor:
    """Turn images in [−1, 1] into bytes of the same shape and device: clamped, then rounded, in float32."""
    return x.detach().float().clamp(-1, 1).mul(127.5).add(127.5).round().to(torch.uint8)


def to_uint8(x: Tensor) -> NDArray[np.uint8]:
    """Turn images (N, C, H, W) in [−1, 1] into bytes (N, H, W, C), by the rule of ``levels``."""
    return rearrange(levels(x), "n c h w -> n h w c").cpu().numpy()


def grid(images: NDArray[np.uint8], labels: Tensor | None, *, columns: int = 10) -> NDArray[np.uint8]:
    """Lay images (N, H, W, C) out on a white sheet, one class a row, at most ``columns`` of each; (H', W', C)."""
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    if labels is not None:
        rows = [images[labels.numpy() == label][:columns] for label in sorted(set(labels.tolist()))]
    _, height, width, channels = images.shape
    gap = max(1, height // 8)
    sheet = np.full((len(rows) * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = gap + i * (height + gap), gap + j * (width + gap)
            sheet[top : top + height, left : left + width] = image
    return sheet


def save_grid(path: Path, x: Tensor, labels: Tensor | None) -> None:
    """Write images (N, C, H, W) in [−1, 1] as one PNG, small ones enlarged to at least 32 pixels a side.

    Raises:
        DataError: neither one nor three channels.
    """
    if x.shape[1] not in (1, 3):
        raise DataError(f"got images of {x.shape[1]} channels, expected 1 or 3 for a picture; decode latents first")
    sheet = grid(to_uint8(x), labels)
    scale = max(1, -(-32 // x.shape[2]))
    picture = Image.fromarray(sheet[..., 0] if sheet.shape[2] == 1 else sheet)
    picture.resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST).save(path)
