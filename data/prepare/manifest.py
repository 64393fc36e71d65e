"""What a folder of prepared data tells of itself: ``manifest.json``, with the request that its contents answer.

C channels, h rows and w columns of a latent, R side of an image.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pathline.core.errors import DataError
from pathline.data.features import EncoderManifest
from pathline.data.prepare.columns import FEATURES, FLIPPED, MAIN, Column, Natural, Positive, Strict

__all__ = [
    "FORMAT",
    "MANIFEST",
    "MOMENTS",
    "Channels",
    "Dropped",
    "Features",
    "Manifest",
    "Request",
    "Scaling",
    "Shard",
    "parse",
    "read_manifest",
    "shard_name",
]

FORMAT: Final = "pathline packed 1"
MANIFEST = "manifest.json"
MOMENTS: Final = "mean, std"  # what the halves of ``moments`` are
_LIMIT = 2**26  # bytes of a manifest
Hash = Annotated[str, Field(pattern=r"[0-9a-f]{64}")]
Model = TypeVar("Model", bound=BaseModel)


class Shard(Strict):
    """A file: it holds the images from ``first_index`` on, counted through all that were asked for."""

    file: str
    rows: Positive
    bytes: Positive
    sha256: Hash
    first_index: Natural


class Dropped(Strict):
    """An image that was left out: its number and key in the source, and why."""

    index: Natural
    key: str
    reason: str


class Channels(Strict):
    """Figures of each channel of a column as it is stored, over all rows; ``count`` values a channel.

    ``std`` is that of a sample, of count − 1.
    """

    count: Positive
    mean: list[float]
    std: list[Annotated[float, Field(ge=0)]]
    low: list[float]
    high: list[float]


class Scaling(NamedTuple):
    """How latents of an autoencoder become those of a model: (z − mean)/std, channel by channel."""

    mean: list[float]
    std: list[float]


class _Scaling(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)
    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]


class Features(Strict):
    """An encoder whose tokens are stored: its entry in a configuration, and what it tells of itself."""

    component: dict[str, Any]
    encoder: EncoderManifest


class Request(Strict):
    """All that the contents of the shards are a function of.

    Attributes:
        source: what the source of images tells of itself, with the hash of its keys and labels.
        class_names: sorted; label i is that of the i-th. Empty without labels.
        count: number of images asked for: all, or ``limit`` of them, chosen by ``seed``.
        crop: its algorithm, and Pillow's version, which does the resampling.
        autoencoder: what it tells of itself: weights, range of its inputs, scaling; None for pixels.
        encoded_together: images; another number would change the last bits of what networks give.
        creator: versions of what computed the contents.
    """

    source: dict[str, Any]
    class_names: list[str]
    count: Positive
    limit: Positive | None
    seed: Natural
    resolution: Positive
    crop: dict[str, str]
    flip: bool
    images: bool
    dtype: Literal["float16", "bfloat16", "float32"]
    rows_per_shard: Positive
    on_error: Literal["stop", "drop"]
    autoencoder: dict[str, Any] | None
    encoders: dict[str, Features]
    encoded_together: Positive
    device: str
    licence: str | None
    creator: dict[str, str]


class Manifest(Strict):
    """The manifest.

    Attributes:
        count: number of rows; with those dropped, ``request.count``.
        shape: (C, h, w) of a latent, or (3, R, R) of an image.
        latent_kind: ``moments`` of a posterior, to be drawn from at each visit; ``mean``, of an autoencoder without
            one; or ``images``.
        moments: what the halves of ``moments`` are; None for another kind.
        columns: of each shard, in their order in the file.
        statistics: of the main column, and of its mirror image.
        sha256: of all else that the manifest tells; it stands for the contents, whose hashes are among that.
    """

    format: Literal["pathline packed 1"]
    count: Positive
    shape: list[Positive]
    latent_kind: Literal["moments", "mean", "images"]
    moments: Literal["mean, std"] | None
    columns: dict[str, Column]
    shards: list[Shard]
    statistics: dict[str, Channels]
    dropped: list[Dropped]
    request: Request
    sha256: Hash

    @property
    def main(self) -> str:
        """Name of the column of data."""
        return MAIN[self.latent_kind]

    @property
    def class_names(self) -> list[str]:
        """Sorted; label i is that of the i-th. Empty without labels."""
        return self.request.class_names

    @property
    def scaling(self) -> Scaling | None:
        """Of the autoencoder; None for images."""
        told = self.request.autoencoder
        return None if told is None else Scaling(**_Scaling.model_validate(told.get("scaling")).model_dump())

    def sealed(self) -> Manifest:
        """Return the same with its hash."""
        return self.model_copy(update={"sha256": self._hash()})

    def problems(self) -> Iterator[str]:
        """Yield what contradicts itself."""
        if self.sha256 != self._hash():
            yield "other contents than its own hash: it was changed after it was written"
        rows, size = sum(shard.rows for shard in self.shards), self.request.rows_per_shard
        if self.count != rows or self.count + len(self.dropped) != self.request.count:
            yield (
                f"{self.count} rows, {rows} in its shards and {len(self.dropped)} images dropped, of "
                f"{self.request.count}"
            )
        before = -1
        for shard in self.shards:  # those of which all images were dropped are not among them
            number, rest = divmod(shard.first_index, size)
            if rest or number <= before or shard.file != shard_name(number) or shard.rows > size:
                yield f"{shard.file} of {shard.rows} rows from {shard.first_index} on, {size} a shard"
            before = number
        yield from self._column_problems()

    def _column_problems(self) -> Iterator[str]:
        channels, *sides = self.shape if len(self.shape) == 3 else (0,)
        stored = [2 * channels if self.latent_kind == "moments" else channels, *sides]
        ends = ("", FLIPPED) if self.request.flip else ("",)
        data = [self.main + end for end in (ends if self.latent_kind != "images" else ("",))]
        names = {*data, *(FEATURES + name + end for name in self.request.encoders for end in ends), "index"}
        names |= {name for name, there in (("labels", self.class_names), ("images", self.request.images)) if there}
        if names != self.columns.keys():
            yield f"the columns {', '.join(sorted(self.columns))}, expected {', '.join(sorted(names))}"
        elif any(self.columns[name].shape != stored for name in data):
            yield f"{self.main} of shape {self.columns[self.main].shape}, expected {stored}"
        for name, made in self.request.encoders.items():
            count, shapes = math.prod(made.encoder["grid"]), [self.columns[FEATURES + name + end].shape for end in ends]
            if len(shapes[0]) != 2 or shapes[0][0] != count or shapes[0] != shapes[-1]:
                yield f"features of {name} of shapes {shapes}, expected [{count}, D] of the grid {made.encoder['grid']}"
        told = [(it.mean, it.std, it.low, it.high) for it in self.statistics.values()]
        if sorted(self.statistics) != sorted(data) or any(len(values) != stored[0] for it in told for values in it):
            yield f"statistics of {', '.join(self.statistics)}, expected {stored[0]} channels of {', '.join(data)}"
        if (self.moments is not None) != (self.latent_kind == "moments"):
            yield f"moments {self.moments!r} of latent_kind {self.latent_kind}"
        if (self.request.autoencoder is None) != (self.latent_kind == "images"):
            yield f"latent_kind {self.latent_kind} with the autoencoder {self.request.autoencoder}"
        elif self.scaling is not None and not len(self.scaling.mean) == len(self.scaling.std) == channels:
            yield f"a scaling of other than {channels} channels"

    def _hash(self) -> str:
        told = self.model_dump(mode="json", exclude={"sha256"})
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def shard_name(number: int) -> str:
    """Return the name of a shard's file."""
    return f"shard-{number:05d}.safetensors"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder, and check it in itself; files are not looked at.

    Raises:
        DataError: there is none, it is of another version, or it is not what a manifest can be.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            f"got no {MANIFEST} in {folder}, expected a folder that python -m pathline.data.prepare has finished; run "
            "it, or again if it was interrupted"
        )
    content = _parsed(path)
    if content.get("format") != FORMAT:
        raise DataError(f"got {path} of format {content.get('format')!r}, expected {FORMAT!r}; use another pathline")
    try:
        manifest = parse(path, Manifest)
        found = next(manifest.problems(), None)
    except ValidationError as error:  # of its scaling
        found = f"a scaling that is none: {error.errors()[0]['msg']}"
    if found is not None:
        raise DataError(f"got {path} with {found}; prepare the data again")
    return manifest


def parse(path: Path, model: type[Model]) -> Model:
    """Read a JSON file as what a model describes; raises DataError if it is something else."""
    try:
        return model.model_validate(_parsed(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"got {path}, which cannot be read: {place}: {first['msg']}; prepare the data again") from error


def _parsed(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LIMIT:
            raise ValueError(f"it has more than {_LIMIT} bytes")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"got {path}, which cannot be read: {error}; prepare the data again") from error
    if not isinstance(content, dict):
        raise DataError(f"got {path} with a {type(content).__name__} in it, expected entries; prepare the data again")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("it has a key twice")
    return entries
