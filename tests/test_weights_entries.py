"""Files of weights from elsewhere: which of several entries are meant, and what a file may do to the process."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from pathline import WeightsError, weights

STATE = {"head.weight": torch.tensor([[1.0, 2.0, 3.0]]), "head.bias": torch.tensor([4.0])}
OTHER = {key: value + 10 for key, value in STATE.items()}


def prefixed(state, prefix):
    return {f"{prefix}{key}": value for key, value in state.items()}


def read(tmp_path, content, *, key=None, name="a.pt"):
    torch.save(content, tmp_path / name)
    return weights.read(tmp_path / name, key=key)


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())


BOTH = {**prefixed(OTHER, "model."), **prefixed(STATE, "ema.")}


@pytest.mark.parametrize(
    ("content", "key", "wanted"),
    [
        ({"state_dict": BOTH, "epoch": 3}, None, STATE),
        ({"state_dict": BOTH, "epoch": 3}, "state_dict", STATE),
        ({"state_dict": BOTH, "epoch": 3}, "ema", STATE),
        ({"state_dict": BOTH, "epoch": 3}, "model", OTHER),
        ({"state_dict": {**BOTH, "loss.scale": torch.ones(2)}}, "model", OTHER),  # beside what is no wrapper
        (BOTH, "model", OTHER),
        ({"ema": 0.999, "state_dict": STATE}, None, STATE),
        ({"ema": None, "model": OTHER}, "model", OTHER),
        ({"step": torch.tensor(5), "model": OTHER, "ema": STATE}, None, STATE),
        ({"step": torch.tensor(5), "model": OTHER, "ema": STATE}, "model", OTHER),
        ({"rng_state": torch.zeros(7, dtype=torch.uint8), "model": OTHER}, None, OTHER),
    ],
)
def test_entries_and_wrappers_are_named_alike(content, key, wanted, tmp_path):
    """Lightning's one dictionary of all networks, and what stands beside weights without being any."""
    assert same(read(tmp_path, content, key=key), wanted)


@pytest.mark.parametrize(
    ("content", "key", "said"),
    [
        (STATE, "model", r"without weights 'model', as an entry or a wrapper of names; Known: none; leave weights.key"),
        (STATE, "head", "without weights 'head'"),
        (prefixed(STATE, "model."), "ema", "without weights 'ema', as an .*; Known: model; leave weights.key out"),
        (BOTH, "modle", r"without weights 'modle', as an entry or a wrapper of names; Known: ema"),
        ({"state_dict": BOTH}, "net", "without weights 'net', .* Known: ema, state_dict"),
        ({"state_dict": STATE, "epoch": 3}, "epoch", "without weights 'epoch'"),
        ({"model": STATE, "ema": OTHER}, "state_dict", "without weights 'state_dict': .*Known: ema, model; name one"),
        ({**STATE, "extra": {"w": torch.zeros(2)}}, None, "with a dict for extra, expected a tensor"),
    ],
)
def test_a_key_that_names_nothing(content, key, said, tmp_path):
    with pytest.raises(WeightsError, match=said):
        read(tmp_path, content, key=key)


REWRITE = """
import sys, torch
from safetensors.torch import save_file
from pathline import weights
path = sys.argv[1]
state = weights.read(path)
(save_file if path.endswith("s") else torch.save)({name: value + 1 for name, value in state.items()}, path)
(save_file if path.endswith("s") else torch.save)({"w": torch.zeros(2)}, path)  # a shorter file
assert float(state["a"][2, 7]) == 5
"""


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_file_may_be_rewritten_with_what_was_read_of_it(name, tmp_path):
    """In a process of its own, which the system would end with SIGBUS were its tensors pages of the file."""
    state = {"a": torch.full((1100, 1200), 5.0), "b": torch.full((1300, 1100), 3.0)}
    (save_file if name.endswith("s") else torch.save)(state, tmp_path / name)
    assert (tmp_path / name).stat().st_size > 10 * 2**20
    words = [sys.executable, "-c", REWRITE, str(tmp_path / name)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert same(weights.read(tmp_path / name), {"w": torch.zeros(2)})


def test_entries_that_share_what_a_file_holds(tmp_path):
    """A weight under two names is copied once; a thousand names of one are no weights."""
    table = torch.randn(50, 70)
    found = read(tmp_path, {"a": table, "b": table, "c": torch.zeros(3)})
    assert same(found, {"a": table, "b": table, "c": torch.zeros(3)})
    assert found["a"].data_ptr() == found["b"].data_ptr() != found["c"].data_ptr()
    with pytest.raises(WeightsError, match=r"a\.pt with 14,000,000 bytes in its entries, which share 14,000"):
        read(tmp_path, {f"blocks.{i}": table for i in range(1000)})


class Trap:
    def __reduce__(self):
        return os.system, ("false",)


def test_the_reason_is_named_and_no_advice_to_run_it(tmp_path):
    for content, reason in (
        ({"ema": STATE, "args": Trap()}, "it holds posix.system, which is not read"),
        ({"ema": STATE, "args": tmp_path}, r"it holds pathlib.PosixPath, which is not read"),
    ):
        with pytest.raises(WeightsError, match=rf"a\.pt, which cannot be read as weights alone: {reason}$"):
            read(tmp_path, content)
    (tmp_path / "a.pt").write_bytes(b"<html>404</html>")
    with pytest.raises(WeightsError, match="alone: Unsupported operand 60$") as caught:
        weights.read(tmp_path / "a.pt")
    assert "weights_only" not in str(caught.value)
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(WeightsError, match="alone: it is empty$"):
            weights.read(tmp_path / name)


def test_endings_in_capitals(tmp_path):
    assert same(read(tmp_path, STATE, name="A.PT"), STATE)
    assert same(read(tmp_path, {"ema": STATE, "args": argparse.Namespace(lr=1)}, name="a.Ckpt"), STATE)
    save_file(STATE, tmp_path / "a.SafeTensors")
    assert same(weights.read(tmp_path / "a.SafeTensors"), STATE)
