"""Data sets of Hugging Face: a folder that the library ``datasets`` saved, or one of the hub by its name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pathline.core.checks import require
from pathline.core.errors import DataError, suggest
from pathline.data.sources.arrays import row_keys
from pathline.data.sources.base import check_options, registry
from pathline.data.sources.encoded import EncodedSource
from pathline.data.sources.files import as_path, read_file
from pathline.data.sources.keys import Labels, numbered

__all__ = ["HuggingFace"]

_SAVED = ("dataset_info.json", "dataset_dict.json")
_LABELS = ("label", "labels", "class", "fine_label")  # names of columns of numbers that are classes


@registry.register("huggingface")
class HuggingFace(EncodedSource):
    """A data set with a column of images, and one of classes if there is one; both are found by their types.

    Args:
        path: a folder that ``save_to_disk`` wrote, or a name of the hub, as ``uoft-cs/cifar10``.
        split: which part of it.
        options: further arguments of ``datasets.load_dataset``, as ``{name: …, revision: …}``; none for a folder.
        exif: whether the orientation that a camera noted is applied.

    Raises:
        DataError: no such folder, name or split, a network that is shut, or not exactly one column of images.
        InputTypeError: an option of another type.
        MissingPackageError: ``datasets`` is not installed.
    """

    kind: ClassVar[str] = "huggingface"

    def __init__(
        self, path: str, *, split: str = "train", options: Mapping[str, Any] | None = None, exif: bool = False
    ) -> None:
        check_options(bool, exif=exif)
        check_options(str, path=str(path) if isinstance(path, Path) else path, split=split)
        check_options(Mapping, options={} if options is None else options)
        given = dict(options or {})
        found = _saved(as_path(path), split, given) if _is_folder(path) else _from_hub(str(path), split, given)
        self.column = _column_of_images(found.features, path)
        labels = _labels(found, path)
        keys = row_keys(len(found))
        if not keys:
            raise DataError(f"got no images in split {split} of {path}; name another split")
        datasets = require("datasets", "datasets")
        self._rows: Any = found.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))
        self._told = {"split": split, "options": given}
        super().__init__(Path(path), keys, labels, exif=exif)

    def content(self, index: int) -> bytes:
        """Return an image's bytes, of the table itself or of the file that it names."""
        stored: Mapping[str, Any] = self._rows[index][self.column] or {}
        if stored.get("bytes") is not None:
            return bytes(stored["bytes"])
        if not stored.get("path"):
            raise DataError(f"got {self.name(index)} without an image; leave it out")
        return read_file(Path(stored["path"]))

    def name(self, index: int) -> str:
        """Return what an image is called in errors."""
        return f"row {index} of {self.path}"

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What other sources of image files tell, the split and options of loading."""
        return {**super().manifest, **self._told}


def _is_folder(path: str | Path) -> bool:
    """Whether a path means a folder, and not a name of the hub, which has one slash at most."""
    text = str(path)
    return os.path.exists(os.path.expanduser(text)) or text.startswith((".", "/", "~")) or text.count("/") > 1


def _saved(folder: Path, split: str, options: Mapping[str, Any]) -> Any:
    """Return a split of what ``save_to_disk`` wrote, a set or several by their splits."""
    datasets = require("datasets", "datasets")
    if options or not any((folder / name).is_file() for name in _SAVED):
        raise DataError(
            f"got {folder} and the options {dict(options)}, expected a folder that save_to_disk wrote, which takes "
            "none; for a folder of images name the source folder"
        )
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged folder raises nearly anything
        raise DataError(f"got {folder}, which cannot be loaded: {error!r}; save the data set again") from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split not in found:
        raise DataError(f"got split {split!r} of {folder}; {suggest(split, found)}")
    return found[split]


def _from_hub(name: str, split: str, options: Mapping[str, Any]) -> Any:
    datasets = require("datasets", "datasets")
    try:
        return datasets.load_dataset(name, split=split, **options)
    except Exception as error:  # of the network, the hub, a name, a split, an option
        raise DataError(
            f"got no data set {name!r} with split {split!r} and options {dict(options)}: {error}; check the name and "
            "the network, or give a folder that save_to_disk wrote"
        ) from error


def _column_of_images(features: Mapping[str, Any], path: str) -> str:
    columns = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    if len(columns) != 1:
        raise DataError(
            f"got the columns {dict(features)} in {path}, {len(columns)} of images, expected one; keep it and the "
            "labels alone by select_columns, and save the data set"
        )
    return columns[0]


def _labels(rows: Any, path: str) -> Labels:
    """Return the one column of classes, or else a column of whole numbers that is called like one; or none."""
    features: Mapping[str, Any] = rows.features
    classes = [name for name, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    if len(classes) > 1 and not set(classes) & set(_LABELS):
        raise DataError(f"got the columns of classes {classes} in {path}, expected one; drop the others")
    numbers = [name for name in _LABELS if "int" in str(getattr(features.get(name), "dtype", ""))]
    column = classes[0] if len(classes) == 1 else next(iter(numbers), None)
    if column is None:
        return Labels(None, [])
    values = [-1 if value is None else int(value) for value in rows[column][:]]
    labels, names = numbered(values, f"the column {column} of {path}")
    told = getattr(features[column], "names", None) or []
    return Labels(labels, list(told) if len(told) >= len(names) else names)
