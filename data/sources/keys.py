"""Names of images in a tree of folders, in an archive or on a disk, and the labels that the names or a table give them.

A table is ``dataset.json`` of EDM2's and REPA's tools: ``{"labels": [[path, label], …]}``, or null for no labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from pathline.core.errors import DataError

__all__ = [
    "LABEL_BYTES",
    "TABLE",
    "Labels",
    "check_member",
    "check_repetition",
    "check_table",
    "entries_of",
    "fingerprint",
    "label_in",
    "labels_of",
    "numbered",
    "of_folders",
]

TABLE = "dataset.json"
_SPLITS = {"train", "training", "val", "valid", "validation", "test"}  # parts of a set, and no classes
_MOST_CLASSES = 2**20
LABEL_BYTES = 32  # bytes of a label in a file of its own
_TABLE_BYTES, _ENTRY_BYTES = 2**20, 512  # of a table in any case, and for each image


class Labels(NamedTuple):
    """Labels of images.

    Attributes:
        labels: one an image, 0 … len(class_names) − 1; None for none.
        class_names: in the order of the labels.
    """

    labels: list[int] | None
    class_names: list[str]


def check_member(name: str, archive: str) -> None:
    """Raise DataError if the name of a member is not that of a file below the archive's root."""
    if name.startswith("/") or "\\" in name or "\0" in name or ":" in name[:2] or ".." in name.split("/"):
        raise DataError(
            f"got the member {name!r} of {archive}, expected a name below the archive's root, its parts joined by /; "
            "make the archive anew"
        )


def check_repetition(keys: Sequence[str], where: str) -> None:
    """Raise DataError if one of the sorted keys comes twice."""
    twice = next((first for first, second in pairwise(keys) if first == second), None)
    if twice is not None:
        raise DataError(f"got {twice} twice in {where}, expected names without repetition; rename one")


def check_table(size: int, count: int, where: str) -> None:
    """Raise DataError if a table has more bytes than labels of ``count`` images can take: JSON in memory takes more."""
    most = _TABLE_BYTES + _ENTRY_BYTES * count
    if size > most:
        raise DataError(
            f"got {TABLE} of {where} of {size} bytes, expected {most} or fewer for {count} images; write it anew"
        )


def labels_of(keys: Sequence[str], table: bytes | None, where: str, *, folders: Collection[str] = ()) -> Labels:
    """Return the labels that a table gives, or else the class folders: the sorted names of the topmost folders.

    Images that all lie side by side, without a folder or a table, have no labels.

    Args:
        keys: sorted paths below the root, their parts joined by ``/``.
        table: content of ``dataset.json``; None where there is none.
        where: name of the folder or the archive.
        folders: names of the topmost folders that are known to be there; one without images is refused.

    Raises:
        DataError: no images, some in folders and others beside them, or one folder, or parts as train and val, that
            hold folders; a table that is damaged, or that does not name the same images.
    """
    if not keys:
        raise DataError(f"got no images in {where}, expected some; check the path, and what their names end with")
    if table is None:
        return of_folders(keys, where, folders)
    entries = entries_of(table, keys, where)
    if entries is None:
        return Labels(None, [])
    wrong = [key for key, entry in zip(keys, entries, strict=True) if type(entry) is not int]
    if wrong:
        raise DataError(
            f"got {TABLE} of {where} with a label of {wrong[0]} that is no whole number, expected a list of pairs "
            "[path, whole number]; write a class as its number"
        )
    return numbered(entries, f"{TABLE} of {where}")


def of_folders(keys: Sequence[str], where: str, folders: Collection[str]) -> Labels:
    """Return the numbers of the topmost folders, sorted by name; none for files side by side. As for ``labels_of``."""
    tops = [key.partition("/")[0] if "/" in key else None for key in keys]
    loose = [key for key, top in zip(keys, tops, strict=True) if top is None]
    names = sorted({top for top in tops if top is not None})
    if not names:
        return Labels(None, [])
    if loose:
        raise DataError(
            f"got {loose[0]} in {where} beside the folder {names[0]}, expected all images in class folders, or none; "
            f"sort it in, or add a {TABLE}"
        )
    if len(names) == 1 and any(key.count("/") > 1 for key in keys):
        raise DataError(
            f"got all images of {where} below its one folder {names[0]}, which holds folders, expected class folders; "
            "set path to that folder, or root if it lies in an archive"
        )
    if all(name.lower() in _SPLITS for name in names) and any(key.count("/") > 1 for key in keys):
        raise DataError(
            f"got {where} with the folders {', '.join(names)}, which hold folders, expected class folders; set path to "
            "the one that is meant, or root if they lie in an archive"
        )
    empty = sorted(set(folders) - set(names))
    if empty:
        raise DataError(f"got no image in the folder {empty[0]} of {where}, expected a class; fill it or remove it")
    numbers = {name: number for number, name in enumerate(names)}
    return Labels([numbers[top] for top in tops if top is not None], names)


def numbered(labels: Sequence[int], where: str) -> Labels:
    """Return labels whose classes have numbers for names, 0 up to the highest that occurs.

    Raises:
        DataError: a negative label, or one beyond a million.
    """
    low, high = min(labels), max(labels)
    if low < 0 or high >= _MOST_CLASSES:
        raise DataError(f"got labels from {low} to {high} in {where}, expected 0 to {_MOST_CLASSES - 1}")
    return Labels(list(labels), [str(number) for number in range(high + 1)])


def fingerprint(keys: Sequence[str], labels: Sequence[int] | None) -> str:
    """Return the SHA-256 of keys and labels, in their order."""
    found = hashlib.sha256()
    for number, key in enumerate(keys):
        label = "" if labels is None else labels[number]
        found.update(f"{key}\0{label}\n".encode(errors="surrogateescape"))
    return found.hexdigest()


def entries_of(table: bytes, keys: Sequence[str], where: str) -> list[Any] | None:
    """Return what a table tells of each key, whatever that is; None if it says that there are no labels.

    Raises:
        DataError: it is damaged, tells of a file twice, or not of the same files; names them.
    """
    try:
        told: Any = json.loads(table)
    except (ValueError, RecursionError) as error:
        raise DataError(f"got {TABLE} of {where}, which is not JSON: {error}; write it anew") from error
    if not isinstance(told, dict) or "labels" not in told:
        raise DataError(f'got {TABLE} of {where} without "labels"; write it anew, or remove it')
    pairs = told["labels"]
    if pairs is None:
        return None
    if not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
        raise DataError(f'got {TABLE} of {where}, expected "labels" as a list of pairs [path, whole number]')
    given = {path.replace("\\", "/"): label for path, label in pairs}
    if len(given) != len(pairs):
        check_repetition(sorted(path.replace("\\", "/") for path, _ in pairs), f"{TABLE} of {where}")
    without, extra = sorted(set(keys) - given.keys()), sorted(given.keys() - set(keys))
    if without or extra:
        raise DataError(
            f"got {TABLE} of {where} with {len(pairs)} labels for {len(keys)} files: {len(without)} without a label "
            f"{without[:1]}, {len(extra)} labels without a file {extra[:1]}; make the two agree"
        )
    return [given[key] for key in keys]


def label_in(content: bytes) -> int | None:
    """Return the label that a file ``*.cls`` holds, a whole number in digits; None if it holds anything else."""
    text = content.strip() if len(content) <= LABEL_BYTES else b""
    return int(text) if text.isdigit() else None


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
