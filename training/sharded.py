"""Distributed tensors: written as shards, one file a process, and read back by any number of processes.

A group of a checkpoint is then a folder of safetensors files, each with a header that tells where its pieces lie in
the whole tensors. ``torch.distributed.checkpoint`` plans, writes and reads them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from pathline.core.errors import CheckpointError
from pathline.training.checkpoints import Keep, Snapshot, check_tensors, finish, path_of, prune
from pathline.training.manifest import SUFFIX, make_folder, problem, sync
from pathline.training.network import local
from pathline.training.together import alone, gathered, together
from pathline.training.writing import Writer

__all__ = ["ShardedWriter", "is_sharded", "read_full", "read_into", "shapes", "write_group"]


def is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any of the tensors is distributed over processes."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def write_group(folder: Path, tensors: Mapping[str, Tensor], group: ProcessGroup | None) -> None:
    """Write tensors as shards; every process of the group calls it, and writes a part of what it has.

    Args:
        folder: made if it is missing; all processes see the same.
        tensors: distributed ones, and others that are equal on all processes.
        group: of gloo; None is the default one, or this process alone.

    Raises:
        CheckpointError: a process could not write; on all of them.
        OSError: the same, where there is one process.
        ProcessError: another process is gone.
    """
    count = dist.get_world_size(group) if dist.is_initialized() else 1
    writer = _StorageWriter(folder, count)
    together(lambda: state_dict_saver.save(dict(tensors), storage_writer=writer, process_group=group), group)


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
    tensors = together(lambda: _like(folder, templates), group)
    together(lambda: state_dict_loader.load(tensors, storage_reader=_reader(folder), process_group=group), group)
    return tensors


def read_full(folder: Path) -> dict[str, Tensor]:
    """Read whole tensors in one process, distributed by none.

    Args:
        folder: as of ``read_into``.

    Raises:
        CheckpointError: damaged files, or pieces that do not make up whole tensors.
    """
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes(folder).items()}
    alone(lambda: state_dict_loader.load(tensors, storage_reader=_reader(folder), no_dist=True))
    return tensors


def shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return shape and type of the whole tensors; no values are read.

    Args:
        folder: as of ``read_into``.

    Raises:
        CheckpointError: damaged files, or pieces that do not make up whole tensors.
    """
    found: dict[str, TensorStorageMetadata] = {}
    for file in _files(folder):
        for name, piece in _pieces(file).items():
            known = found.setdefault(name, TensorStorageMetadata(piece.properties, piece.size, []))
            if (len(piece.size), piece.properties.dtype) != (len(known.size), known.properties.dtype):
                raise CheckpointError(f"got pieces of {name} in {folder} that are of different types")
            known.size = torch.Size(map(max, known.size, piece.size))
            known.chunks += piece.chunks
    values = {name: sum(math.prod(chunk.sizes) for chunk in tensor.chunks) for name, tensor in found.items()}
    torn = [name for name, tensor in found.items() if values[name] != math.prod(tensor.size)]
    if torn:
        raise CheckpointError(f"got pieces in {folder} that do not make up {', '.join(torn[:4])}; a shard is missing")
    return {name: (tensor.size, tensor.properties.dtype) for name, tensor in found.items()}


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
        self._lacking: Exception | None = None

    def _staged(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copy to the host; a want of memory waits for where the others can be told of it."""
        try:
            return super()._staged(groups)
        except (MemoryError, RuntimeError) as error:
            self._copies.clear()
            self._lacking = error
            return {}

    def _copy(self, group: str, name: str, tensor: Tensor) -> Tensor:
        """Copy this process's part, into what is distributed as the tensor is but lies on the host."""
        if not isinstance(tensor, DTensor):
            return super()._copy(group, name, tensor)
        held = self._copies.get((group, name))
        if not isinstance(held, DTensor) or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
            held = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._copies[group, name] = held
        local(held).copy_(local(tensor), non_blocking=tensor.is_cuda)
        return held

    def _store(self, step: int, snapshot: Snapshot) -> None:
        """Write the shards beside, together; then the first process makes a checkpoint of them."""
        final, temporary = path_of(self.folder, step), self.folder / f".writing-{step:09d}"
        whole = self._first and final.exists() and not problem(final)
        if gathered("whole" if whole else "", self._group)[0]:
            return
        try:
            together(lambda: self._prepare(temporary), self._group)
            for group, tensors in snapshot.tensors.items():
                write_group(temporary / group, tensors, self._group)
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

    def _finish(self, temporary: Path, final: Path, step: int, snapshot: Snapshot) -> None:
        if not self._first:
            return
        for group, tensors in snapshot.tensors.items():
            if shapes(temporary / group) != {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}:
                raise CheckpointError(f"got not all shards in {temporary / group}; let all processes see one folder")
        finish(temporary, final, step, snapshot.state, bool(snapshot.state.get("good", True)))
        prune(self.folder, self.keep)


class _Files(FileSystem):
    """The files of a group, for torch's reader."""

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return [str(file) for file in _files(Path(path))]


class _StorageWriter(HuggingFaceStorageWriter):
    """Torch's, but that it makes no file in memory first, and lets other threads run meanwhile."""

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.count = count

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the file of this process."""
        path = Path(self.path) / f"shard-{plan.storage_data['shard_index']:05d}-of-{self.count:05d}{SUFFIX}"
        tensors = {item.index.fqn: cast(Tensor, planner.resolve_data(item)) for item in plan.items}
        layout = {item.index.fqn: {"saved_offsets": item.index.offset} for item in plan.items}
        _write(path, tensors, {"DCP_SHARDING_INFO": json.dumps(layout), "DCP_VERSION": "1.0", "format": "pt"})
        written: Future[list[WriteResult]] = Future()
        written.set_result([])  # the headers tell all
        return written


def _write(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write a file, through to the disk."""
    seen: set[int] = set()
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        host = tensor.detach().cpu().contiguous()
        storage = host.untyped_storage().data_ptr()
        whole[name] = host.clone() if storage in seen else host  # safetensors takes no storage twice
        seen.add(storage)
    try:
        save_file(whole, path, metadata=header)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    sync(path)


def _like(folder: Path, templates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return new tensors like the templates, once what is stored is known to fit them."""
    stored = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes(folder).items()}
    check_tensors(templates, stored, f"tensors in {folder}")
    return {name: torch.empty_like(template) for name, template in templates.items()}


def _reader(folder: Path) -> HuggingFaceStorageReader:
    reader = HuggingFaceStorageReader(str(folder))
    reader.fs = _Files()
    return reader


def _files(folder: Path) -> list[Path]:
    """Return the files of a group."""
    plain = [path for path in (folder, Path(f"{folder}{SUFFIX}")) if path.is_file()]
    files = plain[:1] or sorted(folder.glob(f"*{SUFFIX}"))
    if not files:
        raise CheckpointError(f"got {folder}, which holds no {SUFFIX} file")
    return files


def _pieces(file: Path) -> dict[str, TensorStorageMetadata]:
    """Return what a file holds, by name: each is one chunk, and a size up to where that ends."""
    try:
        stored = _reader(file).read_metadata().state_dict_metadata
        found = {name: piece for name, piece in stored.items() if isinstance(piece, TensorStorageMetadata)}
        for name, piece in found.items():
            (chunk,) = piece.chunks
            if len(chunk.offsets) != len(chunk.sizes) or any(offset < 0 for offset in chunk.offsets):
                raise ValueError(f"{name} lies at {tuple(chunk.offsets)}")
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"got {file}, which is no file of tensors that can be read: {error}") from error
    return found
