"""The manifest of a checkpoint: which files there are, of what size and hash. It is written last, and checked first.

``{"format": 2, "step": 3000, "good": true, "groups": ["ema", "model"], "files": {"model.safetensors": {"bytes": 96,
"sha256": "…"}, …}}``; a group is a file ``<group>.safetensors`` or a folder ``<group>/`` of files. Format 1 has neither
``good`` nor ``groups``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pathline.core.errors import CheckpointError

__all__ = [
    "FORMAT",
    "MANIFEST",
    "STATE",
    "SUFFIX",
    "Manifest",
    "check_files",
    "make_folder",
    "parse",
    "problem",
    "read_manifest",
    "sync",
    "write_manifest",
]

FORMAT = 2
MANIFEST, STATE = "manifest.json", "state.json"
SUFFIX = ".safetensors"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
Natural = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Entry(_Strict):
    """Size and hash of a file."""

    bytes: Natural
    sha256: str


class Manifest(_Strict):
    """What a manifest tells.

    Attributes:
        good: no streak of skipped steps was under way.
        groups: names of the groups of tensors.
        files: by path within the checkpoint, with ``/``.
    """

    format: int
    step: Natural
    good: bool
    groups: list[str]
    files: dict[str, Entry]


def write_manifest(folder: Path, step: int, *, good: bool) -> None:
    """Force every file of a folder and below to the disk, hash it, and write the manifest last."""
    rights = stat.S_IMODE((folder / STATE).stat().st_mode)
    files = {}
    for name, path in sorted(_found(folder).items()):
        path.chmod(rights)  # safetensors lets the owner alone read
        sync(path)
        files[name] = Entry(bytes=path.stat().st_size, sha256=_hash(path))
    for path in folder.iterdir():
        if path.is_dir():
            sync(path)
    manifest = Manifest(format=FORMAT, step=step, good=good, groups=sorted(_groups(files)), files=files)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1))
    sync(folder / MANIFEST)
    sync(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint; its files are not looked at.

    Raises:
        CheckpointError: it is missing, no JSON, of an unknown format, or not what a manifest can be; says the reason.
        OSError: it cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise CheckpointError(f"no {MANIFEST}")
    content = parse(path)
    if content.get("format") == 1:
        content = {**content, "good": True, "groups": ["ema", "model", "optim"]}
    elif content.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"format {content['format']!r}, of which versions 1 and {FORMAT} are known")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"a {MANIFEST} that cannot be read: {place}: {first['msg']}") from error
    if len(manifest.groups) != len(set(manifest.groups)) or set(manifest.groups) != _groups(manifest.files):
        raise CheckpointError(f"a {MANIFEST} of groups {manifest.groups} and files {', '.join(manifest.files)}")
    return manifest


def parse(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: it is none, or has a key twice.
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(path.read_text(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"a {path.name} that cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"a {path.name} that cannot be read: no object")
    return content


def check_files(folder: Path, manifest: Manifest, *, hashes: bool) -> None:
    """Raise CheckpointError unless the files are those of the manifest, in size and, if asked, hash; OSError too."""
    found = _found(folder)
    for name, wanted in manifest.files.items():
        if name not in found:
            raise CheckpointError(f"no file {name}")
        size = found[name].stat().st_size
        if size != wanted.bytes:
            raise CheckpointError(f"{name} of {size} bytes, expected {wanted.bytes}")
        if hashes and _hash(found[name]) != wanted.sha256:
            raise CheckpointError(f"{name} with other contents than its hash")
    unknown = sorted(found.keys() - manifest.files.keys() - {MANIFEST})
    if unknown:
        raise CheckpointError(f"{unknown[0]}, which {MANIFEST} does not name")


def problem(folder: Path, *, hashes: bool = True) -> str | None:
    """Say what is wrong with a checkpoint; None if nothing is."""
    try:
        manifest = read_manifest(folder)
        if f"step-{manifest.step:09d}" != folder.resolve().name:
            return f"the manifest of step {manifest.step}"
        check_files(folder, manifest, hashes=hashes)
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} that cannot be read: {error.strerror}"
    return None


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, and force their entries to the disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def _groups(names: Iterable[str]) -> set[str]:
    """Return the groups that files belong to; CheckpointError if a name is none that a checkpoint can have."""
    tops: set[str] = set()
    for name in names:
        top, slash, rest = name.partition("/")
        known = top.endswith(SUFFIX) != bool(slash)  # a group's file, or a file in a group's folder
        if name != STATE and not (known and NAME.fullmatch(top) and (not slash or NAME.fullmatch(rest))):
            raise CheckpointError(f"a {MANIFEST} that names {name!r}")
        tops.add(top)
    groups = {top.removesuffix(SUFFIX) for top in tops - {STATE}}
    if STATE not in tops or not groups or len(groups) < len(tops) - 1:
        raise CheckpointError(f"a {MANIFEST} that names only {', '.join(sorted(tops)) or 'nothing'}")
    return groups


def _found(folder: Path) -> dict[str, Path]:
    """Return the files of a folder and below, by path within it; a link or a device is refused."""
    found = {}
    for root, folders, files in os.walk(folder, onerror=_raise):
        for path in (Path(root, name) for name in (*folders, *files)):
            name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise CheckpointError(f"{name}, which is neither a file nor a folder")
            if stat.S_ISREG(mode):
                found[name] = path
    return found


def _raise(error: OSError) -> None:
    raise error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key that comes twice")
    return entries


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
