"""CIFAR-10 and CIFAR-100 in their binary version: records of labels and planes of colour.

A record is one label, or for CIFAR-100 a coarse and a fine one, then 32 × 32 bytes each of red, green and blue.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathline.core.errors import DataError, InputError
from pathline.data.sources.arrays import ArraySource
from pathline.data.sources.base import registry
from pathline.data.sources.files import as_path, read_file, read_part
from pathline.data.sources.keys import Labels, check_member
from pathline.data.sources.tar import DAMAGED, Header

__all__ = ["Cifar"]

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_ARCHIVE_BYTES = 2**28  # of an unpacked archive, which takes 1.8e8
_NAMES_BYTES = 2**16  # of a file of names, which takes 1e3


class _Layout(NamedTuple):
    """Where a set has its files, and what is in them.

    Attributes:
        files: of each split.
        classes: number and file of names of each kind of labels, in the order of a record's labels.
    """

    files: dict[str, tuple[str, ...]]
    classes: dict[str, tuple[int, str]]


_CIFAR_10 = _Layout(
    {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)},
    {"fine": (10, "batches.meta.txt")},
)
_CIFAR_100 = _Layout(
    {"train": ("train.bin",), "test": ("test.bin",)},
    {"coarse": (20, "coarse_label_names.txt"), "fine": (100, "fine_label_names.txt")},
)
_LAYOUTS = (_CIFAR_10, _CIFAR_100)


@registry.register("cifar")
class Cifar(ArraySource):
    """CIFAR-10 or CIFAR-100, binary version, which of the two told by the names of its files.

    The Python version is none: it consists of pickles.

    Args:
        path: the folder of the ``.bin`` files, or the archive as it is published, ``cifar-10-binary.tar.gz``.
        split: which half.
        labels: of CIFAR-100, its 100 classes or its 20 kinds of them; CIFAR-10 has the first alone.

    Raises:
        DataError: files that are missing, truncated, or have labels that do not exist.
        InputError: another split or kind of labels.
    """

    kind: ClassVar[str] = "cifar"

    def __init__(
        self, path: str, *, split: Literal["train", "test"] = "train", labels: Literal["fine", "coarse"] = "fine"
    ) -> None:
        if split not in ("train", "test") or labels not in ("fine", "coarse"):
            raise InputError(
                f"got split {split!r} and labels {labels!r}, expected 'train' or 'test', and 'fine' or 'coarse'"
            )
        place = as_path(path)
        held = _in_folder(place, split) if place.is_dir() else _in_archive(place, split)
        layout = next((known for known in _LAYOUTS if known.files[split][0] in held), None)
        if layout is None:
            raise DataError(
                f"got no data_batch_1.bin, train.bin or the like for split {split} in {place}, expected the files of "
                "CIFAR-10 or CIFAR-100 in their binary version"
            )
        if labels not in layout.classes:
            raise InputError(f"got labels {labels!r} for CIFAR-10 in {place}, expected 'fine': it has no others")
        parts = {name: _records(name, held, len(layout.classes), place) for name in layout.files[split]}
        records = np.concatenate(list(parts.values()))
        keys = [f"{name.removesuffix('.bin')}/{row:05d}" for name, part in parts.items() for row in range(len(part))]
        files = [(name, len(held[name])) for name in parts]
        super().__init__(place, keys, _labels(records, layout, labels, held, place), files)
        self._images = records[:, len(layout.classes) :].reshape(-1, 3, _SIDE, _SIDE)

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """Return an image, (32, 32, 3)."""
        return np.ascontiguousarray(self._images[index].transpose(1, 2, 0))


def _wanted(split: str) -> set[str]:
    """Return the names of the files that a split may need."""
    return {
        name for layout in _LAYOUTS for name in (*layout.files[split], *(names for _, names in layout.classes.values()))
    }


def _in_folder(folder: Path, split: str) -> dict[str, bytes]:
    return {name: read_file(folder / name) for name in sorted(_wanted(split)) if (folder / name).is_file()}


def _in_archive(path: Path, split: str) -> dict[str, bytes]:
    """Return the wanted files of an archive, wherever in it they lie.

    Raises:
        DataError: no tar archive, or one that is damaged, larger than any of these sets, or has links in it.
    """
    wanted, found = _wanted(split), {}
    try:
        mode: Literal["r:gz", "r:"] = "r:gz" if read_part(path, 0, 2, str(path)) == b"\x1f\x8b" else "r:"
        with tarfile.open(path, mode, tarinfo=Header) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # kept, those of a small file can take gigabytes
                check_member(member.name, str(path))
                plain = (member.isreg() or member.isdir()) and not member.issparse()
                if not plain or not member.offset_data <= member.offset_data + member.size <= _ARCHIVE_BYTES:
                    raise DataError(
                        f"got the member {member.name} of {path} of {member.size} bytes, expected plain files, "
                        f"{_ARCHIVE_BYTES} bytes in all; this is no archive of CIFAR"
                    )
                name = member.name.rpartition("/")[2]
                content = archive.extractfile(member) if name in wanted else None
                if content is not None:
                    found[name] = content.read()
    except (*DAMAGED, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"got {path}, which is no whole archive: {error}; copy it again") from error
    return found


def _records(name: str, held: Mapping[str, bytes], labels: int, place: Path) -> NDArray[np.uint8]:
    """Return the records of a file, (n, labels + 3072)."""
    content, size = held.get(name, b""), labels + _PIXELS
    if not content or len(content) % size:
        raise DataError(
            f"got {name} of {len(content)} bytes in {place}, expected records of {size} bytes each; it is missing or "
            "truncated: copy it again"
        )
    return np.frombuffer(content, np.uint8).reshape(-1, size)


def _labels(records: NDArray[np.uint8], layout: _Layout, kind: str, held: Mapping[str, bytes], place: Path) -> Labels:
    count, file = layout.classes[kind]
    labels = records[:, list(layout.classes).index(kind)]
    if labels.max() >= count:
        raise DataError(f"got a label {labels.max()} in {place}, expected 0 to {count - 1}; copy the files again")
    names = held.get(file, b"")[:_NAMES_BYTES].decode(errors="replace").split()
    return Labels(labels.tolist(), names if len(names) == count else [str(number) for number in range(count)])
