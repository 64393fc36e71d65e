"""Tar shards of WebDataset, read once from end to end through that library, from disk, a server or a command.

A member's name up to the first dot of its last part is the key of its sample; what follows is its kind.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import tarfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pathline.core.checks import require
from pathline.core.errors import DataError, InputTypeError
from pathline.data.sources.tar import plain_files

__all__ = ["ARRAYS", "IMAGES", "Sample", "expanded", "local", "name_of", "samples"]

IMAGES = ("jpg", "jpeg", "png", "webp")
ARRAYS = ("npy",)
_LABELS = ("cls", "json")
_USED = {*IMAGES, *ARRAYS, *_LABELS}  # others, pickles among them, are never read
_MEMBER = 2**28  # bytes of one member
_PIECE = 2**20  # bytes that are skipped at once
_BEYOND = 2**20  # bytes after a tar's end mark; writers fill up a record of 10 KiB
_SHARDS = 10**6
_PAUSES = (1.0, 4.0)  # seconds before a shard that is not a file is tried again
_RANGE = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})")
_END = bytes(tarfile.BLOCKSIZE)
_PATIENCE = 2.0  # seconds that a command which is no longer read from may take to end
_CUT_OFF = (141, -13, -9)  # exit codes of a command that was ended by that
# exit codes of curl that a user meets
_CURL = {6: "no such host", 7: "no connection", 22: "the server refused it", 28: "no answer in time"}
_FINAL = ("no such host", "the server refused it")  # curl itself tried again where that has a sense


class Sample(NamedTuple):
    """The members of one sample that are used.

    Attributes:
        url: of its shard.
        key: of it.
        members: content by kind, as ``jpg`` and ``cls``; empty where it was not asked for.
    """

    url: str
    key: str
    members: dict[str, bytes]


def expanded(path: str | Sequence[str]) -> tuple[list[str], bool]:
    """Return the URLs of shards: of a folder its ``*.tar``, of a pattern as ``x-{000000..000009}.tar`` what it means.

    Returns:
        URLs, and whether only folders were given, whose shards should then be all that there are.

    Raises:
        DataError: none, too many, or one twice.
        InputTypeError: neither a text nor a list of such.
    """
    given = [path] if isinstance(path, str | Path) else list(path) if isinstance(path, Sequence) else []
    if not given or not all(isinstance(part, str | Path) and str(part) not in ("", "-") for part in given):
        raise InputTypeError(f"got path {path!r}, expected a text, or a list of texts: folders, files or URLs")
    braces = require("braceexpand", "webdataset")
    require("webdataset.tariterators", "webdataset")  # here, and not first by several threads at once
    found: list[str] = []
    whole = True
    for part in map(os.path.expanduser, given):
        folder = local(part)
        if folder is not None and _is_folder(folder):
            found += [str(file) for file in sorted(folder.glob("*.tar")) if not file.name.startswith(".")]
        else:
            whole = False
            spans = [abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(part)]
            if math.prod(spans) > _SHARDS:  # before they are expanded
                raise DataError(f"got {part}, which means {math.prod(spans)} shards; expected {_SHARDS} or fewer")
            found += itertools.islice(braces.braceexpand(part), _SHARDS + 1)
    if not found or len(found) > _SHARDS or len(set(found)) < len(found):
        raise DataError(f"got {len(found)} shards at {path}, of them {len(set(found))} different; expected 1 or more")
    return found, whole


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # as a name that is too long
        raise DataError(f"got {path}, which cannot be looked at: {error}; check data.path") from error


def local(url: str) -> Path | None:
    """Return the path of a file, of ``file:`` too; None of what is read from elsewhere."""
    scheme, colon, _ = url.partition(":")
    if not colon or "/" in scheme:
        return Path(url)
    return Path(url2pathname(urlsplit(url).path)) if scheme == "file" else None


def name_of(url: str) -> str:
    """Return what a shard is called wherever it lies: what follows the last ``/``."""
    file = local(url)
    return url.rpartition("/")[2] if file is None else file.name


def samples(url: str, kinds: Collection[str] = (), *, first: bool = False) -> tuple[list[Sample], int]:
    """Read a shard from end to end; what is no file is tried three times.

    Args:
        url: of it.
        kinds: of members that are read; others are left empty, which is enough to count samples.
        first: whether the first sample is enough, behind which nothing is read or checked.

    Returns:
        Its samples in order, and the bytes read.

    Raises:
        DataError: it cannot be read, is truncated, or holds links, devices, members that are too large or there twice,
            or a sample in two places; names it.
        MissingPackageError: webdataset is not installed.
    """
    pauses = () if local(url) else _PAUSES
    for tried in itertools.count():
        try:
            return _read(url, kinds, first)
        except _Failed as error:
            if tried == len(pauses) or error.final:
                tries = f" in {tried + 1} tries" if tried else ""
                raise DataError(f"got {url}, which cannot be read{tries}: {error}; check data.path") from error
        time.sleep(pauses[tried])
    raise AssertionError("the last try returns or raises")


class _Failed(Exception):
    """A shard that could not be read; ``final`` where another try is in vain."""

    def __init__(self, message: str, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


def _read(url: str, kinds: Collection[str], first: bool) -> tuple[list[Sample], int]:
    stream = _opened(url)
    try:
        found, size = _samples(url, stream, kinds, first)
        if not first:
            stream.close()  # of a command: its exit code is looked at
    except (OSError, tarfile.TarError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise _said(stream, error) from error
    finally:
        _abandon(stream)
    return found, size


def _opened(url: str) -> Any:
    gopen = require("webdataset.gopen", "webdataset")
    try:
        return gopen.gopen(str(local(url) or url), "rb")
    except (OSError, ValueError) as error:  # no such file or command; a scheme that it does not know
        raise _Failed(str(error), final=True) from error


def _abandon(stream: Any) -> int:
    """Close a stream whose command may be cut off by that; return the exit code of the command, 0 of a file."""
    process = getattr(stream, "proc", None)
    if process is None:
        stream.close()
        return 0
    stream.stream.close()
    try:
        return int(process.wait(_PATIENCE))
    except subprocess.TimeoutExpired:
        process.kill()
        return int(process.wait())


def _said(stream: Any, error: Exception) -> _Failed:
    """Return what went wrong; of a command that failed its exit code, which comes first."""
    code = _abandon(stream)
    if code in (0, *_CUT_OFF):
        return _Failed(str(error))
    words = _CURL.get(code, "") if "curl" in str(getattr(stream, "args", "")) else ""
    return _Failed(f"its command ended with exit code {code}{words and f', {words}'}", final=words in _FINAL)


def _samples(url: str, stream: Any, kinds: Collection[str], first: bool) -> tuple[list[Sample], int]:
    forward = _Forward(stream)
    grouped = require("webdataset.tariterators", "webdataset").group_by_keys(_members(url, forward, kinds))
    found = [
        Sample(url, group["__key__"], {kind: group[kind] for kind in group if kind in _USED})
        for group in itertools.islice(grouped, 1 if first else None)
    ]
    if not first and forward.skip(_BEYOND) == _BEYOND:
        raise tarfile.ReadError(f"it goes on after the end of its tar for {_BEYOND} bytes or more")
    return found, forward.position


def _members(url: str, forward: _Forward, kinds: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield the members of a tar that are used, as ``group_by_keys`` takes them."""
    split = require("webdataset.tariterators", "webdataset").base_plus_ext
    keys: dict[str, set[str]] = {}
    archive = tarfile.open(fileobj=cast("IO[bytes]", forward), mode="r:")
    for member in plain_files(archive, url):
        key, ending = split(member.name)
        kind = (ending or "").lower()
        if kind not in _USED:
            continue
        if not 0 <= member.size <= _MEMBER:
            raise DataError(f"got {member.name} of {member.size} bytes in {url}, expected {_MEMBER} or less")
        if key in keys and next(reversed(keys)) != key:
            raise DataError(f"got the sample {key} in two places of {url}, expected its members side by side")
        if kind in keys.setdefault(key, set()):
            raise DataError(f"got {member.name} twice in {url}, expected it once")
        keys[key].add(kind)
        forward.seek(member.offset_data)
        content = forward.read(member.size) if kind in kinds else b""
        if kind in kinds and len(content) < member.size:
            raise tarfile.ReadError(f"it ends within {member.name}")
        yield {"fname": member.name, "data": content, "__url__": url}
    if forward.last != _END:
        raise tarfile.ReadError("it ends without the end mark of a tar, or has a damaged header")


class _Forward:
    """A stream as tarfile reads it, forward alone: no header can make it read more than a member's limit at once.

    Attributes:
        position: bytes read.
        last: what was read last, if it was as long as a header.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self.position, self.last = stream, 0, b""

    def read(self, size: int) -> bytes:
        """Return the next bytes, fewer at the end."""
        if not 0 <= size <= _MEMBER:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        parts = []
        while size > 0 and (part := self._stream.read(min(size, _PIECE))):
            parts.append(part)
            size -= len(part)
            self.position += len(part)
        content = b"".join(parts)
        self.last = content if len(content) == len(_END) else b""
        return content

    def skip(self, size: int) -> int:
        """Read bytes without keeping them; return how many there were."""
        start = self.position
        while (left := start + size - self.position) > 0 and self.read(min(left, _PIECE)):
            pass
        return self.position - start

    def seek(self, position: int) -> None:
        """Go on to a position."""
        if position < self.position:
            raise tarfile.ReadError("a header points back")
        self.skip(position - self.position)

    def tell(self) -> int:
        """Return the position."""
        return self.position
