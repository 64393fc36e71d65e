"""The trees of REPA, DeepFlow and EDM2: what the test wrote is read back by the numbers in names, or refused."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from pathline import DataError, InputError, InputTypeError, data
from pathline.core.config import resolve
from pathline.core.draws import Draws
from pathline.training import Trainer

NUMBERS = (0, 1, 2, 3, 4)  # two a folder, where the program has a thousand
LABELS = (3, 0, 6, 1, 5)


def values_of(number: int, shape=(6, 5, 5)) -> np.ndarray:
    mean, deviation = np.random.default_rng(number).normal(size=(2, shape[0] // 2, *shape[1:]))
    return np.concatenate([3 * mean, np.abs(deviation)]).astype(np.float32)


def pixels_of(number: int, size: int = 20) -> np.ndarray:
    return np.random.default_rng(number + 7).integers(0, 256, (size, size, 3), np.uint8)


def moment_file(number: int) -> str:
    return f"{number // 2:05d}/img-mean-std-{number:08d}.npy"


def write_tree(root, *, shape=(6, 5, 5), images: bool = True) -> None:
    for number in NUMBERS:
        file = root / "vae-sd" / moment_file(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, values_of(number, shape))
        if images:
            picture = root / "images" / f"{number // 2:05d}" / f"img{number:08d}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels_of(number)).save(picture)
    write_labels(root)


def write_labels(root, labels=LABELS) -> None:
    pairs = [[moment_file(number), label] for number, label in zip(NUMBERS, labels, strict=True)]
    (root / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": pairs[::-1]}))  # the order means nothing


@pytest.fixture
def tree(tmp_path):
    write_tree(tmp_path)
    return tmp_path


def repa(root, **options):
    return data.build("repa", path=str(root), **{"num_classes": 7, **options})


def refusal(root, **options) -> str:
    with pytest.raises(DataError) as error:
        repa(root, **options)
    return str(error.value)


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_means_labels_and_images_are_joined_by_number(tree, workers):
    dataset = repa(tree, images=True, workers=workers)
    assert len(dataset) == 5 and dataset.shape == (3, 5, 5) and not dataset.data_are_images
    batch = dataset.batch([4, 1, 4, 2])
    for row, place in enumerate([4, 1, 4, 2]):
        mean = values_of(NUMBERS[place])[:3] * np.float32(0.18215)
        np.testing.assert_allclose(batch["data"][row].numpy(), mean, rtol=3e-7, atol=0)
        assert batch["label"][row] == LABELS[place] and batch["index"][row] == place
        np.testing.assert_array_equal(batch["image"][row].numpy(), pixels_of(NUMBERS[place]).transpose(2, 0, 1))
    assert batch["data"].dtype == torch.float32 and batch["image"].dtype == torch.uint8
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    assert "image" not in repa(tree).batch([0])


def test_each_visit_draws_from_the_posterior_by_its_position(tree):
    dataset, seed = repa(tree, scale=0.5), 11
    batches = list(dataset.batches(3, 4, seed))
    for step, batch in enumerate(batches):
        noise = Draws(seed).normal("posterior noise", range(3 * step, 3 * step + 3), (3, 5, 5)).numpy()
        for row, index in enumerate(batch["index"].tolist()):
            mean, deviation = np.split(values_of(NUMBERS[index]).astype(np.float64), 2)
            expected = 0.5 * (mean + deviation * noise[row])
            np.testing.assert_allclose(batch["data"][row].numpy(), expected, rtol=1e-6, atol=1e-6)
        assert set(batch) == {"data", "label", "index"}
    visits = torch.cat([batch["data"] for batch in batches])
    indices = torch.cat([batch["index"] for batch in batches])
    twice = visits[indices == indices[0]]
    assert len(twice) == 3 - int(indices[:12].bincount(minlength=5)[indices[0]] == 2) and not twice[0].equal(twice[1])


def test_stored_values_are_loaded_and_finished_elsewhere(tree):
    dataset = repa(tree)
    loaded = dataset.load([1], Draws(0).at(range(5, 6)))
    np.testing.assert_array_equal(loaded["data"][0].numpy(), values_of(1))
    finished = dataset.finish(loaded, Draws(0).at(range(5, 6)))
    assert finished["data"].shape == (1, 3, 5, 5) and loaded["data"].shape == (1, 6, 5, 5)


def test_what_is_known_of_the_autoencoder(tree):
    told = repa(tree, scale=0.25).latents_of
    assert told["scaling"]["mean"] == [0.0] * 3 and told["scaling"]["std"] == [4.0] * 3
    assert told["input_range"] == [-1, 1] and repa(tree).latents_of["scaling"]["std"][0] == pytest.approx(1 / 0.18215)


def test_class_folders_give_labels_in_the_order_of_their_names(tmp_path):
    for number, folder in ((2, "n02"), (0, "n01/more"), (3, "n10"), (1, "n02")):
        file = tmp_path / "vae-sd" / folder / f"img-mean-std-{number:08d}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, values_of(number))
    batch = repa(tmp_path, num_classes=3).batch(range(4))
    assert batch["label"].tolist() == [0, 1, 1, 2]
    np.testing.assert_allclose(batch["data"][1].numpy(), values_of(1)[:3] * np.float32(0.18215), rtol=3e-7)


def test_null_labels_are_told_and_read_without_classes(tree):
    (tree / "vae-sd" / "dataset.json").write_text('{"labels": null}')
    assert "without labels (null)" in refusal(tree) and "set num_classes=0" in refusal(tree)
    dataset = repa(tree, num_classes=0)
    assert dataset.num_classes == 0 and dataset.batch(range(5))["label"].tolist() == [0] * 5


def test_statistics_are_those_of_the_means(tree, monkeypatch):
    monkeypatch.setattr("pathline.data.layouts.base._CHUNK", 2)
    found = json.loads(json.dumps(repa(tree, scale=2.0).statistics))
    means = 2 * np.stack([values_of(number)[:3] for number in NUMBERS]).astype(np.float64)
    np.testing.assert_allclose(found["mean"], means.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found["std"], means.std((0, 2, 3), ddof=1), rtol=1e-6)
    assert found["range"] == pytest.approx([means.min(), means.max()], rel=1e-6)
    assert found["over"] == {"samples": 5, "looked at": 5, "of": 5, "seed": 0}


def test_statistics_of_many_are_those_of_a_sample_without_what_is_not_finite(tree, monkeypatch):
    monkeypatch.setattr("pathline.data.layouts.base.SURVEYED", 3)
    broken = values_of(2)
    broken[1, 2, 3] = np.nan
    np.save(tree / "vae-sd" / moment_file(2), broken)
    chosen = [place for place in Draws(0).permutation("statistics", 5)[:3] if NUMBERS[place] != 2]
    means = 0.18215 * np.stack([values_of(NUMBERS[place])[:3] for place in chosen]).astype(np.float64)
    found = repa(tree).statistics
    np.testing.assert_allclose(found["mean"], means.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    assert found["over"] == {"samples": len(chosen), "looked at": 3, "of": 5, "seed": 0}
    for number in NUMBERS:
        np.save(tree / "vae-sd" / moment_file(number), broken * np.float32(np.inf))
    with pytest.raises(DataError, match="without a sample of finite values"):
        _ = repa(tree).statistics


def test_the_manifest_tells_of_names_sizes_and_labels(tree):
    manifest = json.loads(json.dumps(repa(tree).manifest))
    size = (tree / "vae-sd" / moment_file(0)).stat().st_size
    names = "".join(f"{moment_file(number)}\0{size}\n" for number in NUMBERS).encode()
    files = [(tree / "vae-sd" / moment_file(number)).read_bytes() for number in NUMBERS]
    names += b"".join(hashlib.sha256(content).digest() for content in files)
    assert manifest["sha256"] == hashlib.sha256(names + np.array(LABELS, "<i8").tobytes()).hexdigest()
    assert (manifest["name"], manifest["kind"], manifest["count"]) == ("repa", "moments", 5)
    assert manifest["shape"] == [3, 5, 5] and "contents of 64" in manifest["sha256_of"]
    write_labels(tree, (3, 0, 6, 1, 4))
    assert repa(tree).manifest["sha256"] != manifest["sha256"]


def test_training_goes_on_from_a_stop_as_if_there_was_none(tmp_path):
    write_tree(tmp_path / "tree", shape=(8, 8, 8), images=False)
    backbone = {"name": "sit", "input_size": 8, "patch_size": 4, "in_channels": 4, "hidden_size": 12, "depth": 1}
    entries = {
        "data": {"name": "repa", "path": str(tmp_path / "tree"), "num_classes": 7},
        "backbone": {**backbone, "num_heads": 3, "num_classes": 7},
        "objective": "velocity",
        "log": {"tensorboard": False},
    }

    def train(folder: str, steps: int):
        options = {"steps": steps, "global_batch": 3, "folder": str(tmp_path / folder), "accelerator": "cpu"}
        trainer = Trainer(resolve({**entries, "train": options}))
        trainer.run()
        return {name: value.clone() for name, value in trainer.parts.backbone.state_dict().items()}

    whole = train("whole", 5)
    train("parts", 2)
    parts = train("parts", 5)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_one_file_missing_and_one_added_are_named_though_their_number_is_right(tree):
    (tree / "images/00001/img00000002.png").unlink()
    Image.fromarray(pixels_of(0)).save(tree / "images/00001/img00000017.png")
    said = refusal(tree)
    assert "00001/img-mean-std-00000002.npy in vae-sd" in said and "00001/img00000017.png in images" in said


def test_one_latent_missing_is_named(tree):
    (tree / "vae-sd" / moment_file(4)).unlink()
    assert f"1 labels without a file ['{moment_file(4)}']" in refusal(tree)
    (tree / "vae-sd" / "dataset.json").write_text(
        json.dumps({"labels": [[moment_file(number), 1] for number in NUMBERS if number != 4]})
    )
    assert "00002/img00000004.png in images" in refusal(tree)


def test_one_latent_added_is_named(tree):
    np.save(tree / "vae-sd" / moment_file(5), values_of(5))
    for num_classes in (7, 0):
        assert f"1 without a label ['{moment_file(5)}']" in refusal(tree, num_classes=num_classes)
    (tree / "vae-sd/dataset.json").unlink()
    assert f"{moment_file(5)} in vae-sd" in refusal(tree, num_classes=0)


def test_many_files_are_told_by_the_first(tree):
    (tree / "vae-sd/dataset.json").unlink()
    for number in range(5, 15):
        np.save(tree / "vae-sd/00000" / f"img-mean-std-{number:08d}.npy", values_of(number))
    assert "00000/img-mean-std-00000009.npy and 5 more in vae-sd" in refusal(tree, num_classes=0)


@pytest.mark.parametrize("num_classes", [7, 0])
def test_numbers_that_are_missing_everywhere_are_told(num_classes, tree):
    for number in (1, 3):
        (tree / "vae-sd" / moment_file(number)).unlink()
        (tree / "images" / f"{number // 2:05d}" / f"img{number:08d}.png").unlink()
    pairs = [[moment_file(number), 0] for number in (0, 2, 4)]
    (tree / "vae-sd/dataset.json").write_text(json.dumps({"labels": pairs}))
    said = refusal(tree, num_classes=num_classes)
    assert f"got 3 files in {tree / 'vae-sd'} with numbers up to 4, expected 5; make 1, 3 anew" in said


def test_images_of_other_sides_are_refused(tree):
    for number in NUMBERS:
        Image.new("RGB", (40, 40)).save(tree / "images" / f"{number // 2:05d}" / f"img{number:08d}.png")
    assert len(repa(tree)) == 5
    first = tree / "images/00000/img00000000.png"
    for width, height in ((20, 15), (15, 20), (18, 18), (3, 3)):
        Image.new("RGB", (width, height)).save(first)
        assert f"got {first} of {width} x {height} pixels beside latents of 5 x 5" in refusal(tree)


def test_images_beside_latents_that_are_not_square_are_refused(tmp_path):
    write_tree(tmp_path, shape=(6, 5, 4))
    assert "of 20 x 20 pixels beside latents of 4 x 5" in refusal(tmp_path)


def test_deviations_that_are_a_logarithm_are_refused(tree):
    file = tree / "vae-sd" / moment_file(3)
    values = values_of(3)
    values[3:] = np.log(values[3:] ** 2)
    np.save(file, values)
    with pytest.raises(DataError, match=r"img-mean-std-00000003\.npy with negative values in its second half.*logvar"):
        repa(tree).batch([3])
    values = values_of(0)
    values[-1, -1, -1] = -1e-6
    np.save(tree / "vae-sd" / moment_file(0), values)
    assert "expected standard deviations" in refusal(tree)
    values[-1, -1, -1] = 0
    values[:3] = -1
    np.save(tree / "vae-sd" / moment_file(0), values)
    assert len(repa(tree)) == 5


def test_a_path_may_begin_with_the_home_folder(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree.parent))
    assert len(repa(f"~/{tree.name}")) == 5


@pytest.mark.parametrize("stray", ["images/preview.png", "images/00000/img00000000.jpg", "vae-sd/00000/notes.txt"])
def test_a_stray_file_is_named(stray, tree):
    (tree / stray).write_bytes(b"")
    folder, _, name = stray.partition("/")
    assert f"got {name} in {tree / folder}" in refusal(tree)


def test_hidden_files_are_left_alone(tree):
    for name in ("images/.DS_Store", "vae-sd/00000/._img-mean-std-00000000.npy"):
        (tree / name).write_bytes(b"as some systems write")
    assert len(repa(tree)) == 5


def test_a_number_twice_is_refused(tree):
    np.save(tree / "vae-sd/00001/img-mean-std-00000001.npy", values_of(1))
    assert "expected each number once" in refusal(tree)


def test_images_that_are_asked_for_and_not_there(tmp_path):
    write_tree(tmp_path, images=False)
    assert len(repa(tmp_path)) == 5
    assert f"got nothing at {tmp_path / 'images'}" in refusal(tmp_path, images=True)


def test_nothing_there(tmp_path):
    assert f"got nothing at {tmp_path / 'vae-sd'}" in refusal(tmp_path)
    (tmp_path / "vae-sd").mkdir()
    assert f"got no files in {tmp_path / 'vae-sd'}" in refusal(tmp_path)
    with pytest.raises(DataError, match="cannot be looked at"):
        repa("a" * 5000)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ('{"labels": [["a", 1]', "not JSON"),
        ("[" * 5000, "not JSON"),
        ('{"labels": 3}', "as a list of pairs"),
        ('{"labels": [["a"]]}', "as a list of pairs"),
        ('{"labels": [[1, 2]]}', "as a list of pairs"),
        ("{}", 'without "labels"'),
        (f'{{"labels": [["{moment_file(0)}", 1]]}}', f"4 without a label ['{moment_file(1)}']"),
        (
            json.dumps({"labels": [[moment_file(number % 5), number] for number in range(6)]}),
            f"{moment_file(0)} twice in",
        ),
        (" " * 20_000, "it is no list of their labels"),
    ],
)
def test_labels_that_are_none(labels, said, tree):
    (tree / "vae-sd" / "dataset.json").write_text(labels)
    message = refusal(tree)
    assert said in message and "dataset.json" in message


@pytest.mark.parametrize("label", [-1, 7, 1.0, True, None, "3", [0, 1]])
def test_labels_out_of_range_or_of_another_type(label, tree):
    write_labels(tree, (3, 0, label, 1, 5))
    file = tree / "vae-sd" / moment_file(2)
    told = f"the label {label}" if type(label) is int else f"a label of type {type(label).__name__}"
    assert f"got {told} of {file}, expected" in refusal(tree)
    assert repa(tree, num_classes=0).batch([2])["label"].tolist() == [0]  # where labels mean nothing


def classes_of(root, *folders: str) -> None:
    for number, folder in enumerate(folders):
        file = root / "vae-sd" / folder / f"img-mean-std-{number:08d}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, values_of(number))


def test_a_class_folder_that_is_missing_or_empty_is_refused(tmp_path):
    classes_of(tmp_path, "n01", "n01", "n03", "n04")
    for num_classes in (2, 4, 1000):
        said = refusal(tmp_path, num_classes=num_classes)
        assert f"got 3 class folders in {tmp_path / 'vae-sd'} for num_classes {num_classes}" in said
    assert repa(tmp_path, num_classes=3).batch(range(4))["label"].tolist() == [0, 0, 1, 2]
    (tmp_path / "vae-sd/n02").mkdir()
    for num_classes in (3, 4):
        said = refusal(tmp_path, num_classes=num_classes)
        assert f"got no image in the folder n02 of {tmp_path / 'vae-sd'}" in said


def test_folders_that_only_count_are_no_classes(tree):
    (tree / "vae-sd" / "dataset.json").unlink()
    assert "nor a folder a class" in refusal(tree)


def saved(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def forged(shape: str, size: int = 600, fortran: bool = False) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    header += b" " * (118 - len(header)) if len(header) < 118 else b""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(size)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no whole .npy file"),
        (b"\x93NUMPY\x01\x00\xff\xff", "no whole .npy file"),
        (saved(np.zeros((6, 5, 5), np.float64)), "of type float64, expected float16 or float32"),
        (saved(np.zeros((6, 5, 5), ">f4")), "of type >f4"),
        (saved(np.array([{}, None])), "of type object"),
        (saved(np.zeros((1, 6, 5, 7), np.float32)), "of shape (1, 6, 5, 7), expected (2C, H, W)"),
        (saved(np.zeros((5, 5, 7), np.float32)), "of shape (5, 5, 7), expected (2C, H, W)"),
        (saved(np.zeros((0, 5, 7), np.float32)), "of shape (0, 5, 7)"),
        (saved(np.asfortranarray(np.ones((6, 5, 5), np.float32))), "Fortran order"),
        (forged("(6, 5, 8)"), "truncated or forged"),
        (forged("(10**12, 5, 7)"), "header that is none"),
        (forged("(1000000000000, 5, 7)"), "truncated or forged"),
        (forged("(-6, -5, 7)"), "truncated or forged"),
        (forged("(6, 5, 7"), "header that is none"),
        (forged("(__import__('os').abort(), 5, 7)"), "header that is none"),
    ],
)
def test_an_array_that_is_none(content, said, tree):
    file = tree / "vae-sd" / moment_file(0)
    file.write_bytes(content)
    message = refusal(tree)
    assert said in message and str(file) in message


def test_a_truncated_file_is_named_before_training(tree):
    file = tree / "vae-sd" / moment_file(3)
    file.write_bytes(file.read_bytes()[:-4])
    assert f"got {moment_file(3)} in {tree / 'vae-sd'} of another size" in refusal(tree)


def test_a_file_that_differs_is_named_when_it_is_read(tree):
    dataset = repa(tree, images=True)
    file = tree / "vae-sd" / moment_file(1)
    file.write_bytes(saved(values_of(1).reshape(2, 15, 5)))
    with pytest.raises(DataError, match=r"img-mean-std-00000001\.npy of shape \(2, 15, 5\)"):
        dataset.batch([0, 1])
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(DataError, match=r"img-mean-std-00000001\.npy with another length"):
        dataset.batch([1])
    file.unlink()
    with pytest.raises(DataError, match=r"img-mean-std-00000001\.npy, which cannot be read"):
        dataset.batch([1])
    np.save(file, values_of(1))
    picture = tree / "images/00001/img00000002.png"
    picture.write_bytes(b"none" * (picture.stat().st_size // 4) + b"n" * (picture.stat().st_size % 4))
    with pytest.raises(DataError, match=r"img00000002\.png"):
        dataset.batch([2])
    Image.fromarray(pixels_of(0, 8)).save(picture)
    with pytest.raises(DataError, match=r"img00000002\.png of shape \(3, 8, 8\).*expected \(3, 20, 20\)"):
        repa(tree, images=True).batch([0, 2])


def test_links_out_of_the_tree_are_refused(tree, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    np.save(outside / "x.npy", values_of(1))
    file = tree / "vae-sd" / moment_file(1)
    file.unlink()
    file.symlink_to(outside / "x.npy")
    assert f"got {file}, a link out of" in refusal(tree)
    file.unlink()
    file.symlink_to(tree / "vae-sd" / moment_file(0))
    assert np.array_equal(repa(tree).load([1], Draws(0).at([0]))["data"][0].numpy(), values_of(0))
    (tree / "vae-sd" / "loop").symlink_to(tree / "vae-sd")
    assert "a link to a folder is none" in refusal(tree)


def test_options(tree):
    for options in ({"scale": 0}, {"scale": float("inf")}, {"num_classes": -1}, {"workers": 0}):
        with pytest.raises(InputError):
            repa(tree, **options)
    for options in ({"scale": "1"}, {"scale": True}, {"num_classes": 2.0}, {"workers": 1.0}, {"images": 1}):
        with pytest.raises(InputTypeError):
            repa(tree, **options)
    with pytest.raises(InputTypeError):
        data.build("repa", path=3)
    with pytest.raises(InputError, match="numbers from 0 to 4"):
        repa(tree).batch([5])


# --- EDM2 ------------------------------------------------------------------------------------------------------------


def archive(place, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(place, "w", compression) as file:
        for name, content in files.items():
            file.writestr(name, content)


def edm2_files(shape=(8, 3, 5)) -> dict[str, bytes]:
    pairs = [[moment_file(number), label] for number, label in zip(NUMBERS, LABELS, strict=True)]
    files = {moment_file(number): saved(values_of(number, shape)) for number in NUMBERS}
    return {"dataset.json": json.dumps({"labels": pairs}).encode(), **files}


def edm2(place, **options):
    return data.build("edm2", path=str(place), **{"num_classes": 7, **options})


@pytest.mark.parametrize("packed", [True, False])
def test_edm2s_latents_have_half_a_standard_deviation(packed, tmp_path):
    place = tmp_path / "latents.zip" if packed else tmp_path / "latents"
    if packed:
        archive(place, edm2_files())
    else:
        for name, content in edm2_files().items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
    dataset = edm2(place)
    raw_mean, raw_std = np.array([5.81, 3.25, 0.12, -2.15]), np.array([4.17, 4.62, 3.71, 3.28])
    scale = 0.5 / raw_std
    bias = -raw_mean * scale
    batch, seed = dataset.batch([3, 0]), 5
    for row, place_ in enumerate([3, 0]):
        mean = values_of(NUMBERS[place_], (8, 3, 5))[:4].astype(np.float64)
        expected = mean * scale[:, None, None] + bias[:, None, None]
        np.testing.assert_allclose(batch["data"][row].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert batch["label"].tolist() == [1, 3]
    (visit,) = dataset.batches(2, 1, seed, start=1)
    noise = Draws(seed).normal("posterior noise", range(2, 4), (4, 3, 5)).double().numpy()
    for row, index in enumerate(visit["index"].tolist()):
        mean, deviation = np.split(values_of(NUMBERS[index], (8, 3, 5)).astype(np.float64), 2)
        expected = (mean + deviation * noise[row]) * scale[:, None, None] + bias[:, None, None]
        np.testing.assert_allclose(visit["data"][row].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert dataset.latents_of["input_range"] == [0, 1]
    assert dataset.latents_of["scaling"]["std"] == pytest.approx(2 * raw_std)


def test_edm2_and_repa_tell_apart_what_has_the_same_names(tmp_path):
    """EDM2's autoencoder was fed [0, 1]: the same tree, other contents."""
    write_tree(tmp_path, shape=(8, 3, 5), images=False)
    first, second = repa(tmp_path).latents_of, edm2(tmp_path / "vae-sd").latents_of
    assert first["input_range"] != second["input_range"] and first["scaling"] != second["scaling"]


def test_archives_that_are_refused(tmp_path):
    place, files = tmp_path / "x.zip", edm2_files()

    def said() -> str:
        with pytest.raises(DataError) as error:
            edm2(place)
        return str(error.value)

    archive(place, {**files, "../outside.npy": b"x"})
    assert "the member '../outside.npy' of" in said() and str(place) in said()
    archive(place, {**files, "/etc/img-mean-std-00000001.npy": b"x"})
    assert "the member '/etc/img-mean-std-00000001.npy' of" in said()
    archive(place, files)
    with zipfile.ZipFile(place, "a") as file:
        link = zipfile.ZipInfo("00002/img-mean-std-00000005.npy")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc/passwd")
    assert f"got {link.filename} of {place}, which is a link or a device" in said()
    archive(place, {**files, moment_file(1): b""})
    assert "no whole .npy file" in said() or "of another size" in said()
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(place, "a") as file:
        file.writestr(moment_file(1), b"")
    assert f"got {moment_file(1)} twice in {place}" in said()
    archive(place, files)
    whole = place.read_bytes()
    place.write_bytes(whole[:-30])
    assert "no whole zip archive" in said()
    place.write_bytes(b"nothing")
    assert "no whole zip archive" in said()
    archive(place, edm2_files((6, 3, 5)))
    assert "moments of 3 channels" in said()
    archive(place, {"00000/img00000000.png": b""})
    assert "img00000000.png" in said()
    place.unlink()
    assert f"got {place}, which cannot be looked at" in said()


def test_members_may_be_deflated(tmp_path):
    archive(tmp_path / "x.zip", edm2_files(), zipfile.ZIP_DEFLATED)
    archive(tmp_path / "y.zip", edm2_files())
    first, second = (edm2(tmp_path / name).batch(range(5)) for name in ("x.zip", "y.zip"))
    assert all(torch.equal(first[name], second[name]) for name in ("data", "label", "index"))


def test_a_damaged_member_is_named_when_it_is_read(tmp_path):
    place = tmp_path / "x.zip"
    archive(place, edm2_files())
    dataset = edm2(place)
    content = bytearray(place.read_bytes())
    with zipfile.ZipFile(place) as file:
        content[file.getinfo(moment_file(1)).header_offset + 300] ^= 255
    place.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"img-mean-std-00000001\.npy of .*x\.zip with other bytes than"):
        dataset.batch([1])
    place.write_bytes(b"")
    with pytest.raises(DataError, match=r"img-mean-std-00000001\.npy of .*truncated"):
        dataset.batch([1])
