"""The kind of a source, told from what lies at a path."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pathline.core.errors import DataError
from pathline.data.decode import is_image
from pathline.data.sources.base import ImageSource, check_options, registry
from pathline.data.sources.files import as_path

__all__ = ["source_of"]

_FOLDERS = {  # files that a folder of the kind has in it; all others are folders of images
    "huggingface": ("dataset_info.json", "dataset_dict.json"),
    "tar": ("*.tar",),
    "idx": ("*images*idx3*",),
    "cifar": ("data_batch_1.bin", "test_batch.bin", "train.bin", "test.bin"),
}
_ENDS = {  # of names, with an optional .gz behind
    "zip": (".zip",),
    "npz": (".npz",),
    "cifar": ("-binary.tar", "-binary.tar.gz"),
    "tar": (".tar",),
}


def source_of(path: str, source: str | Mapping[str, Any] = "auto", **options: Any) -> ImageSource:
    """Build the source of images at a path.

    Args:
        path: of a folder or a file.
        source: its name, or ``{name: …}`` with its options; ``auto`` tells it from what lies at the path.
        options: further options of the source.

    Raises:
        DataError: nothing there, nothing that is known, things of two kinds, or what the source itself refuses.
        InputTypeError: a source that is neither a name nor a mapping, or an option of another type.
        UnknownNameError, UnknownOptionError: no such source, or none with such an option.
    """
    if not isinstance(source, str):
        check_options(Mapping, source=source)
    given = {"name": source} if isinstance(source, str) else dict(source)
    if given.get("name", "auto") == "auto":
        given["name"] = _kind(as_path(path))
    return registry.build({**given, **options, "path": path})


def _kind(path: Path) -> str:
    if path.is_dir():
        return _kind_of_folder(path)
    for kind, ends in _ENDS.items():
        if path.name.lower().endswith(ends):
            return kind
    if "idx3" in path.name:
        return "idx"
    raise DataError(
        f"got {path}, of which no source is known by its name, expected a folder, or a file that ends with "
        f"{', '.join(sorted(end for ends in _ENDS.values() for end in ends))}; name the source: "
        f"{', '.join(registry.names())}"
    )


def _kind_of_folder(path: Path) -> str:
    """Return the kind whose files a folder has in it; raises DataError for those of two kinds."""
    found = {kind: _first(path, patterns) for kind, patterns in _FOLDERS.items()}
    signs = {kind: name for kind, name in found.items() if name is not None}
    image = _an_image(path) if signs else None
    if image is not None:
        signs["folder"] = image
    if len(signs) > 1:
        raise DataError(
            f"got {path} with {' and '.join(f'{name} (source {kind})' for kind, name in signs.items())}, expected "
            f"images of one kind; name the source that is meant: {' or '.join(signs)}"
        )
    return next(iter(signs), "folder")


def _first(folder: Path, patterns: tuple[str, ...]) -> str | None:
    found = (file for pattern in patterns for file in folder.glob(pattern))
    return min((file.name for file in found if file.is_file() and not file.name.startswith(".")), default=None)


def _an_image(root: Path) -> str | None:
    """Return the path of an image below a folder, if there is one."""
    for folder, _, names in os.walk(root):
        for name in names:
            key = (Path(folder) / name).relative_to(root).as_posix()
            if is_image(key):
                return key
    return None
