"""How many samples each shard has: an index beside the shards, in the form of WebDataset's own (``wids``)."""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from pathline.core.errors import DataError, InputError
from pathline.data.layouts.shards import local, name_of, samples
from pathline.data.layouts.stores import few

__all__ = ["INDEX", "Count", "counted"]

INDEX = "shardindex.json"
_KIND = "wids-shard-index-v1"
_BYTES_A_SHARD = 4096  # of the index
_STREAMS = 4  # shards that the first pass reads at once


class Count(NamedTuple):
    """What the index tells of a shard.

    Attributes:
        samples: in it.
        size: its bytes; None where an index of other making does not tell.
    """

    samples: int
    size: int | None


def counted(urls: Sequence[str], index: str | None) -> tuple[list[Count], Path]:
    """Return the counts of shards from their index, which is made by a pass over them all where there is none.

    Args:
        urls: of the shards.
        index: path of the index; None is ``shardindex.json`` beside shards that lie in one folder.

    Returns:
        A count a shard, and the path of the index.

    Raises:
        DataError: an index that is none, lacks a shard, or tells of another size than a file has; a shard that cannot
            be read; an index that cannot be written.
        InputError: no path of an index for shards that are not in one folder.
    """
    path = Path(index) if index is not None else _beside(urls)
    found = _read(path, urls) if path.is_file() else _made(path, urls)
    for url, count in zip(urls, found, strict=True):
        file = local(url)
        if file is not None and count.size is not None and count.size != _size(file):
            raise DataError(
                f"got {file} of {_size(file)} bytes, of which {path} tells {count.size}; delete the index to make it "
                "anew, if the shard is meant to have changed"
            )
    return found, path


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


def _read(path: Path, urls: Sequence[str]) -> list[Count]:
    if path.stat().st_size > _BYTES_A_SHARD * (len(urls) + 1000):  # it may tell of more shards than are read
        raise DataError(f"got {path} of {path.stat().st_size} bytes for {len(urls)} shards; it is no index of them")
    try:
        told = json.loads(path.read_bytes())
        entries = {str(entry["url"]): _count(entry) for entry in told["shardlist"]}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"got {path}, which is no index of shards ({error!r}); delete it to make it anew") from error
    names = Counter(name_of(url) for url in entries)  # shards may have been moved, with their index or without
    moved = {name: count for url, count in entries.items() if names[name := name_of(url)] == 1}
    found = [entries.get(url, moved.get(name_of(url))) for url in urls]
    missing = [url for url, count in zip(urls, found, strict=True) if count is None]
    if missing:
        raise DataError(f"got {path} without the shards {few(missing)}; delete it to make it anew")
    return [count for count in found if count is not None]


def _count(entry: Any) -> Count:
    samples, size = entry["nsamples"], entry.get("filesize")
    if type(samples) is not int or samples < 1 or not (size is None or (type(size) is int and size > 0)):
        raise ValueError(f"{samples!r} samples and {size!r} bytes of {entry['url']}, expected whole numbers above 0")
    return Count(samples, size)


def _made(path: Path, urls: Sequence[str]) -> list[Count]:
    """Count the samples of every shard, and write the index: it appears whole or not at all."""
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"got no index {path}, which cannot be written either; set index to the path of a file")
    with ThreadPoolExecutor(_STREAMS) as pool:
        results = pool.map(lambda url: samples(url, contents=False), urls)
        read = [(len(each), size) for each, size in tqdm(results, "counting samples", len(urls), unit="shard")]
    empty = [url for url, (count, _) in zip(urls, read, strict=True) if not count]
    if empty:
        raise DataError(f"got no samples in {few(empty)}; leave out what is no shard")
    listed = [{"url": url, "nsamples": count, "filesize": size} for url, (count, size) in zip(urls, read, strict=True)]
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        part.write_text(json.dumps({"__kind__": _KIND, "wids_version": 1, "shardlist": listed}, indent=1))
        part.replace(path)
    except OSError as error:
        raise DataError(f"got {path}, which cannot be written: {error}; set index to another path") from error
    finally:
        part.unlink(missing_ok=True)
    return [Count(count, size) for count, size in read]
