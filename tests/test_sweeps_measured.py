"""``sample.py --sweep``: what is checked before it draws, what is read once, and which figures are taken again."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch

from pathline.core.errors import ConfigurationError
from pathline.metrics import features
from pathline.sample import main
from pathline.train import main as train
from pathline.training import checkpoints, drawing, manifest, sweeps, trained
from pathline.training.sweeps import points

CONFIGURATION = """
data: digits
backbone: {name: sit, input_size: 8, patch_size: 4, in_channels: 1, hidden_size: 12, depth: 2, num_heads: 3,
           num_classes: 10}
objective: velocity
optim: {lr: 1e-2}
ema: {decay: 0.5, lengths: [0.2]}
solver: {name: heun, steps: 2}
train: {steps: 6, global_batch: 5, folder: runs/x, accelerator: cpu}
"""


def trained_in(folder, text):
    (folder / "c.yaml").write_text(text)
    assert train([str(folder / "c.yaml"), f"train.folder={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_in(tmp_path_factory.mktemp("sweeps"), CONFIGURATION)


@pytest.fixture(scope="module", autouse=True)
def raw():
    """The pixels as features beside any reference: of the core's spaces that need no weights, all are of digits."""

    class Raw(features.Features):
        name = "raw-for-sweeps"

        def __init__(self, power: float = 1.0):
            super().__init__()
            self.power, self.sizes = power, {"features": 64}
            self.manifest = {"name": self.name, "sizes": self.sizes, "power": power}

        def __call__(self, images):
            return (images.flatten(1).float() / 255) ** self.power

    features.registry.register("raw-for-sweeps")(Raw)
    yield
    features.registry._entries.pop("raw-for-sweeps")


def reference(path, side=8, channels=1, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (100, side, side, channels))
    np.savez(path, arr_0=images.astype(np.uint8))
    return path


def measured(folder):
    (drawing,) = json.loads((folder / "sweep.json").read_text())["drawings"]
    return drawing["metrics"][0]["values"]["distance"]


# --- figures that are taken again ------------------------------------------------------------------------------------


def test_another_reference_in_the_same_file_is_measured_anew(run, tmp_path, monkeypatch):
    path, into = tmp_path / "ref.npz", tmp_path / "into"
    words = [str(run), "sample.count=30", "--sweep", "solver.steps=1", "--metrics", "frechet:raw-for-sweeps"]
    words += ["--reference", str(path), "--into", str(into)]
    reference(path)
    assert main(words) == 0
    first = measured(into)
    reference(path, seed=1)
    assert main(words) == 0
    assert measured(into) != first
    assert main([*words[:-1], str(tmp_path / "fresh")]) == 0 and measured(tmp_path / "fresh") == measured(into)
    monkeypatch.setattr(sweeps, "measure_samples", lambda *_: pytest.fail("measured again"))
    assert main(words) == 0


def test_options_of_metrics_and_feature_spaces(run, tmp_path, capsys):
    """They are those of evaluate.py, and results of others are not taken."""
    path, found = reference(tmp_path / "ref.npz"), []
    words = [str(run), "sample.count=30", "--reference", str(path), "--into", str(tmp_path / "into")]
    words += ["--sweep", "solver.steps=1", "--metrics", "frechet:raw-for-sweeps"]
    for options in ((), ("--option", "raw-for-sweeps.power=2.0")):
        assert main([*words, *options]) == 0
        found.append(measured(tmp_path / "into"))
    with np.load(next((tmp_path / "into").glob("*.npz"))) as samples, np.load(path) as images:
        (mu, sigma), (mu_r, sigma_r) = (
            (values.mean(0), np.cov(values, rowvar=False))
            for values in ((a["arr_0"].reshape(len(a["arr_0"]), -1) / 255) ** 2 for a in (samples, images))
        )
    trace = np.sqrt(np.maximum(np.linalg.eigvals(sigma @ sigma_r).real, 0)).sum()
    expected = ((mu - mu_r) ** 2).sum() + np.trace(sigma) + np.trace(sigma_r) - 2 * trace
    assert found[1] == pytest.approx(expected, rel=1e-3) and abs(found[0] / found[1] - 1) > 0.01
    assert main([*words, "--option", "kid.subsets=3"]) == 2
    assert "got options of 'kid', which is not asked for" in capsys.readouterr().err


@pytest.mark.parametrize(
    "harm",
    [
        {"samples": [1]},
        {"metrics": 3},
        {"metrics": [{"metric": "x"}]},
        {"metrics": [{"metric": "x", "values": {"a": "b"}}]},
    ],
)
def test_damaged_results_are_measured_anew(harm, run, tmp_path):
    words = [str(run), "sample.count=30", "--sweep", "solver.steps=1", "--metrics", "frechet:pixels"]
    words += ["--into", str(tmp_path)]
    assert main(words) == 0
    first, (path,) = measured(tmp_path), tmp_path.glob("*.metrics.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **harm}))
    assert main(words) == 0 and measured(tmp_path) == first


def test_words_and_numbers_are_drawn_into_one_plot(run, tmp_path):
    words = [str(run), "sample.count=8", "--metrics", "frechet:pixels", "--sweep"]
    for number, sweep in enumerate(("sample.labels=3,random", "sample.labels=[3,4],random,7")):
        assert main([*words, sweep, "--into", str(tmp_path / str(number))]) == 0


# --- before anything is drawn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sample.count=30", "--reference", "large"), "at solver.steps=1: got samples of shape (1, 1, 8, 8), expected"),
        (("sample.count=1", "--reference", "small"), "at solver.steps=1: got 1 samples, expected at least"),
        (("sample.count=1",), "at solver.steps=1: got 1 samples, expected at least"),
    ],
)
def test_what_cannot_be_measured_is_not_drawn(words, said, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drawing, "draw", lambda *_: pytest.fail("drew samples"))
    paths = {"large": reference(tmp_path / "large.npz", 16), "small": reference(tmp_path / "small.npz")}
    given = [str(paths.get(word, word)) for word in words]
    metric = "frechet:raw-for-sweeps" if "--reference" in words else "frechet:pixels"
    assert (
        main([str(run), *given, "--sweep", "solver.steps=1,2", "--metrics", metric, "--into", str(tmp_path / "a")]) == 2
    )
    assert said in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_latents_that_nothing_decodes_are_not_measured(tmp_path, monkeypatch, capsys):
    text = CONFIGURATION.replace("digits", "{name: synthetic, shape: [4, 8, 8], num_classes: 10}")
    path = trained_in(tmp_path, text.replace("in_channels: 1", "in_channels: 4"))
    monkeypatch.setattr(drawing, "draw", lambda *_: pytest.fail("drew samples"))
    words = ["--sweep", "solver.steps=1,2", "--metrics", "frechet:pixels", "--reference", "digits"]
    assert main([str(path), "sample.count=5", *words]) == 2
    assert "got metrics for samples that are latents, expected images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("solver.steps=2020-01-01,3", "expected numbers or words"),
        ("solver.steps=.nan,3", "expected numbers or words"),
        ("sample.devices=1,2", "got sample.devices to sweep, which is one for all drawings"),
    ],
)
def test_values_that_are_none(words, said):
    with pytest.raises(ConfigurationError, match=said):
        points([words])


def test_an_average_by_name_and_by_default_is_one_drawing(run, tmp_path, capsys):
    assert main([str(run), "--sweep", "sample.average=null,ema", "--into", str(tmp_path)]) == 2
    assert "got the same drawing at sample.average=None and at sample.average=ema" in capsys.readouterr().err


# --- what is read once -----------------------------------------------------------------------------------------------


def test_points_share_what_their_words_leave_as_it_is(run, tmp_path, monkeypatch):
    """A checkpoint is hashed once and its network built once, whatever solvers and guidances draw with it."""
    hashed, built = [], []
    verify, backbones = checkpoints.problem, trained.build
    monkeypatch.setattr(checkpoints, "problem", lambda *a, **k: hashed.append(k) or verify(*a, **k))

    def build(*given, like=None, **options):
        built.append(like)
        return backbones(*given, like=like, **options)

    monkeypatch.setattr(trained, "build", build)
    path = trained.find(run, pytest.fail)
    hashed.clear()
    words = [str(path), "sample.count=4", "--into", str(tmp_path), "--sweep"]
    assert main([*words, "solver.steps=1,2", "guidance.0.scale=1,2"]) == 0
    assert len(hashed) == 1 and sum(like is None for like in built) == 1 and len(built) == 8
    built.clear()
    assert main([*words, "sample.average=ema,ema-0.200", "solver.steps=1,2"]) == 0
    assert len(hashed) == 2 and sum(like is None for like in built) == 4  # two averages, checked and then drawn
    images = {np.load(file)["arr_0"].tobytes() for file in tmp_path.glob("*.npz")}
    assert len(images) == 6  # scale 1 of the first average is drawn in both


def test_each_point_draws_in_its_own_arithmetic(run, tmp_path, monkeypatch):
    found, inner = [], drawing.finished
    kept = torch.get_float32_matmul_precision()
    monkeypatch.setattr(
        drawing, "finished", lambda *given: found.append(torch.get_float32_matmul_precision()) or inner(*given)
    )
    try:
        assert main([str(run), "sample.count=4", "--into", str(tmp_path), "--sweep", "train.tf32=true,false"]) == 0
    finally:
        torch.set_float32_matmul_precision(kept)
    assert found == ["high", "highest"]


# --- stopped ---------------------------------------------------------------------------------------------------------


def test_points_that_are_done_are_told_of(run, tmp_path, monkeypatch, capsys):
    inner, drawn = drawing.finished, []

    def finished(*given):
        drawn.append(1)
        if len(drawn) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(*given)

    monkeypatch.setattr(drawing, "finished", finished)
    words = [str(run), "sample.count=5", "--into", str(tmp_path), "--sweep", "solver.steps=1,2,3"]
    assert main(words) == 75
    assert "stopped: 1 of 3 points are done; the same command goes on" in capsys.readouterr().err
    assert main(words) == 0 and len(drawn) == 4
    assert manifest.parse(tmp_path / "sweep.json")["drawings"][2]["point"] == {"solver.steps": 3}
