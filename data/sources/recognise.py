"""The kind of a source, told from what lies at a path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pathline.core.errors import DataError
from pathline.data.sources.base import ImageSource, check_options, registry
from pathline.data.sources.files import as_path

__all__ = ["source_of"]

_FOLDERS = {  # what a folder of the kind has in it; the last kind is that of all others
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
        DataError: nothing there, or nothing that is known, or what the source itself refuses.
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
        found = (kind for kind, patterns in _FOLDERS.items() if any(any(path.glob(pattern)) for pattern in patterns))
        return next(found, "folder")
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
