"""One process's part of preparing data: shards of its own, each a function of the request alone.

n images of R × R pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import reduce
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from pathline.core.errors import DataError, PathlineError, ProcessError
from pathline.data.prepare.encoding import Encoding
from pathline.data.prepare.files import Files
from pathline.data.prepare.images import Decoder
from pathline.data.prepare.manifest import (
    FLIPPED,
    FORMAT,
    MAIN,
    MANIFEST,
    MOMENTS,
    Column,
    Dropped,
    Manifest,
    Request,
    read_manifest,
    shard_name,
)
from pathline.data.prepare.shards import Folder, Record, ShardFile
from pathline.data.prepare.statistics import Spread
from pathline.data.sources import ImageSource

__all__ = ["Work"]


class Work:
    """The part of one process: every ``world_size``-th shard.

    Args:
        source: of the images.
        numbers: of those asked for, in order.
        request: that the shards answer.
        encoding: of images to columns.
        folder: to write to.
        fabric: launched.
        ahead: images that are decoded ahead of what is encoded.
    """

    def __init__(
        self,
        source: ImageSource,
        numbers: NDArray[np.int64],
        request: Request,
        encoding: Encoding,
        folder: Folder,
        fabric: Fabric,
        ahead: int,
    ) -> None:
        self.source, self.numbers, self.request, self.encoding = source, numbers, request, encoding
        self.folder, self.fabric, self.ahead = folder, fabric, ahead
        self.columns: dict[str, Column] = {}

    def run(self) -> Manifest:
        """Make what is missing, and with the last shard the manifest.

        Raises:
            DataError: an image that cannot be read or stored, a disk that is too full, or a folder that was whole and
                has lost a shard.
            ProcessError: another process is gone.
        """
        if not (self.folder.path / MANIFEST).exists():
            self.columns = self.encoding.columns(self.request.resolution, labels=self.source.labels is not None)
            try:
                if self.fabric.is_global_zero:
                    self.folder.open(len(self.numbers) * sum(column.bytes for column in self.columns.values()))
                self._wait()
                self._make_missing()
                self._wait()
                if self.fabric.is_global_zero:
                    self.folder.finish(self._manifest())
                self._wait()
            finally:
                self.folder.release()
        manifest = read_manifest(self.folder.path)
        if self.fabric.is_global_zero:
            Files(self.folder.path, manifest, verify=False)  # also of a folder that was whole before
            self.folder.tidy()
        return manifest

    def _wait(self) -> None:
        """Wait for all processes."""
        try:
            self.fabric.barrier()
        except RuntimeError as error:  # what gloo raises
            raise ProcessError(
                f"lost contact with another process ({str(error).splitlines()[0]}); look at its last words, then give "
                "the command again"
            ) from error

    def _make_missing(self) -> None:
        count = -(-len(self.numbers) // self.request.rows_per_shard)
        own = range(self.fabric.global_rank, count, self.fabric.world_size)
        missing = [number for number in own if self.folder.record(number) is None]
        total = sum(len(self._images_of(number)) for number in missing)
        first, several = self.fabric.is_global_zero, self.fabric.world_size > 1
        words = f"preparing (process 1 of {self.fabric.world_size})" if several else "preparing"
        with (
            closing(Decoder(self.source, self.request.resolution, ahead=self.ahead)) as decoder,
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
                rows, lost = self._rows(group, images)
                dropped += [
                    Dropped(index=i, key=self.source.keys[i], reason=str(why)) for i, why in sorted(lost.items())
                ]
                if len(lost) < len(group):
                    file.write(rows)
                    self._take_in(spreads, rows)
                bar.update(len(group))
            if not file.rows:
                raise DataError(
                    f"got no image that can be stored among {len(wanted)} from {dropped[0].key} on, of which "
                    f"{dropped[0].reason}; look at the source"
                )
            shard = file.kept(number * self.request.rows_per_shard)
            self.folder.keep(number, file, Record(shard=shard, dropped=dropped, statistics=spreads))

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
        records = self.folder.records(-(-len(self.numbers) // request.rows_per_shard))
        spreads = {
            name: reduce(Spread.merged, (record.statistics[name] for record in records))
            for name in records[0].statistics
        }
        count, dropped = sum(r.shard.rows for r in records), [gone for r in records for gone in r.dropped]
        if count + len(dropped) != request.count:
            raise DataError(
                f"got {count} rows and {len(dropped)} images left out, expected {request.count} in all; remove "
                f"{self.folder.path} and prepare the data again"
            )
        channels, *sides = self.columns[MAIN[kind]].shape
        return Manifest(
            format=FORMAT,
            count=count,
            shape=[channels // 2 if kind == "moments" else channels, *sides],
            class_names=list(self.source.class_names),
            latent_kind=kind,
            moments=MOMENTS if kind == "moments" else None,
            columns=self.columns,
            shards=[record.shard for record in records],
            statistics={name: spread.channels() for name, spread in spreads.items()},
            dropped=dropped,
            request=request,
            sha256=64 * "0",
        ).sealed()
