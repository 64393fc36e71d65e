"""The order of samples in WebDataset's shards, a function of seed and position alone, and what is held for it."""

from __future__ import annotations

import importlib.util
import itertools
import os
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pathline import DataError, InputError
from pathline.core.draws import Draws
from pathline.data.layouts.blocks import BlockOrder
from pathline.data.layouts.streams import Held

spec = importlib.util.spec_from_file_location("sharding", Path(__file__).with_name("sharding.py"))
sharding = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sharding)
COUNTS = sharding.COUNTS
build = sharding.build
npy = sharding.npy
pack = sharding.pack
shard_name = sharding.shard_name
value = sharding.value
write = sharding.write


@pytest.fixture
def shards(tmp_path):
    write(tmp_path / "shards")
    return tmp_path / "shards"


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


@pytest.mark.parametrize("num_classes", [11, 0])
def test_members_of_other_kinds_are_not_held(num_classes, tmp_path):
    content = npy(value(0))
    pack(tmp_path / "a.tar", [("0.jpg", bytes(9999)), ("0.npy", content), ("0.cls", b"7"), ("0.json", b"{}")])
    dataset = build(tmp_path, num_classes=num_classes)
    assert dataset.batch([0])["label"].tolist() == [7 if num_classes else 0]
    (held,) = [future.result() for future in dataset._held._futures.values()]
    labels = len(b"7" + b"{}") if num_classes else 0
    assert sum(map(len, held[0].members.values())) == len(content) + labels


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
