"""The ladder's benchmark: what is compared is comparable, and a run is never made twice."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from pathline import Draws, backbones, interpolants, objectives
from pathline.metrics import Real

FOLDER = Path(__file__).parent.parent / "benchmarks"
TINY = dict(width=12, depth=2, heads=3, patch=4, acceleration_width=7, batch=5, steps=8, points=3, warmup=2, samples=20)


class Benchmark(NamedTuple):
    rungs: ModuleType
    runs: ModuleType
    table: ModuleType


@pytest.fixture
def benchmark(monkeypatch):
    """The benchmark's three files, which are no part of the package; without its classifier."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("ladder_rungs", "ladder_runs", "ladder")
    found = Benchmark(*map(importlib.import_module, names))
    monkeypatch.setattr(found.runs.Judge, "of", lambda real: None)
    yield found
    for name in (*names, "bare", "ladder_plot"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def real():
    return Real.of("digits")


def test_every_rung_and_variant_can_be_built(benchmark, real):
    settings = benchmark.rungs.Settings(**TINY)
    for name in (*benchmark.rungs.LADDER, *benchmark.rungs.VARIANTS, "scales & sample sign & by clock"):
        network, objective = benchmark.rungs.build(name, settings, real)
        data, draws = real.training.batch(range(3))["data"], Draws(0).at(range(3))
        loss = objective(network, data, draws, label=torch.tensor([0, 4, 9]))
        loss.total.backward()
        assert all(p.grad is not None for p in network.parameters() if p.requires_grad), name
    merged = benchmark.rungs.rung("scales & sample sign")
    assert merged == {"backbone": {"time_scale": 1000.0, "gap_scale": 1000.0}, "objective": {"gap_sign": "sample"}}
    assert "objective" not in benchmark.rungs.VARIANTS["scales"]  # merging left it alone


def test_widened_rungs_have_the_nearest_count(benchmark, real):
    settings = benchmark.rungs.Settings(**TINY)
    wanted = benchmark.rungs.parameters("DeepFlow", settings, real)
    for name in list(benchmark.rungs.LADDER)[:-1]:
        width = benchmark.rungs.matched(name, settings, real)
        off = [abs(benchmark.rungs.parameters(name, settings, real, width + step) - wanted) for step in (-1, 0, 1)]
        assert off[1] == min(off) and width > 48, name
    plain = backbones.build(
        "sit", hidden_size=12, depth=2, num_heads=3, input_size=8, in_channels=1, patch_size=4, num_classes=10
    )
    counted = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    assert (
        counted
        == benchmark.rungs.parameters("SiT", settings, real)
        == benchmark.rungs.parameters("SiT", settings, real, 48)
    )


def test_a_run_is_an_honest_one_and_is_made_once(benchmark, real, tmp_path):
    """Its curve ends at the average of a bare loop's weights; a shorter run's end is a point of it."""
    settings = benchmark.rungs.Settings(**TINY)
    runs = benchmark.runs.Runs(tmp_path, settings, real)
    found = runs.get("+ time gap", 3)
    marks = [point["step"] for point in found["curve"]]
    assert marks == settings.marks() and marks[-1] == 8
    torch.manual_seed(3)
    network = backbones.build(
        "deepflow", refiner="gap", hidden_size=12, depth=2, num_heads=3, input_size=8, in_channels=1, patch_size=4,
        num_classes=10, branches=2,
    )  # fmt: skip
    objective = objectives.build(
        "deepflow", interpolant=interpolants.build("linear"), times="logit-normal", acceleration=0.0
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0)
    averaged = [p.detach().clone() for p in network.parameters()]
    for step in range(8):
        positions = range(5 * step, 5 * step + 5)
        batch = real.training.batch(real.training.indices_at(positions, 3))
        loss = objective(network, batch["data"], Draws(3).at(positions, step=step), label=batch["label"]).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 2)
        optimizer.step()
        for old, p in zip(averaged, network.parameters(), strict=True):
            old.lerp_(p.detach(), max(0.002, 9 / (step + 1 + 9)))
    with torch.no_grad():
        for old, p in zip(averaged, network.parameters(), strict=True):
            p.copy_(old)
    assert found["curve"][-1]["loss"] == pytest.approx(runs.examiner.loss(network), rel=1e-4)
    again = benchmark.runs.Runs(tmp_path, settings, real)
    assert again.get("+ time gap", 3) == found and again.examiner is None
    assert len(list(tmp_path.iterdir())) == 1
    other = benchmark.runs.Runs(tmp_path, replace(settings, steps=6, points=2), real).get("+ time gap", 3)
    assert other["curve"][-1]["step"] == 6 and len(list(tmp_path.iterdir())) == 2


def test_what_is_read_off_curves(benchmark):
    points = ((10, 1, 2.0), (100, 10, 1.0), (200, 40, 0.5))
    run = {"curve": [{"step": s, "seconds": t, "loss": v} for s, t, v in points]}
    assert (
        benchmark.table.loss_at(run, 10) == 2
        and benchmark.table.loss_at(run, 100) == 1
        and benchmark.table.loss_at(run, 200) == 0.5
    )
    assert benchmark.table.loss_at(run, 10**1.5) == pytest.approx(1.5)  # half-way in the logarithm
    assert benchmark.table.spread([1.0, 2.0, 3.0], 3) == "2.000 ± 0.577" and benchmark.table.spread([1.0], 1) == "1.0"
    assert benchmark.table.differences([1.0, 2.5], [1.5, 2.0]) == "+0.0000 ± 0.5000"


def test_budgets_of_the_table(benchmark):
    """At equal seconds the dearer rung is read off at fewer steps; differences are those of the same seeds."""

    def runs(name, *lasts):
        curves = [[{"step": s, "seconds": 0.0, "loss": v} for s, v in ((10, last + 1), (100, last))] for last in lasts]
        return [{"name": name, "parameters": 1234, "curve": curve} for curve in curves]

    found = {"SiT": runs("SiT", 1.0, 2.0), "DeepFlow": runs("DeepFlow", 1.5, 2.25)}
    plain, full = benchmark.table.rows(found, {}, {"SiT": 0.5, "DeepFlow": 0.5 * 10**0.5})
    assert plain["loss, 100 steps"] == plain["loss, 50.0 s"] == "1.5000 ± 0.5000"
    assert full["loss, 100 steps"] == "1.8750 ± 0.3750" and full["− SiT"] == "+0.3750 ± 0.1250"
    assert full["loss, 50.0 s"] == "2.3750 ± 0.3750" and full["− SiT "] == "+0.8750 ± 0.1250"  # at 10^1.5 steps
    assert full["ms a step"] == "1581.1 (3.16 ×)" and full["parameters"] == "1,234"


def test_the_tables_and_the_picture(benchmark, real, tmp_path, capsys):
    given = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items()]
    given += ["--blocks", "2", "--seeds", "0", "1", "--rungs", "SiT", "DeepFlow", "--variants", "scales & by clock"]
    benchmark.table.main(
        [*given, "--equal-parameters", "--folder", str(tmp_path / "runs"), "--plot", str(tmp_path / "ladder.png")]
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == ["SiT", "DeepFlow", "scales & by clock"]
    assert (tmp_path / "ladder.png").stat().st_size > 10_000 and len(list((tmp_path / "runs").iterdir())) == 8
    for bad in (["--rungs", "DeepFlow"], ["--variants", "better"], ["--rungs", "SiT", "scales"]):
        with pytest.raises(SystemExit):
            benchmark.table.main(bad)
        assert "expected SiT among rungs" in capsys.readouterr().err
