"""The examples at a reduced size, as functions of their own command lines."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


def main_of(name):
    return runpy.run_path(str(EXAMPLES / name), run_name=name)["main"]


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"moons_and_gaussians.py", "digits_bridge.py"}


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
