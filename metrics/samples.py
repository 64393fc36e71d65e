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


def read_samples(path: Path) -> tuple[Tensor, Tensor | None]:
    """Read ``arr_0``, uint8 (N, H, W, C), as images (N, C, H, W) = a/127.5 − 1, and labels ``arr_1`` (N,) or None.

    Raises:
        DataError: no such file, no ``arr_0``, or arrays of another type or shape; the file is named.
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
    if "arr_0" not in found:
        raise DataError(f"got {path} without an array arr_0, expected the images there and labels, if any, in arr_1")
    images, labels = found["arr_0"], found.get("arr_1")
    if images.dtype != np.uint8 or images.ndim != 4:
        raise DataError(f"got {path} with images {images.dtype} {images.shape}, expected uint8 (N, H, W, C)")
    x = rearrange(torch.from_numpy(images.astype(np.float32) / 127.5 - 1), "n h w c -> n c h w")
    if labels is None:
        return x, None
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"got {path} with labels {labels.dtype} {labels.shape}, expected {len(images)} whole numbers")
    return x, torch.from_numpy(labels.astype(np.int64))


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
