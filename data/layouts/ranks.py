"""Files that several ranks have written, shard after shard: whether they are all there, and no others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pathline.core.errors import DataError
from pathline.data.layouts.stores import few, missing_below

__all__ = ["check_shards"]

_NAMES = "latents_rank00_shard000.safetensors, …"
_SHARD = re.compile(r"latents_rank(\d{1,9})_shard(\d{1,9})\.safetensors")


def check_shards(rows: Mapping[str, int], place: Path) -> None:
    """Check the names and numbers of rows of the files of a folder.

    Ranks count from 0, and so do the shards of each. All shards but a rank's last one have the same number of rows, and
    all ranks the same number of samples, but for one. A last rank that is missing cannot be told, nor the last shards
    of all ranks.

    Args:
        rows: of each file by its name.
        place: the folder, for errors.

    Raises:
        DataError: a file that is missing, or one too many; names it.
    """
    ranks = _by_rank(rows, place)
    gone = [f"latents_rank{rank:02d}_shard*" for rank in missing_below(ranks)]
    for rank, shards in ranks.items():
        gone += [f"latents_rank{rank:02d}_shard{shard:03d}" for shard in missing_below(shards)]
    if gone:
        raise DataError(f"got {place} without {few(gone)}; copy what is missing, or remove what has a later number")
    full = max(rows.values())
    short = [name for shards in ranks.values() for name in list(shards.values())[:-1] if rows[name] < full]
    if short:
        raise DataError(
            f"got {few(short)} in {place} with fewer rows than {full}, as only a rank's last shard may have; a later "
            "one was added, or the file is of another folder"
        )
    counts = {rank: sum(rows[name] for name in shards.values()) for rank, shards in ranks.items()}
    if max(counts.values()) - min(counts.values()) > 1:
        told = few(f"{counts[rank]} up to {list(shards.values())[-1]}" for rank, shards in ranks.items())
        raise DataError(
            f"got ranks with unlike numbers of samples in {place}: {told}; a last shard is missing, or was added"
        )


def _by_rank(rows: Mapping[str, int], place: Path) -> dict[int, dict[int, str]]:
    """Return names by rank and shard, both in order."""
    found: dict[int, dict[int, str]] = {}
    strays = []
    for name in rows:
        match = _SHARD.fullmatch(name)
        if match is None:
            strays.append(name)
        elif (other := found.setdefault(int(match[1]), {}).setdefault(int(match[2]), name)) != name:
            raise DataError(f"got {name} beside {other} in {place}, expected one file a rank and shard")
    if strays:
        raise DataError(f"got {few(strays)} in {place}, expected files {_NAMES} alone; move them elsewhere")
    return {rank: dict(sorted(shards.items())) for rank, shards in sorted(found.items())}
