"""Samples on disk: every form is read to the same bytes, and what is damaged or forged is refused with its name."""

from __future__ import annotations

import hashlib
import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import pathline.metrics.samples
from pathline.core.errors import DataError, InputError
from pathline.metrics.samples import Samples, read_record, read_samples

SHAPE = (5, 7, 3)  # H, W, C


def levels(count, shape=SHAPE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def joined(samples, size, count=None):
    images, labels = zip(*samples.batches(size, count), strict=True)
    return torch.cat(images).permute(0, 2, 3, 1).numpy(), None if labels[0] is None else torch.cat(labels).tolist()


def shards(folder, images, labels, cuts, record=None):
    folder.mkdir()
    for number, (first, last) in enumerate(zip((0, *cuts), (*cuts, len(images)), strict=True)):
        np.savez(folder / f"shard-{number:05d}.npz", arr_0=images[first:last], arr_1=labels[first:last])
    if record is not None:
        (folder / "record.json").write_text(json.dumps(record))
    return folder


def refusal(path):
    with pytest.raises(DataError) as caught:
        joined(Samples.of(path), 4)
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- the same samples in every form ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 11, 50])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_batches_are_the_array_in_order(size, save, tmp_path):
    images, labels = levels(11), np.arange(11) % 4
    save(tmp_path / "a.npz", arr_0=images, arr_1=labels)
    (tmp_path / "a.json").write_text(json.dumps({"nfe": 5}))
    samples = Samples.of(tmp_path / "a.npz")
    assert (samples.count, samples.shape, samples.labelled) == (11, (3, 5, 7), True) and samples.record == {"nfe": 5}
    for count in (None, 7, 1):
        read, named = joined(samples, size, count)
        assert np.array_equal(read, images[:count]) and named == labels[:count].tolist()
    assert all(len(batch) <= size for batch, _ in samples.batches(size))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, ">i8"])
def test_labels_of_every_whole_type(dtype, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=levels(3), arr_1=np.array([2, 0, 7], dtype))
    assert joined(Samples.of(tmp_path / "a.npz"), 2)[1] == [2, 0, 7]


def test_files_of_adm_have_neither_labels_nor_a_record(tmp_path):
    np.savez(tmp_path / "a.npz", levels(3))  # positional arrays are named arr_0, arr_1, ...
    samples = Samples.of(tmp_path / "a.npz")
    assert not samples.labelled and samples.record == {} and joined(samples, 2)[1] is None


def test_shards_are_joined_in_order(tmp_path):
    images, labels = levels(11), np.arange(11) % 3
    folder = shards(tmp_path / "out.shards", images, labels, (2, 7), {"count": 11, "seed": 3})
    samples = Samples.of(folder)
    assert samples.count == 11 and samples.record["seed"] == 3 == read_record(folder)["seed"]
    for size, count in ((4, None), (4, 8), (1, 2), (50, 3)):
        read, named = joined(samples, size, count)
        assert np.array_equal(read, images[:count]) and named == labels[:count].tolist()


def test_small_sets_are_read_whole_as_values(tmp_path):
    images = levels(5, (2, 3, 1))
    np.savez(tmp_path / "a.npz", arr_0=images, arr_1=np.arange(5))
    x, labels = read_samples(tmp_path / "a.npz")
    assert x.shape == (5, 1, 2, 3) and labels.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(((x.double() + 1) * 127.5).round().permute(0, 2, 3, 1).numpy(), images)


def test_what_is_held_at_once_is_a_batch(tmp_path):
    images = levels(2000, (32, 32, 3))
    np.savez(tmp_path / "a.npz", arr_0=images)
    samples = Samples.of(tmp_path / "a.npz")
    tracemalloc.start()
    for _ in samples.batches(50):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < images.nbytes / 8


@pytest.mark.parametrize("count", [0, -1, 6])
def test_a_number_that_is_not_there(count, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=levels(5))
    with pytest.raises(InputError, match=f"got count {count} .* expected 1 to 5"):
        next(Samples.of(tmp_path / "a.npz").batches(2, count))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_samples_by_number_from_any_on(save, tmp_path):
    images, labels = levels(11), np.arange(11) % 4
    folder = shards(tmp_path / "out.shards", images, labels, (2, 7), {"count": 11})
    save(tmp_path / "a.npz", arr_0=images, arr_1=labels)
    for samples in (Samples.of(folder), Samples.of(tmp_path / "a.npz")):
        for first, last in ((0, 11), (1, 3), (2, 7), (5, 11), (10, 11)):
            read, named = zip(*samples.batches(3, last - first, first), strict=True)
            assert np.array_equal(torch.cat(read).permute(0, 2, 3, 1).numpy(), images[first:last])
            assert torch.cat(named).tolist() == labels[first:last].tolist()
        with pytest.raises(InputError, match="got count 7 .* expected 1 to 6"):
            next(samples.batches(3, 7, 5))


# --- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"count": 7}, "with count 11, and 7 by its record"),
        ({"bytes": 7}, "and 7 by its record"),
        ({"samples_sha256": hashlib.sha256(bytes(11 * 105)).hexdigest()}, "by their hash"),
    ],
)
@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_record_of_other_samples_is_not_believed(told, said, form, tmp_path):
    images, labels = levels(11), np.arange(11) % 4
    folder = shards(tmp_path / "a.shards", images, labels, (2, 7))
    np.savez(tmp_path / "a.npz", arr_0=images, arr_1=labels)
    path, record = (folder, folder / "record.json") if form == "folder" else (tmp_path / "a.npz", tmp_path / "a.json")
    files = sorted(folder.glob("*.npz")) if form == "folder" else [path]
    true = {
        "count": 11,
        "bytes": sum(file.stat().st_size for file in files),
        "samples_sha256": hashlib.sha256(images.tobytes()).hexdigest(),
    }
    record.write_text(json.dumps(true))
    assert np.array_equal(joined(Samples.of(path), 4)[0], images)
    record.write_text(json.dumps({**true, **told}))
    assert said in refusal(path)


# --- folders of images -----------------------------------------------------------------------------------------------


def test_a_folder_of_images_of_one_size(tmp_path):
    images = levels(3)
    for i in range(3):
        Image.fromarray(images[i]).save(tmp_path / f"{i:06d}.png")
    read, labels = joined(Samples.of(tmp_path), 2)
    assert np.array_equal(read, images) and labels is None
    Image.fromarray(levels(1, (7, 5, 3))[0]).save(tmp_path / "000003.png")
    assert "000003.png of shape (7, 5, 3)" in refusal(tmp_path)


# --- what is refused -------------------------------------------------------------------------------------------------


def header(shape, descr="|u1", fortran=False):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return stream.getvalue()


def forged(path, name, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"arr_2": levels(2)}, "without an array arr_0"),
        ({"arr_0": levels(2).astype(np.float32)}, "images float32"),
        ({"arr_0": levels(2)[0]}, r"expected uint8 (N, H, W, C)"),
        ({"arr_0": levels(2, (5, 7, 4))}, "of 4 channels"),
        ({"arr_0": levels(0)}, "got 0 images"),
        ({"arr_0": np.array([[[[None]]]])}, "no .npz of plain arrays: arr_0.npy holds objects"),
        ({"arr_0": levels(2), "arr_1": np.array([None, 1])}, "arr_1.npy holds objects"),
        ({"arr_0": np.asfortranarray(levels(2))}, "in the order of Fortran"),
        ({"arr_0": levels(2), "arr_1": np.zeros(2)}, "labels float64 (2,), expected 2 whole numbers"),
        ({"arr_0": levels(2), "arr_1": np.zeros((2, 1), int)}, "expected 2 whole numbers"),
    ],
)
def test_arrays_of_another_kind_are_refused(arrays, said, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    assert said in refusal(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "content",
    [
        header((10**9, 10**4, 10**4, 3)),
        header((2, 5, 7, 3)) + bytes(2 * 105 - 1),
        header((2, 5, 7, 3)) + bytes(2 * 105 + 1),
        header((-2, -5, 7, 3)) + bytes(2 * 105),
        b"\x93NUMPY\x07\x00" + bytes(200),
        b"\x93NUMPY\x01\x00\xff\xff{" + b"[" * 70_000,
        b"no array at all",
    ],
)
def test_a_forged_header_is_refused_before_anything_is_allocated(content, tmp_path):
    assert "no .npz of plain arrays" in refusal(forged(tmp_path / "a.npz", "arr_0.npy", content))


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_that_tells_more_than_it_can_hold_is_refused(packing, tmp_path):
    """The array's header and the sizes in the archive's agree; what is packed is a few bytes."""
    head = header((10**7, *SHAPE))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", packing) as archive:
        archive.writestr("arr_0.npy", head + bytes(105))
    held, told = ((len(head) + 105 * count).to_bytes(4, "little") for count in (1, 10**7))
    content = (tmp_path / "a.npz").read_bytes()
    assert content.count(held) == (4 if packing == zipfile.ZIP_STORED else 2)  # in the entry and in the directory
    (tmp_path / "a.npz").write_bytes(content.replace(held, told))
    assert f"tells {int.from_bytes(told, 'little')} bytes" in refusal(tmp_path / "a.npz")


@pytest.mark.parametrize("shape", [(1, 9_000, 9_000, 1), (2**27 + 1, 1, 1, 1)])
def test_what_would_not_fit_is_refused_although_a_small_file_holds_it(shape, tmp_path):
    """The values are there, deflated a thousandfold."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("arr_0.npy", "w") as member:
            member.write(header(shape))
            for _ in range(shape[0] * shape[1] * shape[2] // 2**20):
                member.write(bytes(2**20))
            member.write(bytes(shape[0] * shape[1] * shape[2] % 2**20))
    tracemalloc.start()
    said = refusal(tmp_path / "a.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "expected 134217728 at most of 64 MiB at most" in said and peak < 2**20


def test_large_images_are_read_one_after_the_other(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", arr_0=levels(11))
    monkeypatch.setattr(pathline.metrics.samples, "_AT_ONCE", 211)
    batches = [len(images) for images, _ in Samples.of(tmp_path / "a.npz").batches(7)]
    assert batches == [2, 2, 2, 2, 2, 1]


@pytest.mark.parametrize("kept", [0, 50, 200, -30])
def test_a_truncated_file_is_refused(kept, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=levels(3))
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:kept])
    assert "no .npz of plain arrays" in refusal(tmp_path / "a.npz")


def test_a_flipped_bit_is_noticed(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=levels(3))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[300] ^= 1
    (tmp_path / "a.npz").write_bytes(bytes(content))
    assert "CRC" in refusal(tmp_path / "a.npz")


def test_shards_that_are_not_all_of_one_drawing_are_refused(tmp_path):
    images, labels = levels(6), np.arange(6)
    folder = shards(tmp_path / "a", images, labels, (2, 4))
    assert "is not finished" in refusal(folder)
    (folder / "record.json").write_text(json.dumps({"count": 7}))
    assert "with count 6, and 7 by its record" in refusal(folder)
    (folder / "record.json").write_text(json.dumps({"count": 6}))
    (folder / "shard-00001.npz").rename(folder / "shard-00003.npz")
    assert "without shard-00001.npz" in refusal(folder)
    np.savez(folder / "shard-00001.npz", arr_0=levels(2, (7, 5, 3)), arr_1=labels[2:4])
    (folder / "shard-00003.npz").unlink()
    assert "images (7, 5, 3) with labels" in refusal(folder) and "shard-00001.npz" in refusal(folder)
    np.savez(folder / "shard-00001.npz", arr_0=images[2:4])
    assert "without labels" in refusal(folder)


def test_nothing_there(tmp_path):
    assert "got no file at" in refusal(tmp_path / "none.npz")
