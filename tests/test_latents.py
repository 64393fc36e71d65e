"""Packed latents: what safetensors wrote is read back row by row, and no file can make it read anything else."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pathline import DataError, InputError, InputTypeError, data
from pathline.core.config import resolve
from pathline.training import Trainer

SHAPE = (3, 5, 7)


def build(path, **options) -> data.Latents:
    return data.build("latents", path=str(path), num_classes=11, **options)


def shard(path, rows: int, key: str = "latents", dtype: torch.dtype = torch.float16, shape=SHAPE, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, *shape, generator=generator).to(dtype)
    labels = torch.randint(11, (rows,), generator=generator)
    save_file({key: values, "labels": labels, "index": torch.arange(rows)}, path)
    return values.float(), labels


@pytest.fixture
def folder(tmp_path):
    """Three shards of 4, 1 and 6 rows, and what is in them, in the order of their names."""
    parts = [shard(tmp_path / f"{name}.safetensors", n, seed=n) for name, n in (("a", 4), ("b", 1), ("c", 6))]
    (tmp_path / "manifest.json").write_text("{}")
    return tmp_path, *(torch.cat(column) for column in zip(*parts, strict=True))


def pack(path, header, body: bytes = b"") -> None:
    """A file of a given header, forged or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def refusal(path, **options) -> str:
    with pytest.raises(DataError) as error:
        build(path, **options)
    assert str(path) in str(error.value)
    return str(error.value)


# --- what is read ----------------------------------------------------------------------------------------------------


def test_rows_of_several_shards_are_one_data_set(folder):
    path, values, labels = folder
    latents = build(path)
    assert len(latents) == 11 and latents.shape == SHAPE and latents.num_classes == 11
    for indices in ([9, 0, 4, 9, 5, 3], range(11), torch.tensor([4]), np.array([10, 3])):
        batch = latents.batch(indices)
        rows = torch.as_tensor(list(indices))
        assert torch.equal(batch["data"], values[rows] * 0.18215) and batch["data"].dtype == torch.float32
        assert torch.equal(batch["label"], labels[rows]) and torch.equal(batch["index"], rows)
        assert batch["label"].dtype == batch["index"].dtype == torch.int64
    assert latents.batch([])["data"].shape == (0, *SHAPE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("labels", [torch.int32, torch.int64])
def test_types(dtype, labels, tmp_path):
    values, given = torch.randn(6, *SHAPE, dtype=torch.float64).to(dtype), torch.tensor([10, 0, 3, 7, 1, 2]).to(labels)
    save_file({"latents": values, "labels": given}, tmp_path / "x.safetensors")
    batch = build(tmp_path / "x.safetensors", scale=1).batch([5, 0])
    assert torch.equal(batch["data"], values[[5, 0]].float()) and batch["label"].tolist() == [2, 10]


def test_moments_give_the_mean(tmp_path):
    values, _ = shard(tmp_path / "x.safetensors", 4, key="moments", shape=(6, 5, 7))
    latents = build(tmp_path, scale=0.5)
    assert latents.shape == SHAPE
    assert torch.equal(latents.batch([2, 1])["data"], 0.5 * values[[2, 1], :3])


def test_a_file_whose_tensors_are_not_aligned_is_read(tmp_path):
    values, labels = torch.arange(2 * 3, dtype=torch.float32).reshape(2, 3, 1, 1), torch.tensor([5, 10])
    body = b"x" + labels.numpy().tobytes() + values.numpy().tobytes()
    header = {
        "labels": {"dtype": "I64", "shape": [2], "data_offsets": [1, 17]},
        "latents": {"dtype": "F32", "shape": [2, 3, 1, 1], "data_offsets": [17, 41]},
        "__metadata__": {"format": "pt"},
    }
    pack(tmp_path / "x.safetensors", header, body)
    batch = build(tmp_path, scale=1).batch([1, 0])
    assert torch.equal(batch["data"], values[[1, 0]]) and batch["label"].tolist() == [10, 5]


def test_unlabelled_data(tmp_path):
    save_file({"latents": torch.ones(3, *SHAPE)}, tmp_path / "x.safetensors")
    latents = data.build("latents", path=str(tmp_path), num_classes=0)
    assert latents.num_classes == 0 and latents.batch([2, 0])["label"].tolist() == [0, 0]


def test_images_come_with_latents_where_they_are_asked_for(tmp_path):
    images = torch.randint(256, (5, 3, 4, 2), dtype=torch.uint8)
    for name, part in (("a", slice(0, 2)), ("b", slice(2, 5))):
        rows = {"latents": torch.ones(3, 1, 2, 2)[: len(images[part])], "labels": torch.zeros(len(images[part])).long()}
        save_file({**rows, "images": images[part].clone()}, tmp_path / f"{name}.safetensors")
    batch = build(tmp_path, images=True).batch([4, 0, 3])
    assert torch.equal(batch["image"], images[[4, 0, 3]]) and batch["image"].dtype == torch.uint8
    assert "image" not in build(tmp_path).batch([4])
    save_file(rows, tmp_path / "b.safetensors")
    with pytest.raises(DataError, match=r"got .*b\.safetensors without images"):
        build(tmp_path, images=True)
    save_file({**rows, "images": torch.zeros(3, 3, 2, 4, dtype=torch.uint8)}, tmp_path / "b.safetensors")
    with pytest.raises(DataError, match=r"images of shape \(3, 2, 4\) in .*b\.safetensors beside"):
        build(tmp_path, images=True)


def test_a_batch_is_the_callers_own(folder):
    latents = build(folder[0])
    before = latents.batch(range(11))["data"].clone()
    latents.batch(range(11))["data"].fill_(9)
    assert torch.equal(latents.batch(range(11))["data"], before)


def test_the_order_of_training_covers_every_row_and_depends_on_the_seed(folder):
    latents = build(folder[0])
    orders = [latents.indices_at(range(11), seed) for seed in (0, 0, 1)]
    assert sorted(orders[0]) == list(range(11)) and np.array_equal(*orders[:2]) and not np.array_equal(*orders[1:])


def test_statistics_and_manifest_are_fit_for_json_and_true(tmp_path, monkeypatch):
    values, _ = shard(tmp_path / "x.safetensors", 23)
    monkeypatch.setattr("pathline.data.latents._CHUNK", 5)
    latents = build(tmp_path)
    scaled = values.double() * 0.18215
    found = json.loads(json.dumps(latents.statistics))
    torch.testing.assert_close(torch.tensor(found["mean"]).double(), scaled.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.tensor(found["std"]).double(), scaled.std((0, 2, 3)), rtol=1e-6, atol=0)
    assert found["range"] == pytest.approx([float(scaled.min()), float(scaled.max())], rel=1e-6)
    manifest = json.loads(json.dumps(latents.manifest))
    assert [(file["file"], file["rows"]) for file in manifest["files"]] == [("x.safetensors", 23)]
    assert (manifest["count"], manifest["shape"], manifest["kind"]) == (23, list(SHAPE), "latents")


@pytest.mark.parametrize("key", ["latents", "moments"])
def test_the_hash_is_that_of_header_values_and_labels_without_images(key, tmp_path):
    def digest(**changed):
        save_file({**rows, **changed}, tmp_path / "x.safetensors")
        (file,) = build(tmp_path, images=True).manifest["files"]
        return file["sha256"]

    generator = torch.Generator().manual_seed(0)
    values, labels = torch.randn(5, 2, 3, 4, generator=generator), torch.tensor([3, 0, 10, 7, 1])
    images = torch.zeros(5, 3, 7, 2, dtype=torch.uint8)
    rows = {key: values, "labels": labels, "images": images}
    first = digest()
    content = (tmp_path / "x.safetensors").read_bytes()
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    expected = hashlib.sha256(header + values.numpy().tobytes() + labels.numpy().tobytes())
    assert first == expected.hexdigest() == digest(images=images + 1)
    other = values.clone()
    other[4, 1, 2, 3] += 1  # of moments a variance
    assert (
        len({first, digest(**{key: other}), digest(labels=labels.flip(0)), digest(images=images[:, :, :6].clone())})
        == 4
    )


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_left_out_of_the_statistics_and_named(wrong, tmp_path, monkeypatch):
    monkeypatch.setattr("pathline.data.latents._CHUNK", 3)
    values = torch.randn(11, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    kept, lost = [0, 2, 6, 8, 9, 10], [1, 3, 4, 5, 7]  # a whole chunk among them
    broken = values.clone()
    broken[lost, 1, 2, 4] = wrong
    save_file({"latents": broken}, tmp_path / "x.safetensors")
    save_file({"latents": values[kept]}, tmp_path / "y.safetensors")
    found, expected = (
        data.build("latents", path=str(tmp_path / name), num_classes=0).statistics
        for name in ("x.safetensors", "y.safetensors")
    )
    assert json.loads(json.dumps(found, allow_nan=False)).pop("left_out") == {"count": 5, "rows": lost}
    assert "left_out" not in expected
    for key in ("mean", "std", "range"):
        assert found[key] == pytest.approx(expected[key], rel=1e-12)
    save_file({"latents": torch.full((2, 1, 1, 1), wrong)}, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match=r"x\.safetensors without a row of finite values"):
        _ = data.build("latents", path=str(tmp_path / "x.safetensors"), num_classes=0).statistics


def test_values_that_do_not_vary_have_no_deviation_wherever_they_lie(tmp_path):
    """Sums of squares would lose all digits here: the channels lie 3000 deviations from 0."""
    values = 3000 + torch.tensor([-1.0, 1.0]).repeat(3000).reshape(1500, 1, 2, 2)
    save_file({"latents": values, "labels": torch.zeros(1500, dtype=torch.int64)}, tmp_path / "x.safetensors")
    statistics = build(tmp_path, scale=1).statistics
    assert statistics["mean"] == [3000.0] and statistics["std"] == pytest.approx([(6000 / 5999) ** 0.5], rel=1e-12)
    one = torch.full((1, 2, 1, 1), 5.0)
    save_file({"latents": one, "labels": torch.zeros(1, dtype=torch.int64)}, tmp_path / "x.safetensors")
    assert build(tmp_path, scale=1).statistics == {"mean": [5.0, 5.0], "std": [0.0, 0.0], "range": [5.0, 5.0]}


def test_training_on_latents_draws_no_pictures(tmp_path, monkeypatch):
    """Four channels are no image; pictures are asked for after every step."""
    rows = {"latents": torch.randn(7, 4, 8, 8), "labels": torch.arange(7)}
    save_file(rows, tmp_path / "x.safetensors")
    backbone = {"name": "sit", "input_size": 8, "patch_size": 4, "in_channels": 4, "hidden_size": 12, "depth": 1}
    entries = {
        "data": {"name": "latents", "path": str(tmp_path / "x.safetensors"), "num_classes": 11},
        "backbone": {**backbone, "num_heads": 3, "num_classes": 11},
        "objective": "velocity",
        "train": {"steps": 2, "global_batch": 5, "folder": str(tmp_path / "run"), "accelerator": "cpu"},
        "log": {"pictures_every": 1, "tensorboard": False},
    }
    monkeypatch.setattr("pathline.training.sampling.solve", lambda *_, **__: pytest.fail("drew samples"))
    Trainer(resolve(entries)).run()
    assert (tmp_path / "run" / "checkpoints" / "step-000000002").is_dir()
    assert not list((tmp_path / "run").rglob("*.png"))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_nothing_there(tmp_path):
    assert "got no latents at" in refusal(tmp_path / "none")
    assert "got no latents at" in refusal(tmp_path)
    (tmp_path / "x.safetensors").mkdir()
    assert f"got no latents at {tmp_path / 'x.safetensors'}" in refusal(tmp_path)
    with pytest.raises(DataError, match="which cannot be looked at: .*File name too long"):
        build("a" * 5000)


def test_what_is_no_file_is_named_and_hidden_ones_are_left_alone(folder):
    path, values, _ = folder
    (path / "._a.safetensors").write_bytes(b"as some systems write beside each file")
    assert len(build(path)) == len(values)
    os.mkfifo(path / "pipe.safetensors")
    assert f"got no latents at {path / 'pipe.safetensors'}" in refusal(path)


@pytest.mark.parametrize("kept", [0, 5, 8, 60, -1])
def test_a_truncated_file_is_named(kept, tmp_path):
    path = tmp_path / "x.safetensors"
    shard(path, 4)
    path.write_bytes(path.read_bytes()[:kept])
    refusal(path)


LATENTS = {"dtype": "F32", "shape": [2, 3, 1, 1], "data_offsets": [0, 24]}
LABELS = {"dtype": "I64", "shape": [2], "data_offsets": [24, 40]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latents": None}, "with the keys ['labels']"),
        ({"moments": LATENTS}, "with the keys ['labels', 'latents', 'moments']"),
        ({"labels": None}, "without labels"),
        ({"latents": {"dtype": "F8_E4M3"}}, "latents of type 'F8_E4M3'"),
        ({"latents": {"dtype": ["F32"]}}, "latents of type ['F32']"),
        ({"latents": {"dtype": "I64"}}, "latents of type 'I64'"),
        ({"labels": {"dtype": "F64"}}, "labels of type 'F64'"),
        ({"latents": {"shape": [2, 3]}}, "got latents of shape (2, 3)"),
        ({"latents": {"shape": [6, 1], "data_offsets": [0, 24]}}, "expected (n, C, H, W)"),
        ({"latents": {"shape": [2, 3, 1, -1]}}, "expected lists of whole numbers"),
        ({"latents": {"shape": [-2, -3, 1, 1]}}, "expected lists of whole numbers"),
        ({"latents": {"shape": [2, 3, 1, True]}}, "expected lists of whole numbers"),
        ({"latents": {"shape": [2, 3, 1, 1.0]}}, "expected lists of whole numbers"),
        ({"latents": {"shape": "2311"}}, "expected lists of whole numbers"),
        ({"latents": {"shape": [0, 3, 1, 1], "data_offsets": [0, 0]}}, "none of them 0"),
        ({"latents": {"shape": [0, 10**30, 1, 1], "data_offsets": [7, 7]}}, "none of them 0"),
        ({"latents": {"shape": [10**30, 3, 1, 1]}}, "truncated or forged"),
        ({"latents": {"data_offsets": [0, 24, 40]}}, "expected lists of whole numbers"),
        ({"latents": {"data_offsets": [24, 0]}}, "truncated or forged"),
        ({"latents": {"data_offsets": [17, 41]}}, "the bytes 17 to 41 of 40"),
        ({"latents": {"data_offsets": [10**18, 10**18 + 24]}}, "truncated or forged"),
        ({"latents": 3}, "latents of type None"),
        ({"labels": {"shape": [2, 1]}}, "labels of shape (2, 1)"),
        ({"labels": {"shape": [1], "data_offsets": [32, 40]}}, "labels of shape (1,)"),
        ({"moments": LATENTS, "latents": None}, "got moments of shape (2, 3, 1, 1)"),
        ({"images": {"dtype": "U8", "shape": [2, 3, 1, 1], "data_offsets": [0, 24]}}, "images of type U8"),
        ({"images": {"dtype": "U8", "shape": [1, 3, 2, 1], "data_offsets": [0, 6]}}, "expected (2, 3, R, R)"),
        ({"images": {"dtype": "U8", "shape": [2, 1, 2, 1], "data_offsets": [0, 4]}}, "expected (2, 3, R, R)"),
        ({"images": {"dtype": "F32", "shape": [2, 3, 1, 1], "data_offsets": [0, 24]}}, "images of type 'F32'"),
    ],
)
def test_a_forged_header_is_refused(changes, said, tmp_path):
    header = {"latents": LATENTS, "labels": LABELS}
    for key, change in changes.items():
        header[key] = {**header.get(key, {}), **change} if isinstance(change, dict) else change
    pack(tmp_path / "x.safetensors", {key: entry for key, entry in header.items() if entry is not None}, bytes(40))
    assert said in refusal(tmp_path / "x.safetensors", images="images" in header)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"latents": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "holds a list"),
        (b" " * (2**20 + 1), "header of 1048577"),
    ],
)
def test_a_header_that_is_none_is_refused(header, said, tmp_path):
    pack(tmp_path / "x.safetensors", header, bytes(40))
    assert said in refusal(tmp_path / "x.safetensors")


def test_a_header_longer_than_its_file_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    assert "header of 9223372036854775808" in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize("label", [-1, 11])
def test_labels_out_of_range_are_refused(label, tmp_path):
    labels = torch.tensor([3, label, 5])
    save_file({"latents": torch.zeros(3, *SHAPE), "labels": labels}, tmp_path / "x.safetensors")
    assert "expected 0 to 10; set num_classes" in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("key", "shape"), [("latents", (3, 7, 5)), ("moments", (6, 5, 7))])
def test_shards_that_differ_are_refused(key, shape, folder):
    shard(folder[0] / "d.safetensors", 2, key=key, shape=shape)
    with pytest.raises(DataError, match=rf"got {key} of .*d\.safetensors beside latents of .*a\.safetensors"):
        build(folder[0])


def test_options_and_indices_out_of_range(folder):
    for options in ({"scale": 0.0}, {"scale": float("inf")}, {"num_classes": -1}):
        with pytest.raises(InputError, match="expected 0 or more, and a scale above 0"):
            data.build("latents", path=str(folder[0]), **options)
    wrong = ({"path": 3}, {"scale": "1"}, {"scale": True}, {"num_classes": "10"}, {"num_classes": 2.0})
    for options in (*wrong, {"num_classes": True}):
        with pytest.raises(InputTypeError, match="expected a text, a whole number and a number"):
            data.build("latents", **{"path": str(folder[0]), **options})
    with pytest.raises(InputTypeError, match="got images 1, expected true or false"):
        data.build("latents", path=str(folder[0]), images=1)
    latents = build(folder[0])
    for indices in ([11], [-1], [[0]]):
        with pytest.raises(InputError, match="numbers from 0 to 10"):
            latents.batch(indices)
    with pytest.raises(InputTypeError, match="whole numbers"):
        latents.batch([0.5])
