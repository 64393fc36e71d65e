"""Samples drawn as the section ``sample`` asks for, and written down: at once, or shard by shard over the devices."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from tqdm.auto import tqdm

from pathline.core.errors import CheckpointError, ConfigurationError
from pathline.core.sections import Natural, Number, Positive, Sample
from pathline.metrics.results import output_of
from pathline.training.manifest import parse
from pathline.training.pictures import save_levels, shown
from pathline.training.record import Order, digest
from pathline.training.sampling import finished, moved, solved
from pathline.training.shards import PICTURE, RECORD, About, Shards
from pathline.training.stored import check_place, clear_leftovers, remove, replacing, sha256_of, write_npz, write_text
from pathline.training.workers import Workers

__all__ = ["Stopped", "Written", "check_devices", "draw", "written"]


class Stopped(Exception):
    """A drawing was interrupted; says what is written."""


class Written(NamedTuple):
    """What a drawing left.

    Attributes:
        paths: of samples, picture and record.
        record: what is written down about it.
        drawn: number of samples that were drawn just now; the others were there.
    """

    paths: list[Path]
    record: dict[str, Any]
    drawn: int


def draw(order: Order, workers: Workers) -> Written:
    """Draw and write what is asked for; sample i is a function of (seed, i), whoever draws it.

    A few samples are drawn at once. Many, or by several processes, go to the folder ``<output>.shards`` first; what is
    there already is not drawn again.

    Raises:
        ConfigurationError: more processes than shards, too many of these, or one scale a sample of another number.
        DataError: another drawing or a folder lies where this one goes, a shard is damaged, or the disk has no room.
        OSError: what is to be written cannot be.
        SolverError: a sample became NaN or infinite.
        Stopped: interrupted, with some shards written.
    """
    wanted = order.configuration.sample
    check_devices(wanted, workers.count)
    workers.first(lambda: _prepare(order))
    if workers.count == 1 and wanted.count <= wanted.shard and wanted.shards == "join":
        return _at_once(order, workers)
    shards = _shards(order)
    missing = workers.first(lambda: shards.claim(order.request, order.differences))
    try:
        if there := workers.first(lambda: written(order)):
            shards.release(remove=wanted.shards == "join" and workers.rank == 0)  # a kill may have left some
            return there
        if wanted.shards == "keep":
            workers.first(lambda: remove(_telling(order)))  # of shards that are drawn again
        _draw_shards(order, shards, workers, missing[workers.rank :: workers.count])
        return workers.first(lambda: _finish(order, shards, workers, missing))
    except KeyboardInterrupt as error:
        raise _stopped(order, shards) from error
    finally:
        shards.release()


def written(order: Order) -> Written | None:
    """Return what an earlier drawing of the same samples left; None if there is none, or it was not finished."""
    samples, _, told = _paths(order)
    try:
        record = parse(told)
        known = _Known.model_validate(record)
    except (OSError, CheckpointError, ValidationError):
        return None
    size = samples.stat().st_size if samples.is_file() else _shards(order).bytes if samples.is_dir() else None
    if size != known.bytes or known.request_sha256 != digest(order.request):
        return None
    return Written([path for path in _paths(order) if path.exists()], record, 0)


def check_devices(wanted: Sample, devices: int) -> None:
    """Check that there is a shard for every device; raises ConfigurationError."""
    shards = -(-wanted.count // wanted.shard)
    if 1 < devices and shards < devices:
        better = (
            f"sample.shard to {wanted.count // devices} or lower"
            if wanted.count >= devices
            else f"sample.devices to {wanted.count} or lower"
        )
        raise ConfigurationError(
            f"sample.devices: got {devices} for {shards} shards of {wanted.shard} samples; set {better}"
        )


class _Named(BaseModel):
    """A component, by its name."""

    name: str


class _Known(BaseModel):
    """What of a record is read again."""

    model_config = ConfigDict(strict=True)
    request_sha256: str
    samples_sha256: str
    bytes: Natural
    count: Positive
    nfe: Natural
    block_evaluations: Natural | None
    seconds: Number
    solver: _Named


def _prepare(order: Order) -> None:
    """Check, before anything is drawn, that the weights are still told of, and that all can be written."""
    assert order.request  # kept: training may prune the checkpoint meanwhile
    if order.configuration.sample.shards == "join":
        clear_leftovers(_paths(order))
        for path in _paths(order):
            check_place(path)


def _shards(order: Order) -> Shards:
    return Shards(_folder(order), order.configuration.sample.count, order.configuration.sample.shard)


def _folder(order: Order) -> Path:
    return order.output.with_suffix(".shards")


def _telling(order: Order) -> list[Path]:
    """Return the files that tell of samples: record, picture, and what was measured."""
    samples, picture, told = _paths(order)
    return [told, picture, output_of(samples)]


def _paths(order: Order) -> tuple[Path, Path, Path]:
    """Return where samples, picture and record go."""
    if order.configuration.sample.shards == "keep":
        folder = _folder(order)
        return folder, folder / PICTURE, folder / RECORD
    return order.output, order.output.with_suffix(".png"), order.output.with_suffix(".json")


def _at_once(order: Order, workers: Workers) -> Written:
    count = order.configuration.sample.count
    with tqdm(total=count, desc="sampling", unit="sample") as progress:
        samples, spent = _solve(order, moved(order.parts, workers.device), range(count), progress.update)
    return _write(order, [samples], spent, workers, count)


def _draw_shards(order: Order, shards: Shards, workers: Workers, mine: list[int]) -> None:
    """Draw this process's shards; raises Stopped in all processes if one was interrupted."""
    network, stopped = moved(order.parts, workers.device), 0
    total = sum(len(shards.ranges[number]) for number in mine)
    place = "sampling" if workers.count == 1 else f"sampling, device 1 of {workers.count}"
    try:
        with tqdm(total=total, desc=place, unit="sample", disable=workers.rank > 0) as progress:
            for number in mine:
                ids = shards.ranges[number]
                samples, spent = _solve(order, network, ids, lambda n: _told(n, progress, shards, workers))
                shards.write(number, samples, order.labels(ids) if order.labelled else None, spent)
                if number == mine[0]:
                    shards.check_room(number, joined=order.configuration.sample.shards == "join")
    except KeyboardInterrupt:
        shards.stop()
        stopped = 1
    except BaseException:
        shards.stop()
        raise
    if workers.largest(stopped):
        raise _stopped(order, shards)


def _told(count: int, progress: Any, shards: Shards, workers: Workers) -> None:
    """Show that samples are drawn, and hear of the other processes."""
    progress.update(count)
    if shards.stopped or workers.orphaned:
        raise KeyboardInterrupt


def _stopped(order: Order, shards: Shards) -> Stopped:
    count = order.configuration.sample.count
    return Stopped(f"stopped: {shards.done:,} of {count:,} samples are in {shards.folder}; the same command goes on")


def _solve(order: Order, network: nn.Module, ids: range, tell: Callable[[int], Any]) -> tuple[NDArray[Any], About]:
    """Return samples as they are stored, and what they cost; a batch's number is told when it is drawn."""
    wanted, began = order.configuration.sample, time.perf_counter()
    pieces, nfe, blocks = [], 0, None
    for piece in solved(order.parts, network, order.labels(ids), ids, wanted.seed, wanted.batch):
        samples = finished(order.parts, piece.x)
        pieces.append((rearrange(samples, "n c h w -> n h w c") if order.parts.can_draw else samples).numpy())
        nfe = max(nfe, piece.nfe)
        if piece.block_evaluations is not None:
            blocks = max(blocks or 0, piece.block_evaluations)
        tell(len(samples))
    return np.concatenate(pieces), About(nfe, blocks, time.perf_counter() - began)


def _finish(order: Order, shards: Shards, workers: Workers, missing: list[int]) -> Written:
    """Join the shards, unless they are to be kept, and write picture and record."""
    numbers = range(len(shards.ranges))
    spent = [about for about in map(shards.about, numbers) if about is not None]
    blocks = [about.block_evaluations for about in spent if about.block_evaluations is not None]
    total = About(max(about.nfe for about in spent), max(blocks, default=None), sum(about.seconds for about in spent))
    labelled = order.labelled
    pieces = shards.read_all(
        lambda ids: order.labels(ids) if labelled else None, np.uint8 if order.parts.can_draw else np.float32
    )
    result = _write(order, pieces, total, workers, sum(len(shards.ranges[number]) for number in missing))
    shards.release(remove=order.configuration.sample.shards == "join")
    return result


def _write(order: Order, pieces: Iterable[NDArray[Any]], spent: About, workers: Workers, drawn: int) -> Written:
    """Write samples that come piece by piece, unless they are there in shards; a picture; and last the record."""
    count, (path, picture, told) = order.configuration.sample.count, _paths(order)
    labels = order.labels(range(count)) if order.labelled else None
    seen = _Shown(count, labels)
    passing = seen.passing(pieces) if order.parts.can_draw else iter(pieces)
    if path == order.output:
        older = _telling(order)
        sha256 = write_npz(path, passing, count, None if labels is None else labels.numpy(), older=older)
        size = path.stat().st_size
    else:
        sha256, size = sha256_of(passing), _shards(order).bytes or 0
    if order.parts.can_draw:
        seen.save(picture)
    record = {**order.record(spent, workers.count, workers.device), "samples_sha256": sha256, "bytes": size}
    write_text(told, json.dumps(record, indent=1))
    return Written([path, picture, told] if order.parts.can_draw else [path, told], record, drawn)


class _Shown:
    """Lets images pass, and keeps those that the picture shows."""

    def __init__(self, count: int, labels: Tensor | None) -> None:
        self.count, self.labels = count, labels
        self.numbers: list[int] = []
        self.images: list[NDArray[Any]] = []

    def passing(self, pieces: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
        """Yield the pieces."""
        first = 0
        for piece in pieces:
            if not self.numbers:
                self.numbers = sorted(itertools.chain(*shown(self.count, self.labels, piece.shape[1:3])))
            self.images += [piece[n - first].copy() for n in self.numbers if first <= n < first + len(piece)]
            first += len(piece)
            yield piece

    def save(self, path: Path) -> None:
        """Write the picture."""
        with replacing(path) as file:
            save_levels(file, np.stack(self.images), None if self.labels is None else self.labels[self.numbers])
