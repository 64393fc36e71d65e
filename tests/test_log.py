"""What a run writes down, and that nothing which fails there disturbs training."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import resource
import signal
import sys
import threading
import types
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from pathline.core import sections
from pathline.core.errors import MissingPackageError
from pathline.training import log as module
from pathline.training.log import Log, check_sinks, mean_over_last_steps, read_rows

PLAIN = sections.Log(tensorboard=False)
WITH_WANDB = sections.Log(tensorboard=False, wandb="digits")


def row(step, **entries):
    return {"step": step, "loss": 1 / step, **entries}


def written(folder, *steps, start=0, settings=PLAIN):
    """A log with these rows, still open."""
    log = Log(folder, start, 11, settings)
    for step in steps:
        log.write(row(step))
    return log


def steps(folder, name="metrics.jsonl"):
    """Steps of a file's lines; every line must be whole."""
    content = (folder / name).read_text()
    assert content == "" or content.endswith("\n")
    return [json.loads(line)["step"] for line in content.splitlines()]


def warnings(capsys):
    return [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("warning: ")]


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_read_back_with_null_for_what_is_not_finite_or_not_known(tmp_path):
    log = Log(tmp_path / "deep" / "run", 0, 5)
    log.write({"step": 2, "loss": math.inf, "by": [1.5, math.nan], "utilisation": None, "skipped": 3})
    expected = {"step": 2, "loss": None, "by": [1.5, None], "utilisation": None, "skipped": 3}
    assert read_rows(tmp_path / "deep" / "run") == [expected]  # before it is closed
    log.close()
    assert read_rows(tmp_path / "deep" / "run") == [expected]
    assert read_rows(tmp_path) == []


def test_mean_over_the_last_steps():
    rows = [{"window": 3, "loss": 5.0}, {"window": 5, "loss": 2.0}, {"window": 2, "loss": 9.0}]
    assert mean_over_last_steps(rows, "loss", 7) == ((5 * 2.0 + 2 * 9.0) / 7, 7)
    assert mean_over_last_steps(rows, "loss", 8) == ((3 * 5.0 + 5 * 2.0 + 2 * 9.0) / 10, 10)


@pytest.mark.parametrize("torn", [b'{"step": 9, "lo', b"\0\0\0\xff", b'["step", 2]', b'{"loss": 3}', b'{"step": null}'])
def test_a_resume_cuts_later_rows_and_one_cut_short(torn, tmp_path):
    written(tmp_path, 2, 3, 5, 7).close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert [r["step"] for r in read_rows(tmp_path)] == [2, 3, 5, 7]
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    written(tmp_path, 5, 7, start=3).close()
    assert steps(tmp_path) == [2, 3, 5, 7]
    assert (tmp_path / "metrics.superseded.jsonl").read_bytes().splitlines() == [*lines[2:4], torn]
    written(tmp_path, 11, start=5).close()
    assert steps(tmp_path) == [2, 3, 5, 11] and len(lines) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.superseded.jsonl"]


def test_a_last_row_without_its_line_end_is_kept_whole(tmp_path):
    written(tmp_path, 2, 3).close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    written(tmp_path, 5, start=3).close()
    assert steps(tmp_path) == [2, 3, 5] and not (tmp_path / "metrics.superseded.jsonl").exists()


def test_a_kill_in_the_middle_of_a_cut_leaves_a_whole_file(tmp_path, monkeypatch):
    """At any call to the file system: the old rows or the new ones, and none lost."""
    real = {name: getattr(Path, name) for name in ("open", "replace")}
    for stop in range(6):
        folder = tmp_path / str(stop)
        written(folder, 2, 3, 5, 7).close()
        calls = []

        def killed(name, stop=stop, calls=calls):
            def call(path, *arguments, **options):
                calls.append(name)
                if len(calls) > stop:
                    raise KeyboardInterrupt
                return real[name](path, *arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(Path, name, killed(name))
            try:
                module._cut(folder / "metrics.jsonl", 3)
            except KeyboardInterrupt:
                assert stop < 4
        assert steps(folder) == ([2, 3] if stop >= 4 else [2, 3, 5, 7])
        written(folder, start=3).close()
        assert steps(folder) == [2, 3] and {5, 7} == set(steps(folder, "metrics.superseded.jsonl"))


def test_rewind_sets_later_rows_aside_and_goes_on(tmp_path):
    log = written(tmp_path, 2, 3, 5, 7)
    log.rewind(3)
    assert steps(tmp_path) == [2, 3] and steps(tmp_path, "metrics.superseded.jsonl") == [5, 7]
    log.write(row(5))
    log.rewind(3)
    log.rewind(3)
    log.write(row(7))
    log.close()
    assert steps(tmp_path) == [2, 3, 7] and steps(tmp_path, "metrics.superseded.jsonl") == [5, 7, 5]


# --- a disk that is full ---------------------------------------------------------------------------------------------


@contextmanager
def full_at(size):
    """Let no file of this process grow beyond a size: the system writes what still fits, then refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_no_row(tmp_path, capsys):
    """The system takes seven bytes of a row before it refuses; they do not stay."""
    log = written(tmp_path, 2, 3)
    content = (tmp_path / "metrics.jsonl").read_bytes()
    with full_at(len(content) + 7):
        for step in (4, 5, 6):
            log.write(row(step))
            log.advance()
        assert (tmp_path / "metrics.jsonl").read_bytes() == content
    assert len(warnings(capsys)) == 1
    log.write(row(7))
    assert steps(tmp_path) == [2, 3, 4, 5, 6, 7]
    with full_at(3):
        log.write(row(8))
    log.close()
    assert steps(tmp_path) == [2, 3, 4, 5, 6, 7, 8] and warnings(capsys) == []


def test_a_disk_that_is_full_now_and_then_loses_no_row(tmp_path, monkeypatch, capsys):
    """Every second call writes half of its bytes, and of those every second one then says ENOSPC."""
    real, calls = Path.open, []

    class Moody(io.FileIO):
        def write(self, content):
            calls.append(len(content))
            if len(calls) % 4 == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content[: len(content) // 2] if len(calls) % 2 else content)

    def moody(path, mode="r", *arguments, **options):
        return Moody(path, "a") if mode == "ab" else real(path, mode, *arguments, **options)

    log = Log(tmp_path, 0, 60, PLAIN)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", moody)
        for step in range(1, 51):
            log.write(row(step))
    assert len(calls) > 50 and len(warnings(capsys)) == 1
    log.close()
    assert steps(tmp_path) == list(range(1, 51))
    assert read_rows(tmp_path) == [row(step) for step in range(1, 51)]


def test_rows_that_waited_are_set_aside_as_well(tmp_path):
    log = written(tmp_path, 2, 3, 5)
    with full_at(10):
        log.write(row(7))
    log.rewind(3)
    log.close()
    assert steps(tmp_path) == [2, 3] and steps(tmp_path, "metrics.superseded.jsonl") == [5, 7]


def test_a_rewind_on_a_full_disk_is_made_up_for(tmp_path, capsys):
    log = written(tmp_path, 2, 3, 5, 7)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with full_at(10):
        log.write(row(8))
        log.rewind(3)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        log.write(row(4))
        log.rewind(5)
    log.write(row(6))
    log.close()
    assert steps(tmp_path) == [2, 3, 4, 6] and steps(tmp_path, "metrics.superseded.jsonl") == [5, 7]
    assert len(warnings(capsys)) == 1
    assert not list(tmp_path.glob(".*"))


def test_what_waits_is_bounded_and_what_is_lost_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "KEPT", 3)
    log = Log(tmp_path, 0, 11, PLAIN)
    with full_at(0):
        for step in (1, 2, 3, 4, 5):
            log.write(row(step))
    log.write(row(6))
    assert steps(tmp_path) == [4, 5, 6]
    with full_at(0):
        log.write(row(7))
        log.close()
    first, last = warnings(capsys)
    assert "rows wait in memory" in first and last.startswith("warning: 4 rows of")


def test_a_folder_that_cannot_be_written_is_told_of_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Log(tmp_path / "file" / "run", 0, 11)


# --- the progress bar ------------------------------------------------------------------------------------------------


def pipe():
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True)


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [pipe, closed, lambda: None])
@pytest.mark.parametrize("early", [True, False])
def test_a_dead_stderr_costs_the_progress_bar_alone(stream, early, tmp_path, monkeypatch):
    if early:
        monkeypatch.setattr(sys, "stderr", stream())
    log = Log(tmp_path, 0, 11, PLAIN)
    if not early:
        dead = stream()
        monkeypatch.setattr(log._sinks["the progress bar"]._bar, "update", lambda: dead.write("state"))
        monkeypatch.setattr(sys, "stderr", dead)
    for step in (2, 3, 5):
        log.advance()
        log.write(row(step))
    log.rewind(3)
    log.close()
    assert steps(tmp_path) == [2, 3] and not log._sinks


def test_the_bar_counts_steps_and_goes_back(tmp_path, capsys):
    log = Log(tmp_path, 3, 11, PLAIN)
    bar = log._sinks["the progress bar"]._bar
    assert (bar.n, bar.total) == (3, 11)
    for _ in range(5):
        log.advance()
    log.write(row(8, images_per_second=123.456))
    assert bar.n == 8 and "loss=0.125" in bar.postfix and "images_per_second=123.5" in bar.postfix
    log.write({"step": 8, "loss": None})
    log.rewind(5)
    assert bar.n == 5
    log.advance()
    log.close()
    assert bar.n == 6 and warnings(capsys) == []


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def events(folder):
    """Name -> [(step, value)] as TensorBoard reads them."""
    reader = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True)
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_shows_the_rows(tmp_path):
    log = Log(tmp_path, 0, 11)
    log.write({"step": 2, "loss": 0.5, "loss_by_time": [1.5, math.nan, 0.25], "utilisation": None})
    log.write({"step": 3, "loss": 0.25, "loss_by_time": [math.nan, 2.0, 0.75], "utilisation": None})
    expected = {
        "loss": [(2, 0.5), (3, 0.25)],
        "loss_by_time/0": [(2, 1.5)],
        "loss_by_time/1": [(3, 2.0)],
        "loss_by_time/2": [(2, 0.25), (3, 0.75)],
    }
    assert events(tmp_path) == expected  # before it is closed: a kill loses nothing
    log.close()
    assert events(tmp_path) == expected


def test_tensorboard_forgets_what_a_rewind_sets_aside(tmp_path):
    log = written(tmp_path, 2, 4, 5, 8, settings=sections.Log())
    log.rewind(4)
    assert events(tmp_path)["loss"] == [(2, 0.5), (4, 0.25)]
    log.write({"step": 5, "loss": 2.0})
    log.write({"step": 8, "loss": 3.0})
    log.close()
    assert events(tmp_path)["loss"] == [(2, 0.5), (4, 0.25), (5, 2.0), (8, 3.0)]


def test_tensorboard_forgets_what_a_resume_sets_aside(tmp_path, monkeypatch):
    written(tmp_path, 2, 4, 5, 8, settings=sections.Log()).close()
    for path in (tmp_path / "tensorboard").iterdir():  # readers go by the names' seconds
        path.rename(path.with_name(path.name.replace("tfevents.", "tfevents.0")))
    log = Log(tmp_path, 4, 11)
    log.write({"step": 5, "loss": 2.0})
    log.close()
    assert events(tmp_path)["loss"] == [(2, 0.5), (4, 0.25), (5, 2.0)]


def test_tensorboard_can_be_left_out(tmp_path, monkeypatch, capsys):
    written(tmp_path / "off", 2).close()
    assert not (tmp_path / "off" / "tensorboard").exists()
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    written(tmp_path / "missing", 2, settings=sections.Log()).close()
    assert not (tmp_path / "missing" / "tensorboard").exists() and warnings(capsys) == []


@pytest.mark.parametrize("method", ["__init__", "add_scalar", "flush", "close"])
def test_a_tensorboard_that_raises_is_left_out(method, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no more")

    monkeypatch.setattr(SummaryWriter, method, fail)
    log = written(tmp_path, 2, 3, settings=sections.Log())
    log.advance()
    log.rewind(2)
    log.write(row(5))
    log.close()
    (line,) = warnings(capsys)
    assert line.startswith("warning: TensorBoard failed") and "RuntimeError: no more" in line
    assert steps(tmp_path) == [2, 5]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the writer's own thread
def test_a_full_disk_under_tensorboard_leaves_it_out(tmp_path, capsys):
    before = set(threading.enumerate())
    log = written(tmp_path, 2, settings=sections.Log())
    big = {f"entry {i}": float(i) for i in range(50)}
    with full_at(700):
        for step in (3, 4, 5):
            log.write(row(step))
            log._tell("write", {"step": step, **big})
    assert sum(line.startswith("warning: TensorBoard failed") for line in warnings(capsys)) == 1
    log.write(row(7))
    log.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert steps(tmp_path) == [2, 3, 4, 5, 7] and warnings(capsys) == []


# --- Weights & Biases ------------------------------------------------------------------------------------------------


class Service:
    """What stands in for the package: it records what it is told, and raises where it is told to."""

    def __init__(self, fail=None):
        self.calls, self.fail, self.id = [], fail, "k3v7"

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            if name == self.fail:
                raise ConnectionError("no network")
            return self

        return call

    def named(self, name):
        return [(arguments, options) for called, arguments, options in self.calls if called == name]


def service(monkeypatch, fail=None):
    stub, told = types.ModuleType("wandb"), Service(fail)
    stub.init = told.init
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return told


def test_weights_and_biases_is_told_the_run_and_its_rows(tmp_path, monkeypatch, capsys):
    told = service(monkeypatch)
    folder = tmp_path / "rotated"
    log = Log(folder, 0, 11, WITH_WANDB, {"optim": {"lr": 0.5}})
    log.advance()
    log.write({"step": 2, "loss": 0.5, "loss_by_time": [1.5, math.nan, 0.25], "utilisation": None})
    log.close()
    ((_, options),) = told.named("init")
    assert options["project"] == "digits" and options["name"] == "rotated" and options["dir"] == str(folder)
    assert options["config"] == {"optim": {"lr": 0.5}} and options["id"] is None
    (((logged,), _),) = told.named("log")
    assert logged == {"step": 2, "loss": 0.5, "loss_by_time/0": 1.5, "loss_by_time/2": 0.25}
    assert told.named("define_metric") == [(("step",), {}), (("*",), {"step_metric": "step"})]
    assert [name for name, _, _ in told.calls][-2:] == ["log", "finish"] and warnings(capsys) == []


def test_a_resumed_run_goes_on_under_its_name(tmp_path, monkeypatch):
    service(monkeypatch)
    written(tmp_path, 2, 3, settings=WITH_WANDB).close()
    told = service(monkeypatch)
    written(tmp_path, 5, start=3, settings=WITH_WANDB).close()
    ((_, options),) = told.named("init")
    assert options["id"] == "k3v7" and options["resume"] == "allow"


@pytest.mark.parametrize("fail, logged", [("init", 0), ("define_metric", 0), ("log", 1), ("finish", 3)])
def test_a_service_that_fails_is_left_out(fail, logged, tmp_path, monkeypatch, capsys):
    told = service(monkeypatch, fail)
    log = written(tmp_path, 2, 3, settings=WITH_WANDB)
    log.rewind(2)
    log.write(row(5))
    log.close()
    (line,) = warnings(capsys)
    assert line.startswith("warning: Weights & Biases failed") and "ConnectionError: no network" in line
    assert len(told.named("log")) == logged and steps(tmp_path) == [2, 5]


def test_a_missing_package_is_told_of_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'pathline\[wandb\]'"):
        check_sinks(WITH_WANDB)
    check_sinks(PLAIN)
    service(monkeypatch)
    check_sinks(WITH_WANDB)
    assert list(tmp_path.iterdir()) == []


# --- all at once -----------------------------------------------------------------------------------------------------


def test_an_interrupt_is_no_failure_of_a_sink(tmp_path, monkeypatch):
    """Ctrl-C while a row is written ends the run as anywhere else."""
    log = written(tmp_path, 2, settings=sections.Log())
    monkeypatch.setattr(SummaryWriter, "add_scalar", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        log.write(row(3))
    monkeypatch.undo()
    log.close()
    assert steps(tmp_path) == [2, 3]
