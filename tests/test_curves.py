"""The picture of a log: what is drawn against the rows, and that nothing there stops a run."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pathline.core.config import resolve
from pathline.training import Trainer
from pathline.training import curves as module
from pathline.training.curves import save_curves
from pathline.training.log import read_rows

BACKBONE = dict(hidden_size=8, depth=1, num_heads=2, input_size=8, patch_size=4, in_channels=1, num_classes=10)


def write(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(step, **entries):
    """A row as training writes them."""
    row = {"step": step, "loss": 2.0 / step, "deep": 1.5 / step, "velocity": 1 / step, "gradient_norm": 0.5}
    times = {"loss_by_time": [3.0 / step, None, 1.0 / step], "window": 5}
    return row | times | {"images_per_second": 70.0 + step, "lr": 1e-4, "skipped": 2, **entries}


def drawn(folder, monkeypatch):
    """Title -> label -> (steps, values) of the lines of a picture, which is not rendered."""
    figures = []
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **_: (figures.append(figure), path.write_bytes(b"")))
        assert save_curves(folder) == folder / "curves.png"
    (figure,) = figures
    return {
        axis.get_title("left"): {line.get_label(): line.get_data() for line in axis.get_lines()} for axis in figure.axes
    }


def same(line, steps, values):
    return np.array_equal(line[0], steps) and np.array_equal(line[1], values, equal_nan=True)


def test_every_number_of_the_rows_is_drawn(tmp_path, monkeypatch):
    """Terms and details by their names, whatever an objective calls them; a null is a gap."""
    first, second, third = row(5, loss=None), row(10), row(15, data_wait_share=0.25, memory_gib=7.0)
    write(tmp_path, [first, second, third])
    panels = drawn(tmp_path, monkeypatch)
    steps, nan = [5, 10, 15], math.nan
    assert same(panels["loss"]["loss"], steps, [nan, 2 / 10, 2 / 15])
    assert same(panels["loss"]["deep"], steps, [1.5 / 5, 1.5 / 10, 1.5 / 15])
    assert same(panels["loss"]["velocity"], steps, [1 / 5, 1 / 10, 1 / 15])
    assert set(panels["loss"]) == {"loss", "deep", "velocity"}
    assert same(panels["loss by time t"]["0–0.33"], steps, [3 / 5, 3 / 10, 3 / 15])
    assert same(panels["loss by time t"]["0.67–1"], steps, [1 / 5, 1 / 10, 1 / 15])
    assert len(panels["loss by time t"]) == 2  # a bin without a sample has no line
    ((norm,), (rate,), (speed,), (memory,)) = (
        panels[title].values() for title in ("gradient norm", "learning rate", "images per second", "memory, GiB")
    )
    assert same(norm, steps, [0.5, 0.5, 0.5]) and same(rate, steps, [1e-4, 1e-4, 1e-4])
    assert same(speed, steps, [75, 80, 85]) and same(memory, steps, [nan, nan, 7])
    assert same(panels["shares of time and of the peak"]["time waiting for data"], steps, [nan, nan, 0.25])
    assert same(panels["skipped and failed"]["skipped steps"], steps, [2, 2, 2])


def test_panels_without_numbers_are_left_out(tmp_path, monkeypatch):
    write(tmp_path, [{"step": 3, "loss": 0.5}, {"step": 5, "loss": None}, {"step": 7, "gradient_norm": None}])
    assert set(drawn(tmp_path, monkeypatch)) == {"loss"}


def test_another_number_of_bins_after_a_resume(tmp_path, monkeypatch):
    write(tmp_path, [row(2, loss_by_time=[1.0, 2.0]), row(3, loss_by_time=None), row(5)])
    lines = drawn(tmp_path, monkeypatch)["loss by time t"]
    assert same(lines["0–0.33"], [2, 3, 5], [math.nan, math.nan, 3 / 5])


def test_many_rows_are_drawn_by_a_running_mean_on_the_raw_line(tmp_path, monkeypatch):
    rows = [row(step, gradient_norm=float(step**2 % 13)) for step in range(1, 201)]
    write(tmp_path, rows)
    raw, mean = drawn(tmp_path, monkeypatch)["gradient norm"].values()
    assert same(raw, range(1, 201), [step**2 % 13 for step in range(1, 201)])
    assert mean[1][100] == pytest.approx(np.mean([step**2 % 13 for step in range(96, 107)]))  # five on either side


def test_running_mean_by_hand():
    values = np.array([4.0, 1.0, 6.0, math.nan, 7.0, 3.0, math.inf])
    expected = [4, (4 + 1 + 6) / 3, (4 + 1 + 6 + 7) / 4, (1 + 6 + 7 + 3) / 4, (6 + 7 + 3) / 3, (7 + 3) / 2, (7 + 3) / 2]
    assert module.running_mean(values, 2) == pytest.approx(expected)
    spiked = np.array([5.0, 1e30, *[3.0] * 20])
    assert module.running_mean(spiked, 2)[5:] == pytest.approx(3.0)
    assert np.isnan(module.running_mean(np.full(3, math.nan), 1)).all()


def test_one_row(tmp_path, monkeypatch):
    write(tmp_path, [row(3)])
    panels = drawn(tmp_path, monkeypatch)
    assert same(panels["loss"]["loss"], [3], [2 / 3])
    assert same(panels["skipped and failed"]["skipped steps"], [3], [2])
    assert save_curves(tmp_path).stat().st_size > 10_000


def test_the_picture_of_a_run(tmp_path):
    entries = {
        "data": "digits",
        "backbone": {"name": "sit", **BACKBONE},
        "objective": "velocity",
        "solver": {"name": "euler", "steps": 1},
        "train": {"steps": 7, "global_batch": 3, "folder": str(tmp_path), "accelerator": "cpu"},
        "interpolant": "linear",
        "log": {"every": 2, "tensorboard": False},
    }
    Trainer(resolve(entries)).run()
    assert any(None in row["loss_by_time"] for row in read_rows(tmp_path))  # six samples in ten bins
    path = save_curves(tmp_path)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20)) > 20
        assert 800 <= picture.width <= 1600 and 1.3 < picture.width / picture.height < 3
    assert path.stat().st_size < 200_000 and not list(tmp_path.glob(".curves*"))


@pytest.mark.slow
def test_a_picture_stays_small_however_long_the_run(tmp_path):
    generator = np.random.default_rng(3)
    noise = 1 + 0.1 * generator.standard_normal((3000, 6))
    write(tmp_path, [row(i + 1, **{f"velocity_{k}": n / 7 for k, n in enumerate(r)}) for i, r in enumerate(noise)])
    assert save_curves(tmp_path).stat().st_size < 200_000


def test_nothing_to_draw_is_no_error(tmp_path, capsys):
    assert save_curves(tmp_path) is None and save_curves(tmp_path / "nowhere") is None
    write(tmp_path, [{"step": 2, "loss": None}])
    assert save_curves(tmp_path) is None
    assert list(tmp_path.glob("*.png")) == [] and capsys.readouterr().err == ""


def test_without_matplotlib_there_is_no_picture_and_no_error(tmp_path, monkeypatch, capsys):
    write(tmp_path, [row(2)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert save_curves(tmp_path) is None and capsys.readouterr().err == ""


def test_what_goes_wrong_is_said_and_the_old_picture_stays(tmp_path, monkeypatch, capsys):
    write(tmp_path, [row(2)])
    (tmp_path / "curves.png").write_bytes(b"the old one")

    def full(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    assert save_curves(tmp_path) is None
    assert "warning: no curves.png (OSError: [Errno 28] No space left" in capsys.readouterr().err
    assert (tmp_path / "curves.png").read_bytes() == b"the old one"


def test_a_users_settings_of_matplotlib_stay(tmp_path, monkeypatch):
    write(tmp_path, [row(2)])
    matplotlib.rcParams["font.size"] = 17.0
    try:
        drawn(tmp_path, monkeypatch)
        assert matplotlib.rcParams["font.size"] == 17.0
    finally:
        matplotlib.rcdefaults()


@pytest.mark.slow
def test_pyplot_and_its_state_are_never_touched(tmp_path):
    """Nor is matplotlib imported before a picture is asked for."""
    write(tmp_path, [row(2)])
    code = (
        "import sys; from pathlib import Path; from pathline.training.curves import save_curves; "
        f"print('matplotlib' in sys.modules, save_curves(Path({str(tmp_path)!r})) is not None, "
        "'matplotlib.pyplot' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    assert out.split() == ["False", "True", "False"]
