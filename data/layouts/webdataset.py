"""Shards of WebDataset: sets larger than one machine, streamed from disk, servers or commands in blocks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.draws import BoundDraws, Draws
from pathline.core.errors import DataError, InputError, InputTypeError
from pathline.data.base import Batch, Indices, registry
from pathline.data.crop import centre_crop
from pathline.data.decode import decode
from pathline.data.layouts.arrays import NPY_FLOATS, read_array
from pathline.data.layouts.base import (
    SURVEYED,
    LatentScaling,
    StoredLatents,
    check_deviations,
    check_label,
    check_options,
)
from pathline.data.layouts.blocks import BlockOrder
from pathline.data.layouts.counts import counted
from pathline.data.layouts.files import check_workers, read_all
from pathline.data.layouts.shards import ARRAYS, IMAGES, Sample, expanded, name_of, samples
from pathline.data.layouts.streams import Held
from pathline.data.sources.keys import label_in
from pathline.data.visits import FLIPS, flips

__all__ = ["WebDataset"]

KINDS = {"images": IMAGES, "latents": ARRAYS, "moments": ARRAYS}
_HELD = 3  # windows of a lane: in use, the next one, and a second in use where a batch lies across an end


@registry.register("webdataset")
class WebDataset(StoredLatents):
    """Tar shards whose samples are ``key.jpg``, ``.jpeg``, ``.png``, ``.webp`` or ``key.npy``, with ``key.cls``.

    Labels are whole numbers in ``key.cls``, or an entry of ``key.json``. Members of other kinds are never read, pickles
    among them. How many samples each shard has is told by an index, which is made by one pass over all shards where
    there is none; a shard that has another number later is an error, and so is one of a folder that is gone.

    The order is a block shuffle: shards are permuted in each epoch, and samples within windows of ``window`` shards, as
    a pure function of (seed, position). Shards are read from end to end, each once an epoch, those of the window in use
    and of the next one ahead. A process holds the encoded samples of at most 3·window shards for each lane that it
    reads, where no batch spans more than two windows of it, and one shard for ``batch``: ``held_bytes`` tells how many
    bytes that is if it reads all lanes.

    Of several processes each takes a part of every batch, and with one lane every process reads all shards. With lanes
    it reads its own alone: set ``lanes`` to the number of processes or a multiple of it, and ``lane_batch`` to the
    global batch divided by it. A process then reads about 1/processes of the shards (those of one lane more from the
    second epoch on, where the batches no longer begin with a lane), and a batch is mixed of as many windows. The order
    depends on both, not on how many processes there are.

    Args:
        path: shards, as ``/data/x-{000000..000009}.tar``: files, ``file:``, ``http:`` or ``https:`` URLs, ``pipe:``
            with a command whose output is a tar (it runs as you), or a folder of ``*.tar``; or a list of such.
        kind: ``images`` are decoded and centre-cropped as ADM does; ``latents`` are arrays (C, H, W); ``moments`` are
            arrays (2C, H, W), mean and standard deviation, of which a sample is drawn at each visit.
        num_classes: class labels 0 … num_classes − 1; 0 for data without labels.
        resolution: side of images; None is 256.
        scale: factor of latents that were stored unscaled, by which the run's autoencoder is compared; None is 1 and
            says nothing of it.
        flip: whether images are mirrored at every second visit or so.
        index: path of the index; None is ``shardindex.json`` beside shards that lie in one folder.
        label: entry of ``key.json`` that is the label, for samples without ``key.cls``.
        window: shards that are shuffled together.
        lanes: equal parts of an epoch's sequence of windows that are read side by side.
        lane_batch: samples in a row that a lane gives.
        workers: threads that decode.

    Raises:
        DataError: no shards, one that cannot be read, or an index that does not fit.
        InputError: an option out of range, or one that the kind does not have.
        InputTypeError: an option of another type.
        MissingPackageError: webdataset is not installed.
    """

    name = "webdataset"

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        kind: str = "images",
        num_classes: int = 1000,
        resolution: int | None = None,
        scale: float | None = None,
        flip: bool = False,
        index: str | None = None,
        label: str = "label",
        window: int = 4,
        lanes: int = 1,
        lane_batch: int = 32,
        workers: int = 4,
    ) -> None:
        check_options(num_classes, scale=1 if scale is None else scale)
        _check(kind, resolution, scale, flip)
        _check_counts(window=window, lanes=lanes, lane_batch=lane_batch)
        self.kind, self.num_classes, self.flip, self.label = kind, num_classes, flip, label
        self.data_are_images, self._workers = kind == "images", check_workers(workers)
        self._resolution = 256 if resolution is None else resolution
        self._kinds = {*KINDS[kind], *(("cls", "json") if num_classes else ())}  # what is read of samples
        self.urls, whole = expanded(path)
        self._counts, self.index = counted(self.urls, index, whole=whole, check=self._check_members)
        self.order = BlockOrder([count.samples for count in self._counts], window, lanes, lane_batch)
        self._ends = np.cumsum(self.order.counts)
        self._held = Held(self._shard)
        self._shape = self._first_shape()
        channels, *sides = self._shape
        self.shape = (channels // 2 if kind == "moments" else channels, sides[0], sides[1])
        if self.data_are_images:
            self.scaling = LatentScaling((127.5,) * 3, (127.5,) * 3, "levels a are a/127.5 − 1")
        else:
            self._set_scaling(LatentScaling.by(1.0 if scale is None else float(scale), self.shape[0], "option scale"))
            if scale is None:  # they may have been scaled before they were stored
                self.latents_of = None

    def __len__(self) -> int:
        return self.order.count

    @property
    def held_bytes(self) -> int | None:
        """Upper bound of the bytes of shards that a process holds; None where the index does not tell of sizes."""
        sizes = sorted((count.size or 0 for count in self._counts), reverse=True)
        held = min(_HELD * self.order.window * (self.order.lanes + 1) + 1, len(sizes))
        return sum(sizes[:held]) if all(sizes) else None

    def indices_at(self, positions: range, seed: int) -> NDArray[np.int64]:
        """Return the sample indices at training positions: epoch after epoch, each a permutation, in blocks."""
        if positions.start < 0 or positions.step != 1:
            raise InputError(f"got positions {positions}, expected a run of non-negative ones")
        return self.order.visits(positions, seed).sample

    def load(self, indices: Indices, draws: BoundDraws) -> Batch:
        """Return samples as they are stored, images as uint8, and read what the next positions need ahead."""
        self._read_ahead(np.asarray(indices), draws)
        loaded = super().load(indices, draws)
        return {**loaded, FLIPS: flips(draws)} if self.flip else loaded

    def finish(self, loaded: Batch, draws: BoundDraws) -> Batch:
        """Bring samples to model space: images to [−1, 1], mirrored or not, latents scaled, moments drawn from."""
        finished = super().finish({key: value for key, value in loaded.items() if key != FLIPS}, draws)
        if FLIPS in loaded:
            data = finished["data"]
            finished["data"] = torch.where(loaded[FLIPS].reshape(-1, 1, 1, 1), data.flip(-1), data)
        return finished

    def _to_model(self, values: Tensor) -> Tensor:
        return values.float() / 127.5 - 1 if self.data_are_images else super()._to_model(values)

    def _read_ahead(self, index: NDArray[np.int64], draws: BoundDraws) -> None:
        """Begin to read the windows that the lanes of a visit are in, and the next ones."""
        seed, positions = draws.draws.seed, draws.ids
        if not isinstance(positions, range) or positions.step != 1 or not len(positions):
            return
        visits = self.order.visits(positions, seed)
        if not np.array_equal(visits.sample, index):  # not of the training order
            return
        wanted: dict[Hashable, list[int]] = {}
        seen = sorted(set(zip(visits.lane.tolist(), visits.epoch.tolist(), visits.window.tolist(), strict=True)))
        ahead = {lane: self.order.following(seed, epoch, lane, window) for lane, epoch, window in seen}
        for lane, epoch, window in [*seen, *((lane, *found) for lane, found in ahead.items() if found)]:
            wanted.setdefault((lane, epoch), []).extend(self.order.shards(seed, epoch, window).tolist())
        first = int(visits.epoch.min())
        self._held.want(wanted, forget=lambda who: isinstance(who, tuple) and who[1] < first)

    def _stored(self, index: NDArray[np.int64]) -> Batch:
        holders = np.searchsorted(self._ends, index, side="right")
        chosen: dict[int, Sample] = {}
        for shard in np.unique(holders).tolist():
            found = self._held.get(shard, "batch")
            first = self._ends[shard] - len(found)
            chosen |= {row: found[index[row] - first] for row in np.flatnonzero(holders == shard).tolist()}
        rows = [chosen[row] for row in range(len(index))]
        values = read_all(self._array, rows, _name, self._shape, self._workers)
        return {"data": values, "label": torch.tensor([self._label(row) for row in rows], dtype=torch.int64)}

    def _first_shape(self) -> tuple[int, ...]:
        """Return the shape of the first sample, which has to have a label too."""
        found, _ = samples(self.urls[0], self._kinds, first=True)
        if not found:
            raise DataError(f"got {self.urls[0]} without a sample, of which {self.index} tells; delete the index")
        self._check_members(found[0])
        self._label(found[0])
        return self._array(found[0]).shape

    def _shard(self, number: int) -> list[Sample]:
        """Read a shard, whose samples have to be as many as the index tells."""
        url, count = self.urls[number], self._counts[number].samples
        found, _ = samples(url, self._kinds)
        if len(found) != count:
            raise DataError(
                f"got {url} with {len(found)} samples, of which {self.index} tells {count}; delete the index to make "
                "it anew, if the shard is meant to have changed"
            )
        for sample in found:
            self._check_members(sample)
        return found

    def _check_members(self, sample: Sample) -> None:
        """Raise DataError, naming the sample, if it lacks what the kind of data, or a label, needs."""
        known = KINDS[self.kind]
        if not sample.members.keys() & set(known):
            raise DataError(
                f"got {_name(sample)} with {sorted(sample.members)}, expected {' or '.join(known)} for the kind "
                f"{self.kind}; check data.kind"
            )
        if self.num_classes and not sample.members.keys() & {"cls", "json"}:
            raise DataError(
                f"got no label of {_name(sample)}, expected .cls or .json; set num_classes=0 for data without labels"
            )

    def _array(self, sample: Sample) -> NDArray[Any]:
        """Return the decoded image (3, R, R) uint8, or the array as it is stored."""
        name = _name(sample)
        content = next(sample.members[word] for word in KINDS[self.kind] if word in sample.members)
        if self.data_are_images:
            return np.ascontiguousarray(centre_crop(decode(content, name), self._resolution).transpose(2, 0, 1))
        values = read_array(content, name, NPY_FLOATS)
        if values.ndim != 3 or not values.size or (self.kind == "moments" and values.shape[0] % 2):
            raise DataError(f"got an array of shape {values.shape} in {name}, expected {self.kind}")
        if self.kind == "moments":
            check_deviations(values, name)
        return values

    def _label(self, sample: Sample) -> int:
        if not self.num_classes:
            return 0
        if "cls" in sample.members:
            label: Any = label_in(sample.members["cls"])
        else:
            try:
                told = json.loads(sample.members["json"])
            except (ValueError, RecursionError):
                told = None
            label = told.get(self.label) if isinstance(told, dict) else None
        if label is None:
            raise DataError(
                f"got no label of {_name(sample)}, expected a whole number in digits in .cls, or as {self.label!r} in "
                ".json; set num_classes=0 for data without labels"
            )
        return check_label(label, self.num_classes, _name(sample))

    def _statistics_rows(self) -> NDArray[np.int64]:
        """Return samples of whole shards, which are drawn: others would need all of them to be read."""
        shards = Draws(0).permutation("statistics", len(self._counts))
        enough = int(np.searchsorted(np.cumsum(self.order.counts[shards]), SURVEYED)) + 1
        rows = [np.arange(self._ends[shard] - self.order.counts[shard], self._ends[shard]) for shard in shards[:enough]]
        return np.concatenate(rows)[:SURVEYED]

    @cached_property
    def _contents(self) -> Mapping[str, Any]:
        listed = [(name_of(url), count.samples, count.size) for url, count in zip(self.urls, self._counts, strict=True)]
        return {
            "shards": len(self.urls),
            "order": {"window": self.order.window, "lanes": self.order.lanes, "lane_batch": self.order.run},
            "flip": self.flip,
            "sha256": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
            "sha256_of": "names, numbers of samples and sizes of the shards; neither contents nor labels",
        }


def _name(sample: Sample) -> str:
    return f"{sample.key} in {sample.url}"


def _check(kind: Any, resolution: Any, scale: Any, flip: Any) -> None:
    """Check what depends on the kind; raises InputError or InputTypeError."""
    if kind not in KINDS:
        raise InputError(f"got kind {kind!r}, expected {', '.join(KINDS)}")
    if not isinstance(flip, bool) or not (resolution is None or type(resolution) is int):
        raise InputTypeError(f"got flip {flip!r} and resolution {resolution!r}, expected a truth and a whole number")
    if kind == "images" and scale is not None:
        raise InputError(f"got scale {scale} for images, expected none: they are brought to [−1, 1]")
    if kind != "images" and (flip or resolution is not None):
        raise InputError(
            f"got flip {flip} and resolution {resolution} for {kind}, expected neither: a flipped latent is none of a "
            "flipped image"
        )
    if resolution is not None and resolution < 1:
        raise InputError(f"got resolution {resolution}, expected 1 or more")


def _check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if type(count) is not int:
            raise InputTypeError(f"got {name} {count!r}, expected a whole number")
        if count < 1:
            raise InputError(f"got {name} {count}, expected 1 or more")
