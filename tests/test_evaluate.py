from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from pathline import data
from pathline.evaluate import main as evaluate
from pathline.metrics import features


def write(path, **changes):
    images = ((data.build("digits").batch(range(60))["data"] + 1) * 127.5).round().to(torch.uint8)
    arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy(), "arr_1": np.arange(60) % 10, **changes}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return str(path)


def test_evaluate_prints_a_table_and_writes_a_record(tmp_path, capsys):
    path = write(tmp_path / "samples.npz")
    (tmp_path / "samples.json").write_text(json.dumps({"solver": {"name": "heun"}, "nfe": 50, "seed": 3}))
    assert evaluate([path]) == 0
    printed = capsys.readouterr().out
    assert "of the held-out images right" in printed and "the first 60 of 60 samples, heun, NFE 50" in printed
    assert "CPU s" in printed
    written = json.loads((tmp_path / "samples.metrics.json").read_text())
    assert written["samples"]["seed"] == 3 and written["classifier_accuracy"] > 0.95
    memorised = next(entry for entry in written["metrics"] if entry["metric"].startswith("memorisation"))
    assert memorised["values"]["smallest distance"] < 0.01  # these are training images


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(arr_0=None), "without an array arr_0"),
        (dict(arr_0=np.zeros((60, 8, 8, 1), np.float32)), "images float32"),
        (dict(arr_0=np.zeros((60, 8, 8), np.uint8)), "expected uint8 .N, H, W, C."),
        (dict(arr_1=np.arange(7)), "expected 60 whole numbers"),
        (dict(arr_1=np.linspace(0, 1, 60)), "expected 60 whole numbers"),
        (dict(arr_0=np.zeros((60, 9, 9, 1), np.uint8)), r"samples of shape \(60, 1, 9, 9\)"),
        (dict(arr_1=np.arange(60)), "got label 59, expected 0 to 9"),
        (dict(arr_1=np.array([None] * 60)), "no .npz of plain arrays"),
    ],
)
def test_evaluate_names_what_is_wrong_before_it_trains(changes, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(features.DigitsCNN, "_train", lambda *_: pytest.fail("trained before the samples were checked"))
    assert evaluate([write(tmp_path / "samples.npz", **changes)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: got") and re.search(message, printed) and "samples.npz" in printed


def test_samples_without_labels_are_measured_but_for_their_labels(tmp_path):
    with_them, without = write(tmp_path / "a.npz"), write(tmp_path / "b.npz", arr_1=None)
    assert evaluate([with_them, without]) == 0
    first, second = (json.loads((tmp_path / f"{name}.metrics.json").read_text())["metrics"] for name in "ab")
    assert [entry for entry in first if not entry["metric"].startswith("label agreement")] == second
    assert len(first) == len(second) + 1


def test_evaluate_of_two_files_trains_one_classifier(tmp_path, monkeypatch):
    trained, train = [], features.DigitsCNN._train
    monkeypatch.setattr(features.DigitsCNN, "_train", lambda self, *given: (trained.append(1), train(self, *given)))
    assert evaluate([write(tmp_path / "one.npz"), write(tmp_path / "two.npz")]) == 0
    one, two = (json.loads((tmp_path / f"{name}.metrics.json").read_text()) for name in ("one", "two"))
    assert len(trained) == 1 and one == two and one["samples"] == {}


def test_a_record_of_another_form_is_copied(tmp_path, capsys):
    path = write(tmp_path / "samples.npz")
    (tmp_path / "samples.json").write_text(json.dumps({"solver": "other", "nfe": 5}))
    assert evaluate([path]) == 0
    assert "samples, other, NFE 5\n" in capsys.readouterr().out


def test_evaluate_without_a_file(tmp_path, capsys):
    assert evaluate([str(tmp_path / "none.npz")]) == 2
    assert "got no file at" in capsys.readouterr().err


def test_evaluate_refuses_files_of_another_form(tmp_path, capsys):
    np.save(tmp_path / "array.npy", np.zeros(3))
    good = (tmp_path / "good.npz", write(tmp_path / "good.npz"))[0].read_bytes()
    np.savez_compressed(tmp_path / "packed.npz", arr_0=np.arange(999) % 7)
    packed = bytearray((tmp_path / "packed.npz").read_bytes())
    packed[60:90] = b"\xff" * 30
    contents = (b"", b"no archive", (tmp_path / "array.npy").read_bytes(), good[:500], bytes(packed))
    for content in contents:
        (tmp_path / "bad.npz").write_bytes(content)
        assert evaluate([str(tmp_path / "bad.npz")]) == 2
        assert re.search(r"^error: got .*bad.npz, which is no .npz of plain arrays", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "which is no JSON"), ("[1]", "with a list, expected an object")]
)
def test_evaluate_refuses_a_damaged_record(content, message, tmp_path, capsys):
    path = write(tmp_path / "samples.npz")
    (tmp_path / "samples.json").write_text(content)
    assert evaluate([path]) == 2
    assert message in capsys.readouterr().err


def test_evaluate_refuses_unknown_data(tmp_path, capsys):
    assert evaluate([write(tmp_path / "samples.npz"), "--data", "faces"]) == 2
    assert "unknown data set 'faces'" in capsys.readouterr().err
