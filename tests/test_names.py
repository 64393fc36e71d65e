"""Names of drawings: readable, and never the same for two that differ."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from pathline.core.config import resolve
from pathline.training.names import default_name
from pathline.training.record import Order

BACKBONE = dict(
    name="sit", input_size=8, patch_size=4, in_channels=1, hidden_size=8, depth=1, num_heads=2, num_classes=10
)
RUN = {"data": "digits", "backbone": BACKBONE, "objective": "velocity"}
TRAIN = {"steps": 1, "global_batch": 2, "folder": "run"}
PLAIN = {"name": "classifier-free", "scale": 1.5}
HEUN = {"name": "heun", "steps": 25}


@pytest.fixture
def name(tmp_path):
    """Return the name of a drawing by exported weights of a hash."""

    def name(solver=HEUN, guidance=(), *, weights="a" * 64, autoencoder=None, train=None, **sample):
        sections = {"solver": solver, "guidance": list(guidance), "sample": sample, "train": {**TRAIN, **(train or {})}}
        path = tmp_path / "w.safetensors"
        path.write_bytes(b"")
        path.with_suffix(".json").write_text(json.dumps({"average": "ema", "sha256": weights}))
        decoder = None if autoencoder is None else SimpleNamespace(manifest=autoencoder)
        parts = SimpleNamespace(autoencoder=decoder)
        return default_name(Order(resolve({**RUN, **sections}), parts, path, Path("."), "1.0"))

    return name


def test_words_tell_what_is_looked_for(name):
    off = {"name": "classifier-free", "scale": 1}
    several = {"name": "classifier-free", "scale": [1.5, 4, 2]}
    for words, given in (
        ("heun-25-classifier-free-1.5-seed-0", dict(guidance=[PLAIN])),
        ("heun-25-seed-3", dict(guidance=[off], seed=3)),
        ("heun-25-classifier-free-1.5-to-4-ema-seed-0", dict(guidance=[several], average="ema")),
        ("euler-3-branch-seed-0", dict(solver={"name": "euler", "steps": 3}, guidance=[{"name": "branch"}])),
    ):
        assert re.fullmatch(rf"samples-{re.escape(words)}-[0-9a-f]{{8}}\.npz", name(**given))
    assert name() == name()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (dict(guidance=[{**PLAIN, "interval": [0, 0.3]}]), dict(guidance=[PLAIN])),
        (dict(guidance=[{**PLAIN, "interval": [0, 0.3]}]), dict(guidance=[{**PLAIN, "interval": [0, 0.9]}])),
        (dict(guidance=[{"name": "cfg-zero", "scale": 1, "zero_above": 0.9}]), dict()),
        (dict(solver={**HEUN, "grid": "shifted"}), dict()),
        (dict(solver={"name": "taylor", "steps": 4, "branch": 1}), dict(solver={"name": "taylor", "steps": 4})),
        (dict(guidance=[{"name": "branch", "branch": 1}]), dict(guidance=[{"name": "branch", "branch": 2}])),
        (dict(labels=3), dict()),
        (dict(labels=3), dict(labels="random")),
        (dict(weights="b" * 64), dict()),
        (dict(train={"tf32": True}), dict()),
        (dict(autoencoder={"sha256": "1"}), dict(autoencoder={"sha256": "2"})),
        (dict(count=50), dict(count=51)),
        (dict(guidance=[{**PLAIN, "scale": [1.5, 4, 2]}]), dict(guidance=[{**PLAIN, "scale": [1.5, 3, 4]}])),
    ],
)
def test_what_differs_has_another_name(first, second, name):
    assert name(**first) != name(**second)


def test_what_changes_no_sample_has_the_same_name(name):
    assert name(batch=3, decode_batch=2, devices=5, shards="keep") == name()
