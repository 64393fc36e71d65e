"""One process's part of preparing data: shards of its own, each a function of the request alone.

n images of R × R pixels.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from pathline.core.errors import DataError, InputError, PathlineError, ProcessError
from pathline.data.prepare.columns import FLIPPED, MAIN, Column
from pathline.data.prepare.encoding import Encoding
from pathline.data.prepare.files import Files
from pathline.data.prepare.folder import Folder, Record
from pathline.data.prepare.images import Decoder
from pathline.data.prepare.machine import cores
from pathline.data.prepare.manifest import FORMAT, MANIFEST, MOMENTS, Dropped, Manifest, read_manifest, shard_name
from pathline.data.prepare.shards import ShardFile
from pathline.data.prepare.statistics import Spread
from pathline.data.sources import ImageSource

__all__ = ["Stopped", "Work"]


FAILED, INTERRUPTED = "failed", "interrupted"  # words that processes leave for one another
_PAUSE = 0.05  # seconds between looks at the others


class Stopped(ProcessError):
    """Another process has failed; it has said why."""


class Work:
    """The part of one process: every ``world_size``-th shard.

    Args:
        source: of the images.
        numbers: of those asked for, in order.
        encoding: of images to columns.
        folder: to write to.
        fabric: launched.
        ahead: images that are decoded ahead of what is encoded.
    """

    def __init__(
        self,
        source: ImageSource,
        numbers: NDArray[np.int64],
        encoding: Encoding,
        folder: Folder,
        fabric: Fabric,
        ahead: int,
    ) -> None:
        self.source, self.numbers, self.request, self.encoding = source, numbers, folder.request, encoding
        self.folder, self.fabric, self.ahead = folder, fabric, ahead
        self.columns: dict[str, Column] = {}
        self._count = -(-len(numbers) // self.request.rows_per_shard)
        self._parent, self._together = os.getppid(), False

    def run(self) -> Manifest:
        """Make what is missing, and with the last shard the manifest.

        Raises:
            DataError: an image that cannot be read or stored, a disk that is too full, or a folder that was whole and
                has lost a shard.
            InputError: images that are too large for the memory.
            ProcessError: another process is gone.
        """
        if not (self.folder.path / MANIFEST).exists():
            try:
                with self._enough_memory():
                    self._make_all()
            except BaseException as error:
                if self._together and not isinstance(error, Stopped):
                    self.folder.stop(FAILED if isinstance(error, Exception) else INTERRUPTED)
                raise
            finally:
                self.folder.release()
        manifest = read_manifest(self.folder.path)
        if self.fabric.is_global_zero:
            Files(self.folder.path, manifest, verify=False)  # also of a folder that was whole before
            self.folder.tidy()
        return manifest

    def _make_all(self) -> None:
        self.columns = self.encoding.columns(self.request.resolution, labels=self.source.labels is not None)
        if self.fabric.is_global_zero:
            self.folder.open(len(self.numbers) * sum(column.bytes for column in self.columns.values()))
            self._warn_of_idle_processes()
        self._wait()
        self._together = self.fabric.world_size > 1  # what lies in the folder is of this command
        self._make_missing()
        self._wait()
        if self.fabric.is_global_zero:
            self.folder.finish(self._manifest())
        self._wait()

    @contextmanager
    def _enough_memory(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            side = self.request.resolution
            raise InputError(
                f"got no memory for images of {side} x {side}, {self.request.encoded_together} at once "
                f"({next(iter(str(error).splitlines()), 'out of memory')}); choose a smaller --resolution"
            ) from error

    def _warn_of_idle_processes(self) -> None:
        processes = self.fabric.world_size
        turns = -(-self._count // processes)
        if self._count < 0.9 * turns * processes:
            size = -(-len(self.numbers) // (turns * processes))
            warnings.warn(
                f"{self._count} shards keep {processes} processes busy for {self._count / turns / processes:.0%} of "
                f"the time; --rows-per-shard {size} would for all of it, in a new folder",
                stacklevel=2,
            )

    def _wait(self) -> None:
        """Wait for all processes, and hear signals meanwhile."""
        if self.fabric.world_size == 1:
            return
        try:
            barrier = torch.distributed.barrier(async_op=True)
            while not barrier.is_completed():
                self._look()
                time.sleep(_PAUSE)
            barrier.wait()
        except PathlineError:
            raise
        except RuntimeError as error:  # what gloo raises
            self._look()
            raise ProcessError(
                f"lost contact with another process ({str(error).splitlines()[0]}); look at its last words, then give "
                "the command again"
            ) from error

    def _look(self) -> None:
        """Leave if another process has failed or was interrupted, or if the one that started this one is gone."""
        word = self.folder.stopped() if self._together else None
        if word == INTERRUPTED:
            raise KeyboardInterrupt
        if word is not None:
            raise Stopped("another process has failed; look at its last words, then give the command again")
        if self.fabric.global_rank > 0 and os.getppid() != self._parent:
            raise ProcessError("lost the process that started this one; give the command again")

    def _make_missing(self) -> None:
        first, several = self.fabric.is_global_zero, self.fabric.world_size > 1
        own = range(self.fabric.global_rank, self._count, self.fabric.world_size)
        looked = tqdm(own, desc="looking at what is there", unit="shard", disable=not first, delay=1)
        missing = [number for number in looked if self.folder.record(number) is None]
        total = sum(len(self._images_of(number)) for number in missing)
        words = f"preparing (process 1 of {self.fabric.world_size})" if several else "preparing"
        threads = max(1, cores() // getattr(self.fabric.strategy, "num_processes", 1))  # those of this machine
        with (
            closing(Decoder(self.source, self.request.resolution, ahead=self.ahead, threads=threads)) as decoder,
            tqdm(total=total, desc=words, unit="image", disable=not first) as bar,
        ):
            for number in missing:
                self._make(number, decoder, bar)

    def _images_of(self, number: int) -> list[int]:
        """Return the numbers of the images of a shard."""
        size = self.request.rows_per_shard
        found: list[int] = self.numbers[number * size : (number + 1) * size].tolist()
        return found

    def _make(self, number: int, decoder: Decoder, bar: tqdm[Any]) -> None:
        """Make one shard."""
        wanted, dropped = self._images_of(number), list[Dropped]()
        spreads: dict[str, Spread] = {}
        with ShardFile(self.folder.path, shard_name(number), self.columns, len(wanted)) as file:
            for group, images in decoder.groups(wanted, self.request.encoded_together):
                self._look()
                rows, lost = self._rows(group, images)
                dropped += [self._dropped(number, lost[number]) for number in sorted(lost)]
                if len(lost) < len(group):
                    file.write(rows)
                    self._take_in(spreads, rows)
                bar.update(len(group))
            shard = file.kept(number * self.request.rows_per_shard) if file.rows else None
            self.folder.keep(number, file, Record(shard=shard, dropped=dropped, statistics=spreads))

    def _dropped(self, number: int, why: PathlineError) -> Dropped:
        """Return what is noted of an image; of names of files that are not UTF-8, the bytes."""
        key, reason = (
            text.encode(errors="surrogateescape").decode(errors="backslashreplace")
            for text in (self.source.keys[number], str(why))
        )
        return Dropped(index=number, key=key, reason=reason)

    def _rows(
        self, group: Sequence[int], images: Sequence[Tensor | PathlineError]
    ) -> tuple[dict[str, Tensor], dict[int, PathlineError]]:
        """Return the rows of those images that can be stored; and of each other one, by its number, why it cannot.

        Raises:
            PathlineError: the first of these, unless such images are to be dropped.
        """
        lost = {i: found for i, found in zip(group, images, strict=True) if isinstance(found, PathlineError)}
        kept, rows = [i for i in group if i not in lost], dict[str, Tensor]()
        if kept and (not lost or self.request.on_error == "drop"):
            rows, wrong = self.encoding.checked(torch.stack([found for found in images if isinstance(found, Tensor)]))
            lost |= {kept[place]: self._refused(kept[place], why) for place, why in wrong.items()}
        if lost and self.request.on_error == "stop":
            raise lost[min(lost)]
        kept, labels = [i for i in kept if i not in lost], self.source.labels
        told = {} if labels is None else {"labels": torch.tensor([labels[i] for i in kept], dtype=torch.int64)}
        return {**rows, **told, "index": torch.tensor(kept, dtype=torch.int64)}, lost

    def _refused(self, number: int, why: str) -> DataError:
        return DataError(
            f"got {self.source.keys[number]}, which gives {why}; store another --dtype, or leave such images out by "
            "--on-error drop"
        )

    def _take_in(self, spreads: dict[str, Spread], rows: dict[str, Tensor]) -> None:
        """Merge the figures of rows of data, and of their mirror images, into those before."""
        main = MAIN[self.encoding.kind]
        for name in (main, main + FLIPPED):
            if name in rows:
                found = Spread.of(rows[name])
                spreads[name] = spreads[name].merged(found) if name in spreads else found

    def _manifest(self) -> Manifest:
        """Put the records of all shards together."""
        request, kind = self.request, self.encoding.kind
        records = self.folder.records(self._count)
        shards, dropped = [r.shard for r in records if r.shard], [gone for r in records for gone in r.dropped]
        count = sum(shard.rows for shard in shards)
        if count + len(dropped) != request.count:
            raise DataError(
                f"got {count} rows and {len(dropped)} images left out, expected {request.count} in all; remove "
                f"{self.folder.path} and prepare the data again"
            )
        if not shards:
            raise DataError(
                f"got no image that can be stored among {request.count} from {dropped[0].key} on, of which "
                f"{dropped[0].reason}; look at the source"
            )
        spreads: dict[str, Spread] = {}
        for record in records:
            for name, found in record.statistics.items():
                spreads[name] = spreads[name].merged(found) if name in spreads else found
        channels, *sides = self.columns[MAIN[kind]].shape
        return Manifest(
            format=FORMAT,
            count=count,
            shape=[channels // 2 if kind == "moments" else channels, *sides],
            latent_kind=kind,
            moments=MOMENTS if kind == "moments" else None,
            columns=self.columns,
            shards=shards,
            statistics={name: spread.channels() for name, spread in spreads.items()},
            dropped=dropped,
            request=request,
            sha256=64 * "0",
        ).sealed()
