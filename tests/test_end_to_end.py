"""The recipe of ``make train``, shortened: train, sample, measure, as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathline.evaluate import main as evaluate
from pathline.sample import main as sample
from pathline.train import main as train

ROOT = Path(__file__).parent.parent
RECIPE = str(ROOT / "configs" / "deepflow-digits.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """300 steps of the recipe, about ten seconds on one core."""
    folder = tmp_path_factory.mktemp("end_to_end") / "run"
    assert train([RECIPE, f"train.folder={folder}", "train.stop_at=300"]) == 0
    return folder


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_learns(run):
    """The final head's loss, mean over steps 201 to 300; a velocity of zero scores 1.7."""
    last = rows(run)[-1]
    assert last["step"] == 300
    assert last["velocity"] <= 0.80
    assert rows(run)[0]["velocity"] > last["velocity"] and last["skipped"] == 0


def test_a_runs_folder_holds_what_it_should(run):
    assert {"config.yaml", "metrics.jsonl", "samples.png", "checkpoints"} <= {path.name for path in run.iterdir()}
    checkpoint = run / "checkpoints" / "step-000000300"
    assert {path.name for path in checkpoint.iterdir()} == {
        "model.safetensors",
        "ema.safetensors",
        "optim.safetensors",
        "state.json",
        "manifest.json",
    }


def test_samples_are_drawn_and_measured(run, capsys):
    out = run / "heun.npz"
    assert sample([str(run), "solver.name=heun", "solver.steps=10", "sample.count=200", f"sample.output={out}"]) == 0
    with np.load(out, allow_pickle=False) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.shape == (200, 8, 8, 1) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [20] * 10
    assert Image.open(out.with_suffix(".png")).size[0] > 300
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["solver"]["name"] == "heun" and record["nfe"] == 20 and record["data"]["name"] == "digits"
    capsys.readouterr()
    assert evaluate([str(out)]) == 0
    printed = capsys.readouterr().out
    for word in ("frechet", "precision", "recall", "classifier", "memorisation"):
        assert word in printed
    assert out.with_suffix(".metrics.json").exists()


def spent(script, *words):
    """Run a script on its own; return its CPU seconds and its peak memory in MiB."""
    command = [sys.executable, str(ROOT / script), *words]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


PLAIN = ("solver.name=heun", "solver.steps=25", "guidance.0.scale=1", "sample.count=1000")
GUIDED = ("solver.name=euler", "solver.steps=20", "guidance.0.scale=1.5", "sample.count=1000")


def figures(path):
    records = json.loads(path.with_suffix(".metrics.json").read_text())["metrics"]
    return {f"{r['metric']}, {key}": value for r in records for key, value in r["values"].items()}


def shares(found):
    return found["label agreement, classifier"], found["label agreement, neighbour"]


@pytest.mark.slow
def test_the_bars_of_the_recipe(tmp_path):
    """3,000 steps: quality, CPU seconds and memory (about two and a half CPU minutes)."""
    folder, plain, guided = tmp_path / "run", tmp_path / "plain.npz", tmp_path / "guided.npz"
    training, peak = spent("train.py", RECIPE, f"train.folder={folder}")
    assert rows(folder)[-1]["velocity"] <= 0.43
    costs = [
        spent("sample.py", str(folder), *PLAIN, f"sample.output={plain}"),
        spent("sample.py", str(folder), *GUIDED, f"sample.output={guided}"),
        spent("evaluate.py", str(plain), str(guided)),
    ]
    assert training <= 160
    assert sum(cpu for cpu, _ in costs) <= 75
    assert max(peak, *(memory for _, memory in costs)) < 1000
    assert figures(plain)["frechet, pixels, distance"] <= 0.90
    assert min(shares(figures(plain))) >= 0.90
    assert min(shares(figures(guided))) >= 0.97
    for path in (plain, guided):
        assert figures(path)["memorisation, pixels, smallest distance"] >= 0.5


@pytest.mark.slow
def test_twice_the_steps_are_better(tmp_path):
    """6,000 steps (about four CPU minutes)."""
    folder, plain = tmp_path / "run", tmp_path / "plain.npz"
    spent("train.py", RECIPE, f"train.folder={folder}", "train.steps=6000")
    spent("sample.py", str(folder), *PLAIN, f"sample.output={plain}")
    spent("evaluate.py", str(plain))
    assert figures(plain)["frechet, pixels, distance"] <= 0.75
    assert min(shares(figures(plain))) >= 0.93
    assert figures(plain)["memorisation, pixels, smallest distance"] >= 0.5
