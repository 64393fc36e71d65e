"""Reading files of samples."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from pathline.core.errors import DataError

__all__ = ["read_record", "read_samples"]


def read_samples(path: Path) -> tuple[Tensor, Tensor]:
    """Read ``arr_0``, uint8 (N, H, W, C), as images (N, C, H, W) = a/127.5 − 1, and ``arr_1``, the asked labels (N,).

    Raises:
        DataError: no such file, no such arrays, or arrays of another type or shape; the file is named.
    """
    if not path.is_file():
        raise DataError(f"got no file at {path}, expected samples written by sample.py")
    if not zipfile.is_zipfile(path):
        raise DataError(f"got {path}, which is no .npz of plain arrays; expected samples written by sample.py")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {key: arrays[key] for key in ("arr_0", "arr_1") if key in arrays}
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"got {path}, which is no .npz of plain arrays: {error}") from error
    if len(found) < 2:
        raise DataError(
            f"got {path} with {', '.join(found) or 'neither array'}, expected arr_0 (images) and arr_1 (labels)"
        )
    images, labels = found["arr_0"], found["arr_1"]
    if images.dtype != np.uint8 or images.ndim != 4:
        raise DataError(f"got {path} with images {images.dtype} {images.shape}, expected uint8 (N, H, W, C)")
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"got {path} with labels {labels.dtype} {labels.shape}, expected {len(images)} whole numbers")
    x = torch.from_numpy(images.astype(np.float32) / 127.5 - 1)
    return rearrange(x, "n h w c -> n c h w"), torch.from_numpy(labels.astype(np.int64))


def read_record(path: Path) -> dict[str, Any]:
    """Read how samples were drawn, from the JSON beside them; empty if there is none.

    Raises:
        DataError: a file that is no JSON object.
    """
    record = path.with_suffix(".json")
    if not record.is_file():
        return {}
    try:
        content = json.loads(record.read_text())
    except ValueError as error:
        raise DataError(f"got {record}, which is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"got {record} with a {type(content).__name__}, expected an object")
    return content
