"""WebDataset's shards: what the test packed is streamed back, from files and commands."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pathline import data
from pathline.core.config import resolve
from pathline.core.draws import Draws
from pathline.data.crop import centre_crop
from pathline.data.layouts.streams import Held
from pathline.training import Trainer

spec = importlib.util.spec_from_file_location("sharding", Path(__file__).with_name("sharding.py"))
sharding = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sharding)
COUNTS = sharding.COUNTS
SHAPE = sharding.SHAPE
build = sharding.build
npy = sharding.npy
pack = sharding.pack
pattern = sharding.pattern
pixels = sharding.pixels
png = sharding.png
shard_name = sharding.shard_name
value = sharding.value
write = sharding.write


@pytest.fixture
def shards(tmp_path):
    write(tmp_path / "shards")
    return tmp_path / "shards"


@pytest.mark.parametrize("scheme", ["", "file:", "pipe:cat "])
def test_latents_and_labels_come_from_files_and_commands(scheme, shards, tmp_path):
    dataset = build(scheme + pattern(shards), scale=0.5, index=str(tmp_path / "index.json"))
    assert len(dataset) == 28 and dataset.shape == SHAPE and not dataset.data_are_images
    batch = dataset.batch([27, 0, 6, 5, 27, 13])
    for row, i in enumerate([27, 0, 6, 5, 27, 13]):
        np.testing.assert_array_equal(batch["data"][row].numpy(), value(i).astype(np.float32) * np.float32(0.5))
        assert batch["label"][row] == 3 * i % 11 and batch["index"][row] == i
    assert batch["data"].dtype == torch.float32 and batch["label"].dtype == torch.int64
    assert dataset.latents_of["scaling"]["std"] == [2.0] * 4
    assert build(scheme + pattern(shards), index=str(tmp_path / "index.json")).latents_of is None


def test_a_folder_and_lists_mean_their_shards(shards, monkeypatch):
    whole = build(shards)
    (shards / ".hidden.tar").write_bytes(b"")
    (shards / "notes.txt").write_bytes(b"")
    names = [str(shards / shard_name(number)) for number in range(len(COUNTS))]
    assert build(shards).urls == names
    listed = data.build("webdataset", path=[*names[:2], f"{shards}/x-00000{{2..6}}.tar"], kind="latents")
    assert torch.equal(listed.batch([27])["data"], whole.batch([27])["data"])
    monkeypatch.chdir(shards)
    assert build("x-000001.tar").batch([0])["label"].tolist() == [15 % 11]
    assert build("file:x-000001.tar").batch([0])["label"].tolist() == [15 % 11]


def test_images_are_cropped_as_adm_does_and_flipped_by_position(tmp_path):
    sizes = [(9, 14), (8, 8), (21, 10), (6, 7), (16, 40)]
    kinds = ["png", "PNG", "png", "webp", "jpg"]
    members, expected = [], []
    for i, ((height, width), kind) in enumerate(zip(sizes, kinds, strict=True)):
        file = io.BytesIO()
        Image.fromarray(pixels(i, height, width)).save(file, kind.replace("jpg", "jpeg"))
        with Image.open(file) as image:
            expected.append(centre_crop(image.convert("RGB"), 8).transpose(2, 0, 1))
        members += [(f"{i}.{kind}", file.getvalue()), (f"{i}.json", json.dumps({"label": 9, "class": i}).encode())]
    pack(tmp_path / "a.tar", members)
    dataset = build(tmp_path / "a.tar", kind="images", resolution=8, flip=True, label="class")
    assert dataset.shape == (3, 8, 8) and dataset.data_are_images and dataset.latents_of is None
    levels = np.stack(expected)
    np.testing.assert_array_equal(dataset.batch(range(5))["data"].numpy(), levels.astype(np.float32) / 127.5 - 1)
    assert dataset.batch(range(5))["label"].tolist() == [0, 1, 2, 3, 4]
    mirrored = 0
    for step, batch in enumerate(dataset.batches(4, 3, 7)):
        coins = Draws(7).uniform("flip", range(4 * step, 4 * step + 4)) < 0.5
        for row, i in enumerate(batch["index"].tolist()):
            wanted = levels[i][:, :, ::-1] if coins[row] else levels[i]
            np.testing.assert_array_equal(batch["data"][row].numpy(), wanted.astype(np.float32) / 127.5 - 1)
        mirrored += int(coins.sum())
        assert set(batch) == {"data", "label", "index"}
    assert 0 < mirrored < 12
    loaded = dataset.load([1, 2], Draws(0).at(range(2)))
    assert loaded["data"].dtype == torch.uint8 and float(dataset.batch(range(5))["data"].abs().max()) <= 1


def test_moments_are_drawn_from_at_each_visit(tmp_path):
    moments = [np.abs(value(i, (6, 2, 5))).astype(np.float32) for i in range(3)]
    pack(tmp_path / "a.tar", [(f"{i}.npy", npy(array)) for i, array in enumerate(moments)])
    dataset = build(tmp_path / "a.tar", kind="moments", num_classes=0, scale=0.25)
    assert dataset.shape == (3, 2, 5) and dataset.batch(range(3))["label"].tolist() == [0, 0, 0]
    np.testing.assert_allclose(dataset.batch([2])["data"][0], 0.25 * moments[2][:3], rtol=1e-6)
    for step, batch in enumerate(dataset.batches(2, 3, 5)):
        noise = Draws(5).normal("posterior noise", range(2 * step, 2 * step + 2), (3, 2, 5)).double().numpy()
        for row, i in enumerate(batch["index"].tolist()):
            mean, deviation = np.split(moments[i].astype(np.float64), 2)
            np.testing.assert_allclose(batch["data"][row], 0.25 * (mean + deviation * noise[row]), rtol=1e-5, atol=1e-6)


def test_statistics_of_all_and_of_whole_shards_that_are_drawn(shards, monkeypatch):
    values = np.stack([value(i) for i in range(28)]).astype(np.float64)
    found = json.loads(json.dumps(build(shards).statistics))
    np.testing.assert_allclose(found["mean"], values.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found["std"], values.std((0, 2, 3), ddof=1), rtol=1e-6)
    assert found["over"]["of"] == found["over"]["samples"] == 28
    monkeypatch.setattr("pathline.data.layouts.webdataset.SURVEYED", 8)
    ends = np.cumsum(COUNTS)
    drawn = Draws(0).permutation("statistics", len(COUNTS))
    rows = np.concatenate([np.arange(ends[n] - COUNTS[n], ends[n]) for n in drawn])[:8]
    read = []
    dataset = build(shards)
    monkeypatch.setattr(dataset, "_held", Held(lambda n: read.append(n) or dataset._shard(n)))
    np.testing.assert_allclose(dataset.statistics["mean"], values[rows].mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    assert sorted(read) == sorted(drawn[: len(read)])


def test_the_manifest_tells_of_names_counts_sizes_and_order(shards):
    manifest = json.loads(json.dumps(build(shards, window=2, lanes=3, lane_batch=5).manifest))
    listed = [
        (shard_name(number), count, (shards / shard_name(number)).stat().st_size) for number, count in enumerate(COUNTS)
    ]
    assert manifest["sha256"] == hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    assert manifest["order"] == {"window": 2, "lanes": 3, "lane_batch": 5} and manifest["count"] == 28


def test_training_goes_on_from_a_stop_as_if_there_was_none(tmp_path):
    write(tmp_path / "shards", shape=(4, 8, 8))
    backbone = {"name": "sit", "input_size": 8, "patch_size": 4, "in_channels": 4, "hidden_size": 12, "depth": 1}
    entries = {
        "data": {"name": "webdataset", "path": str(tmp_path / "shards"), "kind": "latents", "num_classes": 11},
        "backbone": {**backbone, "num_heads": 3, "num_classes": 11},
        "objective": "velocity",
        "log": {"tensorboard": False},
    }

    def train(folder: str, steps: int):
        options = {"steps": steps, "global_batch": 5, "folder": str(tmp_path / folder), "accelerator": "cpu"}
        trainer = Trainer(resolve({**entries, "train": options}))
        trainer.run()
        return {name: value.clone() for name, value in trainer.parts.backbone.state_dict().items()}

    whole = train("whole", 8)  # into the second epoch
    train("parts", 3)
    parts = train("parts", 8)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
