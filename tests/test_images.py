"""Plain images as a data set: decoded, cut, mirrored and converted as the rules say."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pathline import (
    CheckpointError,
    DataError,
    Draws,
    InputError,
    InputTypeError,
    UnknownNameError,
    UnknownOptionError,
    data,
)
from pathline.core.config import resolve
from pathline.data.crop import centre_crop
from pathline.data.features import write_features
from pathline.encoders.sources import Cached, hash_of_images
from pathline.training import Trainer, checkpoints

KEYS = [f"{name}/{number}.png" for name in ("ant", "bee", "cow") for number in range(4)][:11]
LABELS = [0] * 4 + [1] * 4 + [2] * 3


def picture(number: int, width: int, height: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3)).astype(np.uint8)


def write(path, sizes) -> list[np.ndarray]:
    """Write images of the sizes (width, height), one a key, and return their pixels."""
    pictures = [picture(number, *size) for number, size in enumerate(sizes)]
    for key, pixels in zip(KEYS, pictures, strict=True):
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path / key)
    return pictures


@pytest.fixture
def folder(tmp_path):
    """Eleven images of different sizes, in three classes, and their pixels cut to 7."""
    pictures = write(tmp_path, [(9 + number, 23 - number) for number in range(11)])
    return tmp_path, np.stack([centre_crop(Image.fromarray(pixels), 7) for pixels in pictures]).transpose(0, 3, 1, 2)


def build(path, **options) -> data.Images:
    return data.build("images", path=str(path), **{"resolution": 7, **options})


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_batches(folder, workers):
    path, expected = folder
    images = build(path, workers=workers)
    assert len(images) == 11 and images.shape == (3, 7, 7) and images.num_classes == 3 and images.data_are_images
    for indices in ([9, 0, 4, 9, 5], range(11), torch.tensor([4]), np.array([10, 3]), []):
        batch, rows = images.batch(indices), torch.as_tensor(list(indices), dtype=torch.int64)
        levels = torch.from_numpy(expected[rows.numpy()]).double()
        assert batch["data"].dtype == torch.float32 and batch["label"].dtype == batch["index"].dtype == torch.int64
        assert batch["data"].shape == levels.shape and torch.allclose(
            batch["data"].double(), levels / 127.5 - 1, atol=1e-7
        )
        assert batch["label"].tolist() == [LABELS[row] for row in rows] and torch.equal(batch["index"], rows)


def test_every_level_has_its_value(tmp_path):
    """-1 and 1 are reached exactly, and round(127.5·(x + 1)) gives every level back."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "x.png")
    images = data.build("images", path=str(tmp_path), channels=1)
    values = images.batch([0])["data"]
    assert values.shape == (1, 1, 16, 16) and values.min() == -1 and values.max() == 1
    assert np.array_equal(((values[0, 0] + 1) * 127.5).round().numpy(), levels)
    assert images.num_classes == 0 and images.batch([0])["label"].tolist() == [0]


def test_squares_of_the_size_are_not_touched(tmp_path):
    pictures = write(tmp_path, [(5, 5)] * 11)
    for options in ({"resolution": 5}, {"resolution": None}):
        loaded = build(tmp_path, **options).load(range(11), Draws(0).at(range(11)))
        assert loaded["data"].dtype == torch.uint8
        assert np.array_equal(loaded["data"].permute(0, 2, 3, 1).numpy(), np.stack(pictures))


def test_grey_of_colours(folder):
    """ITU-R 601-2: 0.299 R + 0.587 G + 0.114 B."""
    path, expected = folder
    found = (build(path, channels=1).batch(range(11))["data"] + 1) * 127.5
    weighted = np.einsum("nchw,c->nhw", expected.astype(float), np.array([0.299, 0.587, 0.114]))
    assert found.shape == (11, 1, 7, 7) and np.abs(found[:, 0].numpy() - weighted).max() < 0.501


def test_exif_is_applied_where_it_is_asked_for(tmp_path):
    exif, pixels = Image.Exif(), picture(0, 5, 5)
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    for turned, wanted in ((False, pixels), (True, pixels[::-1, ::-1])):
        found = (build(tmp_path, resolution=None, exif=turned).batch([0])["data"] + 1) * 127.5
        assert np.array_equal(found[0].permute(1, 2, 0).round().numpy(), wanted)


def test_sources_by_name_and_by_options(tmp_path):
    batch = np.random.default_rng(0).integers(0, 256, (5, 7, 7, 3)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", batch, np.array([4, 0, 1, 1, 2]))
    for source in ("auto", "npz", {"name": "npz"}):
        images = build(tmp_path / "x.npz", source=source)
        assert images.num_classes == 5 and images.batch([3])["label"].tolist() == [1]
        loaded = images.load([2, 0], Draws(0).at(range(2)))["data"]
        assert np.array_equal(loaded.permute(0, 2, 3, 1).numpy(), batch[[2, 0]])
    assert images.manifest["source"]["name"] == "npz"


# --- visits of training ----------------------------------------------------------------------------------------------


def test_visits_mirror_half_of_the_images(folder):
    path, expected = folder
    images, positions = build(path, flip=True), range(300, 700)
    index = images.indices_at(positions, seed=5)
    draws = Draws(5).at(positions, step=2)
    loaded = images.load(index, draws)
    mirrored = (Draws(5).uniform("flip", positions) < 0.5).numpy()
    wanted = np.where(mirrored[:, None, None, None], expected[index][..., ::-1], expected[index])
    assert np.array_equal(loaded["data"].numpy(), wanted)
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / 20, "within four deviations of the mean of 400 coins"
    finished = images.finish(loaded, draws)
    assert torch.allclose(finished["data"].double(), torch.from_numpy(wanted).double() / 127.5 - 1, atol=1e-7)
    assert torch.equal(finished["label"], torch.tensor(LABELS)[torch.from_numpy(index)])


def test_a_visit_depends_on_its_position_alone(folder):
    images = build(folder[0], flip=True)
    whole = torch.cat([batch["data"] for batch in images.batches(6, steps=5, seed=3)])
    again = torch.cat([batch["data"] for batch in images.batches(10, steps=2, seed=3, start=1)])
    assert torch.equal(again, whole[10:30])


def test_nothing_is_mirrored_unasked(folder):
    path, expected = folder
    loaded = build(path).load([4] * 50, Draws(0).at(range(50)))
    assert (loaded["data"].numpy() == expected[4]).all()
    assert torch.equal(build(path, flip=True).batch([4])["data"], build(path).batch([4])["data"])


def test_it_goes_into_other_processes(folder):
    """By pickling, and by forking after threads have been at work."""
    images = build(folder[0])
    expected = images.batch(range(11))["data"]
    assert torch.equal(pickle.loads(pickle.dumps(images)).batch(range(11))["data"], expected)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends it, should it wait for threads that it does not have
        try:
            os.write(writer, bytes([torch.equal(images.batch(range(11))["data"], expected)]))
        finally:
            os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"\1"
    os.close(reader)
    os.waitpid(child, 0)


def test_stored_features_are_refused_where_images_are_mirrored(folder, tmp_path):
    """A file of features has none of mirror images, even if it was made of the same configuration."""
    file, component = tmp_path / "features.safetensors", {"name": "timm", "model": "test_vit"}
    for flip in (False, True):
        images = build(folder[0], flip=flip)
        encoder = {"name": "timm", "sha256": "0" * 64, "weights": "hub", "dim": 5, "grid": [1, 2]}
        told = {"component": component, "encoder": encoder, "data": images.manifest}
        write_features(file, [torch.zeros(11, 2, 5)], (11, 2, 5), **told, images=hash_of_images(images))
        if not flip:
            assert Cached(file, component, images).dim == 5
            continue
        with pytest.raises(DataError, match=f"got {file}, features without those of mirror images.*set flip=false"):
            Cached(file, component, images)


def configuration(tmp_path, **options):
    backbone = {"name": "sit", "input_size": 8, "patch_size": 4, "in_channels": 3, "hidden_size": 12, "depth": 1}
    entries = {
        "data": {"name": "images", "path": str(tmp_path / "set"), "resolution": 8, "flip": True, **options},
        "backbone": {**backbone, "num_heads": 3, "num_classes": 3},
        "objective": "velocity",
        "train": {"steps": 2, "global_batch": 5, "folder": str(tmp_path / "run"), "accelerator": "cpu"},
        "log": {"tensorboard": False},
    }
    return resolve(entries)


def test_training_on_a_folder_of_images(tmp_path):
    """It may be gone on with by another number of threads, which changes no image."""
    write(tmp_path / "set", [(9 + number, 12) for number in range(11)])
    Trainer(configuration(tmp_path)).run()
    assert (tmp_path / "run" / "checkpoints" / "step-000000002").is_dir()
    Trainer(configuration(tmp_path, workers=2)).resume(checkpoints.find(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"data\.exif: .* -> True"):
        Trainer(configuration(tmp_path, workers=2, exif=True)).resume(checkpoints.find(tmp_path / "run"))


# --- what it tells of itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics(folder, channels, monkeypatch):
    monkeypatch.setattr("pathline.data.images._CHUNK", 4)
    images = build(folder[0], channels=channels)
    values = images.batch(range(11))["data"].double().transpose(0, 1).flatten(1)
    found = json.loads(json.dumps(images.statistics))
    assert found["mean"] == pytest.approx(values.mean(1).tolist(), abs=1e-7)
    assert found["std"] == pytest.approx(values.std(1).tolist(), rel=1e-7)
    assert found["range"] == pytest.approx([float(values.min()), float(values.max())], abs=1e-7)
    assert found["over"] == {"samples": 11, "of": 11, "seed": 0}


def test_statistics_of_large_sets_are_those_of_a_part(folder, monkeypatch):
    monkeypatch.setattr("pathline.data.images._CHUNK", 2)
    monkeypatch.setattr("pathline.data.images.SURVEYED", 5)
    path, expected = folder
    rows = Draws(0).permutation("statistics", 11)[:5]
    images, asked = build(path, workers=1), []
    read = images.source.read
    monkeypatch.setattr(images.source, "read", lambda index: asked.append(index) or read(index))
    values = torch.from_numpy(expected[rows]).double().div(127.5).sub(1).transpose(0, 1).flatten(1)
    assert images.statistics["mean"] == pytest.approx(values.mean(1).tolist(), abs=1e-7)
    assert images.statistics["std"] == pytest.approx(values.std(1).tolist(), rel=1e-7)
    assert images.statistics["over"] == {"samples": 5, "of": 11, "seed": 0}
    assert sorted(asked) == sorted(rows.tolist())


def test_the_manifest(folder):
    path, _ = folder
    manifest = json.loads(json.dumps(build(path).manifest))
    assert manifest["count"] == 11 and manifest["shape"] == [3, 7, 7] and manifest["num_classes"] == 3
    assert manifest["crop"] == "adm-centre-crop" and not manifest["flip"]
    assert manifest["source"]["name"] == "folder" and len(manifest["source"]["sha256"]) == 64
    same, others = (
        build(path, workers=1).manifest,
        [build(path, **o).manifest for o in ({"flip": True}, {"exif": True})],
    )
    assert same == manifest and all(other != manifest for other in others)
    (path / KEYS[10]).rename(path / "ant" / "9.png")
    (path / KEYS[9]).rename(path / "cow" / "2.png")
    assert build(path).manifest["source"]["sha256"] != manifest["source"]["sha256"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_an_image_that_cannot_be_read_is_named(folder, workers):
    path, expected = folder
    broken = path / KEYS[6]
    broken.write_bytes(broken.read_bytes()[:-40])
    images = build(path, workers=workers)
    with pytest.raises(DataError, match=f"got {broken}, which cannot be decoded: .*truncated"):
        images.batch(range(11))
    with pytest.raises(DataError, match=str(broken)):
        _ = images.statistics
    assert np.array_equal(images.load([5, 7], Draws(0).at(range(2)))["data"].numpy(), expected[[5, 7]])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("size", "said"), [((5, 6), "5 x 6"), ((6, 6), "6 x 6")])
def test_mixed_sizes_are_named_at_once_unless_they_are_cut(size, said, workers, tmp_path, monkeypatch):
    monkeypatch.setattr("pathline.data.images._HEADERS", 3)
    write(tmp_path, [(5, 5)] * 8 + [size] + [(5, 5)] * 2)
    with pytest.raises(DataError, match=rf"got cow/0\.png of {said} pixels, expected 5 x 5 beside ant/0\.png"):
        build(tmp_path, resolution=None, workers=workers)
    assert build(tmp_path, resolution=5).batch(range(11))["data"].shape == (11, 3, 5, 5)


@pytest.mark.parametrize("layout", ["folder", "zip", "npz"])
def test_images_that_are_no_squares_are_named_unless_they_are_cut(layout, tmp_path):
    pictures, place = write(tmp_path / "set", [(30, 20)] * 11), tmp_path / "set"
    if layout == "zip":
        place = Path(shutil.make_archive(str(place), "zip", place))
    elif layout == "npz":
        np.savez(place := tmp_path / "x.npz", np.stack(pictures))
    with pytest.raises(DataError, match=r"got (ant/0\.png|0{8}) of 30 x 20 pixels, expected a square; set resolution"):
        build(place, resolution=None)
    assert build(place, resolution=8).shape == (3, 8, 8)


def test_pixels_are_not_decoded_for_the_sizes(tmp_path):
    """Headers alone are read; a file that is replaced by one of another size is named when it is visited."""
    write(tmp_path, [(5, 5)] * 11)
    broken = tmp_path / KEYS[6]
    broken.write_bytes(broken.read_bytes()[:50])  # a header, and no pixels
    images = build(tmp_path, resolution=None)
    with pytest.raises(DataError, match=f"got {broken}, which cannot be decoded"):
        images.batch([6])
    broken.write_bytes(b"none")
    with pytest.raises(DataError, match=f"got {broken}, which is no image of the kinds"):
        build(tmp_path, resolution=None)
    Image.fromarray(picture(0, 6, 6)).save(broken)
    with pytest.raises(DataError, match=rf"got {KEYS[6]} of 6 x 6 pixels, expected 5 x 5 beside"):
        images.batch([6])


def test_an_image_too_thin_to_be_scaled_is_named(tmp_path, monkeypatch):
    write(tmp_path, [(40, 2)] * 11)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"got bee/1\.png, which cannot be cut: .*scales to 160 x 8"):
        build(tmp_path, resolution=8).batch([5])


def test_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match=f"got no images in {tmp_path}"):
        build(tmp_path)
    with pytest.raises(DataError, match="cannot be looked at"):
        build(tmp_path / "none")


def test_options_and_indices_out_of_range(folder):
    for options in ({"resolution": 0}, {"workers": 0}, {"channels": 2}, {"resolution": -8}):
        with pytest.raises(InputError, match="expected 1 or more, and 1 or 3 channels"):
            build(folder[0], **options)
    for options in ({"resolution": 7.0}, {"workers": "2"}, {"channels": True}, {"flip": 1}, {"exif": "no"}):
        with pytest.raises(InputTypeError, match="expected whole numbers, and true or false"):
            build(folder[0], **options)
    with pytest.raises(UnknownNameError, match="unknown image source 'foldr'; did you mean 'folder'"):
        build(folder[0], source="foldr")
    with pytest.raises(UnknownOptionError, match="has no option 'rot'"):
        build(folder[0], source={"name": "folder", "rot": "x"})
    images = build(folder[0])
    for indices in ([11], [-1], [[0]]):
        with pytest.raises(InputError, match="numbers from 0 to 10"):
            images.batch(indices)
    with pytest.raises(InputTypeError, match="whole numbers"):
        images.batch([0.5])
