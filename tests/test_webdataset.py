"""WebDataset's shards: what the test packed is streamed back, in an order of seed and position alone."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tarfile
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from pathline import DataError, InputError, InputTypeError, data
from pathline.core.config import resolve
from pathline.core.draws import Draws
from pathline.data.crop import centre_crop
from pathline.data.layouts.blocks import BlockOrder
from pathline.data.layouts.streams import Held
from pathline.training import Trainer

SHAPE = (4, 3, 5)
COUNTS = (5, 2, 7, 3, 4, 1, 6)  # samples of each shard, 28 in all


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("pathline.data.layouts.shards._PAUSES", (0.0, 0.0))


def value(number: int, shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(number).normal(size=shape).astype(np.float16)


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def pixels(number: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def png(array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


def pack(path, members) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def shard_name(number: int) -> str:
    return f"x-{number:06d}.tar"


def write(folder, counts=COUNTS, shape=SHAPE) -> None:
    """Shards of latents; sample i of all has the label 3·i mod 11."""
    folder.mkdir(exist_ok=True)
    first = 0
    for number, count in enumerate(counts):
        members = [
            (f"s/{i:05d}.{kind}", content)
            for i in range(first, first + count)
            for kind, content in (
                ("npy", npy(value(i, shape))),
                ("cls", f"{3 * i % 11}\n".encode()),
                ("pth", b"never read"),
                ("pyd", b"never read"),
            )
        ]
        pack(folder / shard_name(number), [("README", b"no sample"), *members])
        first += count


@pytest.fixture
def shards(tmp_path):
    write(tmp_path / "shards")
    return tmp_path / "shards"


def build(path, **options):
    return data.build("webdataset", path=str(path), **{"kind": "latents", "num_classes": 11, **options})


def refusal(path, **options) -> str:
    with pytest.raises(DataError) as error:
        build(path, **options)
    return str(error.value)


def pattern(folder) -> str:
    return f"{folder}/x-{{000000..{len(COUNTS) - 1:06d}}}.tar"


# --- what is read ----------------------------------------------------------------------------------------------------


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


# --- the index -------------------------------------------------------------------------------------------------------


def test_the_index_is_made_once_and_then_read(shards, monkeypatch):
    build(shards)
    told = json.loads((shards / "shardindex.json").read_text())
    assert told["wids_version"] == 1 and [entry["nsamples"] for entry in told["shardlist"]] == list(COUNTS)
    sizes = [(shards / shard_name(number)).stat().st_size for number in range(len(COUNTS))]
    assert [entry["filesize"] for entry in told["shardlist"]] == sizes
    monkeypatch.setattr("pathline.data.layouts.counts._make", lambda *_: pytest.fail("read all shards again"))
    assert len(build(shards)) == 28
    assert len(build(f"{shards}/x-00000{{1..2}}.tar")) == 9  # some of those that it tells of
    for entry in told["shardlist"]:  # as one made elsewhere may be
        entry["url"] = f"https://host/{shard_name(int(entry['url'][-10:-4]))}"
        del entry["filesize"]
    (shards / "shardindex.json").write_text(json.dumps(told))
    assert len(build(shards)) == 28 and build(shards).held_bytes is None


def test_shards_of_several_folders_need_a_path_of_an_index(shards, tmp_path):
    (tmp_path / "other").mkdir()
    (shards / shard_name(6)).rename(tmp_path / "other" / "last.tar")
    paths = [str(shards), str(tmp_path / "other" / "last.tar")]
    for given in (paths, f"pipe:cat {shards}/x-000000.tar"):
        with pytest.raises(InputError, match="set index to the path of a file"):
            data.build("webdataset", path=given, kind="latents")
    assert len(data.build("webdataset", path=paths, kind="latents", index=str(tmp_path / "index.json"))) == 28
    assert f"got no index {tmp_path}/none/i.json, which cannot be written" in refusal(
        shards, index=f"{tmp_path}/none/i.json"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "[" * 10_000,
        "[]",
        '{"shardlist": 3}',
        '{"shardlist": [3]}',
        '{"shardlist": [{"url": "x"}]}',
        '{"shardlist": [{"url": "x", "nsamples": 0}]}',
        '{"shardlist": [{"url": "x", "nsamples": true}]}',
        '{"shardlist": [{"nsamples": 1}]}',
    ],
)
def test_an_index_that_is_none(text, shards):
    (shards / "shardindex.json").write_text(text)
    message = refusal(shards)
    assert f"got {shards / 'shardindex.json'}, which is no index of shards" in message


def test_an_index_that_does_not_fit(shards):
    build(f"{shards}/x-00000{{0..5}}.tar")
    assert f"without the shards {shards / shard_name(6)}" in refusal(shards)
    (shards / "shardindex.json").write_text(" " * 10**7)
    assert "it is no index of them" in refusal(shards)


def test_a_shard_that_has_changed_is_named(shards, tmp_path):
    dataset = build(shards)
    piped = build("pipe:cat " + pattern(shards), index=str(tmp_path / "index.json"))
    pack(shards / shard_name(2), [("0.npy", npy(value(0))), ("0.cls", b"1")])
    assert f"got {shards / shard_name(2)} of 10240 bytes" in refusal(shards)
    for changed in (dataset, piped):
        with pytest.raises(DataError, match=r"x-000002\.tar with 1 samples, of which .* tells 7"):
            changed.batch([8])
        assert changed.batch([1])["index"].tolist() == [1]


def test_a_shard_missing_and_one_added_are_named(shards):
    build(shards)
    (shards / shard_name(3)).rename(shards / shard_name(9))
    assert f"without the shards {shards / shard_name(9)}" in refusal(shards)
    assert f"got {shards / shard_name(3)}, which cannot be read" in refusal(pattern(shards))


# --- the order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 3, 9])
def test_each_epoch_has_each_sample_once_wherever_it_is_asked_from(window, lanes, shards):
    dataset = build(shards, window=window, lanes=lanes, lane_batch=4)
    order = dataset.indices_at(range(0, 84), 1)
    for epoch in range(3):
        assert sorted(order[28 * epoch : 28 * (epoch + 1)]) == list(range(28))
    assert not np.array_equal(order[:28], order[28:56])
    assert not np.array_equal(order, dataset.indices_at(range(0, 84), 2))
    other = build(shards, window=window, lanes=lanes, lane_batch=4)
    pieces = [other.indices_at(range(p, min(p + 5, 84)), 1) for p in reversed(range(0, 84, 5))]
    assert np.array_equal(order, np.concatenate(pieces[::-1]))
    with pytest.raises(InputError, match="non-negative"):
        dataset.indices_at(range(-1, 3), 1)


def test_with_one_lane_windows_come_one_after_the_other(shards):
    order = build(shards, window=3).indices_at(range(28), 5)
    sizes = Draws(5).permutation("shard order", 7)
    holders = np.searchsorted(np.cumsum(COUNTS), order, side="right")
    start = 0
    for block in (sizes[:3], sizes[3:6], sizes[6:]):
        count = sum(COUNTS[shard] for shard in block)
        seen = holders[start : start + count]
        assert set(seen) == set(block.tolist())
        start += count
    first = holders[: sum(COUNTS[shard] for shard in sizes[:3])]
    assert (np.diff(first) != 0).sum() > 2  # mixed, not shard after shard


def test_one_shard_has_another_order_in_each_epoch():
    epochs = BlockOrder((9,), 1, 1, 1).visits(range(27), 0).sample.reshape(3, 9).tolist()
    assert len({tuple(epoch) for epoch in epochs}) == 3 and all(sorted(epoch) == list(range(9)) for epoch in epochs)


def test_a_window_of_all_shards_is_a_uniform_permutation():
    """Chi-square of where one sample falls, over many seeds: 2.5 standard deviations are 19.6 for 9 classes."""
    order = BlockOrder((2, 5, 3), 3, 1, 1)
    places = [int(np.flatnonzero(order.visits(range(10), seed).sample == 4)[0]) for seed in range(3000)]
    observed = np.bincount(places, minlength=10)
    assert ((observed - 300) ** 2 / 300).sum() < 9 + 2.5 * np.sqrt(18)


def test_a_process_reads_the_shards_of_its_own_lanes():
    """Two of four processes' positions: of one epoch, disjoint windows but for those at the lanes' ends."""
    order, batch = BlockOrder((5,) * 48, 2, 4, 6), 24
    for epoch_start, lanes in ((0, 1), (240, 1)):
        seen = []
        for rank in range(4):
            windows = set()
            for step in range(epoch_start // batch, epoch_start // batch + 10):
                visits = order.visits(range(batch * step + 6 * rank, batch * step + 6 * (rank + 1)), 3)
                windows |= set(zip(visits.epoch.tolist(), visits.window.tolist(), strict=True))
                assert len(set(visits.lane.tolist())) == lanes
            seen.append(windows)
        assert all(len(windows) <= 24 / 4 + 1 for windows in seen)
        assert len(set.union(*seen)) == 24 and sum(map(len, seen)) <= 24 + 3


def test_lanes_follow_each_other_as_reading_ahead_says():
    order = BlockOrder(COUNTS, 2, 2, 4)
    lists: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}
    visits = order.visits(range(28 * 3), 4)
    for lane, epoch, window in zip(
        *(part.tolist() for part in (visits.lane, visits.epoch, visits.window)), strict=True
    ):
        if (epoch, window) not in lists[lane]:
            lists[lane].append((epoch, window))
    for lane in (0, 1):
        for first, second in itertools.pairwise(lists[lane]):
            assert order.following(4, first[0], lane, first[1]) == second
    assert order.following(4, 0, 2, [window for epoch, window in lists[2] if epoch == 0][-1]) is None


def read_order(shards, world: int, rank: int, steps: range) -> list[list]:
    """What a process of several gets in training, as index and first value of each sample."""
    dataset, size = build(shards, window=2, lanes=2, lane_batch=3), 6 // world
    found = []
    for step in steps:
        positions = range(6 * step + size * rank, 6 * step + size * (rank + 1))
        draws = Draws(9).at(positions, step=step)
        batch = dataset.finish(dataset.load(dataset.indices_at(positions, 9), draws), draws)
        found.append([batch["index"].tolist(), batch["data"][:, 0, 0, 0].tolist(), batch["label"].tolist()])
    return found


def joined(parts: list[list[list]]) -> list[list]:
    steps = zip(*parts, strict=True)
    return [[list(itertools.chain(*(part[column] for part in step))) for column in range(3)] for step in steps]


def test_the_order_is_that_of_one_process(shards, processes):
    build(shards)  # makes the index
    one = read_order(shards, 1, 0, range(11))
    assert {index for step in one for index in step[0]} == set(range(28))
    two = processes(2, lambda: read_order(shards, 2, int(os.environ["RANK"]), range(11))).checked()
    assert joined(two) == one
    assert read_order(shards, 1, 0, range(4, 11)) == one[4:]


def test_what_was_being_read_at_a_fork_is_read_anew(processes):
    parent, gate = os.getpid(), threading.Event()
    held = Held(lambda number: (os.getpid() != parent or gate.wait(30)) and 10 * number)
    held.want({"a": [3]}, forget=lambda _: False)
    assert processes(1, lambda: held.get(3, "a"), timeout=20).checked() == [30]
    gate.set()


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


# --- what is held in memory ------------------------------------------------------------------------------------------


def test_each_shard_is_read_once_an_epoch_and_ahead(shards, monkeypatch):
    dataset, read, most = build(shards, window=2), [], 0
    monkeypatch.setattr(dataset, "_held", Held(lambda n: read.append(n) or dataset._shard(n)))
    order = [Draws(0).permutation("shard order", 7, counter=epoch).tolist() for epoch in range(3)]
    for step in range(28):
        positions = range(2 * step, 2 * step + 2)
        dataset.load(dataset.indices_at(positions, 0), Draws(0).at(positions))
        held = [future.result() for future in dataset._held._futures.values()]
        most = max(most, sum(len(content) for part in held for one in part for content in one.members.values()))
        assert len(held) <= 3 * 2 + 1
        if step == 0:
            assert sorted(read) == sorted(order[0][:4])  # the window in use and the next one
    wanted, kept = Counter(order[0] + order[1] + order[2][:2]), order[0][-3:] + order[1][-3:]
    assert Counter(read) <= wanted  # and what is held when the next epoch begins with it is not read again
    assert set(wanted - Counter(read)) <= set(kept) & set(order[1][:2] + order[2][:2])
    assert 0 < most <= dataset.held_bytes


def test_what_is_not_in_the_order_is_read_without_reading_ahead(shards):
    dataset = build(shards, window=2)
    dataset.load([27, 0], Draws(0).at(range(2)))
    assert set(dataset._held._futures) == {6}
    dataset.load([4], Draws(0).at([5]))
    assert set(dataset._held._futures) == {0}


def test_a_shard_that_fails_ahead_raises_where_it_is_asked_for_and_may_recover(shards):
    dataset = build(shards, window=1)
    file = shards / shard_name(Draws(0).permutation("shard order", 7)[1])
    content = file.read_bytes()
    file.write_bytes(content[:600])
    first = COUNTS[Draws(0).permutation("shard order", 7)[0]]
    dataset.load(dataset.indices_at(range(first), 0), Draws(0).at(range(first)))
    later = range(first, first + 1)
    with pytest.raises(DataError, match=file.name):
        dataset.load(dataset.indices_at(later, 0), Draws(0).at(later))
    file.write_bytes(content)
    assert len(dataset.load(dataset.indices_at(later, 0), Draws(0).at(later))["index"]) == 1


def test_no_thread_is_left_and_what_is_let_go_unread_is_not_read():
    gate, read = threading.Event(), []

    def slow(number: int) -> int:
        gate.wait(10)
        read.append(number)
        return number

    held = Held(slow)
    held.want({"a": range(9)}, forget=lambda _: False)
    held.want({"b": [20]}, forget=lambda who: who == "a")
    gate.set()
    assert held.get(20, "b") == 20
    deadline = time.monotonic() + 10
    while any(thread.name.endswith("(_fill)") for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("(_fill)")]
    assert len(read) <= 5 and set(held._futures) == {20}


@pytest.mark.parametrize("streams", [1, 4])
def test_several_threads_may_ask_at_once(streams, shards, monkeypatch):
    monkeypatch.setattr(
        "pathline.data.layouts.streams._STREAMS", streams
    )  # with one, some are let go before they begin
    dataset, wrong = build(shards, workers=1), []

    def ask(seed: int) -> None:
        for index in np.random.default_rng(seed).integers(0, 28, 60).tolist():
            if dataset.batch([index])["label"].tolist() != [3 * index % 11]:
                wrong.append(index)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong and not any(thread.is_alive() for thread in threads)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_truncated_shard_is_named_wherever_it_was_cut(shards, tmp_path):
    file, piped = shards / shard_name(1), tmp_path / "index.json"
    content = file.read_bytes()
    members = tarfile.open(file).getmembers()
    end = members[-1].offset_data + 512 * -(-members[-1].size // 512)
    for kept in (0, 100, 512, 700, members[3].offset, members[3].offset + 300, members[3].offset_data + 1, end):
        file.write_bytes(content[:kept])
        assert f"got {file}, which cannot be read: " in refusal(shards)
    assert "x-000001.tar, which cannot be read in 3 tries: " in refusal("pipe:cat " + pattern(shards), index=str(piped))
    assert not piped.exists() and not (shards / "shardindex.json").exists()
    file.write_bytes(content[: end + 512])  # its end mark is there
    assert len(build(shards)) == 28


def test_a_damaged_shard_is_refused_or_read_and_never_anything_else(shards):
    """Bytes of headers are changed; what tarfile raises, it comes as a DataError."""
    file = shards / shard_name(1)
    content, generator = file.read_bytes(), np.random.default_rng(0)
    headers = [member.offset for member in tarfile.open(file).getmembers()]
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[int(generator.choice(headers)) + int(generator.integers(512))] = int(generator.integers(256))
        file.write_bytes(bytes(damaged))
        try:
            data.build("webdataset", path=str(file), kind="latents", num_classes=11).batch([1])
        except DataError as error:
            refused += 1
            assert str(file) in str(error)
        (shards / "shardindex.json").unlink(missing_ok=True)
    assert refused > 50


def entry(name: str, **changes) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for key, changed in changes.items():
        setattr(made, key, changed)
    return made


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (entry("1.npy", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link, a device"),
        (entry("1.npy", type=tarfile.LNKTYPE, linkname="0.npy"), "a link, a device"),
        (entry("1.npy", type=tarfile.CHRTYPE), "a link, a device"),
        (entry("1.npy", type=tarfile.FIFOTYPE), "a link, a device"),
        (entry("1.npy", size=2**40), "got 1.npy of 1099511627776 bytes"),
        (entry("1.bin", size=2**40), "unexpected end of data"),
        (entry("1.npy", type=tarfile.XHDTYPE, size=2**40), "a header asks for"),
        (entry("1.npy", type=tarfile.GNUTYPE_LONGNAME, size=2**40), "a header asks for"),
        (entry("1.npy", pax_headers={"size": "-4000"}), "got 1.npy of -4000 bytes"),
        (entry("1.npy", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**40)}), "or sparse"),
        (entry("0.npy"), "got 0.npy twice in"),
    ],
)
def test_hostile_members_are_refused(made, said, tmp_path):
    body = npy(value(0))
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(entry("0.npy", size=len(body)), io.BytesIO(body))
        archive.fileobj.write(made.tobuf(tarfile.PAX_FORMAT if made.pax_headers else tarfile.GNU_FORMAT))
        archive.offset = archive.fileobj.tell()
    message = refusal(tmp_path, num_classes=0)
    assert said in message and str(tmp_path / "a.tar") in message


def test_a_stream_without_an_end_is_refused(tmp_path):
    pack(tmp_path / "a.tar", [("0.npy", npy(value(0)))])
    message = refusal(f"pipe:cat {tmp_path}/a.tar /dev/zero", index=str(tmp_path / "i"), num_classes=0)
    assert "goes on after the end of its tar" in message


def test_a_command_that_fails_is_tried_again_and_named(shards, tmp_path):
    index = str(tmp_path / "index.json")
    for command, code in (("exit 4", 4), (f"cat {shards}/x-000000.tar; exit 5", 5), ("none-such-command", 127)):
        message = refusal(f"pipe:echo >> {tmp_path}/tries; {command}", index=index)
        assert f"cannot be read in 3 tries: its command ended with exit code {code}" in message and command in message
    assert (tmp_path / "tries").read_text() == 9 * "\n"
    flag = tmp_path / "flag"
    dataset = build(f"pipe:test -e {flag} && cat {shards}/x-000000.tar || {{ touch {flag}; exit 1; }}", index=index)
    assert dataset.batch([4])["label"].tolist() == [12 % 11]


def test_a_command_that_hangs_after_an_error_is_ended(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("pathline.data.layouts.shards._PATIENCE", 0.1)
    began = time.monotonic()
    message = refusal(f"pipe:head -c 1000 {shards}/x-000000.tar; echo; exec sleep 50 >&-", index=str(tmp_path / "i"))
    assert "unexpected end of data" in message and time.monotonic() - began < 20


def test_an_index_of_a_shard_that_was_emptied(shards):
    build(shards)
    file = shards / shard_name(0)
    file.write_bytes(bytes(file.stat().st_size))
    assert f"got {file} without a sample" in refusal(shards)


def test_a_server_that_is_not_there_is_named(tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    message = refusal("http://127.0.0.1:9/x-{000000..000001}.tar", index=str(tmp_path / "index.json"))
    assert "got http://127.0.0.1:9/x-000000.tar, which cannot be read in 3 tries" in message
    assert "exit code 7, no connection" in message


def test_a_server_is_read_from(shards, tmp_path, monkeypatch):
    import functools
    import http.server

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(shards))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        dataset = build(f"{host}/x-{{000000..000006}}.tar", index=str(tmp_path / "index.json"))
        assert dataset.batch([13])["label"].tolist() == [39 % 11] and len(dataset) == 28
        message = refusal(f"{host}/none.tar", index=str(tmp_path / "other.json"))
        assert "exit code 22, the server refused it" in message
        server.shutdown()


def test_shards_that_are_none(tmp_path):
    assert f"got {tmp_path / 'none.tar'}, which cannot be read" in refusal(tmp_path / "none.tar")
    assert "got 0 shards" in refusal(tmp_path)
    assert "got 2 shards" in refusal(f"{tmp_path}/{{a,a}}.tar")
    assert "which means 10000000 shards" in refusal(f"{tmp_path}/{{0..9999999}}.tar")
    assert "cannot be looked at" in refusal("a" * 5000)
    assert "no gopen handler defined" in refusal("nothing:x.tar", index=str(tmp_path / "i"))
    pack(tmp_path / "empty.tar", [])
    assert "got no samples in" in refusal(tmp_path)
    pack(tmp_path / "empty.tar", [("a.pth", b"x"), ("b", b"y")])
    assert "got no samples in" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("0.cls", b"1")], "with ['cls'], expected npy for the kind latents"),
        ([("0.npy", npy(value(0)))], "no label of 0 in"),
        ([("0.npy", npy(value(0))), ("0.cls", b"x")], "no label of 0 in"),
        ([("0.npy", npy(value(0))), ("0.cls", b"11")], "got the label 11 of 0 in"),
        ([("0.npy", npy(value(0))), ("0.json", b"[")], "no label of 0 in"),
        ([("0.npy", npy(value(0))), ("0.json", b"[" * 10_000)], "no label of 0 in"),
        ([("0.npy", npy(value(0))), ("0.json", b'{"label": 1.5}')], "got a label of type float of 0 in"),
        ([("0.npy", npy(value(0))), ("0.json", b'{"other": 1}')], "no label of 0 in"),
        ([("0.npy", npy(value(0)).replace(b"<f2", b"|O ")), ("0.cls", b"1")], "0 in"),
        ([("0.npy", npy(np.zeros(SHAPE))), ("0.cls", b"1")], "of type float64"),
        ([("0.npy", npy(np.zeros((3, 5), np.float32))), ("0.cls", b"1")], "an array of shape (3, 5)"),
    ],
)
def test_samples_that_are_none(members, said, tmp_path):
    pack(tmp_path / "a.tar", members)
    message = refusal(tmp_path)
    assert said in message and str(tmp_path / "a.tar") in message


def test_a_sample_that_differs_is_named(tmp_path):
    members = [(f"{i}.npy", npy(value(i, (2, 3, 5 + i // 4)))) for i in range(5)]
    pack(tmp_path / "a.tar", members)
    dataset = build(tmp_path, num_classes=0)
    with pytest.raises(DataError, match=r"got 4 in .*a\.tar of shape \(2, 3, 6\).*expected \(2, 3, 5\)"):
        dataset.batch([0, 4])
    pack(tmp_path / "a.tar", [("0.png", png(pixels(0, 9, 9))), ("1.png", png(pixels(1, 9, 9))[:60])])
    (tmp_path / "shardindex.json").unlink()
    with pytest.raises(DataError, match=r"1 in .*a\.tar"):
        build(tmp_path, kind="images", num_classes=0, resolution=4).batch([0, 1])


def test_odd_moments_are_refused(tmp_path):
    pack(tmp_path / "a.tar", [("0.npy", npy(value(0, (3, 2, 5))))])
    assert "of shape (3, 2, 5)" in refusal(tmp_path, kind="moments", num_classes=0)


def test_options(shards):
    for options in (
        {"kind": "video"},
        {"window": 0},
        {"lanes": 0},
        {"lane_batch": 0},
        {"scale": 0.0},
        {"flip": True},
        {"resolution": 8},
        {"kind": "images", "scale": 1.0},
        {"kind": "images", "resolution": 0},
        {"num_classes": -1},
        {"workers": 0},
    ):
        with pytest.raises(InputError):
            build(shards, **options)
    for options in (
        {"window": 1.0},
        {"lanes": True},
        {"flip": 1},
        {"scale": "1"},
        {"kind": "images", "resolution": "8"},
    ):
        with pytest.raises(InputTypeError):
            build(shards, **options)
    for path in (3, [], "", "-", ["x.tar", 3]):
        with pytest.raises(InputTypeError):
            data.build("webdataset", path=path)


def test_a_missing_package_is_named(shards, monkeypatch):
    from pathline import MissingPackageError

    monkeypatch.setitem(__import__("sys").modules, "braceexpand", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'pathline\[webdataset\]'"):
        build(shards)
