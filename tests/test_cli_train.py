"""``train.py`` as a user calls it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pathline
from pathline import train
from pathline.core.config import load
from pathline.core.errors import ConfigurationError, DivergedError, ProcessError
from pathline.data.digits.dataset import Digits
from pathline.train import main
from pathline.training import checkpoints
from pathline.training.folder import RunFolder
from pathline.training.log import read_rows

ROOT = Path(__file__).parent.parent
CONFIGURATION = """
data: digits
backbone: {name: deepflow, input_size: 8, patch_size: 4, in_channels: 1, hidden_size: 12, depth: 2, num_heads: 3,
           num_classes: 10, cuts: [1], acceleration_width: 7}
objective: {name: deepflow, times: logit-normal}
optim: {lr: 1e-3}
solver: {name: euler, steps: 2}
train: {steps: 6, global_batch: 5, folder: runs/x, accelerator: cpu}
log: {every: 2, tensorboard: false}
checkpoint: {every: 3}
"""


def command(folder):
    """The command with the tiny configuration, in a folder ``run`` here unless words say otherwise."""
    file = folder / "c.yaml"
    file.write_text(CONFIGURATION)
    return lambda *words: main([str(file), f"train.folder={folder / 'run'}", *words])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call the command; returns the exit code. Curves and page, of which one test speaks, are left out for speed."""
    monkeypatch.setattr(train, "save_curves", lambda folder: None)
    monkeypatch.setattr(train, "save_report", lambda folder: None)
    return command(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, with checkpoints of steps 3 and 6; not to be changed."""
    folder = tmp_path_factory.mktemp("cli")
    assert command(folder)() == 0
    return folder / "run"


def tree(folder):
    """Everything below a folder but the lock: contents, and when they were written."""
    paths = sorted(path for path in folder.rglob("*") if path.name != ".lock")
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in paths}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def weights(folder, step):
    return load_file(folder / "checkpoints" / f"step-{step:09d}" / "model.safetensors")


# --- what a run says and leaves --------------------------------------------------------------------------------------


def test_a_run_prints_and_leaves_what_it_should(tmp_path, capsys):
    assert command(tmp_path)("optim.lr=2e-3", "log.tensorboard=true", "log.pictures_every=4", "ema.lengths=[0.1]") == 0
    printed, folder = capsys.readouterr().out, tmp_path / "run"
    for words in (
        pathline.__version__,
        str(ROOT),
        "lr: 0.002",
        "parameters; 6 steps of 5 images = 30 images; 1 device;",
    ):
        assert words in printed
    for words in ("trained 30 images", "CPU s", "images/s", "peak memory", "mean over the last 6 steps", "loss: 0"):
        assert words in printed
    rows = read_rows(folder)
    said = float(re.search(r"velocity loss of the final head, mean over the last 6 steps: ([0-9.]+)", printed)[1])
    assert said == pytest.approx(sum(row["velocity"] for row in rows) / 3, abs=1e-4)
    saved = load(folder / "config.yaml")
    assert saved.optim.lr == 2e-3 and saved.train.folder == str(folder)
    assert [row["step"] for row in rows] == [2, 4, 6]
    names = {
        ".lock",
        "checkpoints",
        "config.yaml",
        "curves.png",
        "metrics.jsonl",
        "pictures",
        "report.html",
        "samples.png",
        "starts.jsonl",
        "tensorboard",
    }
    assert {path.name for path in folder.iterdir()} == names
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000000003", "step-000000006"]
    drawn = sorted(path.name for path in (folder / "pictures").iterdir())
    assert drawn == ["step-000000004.png", "step-000000006.png"]
    assert (folder / "samples.png").read_bytes() == (folder / "pictures" / drawn[1]).read_bytes()


def test_help_lists_every_exit_code(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    printed = capsys.readouterr().out
    assert left.value.code == 0
    codes = re.findall(r"^  (\S+) +\S", printed[printed.index("exit codes:") :], re.MULTILINE)
    assert codes == ["0", "2", "65", "70", "74", "75", "128+n"]
    for word in ("--resume auto|PATH", "--dry-run", "entry=value", "configuration"):
        assert word in printed


@pytest.mark.parametrize("words", [[], ["a.yaml", "--resum"], ["a.yaml", "--resume"], ["a.yaml", "--dry-run=yes"]])
def test_wrong_flags(words, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2 and "usage: train.py" in capsys.readouterr().err


# --- going on --------------------------------------------------------------------------------------------------------


def copy(run, folder):
    """A copy of a run in the folder ``run`` here."""
    return shutil.copytree(run, folder / "run")


def test_stopped_and_resumed_equals_unbroken(run, finished, tmp_path):
    assert run("train.stop_at=4") == 0
    assert run("--resume", "auto") == 0
    assert same(weights(tmp_path / "run", 6), weights(finished, 6))
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [2, 4, 6]


def test_auto_starts_anew_where_there_is_no_checkpoint(run, finished, tmp_path):
    """No folder, an empty one, and one of a run that a kill ended before its first checkpoint."""
    folder = tmp_path / "run"
    assert run("--resume", "auto", "train.steps=3", "optim.schedule=constant") == 0
    assert same(weights(folder, 3), weights(finished, 3))
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / ".lock").write_text("7 on elsewhere\n")
    (folder / "metrics.jsonl").write_text('{"step": 2, "loss": 7.5, "window": 2}\n{"step": 4, "lo')
    assert run("--resume", "auto") == 0
    assert same(weights(folder, 6), weights(finished, 6))
    assert [row["step"] for row in read_rows(folder)] == [2, 4, 6] and read_rows(folder)[0]["loss"] != 7.5


@pytest.mark.parametrize("name", ["checkpoints/step-000000003", "."])
def test_resuming_from_a_path_into_another_folder(name, run, finished, tmp_path, capsys):
    """A checkpoint, or a run, whose newest one it is: there nothing is left to train."""
    before = tree(finished)
    assert run("--resume", str(finished / name)) == 0
    printed = capsys.readouterr().out
    assert f"going on from {finished}" in printed and tree(finished) == before
    if name == ".":
        assert "after step 6: nothing is left to train; set train.steps higher" in printed
        assert "trained 0 images" in printed and not (tmp_path / "run" / "checkpoints").exists()
    else:
        assert "after step 3\n" in printed and "trained 15 images" in printed
        assert same(weights(tmp_path / "run", 6), weights(finished, 6))


def test_going_back_in_the_same_folder_sets_later_checkpoints_aside(run, finished, tmp_path):
    folder = copy(finished, tmp_path)
    assert run("--resume", str(folder / "checkpoints" / "step-000000003")) == 0
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-000000003", "step-000000006", "superseded-step-000000006-1"]
    assert same(weights(folder, 6), weights(finished, 6))


def test_a_finished_run_is_resumed_to_no_effect(run, finished, tmp_path, capsys):
    folder = copy(finished, tmp_path)
    before = {p: content for p, (_, content) in tree(folder).items() if p.parent.parent.name == "checkpoints"}
    rows = (folder / "metrics.jsonl").read_bytes()
    assert run("--resume", "auto") == 0
    assert {p: content for p, (_, content) in tree(folder).items() if p.parent.parent.name == "checkpoints"} == before
    assert (folder / "metrics.jsonl").read_bytes() == rows
    assert run("--resume", "auto", "train.steps=8") == 0  # the schedule is constant: a longer run is the same so far
    assert read_rows(folder)[-1]["step"] == 8
    capsys.readouterr()
    assert run("--resume", "auto", "train.steps=8", "train.stop_at=7") == 0
    assert "after step 8: nothing is left to train; set train.stop_at higher" in capsys.readouterr().out


def test_resuming_another_run_into_an_occupied_folder_is_refused(run, finished, tmp_path, capsys):
    folder = copy(finished, tmp_path)
    for lost in (None, "metrics.jsonl"):
        if lost is not None:
            (folder / lost).unlink()
        before = tree(folder)
        assert run("--resume", str(finished)) == 2
        said = capsys.readouterr().err
        assert "holds another run" in said and str(folder) in said and tree(folder) == before


def test_a_folder_with_a_run_is_refused(run, finished, tmp_path, capsys):
    before = tree(copy(finished, tmp_path))
    assert run() == 2
    said = capsys.readouterr().err
    assert "holds a run" in said and "--resume auto" in said and said.count("\n") == 1
    assert tree(tmp_path / "run") == before


def test_a_folder_in_which_another_process_trains_is_refused(run, finished, tmp_path, capsys):
    folder = copy(finished, tmp_path)
    other = RunFolder(folder)
    other.lock()
    before = tree(folder)
    assert run("--resume", "auto", "train.steps=8") == 2
    said = capsys.readouterr().err
    assert f"in which process {os.getpid()} on " in said and said.count("\n") == 1 and tree(folder) == before
    other.unlock()
    assert run("--resume", "auto", "train.steps=8") == 0


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_checkpoint_of_something_else_is_refused_with_the_difference(dry, run, finished, tmp_path, capsys):
    """Another configuration, other data, another model; all lines at once, and nothing is changed."""
    folder = copy(finished, tmp_path)
    before = tree(folder)
    words = ("optim.lr=5e-3", "backbone.acceleration_width=9", "data.split=all", "train.global_batch=7")
    for place in ("auto", str(folder / "checkpoints" / "step-000000003")):
        assert run("--resume", place, *words, *dry) == 2
        said = capsys.readouterr().err
        lines = [line.strip() for line in said.splitlines()]
        for line in (
            "optim.lr: 0.001 -> 0.005",
            "backbone.acceleration_width: 7 -> 9",
            "data.split: 'train' -> 'all'",
            "the data's split: 'train' -> 'all'",
            "train.global_batch: 5 -> 7",
        ):
            assert line in lines, said
        assert lines[0].startswith(
            f"error: got {folder}/checkpoints/step-00000000{6 if place == 'auto' else 3} of anoth"
        )
        assert tree(folder) == before
    sizes = "input_size: 8, patch_size: 4, in_channels: 1, hidden_size: 12, depth: 2, num_heads: 3, num_classes: 10"
    sit = f"{{name: sit, {sizes}}}"
    assert run("--resume", "auto", f"backbone={sit}", "objective=velocity", *dry) == 2
    assert "backbone.name: 'deepflow' -> 'sit'" in capsys.readouterr().err and tree(folder) == before


@pytest.mark.parametrize(
    ("allow", "code", "said"),
    [
        (["optim.lr"], 2, "train.seed: 0 -> 4"),
        (["optim.lr", "train.seed"], 0, ""),
        (["optim", "train"], 0, ""),
        (["optim.lrr"], 2, "got no entry 'optim.lrr' to allow; did you mean 'optim.lr'?"),
    ],
)
def test_what_is_named_may_differ_from_the_checkpoint(allow, code, said, run, tmp_path, capsys):
    """The learning rate and the seed are changed in the middle of a run."""
    assert run("train.stop_at=4") == 0
    capsys.readouterr()
    words = [word for name in allow for word in ("--allow", name)]
    assert run("--resume", "auto", "optim.lr=7e-4", "train.seed=4", *words) == code
    said_there = capsys.readouterr().err
    assert said in said_there and ("--allow" in said_there or "to allow" in said_there) == bool(code)
    assert (read_rows(tmp_path / "run")[-1]["step"] == 6) == (code == 0)
    if not code:
        assert read_rows(tmp_path / "run")[-1]["lr"] == 7e-4


def test_auto_falls_back_loudly_and_never_starts_over(run, finished, tmp_path, capsys):
    folder = copy(finished, tmp_path)
    for step, file in ((6, "model.safetensors"), (3, "ema.safetensors")):
        path = folder / "checkpoints" / f"step-{step:09d}" / file
        path.write_bytes(path.read_bytes()[:-5])
        code = run("--resume", "auto")
        said = capsys.readouterr().err
        if step == 6:
            assert code == 0 and "step-000000006" in said and "model.safetensors of" in said
            assert same(weights(folder, 6), weights(finished, 6))  # trained again from step 3, and whole
            path.write_bytes(path.read_bytes()[:-5])
        else:
            assert code == 2 and "with damaged checkpoints alone" in said


# --- starting from weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["", "checkpoints/step-000000003", "checkpoints/step-000000006/ema.safetensors"])
def test_starting_from_weights(source, run, finished, tmp_path):
    """Of a run's newest checkpoint, of a checkpoint, or of a file: those of the average."""
    words = [f"train.initialize_from={finished / source}", "train.seed=3", "optim.lr=1e-12", "train.steps=2"]
    assert run(*words) == 0
    step = 3 if source.endswith("3") else 6
    first = load_file(finished / "checkpoints" / f"step-{step:09d}" / "ema.safetensors")
    second = weights(tmp_path / "run", 2)
    assert all((first[key] - second[key]).abs().max() < 1e-9 for key in first)


def test_weights_that_do_not_fit_are_refused_by_name(run, finished, tmp_path, capsys):
    good = load_file(finished / "checkpoints" / "step-000000006" / "ema.safetensors")
    name = next(key for key in good if key.endswith("attention.output.weight"))
    for change, said in (
        ({name: None}, f"missing {name}"),
        ({"module." + name: good[name].clone()}, f"unexpected module.{name}"),
        ({name: good[name][:-1].contiguous()}, f"{name} is (11, 12) torch.float32, expected (12, 12) torch.float32"),
        ({name: good[name].half()}, f"{name} is (12, 12) torch.float16, expected"),
    ):
        file = tmp_path / "changed.safetensors"
        save_file({key: value for key, value in {**good, **change}.items() if value is not None}, file)
        assert run(f"train.initialize_from={file}") == 2
        printed = capsys.readouterr().err
        assert said in printed and str(file) in printed and "Traceback" not in printed
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
    file.write_bytes(b"no weights")
    assert run(f"train.initialize_from={file}") == 2
    assert "which is no safetensors file" in capsys.readouterr().err


def test_a_run_that_started_from_weights_goes_on_without_them(run, finished, tmp_path):
    """The same line again and again: the weights are read once, and may be gone afterwards."""
    file = shutil.copy(finished / "checkpoints" / "step-000000003" / "ema.safetensors", tmp_path / "w.safetensors")
    words = ("--resume", "auto", f"train.initialize_from={file}", "optim.lr=1e-12")
    assert run(*words, "train.stop_at=2") == 0
    Path(file).unlink()
    assert run(*words) == 0
    first = load_file(finished / "checkpoints" / "step-000000003" / "ema.safetensors")
    assert all((first[key] - value).abs().max() < 1e-9 for key, value in weights(tmp_path / "run", 6).items())


def test_two_sources_of_weights_are_refused(run, finished, tmp_path, capsys):
    assert run("--resume", str(finished), f"train.initialize_from={finished}") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: train.initialize_from: got ") and "by train.initialize_from=null" in said
    assert not (tmp_path / "run").exists()


# --- refusals at the start -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lrr=1"], "optim.lrr: unknown entry; did you mean 'lr'?"),
        (["optim.lr"], "expected entry=value"),
        (["train.precision=fp16"], "fp16 without a CUDA device"),
        (["--resume", "nowhere"], "got nowhere, which holds no valid checkpoint"),
        (["train.initialize_from=nowhere"], "got nowhere, which holds no valid checkpoint"),
        (["train.initialize_from=nowhere", "--resume", "auto"], "got nowhere, which holds no valid checkpoint"),
        (["train.folder=c.yaml"], "c.yaml is no folder; name another train.folder"),
        (["train.folder=c.yaml/run"], "c.yaml is no folder; name another train.folder"),
        (["train.folder=/proc/run"], "nothing can be written to /proc"),
        (["log.wandb=project"], "wandb"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(words, said, dry, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    monkeypatch.setattr(train, "Trainer", lambda *_, **__: pytest.fail("the run was started"))
    assert run(*words, *dry) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and said in printed.err and "Traceback" not in printed.err
    assert printed.out == "" and printed.err.count("\n") == 1 + ("wrong configuration" in printed.err)
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_full_disk_is_found_at_the_start(dry, run, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    assert run(*dry) == 2
    said = capsys.readouterr().err
    assert re.search(r"^error: got .*run on a disk with 0 MiB free, expected \d+ MiB for one checkpoint and", said)
    assert {path.name for path in tmp_path.rglob("*")} <= {"c.yaml", "run", ".lock"}
    assert not (dry and (tmp_path / "run").exists())


def test_no_configuration_file(capsys):
    assert main(["nowhere.yaml"]) == 2
    assert "got no file at nowhere.yaml" in capsys.readouterr().err


# --- dry run ---------------------------------------------------------------------------------------------------------

PLAN = (
    r"([\d,]+) parameters; ([\d,]+) steps of 5 images = ([\d,]+) images; 1 device; into \S+/run\n"
    r"(\S+) GFLOP forward an image, three times that with backward; (\S+) MiB a checkpoint, of which 4 at once\n"
    r"(?:going on from (\S+), after step (\d+)\n)?"
    r"a step takes (\S+) ms and at most (\S+) GiB a device: (\S+) (s|min|h) to finish, without pictures and check"
)


def seconds(value, unit):
    return float(value) * {"s": 1, "min": 60, "h": 3600}[unit]


def test_a_dry_run_prints_the_plan_and_writes_nothing(run, finished, tmp_path, capsys):
    before = tree(tmp_path)
    assert run("--dry-run", "train.steps=90000") == 0
    found = re.search(PLAN, capsys.readouterr().out)
    assert tree(tmp_path) == {**before, tmp_path / "c.yaml": tree(tmp_path)[tmp_path / "c.yaml"]}
    parameters, steps, images, flops, size, path, _, step, memory, *left = found.groups()
    model = weights(finished, 6)
    names = {key for key in load_file(finished / "checkpoints" / "step-000000006" / "optim.safetensors")}
    trained = {key.removesuffix(".exp_avg") for key in names if key.endswith(".exp_avg")}
    assert int(parameters.replace(",", "")) == sum(model[key].numel() for key in trained)
    assert (steps, images, path) == ("90,000", "450,000", None)
    # at least the products of weights and of 4 tokens, and not ten times as many
    weighed = sum(value.numel() for key, value in model.items() if value.ndim == 2 and key in trained)
    assert 2 * weighed / 1e9 < float(flops) < 2 * 4 * 10 * weighed / 1e9
    files = [path.stat().st_size for path in (finished / "checkpoints" / "step-000000006").glob("*.safetensors")]
    assert float(size) == pytest.approx(sum(files) / 2**20, rel=0.35)  # files have headers too
    assert seconds(*left) == pytest.approx(90000 * float(step) / 1000, rel=0.06) and float(memory) > 0.05


def test_a_dry_run_of_a_resume_reads_the_checkpoint_and_writes_nothing(run, finished, tmp_path, capsys):
    """Also beside a process that is training; a damaged newest checkpoint is named, as it will be."""
    folder = copy(finished, tmp_path)
    damaged = folder / "checkpoints" / "step-000000006" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    other = RunFolder(folder)
    other.lock()
    before = tree(folder)
    assert run("--dry-run", "--resume", "auto", "train.steps=50003", "train.stop_at=40003") == 0
    printed = capsys.readouterr()
    found = re.search(PLAN, printed.out)
    assert found[6].endswith("/run/checkpoints/step-000000003") and found[7] == "3"
    assert seconds(*found.group(10, 11)) == pytest.approx(40000 * float(found[8]) / 1000, rel=0.06)
    assert "warning: " in printed.err and "model.safetensors of" in printed.err and tree(folder) == before
    other.unlock()
    assert run("--dry-run") == 2  # as the run itself would be
    assert "holds a run" in capsys.readouterr().err and tree(folder) == before


def test_a_dry_run_finds_options_that_a_part_refuses(run, tmp_path, capsys):
    assert run("--dry-run", "backbone.cuts=[2]") == 2
    assert "backbone: got cuts (2,)" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_dry_run_from_weights_reads_them(run, finished, tmp_path, capsys):
    assert run("--dry-run", f"train.initialize_from={finished}", "backbone.acceleration_width=9") == 2
    assert "do not fit the network" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nmore"), MemoryError(), None])
@pytest.mark.parametrize("dry", [("--dry-run",), ()])
def test_out_of_memory_is_said_with_advice(error, dry, run, capsys, monkeypatch):
    def take_step(state):
        if error is None:
            torch.empty(2**60)  # more than any host has
        raise error

    monkeypatch.setattr("pathline.training.loop.take_step", take_step)
    assert run(*dry) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: out of memory; lower train.micro_batch, set train.activation_checkpointing, or ")


def test_a_host_too_small_for_the_copy_of_a_checkpoint():
    with pytest.raises(
        ConfigurationError, match=r"^checkpoint.asynchronous: got a checkpoint of 1048576.0 GiB to copy"
    ):
        train._check_host_memory(2**50)
    train._check_host_memory(2**10)


def test_durations_have_a_unit_that_suits():
    assert [train._duration(x) for x in (0, 59.4, 75, 5400, 360000)] == ["0 s", "59 s", "1.2 min", "1.5 h", "100.0 h"]


# --- ends ------------------------------------------------------------------------------------------------------------


def spoil(monkeypatch, at, act):
    """Let the data of the training step ``at``, counted from 1, be changed by a function."""
    batch, seen = Digits.batch, []

    def changed(self, indices):
        if len(indices) == 5:
            seen.append(1)
        return act(batch(self, indices)) if len(indices) == 5 and len(seen) >= at else batch(self, indices)

    monkeypatch.setattr(Digits, "batch", changed)


def send(*numbers):
    """What sends this process signals, once."""
    left = list(numbers)

    def act(data):
        while left:
            os.kill(os.getpid(), left.pop(0))
        return data

    return act


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_with_75_and_the_run_goes_on(number, run, finished, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        spoil(patched, 5, send(number))
        assert run() == 75
    printed = capsys.readouterr()
    wanted = f"\n{number.name} after step 5 of 6; saved in {tmp_path / 'run'}\ngo on with --resume auto\n"
    assert printed.err.endswith(wanted) and "trained 25 images" in printed.out
    assert run("--resume", "auto") == 0
    assert same(weights(tmp_path / "run", 6), weights(finished, 6))


def test_a_second_signal_leaves_at_once(tmp_path, processes, monkeypatch):
    """In a process of its own, which it ends."""
    run = command(tmp_path)

    def child():
        spoil(monkeypatch, 5, send(signal.SIGINT, signal.SIGTERM))
        return run("checkpoint.asynchronous=false")

    ended = processes(1, child, timeout=60)
    assert ended.codes == [128 + signal.SIGTERM] and "a second signal: leaving at once" in ended.outputs[0]
    assert "Traceback" not in ended.outputs[0]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000003"]
    assert run("--resume", "auto") == 0


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_last_checkpoint_that_cannot_be_written_is_74(interrupted, run, tmp_path, capsys, monkeypatch):
    write = checkpoints.write

    def full(folder, step, *others):
        if step > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, step, *others)

    monkeypatch.setattr(checkpoints, "write", full)
    if interrupted:
        spoil(monkeypatch, 5, send(signal.SIGTERM))
    assert run() == 74
    said = capsys.readouterr().err
    assert "warning: " in said and "No space left on device" in said
    assert ("SIGTERM after step 5 of 6; NOT saved" if interrupted else "step-000000006 could not be written") in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000003"]
    monkeypatch.undo()
    monkeypatch.setattr(train, "save_curves", lambda folder: None)
    assert run("--resume", "auto") == 0


def test_numbers_that_stay_wrong_end_with_65(run, tmp_path, capsys, monkeypatch):
    spoil(monkeypatch, 2, lambda data: {**data, "data": data["data"] * float("nan")})
    assert run("log.every=1", "checkpoint.every=1", "guard.rollback_after=2", "guard.max_rollbacks=1") == 65
    said = capsys.readouterr().err
    last = said.splitlines()[-1]
    assert last.startswith("error: 2 steps in a row up to step 3 were skipped, and going back 1 times did not help")
    assert Path(last.split()[-1]).exists() and "Traceback" not in said
    assert "going on from step-000000001 with the samples after them" in said


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ProcessError("lost contact"), 70, "error: lost contact\n"),
        (DivergedError("no use"), 65, "error: no use\n"),
        (OSError(errno.EIO, "Input/output error", "rows"), 2, "error: [Errno 5] Input/output error: 'rows'\n"),
        (KeyboardInterrupt(), 130, "interrupted outside training: there was nothing to save\n"),
    ],
)
def test_errors_are_one_line_and_have_their_code(error, code, said, run, tmp_path, capsys, monkeypatch):
    def fail(trainer):
        raise error

    monkeypatch.setattr(train.Trainer, "run", fail)
    assert run() == code
    assert capsys.readouterr().err == said
    monkeypatch.undo()
    lock = RunFolder(tmp_path / "run")
    lock.lock()  # it was let go
    lock.unlock()


def test_an_error_of_one_process_of_several_is_said_by_it(tmp_path, processes, monkeypatch):
    """The other one only knows that it is alone."""
    run = command(tmp_path)

    def unreadable(data):
        if os.environ["RANK"] == "1":
            raise OSError(errno.EIO, "Input/output error", "images")
        return data

    def child():
        spoil(monkeypatch, 3, unreadable)
        raise SystemExit(run("train.devices=2", "train.global_batch=10", "train.timeout=20"))

    ended = processes(2, child, timeout=60)
    assert ended.codes == [70, 2], ended.outputs
    assert "error: [Errno 5] Input/output error: 'images' (in process 1 of 2)\n" in ended.outputs[1]
    assert "error: lost contact with another process" in ended.outputs[0]
    assert not any("Traceback" in said for said in ended.outputs)


def test_nobody_has_to_read_what_is_printed(tmp_path, processes):
    """The output is a pipe whose reader is gone, as that of ``head``."""
    run = command(tmp_path)

    def child():
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        raise SystemExit(run())

    ended = processes(1, child, timeout=60)
    assert ended.codes == [0] and "error" not in ended.outputs[0], ended.outputs
    assert weights(tmp_path / "run", 6)


def test_an_error_that_nobody_thought_of_keeps_its_trace(run, monkeypatch):
    monkeypatch.setattr(train.Trainer, "run", lambda trainer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()


def test_ctrl_c_on_the_script(tmp_path):
    """The script itself, in a process: SIGINT saves, says how to go on, and exits with 75; resuming works."""
    (tmp_path / "c.yaml").write_text(CONFIGURATION)
    command = [sys.executable, str(ROOT / "train.py"), str(tmp_path / "c.yaml"), f"train.folder={tmp_path / 'run'}"]
    command += ["train.steps=100000", "log.every=1"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 90
        while not read_rows(tmp_path / "run") and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
    assert process.returncode == 75 and "--resume auto" in said and "Traceback" not in said, said
    last = max(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert main([*command[2:4], f"train.steps={last + 2}", "log.every=1", "--resume", "auto"]) == 0
    assert read_rows(tmp_path / "run")[-1]["step"] == last + 2
