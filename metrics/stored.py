"""References that are files of statistics: pathline's own, and those of ADM's evaluator.

N images, K whose features are kept, D features.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pathline.core.checks import check_finite
from pathline.core.errors import DataError, InputError
from pathline.data.layouts.arrays import read_array
from pathline.encoders.networks import hash_of_file
from pathline.metrics.features import Features
from pathline.metrics.frechet import check_covariance
from pathline.metrics.moments import Moments, Statistics
from pathline.metrics.real import Reference
from pathline.metrics.samples import Samples
from pathline.metrics.sets import Collected, ImageReference

__all__ = ["ADM", "AdmReference", "StatisticsReference", "names_in", "write_adm", "write_statistics"]

FORMAT = "pathline statistics 1"
ADM = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # output -> names of mean and covariance
_SIZES = {"features": 2048, "spatial": 2023}
_HEADER = 4096  # bytes that the header of an array takes at most
_LARGEST = 2**16  # features of a space


class StatisticsReference(Reference):
    """A file that ``python -m pathline.metrics.reference`` wrote: moments and features of one space, with a manifest.

    Args:
        path: of the file.

    Raises:
        DataError: no such file, or one that is damaged, forged or of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        told = _told(path)
        self.features: Mapping[str, Any] = told["features"]
        self.manifest = {**told["data"], "kind": "statistics", "file": path.name, "tensors_sha256": _sha256(path)}
        shape = told["data"].get("shape")
        if shape is not None and not (isinstance(shape, list) and len(shape) == 3):
            raise DataError(f"got {path} with images of shape {shape}, expected [C, H, W]; write it anew")
        self.shape = None if shape is None else (int(shape[0]), int(shape[1]), int(shape[2]))

    def prepare(self, features: Features, output: str, vectors: int = 0) -> None:
        """See ``Reference``."""
        if not vectors:
            self.statistics(features, output)
        elif len(self.vectors(features, output)) < vectors:
            raise DataError(f"got {self.path} with fewer than {vectors} vectors; write it with more by --kept")

    def statistics(self, features: Features, output: str) -> Statistics:
        """See ``Reference``."""
        self._match(features)
        found, size = Moments(), features.sizes[output]
        state = {key: self._tensor(f"{output}.{key}") for key in ("count", "mean", "scatter")}
        if state["count"].shape != () or state["mean"].shape != (size,) or state["scatter"].shape != (size, size):
            shapes = {key: tuple(value.shape) for key, value in state.items()}
            raise DataError(f"got {output} of shapes {shapes} in {self.path}, expected {size} features; write it anew")
        _check(self.path, output, state["mean"], state["scatter"])
        found.load({**state, "mean": state["mean"].double(), "scatter": state["scatter"].double()})
        return found.statistics

    def vectors(self, features: Features, output: str, count: int | None = None) -> Tensor:
        """See ``Reference``."""
        self._match(features)
        vectors = self._tensor("vectors")
        if output != "features" or vectors.ndim != 2 or vectors.shape[1] != features.sizes[output]:
            raise DataError(
                f"got {self.path} with vectors {tuple(vectors.shape)} of the output features, expected those of "
                f"{output}, (K, {features.sizes[output]}); write it anew"
            )
        _check(self.path, "vectors", vectors)
        return vectors[:count]

    def _match(self, features: Features) -> None:
        """Raise DataError unless the statistics are of this feature space and of these weights."""
        known, asked = (_flat(json.loads(json.dumps(dict(told)))) for told in (self.features, features.manifest))
        keys = sorted(known.keys() | asked.keys())
        wrong = {key: (known.get(key), asked.get(key)) for key in keys if known.get(key) != asked.get(key)}
        if wrong:
            said = "; ".join(f"{key} {told!r}, expected {wanted!r}" for key, (told, wanted) in wrong.items())
            raise DataError(
                f"got {self.path} with statistics of another feature space than {features.name}: {said}; write them "
                "with this one"
            )

    def _tensor(self, key: str) -> Tensor:
        try:
            with safe_open(self.path, "pt") as file:
                tensor: Tensor = file.get_tensor(key)
                return tensor
        except (SafetensorError, OSError) as error:
            raise DataError(f"got {self.path} without {key}, or damaged ({error}); write it anew") from error


def _flat(told: Mapping[str, Any], head: str = "") -> dict[str, Any]:
    """Return a table of tables as one, whose keys are joined by dots."""
    found: dict[str, Any] = {}
    for key, value in told.items():
        found |= _flat(value, f"{head}{key}.") if isinstance(value, dict) else {f"{head}{key}": value}
    return found


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file's tensors, without the header, whose words come in any order."""
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


def _told(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:  # which checks the header against the size of the file
            words = file.metadata() or {}
        told = json.loads(words.get("manifest", "null"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise DataError(f"got {path}, which is no safetensors file ({error}); write the statistics anew") from error
    if words.get("format") != FORMAT or not isinstance(told, dict):
        raise DataError(
            f"got {path}, which holds no statistics of format {FORMAT!r}; write them by python -m "
            "pathline.metrics.reference"
        )
    if not all(isinstance(told.get(key), dict) for key in ("features", "data")):
        raise DataError(f"got {path} with a manifest of {sorted(told)}, expected data and features; write it anew")
    return told


def write_statistics(path: Path, collected: Collected, features: Features, data: Mapping[str, Any]) -> None:
    """Write statistics, which appear whole or not at all.

    Args:
        path: of the file; one that is there is replaced.
        collected: what the space makes of the images.
        features: the space.
        data: manifest of the images, with their number and shape.
    """
    tensors = {f"{output}.{key}": v for output, m in collected.moments.items() for key, v in m.state().items()}
    told = {"features": dict(features.manifest), "data": dict(data)}
    part = path.with_name(f".{path.name}.part")
    try:
        words = {"format": FORMAT, "manifest": json.dumps(told)}
        save_file({**tensors, "vectors": collected.vectors.contiguous()}, part, words)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class AdmReference(Reference):
    """A reference ``.npz`` of ADM's evaluator: moments of a whole training set, and 10,000 of its images.

    ``mu``, ``sigma`` are Inception's pooled features, ``mu_s``, ``sigma_s`` the 2023 of sFID; statistics come from
    these alone. ``arr_0``, where it is there, gives the images for precision and recall. How many images the moments
    are of, no such file tells.

    Args:
        path: of the file.

    Raises:
        DataError: no such file, or one that is damaged, forged, of objects, or of another feature size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        names = names_in(path)
        self.held = {output: pair for output, pair in ADM.items() if names.issuperset(pair)}
        self.images = ImageReference.of_samples(Samples.of(path)) if "arr_0" in names else None
        self.shape = None if self.images is None else self.images.shape
        self.manifest = {
            "kind": "ADM reference",
            "file": path.name,
            "sha256": hash_of_file(path),
            "statistics": sorted(self.held),
            "images": 0 if self.images is None else self.images.count,
            "shape": None if self.shape is None else list(self.shape),
        }

    def prepare(self, features: Features, output: str, vectors: int = 0) -> None:
        """See ``Reference``."""
        if not vectors:
            self.statistics(features, output)
        else:
            self._images(output).prepare(features, output, vectors)

    def statistics(self, features: Features, output: str) -> Statistics:
        """See ``Reference``."""
        if features.name != "inception" or output not in self.held:
            raise DataError(
                f"got {self.path} with {', '.join(self.held)} of inception, expected {output} of {features.name}; give "
                "images, or statistics that python -m pathline.metrics.reference wrote for it"
            )
        mean, covariance = self.held[output]
        size = features.sizes[output]
        found = [_array(self.path, name, shape) for name, shape in ((mean, (size,)), (covariance, (size, size)))]
        _check(self.path, output, *found)
        return Statistics(found[0].double(), found[1].double(), None)

    def vectors(self, features: Features, output: str, count: int | None = None) -> Tensor:
        """See ``Reference``; of ``arr_0``."""
        return self._images(output).vectors(features, output, count)

    def _images(self, output: str) -> ImageReference:
        if self.images is None:
            raise DataError(f"got {self.path} without images arr_0, expected them for {output}; give images")
        return self.images

    def doubts(self, features: Features) -> tuple[str, ...]:
        """See ``Reference``: the statistics are of the published weights."""
        if features.manifest.get("verified", True):
            return ()
        return (f"{self.path.name} is of Inception's published weights, the samples' features of others",)


def write_adm(path: Path, collected: Collected, images: NDArray[np.uint8] | None) -> None:
    """Write a reference as ADM's evaluator reads it.

    Args:
        path: of the file; one that is there is replaced.
        collected: what Inception makes of the whole set.
        images: (K, H, W, 3) for precision and recall; None for none.

    Raises:
        InputError: a space without the outputs of Inception.
    """
    if any(output not in collected.moments or len(collected.moments[output].mean) != _SIZES[output] for output in ADM):
        raise InputError(f"got outputs {', '.join(collected.moments)}, expected those of inception; use that space")
    arrays = {} if images is None else {"arr_0": images}
    for output, (mean, covariance) in ADM.items():
        moments = collected.moments[output]
        arrays |= {mean: moments.mean.cpu().numpy(), covariance: moments.covariance.cpu().numpy()}
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def names_in(path: Path) -> set[str]:
    """Return the names of the arrays in an ``.npz``; raises DataError for what is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"got {path}, which is no .npz of plain arrays: {error}") from error


def _array(path: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """Read an array of known shape out of an archive, its size checked before anything is read."""
    needed = int(np.prod(shape))
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
            if info.file_size > needed * 8 + _HEADER:
                raise DataError(
                    f"got {name} of {info.file_size} bytes in {path}, expected {shape} floats; it is of another "
                    "feature space, or forged"
                )
            content = archive.read(info)
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"got {path}, whose {name} cannot be read: {error}") from error
    array = read_array(content, f"{name} of {path}", ("<f4", "<f8"))
    if array.shape != shape:
        raise DataError(
            f"got {name} of shape {array.shape} in {path}, expected {shape}; it is of another feature space"
        )
    return torch.from_numpy(np.array(array))


def _check(path: Path, name: str, values: Tensor, covariance: Tensor | None = None) -> None:
    """Raise DataError, which names the file, for a NaN or an infinity, or for what is no covariance."""
    try:
        check_finite(values, f"{name} of {path}")
        if covariance is not None:
            check_covariance(covariance, f"{name} of {path}")
    except InputError as error:
        raise DataError(str(error)) from error
