"""Names of drawings: readable where options are the defaults, and never the same for two that differ."""

from __future__ import annotations

import pytest

from pathline.core.config import resolve
from pathline.training.names import default_name

BACKBONE = dict(
    name="sit", input_size=8, patch_size=4, in_channels=1, hidden_size=8, depth=1, num_heads=2, num_classes=10
)
RUN = {"data": "digits", "backbone": BACKBONE, "objective": "velocity"}
RUN |= {"train": {"steps": 1, "global_batch": 2, "folder": "run"}}
PLAIN = {"name": "classifier-free", "scale": 1.5}


def name(solver, *guidance):
    return default_name(resolve({**RUN, "solver": solver, "guidance": list(guidance)}))


def test_defaults_are_told_in_words():
    assert name({"name": "heun", "steps": 25}, PLAIN) == "samples-heun-25-classifier-free-1.5-seed-0.npz"
    off = {"name": "classifier-free", "scale": 1}
    assert name({"name": "heun", "steps": 25}, off) == "samples-heun-25-seed-0.npz"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (({"name": "heun", "steps": 25}, {**PLAIN, "interval": [0, 0.3]}), ({"name": "heun", "steps": 25}, PLAIN)),
        (
            ({"name": "heun", "steps": 25}, {**PLAIN, "interval": [0, 0.3]}),
            ({"name": "heun", "steps": 25}, {**PLAIN, "interval": [0, 0.9]}),
        ),
        (
            ({"name": "heun", "steps": 25}, {"name": "cfg-zero", "scale": 1, "zero_above": 0.9}),
            ({"name": "heun", "steps": 25},),
        ),
        (({"name": "heun", "steps": 4, "grid": "shifted"},), ({"name": "heun", "steps": 4},)),
        (({"name": "taylor", "steps": 4, "branch": 1},), ({"name": "taylor", "steps": 4},)),
        (
            ({"name": "euler", "steps": 3}, {"name": "branch", "branch": 1}),
            ({"name": "euler", "steps": 3}, {"name": "branch", "branch": 2}),
        ),
    ],
)
def test_what_differs_has_another_name(first, second):
    assert name(*first) != name(*second)
