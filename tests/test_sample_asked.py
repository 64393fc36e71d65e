"""``sample.py``: what is asked for is drawn, or refused: labels, averages, scales a sample, devices, names."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pathline import backbones
from pathline.core.errors import ConfigurationError
from pathline.core.sections import Sample
from pathline.sample import main
from pathline.train import main as train
from pathline.training import drawing, sampling, trained
from pathline.training.export import export
from pathline.training.parts import build
from pathline.training.record import Order

ROOT = Path(__file__).parent.parent
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


def trained_in(folder, text, *words):
    (folder / "c.yaml").write_text(text)
    assert train([str(folder / "c.yaml"), f"train.folder={folder / 'run'}", *words]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_in(tmp_path_factory.mktemp("asked"), CONFIGURATION)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    text = CONFIGURATION.replace("num_classes: 10", "num_classes: 0").replace("steps: 6", "steps: 1")
    return trained_in(tmp_path_factory.mktemp("unconditional"), text)


def images(path):
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["arr_0"].astype(int)


# --- one guidance scale a sample -------------------------------------------------------------------------------------

SCALES = (1.5, 4, 1, 6, 1, 3, 1)


@pytest.mark.parametrize("words", [("sample.batch=3",), ("sample.batch=1",), ("sample.shard=3", "sample.batch=2")])
def test_a_scale_is_that_of_the_samples_number(words, run, tmp_path):
    """Whatever batch it falls into, each sample is the one that is drawn with its scale for all."""
    asked = [str(run), "sample.count=7", "sample.seed=3", f"sample.output={tmp_path / 'a.npz'}"]
    assert main([*asked, *words, f"guidance.0.scale={list(SCALES)}"]) == 0
    found = images(tmp_path / "a.npz")
    for scale in sorted(set(SCALES)):
        assert main([*asked, "sample.batch=7", f"guidance.0.scale={scale}"]) == 0
        rows = [i for i, other in enumerate(SCALES) if other == scale]
        assert np.abs(images(tmp_path / "a.npz")[rows] - found[rows]).max() <= 1


def test_another_number_of_scales_is_refused_before_anything_is_drawn(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drawing, "finished", lambda *_: pytest.fail("drew samples"))
    asked = [str(run), f"sample.output={tmp_path / 'a.npz'}", "guidance.0.scale=[1.5, 4, 2]", "sample.batch=3"]
    assert main([*asked, "sample.count=6"]) == 2
    assert "guidance.0.scale: got 3 scales, expected one for sample.count 6, or one for each" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text(CONFIGURATION + "guidance: [{name: classifier-free, scale: [1.5, 4, 2]}]\n")
    assert train([str(tmp_path / "c.yaml"), f"train.folder={tmp_path / 'run'}", "sample.count=3"]) == 2
    assert "guidance.0.scale: got 3 scales, expected one for a run" in capsys.readouterr().err


# --- labels ----------------------------------------------------------------------------------------------------------


def test_the_null_label_is_the_networks_own():
    """Of a backbone of ours it is the number of classes; of another it may be any."""
    wanted = Sample(labels="none")
    assert sampling.labels_of(wanted, range(2, 5), 10, 3).tolist() == [3, 3, 3]
    assert sampling.labels_of(wanted, range(2, 5), 0, None) is None
    with pytest.raises(ConfigurationError, match="a network without a null label"):
        sampling.labels_of(wanted, range(2, 5), 10, None)


def test_an_order_takes_the_null_label_of_its_network(run):
    weights = trained.find(run, pytest.fail)
    configuration, parts = trained.load(weights, ["sample.labels=none"])
    network = backbones.wrap(lambda x, t, label: x, num_classes=10, null_label=4)
    order = Order(configuration, replace(parts, backbone=network), weights, run / "a.npz", "0")
    assert order.labels(range(3)).tolist() == [4, 4, 4] and not order.labelled


def test_no_null_label_is_told_of_at_build(run, monkeypatch):
    """As every other misfit: before anything starts."""
    configuration, _ = trained.load(trained.find(run, pytest.fail), ["sample.labels=none"])
    inner = backbones.build

    def without(*given, **options):
        backbone = inner(*given, **options)
        backbone.null_label = None
        return backbone

    monkeypatch.setattr(backbones, "build", without)
    with pytest.raises(ConfigurationError, match="sample.labels: got none for a backbone without a null label"):
        build(configuration, training=False)


def test_labels_of_an_unconditional_model(unconditional, tmp_path, capsys):
    asked = [str(unconditional), "sample.count=3", f"sample.output={tmp_path / 'a.npz'}"]
    assert main(asked) == 0
    assert json.loads((tmp_path / "a.json").read_text())["label_law"] is None
    for labels in ("7", "[0, 1]"):
        assert main([*asked, f"sample.labels={labels}"]) == 2
        assert f"sample.labels: got {labels} for a backbone without classes; leave it out" in capsys.readouterr().err


# --- averages of a file ----------------------------------------------------------------------------------------------


def test_exported_weights_are_one_average(run, tmp_path, capsys):
    """Another than the file's is refused, its own and none are the same, whatever the run was to be drawn with."""
    path = export(trained.find(run, pytest.fail), "ema-0.200", tmp_path / "w.safetensors")
    words = ["sample.count=5", f"sample.output={tmp_path / 'a.npz'}"]
    assert main([str(run), *words, "sample.average=ema-0.200"]) == 0
    wanted, found = images(tmp_path / "a.npz"), []
    for more in ([], ["sample.average=ema-0.200"]):
        assert main([str(path), *words, *more]) == 0
        found.append(images(tmp_path / "a.npz"))
        assert json.loads((tmp_path / "a.json").read_text())["checkpoint"]["average"] == "ema-0.200"
    assert np.array_equal(found[0], wanted) and np.array_equal(found[1], wanted)
    assert main([str(path), *words, "sample.average=ema"]) == 2
    assert f"sample.average: got 'ema', and {path} holds 'ema-0.200' alone" in capsys.readouterr().err
    told = path.with_suffix(".json")
    record = json.loads(told.read_text())
    record["configuration"]["sample"]["average"] = "ema"  # that the run's own samples are drawn with
    told.write_text(json.dumps(record))
    assert main([str(path), *words]) == 0 and np.array_equal(images(tmp_path / "a.npz"), wanted)


# --- devices ---------------------------------------------------------------------------------------------------------


def test_the_accelerator_is_taken(run, tmp_path, monkeypatch, capsys):
    asked = [str(run), "sample.count=3", f"sample.output={tmp_path / 'a.npz'}"]
    kinds, inner = [], torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: kinds.append(str(device)) or inner(self, device))
    assert main(asked) == 0 and set(kinds) == {"cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main([*asked, "train.accelerator=cuda"]) == 2
    assert "train.accelerator cuda, of which Fabric says" in capsys.readouterr().err


def test_the_benchmark_of_batches_counts_what_differs():
    """Two of five images, three of their 60 values, by four levels at most, whichever image is the larger one."""
    spec = importlib.util.spec_from_file_location("batches", ROOT / "benchmarks" / "batches.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    one = np.full((5, 2, 3, 2), 7, np.uint8)
    other = one.copy()
    other[1, 0, 0, 0], other[4, 1, 2, 1], other[4, 0, 1, 0] = 8, 3, 6
    for a, b in ((one, other), (other, one)):
        assert module.row("7, 2", a, b) == "| 7, 2 | 2 (40.000%) | 3 (5.000%) | 4 |"
    assert module.row("7, 2", one, one) == "| 7, 2 | 0 (0.000%) | 0 (0.000%) | 0 |"
