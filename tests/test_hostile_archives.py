"""Archives that were made to do harm, or were damaged on their way: each is refused with its name, before any work."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import stat
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathline import DataError, data
from pathline.data import sources

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
OUTSIDE = ["../x.png", "/etc/x.png", "a/../../x.png", "..", "a\\..\\..\\x.png", "C:/x.png", "./../x.png"]


def png(pixels: np.ndarray = PIXELS) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims these sides."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(100)))]
    whole = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


def refusal(kind: str, path: Path, **options) -> str:
    with pytest.raises(DataError) as error:
        sources.build(kind, path=str(path), **options)
    assert path.name in str(error.value)
    return str(error.value)


def unreadable(kind: str, path: Path, index: int = 0) -> str:
    source = sources.build(kind, path=str(path))
    with pytest.raises(DataError) as error:
        source.read(index)
    assert source.keys[index] in str(error.value)
    return str(error.value)


@contextlib.contextmanager
def sparing(most: float = 5e6):
    """Check that what is done takes no more bytes than these at any moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name in ("set/a/1.png", "set/b/2.png", "out/secret.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    return tmp_path / "set"


@pytest.mark.parametrize(
    "target", ["../../out/secret.png", "../../out", "..", ".", "../b", "nothing.png", "x.png", "/etc"]
)
@pytest.mark.parametrize("name", ["a/x.png", "a/x"])
def test_links_out_of_a_folder_or_to_folders(target, name, folder):
    (folder / name).symlink_to(target)
    assert f"got the link {folder / name}" in refusal("folder", folder)


def test_a_class_folder_that_is_a_link(folder):
    (folder / "c").symlink_to(folder.parent / "out")
    assert "expected links to files below" in refusal("folder", folder)


def test_a_chain_of_links_is_followed_to_its_end(folder):
    (folder / "a" / "first.png").symlink_to("second.png")
    (folder / "a" / "second.png").symlink_to(folder.parent / "out" / "secret.png")
    assert "secret.png, expected links to files below" in refusal("folder", folder)


def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "a" / "x.png")
    assert "which is no file" in refusal("folder", folder)


def test_a_file_of_any_size_is_not_loaded(folder):
    with (folder / "a" / "1.png").open("wb") as file:
        file.truncate(2**31)
    with sparing():
        assert f"{2**31} bytes, expected {2**30} or fewer" in _read_error(sources.build("folder", path=str(folder)), 0)


def _read_error(source: sources.ImageSource, index: int) -> str:
    with pytest.raises(DataError) as error:
        source.read(index)
    return str(error.value)


# --- images that claim to be large -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
@pytest.mark.parametrize("sides", [(60000, 60000), (9500, 9500), (2**31 - 1, 1)])
def test_a_small_file_of_a_huge_image(kind, sides, tmp_path):
    place = tmp_path / {"folder": "x", "zip": "x.zip", "tar": "x.tar"}[kind]
    if kind == "folder":
        place.mkdir()
        (place / "bomb.png").write_bytes(png_of(*sides))
    elif kind == "zip":
        with zipfile.ZipFile(place, "w") as archive:
            archive.writestr("bomb.png", png_of(*sides))
    else:
        write_tar(place, [("bomb.png", png_of(*sides))])
    with sparing():
        assert "bomb.png" in unreadable(kind, place)
    with sparing(), pytest.raises(DataError, match=r"bomb\.png"):
        data.build("images", path=str(place), resolution=8).batch([0])


# --- zip -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path):
    file = tmp_path / "x.zip"
    with zipfile.ZipFile(file, "w") as opened:
        for name in ("a.png", "b.png"):
            opened.writestr(name, png())
    return file


@pytest.mark.parametrize("name", OUTSIDE)
def test_zip_members_that_lie_outside(name, archive):
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr(zipfile.ZipInfo(name), png())
    assert "expected a name below the archive's root" in refusal("zip", archive)


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_zip_members_that_are_no_files(mode, archive):
    info = zipfile.ZipInfo("link.png")
    info.external_attr = (mode | 0o777) << 16
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr(info, "../../secret.png")
    assert "got link.png of" in refusal("zip", archive)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_members_of_one_name(archive):
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("a.png", png(PIXELS[::-1]))
    assert "got a.png twice" in refusal("zip", archive)


def central(archive: Path, offset: int, value: bytes, member: int = 1) -> None:
    """Write into the archive's list at an offset of an entry: 8 flags, 16 CRC, 20 stored, 24 size, 42 place."""
    content = bytearray(archive.read_bytes())
    at = -1
    for _ in range(member + 1):
        at = content.index(b"PK\x01\x02", at + 1)
    content[at + offset : at + offset + len(value)] = value
    archive.write_bytes(content)


def test_encrypted_members(archive):
    central(archive, 8, b"\x01\x00")
    assert "got b.png of" in refusal("zip", archive) and "encrypted" in refusal("zip", archive)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_compression_that_has_no_bound(method, archive):
    with zipfile.ZipFile(archive, "a", method) as opened:
        opened.writestr("c.png", png())
    assert f"compressed by method {method}" in refusal("zip", archive)


@pytest.mark.parametrize(
    ("offset", "value"),
    [(24, 2**31), (20, 2**31), (24, 5), (42, 10**6)],
)
def test_forged_sizes_of_stored_members(offset, value, archive):
    central(archive, offset, struct.pack("<I", value))
    refusal("zip", archive)


def deflated(archive: Path, content: bytes, claimed: int | None) -> Path:
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("c.png", content)
    if claimed is not None:
        central(archive, 24, struct.pack("<I", claimed), member=2)
    return archive


def test_a_deflated_member_that_claims_more_than_the_limit(archive):
    deflated(archive, bytes(10), 2**32 - 2)
    with sparing():
        assert f"claims {2**32 - 2} bytes" in unreadable("zip", archive, 2)


def test_a_deflated_member_that_holds_more_than_it_claims(archive):
    bomb = deflated(archive, bytes(2**26), 1000)
    with sparing():
        assert "other bytes than the archive's list tells" in unreadable("zip", bomb, 2)


def test_a_deflated_member_that_holds_less(archive):
    assert "other bytes than" in unreadable("zip", deflated(archive, png(), 2000), 2)


def test_a_member_that_was_changed(archive):
    content = bytearray(archive.read_bytes())
    content[content.index(b"IDAT") + 9] ^= 1
    archive.write_bytes(content)
    assert "it is damaged" in unreadable("zip", archive)


def test_a_member_without_its_header(archive):
    content = archive.read_bytes()
    archive.write_bytes(b"PK\x03\x05" + content[4:])
    assert "got a.png of" in unreadable("zip", archive)


@pytest.mark.parametrize("share", [0, 0.2, 0.7, 0.99])
def test_a_truncated_zip(share, archive):
    content = archive.read_bytes()
    archive.write_bytes(content[: int(share * len(content))])
    assert "no whole zip archive" in refusal("zip", archive)


@pytest.mark.parametrize("seed", range(40))
def test_a_zip_with_wrong_bytes_anywhere(seed, archive):
    """Whatever is changed, nothing but a typed error comes of it, or the images themselves."""
    content = bytearray(archive.read_bytes())
    generator = np.random.default_rng(seed)
    for _ in range(4):
        content[generator.integers(len(content))] = generator.integers(256)
    archive.write_bytes(content)
    try:
        source = sources.build("zip", path=str(archive))
        assert all(np.array_equal(np.asarray(source.read(index)), PIXELS) for index in range(len(source)))
    except DataError as error:
        assert archive.name in str(error)


# --- tar -------------------------------------------------------------------------------------------------------------


def write_tar(file: Path, members, **options) -> Path:
    """Members are (name, content), or finished ones without content."""
    with tarfile.open(file, "w", **options) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return file


def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo("x.png")
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("name", OUTSIDE)
def test_tar_members_that_lie_outside(name, tmp_path):
    file = write_tar(tmp_path / "x.tar", [("a.png", png()), (name, png())])
    assert "expected a name below the archive's root" in refusal("tar", file)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (tarfile.SYMTYPE, "../../etc/passwd"),
        (tarfile.SYMTYPE, "a.png"),
        (tarfile.LNKTYPE, "/etc/passwd"),
        (tarfile.LNKTYPE, "a.png"),
        (tarfile.CHRTYPE, ""),
        (tarfile.BLKTYPE, ""),
        (tarfile.FIFOTYPE, ""),
    ],
)
def test_tar_members_that_are_no_files(kind, target, tmp_path):
    file = write_tar(tmp_path / "x.tar", [("a.png", png()), special(kind, target)])
    assert "a link, a device or sparse" in refusal("tar", file)


def test_sparse_members(tmp_path):
    file = write_tar(tmp_path / "x.tar", [("a.png", png())], format=tarfile.GNU_FORMAT)
    content = bytearray(file.read_bytes())
    content[156:157] = tarfile.GNUTYPE_SPARSE
    content[386:410] = b"00000000000\0" + b"00000000100\0"  # one piece
    content[483:495] = b"77777777777\0"  # of a file of 8 GiB
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    file.write_bytes(content)
    assert "a.png is sparse" in refusal("tar", file)


def tar_header(kind: bytes, size: int, name: str = "x") -> bytes:
    """A header in the form of GNU tar, whose size may have any sign."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def packed(kind: str, path: Path, start: bytes, block: bytes, count: int) -> Path:
    """A file of few bytes on the disk that begins so and goes on with copies of a block: with holes, or compressed."""
    file = path / "x.tar.gz" if kind == "cifar" else path / "x.tar"
    if kind == "cifar":
        with gzip.open(file, "wb", 1) as opened:
            opened.write(start)
            for _ in range(count):
                opened.write(block)
    else:
        file.write_bytes(start + block)
        os.truncate(file, len(start) + len(block) * count)
    return file


EXTENDING = {
    "pax": tarfile.XHDTYPE,
    "pax of Solaris": tarfile.SOLARIS_XHDTYPE,
    "pax of all": tarfile.XGLTYPE,
    "long name": tarfile.GNUTYPE_LONGNAME,
    "long link": tarfile.GNUTYPE_LONGLINK,
}


@pytest.mark.parametrize("kind", ["tar", "cifar"])
@pytest.mark.parametrize("extending", EXTENDING)
@pytest.mark.parametrize("size", [2**26, 2**16 + 1, -512])
def test_headers_that_would_be_read_whole(kind, extending, size, tmp_path):
    """A size below zero reads to the end of the file."""
    start = tar_header(EXTENDING[extending], size)
    file = packed(kind, tmp_path, start, b"A" * 2**20, 64)
    with sparing():
        assert f"header of {size} bytes, expected 65536 or fewer" in refusal(kind, file)


@pytest.mark.parametrize("kind", ["tar", "cifar"])
def test_long_names_that_are_none_too_long(kind, tmp_path):
    """As tar's programs write them, in either form."""
    name, content, options = ("a.png", png(), {})
    if kind == "cifar":
        name, content, options = ("test_batch.bin", RECORDS, {"split": "test"})
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        file = write_tar(tmp_path / "x.tar", [(f"{'n' * 4000}/{name}", content)], format=form)
        assert len(sources.build(kind, path=str(file), **options)) == (3 if kind == "cifar" else 1)


@pytest.mark.parametrize("kind", ["tar", "cifar"])
def test_maps_of_sparse_files_are_not_read(kind, tmp_path):
    """The form GNU 1.0, whose map lies where the content should, and is as long as it says."""
    records = [b"22 GNU.sparse.major=1\n", b"22 GNU.sparse.minor=0\n"]
    extending = b"".join(records).ljust(512, b"\0")
    start = tar_header(tarfile.XHDTYPE, sum(map(len, records))) + extending + tar_header(tarfile.REGTYPE, 2**26)
    whole = start + b"9999999\n" + b"1\n" * 2**20 + bytes(2**12)
    file = tmp_path / "x.tar"
    file.write_bytes(gzip.compress(whole) if kind == "cifar" else whole)
    with sparing():
        assert "sparse" in refusal(kind, file)


def test_maps_of_the_old_sparse_files_are_not_read(tmp_path):
    content = bytearray(tar_header(tarfile.GNUTYPE_SPARSE, 0))
    content[482] = 1  # goes on in the next block
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content)
    block = (b"00000000001\0" * 42).ljust(504, b"\0") + b"\1" + bytes(7)
    with sparing():
        refusal("cifar", packed("cifar", tmp_path, bytes(content), block * 2**11, 64))


def test_a_small_archive_of_many_members(tmp_path):
    """Of CIFAR, compressed: a million folders take 2 MB on the disk."""
    file = packed("cifar", tmp_path, b"", tar_header(tarfile.DIRTYPE, 0) * 2**10, 9)
    with sparing(2e6):
        assert "in their binary version" in refusal("cifar", file)


def test_a_compressed_archive_of_folders_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("pathline.data.sources.cifar._ARCHIVE_BYTES", 2**20)
    file = packed("cifar", tmp_path, b"", tar_header(tarfile.DIRTYPE, 0) * 2**10, 3)
    assert f"{2**20} bytes in all" in refusal("cifar", file)


def test_names_of_classes_are_not_read_without_end(tmp_path):
    members = [("test_batch.bin", RECORDS), ("batches.meta.txt", b"a " * 2**23)]
    whole = write_tar(tmp_path / "x.tar", members).read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(whole, 1))
    with sparing(40e6):  # of 2^23 texts, which would take 500 MB
        assert sources.build("cifar", path=str(tmp_path / "x.tar.gz"), split="test").class_names == list("0123456789")


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_tables_larger_than_labels_can_be(kind, tmp_path):
    """JSON of a few bytes an entry takes twenty times as much in memory, and nearly nothing in a zip."""
    most = 2**20 + 512 * 2
    for extra, refused in ((1, True), (0, False)):
        table = b'{"labels": null, "x": [' + b"[], " * 10 + b"0]}"
        table = table.ljust(most + extra)
        place = tmp_path / f"{extra}" / {"folder": "x", "zip": "x.zip", "tar": "x.tar"}[kind]
        place.parent.mkdir()
        members = [("a.png", png()), ("b.png", png()), ("dataset.json", table)]
        if kind == "folder":
            place.mkdir()
            for name, content in members:
                (place / name).write_bytes(content)
        elif kind == "zip":
            with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in members:
                    archive.writestr(name, content)
        else:
            write_tar(place, members)
        if refused:
            with sparing(5e5):
                assert f"{most + 1} bytes, expected {most} or fewer for 2 images" in refusal(kind, place)
        else:
            assert len(sources.build(kind, path=str(place))) == 2


def test_a_tar_cut_anywhere(tmp_path):
    """In a header, in an image, and between two members, where nothing but the missing mark at the end tells."""
    file = write_tar(tmp_path / "x.tar", [(f"{number}.png", png()) for number in range(3)])
    content = file.read_bytes()
    end = 3 * (512 + -(-len(png()) // 512) * 512)
    for cut in [*range(0, end, 128), end, end + 511]:
        file.write_bytes(content[:cut])
        refusal("tar", file)
    file.write_bytes(content[: end + 512])
    assert len(sources.build("tar", path=str(file))) == 3


def test_a_tar_with_a_damaged_header_in_the_middle(tmp_path):
    file = write_tar(tmp_path / "x.tar", [(f"{number}.png", png()) for number in range(3)])
    content = bytearray(file.read_bytes())
    content[len(content[: content.index(b"1.png")]) + 100] ^= 1
    file.write_bytes(content)
    assert "it is damaged" in refusal("tar", file) or "no whole tar" in refusal("tar", file)


@pytest.mark.parametrize("kind", ["tar", "cifar"])
@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + bytes(3) + b"\x7f" * 8, b"\xff" * 10 + b"\xfe\0"])
def test_forged_sizes_in_tar(size, kind, tmp_path):
    """Eight GiB, more than any disk, and -512, by which a reader would find the same member again for ever."""
    file = write_tar(tmp_path / "x.tar", [("a.png", png()), ("b.png", png())])
    content = bytearray(file.read_bytes())
    at = content.index(b"b.png")
    content[at + 124 : at + 136] = size
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    file.write_bytes(content)
    with sparing():
        refusal(kind, file)


@pytest.mark.parametrize("end", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_named(end, tmp_path):
    file = tmp_path / "x.tar"
    with tarfile.open(file, f"w:{end}") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    assert "take the compression off" in refusal("tar", file)


@pytest.mark.parametrize("content", [b"", b"no archive" * 100, bytes(300)])
def test_what_is_no_tar(content, tmp_path):
    (tmp_path / "x.tar").write_bytes(content)
    refusal("tar", tmp_path / "x.tar")


# --- arrays ----------------------------------------------------------------------------------------------------------


def npz(file: Path, header: bytes, body: bytes, *, name: str = "arr_0.npy", method=zipfile.ZIP_STORED) -> Path:
    """An array of a given header, forged or not."""
    with zipfile.ZipFile(file, "a", method) as archive:
        archive.writestr(name, header + body)
    return file


def header_of(text: str, version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(text) + 1)
    return b"\x93NUMPY" + bytes((version, 0)) + length + text.encode("latin1") + b"\n"


SHAPE = "{'descr': '|u1', 'fortran_order': False, 'shape': %s, }"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    "header",
    [
        header_of(SHAPE % "(2, 5, 7, 300)"),
        header_of(SHAPE % "(1000000000000, 5, 7, 3)"),
        header_of(SHAPE % "(1, 5, 7, 3)"),
        header_of(SHAPE % "(-2, -5, 7, 3)"),
        header_of(SHAPE % "(True, 30, 7, 1)"),
        header_of(SHAPE % "(2.0, 5, 7, 3)"),
        header_of(SHAPE % "210"),
        header_of(SHAPE.replace("False", "True") % "(2, 5, 7, 3)"),
        header_of(SHAPE.replace("|u1", "|O") % "(2, 5, 7, 3)"),
        header_of(SHAPE.replace("'|u1'", "[('a', '|O')]") % "(2, 5, 7, 3)"),
        header_of(SHAPE.replace("'|u1'", "__import__('os').system('false')") % "(2, 5, 7, 3)"),
        header_of("[" * 5000),
        header_of(SHAPE % "(2, 5, 7, 3)" + " " * 20000, version=2),
        header_of(SHAPE % "(2, 5, 7, 3)", version=3)[:6] + b"\x09\x00" + b"\x10\x00{}",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
        b"\x93NUMPY\x01\x00",
        b"",
        b"\x80\x04\x95\x0b\x00",  # a pickle
    ],
)
def test_forged_headers_of_arrays(header, method, tmp_path):
    file = npz(tmp_path / "x.npz", header, bytes(2 * 5 * 7 * 3), method=method)
    with sparing():
        assert "got arr_0.npy of" in refusal("npz", file)


def test_an_unforged_header_is_read(tmp_path):
    file = npz(tmp_path / "x.npz", header_of(SHAPE % "(2, 5, 7, 3)"), bytes(210))
    assert len(sources.build("npz", path=str(file))) == 2


@pytest.mark.parametrize("name", ["arr_0.npy", "arr_1.npy"])
def test_arrays_of_objects_are_never_unpickled(name, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    arrays = {"arr_0": np.zeros((1, 5, 7, 3), np.uint8), "arr_1": np.zeros(1, int)}
    arrays[name.removesuffix(".npy")] = np.array([Trap()], object)
    np.savez(tmp_path / "x.npz", **arrays)
    assert "which may hold code" in refusal("npz", tmp_path / "x.npz")
    assert not (tmp_path / "sprung").exists()


def test_a_compressed_array_that_holds_more_than_it_claims(tmp_path):
    header = header_of(SHAPE % "(2, 5, 7, 3)")
    file = npz(tmp_path / "x.npz", header, bytes(2**26), method=zipfile.ZIP_DEFLATED)
    central(file, 24, struct.pack("<I", len(header) + 210), member=0)
    with sparing():
        assert "other bytes than the archive's list tells" in refusal("npz", file)


def test_a_compressed_array_that_was_changed(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", np.zeros((7, 5, 8, 3), np.uint8))
    central(tmp_path / "x.npz", 16, b"\0\1\2\3", member=0)
    assert "it is damaged" in refusal("npz", tmp_path / "x.npz")


def test_a_compressed_array_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("pathline.data.sources.npz.LIMIT", 900)
    np.savez_compressed(tmp_path / "x.npz", np.zeros((7, 5, 8, 3), np.uint8))
    assert "expected 900 or fewer" in refusal("npz", tmp_path / "x.npz")


def test_a_truncated_npz(tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros((7, 5, 8, 3), np.uint8))
    content = (tmp_path / "x.npz").read_bytes()
    for share in (0, 0.3, 0.9):
        (tmp_path / "x.npz").write_bytes(content[: int(share * len(content))])
        refusal("npz", tmp_path / "x.npz")


def test_a_file_that_shrinks_while_it_is_used(tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros((7, 5, 8, 3), np.uint8))
    source = sources.build("npz", path=str(tmp_path / "x.npz"))
    with (tmp_path / "x.npz").open("r+b") as file:
        file.truncate(500)
    assert "is truncated: copy it again" in _read_error(source, 6)
    assert source.read(1).size == (8, 5)


# --- IDX -------------------------------------------------------------------------------------------------------------


def idx(sizes: tuple[int, ...], body: bytes, magic: bytes | None = None) -> bytes:
    return (magic or bytes((0, 0, 8, len(sizes)))) + struct.pack(f">{len(sizes)}I", *sizes) + body


IMAGES, LABELS = idx((4, 5, 7), bytes(140)), idx((4,), bytes(4))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (
            idx((5, 5, 7), bytes(140)),
            LABELS,
            "sizes (5, 5, 7), none of which may be 0, and 140 bytes behind them, expected 175",
        ),
        (idx((3, 5, 7), bytes(140)), LABELS, "bytes behind them, expected 105"),
        (idx((2**32 - 1,) * 3, bytes(140)), LABELS, "truncated or forged"),
        (idx((4, 0, 7), b""), LABELS, "truncated or forged"),
        (idx((0, 5, 7), b""), idx((0,), b""), "truncated or forged"),
        (idx((4, 5, 7), bytes(140), b"\0\0\x0d\x03"), LABELS, "begins with 00000d03"),
        (LABELS, LABELS, "begins with 00000801 and has"),
        (IMAGES[:9], LABELS, "has 9 bytes of a header, expected 00000803 and 16"),
        (b"", LABELS, "begins with "),
        (IMAGES, idx((3,), bytes(3)), "got 3 labels in"),
        (IMAGES, idx((5,), bytes(5)), "got 5 labels in"),
        (IMAGES, idx((4,), bytes(3)), "truncated or forged"),
        (IMAGES, IMAGES, "begins with 00000803 and has"),
    ],
)
def test_idx_files_whose_headers_lie(images, labels, said, pack, tmp_path):
    end = ".gz" if pack is gzip.compress else ""
    (tmp_path / f"train-images-idx3-ubyte{end}").write_bytes(pack(images))
    (tmp_path / f"train-labels-idx1-ubyte{end}").write_bytes(pack(labels))
    with pytest.raises(DataError) as error:
        sources.build("idx", path=str(tmp_path))
    assert said in str(error.value) and "-ubyte" in str(error.value)


@pytest.mark.parametrize(
    "content", [gzip.compress(IMAGES)[:-9], b"no gzip", gzip.compress(IMAGES)[:12]], ids=["tail", "none", "head"]
)
def test_damaged_gzip(content, tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(LABELS))
    assert "cannot be read" in refusal("idx", tmp_path / "train-images-idx3-ubyte.gz")


def test_gzip_that_grows_beyond_its_header(tmp_path):
    bomb = gzip.compress(IMAGES + bytes(10**8), 1)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(bomb)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(LABELS))
    with sparing():
        assert "at least 141 bytes behind them, expected 140" in refusal("idx", tmp_path / "train-images-idx3-ubyte.gz")


def test_compressed_images_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("pathline.data.sources.idx.LIMIT", 139)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(IMAGES))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(LABELS))
    assert "compressed ones up to 139" in refusal("idx", tmp_path / "train-images-idx3-ubyte.gz")


# --- CIFAR -----------------------------------------------------------------------------------------------------------

RECORDS = b"".join(bytes((number,)) + bytes(3072) for number in range(3))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (RECORDS[:-1], "got test_batch.bin of 9218 bytes"),
        (b"", "got test_batch.bin of 0 bytes"),
        (RECORDS[:3073] + b"\x0a" + bytes(3072), "got a label 10"),
        (RECORDS + b"\0", "expected records of 3073 bytes"),
    ],
)
def test_cifar_files_that_are_damaged(content, said, tmp_path):
    (tmp_path / "test_batch.bin").write_bytes(content)
    assert said in refusal("cifar", tmp_path, split="test")


def test_a_missing_part_of_cifar(tmp_path):
    for number in (1, 2, 4, 5):
        (tmp_path / f"data_batch_{number}.bin").write_bytes(RECORDS)
    assert "got data_batch_3.bin of 0 bytes" in refusal("cifar", tmp_path)


@pytest.mark.parametrize(
    "member", [special(tarfile.SYMTYPE, "/etc/passwd"), special(tarfile.LNKTYPE, "a"), ("../x.bin", b"")]
)
def test_an_archive_of_cifar_that_reaches_outside(member, tmp_path):
    file = write_tar(tmp_path / "x.tar", [("cifar/test_batch.bin", RECORDS), member])
    refusal("cifar", file, split="test")


def test_an_archive_of_cifar_that_is_too_large_or_cut(tmp_path, monkeypatch):
    file = tmp_path / "x-binary.tar.gz"
    whole = gzip.compress(write_tar(tmp_path / "x.tar", [("c/test_batch.bin", RECORDS)]).read_bytes())
    file.write_bytes(whole)
    assert len(sources.build("cifar", path=str(file), split="test")) == 3
    for share in (0, 0.2, 0.6):
        file.write_bytes(whole[: int(share * len(whole))])
        refusal("cifar", file, split="test")
    file.write_bytes(whole)
    monkeypatch.setattr("pathline.data.sources.cifar._ARCHIVE_BYTES", 9000)
    assert "expected plain files, 9000 bytes in all" in refusal("cifar", file, split="test")


def test_pickles_of_cifar_are_not_opened(tmp_path):
    write_tar(tmp_path / "x.tar", [("cifar-10-batches-py/data_batch_1", b"\x80\x02}q\x00.")])
    assert "in their binary version" in refusal("cifar", tmp_path / "x.tar")
