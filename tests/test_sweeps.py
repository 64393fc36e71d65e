"""``sample.py --sweep``: every combination drawn once, measured, and told in a table, files and a plot."""

from __future__ import annotations

import csv
import json
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pathline.core.errors import ConfigurationError
from pathline.evaluate import main as evaluate
from pathline.sample import main
from pathline.train import main as train
from pathline.training import drawing, sweeps, swept
from pathline.training.sweeps import points
from pathline.training.swept import Found

CONFIGURATION = """
data: digits
backbone: {name: deepflow, input_size: 8, patch_size: 4, in_channels: 1, hidden_size: 12, depth: 2, num_heads: 3,
           num_classes: 10, cuts: [1], acceleration_width: 7}
objective: {name: deepflow, times: logit-normal}
optim: {lr: 1e-2}
solver: {name: heun, steps: 2}
train: {steps: 6, global_batch: 5, folder: runs/x, accelerator: cpu}
"""
FEW = ("sample.count=7", "sample.seed=3")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps")
    (folder / "c.yaml").write_text(CONFIGURATION)
    assert train([str(folder / "c.yaml"), f"train.folder={folder / 'run'}"]) == 0
    return folder / "run"


def swept_into(folder):
    return [row["point"] for row in json.loads((folder / "sweep.json").read_text())["drawings"]]


def images(path):
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["arr_0"].astype(int)


# --- words -----------------------------------------------------------------------------------------------------------


def test_words_are_lists_and_points_their_product():
    assert points(["solver.steps=5,10", "guidance.0.scale=1,1.5,2e0"]) == [
        {"solver.steps": steps, "guidance.0.scale": scale} for steps in (5, 10) for scale in (1, 1.5, 2.0)
    ]
    assert points(["solver.name=heun, euler", "x.y=[[0, 0.5]]"]) == [
        {"solver.name": "heun", "x.y": [0, 0.5]},
        {"solver.name": "euler", "x.y": [0, 0.5]},
    ]
    assert points(["a.b=[0,0.5],[0.1,1e-4]"]) == [{"a.b": [0, 0.5]}, {"a.b": [0.1, 0.0001]}]
    assert points(["a.b=[3, 5]", "c=null,true"])[1] == {"a.b": 3, "c": True}


@pytest.mark.parametrize(
    "word", ["solver.steps", "=5", "solver.steps=", "solver.steps=5,5", "a=[[1],[1]]", "a=[", "a=[]"]
)
def test_words_that_are_none(word):
    with pytest.raises(ConfigurationError, match="got "):
        points([word])
    with pytest.raises(ConfigurationError, match="to sweep, expected entry=value,value"):
        points(["a=1", "a=2"])


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_each_point_is_the_drawing_of_its_words(run, tmp_path, capsys):
    """Bit for bit what the words alone give; under a name of its own, with its record."""
    sweep = ("--sweep", "solver.name=euler,heun", "solver.steps=2,3", "guidance.0.scale=1,2.5", "--into", str(tmp_path))
    assert main([str(run), *FEW, *sweep]) == 0
    listed = json.loads((tmp_path / "sweep.json").read_text())["drawings"]
    assert len(listed) == 8 and len(list(tmp_path.glob("*.npz"))) == 8
    for entry in listed:
        words = [f"{key}={value}" for key, value in entry["point"].items()]
        assert main([str(run), *FEW, *words, f"sample.output={tmp_path / 'alone' / 'a.npz'}"]) == 0
        alone = images(tmp_path / "alone" / "a.npz")
        assert np.array_equal(images(tmp_path / entry["file"]), alone)
        assert entry["record"]["solver"]["steps"] == entry["point"]["solver.steps"]
        calls = entry["point"]["solver.steps"] * (2 if entry["point"]["solver.name"] == "heun" else 1)
        assert entry["record"]["nfe"] == calls and entry["record"]["seed"] == 3
    printed = capsys.readouterr().out
    assert "guidance.0.scale" in printed and "2.5" in printed and str(tmp_path / "sweep.csv") in printed
    assert not (tmp_path / "sweep.png").exists()  # nothing was measured


def test_a_branch_and_an_interval_are_swept(run, tmp_path):
    words = ("guidance.0.name=branch", "--sweep", "guidance.0.branch=1,2", "--into", str(tmp_path / "a"))
    assert main([str(run), *FEW, *words]) == 0
    blocks = [
        e["record"]["block_evaluations"] for e in json.loads((tmp_path / "a" / "sweep.json").read_text())["drawings"]
    ]
    assert blocks == [4, 8]  # four calls of one block, and of two
    words = ("guidance.0.scale=3", "--sweep", "guidance.0.interval=[0,0.5],[0,1]", "--into", str(tmp_path / "b"))
    assert main([str(run), *FEW, *words]) == 0
    first, second = (images(path) for path in sorted((tmp_path / "b").glob("*.npz")))
    assert not np.array_equal(first, second)
    assert [point["guidance.0.interval"] for point in swept_into(tmp_path / "b")] == [[0, 0.5], [0, 1]]


def test_finished_points_are_not_drawn_again(run, tmp_path, monkeypatch):
    """A wider sweep in the same folder draws what is new; a shorter one nothing."""
    inner, drawn = drawing.finished, []
    monkeypatch.setattr(drawing, "finished", lambda *arguments: drawn.append(1) or inner(*arguments))
    sweep = ("--into", str(tmp_path), "--sweep")
    assert main([str(run), *FEW, *sweep, "solver.steps=1,2"]) == 0 and len(drawn) == 2
    assert main([str(run), *FEW, *sweep, "solver.steps=1,2,3"]) == 0 and len(drawn) == 3
    assert main([str(run), *FEW, *sweep, "solver.steps=3"]) == 0 and len(drawn) == 3
    assert swept_into(tmp_path) == [{"solver.steps": 3}]
    assert main([str(run), *FEW, "sample.count=8", *sweep, "solver.steps=3"]) == 0 and len(drawn) == 4


def test_a_sweep_that_is_stopped_goes_on(run, tmp_path, monkeypatch, capsys):
    import os

    inner, drawn = drawing.finished, []

    def finished(*arguments):
        drawn.append(1)
        if len(drawn) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*arguments)

    monkeypatch.setattr(drawing, "finished", finished)
    words = [str(run), *FEW, "sample.shard=3", "--into", str(tmp_path), "--sweep", "solver.steps=1,2"]
    assert main(words) == 75 and "0 of 7 samples" in capsys.readouterr().err
    assert swept_into(tmp_path) == [{"solver.steps": 1}]
    assert main(words) == 0 and len(drawn) == 4 + 3
    assert swept_into(tmp_path) == [{"solver.steps": 1}, {"solver.steps": 2}]
    assert not list(tmp_path.glob("*.shards"))


def test_two_processes_sweep_together(processes, run, tmp_path):
    words = [str(run), *FEW, "sample.shard=3", "--sweep", "solver.steps=1,2", "--metrics", "frechet:pixels"]
    ended = processes(2, lambda: main([*words, "--into", str(tmp_path / "two")]))
    assert ended.checked() == [0, 0] and "distance" in ended.outputs[0] and "distance" not in ended.outputs[1]
    assert main([*words, "--into", str(tmp_path / "one")]) == 0
    for path in (tmp_path / "one").glob("*.npz"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sweep", "solver.steps=1,0"], "at solver.steps=0: "),
        (
            ["--sweep", "solver.name=heun,huen"],
            "at solver.name=huen: ",
        ),
        (["--sweep", "solver.stps=1,2"], "has no such option"),
        (
            ["--sweep", "guidance.0.scale=1", "guidance.0.interval=[[0,2]]"],
            "at guidance.0.scale=1 guidance.0.interval=",
        ),
        (["--sweep", "backbone.depth=1,2"], "got 'backbone.depth=1' for a trained model"),
        (["sample.output=a.npz", "--sweep", "solver.steps=1"], "whose drawings have names of their own; use --into"),
        (["--sweep", "sample.batch=1,2"], "got the same drawing at sample.batch=1 and at sample.batch=2"),
        (["--sweep", "solver.steps=1", "--metrics", "frechett"], "unknown metric 'frechett'; did you mean 'frechet'?"),
        (["--sweep", "solver.steps=1", "--metrics", "frechet", "--reference", "digit"], "digit"),
        (["--metrics", "frechet"], "got --metrics without --sweep"),
        (["--into", "x"], "got --into without --sweep"),
    ],
)
def test_wrong_sweeps_are_refused_before_anything_is_drawn(words, said, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drawing, "draw", lambda *_: pytest.fail("drew samples"))
    into = [] if "--into" in words or "--sweep" not in words else ["--into", str(tmp_path / "new")]
    assert main([str(run), *FEW, *words, *into]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and said in printed and "Traceback" not in printed
    assert not (tmp_path / "new").exists()


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    sweep = ("--sweep", "solver.steps=1,2,3", "guidance.0.scale=1,2", "--into", str(folder))
    assert main([str(run), "sample.count=30", *sweep, "--metrics", "frechet:pixels,precision-recall:pixels"]) == 0
    return folder


def test_figures_are_those_of_evaluate(measured, tmp_path):
    """The command for files of samples gives the same ones, and reads what the sweep wrote."""
    listed = json.loads((measured / "sweep.json").read_text())["drawings"]
    assert len(listed) == 6
    for entry in listed[:2]:
        told = json.loads((measured / entry["file"]).with_suffix(".metrics.json").read_text())["metrics"]
        copy = tmp_path / entry["file"]
        copy.write_bytes((measured / entry["file"]).read_bytes())
        asked = ["--metrics", "frechet:pixels,precision-recall:pixels", "--reference", "digits"]
        assert evaluate([str(copy), *asked]) == 0
        theirs = json.loads(copy.with_suffix(".metrics.json").read_text())["metrics"]
        assert [r["values"] for r in told] == [r["values"] for r in theirs] == [r["values"] for r in entry["metrics"]]
    assert evaluate(["compare", *map(str, measured.glob("*.metrics.json"))]) == 0


def test_the_table_is_a_file_of_its_own(measured):
    with (measured / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    listed = json.loads((measured / "sweep.json").read_text())["drawings"]
    assert [row["solver.steps"] for row in rows] == ["1", "1", "2", "2", "3", "3"]
    assert [row["NFE"] for row in rows] == ["2", "2", "4", "4", "6", "6"]
    for row, entry in zip(rows, listed, strict=True):
        (distance,) = (r["values"]["distance"] for r in entry["metrics"] if "distance" in r["values"])
        (name,) = (name for name in row if name.endswith("distance"))
        assert float(row[name]) == distance and distance > 0


def test_results_are_not_measured_again(run, measured, monkeypatch):
    monkeypatch.setattr(sweeps, "measure_samples", lambda *_: pytest.fail("measured again"))
    words = [str(run), "sample.count=30", "--sweep", "solver.steps=3,1", "guidance.0.scale=2", "--into", str(measured)]
    before = (measured / "sweep.json").read_text()
    try:
        assert main([*words, "--metrics", "frechet:pixels,precision-recall:pixels"]) == 0
        with pytest.raises(pytest.fail.Exception):
            main([*words, "--metrics", "frechet:pixels"])
    finally:
        (measured / "sweep.json").write_text(before)


def test_the_plot_has_a_panel_a_figure_and_a_line_a_guidance(measured):
    with Image.open(measured / "sweep.png") as picture:
        assert picture.size[0] == 1200 and np.asarray(picture.convert("L")).std() > 5


def found(point, nfe, **values):
    record = {"nfe": nfe, "block_evaluations": None, "seconds": 1.0}
    return Found(point, "x.npz", record, [{"metric": "m", "values": values}])


def lines_of(entries, name="m, v"):
    """The lines that a panel has, by label: x and y."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    swept._draw(axes, name, entries)
    drawn = {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    return drawn, axes.get_xlabel()


def test_what_a_plot_runs_along():
    """Network calls where steps are swept; else the first entry, numbers in order and words as they come."""
    product = [found({"solver.steps": s, "guidance.0.scale": g}, 2 * s, v=s + g) for s in (7, 3) for g in (1, 2)]
    lines, label = lines_of(product)
    assert label == "network calls (NFE)"
    assert lines == {"guidance.0.scale 1": ([6, 14], [4, 8]), "guidance.0.scale 2": ([6, 14], [5, 9])}
    lines, label = lines_of([found({"guidance.0.scale": g}, 5, v=g) for g in (2.5, 1)])
    assert label == "guidance.0.scale" and list(lines.values()) == [([1, 2.5], [1, 2.5])]
    lines, _ = lines_of([found({"solver.name": n}, 5, v=i) for i, n in enumerate(("heun", "euler"))])
    assert list(lines.values()) == [(["heun", "euler"], [0, 1])]


def test_the_table_in_words():
    entries = [found({"a.b": [0, 0.5]}, 4, v=0.123456, w=3.0), found({"a.b": None}, 6, v=12345.678)]
    text = swept.table(entries).splitlines()
    assert text[0].split() == ["m", "m"] and text[1].split() == ["a.b", "NFE", "blocks", "seconds", "v", "w"]
    assert text[2].split() == ["[0,", "0.5]", "4", "-", "1", "0.1235", "3"]
    assert text[3].split() == ["-", "6", "-", "1", "1.235e+04", "-"]


def test_without_matplotlib_the_rest_is_written(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = [str(run), *FEW, "--sweep", "solver.steps=1", "--metrics", "frechet:pixels", "--into", str(tmp_path)]
    assert main(words) == 0
    assert "no sweep.png without matplotlib: pip install 'pathline[log]'" in capsys.readouterr().out
    assert (tmp_path / "sweep.csv").exists() and not (tmp_path / "sweep.png").exists()


def test_by_default_it_lies_in_the_run(run):
    assert main([str(run), *FEW, "--sweep", "solver.steps=1"]) == 0
    (name,) = (path.name for path in (run / "sweep").glob("*.npz"))
    assert name.startswith("samples-heun-1-seed-3-") and torch.is_grad_enabled()
