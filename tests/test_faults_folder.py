"""Two runs in one folder, clocks that jump, another configuration or data set, and places of the log that are dead."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pathline.data import Digits
from pathline.training import log, loop, sampling, sinks
from pathline.training.step import take_step

spec = importlib.util.spec_from_file_location("faults", Path(__file__).with_name("faults.py"))
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)

CHECKPOINTS = Path("run/checkpoints")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("unbroken")
    assert faults.forked(lambda: faults.start(folder)).code == 0
    return faults.outcome(folder)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that has stopped at step 8."""
    folder = tmp_path_factory.mktemp("stopped")
    assert faults.forked(lambda: faults.start(folder, "train.stop_at=8")).code == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "c.yaml"}


# --- one run at a time ------------------------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(unbroken, tmp_path):
    """By the process that holds the folder; what a killed one left of its lock is no obstacle."""
    arrived, opened = os.pipe(), os.pipe()

    def slow() -> int:
        def take(state) -> None:
            if state.step == 5:
                os.write(arrived[1], b"x")
                os.read(opened[0], 1)
            take_step(state)

        loop.take_step = take
        return faults.start(tmp_path)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("999999 on elsewhere\n")
    first = faults.Child(slow)
    os.read(arrived[0], 1)
    resumed = [("--resume", "auto"), ("--resume", str(CHECKPOINTS / "step-000000002"))]
    others = [faults.forked(lambda words=words: faults.start(tmp_path, *words)) for words in (*resumed, ())]
    os.write(opened[1], b"x")
    assert first.end().code == 0
    assert [second.code for second in others] == [2, 2, 2]
    assert all(f"in which process {first.pid} on " in second.said for second in others[:2]), others[0].said
    assert not faults.differing(unbroken, faults.outcome(tmp_path))
    for handle in (*arrived, *opened):
        os.close(handle)


# --- clocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newest", [0.0, 5e9])
def test_no_clock_decides_which_checkpoint_is_newest(newest, stopped, unbroken, tmp_path):
    """Files of the newest one are of 1970, or of 2128; the clock of the machine runs backwards meanwhile."""
    folder = tmp_path / "x"
    shutil.copytree(stopped, folder)
    for number, path in enumerate(sorted((folder / CHECKPOINTS).iterdir(), reverse=True)):
        for file in (*path.iterdir(), path):
            os.utime(file, (abs(newest - number * 1e9),) * 2)

    def work() -> int:
        now, began = time.time(), []

        def take(state) -> None:
            began.append(state.step)
            take_step(state)

        loop.take_step = take
        time.time = lambda: now - 1e5 * len(began)
        faults.start(folder, "--resume", "auto")
        return began[0]

    ended = faults.forked(work)
    assert ended.result == 8, ended.said
    assert not faults.differing(unbroken, faults.outcome(folder))


# --- another run ------------------------------------------------------------------------------------------------------


def other_data() -> None:
    manifest = Digits.manifest.fget
    Digits.manifest = property(lambda self: {**manifest(self), "sha256": "0" * 64})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lr=1e-3"], "optim.lr: 0.003 -> 0.001"),
        (["train.seed=6"], "train.seed: 5 -> 6"),
        (["train.global_batch=7"], "train.global_batch: 6 -> 7"),
        (["train.steps=11"], "train.steps: 10 -> 11"),
        (["backbone.hidden_size=24"], "backbone.hidden_size: 12 -> 24"),
        (["ema.decay=0.99"], "ema.decay: 0.9 -> 0.99"),
        (["data.split=all"], "data.split: 'train' -> 'all'"),
        (["objective.times.mean=0.5"], "objective.times.mean: 0.0 -> 0.5"),
        ([], "the data's sha256: '"),
    ],
)
def test_another_configuration_or_data_set_is_refused_with_the_difference(words, said, stopped, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(stopped, folder)
    before = contents(folder / "run")

    def work() -> int:
        if not words:
            other_data()
        times = {"objective": {"times": {"name": "logit-normal"}}}
        return faults.start(folder, "--resume", "auto", *words, **times)

    ended = faults.forked(work)
    assert ended.code == 2 and said in ended.said and "Traceback" not in ended.said, ended.said
    after = contents(folder / "run")
    assert {key: after[key] for key in before if not key.endswith(".lock")} == {
        key: value for key, value in before.items() if not key.endswith(".lock")
    }
    assert sorted(before) == sorted(after)


# --- dead places of the log -------------------------------------------------------------------------------------------


def dead_board() -> None:
    sinks._Board.write = raising(RuntimeError("no event file"))


def unmade_board() -> None:
    sinks._Board.__init__ = raising(ImportError("half an installation"))


def dead_bar() -> None:
    sinks._Bar.advance = raising(BrokenPipeError(32, "Broken pipe"))


def raising(error: Exception) -> Callable:
    def fail(*arguments):
        raise error

    return fail


def closed_pipe() -> None:
    """Nobody reads what is said any more, as where a terminal or ``tee`` is gone."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)


def closed_pipe_and_bad_news() -> None:
    """There is something to say: a save that fails, and a picture that cannot be drawn."""
    closed_pipe()
    loop.Writer._store = failing_at(4, loop.Writer._store)
    sampling.draw_picture = failing_at(8, sampling.draw_picture, raised=OSError(5, "no picture"))


def failing_at(step: int, inner: Callable, raised: Exception | None = None) -> Callable:
    calls: list[int] = []

    def outer(*arguments):
        calls.append(1)
        if arguments[1] == step or (raised is not None and len(calls) == 2):
            raise raised or OSError(5, "Input/output error")
        return inner(*arguments)

    return outer


def rows_late() -> None:
    """Rows cannot be written for a while: they wait."""
    inner, calls = log._append, []

    def append(path, content):
        calls.append(1)
        if len(calls) <= 2:
            raise OSError(28, "No space left on device")
        return inner(path, content)

    log._append = append


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (dead_board, "TensorBoard failed and is left out from here on"),
        (unmade_board, "TensorBoard failed and is left out from here on"),
        (dead_bar, "the progress bar failed and is left out from here on"),
        (rows_late, "metrics.jsonl cannot be written"),
        (closed_pipe, ""),
        (closed_pipe_and_bad_news, ""),
    ],
)
def test_a_dead_place_of_the_log_leaves_training_as_it_is(prepare, said, unbroken, tmp_path):
    """One warning, and the same end: also where nobody hears the warning."""

    def work() -> int:
        prepare()
        return faults.start(tmp_path, log={"tensorboard": "board" in prepare.__name__})

    ended = faults.forked(work)
    assert ended.code == 0 and ended.said.count(said or "\0") == bool(said), ended.said
    left = faults.outcome(tmp_path, ["failed_saves"])
    whole = {**unbroken, "rows": left["rows"]} if prepare is closed_pipe_and_bad_news else unbroken
    if prepare is not closed_pipe_and_bad_news:
        left = faults.outcome(tmp_path)
    else:
        left["pictures/step-000000008.png"] = whole["pictures/step-000000008.png"]  # the one that could not be drawn
        assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["failed_saves"] == 1
    assert not faults.differing(whole, left)


def test_a_signal_is_heard_where_nobody_hears_the_answer(unbroken, tmp_path):
    """A closed pipe in the place of a terminal, and SIGTERM: saved, with its code."""

    def take(state) -> None:
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        take_step(state)

    def work() -> int:
        closed_pipe()
        loop.take_step = take
        return faults.start(tmp_path)

    assert faults.forked(work).code == 75
    assert faults.forked(lambda: faults.start(tmp_path, "--resume", "auto")).code == 0
    assert not faults.differing(unbroken, faults.outcome(tmp_path))
