"""Prepared data in training: rows against what is stored, visits against the formula, and all that must not be read."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pathline import CheckpointError, DataError, Draws, InputError, InputTypeError, data
from pathline.core.config import resolve
from pathline.data.features import FeatureFile, write_features
from pathline.data.prepare import Options, command
from pathline.data.prepare.command import prepare
from pathline.encoders import Cached, Computed
from pathline.encoders import cache as features
from pathline.training import Trainer

spec = importlib.util.spec_from_file_location("preparing", Path(__file__).with_name("preparing.py"))
preparing = importlib.util.module_from_spec(spec)
spec.loader.exec_module(preparing)
Pictures, Coder, Tokens = preparing.Pictures, preparing.Coder, preparing.Tokens

R = 10
FULL = Options(R, flip=True, images=True, rows_per_shard=17)
FEATURES = {"tokens": (preparing.TOKENS, Tokens())}
MEAN, STD = (torch.tensor(values)[:, None, None] for values in (preparing.MEAN, preparing.STD))
CPU = torch.device("cpu")
ASKED = [36, 3, 17, 3, 0, 20, 34, 16]  # of all shards, one twice


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Latents of 37 pictures and of their mirror images, with pixels and features."""
    path = tmp_path_factory.mktemp("prepared") / "full"
    prepare(Pictures(), path, FULL, autoencoder=Coder(), features=FEATURES)
    return path


@pytest.fixture(scope="module")
def pixels(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prepared") / "pixels"
    prepare(Pictures(), path, Options(R, flip=True, rows_per_shard=17), features=FEATURES)
    return path


def build(path, **options):
    return data.build("prepared", path=str(path), **options)


def rows(path, name) -> torch.Tensor:
    return torch.cat([load_file(file)[name] for file in sorted(path.glob("shard-*"))])


def visit(dataset, indices, seed=5, step=2):
    draws = Draws(seed).at(range(100, 100 + len(indices)), step=step)
    return dataset.finish(dataset.load(indices, draws), draws)


def flips_and_noise(count, shape, seed=5):
    """What a visit draws, by the streams' names."""
    draws = Draws(seed)
    ids = range(100, 100 + count)
    return draws.uniform("flip", ids) < 0.5, draws.normal("posterior noise", ids, shape)


# --- what is read


def test_a_batch_is_the_scaled_mean_of_the_images_as_they_are(folder):
    dataset = build(folder)
    assert (len(dataset), dataset.shape, dataset.num_classes, dataset.data_are_images) == (37, (2, 5, 5), 3, False)
    stored = rows(folder, "moments").float()
    for indices in (ASKED, range(37), torch.tensor([4]), np.array([30, 2])):
        batch, chosen = dataset.batch(indices), torch.as_tensor(list(indices))
        assert torch.equal(batch["data"], (stored[chosen, :2] - MEAN) / STD)
        assert torch.equal(batch["label"], rows(folder, "labels")[chosen]) and torch.equal(batch["index"], chosen)
        assert set(batch) == {"data", "label", "index"}
        assert batch["label"].dtype == batch["index"].dtype == torch.int64
    assert dataset.batch([])["data"].shape == (0, 2, 5, 5)


def test_a_visit_draws_side_and_latent(folder):
    dataset = build(folder, images=True)
    found = visit(dataset, ASKED)
    flipped, noise = flips_and_noise(len(ASKED), (2, 5, 5))
    assert 0 < int(flipped.sum()) < len(ASKED)
    plain, mirrored = (rows(folder, name).float()[ASKED] for name in ("moments", "moments_flip"))
    mean, std = torch.where(flipped[:, None, None, None], mirrored, plain).chunk(2, dim=1)
    assert torch.equal(found["data"], (mean + std * noise - MEAN) / STD)
    images = rows(folder, "images")[ASKED]
    assert torch.equal(found["image"], torch.where(flipped[:, None, None, None], images.flip(3), images))
    assert set(found) == {"data", "label", "index", "image"} and found["image"].dtype == torch.uint8
    assert torch.equal(dataset.batch(ASKED)["image"], images)


def test_what_is_loaded_is_as_it_is_stored(folder):
    """Shard by shard, with the places that put rows into order; without them where one shard holds all."""
    loaded = build(folder, images=True, flip=False).load(ASKED, Draws(0).at(range(8)))
    assert loaded["data"].dtype == torch.float16 and loaded["image"].dtype == torch.uint8
    assert sorted(loaded["places"].tolist()) == list(range(8)) and loaded["places"].dtype == torch.int64
    for name, column in (("data", "moments"), ("image", "images")):
        assert torch.equal(loaded[name], rows(folder, column)[sorted(ASKED)])
        assert torch.equal(loaded[name][loaded["places"]], rows(folder, column)[ASKED])
    assert loaded["index"].tolist() == ASKED
    loaded = build(folder, posterior="mean").load(ASKED, Draws(0).at(range(8)))
    assert loaded.keys() == {"data", "label", "index", "places"}


def test_rows_of_one_shard_come_in_the_order_asked_for(tmp_path):
    prepare(Pictures(7), tmp_path, Options(R))
    loaded = build(tmp_path).load([5, 0, 5, 6], Draws(0).at(range(4)))
    assert "places" not in loaded and torch.equal(loaded["data"], rows(tmp_path, "images")[[5, 0, 5, 6]])


def test_another_process_gets_no_copy_of_the_shards(folder):
    """It maps them itself."""
    dataset = build(folder, images=True)
    content = pickle.dumps(dataset)
    assert len(content) < 8000 < sum(path.stat().st_size for path in folder.glob("shard-*"))
    assert torch.equal(visit(pickle.loads(content), ASKED)["data"], visit(dataset, ASKED)["data"])


def test_options_leave_chance_out(folder):
    flipped, noise = flips_and_noise(len(ASKED), (2, 5, 5))
    plain, mirrored = (rows(folder, name).float()[ASKED] for name in ("moments", "moments_flip"))
    mean, std = plain.chunk(2, dim=1)
    found = visit(build(folder, flip=False), ASKED)["data"]
    assert torch.equal(found, (mean + std * noise - MEAN) / STD)
    found = visit(build(folder, posterior="mean"), ASKED)["data"]
    assert torch.equal(found, (torch.where(flipped[:, None, None, None], mirrored, plain)[:, :2] - MEAN) / STD)


def test_draws_have_the_stored_mean_and_deviation(folder):
    """4,000 visits of one sample: the errors of mean and variance are those of independent normals."""
    dataset, count = build(folder, flip=False), 4000
    values = visit(dataset, [7] * count)["data"].double() * STD + MEAN
    mean, std = rows(folder, "moments")[7].double().chunk(2)
    assert float(((values.mean(0) - mean) / std * count**0.5).abs().max()) < 4.5  # of 50 normals: once in 3,000
    ratio = (values.var(0) / std**2 - 1) * (count / 2) ** 0.5
    assert float(ratio.abs().max()) < 4.5


def test_half_of_the_visits_are_of_mirror_images(folder):
    dataset = build(folder, posterior="mean")
    found = visit(dataset, [11] * 1000)["data"]
    plain = dataset.batch([11])["data"]
    share = float((found == plain).flatten(1).all(1).float().mean())
    assert abs(share - 0.5) < 0.065  # four standard errors


def test_pixels_are_images(pixels):
    dataset = build(pixels)
    assert dataset.data_are_images and dataset.shape == (3, R, R) and dataset.latents_of is None and dataset.flip
    images = rows(pixels, "images")[ASKED] / 127.5 - 1
    assert torch.equal(dataset.batch(ASKED)["data"], images)
    flipped, _ = flips_and_noise(len(ASKED), (1,))
    found = visit(dataset, ASKED)
    assert torch.equal(found["data"], torch.where(flipped[:, None, None, None], images.flip(3), images))
    assert torch.equal(visit(build(pixels, flip=False), ASKED)["data"], images)
    assert dataset.load(ASKED, Draws(0).at(range(8)))["data"].dtype == torch.uint8


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_latents_without_a_posterior_or_labels(dtype, tmp_path):
    coder = Coder(deterministic=True)
    prepare(Pictures(7, labelled=False), tmp_path, Options(R, dtype=dtype), autoencoder=coder)
    dataset = build(tmp_path)
    assert (dataset.num_classes, dataset.flip) == (0, False)
    stored = rows(tmp_path, "latents")[[5, 0]].float()
    for found in (dataset.batch([5, 0]), visit(dataset, [5, 0])):
        assert torch.equal(found["data"], (stored - MEAN) / STD) and found["label"].tolist() == [0, 0]


def test_rows_are_counted_without_those_dropped(tmp_path):
    options = Options(R, rows_per_shard=17, on_error="drop")
    prepare(Pictures(broken={0, 3, 30}), tmp_path, options)
    dataset, kept = build(tmp_path), [index for index in range(37) if index not in (0, 3, 30)]
    batch = dataset.batch(range(34))
    assert len(dataset) == 34 and batch["label"].tolist() == [(7 * index) % 3 for index in kept]
    assert batch["index"].tolist() == list(range(34))


def test_statistics_are_those_of_what_training_sees(folder, pixels):
    """Of latents drawn at visits, by the moments; the images themselves."""
    both = torch.cat([rows(folder, name).double() for name in ("moments", "moments_flip")])
    both = both.transpose(0, 1).flatten(1)
    scale, shift = (torch.tensor(values).double() for values in (preparing.STD, preparing.MEAN))
    for options, values in (({}, both), ({"flip": False}, both[:, : 37 * 25])):
        found = json.loads(json.dumps(build(folder, **options).statistics))
        assert found["mean"] == pytest.approx(((values[:2].mean(1) - shift) / scale).tolist(), rel=1e-12)
        deviation = (values[:2].var(1) + values[2:].square().mean(1)).sqrt() / scale
        assert found["std"] == pytest.approx(deviation.tolist(), rel=1e-10)
        ends = (values[:2] - shift[:, None]) / scale[:, None]
        assert found["range"] == pytest.approx([float(ends.min()), float(ends.max())], rel=1e-12)
        means = build(folder, posterior="mean", **options).statistics["std"]
        assert means == pytest.approx((values[:2].std(1) / scale).tolist(), rel=1e-10)
    images = (rows(pixels, "images").double() / 127.5 - 1).transpose(0, 1).flatten(1)
    found = build(pixels).statistics
    assert found["mean"] == pytest.approx(images.mean(1).tolist(), rel=1e-10)
    assert found["std"] == pytest.approx(images.std(1).tolist(), rel=1e-10)


def test_the_manifest_is_small_and_stands_for_the_folder(folder, pixels):
    dataset = build(folder)
    manifest = json.loads(json.dumps(dataset.manifest))
    content = json.loads((folder / "manifest.json").read_text())
    assert manifest["sha256"] == content.pop("sha256")
    assert manifest["sha256"] == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert (manifest["count"], manifest["shape"], manifest["kind"]) == (37, [2, 5, 5], "moments")
    assert len(json.dumps(manifest)) < 300 and build(pixels).manifest["sha256"] != manifest["sha256"]
    assert dataset.latents_of == Coder().manifest


# --- features


def test_features_go_with_the_side_that_is_visited(folder):
    dataset = build(folder)
    source = Cached(folder, {**preparing.TOKENS, "cache": str(folder)}, dataset)
    assert (source.dim, source.grid) == (3, (2, 2)) and source.manifest["cache"] == dataset.manifest["sha256"]
    flipped, _ = flips_and_noise(len(ASKED), (1,))
    plain, mirrored = (rows(folder, name)[ASKED].float() for name in ("features_tokens", "features_tokens_flip"))
    assert not torch.equal(plain, mirrored)
    found = source.tokens(visit(dataset, ASKED), CPU)
    assert torch.equal(found, torch.where(flipped[:, None, None], mirrored, plain)) and found.dtype == torch.float32
    assert torch.equal(source.tokens(dataset.batch(ASKED), CPU), plain)


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_features_of_the_folder_are_those_computed_beside_training(kind, folder, pixels):
    """To the rounding of half precision: the image that is encoded is the one that is trained on."""
    path, options = (folder, {"images": True}) if kind == "latents" else (pixels, {})
    dataset = build(path, **options)
    computed = Computed(Tokens(), dataset)
    if kind == "pixels":
        computed.encoder.forward = lambda images: Tokens()((images + 1) * 127.5)
    batch = visit(dataset, ASKED)
    expected = computed.tokens(batch, CPU)
    cached = build(path)
    found = Cached(path, preparing.TOKENS, cached).tokens(visit(cached, ASKED), CPU)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_features_of_something_else_are_refused(folder, pixels, tmp_path):
    for component, dataset, said in (
        ({**preparing.TOKENS, "resolution": 20}, build(folder), "of another tokens (resolution 10 -> 20)"),
        ({"name": "dinov2-b"}, build(folder), "without features of dinov2-b, in which there are: tokens"),
        (preparing.TOKENS, build(pixels), "of features for data that are not its own"),
        (preparing.TOKENS, data.build("digits"), "of features for data that are not its own"),
    ):
        with pytest.raises(DataError) as error:
            Cached(folder, component, dataset)
        assert said in str(error.value)
    prepare(Pictures(5), tmp_path / "plain", Options(R), features=FEATURES)
    with pytest.raises(DataError, match="without features of mirror images, which the data set gives"):
        Cached(tmp_path / "plain", preparing.TOKENS, build(tmp_path / "plain", flip=True))
    assert Cached(tmp_path / "plain", preparing.TOKENS, build(tmp_path / "plain")).dim == 3


def token_file(path, shape=(5, 6, 2), **changed) -> Path:
    """A file of features as its header may be, forged or not."""
    made = {"weights": "hub", "sha256": "e1", "dim": 2, "grid": [2, 3]}
    told = {"format": "pathline features 1", "component": json.dumps({"name": "tokens"}), "encoder": json.dumps(made)}
    told |= {"data": "{}", "images": "a", "sha256": "b"}
    save_file({"features": torch.zeros(shape).half()}, path, {**told, **changed})
    return path


@pytest.mark.parametrize(
    ("shape", "changed", "said"),
    [
        ((5, 6, 2), {"component": "not json"}, "component: Invalid JSON"),
        ((5, 6, 2), {"data": "3"}, "data: Input should be a valid dictionary"),
        ((5, 6, 2), {"encoder": "[]"}, "encoder: Input should be a valid dictionary"),
        ((5, 6, 2), {"encoder": "{}"}, "encoder.weights: Field required"),
        (
            (5, 6, 2),
            {"encoder": '{"weights": "hub", "sha256": "e1", "grid": [2, "3"]}'},
            "encoder.grid.1: Input should",
        ),
        ((5, 6, 2), {"encoder": "[" * 100_000}, "encoder: Invalid JSON"),
        ((5, 12), {}, "with features of shape (5, 12), expected (N, 6, D)"),
        ((5, 3, 2), {}, "with features of shape (5, 3, 2), expected (N, 6, D) for the grid [2, 3]"),
        ((5, 6, 2, 1), {}, "with features of shape (5, 6, 2, 1), expected (N, 6, D)"),
    ],
)
def test_files_of_features_with_a_forged_header_are_refused(shape, changed, said, tmp_path):
    path = token_file(tmp_path / "features", shape, **changed)
    with pytest.raises(DataError, match="make it anew") as error:
        FeatureFile(path)
    assert str(path) in str(error.value) and said in str(error.value)
    assert FeatureFile(token_file(tmp_path / "whole")).shape == (5, 6, 2)


def test_what_a_killed_command_left_of_features_is_removed(tmp_path):
    """But not what one at work holds a lock of, nor what looks alike."""
    for name in (".x[1].0123abcd", ".x[1].89abcdef", ".x[1].keep", ".y.0123abcd", "x[1]"):
        (tmp_path / name).write_bytes(b"a")
    made = {"weights": "hub", "sha256": "e1", "grid": [1, 2]}
    with (tmp_path / ".x[1].89abcdef").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        write_features(
            tmp_path / "x[1]", [torch.ones(5, 2, 3)], (5, 2, 3), component={}, encoder=made, data={}, images="a"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x[1].89abcdef", ".x[1].keep", ".y.0123abcd", "x[1]"]
    assert FeatureFile(tmp_path / "x[1]").shape == (5, 2, 3)


def test_an_interrupted_command_of_features_says_so(monkeypatch, tmp_path, capsys):
    def interrupted(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "load", interrupted)
    assert features.main(["c.yaml", str(tmp_path / "out"), "--device", "cpu"]) == 75
    assert f"interrupted; nothing was written to {tmp_path / 'out'}" in capsys.readouterr().err


# --- what is refused


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def refusal(path, **options) -> str:
    with pytest.raises(DataError) as error:
        build(path, **options)
    assert str(path) in str(error.value)
    return str(error.value)


def changed(path, *, sealed, **entries) -> None:
    """Change the manifest by dotted places, with the hash that it then has or the one that it had."""
    file = path / "manifest.json"
    content = json.loads(file.read_text())
    for place, value in entries.items():
        *way, last = place.split("__")
        holder = content
        for key in way:
            holder = holder[int(key) if isinstance(holder, list) else key]
        holder[int(last) if isinstance(holder, list) else last] = value
    if sealed:
        rest = {key: value for key, value in content.items() if key != "sha256"}
        content["sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(content))


MANIFESTS = [
    ({"format": "pathline packed 2"}, "of format 'pathline packed 2', expected 'pathline packed 1'"),
    ({"surplus": 1}, "surplus: Extra inputs"),
    ({"count": 36}, "36 rows, 37 in its shards"),
    ({"count": "37"}, "count: Input should be a valid integer"),
    ({"shape": [2, 5, 6]}, "expected [4, 5, 6]"),
    ({"shape": [2, 5]}, "expected"),
    ({"request__class_names": []}, "the columns"),
    ({"request__class_names": ["ant", "bee"]}, "got labels from 0 to 2"),
    ({"latent_kind": "mean"}, "the columns"),
    ({"latent_kind": "samples"}, "latent_kind: Input should be"),
    ({"moments": None}, "moments None of latent_kind moments"),
    ({"moments": "mean, logvar"}, "moments: Input should be 'mean, std'"),
    ({"columns__moments__shape": [4, 5, 7]}, "expected [4, 5, 5]"),
    ({"columns__moments__dtype": "F32"}, "moments of type 'F16'"),
    ({"columns__moments__dtype": "F8"}, "dtype: Input should be"),
    ({"columns__extra": {"dtype": "U8", "shape": [1]}}, "the columns"),
    ({"columns__images__shape": [3, 5, 20]}, "images of shape (17, 3, 10, 10)"),
    ({"columns__images__shape": [3, 0, 20]}, "greater than or equal to 1"),
    ({"shards__0__file": "../x.safetensors"}, "with ../x.safetensors of 17 rows from 0 on, 17 a shard"),
    ({"shards__0__rows": 16, "count": 36, "request__count": 36}, "expected (16, 4, 5, 5)"),
    ({"shards__0__rows": 18, "count": 38, "request__count": 38}, "of 18 rows from 0 on, 17 a shard"),
    ({"shards__0__bytes": 5}, "bytes, expected 5"),
    ({"shards__0__sha256": "zz"}, "sha256: String should match"),
    ({"shards__1__first_index": 16}, "with shard-00001.safetensors of 17 rows from 16 on"),
    ({"statistics__moments__mean": [0.0]}, "expected 4 channels"),
    ({"statistics__moments__std": [0.0, 0.0, 0.0, -1.0]}, "greater than or equal to 0"),
    ({"statistics__moments__low": [0.0, 0.0, 0.0, float("nan")]}, "finite number"),
    ({"statistics": {}}, "statistics of , expected"),
    ({"dropped": [{"index": 5, "key": "a", "reason": "b"}]}, "1 images dropped, of 37"),
    ({"request__flip": False}, "the columns"),
    ({"request__images": False}, "the columns"),
    ({"request__autoencoder": None}, "latent_kind moments with the autoencoder None"),
    ({"request__autoencoder__scaling": None}, "a scaling that is none"),
    ({"request__autoencoder__scaling__std": [1.0, 0.0]}, "a scaling that is none"),
    ({"request__autoencoder__scaling__std": [1.0]}, "a scaling of other than 2 channels"),
    ({"request__encoders": {}}, "the columns"),
    ({"request__encoders__tokens__encoder": {}}, "tokens.encoder.weights: Field required"),
    ({"request__encoders__tokens__encoder__grid": [2]}, "tokens.encoder.grid: List should have at least 2 items"),
    ({"request__encoders__tokens__encoder__grid": [2, 3]}, "expected [6, D] of the grid [2, 3]"),
    ({"columns__features_tokens__shape": [2, 2, 3]}, "features of tokens of shapes [[2, 2, 3], [4, 3]]"),
    ({"request__rows_per_shard": 37}, "of 17 rows from 17 on, 37 a shard"),
    ({"request__rows_per_shard": 0}, "greater than or equal to 1"),
    ({"request__device": 3}, "device: Input should be a valid string"),
]


@pytest.mark.parametrize(("entries", "said"), MANIFESTS, ids=lambda value: str(value)[:40])
def test_a_manifest_that_does_not_match_is_refused(entries, said, copy):
    changed(copy, sealed=True, **entries)
    assert said in refusal(copy)


@pytest.mark.parametrize("entry", ["request__resolution", "request__seed", "statistics__moments__count"])
def test_a_manifest_that_was_changed_is_refused_by_its_hash(entry, copy):
    changed(copy, sealed=False, **{entry: 12})
    assert "other contents than its own hash" in refusal(copy)
    changed(copy, sealed=True, **{entry: 12})
    build(copy)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "which cannot be read"),
        (b"[]", "with a list in it"),
        (b'{"format": "pathline packed 1", "format": "a"}', "a key twice"),
        (b"\xff", "which cannot be read"),
        (b"[" * 100_000, "which cannot be read"),
        (b'{"count": ' + b"9" * 5000 + b"}", "which cannot be read"),
        (b"{}", "of format None"),
        (b'{"format": "pathline packed 1"}', "count: Field required"),
    ],
)
def test_a_manifest_that_is_none_is_refused(content, said, copy):
    (copy / "manifest.json").write_bytes(content)
    assert said in refusal(copy)


def test_files_that_the_manifest_does_not_tell_of(copy, tmp_path):
    shard = copy / "shard-00001.safetensors"
    shutil.copy(shard, copy / "shard-00003.safetensors")
    assert "with shard-00003.safetensors, other than its manifest.json says" in refusal(copy)
    (copy / "shard-00003.safetensors").rename(copy / ".writing-3.safetensors")
    build(copy)  # what a killed process left behind is no shard
    shard.rename(tmp_path / "gone")
    assert "without shard-00001.safetensors" in refusal(copy)
    shard.symlink_to(tmp_path / "gone")
    assert "which is no file, expected a shard" in refusal(copy)
    (copy / "manifest.json").unlink()
    assert "got no manifest.json in" in refusal(copy)
    assert "got no manifest.json in" in refusal(tmp_path / "none")


@pytest.mark.parametrize("kept", [0, 7, 60, -1])
def test_a_truncated_shard_is_named(kept, copy):
    path = copy / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "shard-00001.safetensors with" in refusal(copy)


def test_all_bytes_are_verified_where_asked_for(copy):
    path = copy / "shard-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    build(copy)
    assert "shard-00001.safetensors with other contents than its hash" in refusal(copy, verify=True)
    path.write_bytes(content)
    build(copy, verify=True)


def forged(copy, change) -> None:
    """Change the header of a shard, its length kept."""
    path = copy / "shard-00001.safetensors"
    told, start = preparing.header(path)
    text = json.dumps(change(told), separators=(",", ":")).encode()
    assert len(text) <= start - 8
    path.write_bytes((start - 8).to_bytes(8, "little") + text.ljust(start - 8) + path.read_bytes()[start:])


@pytest.mark.parametrize(
    ("key", "entry", "said"),
    [
        ("moments", {"data_offsets": [10**9, 10**9 + 3400]}, "truncated or forged"),
        ("moments", {"data_offsets": [0, 3401]}, "truncated or forged"),
        ("moments_flip", {"data_offsets": [0, 3400]}, "with moments_flip elsewhere than behind moments"),
        ("moments", {"shape": [17, 100]}, "moments of shape (17, 100)"),
        ("moments", {"shape": [-17, -4, 5, 5]}, "expected lists of whole numbers"),
        ("moments", {"dtype": "I16"}, "moments of type 'I16'"),
        ("labels", {"dtype": "F64"}, "labels of type 'F64'"),
        ("index", {"shape": [17, 1]}, "index of shape (17, 1)"),
        ("__metadata__", {"format": "pathline packed 0"}, "as 'pathline packed 1'"),
    ],
)
def test_a_forged_header_is_refused(key, entry, said, copy):
    forged(copy, lambda told: {**told, key: {**told[key], **entry}})
    assert said in refusal(copy)


def test_tensors_that_the_manifest_does_not_tell_of(copy):
    forged(copy, lambda told: {key: entry for key, entry in told.items() if key != "images"})
    assert "shard-00001.safetensors with features_tokens, features_tokens_flip, index" in refusal(copy)


def test_rows_that_come_twice_are_refused(copy):
    """The second shard's rows, under the first one's name."""
    first, second = copy / "shard-00000.safetensors", copy / "shard-00001.safetensors"
    shutil.copy(second, first)
    assert "do not rise from row to row" in refusal(copy)


def test_options_that_the_folder_has_nothing_for(folder, pixels, tmp_path):
    prepare(Pictures(5), tmp_path, Options(R), autoencoder=Coder())
    for path, options, said in (
        (tmp_path, {"flip": True}, "in which no latents of mirror images are stored"),
        (tmp_path, {"images": True}, "which has latents alone"),
        (pixels, {"images": True}, "whose data are images"),
    ):
        with pytest.raises(InputError, match=said):
            build(path, **options)
    for options in ({"flip": 1}, {"images": "yes"}, {"posterior": "sample"}):
        with pytest.raises(InputTypeError, match="expected true or false, draw or mean"):
            build(folder, **options)
    with pytest.raises(InputTypeError, match="got path 3"):
        data.build("prepared", path=3)
    for indices in ([37], [-1]):
        with pytest.raises(InputError, match="numbers from 0 to 36"):
            build(folder).batch(indices)


def test_the_other_reader_of_latents_leaves_the_folder_to_this_one(folder):
    """It would scale by a number of its own."""
    with pytest.raises(DataError, match=r"use \{name: prepared, path: .*full\}"):
        data.build("latents", path=str(folder), num_classes=3)


# --- training


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The handwritten digits as a folder of PNG files, 8 × 8 pixels, packed by the command."""
    root, digits = tmp_path_factory.mktemp("digits"), data.build("digits", split="train")
    batch = digits.batch(range(200))
    for index, (image, label) in enumerate(zip(batch["data"], batch["label"].tolist(), strict=True)):
        (root / "png" / str(label)).mkdir(parents=True, exist_ok=True)
        levels = ((image[0] + 1) * 127.5).round().byte().numpy()
        Image.fromarray(levels).save(root / "png" / str(label) / f"{index:03d}.png")
    words = [str(root / "png"), str(root / "packed"), "--resolution", "8", "--rows-per-shard", "70", "--flip"]
    assert command.main(words) == 0
    return root / "packed"


def configuration(path, folder, **train):
    network = {"name": "sit", "input_size": 8, "patch_size": 4, "in_channels": 3, "hidden_size": 12, "depth": 1}
    return resolve(
        {
            "data": {"name": "prepared", "path": str(path)},
            "backbone": {**network, "num_heads": 3, "num_classes": 10},
            "objective": "velocity",
            "optim": {"lr": 3e-3},
            "ema": {"decay": 0.9},
            "solver": {"name": "euler", "steps": 1},
            "train": {"steps": 4, "global_batch": 6, "seed": 5, "folder": str(folder), "accelerator": "cpu", **train},
            "log": {"every": 2, "tensorboard": False},
            "checkpoint": {"every": 2, "keep": 9},
        }
    )


def trained(*arguments, **train) -> dict[str, torch.Tensor]:
    trainer = Trainer(configuration(*arguments, **train))
    trainer.run()
    return {key: value.clone() for key, value in trainer.state.network.state_dict().items()}


def test_training_resumes_to_the_bit(digits, tmp_path):
    whole = trained(digits, tmp_path / "whole")
    trained(digits, tmp_path / "parts", stop_at=2)
    trainer = Trainer(configuration(digits, tmp_path / "parts"))
    trainer.resume(tmp_path / "parts" / "checkpoints" / "step-000000002")
    trainer.run()
    found = trainer.state.network.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in whole.items())


def test_a_run_does_not_go_on_with_other_data(digits, tmp_path):
    trained(digits, tmp_path / "run", stop_at=2)
    shutil.copytree(digits, tmp_path / "other")
    changed(tmp_path / "other", sealed=True, request__licence="another")
    trainer = Trainer(configuration(tmp_path / "other", tmp_path / "run"))
    with pytest.raises(CheckpointError, match="sha256"):
        trainer.resume(tmp_path / "run" / "checkpoints" / "step-000000002")
