"""``train.py`` as a user calls it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import pathline
from pathline.core.config import load
from pathline.train import main
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
log: {every: 2}
checkpoint: {every: 3}
"""


@pytest.fixture
def run(tmp_path):
    """Call the command with the tiny configuration; returns the exit code."""
    file = tmp_path / "c.yaml"
    file.write_text(CONFIGURATION)
    return lambda *words: main([str(file), f"train.folder={tmp_path / 'run'}", *words])


def weights(folder, step):
    return load_file(folder / "checkpoints" / f"step-{step:09d}" / "model.safetensors")


def test_a_run_prints_and_leaves_what_it_should(run, tmp_path, capsys):
    assert run("optim.lr=2e-3") == 0
    printed, folder = capsys.readouterr().out, tmp_path / "run"
    for words in (pathline.__version__, str(ROOT), "lr: 0.002", "parameters; 6 steps of 5 images = 30 images"):
        assert words in printed
    for words in ("CPU s", "images/s", "peak memory", "mean over the last 6 steps"):
        assert words in printed
    saved = load(folder / "config.yaml")
    assert saved.optim.lr == 2e-3 and saved.train.folder == str(folder)
    assert [row["step"] for row in read_rows(folder)] == [2, 4, 6]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000000003", "step-000000006"]
    assert (folder / "samples.png").exists()


def test_a_dry_run_starts_nothing(run, tmp_path, capsys):
    assert run("--dry-run") == 0
    printed = capsys.readouterr().out
    assert "parameters; 6 steps of 5 images = 30 images" in printed and "patch_size: 4" in printed
    assert not (tmp_path / "run").exists()
    assert run("--dry-run", "backbone.cuts=[2]") == 2
    assert "backbone: got cuts (2,)" in capsys.readouterr().err


def test_stopped_and_resumed_equals_unbroken(run, tmp_path):
    assert run("train.stop_at=4") == 0
    assert run("--resume", "auto") == 0
    resumed = weights(tmp_path / "run", 6)
    assert run(f"train.folder={tmp_path / 'other'}") == 0
    unbroken = weights(tmp_path / "other", 6)
    assert all((resumed[key] == unbroken[key]).all() for key in unbroken)
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [2, 4, 6]


def test_resuming_from_a_named_checkpoint_in_another_folder(run, tmp_path):
    assert run() == 0
    path = tmp_path / "run" / "checkpoints" / "step-000000003"
    assert run("--resume", str(path), f"train.folder={tmp_path / 'other'}") == 0
    first, second = (weights(tmp_path / name, 6) for name in ("run", "other"))
    assert all((first[key] == second[key]).all() for key in first)


def test_resuming_another_run_into_an_occupied_folder_is_refused(run, tmp_path, capsys):
    assert run("train.stop_at=1") == 0
    assert run(f"train.folder={tmp_path / 'other'}", "train.seed=8") == 0
    before = (tmp_path / "other" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert run("--resume", str(tmp_path / "run"), f"train.folder={tmp_path / 'other'}") == 2
    said = capsys.readouterr().err
    assert "holds another run" in said and str(tmp_path / "other") in said
    assert (tmp_path / "other" / "metrics.jsonl").read_bytes() == before


def test_a_folder_with_a_run_is_refused(run, capsys):
    assert run("train.stop_at=1") == 0
    capsys.readouterr()
    assert run() == 2
    said = capsys.readouterr().err
    assert "holds a run" in said and "--resume auto" in said and "Traceback" not in said


def test_another_configuration_is_refused(run, capsys):
    assert run("train.stop_at=3") == 0
    capsys.readouterr()
    assert run("--resume", "auto", "optim.lr=5e-3", "backbone.acceleration_width=9") == 2
    said = capsys.readouterr().err
    assert "optim.lr: 0.001 -> 0.005" in said and "backbone.acceleration_width: 7 -> 9" in said


def test_auto_falls_back_loudly_and_never_starts_over(run, tmp_path, capsys):
    assert run() == 0
    for step, file in ((6, "model.safetensors"), (3, "ema.safetensors")):
        path = tmp_path / "run" / "checkpoints" / f"step-{step:09d}" / file
        path.write_bytes(path.read_bytes()[:-5])
        capsys.readouterr()
        code = run("--resume", "auto")
        said = capsys.readouterr().err
        if step == 6:
            assert code == 0 and "step-000000006" in said and "model.safetensors of" in said
            good = weights(tmp_path / "run", 6)  # trained again from step 3, and whole
            assert good
            path.write_bytes(path.read_bytes()[:-5])
        else:
            assert code == 2 and "damaged" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lrr=1"], "optim.lrr: unknown entry; did you mean 'lr'?"),
        (["optim.lr"], "expected entry=value"),
        (["train.precision=fp16"], "fp16 without a CUDA device"),
        (["--resume", "nowhere"], "nowhere"),
        (["train.initialize_from=nowhere"], "no valid checkpoint"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(words, said, run, tmp_path, capsys):
    assert run(*words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and said in printed.err and "Traceback" not in printed.err
    assert not (tmp_path / "run").exists()


def test_no_configuration_file(capsys):
    assert main(["nowhere.yaml"]) == 2
    assert "got no file at nowhere.yaml" in capsys.readouterr().err


def test_starting_from_the_weights_of_a_run(run, tmp_path):
    assert run() == 0
    words = [f"train.initialize_from={tmp_path / 'run'}", f"train.folder={tmp_path / 'second'}", "train.seed=3"]
    assert run(*words, "optim.lr=1e-12", "train.steps=3") == 0
    first = load_file(tmp_path / "run" / "checkpoints" / "step-000000006" / "ema.safetensors")
    second = weights(tmp_path / "second", 3)
    assert all((first[key] - second[key]).abs().max() < 1e-9 for key in first)


def test_ctrl_c_on_the_script(tmp_path):
    """The script itself, in a process: SIGINT saves, says how to go on, and exits with 130; resuming works."""
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
    deadline = time.monotonic() + 60
    while not read_rows(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and b"--resume auto" in said and b"Traceback" not in said
    last = max(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert main([*command[2:4], f"train.steps={last + 2}", "log.every=1", "--resume", "auto"]) == 0
    assert read_rows(tmp_path / "run")[-1]["step"] == last + 2
