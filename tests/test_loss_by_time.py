"""The loss over bins of t in the log, against means taken by hand, and under every split of the work."""

from __future__ import annotations

import json
import math

import pytest
import torch
from lightning_fabric import Fabric

from pathline import Draws
from pathline.core.config import resolve
from pathline.core.errors import ConfigurationError
from pathline.objectives import Loss
from pathline.training import Trainer
from pathline.training.devices import Agreement
from pathline.training.log import Log, read_rows
from pathline.training.window import Window

BACKBONE = {"name": "sit", "input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 12, "depth": 1}


def trained(folder, **train):
    log = {"every": 3, **train.pop("log", {})}
    entries = {
        "data": "digits",
        "backbone": {**BACKBONE, "num_heads": 3, "num_classes": 10},
        "objective": train.pop("objective", "velocity"),
        "solver": {"name": "euler", "steps": 2},
        "train": {"steps": 7, "global_batch": 6, "seed": 5, "folder": str(folder), "accelerator": "cpu", **train},
        "log": log,
        "checkpoint": {"every": 2},
    }
    trainer = Trainer(resolve(entries))
    trainer.run()
    return trainer


def loss(times, values):
    values = torch.tensor(values)
    return Loss(values.mean(), {"noise": 3 * values}, {"noise": values, "other": -values}, torch.tensor(times))


def filled(values):
    """Empty bins as −1, which no loss is."""
    return [-1.0 if value is None else value for value in values]


def fabric():
    return Fabric(accelerator="cpu", devices=1)


def window(time_bins):
    return Window(fabric(), Agreement(fabric(), 1.0), time_bins)


def add(window, times, values, *, step=1, usable=None):
    given = loss(times, values) if times is not None else loss([0.5] * len(values), values)._replace(times=None)
    window.add_batch(given, torch.ones(len(values)) if usable is None else torch.tensor(usable))


def close(window, step=1, numbers=(1.0, 2.0, 0.0), kept=1.0):
    window.add_step(step, 10 * step, torch.tensor(numbers), torch.tensor(kept))


def test_bins_hold_the_means_of_the_first_detail():
    """Five bins over two steps of uneven micro-batches; 1 belongs to the last bin, an empty one is NaN."""
    two = window(5)
    add(two, [0.0, 0.19, 0.21], [1.0, 2.0, 7.0])
    add(two, [1.0, 0.81], [3.0, 4.0])
    close(two, 1)
    add(two, [0.1, 0.59, 0.2, 0.99, 0.99], [9.0, 5.0, 7.0, 3.0, 4.0])
    close(two, 2)
    assert two.read() == []
    row = two.row(5)
    assert row["loss_by_time"][:3] == pytest.approx([4.0, 7.0, 5.0])
    assert math.isnan(row["loss_by_time"][3]) and row["loss_by_time"][4] == pytest.approx(3.5)
    assert row["noise"] == pytest.approx((17 + 28) / 10) and row["other"] == pytest.approx(-(17 + 28) / 10)
    assert row["loss"] == 1.0 and row["gradient_norm"] == 2.0 and row["window"] == 2


def test_steps_skipped_are_left_out_of_the_means_and_named():
    """The second of three steps: its loss is infinite in one sample, and one sample's data were not finite."""
    three = window(2)
    for step, values in ((1, [1.0, 3.0]), (2, [math.inf, 9.0]), (3, [2.0, 4.0])):
        add(three, [0.2, 0.7], values, usable=[1.0, 0.0] if step == 2 else None)
        wrong = step == 2
        close(three, step, (math.inf if wrong else 2.5, 7.0 + step, float(wrong)), float(not wrong))
    (skipped,) = three.read()
    assert (skipped.step, skipped.reason) == (2, "data")
    expected = torch.tensor([[20, 1, 0, math.inf, 0.2], [21, 0, 1, 9.0, 0.7]])
    assert torch.allclose(skipped.samples, expected.double())
    row = three.row(2)
    assert row["loss_by_time"] == [1.5, 3.5] and row["gradient_norm"] == 9.0 and row["loss"] == 2.5


def test_without_bins_or_without_times_there_is_no_entry():
    for bins, times in ((0, [0.5]), (3, None)):
        one = window(bins)
        add(one, times, [1.0])
        close(one)
        one.read()
        assert "loss_by_time" not in one.row(1)


def test_a_window_goes_on_from_its_state():
    first, second, other = (window(4), window(4), window(3))
    add(first, [0.1, 0.3, 0.9], [0.1, 0.2, 0.7])
    close(first, 1)
    first.read()
    second.restore(json.loads(json.dumps(first.state())))
    other.restore(first.state())  # the number of bins may change between two runs
    for one in (first, second, other):
        add(one, [0.15, 0.95, 0.4], [0.3, 0.4, 0.2])
        close(one, 2)
        one.read()
    rows = [one.row(3)["loss_by_time"] for one in (first, second, other)]
    assert rows[0][:2] == rows[1][:2] and rows[0][3] == rows[1][3] == pytest.approx(0.55)
    assert rows[0][0] == pytest.approx(0.2) and math.isnan(rows[0][2])
    assert rows[2] == pytest.approx([0.3, 0.2, 0.4])  # the bins of the saved step are left out


def test_the_speed_of_a_restored_window_is_that_of_the_steps_since(monkeypatch):
    """Three steps before a stop, one of 2 s after it: four in the row's means, one in its speed."""
    now = iter(range(0, 100, 2))
    monkeypatch.setattr("pathline.training.window.time.perf_counter", lambda: float(next(now)))
    before, after = window(0), window(0)
    for step in (1, 2, 3):
        add(before, [0.5], [1.0])
        close(before, step)
    before.read()
    after.restore(before.state())
    add(after, [0.5], [1.0])
    close(after, 4)
    after.read()
    row = after.row(7)
    assert row["window"] == 4 and row["images_per_second"] == pytest.approx(7 / 2)


def test_rows_of_a_run_are_the_losses_of_its_draws(tmp_path):
    """The last row covers step 7 alone: its losses and times are found again with the weights of step 6."""
    trainer = trained(tmp_path / "run")
    rows = read_rows(tmp_path / "run")
    assert [len(row["loss_by_time"]) for row in rows] == [10, 10, 10]
    before = Trainer(trainer.configuration)
    before.resume(tmp_path / "run" / "checkpoints" / "step-000000006")
    positions = range(36, 42)
    batch = before.parts.dataset.batch(before.parts.dataset.indices_at(positions, 5))
    draws = Draws(5).at(positions, step=6)
    with torch.no_grad():
        terms = before.parts.objective(before.state.network, batch["data"], draws, label=batch["label"]).terms
    by_bin = {}
    for t, value in zip(draws.uniform("time").tolist(), terms["velocity"].tolist(), strict=True):
        by_bin.setdefault(int(10 * t), []).append(value)
    expected = [sum(by_bin[i]) / len(by_bin[i]) if i in by_bin else -1.0 for i in range(10)]
    assert filled(rows[-1]["loss_by_time"]) == pytest.approx(expected, rel=1e-5)


def test_no_split_of_the_work_changes_them(tmp_path):
    """Micro-batches, and a stop inside a window with its resume, bit for bit."""
    whole = trained(tmp_path / "whole")
    trained(tmp_path / "parts", micro_batch=4)
    trained(tmp_path / "stopped", stop_at=4)
    entries = whole.configuration.model_dump()
    entries["train"] = {**entries["train"], "folder": str(tmp_path / "stopped")}
    again = Trainer(resolve(entries))
    again.resume(tmp_path / "stopped" / "checkpoints" / "step-000000004")
    again.run()
    rows, parts, resumed = (
        {row["step"]: row["loss_by_time"] for row in read_rows(tmp_path / name)}
        for name in ("whole", "parts", "stopped")
    )
    assert resumed == rows
    for step in (3, 6, 7):
        assert filled(rows[step]) == pytest.approx(filled(parts[step]), rel=1e-4)


def test_the_option(tmp_path):
    trained(tmp_path / "off", steps=3, log={"time_bins": 0})
    assert "loss_by_time" not in read_rows(tmp_path / "off")[0]
    trained(tmp_path / "four", steps=3, log={"time_bins": 4})
    assert len(read_rows(tmp_path / "four")[0]["loss_by_time"]) == 4
    with pytest.raises(ConfigurationError, match=r"log.time_bins"):
        trained(tmp_path / "bad", log={"time_bins": -1})


def test_lists_are_written_with_null_for_what_is_not_finite(tmp_path):
    log = Log(tmp_path, 0, 5)
    log.write({"step": 2, "loss": 0.5, "loss_by_time": [1.5, math.nan, 2.0]})
    log.close()
    assert read_rows(tmp_path) == [{"step": 2, "loss": 0.5, "loss_by_time": [1.5, None, 2.0]}]
