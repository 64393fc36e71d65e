"""Sources of images: every layout gives the same pictures, keys and labels as the files that it was made of."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathline import DataError, InputTypeError, UnknownOptionError
from pathline.data import sources

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


WRITERS = {"folder": write_folder, "zip": write_zip}


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
        (b'{"labels": [["a.png", 1], ["b.png", 0], ["c.png", 0]]}', "1 labels without an image ['c.png']"),
        (b'{"labels": [["a.png", 1], ["c.png", 0]]}', "1 without a label ['b.png'], 1 labels without"),
        (b'{"labels": [["a.png", 1], ["b.png", 0], ["a.png", 2]]}', "3 labels for 2 images"),
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
    ],
)
def test_folders_that_are_no_classes(keys, said, write):
    with pytest.raises(DataError, match=said):
        write(contents(keys))


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


@pytest.mark.parametrize("name", sources.names())
def test_paths_that_are_none(name, tmp_path):
    with pytest.raises(DataError, match="cannot be looked at"):
        sources.build(name, path=str(tmp_path / "none"))
    with pytest.raises(DataError, match="cannot be looked at"):
        sources.build(name, path="a" * 5000)
    with pytest.raises(InputTypeError, match="got path 3"):
        sources.build(name, path=3)
    with pytest.raises(UnknownOptionError, match="has no option 'nonsense'"):
        sources.build(name, path=str(tmp_path), nonsense=1)


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


def test_a_folder_inside_of_a_zip(tmp_path):
    files = {f"set/train/{key}": content for key, content in contents().items()}
    table = json.dumps({"labels": [["val/1.png", 0]]}).encode()
    file = write_zip(tmp_path, {**files, "set/val/dataset.json": table, "set/val/val/1.png": png(picture(9))})
    source = sources.build("zip", path=str(file), root="/set/train/")
    assert list(source.keys) == KEYS and list(source.labels) == LABELS
    assert np.array_equal(np.asarray(source.read(3)), picture(3, 10))
    assert source.manifest["files"] == [{"file": "x.zip", "bytes": file.stat().st_size}]
    assert list(sources.build("zip", path=str(file), root="set/val").class_names) == ["0"]
    with pytest.raises(DataError, match="got no images in"):
        sources.build("zip", path=str(file), root="set/tra")
