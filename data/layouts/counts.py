"""How many samples each shard has: an index beside the shards, in the form of WebDataset's own (``wids``)."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from pathline.core.errors import DataError, InputError
from pathline.data.layouts.shards import Sample, local, name_of, samples
from pathline.data.layouts.stores import few
from pathline.data.layouts.streams import Held

__all__ = ["INDEX", "Count", "counted"]

INDEX = "shardindex.json"
_KIND = "wids-shard-index-v1"
_BYTES_A_SHARD = 4096  # of the index
_AHEAD = 8  # shards that the first pass has begun or may begin


class Count(NamedTuple):
    """What the index tells of a shard.

    Attributes:
        samples: in it.
        size: its bytes; None where an index of other making does not tell.
    """

    samples: int
    size: int | None


def counted(
    urls: Sequence[str], index: str | None, *, whole: bool, check: Callable[[Sample], None]
) -> tuple[list[Count], Path]:
    """Return the counts of shards from their index, which is made by a pass over them all where there is none.

    Of several processes one makes it, and the others wait for that.

    Args:
        urls: of the shards.
        index: path of the index; None is ``shardindex.json`` beside shards that lie in one folder.
        whole: whether the index may tell of no other shards.
        check: raises DataError for a sample, without its contents, that is none; called where the index is made.

    Returns:
        A count a shard, and the path of the index.

    Raises:
        DataError: an index that is none, lacks a shard or tells of one that is not there, or of another size than a
            file has; a shard that cannot be read; an index that cannot be written.
        InputError: no path of an index for shards that are not in one folder.
    """
    path = Path(index).expanduser() if index is not None else _beside(urls)
    if not path.is_file():
        if not os.access(path.parent, os.W_OK):
            raise DataError(f"got no index {path}, which cannot be written either; set index to the path of a file")
        with _alone(path):
            if not path.is_file():  # it is there if another process has made it meanwhile
                _make(path, urls, check)
    found = _read(path, urls, whole)
    for url, count in zip(urls, found, strict=True):
        file = local(url)
        if file is not None and count.size is not None and count.size != _size(file):
            raise DataError(
                f"got {file} of {_size(file)} bytes, of which {path} tells {count.size}; delete the index to make it "
                "anew, if the shard is meant to have changed"
            )
    return found, path


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process makes an index. The lock ends with its process, however that ends."""
    lock = path.with_name(f".{path.name}.lock")
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with suppress(OSError):  # on a file system without locks each process makes it
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"got {file}, which cannot be read: {error}; check data.path") from error


def _beside(urls: Sequence[str]) -> Path:
    folders = {None if (file := local(url)) is None else file.parent for url in urls}
    folder = next(iter(folders))
    if len(folders) > 1 or folder is None:
        raise InputError("got shards that do not lie in one folder, and no index; set index to the path of a file")
    return folder / INDEX


def _read(path: Path, urls: Sequence[str], whole: bool) -> list[Count]:
    if path.stat().st_size > _BYTES_A_SHARD * (len(urls) + 1000):  # it may tell of more shards than are read
        raise DataError(f"got {path} of {path.stat().st_size} bytes for {len(urls)} shards; it is no index of them")
    try:
        told = json.loads(path.read_bytes())
        entries = {str(entry["url"]): _count(entry) for entry in told["shardlist"]}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"got {path}, which is no index of shards ({error!r}); delete it to make it anew") from error
    names = Counter(map(name_of, entries))
    moved = {name_of(url): url for url in entries if names[name_of(url)] == 1}  # with their index or without
    told_as = [url if url in entries else moved.get(name_of(url)) for url in urls]
    missing = [url for url, other in zip(urls, told_as, strict=True) if other is None]
    if missing:
        raise DataError(f"got {path} without the shards {few(missing)}; delete it to make it anew")
    gone = entries.keys() - set(told_as) if whole else ()
    if gone:
        raise DataError(
            f"got {path}, which tells of {few(map(name_of, gone))}, not there; copy what is missing, or delete the "
            "index to make it anew, if it is meant to be gone"
        )
    return [entries[url] for url in told_as if url is not None]


def _count(entry: Any) -> Count:
    samples, size = entry["nsamples"], entry.get("filesize")
    if type(samples) is not int or samples < 1 or not (size is None or (type(size) is int and size > 0)):
        raise ValueError(f"{samples!r} samples and {size!r} bytes of {entry['url']}, expected whole numbers above 0")
    return Count(samples, size)


def _make(path: Path, urls: Sequence[str], check: Callable[[Sample], None]) -> None:
    """Count the samples of every shard, and write the index: it appears whole or not at all."""
    listed = []
    held = Held(lambda number: _looked_at(urls[number], check))
    try:
        for number, url in enumerate(tqdm(urls, "counting samples", unit="shard")):
            held.want({"ahead": range(number, min(number + _AHEAD, len(urls)))}, forget=lambda _: False)
            samples, size = held.get(number, "now")
            listed.append({"url": url, "nsamples": samples, "filesize": size})
    finally:
        held.want({}, forget=lambda _: True)
    empty = [str(entry["url"]) for entry in listed if not entry["nsamples"]]
    if empty:
        raise DataError(f"got no samples in {few(empty)}; leave out what is no shard")
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        part.write_text(json.dumps({"__kind__": _KIND, "wids_version": 1, "shardlist": listed}, indent=1))
        part.replace(path)
    except OSError as error:
        raise DataError(f"got {path}, which cannot be written: {error}; set index to another path") from error
    finally:
        part.unlink(missing_ok=True)


def _looked_at(url: str, check: Callable[[Sample], None]) -> tuple[int, int]:
    """Return how many samples a shard has, all of them checked, and its bytes."""
    found, size = samples(url)
    for sample in found:
        check(sample)
    return len(found), size
