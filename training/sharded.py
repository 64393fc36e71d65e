"""Distributed tensors: written as shards, one file a process, and read back by any number of processes.

A group of a checkpoint is then a folder of safetensors files. Each tells in its header where its pieces lie in the
whole tensors, in the layout of ``torch.distributed.checkpoint.HuggingFaceStorageWriter(path, save_distributed=True)``,
so that torch's tools read it too. That writer itself is not used: it makes every file in memory first, and lets no
other thread run meanwhile.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from pathline.core.errors import CheckpointError
from pathline.training.checkpoints import Keep, Snapshot, check_tensors, finish, path_of, prune
from pathline.training.manifest import SUFFIX, make_folder, problem, sync
from pathline.training.together import gathered, together
from pathline.training.writing import Writer

__all__ = ["ShardedWriter", "is_sharded", "read_full", "read_into", "shapes", "write_group"]

LAYOUT, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # torch's names in a file's header
Offsets = dict[str, tuple[int, ...]]
Shapes = dict[str, tuple[torch.Size, torch.dtype]]


class Shards(NamedTuple):
    """The parts of tensors that a process has, sharing memory with them, and where each begins in the whole."""

    tensors: dict[str, Tensor]
    offsets: Offsets


def is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any of the tensors is distributed over processes."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def write_group(folder: Path, tensors: Mapping[str, Tensor], group: ProcessGroup | None) -> None:
    """Write tensors as shards; every process of the group calls it, and writes what it has.

    Args:
        folder: made if it is missing; all processes see the same.
        tensors: distributed ones, and others that are equal on all processes.
        group: of gloo; None is the default one, or this process alone.

    Raises:
        CheckpointError: a process could not write; on all of them.
        OSError: the same, where there is one process.
        ProcessError: another process is gone.
    """
    together(lambda: _write(folder, _shards(tensors, group), group), group)


def read_into(folder: Path, templates: Mapping[str, Tensor], group: ProcessGroup | None) -> dict[str, Tensor]:
    """Read tensors distributed like the templates, which are left as they are; every process of the group calls it.

    Args:
        folder: of shards written by any number of processes; or one ``.safetensors`` file, of which the ending may be
            left out, as a group of a checkpoint is either.
        templates: tell names, shapes, types, devices and how each tensor is distributed.
        group: of gloo; None is the default one, or this process alone.

    Raises:
        CheckpointError: damaged files, or other names, shapes or types than the templates have; on all processes.
        ProcessError: another process is gone.
    """
    return together(lambda: _read_like(folder, templates), group)


def read_full(folder: Path) -> dict[str, Tensor]:
    """Read whole tensors in one process, distributed by none.

    Args:
        folder: as of ``read_into``.

    Raises:
        CheckpointError: damaged files, or pieces that do not make up whole tensors.
    """
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes(folder).items()}
    _fill(folder, tensors)
    return tensors


def shapes(folder: Path) -> Shapes:
    """Return shape and type of the whole tensors; no values are read.

    Args:
        folder: as of ``read_into``.

    Raises:
        CheckpointError: damaged files, or pieces that do not make up whole tensors.
    """
    found: dict[str, tuple[list[int], torch.dtype]] = {}
    values: Counter[str] = Counter()
    for name, part, offset in _stored(folder):
        shape = part.get_shape()
        end = [first + length for first, length in zip(offset, shape, strict=True)]
        dtype = part[(slice(0, 0),) * min(len(shape), 1)].dtype
        known, wanted = found.get(name, (end, dtype))
        if (len(end), dtype) != (len(known), wanted):
            raise CheckpointError(f"got pieces of {name} in {folder} that are of different types")
        found[name] = [max(pair) for pair in zip(known, end, strict=True)], dtype
        values[name] += math.prod(shape)
    torn = [name for name, (shape, _) in found.items() if values[name] != math.prod(shape)]
    if torn:
        raise CheckpointError(f"got pieces in {folder} that do not make up {', '.join(torn[:4])}; a shard is missing")
    return {name: (torch.Size(shape), dtype) for name, (shape, dtype) in found.items()}


class ShardedWriter(Writer):
    """Writes the checkpoints of a run whose tensors are distributed: every process its own shards.

    Every process makes one and calls its methods at the same steps. Where one process cannot write, the save fails on
    all of them. A process that is lost, or silent for too long, is no such failure: ``save`` or ``wait`` raises
    ProcessError.

    Args:
        folder: of the checkpoints; all processes see the same.
        keep: which of them stay.
        asynchronous: whether ``save`` returns while a thread writes.
        timeout: seconds that processes wait for one another.
    """

    def __init__(self, folder: Path, keep: Keep, *, asynchronous: bool, timeout: float = 600.0) -> None:
        super().__init__(folder, keep, asynchronous=asynchronous)
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._first = dist.get_rank(self._group) == 0
        self._offsets: dict[str, Offsets] = {}
        self._shapes: dict[str, Shapes] = {}
        self._lacking: Exception | None = None

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Save a snapshot as it is now; what changes it afterwards does not reach the disk."""
        self.wait()  # a thread may be reading what is set here
        found = {group: _shards(tensors, self._group) for group, tensors in snapshot.tensors.items()}
        self._offsets = {group: shards.offsets for group, shards in found.items()}
        self._shapes = {group: _shapes(tensors) for group, tensors in snapshot.tensors.items()}
        super().save(step, Snapshot({group: shards.tensors for group, shards in found.items()}, snapshot.state))

    def _staged(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copy to the host; a want of memory waits for where the others can be told of it."""
        try:
            return super()._staged(groups)
        except (MemoryError, RuntimeError) as error:
            self._copies.clear()
            self._lacking = error
            return {}

    def _store(self, step: int, snapshot: Snapshot) -> None:
        """Write the shards beside, together; then the first process makes a checkpoint of them."""
        final, temporary = path_of(self.folder, step), self.folder / f".writing-{step:09d}"
        whole = self._first and final.exists() and not problem(final)
        if gathered("whole" if whole else "", self._group)[0]:
            return
        try:
            together(lambda: self._prepare(temporary), self._group)
            together(lambda: self._write_shards(temporary, snapshot), self._group)
            together(lambda: self._finish(temporary, final, step, snapshot), self._group)
        finally:
            if self._first:
                shutil.rmtree(temporary, ignore_errors=True)

    def _prepare(self, temporary: Path) -> None:
        lacking, self._lacking = self._lacking, None
        if lacking is not None:
            raise lacking
        if self._first:
            make_folder(self.folder)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()

    def _write_shards(self, temporary: Path, snapshot: Snapshot) -> None:
        for group, tensors in snapshot.tensors.items():
            _write(temporary / group, Shards(dict(tensors), self._offsets[group]), self._group)

    def _finish(self, temporary: Path, final: Path, step: int, snapshot: Snapshot) -> None:
        if not self._first:
            return
        for group, wanted in self._shapes.items():
            if shapes(temporary / group) != wanted:
                raise CheckpointError(f"got not all shards in {temporary / group}; let all processes see one folder")
        finish(temporary, final, step, snapshot.state, bool(snapshot.state.get("good", True)))
        prune(self.folder, self.keep)


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _shards(tensors: Mapping[str, Tensor], group: ProcessGroup | None) -> Shards:
    """Return what this process has to write: of all processes of the group, one has each part."""
    first = not dist.is_initialized() or dist.get_rank(group) == 0
    mine = {k: t for k, t in tensors.items() if (_is_first_copy(t) if isinstance(t, DTensor) else first)}
    return Shards({name: _local(t) for name, t in mine.items()}, {name: _offset(t) for name, t in mine.items()})


def _is_first_copy(tensor: DTensor) -> bool:
    place = tensor.device_mesh.get_coordinate()
    return place is not None and not any(
        at and placement.is_replicate() for at, placement in zip(place, tensor.placements, strict=True)
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _offset(tensor: Tensor) -> tuple[int, ...]:
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]  # torch has no types here
    return tuple(chunk.offsets)


def _write(folder: Path, shards: Shards, group: ProcessGroup | None) -> None:
    """Write the file of this process, through to the disk."""
    number, count = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
    path = folder / f"shard-{number + 1:05d}-of-{count:05d}{SUFFIX}"
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in shards.tensors.items():
        local = tensor.cpu().contiguous()
        storage = local.untyped_storage().data_ptr()
        tensors[name] = local.clone() if storage in seen else local  # safetensors takes no storage twice
        seen.add(storage)
    layout = {name: {OFFSETS: offset} for name, offset in shards.offsets.items()}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, path, metadata={LAYOUT: json.dumps(layout), "DCP_VERSION": "1.0", "format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    sync(path)


def _read_like(folder: Path, templates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stored = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes(folder).items()}
    check_tensors(templates, stored, f"tensors in {folder}")
    tensors = {name: torch.empty_like(template) for name, template in templates.items()}
    _fill(folder, tensors)
    return tensors


def _fill(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy what is stored into this process's parts of the tensors."""
    for name, part, offset in _stored(folder):
        local, begin = _local(tensors[name]), _offset(tensors[name])
        both = list(zip(offset, part.get_shape(), begin, local.shape, strict=True))
        first = [max(o, b) for o, _, b, _ in both]
        last = [min(o + n, b + m) for o, n, b, m in both]
        if all(low < high for low, high in zip(first, last, strict=True)):
            local[_slices(first, last, begin)].copy_(part[_slices(first, last, offset)])


def _slices(first: Sequence[int], last: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(low - o, high - o) for low, high, o in zip(first, last, origin, strict=True))


def _stored(folder: Path) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Give name, values (read when they are sliced) and offset of every piece in a folder or a file."""
    plain = [path for path in (folder, Path(f"{folder}{SUFFIX}")) if path.is_file()]
    files = plain[:1] or sorted(folder.glob(f"*{SUFFIX}"))
    if not files:
        raise CheckpointError(f"got {folder}, which holds no {SUFFIX} file")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                header = opened.metadata() or {}
                layout = json.loads(header[LAYOUT]) if LAYOUT in header else None
                for name in opened.keys():
                    part = opened.get_slice(name)
                    offset = (0,) * len(part.get_shape()) if layout is None else tuple(layout[name][OFFSETS])
                    if len(offset) != len(part.get_shape()) or not all(isinstance(n, int) and n >= 0 for n in offset):
                        raise ValueError(f"{name} lies at {offset}")
                    yield name, part, offset
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"got {file}, which is no file of tensors that can be read: {error}") from error
