"""The layout of LightningDiT: what the test wrote is read back, or refused by name."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pathline import DataError, InputError, InputTypeError, data
from pathline.core.config import resolve
from pathline.core.draws import Draws
from pathline.training import Trainer

SHAPE = (3, 5, 2)
MEAN, STD = [0.5, -1.0, 2.0], [2.0, 0.25, 5.0]


def shard(path, count: int, seed: int, shape=SHAPE, **changes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = {
        "latents": torch.randn(count, *shape, generator=generator),
        "latents_flip": torch.randn(count, *shape, generator=generator),
        "labels": torch.randint(7, (count,), generator=generator),
        **changes,
    }
    rows = {key: value for key, value in rows.items() if value is not None}
    save_file(rows, path, {"total_size": str(count), "dtype": "torch.float32", "device": "cpu"})
    return rows


def name(rank: int, number: int) -> str:
    return f"latents_rank{rank:02d}_shard{number:03d}.safetensors"


@pytest.fixture
def folder(tmp_path):
    """Two ranks' shards, the last of each partial, their statistics, and all rows in the order of the names."""
    parts = [shard(tmp_path / name(rank, n), count, 10 * rank + n) for rank, n, count in PARTS]
    torch.save({key: torch.tensor(value).reshape(1, 3, 1, 1) for key, value in STATISTICS}, tmp_path / FILE)
    return tmp_path, {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


PARTS = ((0, 0, 4), (0, 1, 1), (1, 0, 4), (1, 1, 2))
STATISTICS = (("mean", MEAN), ("std", STD))
FILE = "latents_stats.pt"


def lightning(path, **options):
    return data.build("lightning-dit", path=str(path), **{"num_classes": 7, **options})


def refusal(path, **options) -> str:
    with pytest.raises(DataError) as error:
        lightning(path, **options)
    return str(error.value)


def normalised(values: torch.Tensor, multiplier: float = 1.0) -> np.ndarray:
    mean, std = (np.array(numbers)[:, None, None] for numbers in (MEAN, STD))
    return (values.double().numpy() - mean) / std * multiplier


def test_rows_of_all_shards_are_normalised(folder):
    path, rows = folder
    dataset = lightning(path, multiplier=0.5)
    assert len(dataset) == 11 and dataset.shape == SHAPE and dataset.num_classes == 7 and not dataset.data_are_images
    for indices in ([9, 0, 4, 9, 5, 10], range(11), np.array([3])):
        batch, chosen = dataset.batch(indices), torch.as_tensor(list(indices))
        np.testing.assert_allclose(batch["data"], normalised(rows["latents"][chosen], 0.5), rtol=1e-6, atol=1e-6)
        assert torch.equal(batch["label"], rows["labels"][chosen]) and torch.equal(batch["index"], chosen)
    assert dataset.batch([])["data"].shape == (0, *SHAPE)


def test_each_visit_takes_one_of_the_two_latents_by_its_position(folder):
    path, rows = folder
    seed, taken = 3, {True: 0, False: 0}
    for step, batch in enumerate(lightning(path).batches(5, 9, seed)):
        coins = Draws(seed).uniform("flip", range(5 * step, 5 * step + 5)) < 0.5
        for row, index in enumerate(batch["index"].tolist()):
            key = "latents_flip" if coins[row] else "latents"
            np.testing.assert_allclose(batch["data"][row], normalised(rows[key][index]), rtol=1e-6, atol=1e-6)
            assert batch["label"][row] == rows["labels"][index]
            taken[bool(coins[row])] += 1
    assert min(taken.values()) > 10
    for batch in lightning(path, flip=False).batches(5, 3, seed):
        np.testing.assert_allclose(batch["data"], normalised(rows["latents"][batch["index"]]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_are_loaded_as_they_are_stored(dtype, tmp_path):
    values = torch.randn(5, 2, *SHAPE).to(dtype)
    rows = {"latents": values[:, 0].clone(), "latents_flip": values[:, 1].clone()}
    shard(tmp_path / name(0, 0), 5, 0, **rows)
    dataset, draws = lightning(tmp_path, normalise=False), Draws(0).at(range(4))
    loaded = dataset.load([3, 0, 2, 1], draws)
    assert loaded["data"].dtype == dtype and dataset.finish(loaded, draws)["data"].dtype == torch.float32
    flipped = (Draws(0).uniform("flip", range(4)) < 0.5).long()
    assert torch.equal(loaded["data"], values[[3, 0, 2, 1], flipped])


def test_what_is_not_normalised_is_multiplied(folder):
    path, rows = folder
    (path / FILE).unlink()
    dataset = lightning(path, normalise=False, multiplier=0.18215)
    np.testing.assert_allclose(dataset.batch([7])["data"], rows["latents"][[7]].numpy() * 0.18215, rtol=1e-6)
    assert dataset.latents_of["scaling"]["std"] == [1 / 0.18215] * 3


def test_statistics_may_be_given(folder):
    path, rows = folder
    (path / FILE).write_bytes(b"never read")
    dataset = lightning(path, mean=MEAN, std=STD)
    np.testing.assert_allclose(dataset.batch([7])["data"], normalised(rows["latents"][[7]]), rtol=1e-6, atol=1e-6)
    assert dataset.latents_of["scaling"] == {"mean": MEAN, "std": STD, "source": "options mean and std"}


def test_the_scaling_undoes_itself(folder):
    path, rows = folder
    scaling = lightning(path, multiplier=0.5).latents_of["scaling"]
    assert scaling["source"] == FILE
    raw = lightning(path, multiplier=0.5).batch([2])["data"][0].double()
    mean, std = (torch.tensor(scaling[key]).double().reshape(-1, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(raw * std + mean, rows["latents"][2].double(), rtol=1e-6, atol=1e-6)


def test_unlabelled(folder):
    path, _ = folder
    shard(path / name(1, 0), 4, 0, labels=None)
    assert lightning(path, num_classes=0).batch([3, 9])["label"].tolist() == [0, 0]
    assert f"got {path / name(1, 0)} without labels" in refusal(path)


def test_manifest_and_statistics(folder):
    path, rows = folder
    dataset = lightning(path)
    found = json.loads(json.dumps(dataset.statistics))
    expected = normalised(rows["latents"])
    np.testing.assert_allclose(found["mean"], expected.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["std"], expected.std((0, 2, 3), ddof=1), rtol=1e-5)
    manifest = json.loads(json.dumps(dataset.manifest))
    digest = hashlib.sha256()
    for rank, number, _ in PARTS:
        content = (path / name(rank, number)).read_bytes()
        digest.update(name(rank, number).encode() + content[: 8 + int.from_bytes(content[:8], "little")])
    digest.update(rows["labels"].numpy().tobytes())
    assert manifest["sha256"] == digest.hexdigest() and manifest["sha256_of"].endswith("no latents")
    assert (manifest["count"], manifest["kind"], manifest["files"], manifest["flip"]) == (11, "latents", 4, True)


def test_training_goes_on_from_a_stop_as_if_there_was_none(tmp_path):
    (tmp_path / "rows").mkdir()
    shard(tmp_path / "rows" / name(0, 0), 11, 0, shape=(4, 8, 8))
    backbone = {"name": "sit", "input_size": 8, "patch_size": 4, "in_channels": 4, "hidden_size": 12, "depth": 1}
    entries = {
        "data": {"name": "lightning-dit", "path": str(tmp_path / "rows"), "num_classes": 7, "normalise": False},
        "backbone": {**backbone, "num_heads": 3, "num_classes": 7},
        "objective": "velocity",
        "log": {"tensorboard": False},
    }

    def train(folder: str, steps: int):
        options = {"steps": steps, "global_batch": 3, "folder": str(tmp_path / folder), "accelerator": "cpu"}
        trainer = Trainer(resolve({**entries, "train": options}))
        trainer.run()
        return {key: value.clone() for key, value in trainer.parts.backbone.state_dict().items()}

    whole = train("whole", 5)
    train("parts", 2)
    parts = train("parts", 5)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latents": None}, "with the keys ['labels', 'latents_flip']"),
        ({"latents_flip": None}, "without latents_flip; set flip=false"),
        ({"latents_flip": torch.zeros(3, 3, 5, 2)}, "latents_flip of another shape"),
        ({"latents_flip": torch.zeros(4, 3, 2, 5)}, "latents_flip of another shape"),
        ({"latents_flip": torch.zeros(4, *SHAPE).half()}, "latents_flip of another shape or type"),
        ({"labels": torch.zeros(3).long()}, "expected (4,)"),
        ({"labels": torch.tensor([0, 7, 0, 0])}, "expected 0 to 6"),
        ({"labels": torch.zeros(4)}, "labels of type 'F32'"),
        ({"latents": torch.zeros(4, *SHAPE).long()}, "latents of type 'I64'"),
        ({"latents": torch.zeros(4, 3, 5)}, "expected (n, C, H, W)"),
    ],
)
def test_a_shard_that_is_none(changes, said, folder):
    path, _ = folder
    shard(path / name(1, 0), 4, 0, **changes)
    message = refusal(path)
    assert said in message and str(path / name(1, 0)) in message


def test_shards_that_differ(folder):
    path, _ = folder
    shard(path / name(1, 0), 4, 0, shape=(3, 2, 5))
    assert "got latents of shape (3, 2, 5)" in refusal(path) and name(0, 0) in refusal(path)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_shard_is_named(kept, folder):
    path, _ = folder
    file = path / name(0, 0)
    file.write_bytes(file.read_bytes()[:kept])
    assert str(file) in refusal(path)


def test_a_forged_header_is_refused(folder):
    path, _ = folder
    file = path / name(0, 0)
    header = {"latents": {"dtype": "F32", "shape": [10**15, 3, 5, 2], "data_offsets": [0, 12 * 10**16]}}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(40))
    assert "truncated or forged" in refusal(path) and str(file) in refusal(path)


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_statistics_that_are_none(folder, tmp_path, monkeypatch):
    path, _ = folder
    file = path / FILE
    monkeypatch.chdir(tmp_path)
    for content in (
        {"mean": Evil(), "std": torch.ones(3)},
        {"mean": torch.zeros(3)},
        {"mean": torch.zeros(3), "std": torch.ones(3) / 0},
        {"mean": [0.0] * 3, "std": [1.0] * 3},
        torch.zeros(3),
    ):
        torch.save(content, file)
        assert f"got {file}, which cannot be read as mean and std alone" in refusal(path)
        assert not (tmp_path / "executed").exists()
    file.write_bytes(b"no file of torch")
    assert f"got {file}, which cannot be read" in refusal(path)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))
    assert file.stat().st_size < 2**20 and f"got {file} of {2**24} bytes" in refusal(path)
    file.unlink()
    assert f"got no {file}; give mean and std" in refusal(path)


def test_options(folder):
    path, _ = folder
    for options in (
        {"mean": MEAN},
        {"std": STD},
        {"mean": MEAN, "std": STD, "normalise": False},
        {"mean": MEAN, "std": [1.0, 0.0, 1.0]},
        {"mean": MEAN[:2], "std": STD[:2]},
        {"mean": MEAN, "std": [1.0, float("nan"), 1.0]},
        {"multiplier": 0},
        {"num_classes": -1},
    ):
        with pytest.raises(InputError):
            lightning(path, **options)
    for options in ({"mean": "abc", "std": STD}, {"mean": 3, "std": STD}, {"flip": 1}, {"multiplier": "1"}):
        with pytest.raises(InputTypeError):
            lightning(path, **options)
    (path / "empty").mkdir()
    assert f"got no latents at {path / 'empty'}" in refusal(path / "empty")
    assert f"got {path / 'none'}, which cannot be looked at" in refusal(path / "none")


# --- shards that are missing or added --------------------------------------------------------------------------------


def whole(path, counts=((4, 4, 3), (4, 4, 2))) -> None:
    for rank, shards in enumerate(counts):
        for number, count in enumerate(shards):
            shard(path / name(rank, number), count, 10 * rank + number)


def length(path) -> int:
    return len(lightning(path, normalise=False))


def said(path) -> str:
    return refusal(path, normalise=False)


@pytest.mark.parametrize(
    "counts", [((4, 4, 3), (4, 4, 2)), ((4, 1), (4,)), ((2,), (3,), (2,)), ((4, 4), (4, 4)), ((7,),)]
)
def test_what_ranks_write_is_taken(counts, tmp_path):
    whole(tmp_path, counts)
    assert length(tmp_path) == sum(map(sum, counts))


@pytest.mark.parametrize(("rank", "number"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_shard_that_is_missing_is_named(rank, number, tmp_path):
    whole(tmp_path)
    (tmp_path / name(rank, number)).unlink()
    assert f"got {tmp_path} without latents_rank{rank:02d}_shard{number:03d};" in said(tmp_path)


def test_a_rank_that_is_missing_is_named(tmp_path):
    whole(tmp_path, ((3,), (3,), (3,)))
    (tmp_path / name(1, 0)).unlink()
    assert f"got {tmp_path} without latents_rank01_shard*;" in said(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_last_shard_that_is_missing_is_told_by_the_numbers_of_samples(rank, tmp_path):
    whole(tmp_path)
    (tmp_path / name(rank, 2)).unlink()
    assert f"8 up to {name(rank, 1)}" in said(tmp_path) and "is missing, or was added" in said(tmp_path)


@pytest.mark.parametrize(("rank", "count"), [(0, 4), (1, 1), (1, 4)])
def test_a_shard_that_is_added_after_a_last_one_is_told(rank, count, tmp_path):
    whole(tmp_path)
    shard(tmp_path / name(rank, 3), count, 5)
    assert f"got {name(rank, 2)} in {tmp_path} with fewer rows than 4" in said(tmp_path)


def test_a_shard_that_is_added_after_a_full_one_is_told(tmp_path):
    whole(tmp_path, ((4, 4), (4, 4)))
    shard(tmp_path / name(1, 2), 3, 5)
    assert f"11 up to {name(1, 2)}" in said(tmp_path)


def test_one_missing_and_one_added_are_noticed_though_their_number_is_right(tmp_path):
    whole(tmp_path)
    (tmp_path / name(0, 1)).rename(tmp_path / name(1, 3))
    assert "without latents_rank00_shard001;" in said(tmp_path)
    (tmp_path / name(1, 3)).rename(tmp_path / "foreign.safetensors")
    assert f"got foreign.safetensors in {tmp_path}" in said(tmp_path)


@pytest.mark.parametrize(
    "copy", ["latents_rank00_shard000 copy.safetensors", "latents_rank00_shard000_1.safetensors", "x.safetensors"]
)
def test_a_file_of_another_name_is_named(copy, tmp_path):
    whole(tmp_path)
    shard(tmp_path / copy, 4, 0)
    assert f"got {copy} in {tmp_path}" in said(tmp_path)


def test_one_rank_and_shard_by_two_names(tmp_path):
    whole(tmp_path)
    shard(tmp_path / "latents_rank0_shard0.safetensors", 4, 0)
    assert "latents_rank0_shard0.safetensors beside" in said(tmp_path) or "beside latents_rank0_" in said(tmp_path)


def test_a_name_with_a_number_beyond_all_measure_costs_nothing(tmp_path):
    whole(tmp_path)
    shard(tmp_path / "latents_rank999999999_shard999999999.safetensors", 4, 0)
    assert "and " in said(tmp_path) and "without latents_rank02_shard*" in said(tmp_path)


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    whole(tmp_path)
    for given in ("lightning-dit", "latents"):
        options = {"normalise": False} if given == "lightning-dit" else {}
        assert len(data.build(given, path=f"~/{tmp_path.name}", num_classes=7, **options)) == 21


def test_one_file_may_be_asked_for_by_its_path(tmp_path):
    whole(tmp_path)
    assert length(tmp_path / name(1, 2)) == 2
