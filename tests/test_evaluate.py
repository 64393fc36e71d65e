from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist

import pathline.evaluate
from pathline import Draws, Flow, data, metrics
from pathline.core.config import resolve
from pathline.core.errors import DataError
from pathline.evaluate import main as evaluate
from pathline.metrics import features
from pathline.metrics.samples import Samples
from pathline.training import Trainer, sampling


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


def test_a_number_of_samples_that_are_not_there_is_refused(tmp_path, capsys):
    path = write(tmp_path / "samples.npz")
    assert evaluate([path, "--count", "61"]) == 2
    assert re.search(r"got count 61, expected 1 to 60 of .*samples\.npz", capsys.readouterr().err)
    images = np.zeros((900, 8, 8, 1), np.uint8)
    assert evaluate([write(tmp_path / "many.npz", arr_0=images, arr_1=None), "--count", "899"]) == 2
    assert "got count 899, expected at most 898, as there are training images" in capsys.readouterr().err


def test_too_few_samples_are_named_with_the_file(tmp_path, capsys):
    assert evaluate([write(tmp_path / "samples.npz"), "--count", "1"]) == 2
    assert re.search(r"^error: got 1 samples, expected at least .*samples\.npz$", capsys.readouterr().err)


def test_a_record_of_other_samples_is_refused(tmp_path, capsys):
    path = write(tmp_path / "samples.npz")
    (tmp_path / "samples.json").write_text(json.dumps({"count": 99999, "solver": {"name": "heun"}}))
    assert evaluate([path]) == 2
    assert "samples.npz with count 60, and 99999 by its record" in capsys.readouterr().err


def test_an_interrupt_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pathline.evaluate, "_judge", interrupted)
    assert evaluate([write(tmp_path / "samples.npz")]) == 130
    assert capsys.readouterr().err == "stopped: what was not finished is not written\n"


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
    assert "got faces as a reference, which is neither a data set" in capsys.readouterr().err


# --- metrics by name -------------------------------------------------------------------------------------------------


def colours(path, count, size=(5, 7), seed=0, **more):
    images = np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)
    np.savez(path, arr_0=images, **more)
    return images


class Flat(features.Features):
    """Values in [-1, 1], which need no data to be fitted to."""

    name = "flat"

    def __init__(self):
        self.sizes = {"features": 105}
        self.manifest = {"name": "flat", "sizes": self.sizes}

    def __call__(self, images):
        return features.as_floats(images).flatten(1).double()


@pytest.fixture(autouse=True)
def flat(monkeypatch):
    monkeypatch.setattr(features.registry, "_entries", dict(features.registry._entries))
    features.register("flat")(Flat)


def records(path):
    return json.loads(path.with_suffix(".metrics.json").read_text())["metrics"]


def test_named_metrics_on_any_reference_in_batches(tmp_path, capsys):
    """The distance of flat pixels to those of another file, by numpy's covariances."""
    images, others = colours(tmp_path / "a.npz", 300), colours(tmp_path / "real.npz", 200, seed=1)
    words = [str(tmp_path / "a.npz"), "--metrics", "frechet:flat", "--reference", str(tmp_path / "real.npz")]
    assert evaluate([*words, "--count", "250"]) == 0
    flat = [x.transpose(0, 3, 1, 2).reshape(len(x), -1) / 127.5 - 1 for x in (images[:250], others)]
    first, second = (np.cov(x, rowvar=False) for x in flat)
    trace = np.sqrt(np.linalg.eigvals(first @ second).real.clip(0)).sum()
    expected = np.square(flat[0].mean(0) - flat[1].mean(0)).sum() + np.trace(first) + np.trace(second) - 2 * trace
    (record,) = records(tmp_path / "a.npz")
    assert record["values"]["distance"] == pytest.approx(expected, rel=1e-5) and record["count"] == 250
    assert record["reference"]["path"] == "real.npz" and record["features"]["name"] == "flat"
    printed = capsys.readouterr()
    assert "a.npz: the first 250 of 300 samples" in printed.out and printed.err == ""


def test_results_of_several_numbers_of_samples_stay_together(tmp_path, capsys):
    images = colours(tmp_path / "a.npz", 300)
    told = {"nfe": 5, "samples_sha256": hashlib.sha256(images.tobytes()).hexdigest()}
    (tmp_path / "a.json").write_text(json.dumps(told))
    colours(tmp_path / "real.npz", 200, seed=1)
    words = [str(tmp_path / "a.npz"), "--metrics", "frechet:flat", "--reference", str(tmp_path / "real.npz")]
    for count in ("250", "270", "250"):
        assert evaluate([*words, "--count", count]) == 0
    assert [record["count"] for record in records(tmp_path / "a.npz")] == [270, 250]
    assert evaluate([*words, "--output", str(tmp_path / "b.metrics.json")]) == 0
    assert [record["count"] for record in records(tmp_path / "b.npz")] == [300]
    capsys.readouterr()
    assert evaluate(["compare", str(tmp_path / "a.metrics.json"), str(tmp_path / "b.metrics.json")]) == 0
    said = capsys.readouterr().err
    assert "another number of samples: 270 in a (270); 250 in a (250); 300 in b" in said
    (tmp_path / "a.json").write_text(json.dumps({**told, "samples_sha256": "0" * 64}))
    assert evaluate(words) == 2 and re.search(r"a\.npz with other samples .* hash", capsys.readouterr().err)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_several_processes_measure_what_one_does(processes, tmp_path, monkeypatch):
    images, labels = colours(tmp_path / "a.npz", 37), np.arange(37) % 3
    folder = tmp_path / "a.shards"
    folder.mkdir()
    for number, (first, last) in enumerate(((0, 5), (5, 28), (28, 37))):
        np.savez(folder / f"shard-{number:05d}.npz", arr_0=images[first:last], arr_1=labels[first:last])
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    (folder / "record.json").write_text(json.dumps({"count": 37, "samples_sha256": digest}))
    colours(tmp_path / "real.npz", 23, seed=1)
    asked = ["--metrics", "frechet:flat,kid:flat,precision-recall:flat", "--option", "kid.size=11"]
    words = [*asked, "--reference", str(tmp_path / "real.npz"), "--batch", "4", "--device", "cpu"]
    assert evaluate([str(tmp_path / "a.npz"), *words, "--output", str(tmp_path / "one.metrics.json")]) == 0
    two = [str(folder), *words, "--devices", "2", "--output", str(tmp_path / "two.metrics.json")]
    ended = processes(2, lambda: evaluate(two), timeout=60)
    assert ended.checked() == [0, 0]
    assert "the first 37 of 37 samples" in ended.outputs[0] and "samples" not in ended.outputs[1]
    one, two_of_them = (records(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert [record["metric"] for record in one] == [record["metric"] for record in two_of_them]
    for first, second in zip(one, two_of_them, strict=True):
        assert first["count"] == second["count"] == 37
        assert first["values"] == pytest.approx(second["values"], rel=1e-9)
    batches = Samples.batches

    def damaged(self, size, count=None, first=0):
        if first:
            raise DataError("got a damaged shard")
        return batches(self, size, count, first)

    monkeypatch.setattr(Samples, "batches", damaged)
    ended = processes(2, lambda: evaluate(two), timeout=60)
    assert ended.checked() == [2, 2]
    assert "error: got a damaged shard" in ended.outputs[0] and "error" not in ended.outputs[1]


def test_fewer_samples_than_features_are_warned_of_with_the_file(tmp_path, capsys):
    colours(tmp_path / "a.npz", 9), colours(tmp_path / "real.npz", 200, seed=1)
    words = [str(tmp_path / "a.npz"), "--metrics", "frechet:flat", "--reference", str(tmp_path / "real.npz")]
    assert evaluate(words) == 0
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and "a.npz: frechet, flat: 9 samples for 105 features" in said
    assert records(tmp_path / "a.npz")[0]["warnings"] == ["9 samples for 105 features: the distance is biased upwards"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--metrics", "freschet"], "error: unknown metric 'freschet'; did you mean 'frechet'?"),
        (["--metrics", "loss-by-tme"], "did you mean 'loss-by-time'?"),
        (["--metrics", "frechet:flat,loss-by-time"], "got loss-by-time of models beside metrics of samples"),
        (["--metrics", "frechet:flat"], "got no reference for the metric frechet"),
        (["--metrics", "frechet:flat", "--reference", "digits"], r"samples of shape .*a\.npz"),
        (["--metrics", "memorisation", "--reference", "REAL"], "what Memorisation compares with"),
        (["--metrics", "frechet:flat", "--reference", "REAL", "--count", "13"], r"expected 1 to 12 of .*a\.npz"),
        (["--metrics", "frechet:flat", "--count", "0"], "got count 0"),
        (["--metrics", "frechet:flat", "--reference", "OTHER"], r"samples of shape .*a\.npz"),
        (
            ["--metrics", "frechet:flat", "--reference", "REAL", "--option", "flatt.a=3"],
            "options of 'flatt'.*did you mean 'flat'",
        ),
        (["--metrics", "frechet:flat", "--reference", "REAL", "--option", "flat.a=3"], "has no option 'a'"),
        (["--metrics", "frechet:flat", "--reference", "REAL", "--option", "frechet.a=3"], "has no option 'a'"),
        (["--metrics", "frechet:flat", "--reference", "REAL", "--device", "cuda:77"], "got device 'cuda:77'"),
        (["sample.seed=3"], "got no file at sample.seed=3"),
        (["--metrics", "frechet:flat", "--threads", "0"], "got threads 0, expected 1 or more"),
        (["--metrics", "frechet:flat", "--devices", "0"], "got devices 0, expected 1 or more"),
        (["--option", "kid.size=3"], "got --option, which is of metrics that --metrics names"),
        (["--device", "cpu"], "got --device, which is of metrics"),
        (["--devices", "2", "--reference", "digits"], "got --devices, which is of metrics"),
        (["--batch", "3"], "got --batch, which is of metrics"),
        (["--metrics", "frechet:flat", "--reference", "REAL", "--devices", "13"], "got --devices 13 for 12 samples"),
        (["--metrics", "frechet:flat", "--devices", "2", "--device", "cuda:1"], "got --device cuda:1 for 2 devices"),
        (["--metrics", "loss-by-time", "--reference", "nonsense"], "got --reference, which is of samples"),
        (["--metrics", "loss-by-time", "--devices", "2"], "got --devices, which is of samples"),
        (["--metrics", "kid:flat", "--reference", "REAL"], r"got 12 samples.* kid\.size.* in .*a\.npz"),
        (["--metrics", "frechet:flat", "--reference", "REAL", "--output", "a.json"], r"ends in \.metrics\.json"),
        (["--output", "nowhere/a.metrics.json"], "in a folder that is there"),
        (["REAL", "--output", "both.metrics.json"], "got --output for 2 files"),
    ],
)
def test_what_is_wrong_is_named(words, said, tmp_path, capsys):
    colours(tmp_path / "a.npz", 12)
    colours(tmp_path / "REAL.npz", 30)
    colours(tmp_path / "OTHER.npz", 30, (7, 5))
    named = [str(tmp_path / f"{word}.npz") if word.isupper() else word for word in words]
    assert evaluate([str(tmp_path / "a.npz"), *named]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and re.search(said, printed)
    assert not (tmp_path / "a.metrics.json").exists()


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_model_is_measured_on_what_it_has_not_seen(tmp_path, capsys):
    backbone = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 12, "depth": 2, "num_heads": 3}
    entries = {
        "data": "digits",
        "backbone": {"name": "sit", **backbone, "num_classes": 10},
        "objective": "velocity",
        "train": {"steps": 2, "global_batch": 6, "folder": str(tmp_path / "run"), "accelerator": "cpu"},
    }
    Trainer(resolve(entries)).run()
    assert evaluate([str(tmp_path / "run"), "--metrics", "loss-by-time", "--count", "30", "--batch", "7"]) == 0
    printed = capsys.readouterr().out
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000000002"
    written = json.loads((tmp_path / "run" / "step-000000002.metrics.json").read_text())
    _, parts = sampling.load(checkpoint, [])
    metric = metrics.models.build("loss-by-time")
    held_out = data.build("digits", split="held-out").batch(range(30))
    metric.update(Flow(parts.backbone, parts.interpolant), held_out, Draws(0).at(range(30)))
    (row,) = metric.compute().rows
    (record,) = written["metrics"]
    assert record["values"] == pytest.approx({"velocity": row.mean}, rel=1e-5)
    assert record["uncertainty"] == pytest.approx({"velocity": row.error}, rel=1e-5)
    assert written["by_time"][0]["rows"][0]["means"] == pytest.approx(row.means, rel=1e-4)
    assert written["samples"]["checkpoint"]["weights_sha256"] and "loss-by-time, " in printed
    assert evaluate(["compare", str(tmp_path / "run" / "step-000000002.metrics.json")]) == 0
    assert f"{row.mean:.4g} ± {row.error:.2g}" in capsys.readouterr().out
    words = ["--metrics", "bits-per-dimension", "--count", "3", "--option", "bits-per-dimension.levels=17"]
    assert evaluate([str(checkpoint), *words]) == 0
    both = json.loads((tmp_path / "run" / "step-000000002.metrics.json").read_text())
    assert both["metrics"][0] == {"version": pathline.__version__, **record} and len(both["by_time"]) == 2
    assert "17 levels" in both["metrics"][1]["metric"] and both["metrics"][1]["reference"]["split"] == "held-out"
    assert evaluate([str(checkpoint), "data.split=train", "--metrics", "loss-by-time", "--count", "1000"]) == 2
    assert "expected 2 to 898 samples" in capsys.readouterr().err
    output = tmp_path / "train.metrics.json"
    words = ["--metrics", "loss-by-time", "--count", "30", "--output", str(output)]
    assert evaluate([str(checkpoint), "data.split=train", *words]) == 0
    capsys.readouterr()
    assert evaluate(["compare", str(tmp_path / "run" / "step-000000002.metrics.json"), str(output)]) == 0
    said = capsys.readouterr().err
    assert re.search(r"loss-by-time.* is not comparable: another reference: .*split=held-out.* in .*split=train", said)
    for model in (tmp_path / "run", checkpoint, tmp_path / "weights.safetensors"):
        assert evaluate([str(model)]) == 2
        assert f"error: got {model}, a model; give --metrics loss-by-time" in capsys.readouterr().err
