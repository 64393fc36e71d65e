"""Checkpoints written beside training: what was saved is what is written, and no failure ends the run."""

from __future__ import annotations

import errno
import multiprocessing
import resource
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pathline.training import checkpoints
from pathline.training.checkpoints import Keep, Snapshot, read, verify
from pathline.training.writing import Writer

KEEP = Keep(99)


def tensors(value: float) -> dict[str, dict[str, Tensor]]:
    return {
        "model": {
            "weight": torch.full((2, 3), value),
            "turned": torch.full((5, 7), value).T,
            "half": torch.ones(3).half(),
        },
        "ema-0.050": {"weight": torch.full((2, 3), value + 0.5), "count": torch.tensor(int(value))},
    }


def path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}"


def assert_holds(folder: Path, step: int, value: float) -> None:
    back = read(path(folder, step))
    for group, expected in tensors(value).items():
        assert back.tensors[group].keys() == expected.keys()
        assert all(torch.equal(back.tensors[group][name], tensor) for name, tensor in expected.items())


class Gate:
    """Holds up every write until it is opened, and looks at what passes."""

    def __init__(self, monkeypatch) -> None:
        self.arrived, self.open = threading.Event(), threading.Event()
        self.running = self.most = 0
        self.seen: list[Snapshot] = []
        self._inner = checkpoints.write
        monkeypatch.setattr(checkpoints, "write", self._write)

    def _write(self, folder, step, snapshot, keep):
        self.running += 1
        self.most = max(self.most, self.running)
        self.seen.append(snapshot)
        self.arrived.set()
        assert self.open.wait(20)
        result = self._inner(folder, step, snapshot, keep)
        self.running -= 1
        return result


def test_what_was_saved_is_written_though_everything_changes_at_once(tmp_path, monkeypatch):
    gate, writer = Gate(monkeypatch), Writer(tmp_path, KEEP, asynchronous=True)
    live, state = tensors(3.0), {"skipped": 2, "window": {"sums": [1.5, 2.5]}}
    writer.save(5, Snapshot(live, state))
    assert gate.arrived.wait(20) and not path(tmp_path, 5).exists()  # training goes on while it is written
    for named in live.values():
        for tensor in named.values():
            tensor.mul_(0)
    state["skipped"] = 11
    state["window"]["sums"][0] = 13.0
    gate.open.set()
    writer.close()
    assert_holds(tmp_path, 5, 3.0)
    back = read(path(tmp_path, 5)).state
    assert back["skipped"] == 2 and back["window"] == {"sums": [1.5, 2.5]}
    assert writer.saved == 1 and writer.failures == [] and writer.poll() is None


def test_one_at_a_time_and_none_left_out(tmp_path, monkeypatch):
    gate, writer = Gate(monkeypatch), Writer(tmp_path, KEEP, asynchronous=True)
    writer.save(2, Snapshot(tensors(2.0), {}))
    began = threading.Event()

    def save_more():
        began.set()
        for step in (3, 5):
            writer.save(step, Snapshot(tensors(step), {}))
        writer.wait()

    other = threading.Thread(target=save_more)
    other.start()
    assert began.wait(20)
    other.join(0.2)
    assert other.is_alive() and len(gate.seen) == 1  # the second save waits for the first
    gate.open.set()
    other.join(20)
    assert gate.most == 1 and writer.saved == 3
    for step in (2, 3, 5):
        assert_holds(tmp_path, step, step)


def test_the_copy_is_kept_from_save_to_save_and_follows_new_shapes(tmp_path, monkeypatch):
    gate, writer = Gate(monkeypatch), Writer(tmp_path, KEEP, asynchronous=True)
    gate.open.set()
    for step in (2, 3):
        writer.save(step, Snapshot(tensors(step), {}))
        writer.wait()
        assert_holds(tmp_path, step, step)
    places = [
        {(group, name): tensor.data_ptr() for group, named in seen.tensors.items() for name, tensor in named.items()}
        for seen in gate.seen
    ]
    assert places[0] == places[1] and len(places[0]) == 5
    other = {"model": {"weight": torch.arange(5.0)}}
    writer.save(7, Snapshot(other, {}))
    writer.wait()
    back = read(path(tmp_path, 7))
    assert back.tensors.keys() == {"model"} and torch.equal(back.tensors["model"]["weight"], torch.arange(5.0))


def test_without_a_thread_a_save_is_whole_when_it_returns(tmp_path):
    writer = Writer(tmp_path, Keep(2), asynchronous=False)
    for step in (2, 3, 5):
        before = threading.active_count()
        writer.save(step, Snapshot(tensors(step), {}))
        assert threading.active_count() == before
        assert_holds(tmp_path, step, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000003", "step-000000005"]
    assert writer.saved == 3


# --- failures --------------------------------------------------------------------------------------------------------


@contextmanager
def file_limit(size: int):
    """No file of this process may be larger: the operating system refuses to write on, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_takes_no_more(asynchronous, tmp_path):
    writer = Writer(tmp_path, Keep(1), asynchronous=asynchronous)
    big = {"model": {"weight": torch.ones(1000, 3000)}}
    writer.save(2, Snapshot(big, {}))
    writer.wait()
    with file_limit(5_000_000):
        writer.save(3, Snapshot(big, {}))
        writer.wait()
        assert len(writer.failures) == 1 and writer.saved == 1
        told = writer.poll()
        assert told == writer.failures[0] and "step 3 " in told and "File too large" in told and str(tmp_path) in told
        assert writer.poll() is None
        assert [p.name for p in tmp_path.iterdir()] == ["step-000000002"]
        verify(path(tmp_path, 2))
    writer.save(5, Snapshot(big, {}))
    writer.close()
    assert writer.saved == 2 and writer.poll() is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000005"]
    verify(path(tmp_path, 5))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (MemoryError(), "MemoryError"),
    ],
)
@pytest.mark.parametrize("place", ["mkdir", "write_text", "rename"])
def test_a_failure_anywhere_is_counted_told_once_and_tried_again(place, error, said, asynchronous, tmp_path):
    writer = Writer(tmp_path, KEEP, asynchronous=asynchronous)
    writer.save(2, Snapshot(tensors(2.0), {}))
    writer.wait()

    def fail(*arguments, **keywords):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, place, fail)
        for step in (3, 5):
            writer.save(step, Snapshot(tensors(step), {}))
        writer.wait()
    assert writer.saved == 1
    for step in (3, 5):
        told = writer.poll()
        assert told is not None and f"step {step} " in told and said in told and "the next save tries again" in told
    assert writer.poll() is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000002"]
    writer.save(5, Snapshot(tensors(5.0), {}))
    writer.close()
    assert writer.saved == 2 and len(writer.failures) == 2
    for step in (2, 5):
        assert_holds(tmp_path, step, step)


def test_no_memory_for_the_copy(tmp_path):
    """2⁴⁵ numbers, of which only one is there; torch raises RuntimeError."""
    writer = Writer(tmp_path, KEEP, asynchronous=True)
    writer.save(2, Snapshot(tensors(2.0), {}))
    huge = {"model": {"weight": torch.ones(1).expand(2**45)}}
    writer.save(3, Snapshot(huge, {}))
    writer.wait()
    told = writer.poll()
    assert told is not None and "step 3 " in told and "allocate" in told
    writer.save(5, Snapshot(tensors(5.0), {}))
    writer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000002", "step-000000005"]
    assert_holds(tmp_path, 5, 5.0)


def test_no_thread_can_be_started(tmp_path, monkeypatch):
    writer = Writer(tmp_path, KEEP, asynchronous=True)

    def fail(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        writer.save(3, Snapshot(tensors(3.0), {}))
    writer.wait()
    assert "can't start new thread" in (writer.poll() or "")
    writer.save(5, Snapshot(tensors(5.0), {}))
    writer.close()
    assert_holds(tmp_path, 5, 5.0)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_mistake_is_no_failure_and_is_raised_once(asynchronous, tmp_path):
    """A state that JSON cannot hold would make every save fail: nobody wants to train on with that."""
    writer = Writer(tmp_path, KEEP, asynchronous=asynchronous)
    with pytest.raises(TypeError, match="not JSON serializable"):
        writer.save(3, Snapshot(tensors(3.0), {"wrong": {1, 2}}))
        writer.wait()
    assert writer.failures == [] and list(tmp_path.iterdir()) == []
    writer.save(5, Snapshot(tensors(5.0), {}))
    writer.close()
    assert_holds(tmp_path, 5, 5.0)


def test_a_run_that_an_exception_ends_leaves_the_checkpoint_that_was_being_written(tmp_path, monkeypatch):
    """Nobody waits for the writer, and the write is slower than the end of the program."""
    inner = checkpoints.finish
    monkeypatch.setattr(checkpoints, "finish", lambda *arguments: (time.sleep(0.3), inner(*arguments))[1])

    def program():
        Writer(tmp_path, KEEP, asynchronous=True).save(5, Snapshot(tensors(5.0), {}))
        raise SystemExit(7)

    process = multiprocessing.get_context("fork").Process(target=program)  # ends as Python does: threads are waited for
    process.start()
    process.join(60)
    assert process.exitcode == 7
    assert_holds(tmp_path, 5, 5.0)


# --- speed -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_half_a_gigabyte_does_not_hold_up_training(tmp_path):
    """A save takes a small part of what writing takes, and the thread lets the loop go on meanwhile."""
    state = Snapshot({"model": {f"layer {i}": torch.randn(1250, 1000) for i in range(100)}}, {})
    plain = Writer(tmp_path / "plain", Keep(1), asynchronous=False)
    began = time.perf_counter()
    plain.save(2, state)
    whole = time.perf_counter() - began
    writer = Writer(tmp_path / "beside", Keep(1), asynchronous=True)
    stalls, longest = [], 0.0
    for step in (2, 3, 5):
        began = time.perf_counter()
        writer.save(step, state)
        stalls.append(time.perf_counter() - began)
        while writer._thread is not None and writer._thread.is_alive():
            began = time.perf_counter()
            time.sleep(0.001)
            longest = max(longest, time.perf_counter() - began)
        writer.wait()
    print(f"whole {whole:.3f} s, stalls {stalls} s, longest pause meanwhile {longest:.3f} s")
    assert writer.saved == 3 and min(stalls[1:]) < 0.5 * whole
    assert longest < 0.5 * whole
