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

NUMBERS = (0, 2, 1000, 1001, 99999)  # gaps, and numbers of other folders
LABELS = (3, 0, 6, 1, 5)


def values_of(number: int, shape=(6, 5, 7)) -> np.ndarray:
    mean, deviation = np.random.default_rng(number).normal(size=(2, shape[0] // 2, *shape[1:]))
    return np.concatenate([3 * mean, np.abs(deviation)]).astype(np.float32)


def pixels_of(number: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(number + 7).integers(0, 256, (size, size, 3), np.uint8)


def moment_file(number: int) -> str:
    return f"{number // 1000:05d}/img-mean-std-{number:08d}.npy"


def write_tree(root, *, shape=(6, 5, 7), images: bool = True) -> None:
    for number in NUMBERS:
        file = root / "vae-sd" / moment_file(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, values_of(number, shape))
        if images:
            picture = root / "images" / f"{number // 1000:05d}" / f"img{number:08d}.png"
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
    assert len(dataset) == 5 and dataset.shape == (3, 5, 7) and not dataset.data_are_images
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
        noise = Draws(seed).normal("posterior noise", range(3 * step, 3 * step + 3), (3, 5, 7)).numpy()
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
    np.testing.assert_array_equal(loaded["data"][0].numpy(), values_of(2))
    finished = dataset.finish(loaded, Draws(0).at(range(5, 6)))
    assert finished["data"].shape == (1, 3, 5, 7) and loaded["data"].shape == (1, 6, 5, 7)


def test_what_is_known_of_the_autoencoder(tree):
    told = repa(tree, scale=0.25).latents_of
    assert told["scaling"]["mean"] == [0.0] * 3 and told["scaling"]["std"] == [4.0] * 3
    assert told["input_range"] == [-1, 1] and repa(tree).latents_of["scaling"]["std"][0] == pytest.approx(1 / 0.18215)


def test_class_folders_give_labels_in_the_order_of_their_names(tmp_path):
    for number, folder in ((5, "n02"), (3, "n01/more"), (9, "n10"), (4, "n02")):
        file = tmp_path / "vae-sd" / folder / f"img-mean-std-{number:08d}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, values_of(number))
    batch = repa(tmp_path, num_classes=3).batch(range(4))
    assert batch["label"].tolist() == [0, 1, 1, 2]  # of the numbers 3, 4, 5, 9
    np.testing.assert_allclose(batch["data"][1].numpy(), values_of(4)[:3] * np.float32(0.18215), rtol=3e-7)


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
    monkeypatch.setattr("pathline.data.layouts.base.STATISTICS", 3)
    broken = values_of(1000)
    broken[1, 2, 3] = np.nan
    np.save(tree / "vae-sd" / moment_file(1000), broken)
    chosen = [place for place in Draws(0).permutation("statistics", 5)[:3] if NUMBERS[place] != 1000]
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
    assert manifest["shape"] == [3, 5, 7] and "contents of 64" in manifest["sha256_of"]
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
    (tree / "images/00001/img00001000.png").unlink()
    Image.fromarray(pixels_of(0)).save(tree / "images/00001/img00001777.png")
    said = refusal(tree)
    assert "00001/img-mean-std-00001000.npy in vae-sd" in said and "00001/img00001777.png in images" in said


def test_one_latent_missing_is_named(tree):
    (tree / "vae-sd" / moment_file(2)).unlink()
    assert f"labels of {moment_file(2)}" in refusal(tree)
    (tree / "vae-sd" / "dataset.json").write_text(
        json.dumps({"labels": [[moment_file(number), 1] for number in NUMBERS if number != 2]})
    )
    assert "00000/img00000002.png in images" in refusal(tree)


def test_one_latent_added_is_named(tree):
    np.save(tree / "vae-sd" / moment_file(7), values_of(7))
    assert f"no label of {moment_file(7)}" in refusal(tree)
    assert f"{moment_file(7)} in vae-sd" in refusal(tree, num_classes=0)


def test_many_files_are_told_by_the_first(tree):
    for number in range(10, 20):
        np.save(tree / "vae-sd" / moment_file(number), values_of(number))
    assert f"{moment_file(14)} and 5 more in vae-sd" in refusal(tree, num_classes=0)


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
    np.save(tree / "vae-sd/00001/img-mean-std-00000002.npy", values_of(2))
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
        ('{"labels": 3}', "without a list of pairs"),
        ('{"labels": [["a"]]}', "without a list of pairs"),
        ('{"labels": [[1, 2]]}', "without a list of pairs"),
        ("{}", "without labels (null)"),
        (f'{{"labels": [["{moment_file(0)}", 1]]}}', f"no label of {moment_file(2)}"),
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
    assert f"got the label {label!r} of {tree / 'vae-sd' / moment_file(1000)}, expected 0 to 6" in refusal(tree)


def test_folders_that_only_count_are_no_classes(tree):
    (tree / "vae-sd" / "dataset.json").unlink()
    assert "nor a folder a class" in refusal(tree)


def saved(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def forged(shape: str, size: int = 840, fortran: bool = False) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    header += b" " * (118 - len(header)) if len(header) < 118 else b""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(size)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no whole .npy file"),
        (b"\x93NUMPY\x01\x00\xff\xff", "no whole .npy file"),
        (saved(np.zeros((6, 5, 7), np.float64)), "of type float64, expected float16 or float32"),
        (saved(np.zeros((6, 5, 7), ">f4")), "of type >f4"),
        (saved(np.array([{}, None])), "of type object"),
        (saved(np.zeros((1, 6, 5, 7), np.float32)), "of shape (1, 6, 5, 7), expected (2C, H, W)"),
        (saved(np.zeros((5, 5, 7), np.float32)), "of shape (5, 5, 7), expected (2C, H, W)"),
        (saved(np.zeros((0, 5, 7), np.float32)), "of shape (0, 5, 7)"),
        (saved(np.asfortranarray(np.ones((6, 5, 7), np.float32))), "Fortran order"),
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
    file = tree / "vae-sd" / moment_file(1001)
    file.write_bytes(file.read_bytes()[:-4])
    assert f"got {moment_file(1001)} in {tree / 'vae-sd'} of another size" in refusal(tree)


def test_a_file_that_differs_is_named_when_it_is_read(tree):
    dataset = repa(tree, images=True)
    file = tree / "vae-sd" / moment_file(2)
    file.write_bytes(saved(values_of(2).reshape(6, 7, 5)))
    with pytest.raises(DataError, match=r"img-mean-std-00000002\.npy of shape \(6, 7, 5\)"):
        dataset.batch([0, 1])
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(DataError, match=r"img-mean-std-00000002\.npy with another length"):
        dataset.batch([1])
    file.unlink()
    with pytest.raises(DataError, match=r"img-mean-std-00000002\.npy, which cannot be read"):
        dataset.batch([1])
    np.save(file, values_of(2))
    picture = tree / "images/00001/img00001000.png"
    picture.write_bytes(b"none" * (picture.stat().st_size // 4) + b"n" * (picture.stat().st_size % 4))
    with pytest.raises(DataError, match=r"img00001000\.png"):
        dataset.batch([2])
    Image.fromarray(pixels_of(0, 8)).save(picture)
    with pytest.raises(DataError, match=r"img00001000\.png of shape \(3, 8, 8\).*expected \(3, 16, 16\)"):
        repa(tree, images=True).batch([0, 2])


def test_links_out_of_the_tree_are_refused(tree, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    np.save(outside / "x.npy", values_of(2))
    file = tree / "vae-sd" / moment_file(2)
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

    archive(place, files, zipfile.ZIP_DEFLATED)
    assert "compressed or encrypted" in said() and str(place) in said()
    archive(place, {**files, "../outside.npy": b"x"})
    assert "the member '../outside.npy', which leads out of it" in said()
    archive(place, {**files, "/etc/img-mean-std-00000001.npy": b"x"})
    assert "the member '/etc/img-mean-std-00000001.npy', which leads out of it" in said()
    archive(place, {**files, moment_file(2): b""})
    assert "no whole .npy file" in said() or "of another size" in said()
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(place, "a") as file:
        file.writestr(moment_file(2), b"")
    assert "twice in one archive" in said()
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
    assert f"got nothing at {place}" in said()


def test_a_damaged_member_is_named_when_it_is_read(tmp_path):
    place = tmp_path / "x.zip"
    archive(place, edm2_files())
    dataset = edm2(place)
    content = bytearray(place.read_bytes())
    with zipfile.ZipFile(place) as file:
        content[file.getinfo(moment_file(2)).header_offset + 300] ^= 255
    place.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"img-mean-std-00000002\.npy with another CRC"):
        dataset.batch([1])
    place.write_bytes(b"")
    with pytest.raises(DataError, match=r"img-mean-std-00000002\.npy with another"):
        dataset.batch([1])
