"""The examples at a reduced size, as functions of their own command lines."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

from pathline import Flow
from pathline.train import main as train_main

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    """A script finds its neighbours; so do the examples here."""
    monkeypatch.syspath_prepend(EXAMPLES)


def main_of(name):
    return runpy.run_path(str(EXAMPLES / name), run_name=name)["main"]


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "moons_and_gaussians.py",
        "digits_bridge.py",
        "digits_model.py",
        "digits_likelihood.py",
        "digits_inversion.py",
        "digits_image_to_image.py",
    }


def test_moons_and_gaussians(tmp_path):
    ratios = main_of("moons_and_gaussians.py")(["--steps", "60", "--batch", "64", "--output", str(tmp_path / "m.png")])
    assert set(ratios) == {"independent", "exact", "sinkhorn", "class-conditional", "conditional", "partial"}
    assert Image.open(tmp_path / "m.png").size == (1200, 800)


@pytest.mark.slow
def test_pairs_by_transport_travel_less(tmp_path):
    """At full size: independent pairs make samples travel further than any transport, and partial lies between."""
    ratios = main_of("moons_and_gaussians.py")(["--output", str(tmp_path / "m.png")])
    assert ratios["exact"] < 1.2 and ratios["sinkhorn"] < 1.2
    assert ratios["exact"] < ratios["partial"] < ratios["independent"]
    assert ratios["class-conditional"] > ratios["exact"]


def test_digits_bridge(tmp_path):
    """A third of the steps already carry most digits over."""
    share = main_of("digits_bridge.py")(["--steps", "200", "--output", str(tmp_path / "b.png")])
    assert share > 0.6
    assert Image.open(tmp_path / "b.png").size[0] > 300


def test_digits_likelihood(tmp_path):
    """A little training already tells digits from what is none, and their labels."""
    arguments = ["--steps", "300", "--count", "60", "--output", str(tmp_path / "l.png")]
    bits = main_of("digits_likelihood.py")(arguments)
    held_out = bits["held-out images"]
    assert held_out < 3.3 and abs(held_out - bits["training images"]) < 0.2
    assert held_out < bits["held-out images, called by the next digit"]
    assert held_out < bits["held-out images, upside down"] < bits["held-out images, black for white"]
    assert Image.open(tmp_path / "l.png").size == (364, 364)


def test_digits_inversion(tmp_path):
    errors = main_of("digits_inversion.py")(["--steps", "100", "--output", str(tmp_path / "i.png")])
    heun = [errors[f"heun {steps} steps"] for steps in (10, 20, 40)]
    assert heun[0] > heun[1] > heun[2] > errors["rk4 20 steps"] and errors["dopri5"] < 1e-3
    assert Image.open(tmp_path / "i.png").size == (364, 148)


def test_digits_image_to_image(tmp_path):
    """The nearer to noise the start, the further from the image."""
    found = main_of("digits_image_to_image.py")(["--steps", "60", "--output", str(tmp_path / "i.png")])
    turned, moved = zip(*(found[start] for start in sorted(found)), strict=True)
    assert list(moved) == sorted(moved) and turned[0] < 0.05
    assert Image.open(tmp_path / "i.png").size == (364, 256)


@pytest.mark.slow
def test_digits_become_others(tmp_path):
    """At full size: from pure noise all images follow the label, from a little noise none."""
    found = main_of("digits_image_to_image.py")(["--output", str(tmp_path / "i.png")])
    turned = [found[start][0] for start in sorted(found)]
    assert turned[0] < 0.05 and 0.3 < turned[2] < 0.9 and turned[-1] > 0.9


def test_a_run_instead_of_training(tmp_path):
    """The folder of a run on digits: its averaged weights, and, from image to image alone, its guidance."""
    words = ["train.steps=1", "optim.warmup_steps=0", f"train.folder={tmp_path}", "log.pictures_every=null"]
    assert train_main([str(EXAMPLES.parent / "configs" / "deepflow-digits.yaml"), *words]) == 0
    for name, guided in (("digits_inversion.py", False), ("digits_image_to_image.py", True)):
        flow = runpy.run_path(str(EXAMPLES / name))["load"](tmp_path)
        assert isinstance(flow, Flow) != guided
        images, label = torch.randn(3, 1, 8, 8), torch.tensor([0, 9, 5])
        assert flow(images, 0.4, label=label).velocity.shape == images.shape
