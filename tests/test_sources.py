"""Sources of images: every layout gives the same pictures, keys and labels as the files that it was made of."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import re
import struct
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pathline import DataError, InputError, InputTypeError, UnknownNameError, UnknownOptionError
from pathline.data import sources
from pathline.data.sources import files

KEYS = ["apple/3.png", "apple/é.png", "pear/1.png", "pear/b/2.png", "plum.v2/0.png"]
CLASSES = ["apple", "pear", "plum.v2"]
LABELS = [0, 0, 1, 1, 2]


def picture(number: int, width: int = 7, height: int = 5) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3)).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def contents(keys=KEYS) -> dict[str, bytes]:
    return {key: png(picture(number, 7 + number)) for number, key in enumerate(keys)}


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for key, content in files.items():
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        (path / key).write_bytes(content)
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    """Members by turns stored and deflated, in an order that is not theirs."""
    file = path / "x.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.mkdir("apple")
        for number, key in enumerate(reversed(files)):
            archive.writestr(key, files[key], (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[number % 2])
    return file


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    """Two shards, each with every other member, in an order that is not theirs, and folders between them."""
    for shard in range(2):
        with tarfile.open(
            path / f"x-{shard}.tar", "w", format=(tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)[shard]
        ) as archive:
            folder = tarfile.TarInfo("./apple")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for key in reversed(list(files)[shard::2]):
                member = tarfile.TarInfo(f"./{key}" if shard else key)
                member.size = len(files[key])
                archive.addfile(member, io.BytesIO(files[key]))
    return path


WRITERS = {"folder": write_folder, "zip": write_zip, "tar": write_tar}


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    """Write files in the layout of a source, and build it."""

    def written(files: dict[str, bytes], **options) -> sources.ImageSource:
        return sources.build(request.param, path=str(WRITERS[request.param](tmp_path, files)), **options)

    return written


# --- image files, wherever they lie ----------------------------------------------------------------------------------


def test_images_keys_and_labels(write):
    source = write({**contents(), "notes.txt": b"no image", ".hidden/a.png": b"no image", "pear/.a.png": b"none"})
    assert list(source.keys) == KEYS and len(source) == 5
    assert list(source.labels) == LABELS and list(source.class_names) == CLASSES
    for number in (4, 0, 2, 3, 1):
        image = source.read(number)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), picture(number, 7 + number))


def test_a_flat_set_has_no_labels(write):
    source = write(contents(["b.png", "a.jpg", "c.WEBP"]))
    assert list(source.keys) == ["a.jpg", "b.png", "c.WEBP"]
    assert source.labels is None and list(source.class_names) == []


def test_a_table_gives_labels_in_any_order(write):
    table = {"labels": [[key, label] for key, label in zip(reversed(KEYS), [4, 0, 2, 2, 1], strict=True)]}
    source = write({**contents(), "dataset.json": json.dumps(table).encode()})
    assert list(source.labels) == [1, 2, 2, 0, 4] and list(source.class_names) == list("01234")
    assert list(source.keys) == KEYS, "the table itself is no image"


def test_a_table_may_say_that_there_are_no_labels(write):
    source = write({**contents(), "dataset.json": b'{"labels": null}'})
    assert source.labels is None and list(source.class_names) == []


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (b"{", "which is not JSON"),
        (b"[" * 100_000, "which is not JSON"),
        (b"[]", 'without "labels"'),
        (b'{"labels": {}}', "list of pairs"),
        (b'{"labels": [["a.png"]]}', "list of pairs"),
        (b'{"labels": [["a.png", 1.0], ["b.png", 0]]}', "list of pairs"),
        (b'{"labels": [["a.png", true], ["b.png", 0]]}', "list of pairs"),
        (b'{"labels": [["a.png", 1]]}', "1 without a label ['b.png'], 0 labels without"),
        (b'{"labels": [["a.png", 1], ["b.png", 0], ["c.png", 0]]}', "1 labels without a file ['c.png']"),
        (b'{"labels": [["a.png", 1], ["c.png", 0]]}', "1 without a label ['b.png'], 1 labels without"),
        (b'{"labels": [["a.png", 1], ["b.png", 0], ["a.png", 2]]}', "got a.png twice in dataset.json"),
        (b'{"labels": [["a.png", -1], ["b.png", 0]]}', "labels from -1 to 0"),
        (b'{"labels": [["a.png", 1], ["b.png", 1000000000000]]}', "to 1000000000000"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(table, said, write):
    with pytest.raises(DataError, match=r"dataset\.json of ") as error:
        write({**contents(["a.png", "b.png"]), "dataset.json": table})
    assert said in str(error.value)


def test_nothing_to_read(write):
    with pytest.raises(DataError, match="got no images in "):
        write({"notes.txt": b"", "x.pdf": b"", "sub/y.npy": b""})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["a/1.png", "b.png"], "got b.png in .* beside the folder a"),
        (["train/a/1.png", "train/b/2.png"], "below its one folder train"),
        (["train/a/1.png", "val/a/2.png"], "with the folders train, val, which hold folders"),
        (["Test/a/1.png", "Test/b/3.png", "Train/2.png"], "with the folders Test, Train, which hold folders"),
    ],
)
def test_folders_that_are_no_classes(keys, said, write):
    with pytest.raises(DataError, match=said):
        write(contents(keys))


def test_classes_that_are_called_like_parts_of_a_set(write):
    """Two classes of images, and folders with others beside them."""
    assert list(write(contents(["test/1.png", "train/2.png"])).class_names) == ["test", "train"]
    assert list(write(contents(["bus/a/1.png", "test/1.png", "train/2.png"])).class_names) == ["bus", "test", "train"]


def test_one_class(write):
    source = write(contents(["a/1.png", "a/2.png"]))
    assert list(source.labels) == [0, 0] and list(source.class_names) == ["a"]


def test_a_broken_image_is_named_with_its_archive(write, tmp_path):
    source = write({**contents(), "pear/1.png": contents()["pear/1.png"][:-25]})
    with pytest.raises(DataError, match=rf"got .*{tmp_path}.*truncated") as error:
        source.read(2)
    assert "pear/1.png" in str(error.value)
    assert source.read(3).size == (10, 5)


def test_exif_is_handed_on(write):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(picture(0)).save(buffer, "PNG", exif=exif)
    source = write({"a.png": buffer.getvalue()}, exif=True)
    assert np.array_equal(np.asarray(source.read(0)), np.rot90(picture(0), -1))
    assert source.manifest["decoding"]["exif orientation"] == "applied"


def test_it_can_be_pickled_and_read_by_threads(write):
    files = contents([f"{number % 3}/{number:03d}.png" for number in range(60)])
    source = pickle.loads(pickle.dumps(write(files)))
    order = np.random.default_rng(0).permutation(60).tolist() * 3
    together = threading.Barrier(4, timeout=20)

    def read(number: int) -> bytes:
        if number < 4:
            together.wait()  # so that four threads do read at once
        return source.read(order[number]).tobytes()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, range(len(order))))
    expected = [Image.open(io.BytesIO(files[source.keys[number]])).tobytes() for number in order]
    assert found == expected


def test_the_manifest_tells_sets_apart(write):
    source = write(contents())
    manifest = json.loads(json.dumps(source.manifest))
    assert manifest["count"] == 5 and manifest["num_classes"] == 3
    assert manifest["decoding"]["transparency"] == "over white"
    assert sources.registry.entry(manifest["name"]).factory is type(source)
    relabelled = {"labels": [[key, label] for key, label in zip(KEYS, [0, 0, 1, 2, 2], strict=True)]}
    other = write({**contents(), "dataset.json": json.dumps(relabelled).encode()})
    more = write(contents([*KEYS, "plum.v2/9.png"]) | {"dataset.json": b'{"labels": null}'})
    assert len({source.manifest["sha256"], other.manifest["sha256"], more.manifest["sha256"]}) == 3


def test_the_hash_is_that_of_keys_and_labels(write):
    text = "".join(f"{key}\0{label}\n" for key, label in zip(KEYS, LABELS, strict=True))
    assert write(contents()).manifest["sha256"] == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("name", sorted({*sources.names()} - {"huggingface"}))
def test_paths_that_are_none(name, tmp_path):
    needed = {"dataset": "FakeData"} if name == "torchvision" else {}
    for path in (str(tmp_path / "none"), "a" * 5000, "a\0b"):
        with pytest.raises(DataError, match="cannot be looked at"):
            sources.build(name, path=path, **needed)
    with pytest.raises(InputTypeError, match="got path 3"):
        sources.build(name, path=3, **needed)
    with pytest.raises(UnknownOptionError, match="has no option 'nonsense'"):
        sources.build(name, path=str(tmp_path), nonsense=1)


OPTIONS = [
    ("folder", {"exif": "banana"}, "got exif 'banana', expected true or false"),
    ("zip", {"exif": 1}, "got exif 1, expected true or false"),
    ("zip", {"root": 3}, "got root 3, expected a text"),
    ("tar", {"exif": None}, "got exif None, expected true or false"),
    ("tar", {"root": ["a"]}, r"got root \['a'\], expected a text"),
    ("huggingface", {"exif": "no"}, "got exif 'no', expected true or false"),
    ("huggingface", {"split": 1}, "got split 1, expected a text"),
    ("huggingface", {"options": [1]}, r"got options \[1\], expected a mapping"),
    ("torchvision", {"dataset": "FakeData", "options": "abc"}, "got options 'abc', expected a mapping"),
    ("torchvision", {"dataset": "FakeData", "options": []}, r"got options \[\], expected a mapping"),
    ("torchvision", {"dataset": "FakeData", "download": "no"}, "got download 'no', expected true or false"),
    ("torchvision", {"dataset": 7}, "got dataset 7, expected a text"),
]


@pytest.mark.parametrize(("name", "options", "said"), OPTIONS)
def test_options_of_another_type(name, options, said, tmp_path):
    with pytest.raises(InputTypeError, match=said):
        sources.build(name, path=str(tmp_path), **options)


@pytest.mark.parametrize("source", [3, None, ["folder"]])
def test_a_source_that_is_no_name(source, tmp_path):
    with pytest.raises(InputTypeError, match="got source .*, expected a mapping of options"):
        sources.source_of(str(tmp_path), source)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_links_within_a_folder_are_followed(tmp_path):
    write_folder(tmp_path, contents(["a/1.png", "b/2.png"]))
    (tmp_path / "b" / "3.png").symlink_to("../a/1.png")
    source = sources.build("folder", path=str(tmp_path))
    assert list(source.keys) == ["a/1.png", "b/2.png", "b/3.png"]
    assert np.array_equal(np.asarray(source.read(2)), picture(0))
    (tmp_path.parent / "linked").symlink_to(tmp_path)
    assert len(sources.build("folder", path=str(tmp_path.parent / "linked"))) == 3


def test_a_class_folder_without_images_is_refused(tmp_path):
    """It would give each class behind it another number than in the set that it belongs to."""
    write_folder(tmp_path, contents(["a/1.png", "c/2.png"]))
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match=rf"got no image in the folder b of {tmp_path}"):
        sources.build("folder", path=str(tmp_path))
    (tmp_path / "b").rename(tmp_path / ".b")
    assert len(sources.build("folder", path=str(tmp_path))) == 2


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "x.png").write_bytes(png(picture(0)))
    with pytest.raises(DataError, match="which is no folder"):
        sources.build("folder", path=str(tmp_path / "x.png"))


def test_a_file_that_went_away_is_named(tmp_path):
    source = sources.build("folder", path=str(write_folder(tmp_path, contents())))
    (tmp_path / KEYS[2]).unlink()
    with pytest.raises(DataError, match=f"got {tmp_path}/pear/1.png, which is no file"):
        source.read(2)


# --- archives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [("zip", "x.zip"), ("tar", "")])
def test_a_folder_inside_of_an_archive(kind, name, tmp_path):
    files = {f"set/train/{key}": content for key, content in contents().items()}
    table = json.dumps({"labels": [["val/1.png", 0]]}).encode()
    WRITERS[kind](tmp_path, {**files, "set/val/dataset.json": table, "set/val/val/1.png": png(picture(9))})
    path = str(tmp_path / name)
    source = sources.build(kind, path=path, root="/set/train/")
    assert list(source.keys) == KEYS and list(source.labels) == LABELS
    assert np.array_equal(np.asarray(source.read(3)), picture(3, 10))
    sizes = {entry["file"]: entry["bytes"] for entry in source.manifest["files"]}
    assert sizes == {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert list(sources.build(kind, path=path, root="set/val").class_names) == ["0"]
    with pytest.raises(DataError, match="got no images in"):
        sources.build(kind, path=path, root="set/tra")


def sample(member: str, content: bytes) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(member)
    info.size = len(content)
    return info, io.BytesIO(content)


def write_samples(file: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as archive:
        for name, content in files.items():
            archive.addfile(*sample(name, content))


def test_labels_in_files_beside_the_images(tmp_path):
    """WebDataset's layout; the two of a pair may even lie in different shards."""
    first = {"b/0001.jpg": png(picture(1)), "b/0001.cls": b"3", "b/0001.json": b"{}", "0002.x.png": png(picture(2))}
    write_samples(tmp_path / "a.tar", first)
    write_samples(tmp_path / "b.tar", {"0002.cls": b" 0\n", "c/0001.webp": png(picture(3)), "c/0001.cls": b"11"})
    (tmp_path / "._c.tar").write_bytes(b"as some systems write beside each file")
    source = sources.build("tar", path=str(tmp_path))
    assert list(source.keys) == ["0002.x.png", "b/0001.jpg", "c/0001.webp"]
    assert list(source.labels) == [0, 3, 11] and list(source.class_names) == [str(number) for number in range(12)]
    assert [np.array_equal(np.asarray(source.read(i)), picture(n)) for i, n in enumerate((2, 1, 3))] == [True] * 3
    assert [entry["file"] for entry in source.manifest["files"]] == ["a.tar", "b.tar"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.png": b"", "a.cls": b"1", "b.png": b""}, "1 without a label ['b'], 0 labels without"),
        ({"a.png": b"", "a.cls": b"1", "b.cls": b"1"}, "1 labels without an image ['b']"),
        ({"a.png": b"", "a.cls": b"one"}, "got a.cls of .*x.tar, 3 bytes, expected a whole number"),
        ({"a.png": b"", "a.cls": b"-1"}, "expected a whole number"),
        ({"a.png": b"", "a.cls": b"1" * 33}, "33 bytes, expected a whole number"),
        ({"a.png": b"", "a.cls": b"9999999"}, "labels from 9999999"),
        ({"a.png": b"", "a.seg.png": b"", "a.cls": b"1"}, "got a twice in"),
    ],
)
def test_labels_that_do_not_belong_to_the_images(files, said, tmp_path):
    write_samples(tmp_path / "x.tar", files)
    with pytest.raises(DataError) as error:
        sources.build("tar", path=str(tmp_path / "x.tar"))
    assert re.search(said if ".*" in said else re.escape(said), str(error.value))


def test_the_same_name_in_two_shards_is_refused(tmp_path):
    for shard in "ab":
        write_samples(tmp_path / f"{shard}.tar", {"0.png": png(picture(0))})
    with pytest.raises(DataError, match=r"got 0\.png twice in "):
        sources.build("tar", path=str(tmp_path))


def test_archives_that_are_classes(tmp_path):
    """ImageNet's archive holds one a class, whose images have its name in front."""
    for name in ("n01440764", "n01443537"):
        write_samples(tmp_path / f"{name}.tar", {f"{name}_{number}.JPEG": png(picture(number)) for number in (3, 10)})
    with pytest.raises(DataError, match=r"got .* with 2 archives, .* called after it as n01440764_10\.JPEG, and no"):
        sources.build("tar", path=str(tmp_path))
    write_samples(tmp_path / "x.tar", {"dataset.json": b'{"labels": null}'})
    assert sources.build("tar", path=str(tmp_path)).labels is None
    (tmp_path / "x.tar").unlink()
    assert len(sources.build("tar", path=str(tmp_path / "n01440764.tar"))) == 2
    write_samples(tmp_path / "n01443537.tar", {"other_3.png": png(picture(0))})
    assert len(sources.build("tar", path=str(tmp_path))) == 3


def test_a_folder_without_shards(tmp_path):
    with pytest.raises(DataError, match=r"got no \*\.tar in"):
        sources.build("tar", path=str(tmp_path))


# --- arrays ----------------------------------------------------------------------------------------------------------

BATCH = np.random.default_rng(3).integers(0, 256, (11, 5, 7, 3)).astype(np.uint8)
NUMBERS = np.array([3, 0, 1, 1, 5, 2, 3, 0, 1, 3, 2])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("names", [("arr_0", "arr_1"), ("images", "labels")])
@pytest.mark.parametrize("kind", [np.int64, np.uint8, ">i4"])
def test_npz(save, names, kind, tmp_path):
    save(tmp_path / "x.npz", **{names[0]: BATCH, names[1]: NUMBERS.astype(kind), "mu": np.zeros(4)})
    source = pickle.loads(pickle.dumps(sources.build("npz", path=str(tmp_path / "x.npz"))))
    assert len(source) == 11 and source.keys[10] == "00000010" and list(source.keys) == sorted(source.keys)
    assert list(source.labels) == NUMBERS.tolist() and list(source.class_names) == list("012345")
    for index in (10, 0, 4):
        assert np.array_equal(np.asarray(source.read(index)), BATCH[index])
    assert source.manifest["count"] == 11 and source.manifest["num_classes"] == 6


@pytest.mark.parametrize("images", [BATCH[..., 0], BATCH[..., :1]])
def test_npz_of_grey_images_without_labels(images, tmp_path):
    np.savez(tmp_path / "x.npz", images)
    source = sources.build("npz", path=str(tmp_path / "x.npz"))
    assert source.labels is None and len(source.class_names) == 0
    assert np.array_equal(np.asarray(source.read(7)), BATCH[7][..., :1].repeat(3, 2))


def test_npz_is_not_read_whole(tmp_path, monkeypatch):
    """Neither when it is opened nor for one image: what is read stays far below the file's size."""
    images = np.zeros((900, 32, 32, 3), np.uint8)
    images[-1] = 7
    np.savez(tmp_path / "x.npz", images)
    taken, before = [], files.read_part

    def counted(path, offset, size, name):
        taken.append(size)
        return before(path, offset, size, name)

    for module in ("npz", "zip", "arrays"):
        monkeypatch.setattr(f"pathline.data.sources.{module}.read_part", counted)
    assert (np.asarray(sources.build("npz", path=str(tmp_path / "x.npz")).read(899)) == 7).all()
    assert taken and sum(taken) < 80_000 < images.nbytes / 30


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"a": BATCH}, "with the arrays ['a'], expected images or arr_0"),
        ({"images": BATCH.astype(np.float32)}, "of type float32 and shape (11, 5, 7, 3), expected images"),
        ({"images": BATCH.astype(np.int64)}, "of type int64"),
        ({"images": BATCH[..., :2]}, "of type uint8 and shape (11, 5, 7, 2)"),
        ({"images": BATCH.transpose(0, 3, 1, 2)}, "shape (11, 3, 5, 7)"),
        ({"images": BATCH[:0]}, "shape (0, 5, 7, 3)"),
        ({"images": BATCH[0, 0]}, "shape (7, 3)"),
        ({"images": np.asfortranarray(BATCH)}, "in Fortran's order"),
        ({"images": BATCH, "labels": NUMBERS[:10]}, "of type int64 and shape (10,), expected (11,) whole"),
        ({"images": BATCH, "labels": NUMBERS.astype(float)}, "of type float64 and shape (11,)"),
        ({"images": BATCH, "labels": NUMBERS - 1}, "labels from -1 to 4"),
        ({"images": np.array([BATCH[0], None], object)}, "which may hold code"),
        ({"images": np.zeros(3, [("a", "u1")])}, "which may hold code"),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_that_holds_something_else(arrays, said, save, tmp_path):
    save(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError) as error:
        sources.build("npz", path=str(tmp_path / "x.npz"))
    assert said in str(error.value) and "x.npz" in str(error.value)


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_idx(folder: Path, end: str = "", images=BATCH[..., 0], labels=NUMBERS, name: str = "train") -> Path:
    pack = gzip.compress if end else bytes
    (folder / f"{name}-labels-idx1-ubyte{end}").write_bytes(pack(idx(labels.astype(np.uint8))))
    file = folder / f"{name}-images-idx3-ubyte{end}"
    file.write_bytes(pack(idx(images)))
    return file


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx(end, tmp_path):
    file = write_idx(tmp_path, end)
    write_idx(tmp_path, end, BATCH[:4, ..., 1], NUMBERS[:4], name="t10k")
    for path, split, channel, count in ((file, "test", 0, 11), (tmp_path, "train", 0, 11), (tmp_path, "test", 1, 4)):
        source = pickle.loads(pickle.dumps(sources.build("idx", path=str(path), split=split)))
        assert len(source) == count and list(source.labels) == NUMBERS[:count].tolist()
        assert np.array_equal(np.asarray(source.read(3)), BATCH[3, ..., channel : channel + 1].repeat(3, 2))
    write_idx(tmp_path)  # beside the compressed ones: the same set
    assert len(sources.build("idx", path=str(tmp_path))) == 11


def test_idx_that_cannot_be_told(tmp_path):
    write_idx(tmp_path)
    with pytest.raises(DataError, match=r"got \[\] for the images of split test"):
        sources.build("idx", path=str(tmp_path), split="test")
    with pytest.raises(InputError, match="got split 'val'"):
        sources.build("idx", path=str(tmp_path), split="val")
    write_idx(tmp_path, name="other-train")
    with pytest.raises(DataError, match="got .*other-train.* for the images of split train"):
        sources.build("idx", path=str(tmp_path))
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="got no labels for .*, expected train-labels-idx1-ubyte"):
        sources.build("idx", path=str(tmp_path / "train-images-idx3-ubyte"))


def records(count: int, labels: tuple[int, ...], seed: int = 0) -> tuple[bytes, np.ndarray, np.ndarray]:
    """A file of CIFAR, the images (n, 32, 32, 3) in it and their labels (n, k), below the numbers that are given."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
    numbers = np.stack([generator.integers(0, high, count) for high in labels], 1).astype(np.uint8)
    parts = [
        row.tobytes() + image[..., c].tobytes() if c == 0 else image[..., c].tobytes()
        for row, image in zip(numbers, images, strict=True)
        for c in range(3)
    ]
    return b"".join(parts), images, numbers


TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_cifar(path: Path, packed: bool, names: tuple[str, ...], labels: tuple[int, ...], extra: dict[str, bytes]):
    parts = [records(2 + number, labels, number) for number in range(len(names))]
    contents = {name: part[0] for name, part in zip(names, parts, strict=True)} | extra
    if packed:
        with tarfile.open(path / "cifar-binary.tar.gz", "w:gz") as archive:
            for name, content in contents.items():
                archive.addfile(*sample(f"cifar-batches-bin/{name}", content))
        path = path / "cifar-binary.tar.gz"
    else:
        write_folder(path, contents)
    return path, *(np.concatenate([part[column] for part in parts]) for column in (1, 2))


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_10(packed, tmp_path):
    names = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
    extra = {"test_batch.bin": records(3, (10,), 9)[0], "batches.meta.txt": "\n".join([*TEN, "", ""]).encode()}
    path, images, labels = write_cifar(tmp_path, packed, names, (10,), {**extra, "readme.html": b""})
    source = pickle.loads(pickle.dumps(sources.build("cifar", path=str(path))))
    assert len(source) == 2 + 3 + 4 + 5 + 6 and list(source.labels) == labels[:, 0].tolist()
    assert list(source.class_names) == TEN and list(source.keys) == sorted(source.keys)
    assert source.keys[2] == "data_batch_2/00000"
    for index in (0, 1, 2, 8, 13, 14, 19):
        assert np.array_equal(np.asarray(source.read(index)), images[index])
    assert np.array_equal(
        np.asarray(sources.build("cifar", path=str(path), split="test").read(2)), records(3, (10,), 9)[1][2]
    )
    with pytest.raises(InputError, match="for CIFAR-10 in .*it has no others"):
        sources.build("cifar", path=str(path), labels="coarse")


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_100(packed, tmp_path):
    path, images, labels = write_cifar(tmp_path, packed, ("train.bin",), (20, 100), {})
    for kind, column, count in (("coarse", 0, 20), ("fine", 1, 100)):
        source = sources.build("cifar", path=str(path), labels=kind)
        assert list(source.labels) == labels[:, column].tolist() and len(source.class_names) == count
        assert np.array_equal(np.asarray(source.read(1)), images[1])
    with pytest.raises(DataError, match="for split test in"):
        sources.build("cifar", path=str(path), split="test")
    with pytest.raises(InputError, match="got split 'val' and labels 'fine'"):
        sources.build("cifar", path=str(path), split="val")


# --- data sets of other libraries ------------------------------------------------------------------------------------


def test_torchvision(torchvision_operators, tmp_path):
    from torchvision.datasets import MNIST, FakeData

    options = {"size": 5, "image_size": [3, 4, 6], "num_classes": 7, "random_offset": 2}
    source = sources.build("torchvision", path=str(tmp_path), dataset="FakeData", options=options)
    expected = FakeData(**options)
    assert list(source.labels) == [int(label) for _, label in expected] and source.manifest["dataset"] == "FakeData"
    assert [source.read(i).tobytes() for i in range(5)] == [image.tobytes() for image, _ in expected]
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 11), ("t10k", 4)):
        write_idx(raw, images=BATCH[:count, ..., 0], labels=NUMBERS[:count], name=name)
    digits = sources.build("torchvision", path=str(tmp_path), dataset="MNIST", options={"train": True})
    assert list(digits.labels) == NUMBERS.tolist() and list(digits.class_names) == MNIST.classes
    assert np.array_equal(np.asarray(digits.read(6)), BATCH[6, ..., :1].repeat(3, 2))
    again = pickle.loads(pickle.dumps(digits))
    assert np.array_equal(np.asarray(again.read(6)), np.asarray(digits.read(6)))


def test_files_of_torchvision_are_decoded_by_our_rules(torchvision_operators, tmp_path):
    """Transparent colours lie over white, grey of 16 bits is scaled, and what is broken is named with its file."""
    clear = np.dstack([picture(0), np.zeros((5, 7), np.uint8)])
    grey = (np.arange(35).reshape(5, 7) * 1800).astype(np.uint16)
    files = {"a/0.png": png(clear), "b/1.png": png(grey), "b/2.png": png(picture(2))[:-30]}
    source = sources.build("torchvision", path=str(write_folder(tmp_path / "set", files)), dataset="ImageFolder")
    source = pickle.loads(pickle.dumps(source))
    assert (np.asarray(source.read(0)) == 255).all()
    assert np.array_equal(np.asarray(source.read(1))[..., 0], np.round(grey / 257))
    with pytest.raises(DataError, match=r"^got .*b/2\.png, which cannot be decoded: .*truncated"):
        source.read(2)
    assert source.manifest["decoding"] == sources.build("folder", path=str(tmp_path / "set")).manifest["decoding"]
    assert "loader" not in json.dumps(source.manifest)
    fake = sources.build("torchvision", path=str(tmp_path), dataset="FakeData", options={"size": 2})
    assert fake.manifest["decoding"] == "torchvision's"


def test_the_loader_is_handed_on_by_imagenet(torchvision_operators, tmp_path):
    """Its class takes any option, and gives them to ImageFolder's."""
    torch.save(({"n01": ("tench",), "n02": ("goldfish",)}, ["n01"]), tmp_path / "meta.bin")
    clear = np.dstack([picture(0), np.zeros((5, 7), np.uint8)])
    write_folder(tmp_path / "val", {"n01/0.png": png(clear), "n02/1.png": png(picture(1))})
    options = {"split": "val"}
    source = sources.build("torchvision", path=str(tmp_path), dataset="ImageNet", options=options)
    assert (np.asarray(source.read(0)) == 255).all() and list(source.labels) == [0, 1]


def test_torchvision_of_data_that_are_not_there(torchvision_operators, tmp_path):
    with pytest.raises(DataError, match=r"got no data set CIFAR10 .*set download=true where the network is open"):
        sources.build("torchvision", path=str(tmp_path), dataset="CIFAR10")
    with pytest.raises(UnknownNameError, match="no data set 'CIFAR11'; did you mean 'CIFAR10'"):
        sources.build("torchvision", path=str(tmp_path), dataset="CIFAR11")
    with pytest.raises(DataError, match="got no data set MNIST with the options .*nonsense"):
        sources.build("torchvision", path=str(tmp_path), dataset="MNIST", options={"nonsense": 1})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A data set and several by their splits, as ``datasets`` saves them."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("saved")
    features = {
        "img": datasets.Image(),
        "kind": datasets.ClassLabel(names=["pear", "fig", "plum"]),
        "size": datasets.Value("int32"),
    }
    rows = {
        "img": [{"bytes": png(picture(i)), "path": None} for i in range(5)],
        "kind": [2, 0, 1, 2, 0],
        "size": [1] * 5,
    }
    one = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    one.save_to_disk(folder / "one")
    datasets.DatasetDict({"train": one.select([3, 1]), "test": one}).save_to_disk(folder / "several")
    one.remove_columns("img").save_to_disk(folder / "none")
    return folder


def test_huggingface(saved):
    source = pickle.loads(pickle.dumps(sources.build("huggingface", path=str(saved / "one"))))
    assert list(source.labels) == [2, 0, 1, 2, 0] and list(source.class_names) == ["pear", "fig", "plum"]
    assert all(np.array_equal(np.asarray(source.read(i)), picture(i)) for i in (4, 0, 2))
    few = sources.build("huggingface", path=str(saved / "several"))
    assert list(few.labels) == [2, 0] and np.array_equal(np.asarray(few.read(0)), picture(3))
    assert len(sources.build("huggingface", path=str(saved / "several"), split="test")) == 5
    assert few.manifest["split"] == "train" and json.dumps(few.manifest)


def test_huggingface_of_something_else(saved, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"got split 'tests' .*did you mean 'test'"):
        sources.build("huggingface", path=str(saved / "several"), split="tests")
    with pytest.raises(DataError, match="0 of images, expected one"):
        sources.build("huggingface", path=str(saved / "none"))
    with pytest.raises(DataError, match="expected a folder that save_to_disk wrote"):
        sources.build("huggingface", path=str(tmp_path))
    with pytest.raises(DataError, match="cannot be looked at"):
        sources.build("huggingface", path=str(tmp_path / "none"))
    with pytest.raises(InputTypeError, match="got path 3"):
        sources.build("huggingface", path=3)


def test_huggingface_without_the_network(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="got no data set 'someone/some-set' .*check the name and the network"):
        sources.build("huggingface", path="someone/some-set")


# --- kinds told from paths -------------------------------------------------------------------------------------------


def test_kinds_are_told_from_paths(saved, tmp_path):
    places = {name: tmp_path / name for name in ("folder", "zip", "tar", "npz", "idx", "cifar")}
    for place in places.values():
        place.mkdir()
    write_folder(places["folder"], contents())
    cifar, *_ = write_cifar(places["cifar"], True, ("train.bin",), (20, 100), {})
    unpacked = tmp_path / "unpacked"
    write_cifar(unpacked, False, ("train.bin",), (20, 100), {})
    np.savez(places["npz"] / "x.npz", BATCH)
    write_tar(places["tar"], contents())
    images = write_idx(places["idx"], ".gz")
    expected = {
        places["folder"]: "folder",
        write_zip(places["zip"], contents()): "zip",
        places["tar"]: "tar",
        places["tar"] / "x-0.tar": "tar",
        places["npz"] / "x.npz": "npz",
        places["idx"]: "idx",
        images: "idx",
        cifar: "cifar",
        unpacked: "cifar",
        saved / "one": "huggingface",
        saved / "several": "huggingface",
    }
    for path, name in expected.items():
        for given in ("auto", name, {"name": name}):
            assert sources.source_of(str(path), given).manifest["name"] == name
    options = {"name": "auto", "labels": "coarse"}
    assert len(sources.source_of(str(cifar), options).class_names) == 20
    with pytest.raises(UnknownOptionError, match="image source 'npz' has no option 'exif'"):
        sources.source_of(str(places["npz"] / "x.npz"), exif=True)
    (tmp_path / "x.rar").write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.rar, of which no source is known.*\.tar\.gz, \.npz"):
        sources.source_of(str(tmp_path / "x.rar"))
    with pytest.raises(DataError, match="cannot be looked at"):
        sources.source_of(str(tmp_path / "none"))


def test_things_of_two_kinds(saved, tmp_path):
    """A stray archive beside class folders, folders within what another kind wrote, and two kinds of archives."""
    write_folder(tmp_path, contents([*KEYS, "apple.tar/9.png"]))
    for name in (".backup.tar", "pear/backup.tar"):
        write_samples(tmp_path / name, {"0.png": png(picture(0))})
    assert sources.source_of(str(tmp_path)).manifest["name"] == "folder"
    write_samples(tmp_path / "backup.tar", {"0.png": png(picture(0))})
    with pytest.raises(DataError, match=r"with backup\.tar \(source tar\) and .*png \(source folder\), expected"):
        sources.source_of(str(tmp_path))
    assert len(sources.source_of(str(tmp_path), "folder")) == 6
    assert len(sources.source_of(str(tmp_path / "backup.tar"))) == 1
    (tmp_path / "both").mkdir()
    write_idx(tmp_path / "both")
    write_tar(tmp_path / "both", contents())
    with pytest.raises(DataError, match="name the source that is meant: tar or idx"):
        sources.source_of(str(tmp_path / "both"))
