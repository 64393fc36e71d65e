"""Files of weights from elsewhere: which weights are read, and that nothing in a file is run."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import types
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pathline import WeightsError, weights

STATE = {"head.weight": torch.tensor([[1.0, 2.0, 3.0]]), "head.bias": torch.tensor([4.0])}
OTHER = {key: value + 10 for key, value in STATE.items()}
TRAINING = dict(
    opt={"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    args=argparse.Namespace(lr=0.1, model="XL", sizes=[1, 2]),
    steps=7,
)


def prefixed(state, prefix):
    return {f"{prefix}{key}": value for key, value in state.items()}


def read(tmp_path, content, *, key=None, name="a.pt"):
    torch.save(content, tmp_path / name)
    return weights.read(tmp_path / name, key=key)


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.ckpt", "a.bin"])
def test_training_checkpoints_of_others(name, tmp_path):
    """The average unless another is named; what else stands in them, their arguments included, is left alone."""
    content = {"model": OTHER, "ema": STATE, **TRAINING}
    assert same(read(tmp_path, content, name=name), STATE)
    assert same(read(tmp_path, content, key="model", name=name), OTHER)
    with pytest.raises(WeightsError, match=r"a\.\w+ without weights 'modle': did you mean 'model'\? Known: ema, model"):
        read(tmp_path, content, key="modle", name=name)
    with pytest.raises(WeightsError, match="with a Namespace under 'args', expected weights by name"):
        read(tmp_path, content, key="args", name=name)


def test_files_with_one_set_of_weights(tmp_path):
    assert same(read(tmp_path, STATE), STATE)
    assert same(read(tmp_path, OrderedDict(STATE)), STATE)
    assert same(read(tmp_path, {"state_dict": STATE, "epoch": 3}), STATE)
    assert same(read(tmp_path, {name: nn.Parameter(value) for name, value in STATE.items()}), STATE)
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(weights.read(tmp_path / "old.pt"), STATE)
    save_file(STATE, tmp_path / "a.safetensors")
    assert same(weights.read(str(tmp_path / "a.safetensors")), STATE)
    found = read(tmp_path, {name: nn.Parameter(value) for name, value in STATE.items()})
    assert not any(value.requires_grad for value in found.values())


def test_several_sets_without_an_average_must_be_named(tmp_path):
    content = {"model": STATE, "state_dict": OTHER, "step": 3}
    with pytest.raises(
        WeightsError, match="without weights 'ema': .*Known: model, state_dict; name one by weights.key"
    ):
        read(tmp_path, content)
    assert same(read(tmp_path, content, key="state_dict"), OTHER)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "_forward_module.",
        "module._orig_mod.",
        "_orig_mod.module.module.",
        "_forward_module._orig_mod.model.",
        "ema_model.module.",
        "model.net._orig_mod.",
    ],
)
def test_names_of_wrappers_are_taken_off(prefix, tmp_path):
    assert same(read(tmp_path, {"ema": prefixed(STATE, prefix)}), STATE)


def test_wrappers_within_a_network(tmp_path):
    inside = {key.replace("head.", "head._orig_mod._checkpoint_wrapped_module."): v for key, v in STATE.items()}
    assert same(read(tmp_path, prefixed(inside, "module.")), STATE)


def test_torchs_own_wrappers(tmp_path):
    """An averaged, a compiled and a data-parallel model, as torch writes them."""
    network = nn.Sequential(OrderedDict(head=nn.Linear(3, 1)))
    network.load_state_dict(STATE)
    for wrapped in (AveragedModel(network), torch.compile(network), nn.DataParallel(torch.compile(network))):
        assert same(read(tmp_path, wrapped.state_dict()), STATE)


def test_an_average_beside_its_model(tmp_path):
    content = {**prefixed(OTHER, "online_model."), **prefixed(STATE, "ema_model.module.")}
    content |= {"initted": torch.tensor([True]), "step": torch.tensor([5])}
    assert same(read(tmp_path, content), STATE)
    assert same(read(tmp_path, {"state_dict": content}, key="state_dict"), STATE)
    assert same(read(tmp_path, content, key="online_model"), OTHER)


def test_names_that_become_one(tmp_path):
    content = {**STATE, **prefixed(OTHER, "_orig_mod.")}
    with pytest.raises(WeightsError, match=r"a\.pt in which two entries have one name"):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([STATE], "with a list in it, expected weights by name"),
        ({}, "with a dict in it, expected weights by name"),
        ({3: torch.zeros(2)}, "with a dict in it, expected weights by name"),
        ({"epoch": 3, "args": argparse.Namespace()}, "without weights 'ema': only epoch, args"),
        ({"ema": {}, "model": STATE}, "with a dict under 'ema', expected weights by name"),
        ({"ema": [1.0, 2.0]}, "with a list under 'ema', expected weights by name"),
        ({"ema": {1: torch.zeros(2)}}, "with names that are no text"),
        ({**STATE, "head.scale": [1.0]}, "with a list for head.scale, expected a tensor"),
        ({**STATE, "head.scale": 3}, "with a int for head.scale, expected a tensor"),
        ({**STATE, "w": torch.zeros(2, 3).to_sparse()}, "with w of type torch.float32, torch.sparse_coo"),
        ({**STATE, "w": torch.zeros(2, dtype=torch.complex64)}, "with w of type torch.complex64"),
        (
            {**STATE, "w": torch.zeros(1).expand(1000, 1000)},
            r"with w of shape \(1000, 1000\), more than the file holds",
        ),
    ],
)
def test_what_is_no_weights(content, said, tmp_path):
    with pytest.raises(WeightsError, match=said) as caught:
        read(tmp_path, content)
    assert str(tmp_path / "a.pt") in str(caught.value)


class Trap:
    """Makes a folder when it is unpickled as pickles usually are."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.ckpt", "a.bin"])
def test_nothing_in_a_file_is_run(name, old, tmp_path):
    traps = [
        Trap(os.mkdir, str(tmp_path / "sprung")),
        Trap(eval, f"__import__('os').mkdir({str(tmp_path / 'sprung')!r})"),
        Trap(os.system, f"mkdir {tmp_path / 'sprung'}"),
    ]
    for trap in traps:
        for content in (trap, {**STATE, "w": trap}, {"ema": STATE, "args": trap}, {"ema": STATE, trap: 3}):
            torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not old)
            with pytest.raises(WeightsError, match="cannot be read as weights alone") as caught:
                weights.read(tmp_path / name)
            assert str(tmp_path / name) in str(caught.value) and not (tmp_path / "sprung").exists()
    (tmp_path / name).write_bytes(pickle.dumps(traps[0]))
    with pytest.raises(WeightsError, match="cannot be read as weights alone"):
        weights.read(tmp_path / name)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(traps[0]))
    assert (tmp_path / "sprung").exists()  # it is a trap


def test_no_other_class_than_a_namespace(tmp_path):
    for item in (types.SimpleNamespace(a=1), nn.Linear(3, 1), io.StringIO("a"), tmp_path / "file"):
        with pytest.raises(WeightsError, match="cannot be read as weights alone"):
            read(tmp_path, {"ema": STATE, "args": item})
    assert same(read(tmp_path, {"ema": STATE, "args": argparse.Namespace(inner=argparse.Namespace(a=1))}), STATE)


def test_what_other_libraries_allow_is_not_allowed_here(tmp_path):
    """And stays allowed to them."""
    before = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([types.SimpleNamespace]):
        with pytest.raises(WeightsError, match="cannot be read as weights alone"):
            read(tmp_path, {"ema": STATE, "args": types.SimpleNamespace(a=1)})
        assert torch.load(tmp_path / "a.pt", weights_only=True)["args"].a == 1
    jagged = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(5, 3)], layout=torch.jagged)
    with pytest.raises(WeightsError, match="cannot be read as weights alone"):
        read(tmp_path, {**STATE, "w": jagged})
    assert {*torch.serialization.get_safe_globals()} == {*before}


@pytest.mark.parametrize("name", ["a.pt", "old.pt", "a.safetensors"])
def test_damaged_files(name, tmp_path):
    """Cut anywhere, or empty, or other bytes: an error that names the file, never another."""
    path = tmp_path / name
    content = {f"blocks.{i}.weight": torch.randn(5, 7) for i in range(3)}
    if name == "a.safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=name == "a.pt")
    whole = path.read_bytes()
    for share in (0.0, 0.01, 0.2, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(WeightsError, match="cannot be read as weights alone") as caught:
            weights.read(path)
        assert str(path) in str(caught.value)
    for junk in (b"\x00" * 500, os.urandom(500), b"<html>404</html>", b"\x80\x02}q\x00."):
        path.write_bytes(junk)
        with pytest.raises(WeightsError):
            weights.read(path)
    path.write_bytes(whole)
    assert same(weights.read(path), content)


def test_archives_that_hold_no_weights(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("notes.txt", "none")
    with pytest.raises(WeightsError, match="cannot be read as weights alone"):
        weights.read(tmp_path / "a.pt")
    torch.jit.script(nn.Linear(3, 1)).save(tmp_path / "b.pt")
    with pytest.raises(WeightsError, match="cannot be read as weights alone"):
        weights.read(tmp_path / "b.pt")


def test_no_file_or_another_kind(tmp_path):
    with pytest.raises(WeightsError, match=r"got no file at .*none\.pt"):
        weights.read(tmp_path / "none.pt")
    with pytest.raises(WeightsError, match="got no file at"):
        weights.read(tmp_path)
    (tmp_path / "a.npz").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"ends in \.pt, \.pth, \.ckpt, \.bin or \.safetensors"):
        weights.read(tmp_path / "a.npz")
