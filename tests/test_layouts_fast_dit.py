"""The layout of fast-DiT: what the test wrote is read back, or refused by name."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from pathline import DataError, data
from pathline.data.layouts.files import hash_of_files
from pathline.data.layouts.stores import Folder

SHAPE = (3, 5, 2)
NUMBERS = tuple(range(12))  # sorted as text: 0, 1, 10, 11, 2, …
LABELS = (4, 0, 6, 2, 5, 1, 1, 3, 0, 6, 2, 4)


def value_of(number: int, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(number).normal(size=(1, *SHAPE)).astype(dtype)


@pytest.fixture
def features(tmp_path):
    for folder in ("imagenet256_features", "imagenet256_labels"):
        (tmp_path / folder).mkdir()
    for number, label in zip(NUMBERS, LABELS, strict=True):
        np.save(tmp_path / "imagenet256_features" / f"{number}.npy", value_of(number))
        np.save(tmp_path / "imagenet256_labels" / f"{number}.npy", np.array([label]))
    return tmp_path


def fast(path, **options):
    return data.build("fast-dit", path=str(path), **{"num_classes": 7, **options})


def fast_refusal(path, **options) -> str:
    with pytest.raises(DataError) as error:
        fast(path, **options)
    return str(error.value)


@pytest.mark.parametrize("workers", [1, 3])
def test_features_and_labels_are_joined_by_number_and_taken_as_they_are(workers, features):
    dataset = fast(features, workers=workers)
    assert len(dataset) == 12 and dataset.shape == SHAPE and not dataset.data_are_images
    batch = dataset.batch([11, 0, 2, 11])
    for row, place in enumerate([11, 0, 2, 11]):
        np.testing.assert_array_equal(batch["data"][row], value_of(NUMBERS[place])[0])
        assert batch["label"][row] == LABELS[place] and batch["index"][row] == place
    assert batch["label"].dtype == torch.int64 and dataset.batch([])["data"].shape == (0, *SHAPE)
    for visit in dataset.batches(3, 2, 0):
        assert torch.equal(visit["data"], dataset.batch(visit["index"])["data"])
    assert dataset.latents_of["scaling"]["std"] == [1 / 0.18215] * 3  # of the autoencoder's own latents
    assert dataset.manifest["scaling"]["std"] == [1.0] * 3  # of what is stored


def test_features_without_their_axis_of_one_and_in_half(features):
    for number in NUMBERS:
        np.save(features / "imagenet256_features" / f"{number}.npy", value_of(number, np.float16)[0])
    assert fast(features).batch([3])["data"].tolist() == value_of(3, np.float16).astype(np.float32).tolist()


def test_one_feature_missing_and_one_added_are_named_though_their_number_is_right(features):
    (features / "imagenet256_features/10.npy").rename(features / "imagenet256_features/12.npy")
    said = fast_refusal(features)
    assert "12.npy in imagenet256_features" in said and "10.npy in imagenet256_labels" in said


def test_one_missing_or_one_added_is_named(features):
    np.save(features / "imagenet256_labels/12.npy", np.array([1]))
    assert "12.npy in imagenet256_labels" in fast_refusal(features)
    (features / "imagenet256_labels/12.npy").unlink()
    (features / "imagenet256_labels/11.npy").unlink()
    assert "11.npy in imagenet256_features" in fast_refusal(features)


@pytest.mark.parametrize("stray", ["preview.png", "007.npy", "1.npz"])
def test_a_stray_file_is_named(stray, features):
    (features / "imagenet256_features" / stray).write_bytes(b"")
    if stray == "007.npy":
        np.save(features / "imagenet256_features/7.npy", value_of(7))
        assert "expected each number once" in fast_refusal(features)
    else:
        assert f"got {stray} in" in fast_refusal(features)


def test_folders_are_found_by_their_ending(features):
    (features / "other_labels").mkdir()
    assert "got imagenet256_labels, other_labels of the folders *_labels" in fast_refusal(features)
    assert fast(features, num_classes=0).batch([1, 0])["label"].tolist() == [0, 0]
    (features / "empty").mkdir()
    assert "got none of the folders *_features" in fast_refusal(features / "empty")
    assert f"got {features / 'none'}, which cannot be looked at" in fast_refusal(features / "none")


def test_wrong_contents_are_named(features):
    file, label = features / "imagenet256_features/2.npy", features / "imagenet256_labels/2.npy"
    dataset = fast(features)
    np.save(label, np.array([7]))
    with pytest.raises(DataError, match=r"the label 7 of .*labels/2\.npy, expected 0 to 6"):
        dataset.batch([2])
    for wrong in (np.array([1.0]), np.array([1, 2])):
        np.save(label, wrong)
        with pytest.raises(DataError, match=r"labels/2\.npy"):
            fast(features).batch([2])
    np.save(file, np.array([None] * 2), allow_pickle=True)
    assert "got 2.npy in" in fast_refusal(features)  # of another size
    for number in NUMBERS:
        np.save(features / f"imagenet256_features/{number}.npy", np.zeros((2, *SHAPE), np.float32))
    assert "of shape (2, 3, 5, 2), expected (1, C, H, W)" in fast_refusal(features)


def test_the_hash_of_many_files_reads_64_spread_evenly(tmp_path):
    for number in range(130):
        (tmp_path / f"{number:03d}").write_text(str(number % 7))
    store, names = Folder(tmp_path), [f"{number:03d}" for number in range(130)]
    whole, seen = hash_of_files(store, names), []
    for name in names:
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text("x")
        seen += [int(name)] if hash_of_files(store, names) != whole else []
        (tmp_path / name).write_text(before)
    assert len(seen) == 64 and (seen[0], seen[-1]) == (0, 129)
    assert set(np.diff(seen).tolist()) == {2, 3}


def test_the_manifest_of_features(features):
    manifest = json.loads(json.dumps(fast(features).manifest))
    size = (features / "imagenet256_features/0.npy").stat().st_size
    names = "".join(f"{number}.npy\0{size}\n" for number in NUMBERS).encode()
    files = [(features / f"imagenet256_features/{number}.npy").read_bytes() for number in NUMBERS]
    names += b"".join(hashlib.sha256(content).digest() for content in files)
    assert manifest["sha256"] == hashlib.sha256(names).hexdigest() and manifest["count"] == 12
    values = np.concatenate([value_of(number) for number in NUMBERS]).astype(np.float64)
    np.testing.assert_allclose(fast(features).statistics["std"], values.std((0, 2, 3), ddof=1), rtol=1e-6)


def test_a_number_that_is_missing_on_both_sides_is_told(features):
    for number in (3, 7):
        for folder in ("imagenet256_features", "imagenet256_labels"):
            (features / folder / f"{number}.npy").unlink()
    for num_classes in (7, 0):
        said = fast_refusal(features, num_classes=num_classes)
        assert f"got 10 files in {features / 'imagenet256_features'} with numbers up to 11" in said
        assert "expected 12; make 3, 7 anew" in said


def test_labels_that_are_there_are_compared_without_classes_as_well(features):
    (features / "imagenet256_features/11.npy").unlink()
    assert "11.npy in imagenet256_labels" in fast_refusal(features, num_classes=0)


def test_a_path_may_begin_with_the_home_folder(features, monkeypatch):
    monkeypatch.setenv("HOME", str(features.parent))
    assert len(fast(f"~/{features.name}")) == 12
