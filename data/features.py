"""Features of a whole data set in one file, memory-mapped: written once, read in training.

A safetensors file of one tensor ``features`` (N, T, D) in float16, row i of sample i. Its header tells the data set's
manifest, a hash of some of its images, the encoder's manifest and its entry in the configuration, and the hash of the
rows. N samples, T tokens, D width.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Json, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pathline.core.errors import DataError

__all__ = ["EncoderManifest", "FeatureFile", "check_place", "encoder_changes", "write_features"]

FORMAT = "pathline features 1"
HASH = "sha256"


class _Needed(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    weights: str
    sha256: str
    grid: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]


def _checked(told: dict[str, Any]) -> dict[str, Any]:
    _Needed.model_validate(told)
    return told


EncoderManifest = Annotated[dict[str, Any], AfterValidator(_checked)]
"""What an encoder tells of itself: its weights, their hash, the grid of its tokens, and more."""


class _Header(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    component: Json[dict[str, Any]]
    encoder: Json[EncoderManifest]
    data: Json[dict[str, Any]]
    images: str
    sha256: str


class FeatureFile:
    """A file of features.

    Args:
        path: of the file; its rows are mapped, not read.

    Attributes:
        shape: (N, T, D).
        encoder: what the encoder told of itself.
        sha256: hash of all rows, as it was taken when they were written.

    Raises:
        DataError: no such file, or one that is damaged or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        told = _header(path)
        self.component, self.data, self.encoder = told.component, told.data, told.encoder
        self.images, self.sha256, self._rows = told.images, told.sha256, _mapped(path)
        wanted = math.prod(self.encoder["grid"])
        if self._rows.shape[1:-1] != (wanted,):
            raise DataError(
                f"got {path} with features of shape {self._rows.shape}, expected (N, {wanted}, D) for the grid "
                f"{self.encoder['grid']}; make it anew"
            )
        count, tokens, dim = self._rows.shape
        self.shape = (int(count), int(tokens), int(dim))

    def check(
        self, component: Mapping[str, Any], weights_sha256: str | None, data: Mapping[str, Any], images: str | None
    ) -> None:
        """Check that these are the features of an encoder on a data set, by what the file tells of both.

        Args:
            component: the encoder's entry in a configuration.
            weights_sha256: hash of the file of weights that the entry names; None if it names none.
            data: the data set's manifest.
            images: hash of the same images of it as the file's; None for data that come without them, as latents may.

        Raises:
            DataError: they are of another one; says in what they differ.
        """
        changed = encoder_changes(self.component, self.encoder, component, weights_sha256)
        now = json.loads(json.dumps(dict(data)))
        changed += [
            f"the data's {key} {self.data.get(key)!r} -> {now.get(key)!r}" for key in _differing(self.data, now)
        ]
        if images not in (None, self.images):
            changed.append(f"the data's images {self.images} -> {images}")
        if changed:
            raise DataError(
                f"got {self.path}, features of something else ({'; '.join(changed)}); make them anew by "
                "python -m pathline.encoders.cache"
            )

    def rows(self, indices: Tensor) -> Tensor:
        """Return the rows of samples, (n, T, D) float16 on the host."""
        return torch.from_numpy(self._rows[indices.cpu().numpy()])


def encoder_changes(
    made: Mapping[str, Any], encoder: Mapping[str, Any], component: Mapping[str, Any], weights_sha256: str | None
) -> list[str]:
    """List in what an encoder differs from the one that made features.

    Args:
        made: the entry in a configuration of the one that made them.
        encoder: what that one told of itself.
        component: the other one's entry.
        weights_sha256: hash of the file of weights that this names; None if it names none.
    """
    before, now = _settings(made), _settings(json.loads(json.dumps(dict(component))))
    changed = [f"{key} {before.get(key)!r} -> {now.get(key)!r}" for key in _differing(before, now)]
    used = encoder[HASH] if encoder["weights"] == "file" else None
    if used != weights_sha256:
        changed.append(f"weights {used or 'of the hub'} -> {weights_sha256 or 'of the hub'}")
    return changed


def _settings(component: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of an encoder's entry must be equal: not where its weights lie."""
    return {key: value for key, value in component.items() if key not in ("weights", "cache")}


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted(first.keys() | second.keys()) if first.get(key) != second.get(key)]


def _header(path: Path) -> _Header:
    """Return the metadata of a whole file."""
    if not path.is_file():
        raise DataError(f"got no features at {path}; make them by python -m pathline.encoders.cache")
    try:
        with safe_open(path, "np") as file:  # verifies that all of it is there
            told: dict[str, str] = file.metadata() or {}
            found = {name: file.get_slice(name).get_dtype() for name in file.keys()}
    except SafetensorError as error:
        raise DataError(f"got {path}, a damaged file ({error}); make it anew") from error
    if told.get("format") != FORMAT or found != {"features": "F16"}:
        raise DataError(f"got {path}, which holds no features ({FORMAT}); use python -m pathline.encoders.cache")
    try:
        return _Header.model_validate(told)
    except ValidationError as error:
        place, said = (error.errors()[0][key] for key in ("loc", "msg"))
        raise DataError(
            f"got {path}, which holds no features ({FORMAT}): {'.'.join(map(str, place))}: {said}; make it anew"
        ) from error


def _mapped(path: Path) -> NDArray[np.float16]:
    """Map the rows of a verified file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))["features"]
    return np.memmap(path, np.float16, "r", offset=8 + length + entry["data_offsets"][0], shape=tuple(entry["shape"]))


def write_features(
    path: Path,
    batches: Iterable[Tensor],
    shape: tuple[int, int, int],
    *,
    component: Mapping[str, Any],
    encoder: Mapping[str, Any],
    data: Mapping[str, Any],
    images: str,
) -> None:
    """Write features, batch after batch, beside the file, which then appears whole or not at all.

    Args:
        path: of the file; one that is there is replaced.
        batches: (n, T, D) each, N rows in all, in the order of the samples.
        shape: (N, T, D).
        component: the encoder's entry in the configuration, without ``cache``.
        encoder: its manifest.
        data: the data set's manifest.
        images: hash of some of its images, which ``FeatureFile.check`` compares.

    Raises:
        DataError: a path that cannot be a file's, features that float16 cannot hold, or another number of rows.
    """
    check_place(path)
    told = {
        "format": FORMAT,
        "component": dict(component),
        "encoder": dict(encoder),
        "data": dict(data),
        "images": images,
        HASH: 64 * "0",
    }
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in told.items()}
    with _replacing(path) as file:
        file.write(_encoded(words, shape))
        words[HASH] = _write_rows(file, batches, shape)
        file.seek(0)
        file.write(_encoded(words, shape))  # of the same length
        file.flush()
        os.fsync(file.fileno())


def check_place(path: Path) -> None:
    """Raise DataError unless a file can have this path: a name in a folder that is there."""
    if path.is_dir() or not path.parent.is_dir():
        raise DataError(f"got {path} to write features to, expected a file in a folder that is there; name another")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file beside a path, which takes its place at the end, or is removed after an error.

    What commands left that were killed is removed as well; those at work hold a lock, where the file system knows any.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.{8 * '[0-9a-f]'}"):
        with contextlib.suppress(OSError), left.open("rb") as old:
            fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with part.open("wb") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _encoded(words: Mapping[str, str], shape: tuple[int, int, int]) -> bytes:
    size = 2 * shape[0] * shape[1] * shape[2]
    entry = {"dtype": "F16", "shape": list(shape), "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": dict(words), "features": entry}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_rows(file: Any, batches: Iterable[Tensor], shape: tuple[int, int, int]) -> str:
    """Write rows; return their hash."""
    written, found = 0, hashlib.new(HASH)
    for batch in batches:
        rows = batch.half().cpu()
        if not bool(rows.isfinite().all()):
            raise DataError(
                f"got features of samples from {written} on that float16 cannot hold; compute them in training"
            )
        if tuple(rows.shape[1:]) != shape[1:]:
            raise DataError(f"got features {tuple(rows.shape)}, expected (n, {shape[1]}, {shape[2]})")
        content = rows.contiguous().numpy().tobytes()
        found.update(content)
        file.write(content)
        written += len(rows)
    if written != shape[0]:
        raise DataError(f"got features of {written} samples, expected {shape[0]}")
    return found.hexdigest()
