"""Image files in tar archives, one or several shards, read from inside of them."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from pathline.core.errors import DataError
from pathline.data.decode import is_image
from pathline.data.sources.base import check_options, registry
from pathline.data.sources.encoded import EncodedSource
from pathline.data.sources.files import as_path, read_part, size_of
from pathline.data.sources.keys import (
    LABEL_BYTES,
    TABLE,
    Labels,
    check_member,
    check_repetition,
    check_table,
    label_in,
    labels_of,
    numbered,
)

__all__ = ["DAMAGED", "Header", "Tar", "plain_files"]

_BLOCK = 512
_HEADER_LIMIT = 2**16  # bytes of one that extends another; names and attributes take a few thousand
_EXTENDING = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
DAMAGED = (tarfile.TarError, OSError, ValueError, EOFError, RecursionError, OverflowError)


class Header(tarfile.TarInfo):
    """A member's header, as ``tarfile.open(tarinfo=…)`` takes one: none that has more read than 64 KiB is followed.

    What extends a header is read whole by Python's own, whatever size it claims, and maps of sparse files as well.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Return the header that 512 bytes are; raises ReadError for a sparse file's, and one that extends too far."""
        header = super().frombuf(buf, encoding, errors)
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"{header.name} is sparse")
        if header.type in _EXTENDING and not 0 <= header.size <= _HEADER_LIMIT:
            raise tarfile.ReadError(f"it has a header of {header.size} bytes, expected {_HEADER_LIMIT} or fewer")
        return header

    def _proc_gnusparse_10(self, *args: Any) -> None:
        raise tarfile.ReadError(f"a member is sparse, told by {self.name}")


class _Place(NamedTuple):
    shard: int
    offset: int
    size: int


@registry.register("tar")
class Tar(EncodedSource):
    """Tar archives of images, not compressed. They are looked through once; nothing is extracted.

    Labels are those of files ``*.cls`` beside the images, a whole number in digits each, as WebDataset has them: the
    two share folder and name, up to the first dot. Without such files they are had as those of a folder, by a
    ``dataset.json`` or by the topmost folders, through all shards.

    Args:
        path: an archive, or a folder of ``*.tar`` files; those whose names begin with a dot are left alone.
        root: folder in the archives whose content is meant.
        exif: whether the orientation that a camera noted is applied.

    Raises:
        DataError: a damaged, truncated or compressed archive, one without images, or with members that are links or
            devices, or named so that they would lie outside; labels that do not belong to the images.
        InputTypeError: an option of another type.
    """

    kind: ClassVar[str] = "tar"

    def __init__(self, path: str, *, root: str = "", exif: bool = False) -> None:
        check_options(bool, exif=exif)
        check_options(str, root=root)
        self.shards = _shards(as_path(path))
        below = f"{root.strip('/')}/" if root.strip("/") else ""
        members = [(name.removeprefix(below), place) for name, place in self._members() if name.startswith(below)]
        check_repetition(sorted(name for name, _ in members), str(path))
        inside = dict(members)
        keys = sorted(name for name in inside if is_image(name))
        self._where = np.array([inside[key] for key in keys], np.int64).reshape(-1, 3)
        files = [(shard.name, size_of(shard)) for shard in self.shards]
        super().__init__(Path(path), keys, self._labels(keys, inside, str(path)), exif=exif, files=files)

    def content(self, index: int) -> bytes:
        """Return a member's bytes."""
        return self._read(_Place(*self._where[index].tolist()), self.keys[index])

    def name(self, index: int) -> str:
        """Return a member's name and its shard."""
        return f"{self.keys[index]} of {self.shards[self._where[index, 0]]}"

    def _members(self) -> Iterator[tuple[str, _Place]]:
        for number, shard in enumerate(self.shards):
            for name, offset, size in _files_of(shard):
                yield name, _Place(number, offset, size)

    def _read(self, place: _Place, name: str) -> bytes:
        shard = self.shards[place.shard]
        return read_part(shard, place.offset, place.size, f"{name} of {shard}")

    def _labels(self, keys: Sequence[str], inside: Mapping[str, _Place], where: str) -> Labels:
        beside = {_stem(name): name for name in inside if name.endswith(".cls")}
        if not beside or not keys:
            table = self._table(inside[TABLE], len(keys)) if TABLE in inside else None
            if table is None:
                self._check_classes(keys, where)
            return labels_of(keys, table, where)
        stems = [_stem(key) for key in keys]
        check_repetition(sorted(stems), f"{where}, the ends of names left out")
        without, extra = sorted(set(stems) - beside.keys()), sorted(beside.keys() - set(stems))
        if without or extra:
            raise DataError(
                f"got {len(beside)} labels for {len(keys)} images in {where}: {len(without)} without a label "
                f"{without[:1]}, {len(extra)} labels without an image {extra[:1]}; pack the two together"
            )
        return numbered([self._label(inside[beside[stem]], beside[stem]) for stem in stems], where)

    def _table(self, place: _Place, count: int) -> bytes:
        check_table(place.size, count, str(self.shards[place.shard]))
        return self._read(place, TABLE)

    def _check_classes(self, keys: Sequence[str], where: str) -> None:
        """Check that no shard is a class, as each archive within ImageNet's is, whose images have its name in front."""
        names = [f"{shard.stem}_" for shard in self.shards]
        if len(names) > 1 and keys and all(map(str.startswith, keys, (names[shard] for shard in self._where[:, 0]))):
            raise DataError(
                f"got {where} with {len(names)} archives, each of images that are called after it as {keys[0]}, and no "
                f"labels, expected classes by folders; unpack each archive into a folder of its name, or add a {TABLE} "
                'of {"labels": null} if they are no classes'
            )

    def _label(self, place: _Place, name: str) -> int:
        label = label_in(self._read(place._replace(size=min(place.size, LABEL_BYTES + 1)), name))
        if label is None:
            raise DataError(
                f"got {name} of {self.shards[place.shard]}, {place.size} bytes, expected a whole number in digits"
            )
        return label


def _shards(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.glob("*.tar") if file.is_file() and not file.name.startswith("."))
    if not found:
        raise DataError(f"got no *.tar in {path}, expected some; check the path")
    return found


def _stem(name: str) -> str:
    """Return folder and name up to the first dot."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _files_of(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of each file of an archive, folders left out."""
    size = size_of(path)
    try:
        with tarfile.open(path, "r:", tarinfo=Header) as archive:
            for member in plain_files(archive, str(path)):
                yield _checked(member, path, size)
            end = archive.offset
    except DAMAGED as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"got {path}, which is no whole tar archive: {error}; copy it again, or take the compression off"
        ) from error
    if end + _BLOCK > size or any(read_part(path, end, _BLOCK, str(path))):  # a wrong header ends the list as well
        raise DataError(f"got {path}, which ends at byte {end} of {size} without a mark; it is damaged: copy it again")


def plain_files(archive: tarfile.TarFile, where: str) -> Iterator[tarfile.TarInfo]:
    """Yield the files of an archive as they come, folders left out; raises DataError for links, devices and holes."""
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]  # kept, a million would take a gigabyte
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise DataError(
                f"got the member {member.name} of {where}, which is a link, a device or sparse, expected files; make "
                "the archive anew with what it links to (tar --dereference --hard-dereference)"
            )
        yield member


def _checked(member: tarfile.TarInfo, path: Path, size: int) -> tuple[str, int, int]:
    name = member.name.removeprefix("./")
    check_member(name, str(path))
    if member.size < 0 or member.offset_data + member.size > size:
        raise DataError(
            f"got the member {name} of {path} of {member.size} bytes from {member.offset_data} on, in an archive of "
            f"{size}; it is truncated or forged: copy it again"
        )
    return name, member.offset_data, member.size
