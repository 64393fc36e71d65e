"""Image files in a zip archive, read from inside of it."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from pathline.core.errors import DataError
from pathline.data.decode import is_image
from pathline.data.sources.base import check_options, registry
from pathline.data.sources.encoded import EncodedSource
from pathline.data.sources.files import LIMIT, as_path, read_part, size_of
from pathline.data.sources.keys import TABLE, check_member, check_repetition, check_table, labels_of

__all__ = ["Member", "Zip", "content_of", "data_start", "members_of"]

_HEADER = 30  # bytes in front of a member's name, whose last four tell the lengths of name and extra field
_DAMAGED = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, EOFError)


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
        name: of it.
        offset: where its own header begins.
        stored: bytes that it takes in the archive.
        size: bytes that it holds.
        crc: CRC-32 of these.
        deflated: whether it is compressed.
    """

    name: str
    offset: int
    stored: int
    size: int
    crc: int
    deflated: bool


@registry.register("zip")
class Zip(EncodedSource):
    """A zip archive of images, members stored or deflated, as EDM2's tools write one. Nothing is extracted.

    Labels are had as those of a folder, by a ``dataset.json`` or by the topmost folders.

    Args:
        path: of the archive.
        root: folder in the archive whose content is meant.
        exif: whether the orientation that a camera noted is applied.

    Raises:
        DataError: a damaged archive, one without images, or with members that are links, encrypted, or named so that
            they would lie outside; labels that do not belong to the images.
        InputTypeError: an option of another type.
    """

    kind: ClassVar[str] = "zip"

    def __init__(self, path: str, *, root: str = "", exif: bool = False) -> None:
        check_options(bool, exif=exif)
        check_options(str, root=root)
        file, below = as_path(path), f"{root.strip('/')}/" if root.strip("/") else ""
        inside = {
            member.name.removeprefix(below): member for member in members_of(file) if member.name.startswith(below)
        }
        keys = sorted(key for key in inside if is_image(key))
        self._where = np.array([inside[key][1:] for key in keys], np.int64)  # a fifth of what members take
        self._below = below
        if TABLE in inside:
            check_table(inside[TABLE].size, len(keys), str(path))
        table = content_of(file, inside[TABLE]) if TABLE in inside else None
        super().__init__(file, keys, labels_of(keys, table, str(path)), exif=exif, files=[(file.name, size_of(file))])

    def content(self, index: int) -> bytes:
        """Return a member's bytes."""
        offset, stored, size, crc, deflated = self._where[index].tolist()
        name = self._below + self.keys[index]
        return content_of(self.path, Member(name, offset, stored, size, crc, bool(deflated)))


def members_of(path: Path) -> list[Member]:
    """Return the files of an archive, folders left out.

    Raises:
        DataError: no zip archive, or one with a member that is a link, encrypted, repeated, compressed in a way that
            only few programs know, larger than the archive or the limit allow, or named as if it lay outside.
    """
    size = size_of(path)
    try:
        with zipfile.ZipFile(path) as archive:
            found = [_member(info, path, size) for info in archive.infolist() if not info.is_dir()]
    except _DAMAGED as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"got {path}, which is no whole zip archive: {error}; copy it again") from error
    check_repetition(sorted(member.name for member in found), str(path))
    return found


def data_start(path: Path, member: Member) -> int:
    """Return where the bytes of a member begin: after its own header, a name and an extra field.

    Raises:
        DataError: there is no header.
    """
    header = read_part(path, member.offset, _HEADER, f"{member.name} of {path}")
    if header[:4] != b"PK\x03\x04":
        raise DataError(f"got {member.name} of {path} without a header; the archive is damaged: copy it again")
    name, extra = struct.unpack("<HH", header[26:])
    return member.offset + _HEADER + int(name) + int(extra)


def content_of(path: Path, member: Member) -> bytes:
    """Return what a member holds; raises DataError if that is not what the archive's list tells, or too large."""
    name = f"{member.name} of {path}"
    if member.size > LIMIT:
        raise DataError(f"got {name}, which claims {member.size} bytes, expected {LIMIT} or fewer; leave it out")
    content = read_part(path, data_start(path, member), member.stored, name)
    try:
        if member.deflated:  # one byte more than claimed is enough to tell a false claim
            content = zlib.decompressobj(-15).decompress(content, member.size + 1)
    except zlib.error as error:
        raise DataError(f"got {name}, which cannot be decompressed: {error}; copy the archive again") from error
    if len(content) != member.size or zlib.crc32(content) != member.crc:
        raise DataError(f"got {name} with other bytes than the archive's list tells; it is damaged: copy it again")
    return content


def _member(info: zipfile.ZipInfo, path: Path, size: int) -> Member:
    check_member(info.filename, str(path))
    name = f"{info.filename} of {path}"
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        raise DataError(f"got {name}, which is a link or a device, expected files; make the archive anew")
    if info.flag_bits & 1:
        raise DataError(f"got {name}, which is encrypted; make the archive anew without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"got {name}, compressed by method {info.compress_type}, expected stored or deflated members")
    stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size
    if stored or info.header_offset + _HEADER + info.compress_size > size:
        raise DataError(
            f"got {name} of {info.file_size} bytes, stored in {info.compress_size} from {info.header_offset} on, in an "
            f"archive of {size}; it is truncated or forged: copy it again"
        )
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    return Member(info.filename, info.header_offset, info.compress_size, info.file_size, info.CRC, deflated)
