"""What samples are compared with, by name or place; and the command that makes files of statistics of images.

``python -m pathline.metrics.reference DATA OUTPUT [entry=value …] [--features inception] [--weights PATH] [--adm]``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm.auto import tqdm

import pathline
from pathline import data
from pathline.core.draws import Draws
from pathline.core.errors import DataError, InputError, PathlineError
from pathline.data import Dataset
from pathline.metrics import features as spaces
from pathline.metrics.evaluation import component
from pathline.metrics.features import Features, as_levels
from pathline.metrics.real import Real, Reference
from pathline.metrics.samples import Samples
from pathline.metrics.sets import KEPT, ImageReference, collect
from pathline.metrics.stored import ADM, AdmReference, StatisticsReference, names_in, write_adm, write_statistics

__all__ = ["Reference", "find", "images_of", "main"]


def find(source: str | Path | Mapping[str, Any]) -> Reference:
    """Return a reference.

    Args:
        source: a data set, by name or as ``{"name": …, **options}``: the two halves of one that has ``train`` and
            ``held-out``, unless a split is named, or all images of another. Or a path: of an ADM reference ``.npz``
            (with ``mu``), of a file of statistics (``.safetensors``), of an ``.npz`` of images, of a folder of images
            of one size, or of a folder that ``pathline.data.prepare`` filled with pixels.

    Raises:
        DataError: nothing of that name, or nothing that can be compared with.
    """
    if isinstance(source, Mapping) or str(source) in data.names():
        return _of_data({"name": source} if not isinstance(source, Mapping) else source)
    path = Path(source).expanduser()
    if path.is_dir():
        prepared = (path / "manifest.json").is_file()
        return _of_data({"name": "prepared", "path": str(path)}) if prepared else _of_images(path)
    if not path.is_file():
        raise DataError(
            f"got {source} as a reference, which is neither a data set ({', '.join(data.names())}) nor a file or "
            "folder that is there"
        )
    if path.suffix == ".safetensors":
        return StatisticsReference(path)
    return AdmReference(path) if names_in(path).issuperset(ADM["features"]) else _of_images(path)


def _of_data(named: Mapping[str, Any]) -> Reference:
    options = data.registry.entry(str(named.get("name"))).options()
    halves = options["split"].default if "split" in options else None
    if halves == "train" and "split" not in named:
        return Real.of(named)
    return ImageReference.of_data(data.build(named))


def _of_images(path: Path) -> Reference:
    return ImageReference.of_samples(Samples.of(path))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, or 2 for a wrong input."""
    parser = argparse.ArgumentParser(
        prog="pathline.metrics.reference", description="Write statistics of images in a feature space, once."
    )
    parser.add_argument("data", help="data set by name, .npz of images, or folder")
    parser.add_argument("output", type=Path, help="file to write: .safetensors, or .npz with --adm")
    parser.add_argument("entries", nargs="*", metavar="entry=value", help="options of a data set, as path=…")
    parser.add_argument("--features", default="inception", help="feature space, or a model of timm")
    parser.add_argument("--weights", help="file of its weights")
    parser.add_argument("--unverified", action="store_true", help="take Inception's weights whatever their hash")
    parser.add_argument("--kept", type=int, default=KEPT, help="images whose features, or with --adm pixels, are kept")
    parser.add_argument("--adm", action="store_true", help="write an .npz as ADM's evaluator reads it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_intermixed_args(arguments)
    try:
        _write(given)
    except (PathlineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.output}, {given.output.stat().st_size / 2**20:,.1f} MiB")
    return 0


def _write(given: argparse.Namespace) -> None:
    suffix = ".npz" if given.adm else ".safetensors"
    if given.output.suffix != suffix or not given.output.absolute().parent.is_dir() or given.kept < 1:
        raise InputError(
            f"got {given.output} and --kept {given.kept}, expected a file {suffix} in a folder that is there, and 1 or "
            "more images"
        )
    source = images_of(given.data, _options(given.entries))
    features = _space(given, source)
    features.to(torch.device(given.device))
    seen = tqdm(total=source.count, desc="reference", unit="image")
    with seen:
        collected = collect(features, _watched(source.batches(), seen), source.count, given.kept)
    if given.adm:
        write_adm(given.output, collected, _kept(source, given.kept))
        return
    told = {
        **source.manifest,
        "count": source.count,
        "shape": list(source.shape or ()),
        "version": pathline.__version__,
    }
    write_statistics(given.output, collected, features, told)


def _watched(batches: Iterator[Tensor], bar: tqdm[Any]) -> Iterator[Tensor]:
    for images in batches:
        yield images
        bar.update(len(images))


def _options(entries: Sequence[str]) -> dict[str, Any]:
    found = {}
    for entry in entries:
        key, sign, value = entry.partition("=")
        if not sign or not key:
            raise InputError(f"got {entry!r}, expected entry=value, as path=/data/images")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"got {entry!r}, whose value is no YAML: {error}") from error
    return found


def images_of(
    source: Dataset | str | Path | Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> ImageReference:
    """Return the images of a data set, or of what ``find`` knows; of two halves the first, unless a split is named.

    Args:
        source: a data set, its name or ``{"name": …, **options}``, or a path.
        options: of a data set by name.

    Raises:
        DataError: nothing of that name, or data without images.
        InputError: no images.
    """
    if isinstance(source, Path) or (isinstance(source, str) and source not in data.names()):
        found = find(source)
        if options or not isinstance(found, ImageReference):
            raise InputError(
                f"got {source} with {', '.join(options or ()) or 'statistics'}, expected images: a data set by name "
                "with its options, an .npz of images, or a folder of them"
            )
        return found
    named = {"name": source, **options} if options and isinstance(source, str) else source
    return ImageReference.of_data(data.build(named))


def _space(given: argparse.Namespace, source: ImageReference) -> Features:
    named = component(f"fid:{given.features}")["features"]
    options = spaces.registry.entry(named["name"]).options()
    added: dict[str, Any] = {"weights": given.weights} if given.weights else {}
    if given.unverified:
        added["unverified"] = True
    if "training" in options:
        of_data = given.data in data.names()
        added["training"] = {"name": given.data, **_options(given.entries)} if of_data else source
    return spaces.registry.build({**named, **added})


def _kept(source: ImageReference, kept: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the images whose features are kept, (K, H, W, 3) in the order of the set."""
    chosen = np.zeros(source.count, bool)
    chosen[Draws(0).permutation("reference vectors", source.count)[:kept]] = True
    parts, first = [], 0
    for images in source.batches():
        rows = torch.from_numpy(chosen[first : first + len(images)])
        parts.append(as_levels(images[rows]).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
        first += len(images)
    return np.concatenate(parts)


if __name__ == "__main__":
    sys.exit(main())
