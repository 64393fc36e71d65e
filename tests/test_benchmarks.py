"""The benchmarks run, their bare loops compute what ours do, and the page on choosing a solver says what is true."""

from __future__ import annotations

import importlib.util
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pathline import solvers
from pathline.backbones.layers import math_attention

ROOT = Path(__file__).parent.parent
OPTIONS = {"ode": {"method": "euler"}, "sde": {"method": "euler"}}


def load(name):
    """Import a benchmark, which is no part of the package."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def rows():
    """The page's table of methods: name -> cells."""
    page = (ROOT / "docs" / "choosing-a-solver.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    return {row[0].strip("`"): row for row in cells if len(row) == 7 and row[0].startswith("`")}


def test_bare_loops_are_the_same_methods_as_ours():
    """Written out from the formulas, and so a check of ours: in float64 to rounding."""
    bench, x = load("solvers"), torch.randn(3, 2, dtype=torch.float64)
    ends = {"steps": bench.STEPS, "start": bench.START, "end": bench.END}
    for name, loop in bench.ODES.items():
        assert torch.allclose(solvers.build(name, **ends)(bench.FLOW, x), loop(x), rtol=1e-9, atol=1e-9), name
    for name, loop in bench.SDES.items():
        solver = solvers.build(name, **ends, **bench.stochastic(name))
        z = torch.randn(solver.increments_shape(x), dtype=torch.float64)
        assert torch.allclose(solver.solve(bench.FLOW, x, increments=z).x, loop(x, z), rtol=1e-9, atol=1e-9), name


def test_the_benchmark_reports_bars(capsys):
    bench = load("solvers")
    slow = bench.Row("slow", lambda: sum(range(20_000)), lambda: None, lambda ours, bare: ours <= bare, "≤ bare")
    fast = bench.Row("fast", lambda: None, lambda: sum(range(20_000)), lambda ours, bare: ours <= bare, "≤ bare")
    assert bench.report("title", [slow, fast, None], 3) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "≤ bare: MISSED" in lines[-2] and "≤ bare: met" in lines[-1]
    assert len(bench.own_rows((2, 1, 2, 2))) == len(bench.ODES) + len(bench.SDES)


def test_the_cost_of_deepflow(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = load("deepflow")
    case = bench.Case("W 10", 24, 2, 4, 10, batch=3, side=6, step=0.0, sampling=1e9)  # 9 tokens
    monkeypatch.setattr(bench, "CASES", [case])
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "RESULTS.md")
    assert bench.main(["--device", "cpu", "--repetitions", "1", "--record"]) == 1
    printed, recorded = capsys.readouterr().out, (tmp_path / "RESULTS.md").read_text()
    assert recorded.strip() in printed and printed.splitlines()[-1] == "1 bars missed"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in recorded.splitlines() if "|" in line]
    assert [row[0] for row in cells[2:]] == ["forward", "backward", "optimizer", "step", "sampling", "guided"]
    assert cells[5][-1] == "≤ 0.0: MISSED" and cells[6][-1] == "≤ 1000000000.0: met"
    assert "tokens × tokens in a step and a call of DeepFlow: none" in recorded
    model = bench.Model(case, "deepflow", torch.device("cpu"))
    with math_attention():
        assert "aten::_softmax" in bench.maps(model.call, 9)  # the check sees a map where there is one
    blocks = 4 * (24 * 24 * 9 * 12 + 9 * 9 * 24 * 2 + 24 * 24 * 6)  # of the trunk, and what is modulated
    ends = 9 * 24 * (16 + 16) + 24 * 24 * 2 + 256 * 24 + 24 * 24
    plain = bench.Model(case, "sit", torch.device("cpu"))
    assert plain.work()["sampling"] == 3 * (blocks + ends)
    gap = 256 * 48 + 48 * 48 + 48 * 96
    refined = 9 * (24 * 10 + 10 * 20 + 20 * 10 + 10 * 24 + 48 * 48 + 48 * 24 + 24 * 24 * 4) + 9 * 9 * 24 * 2
    assert model.work()["sampling"] == 3 * (blocks + ends + gap + refined)


def test_every_solver_is_on_the_page():
    assert set(rows()) == set(solvers.names())


@pytest.mark.parametrize("name", [n for n in solvers.names() if n not in ("ode", "sde", "mean-flow", "taylor")])
def test_the_page_says_what_is_true(name):
    _, _, order, nfe, end, states, _ = rows()[name]
    stepped = {} if name == "dopri5" else {"steps": 7}
    solver = solvers.build(name, **stepped)
    assert float(re.match(r"[\d.]+", order)[0]) == solver.order
    if stepped:
        assert eval(re.sub(r"(\d)N", r"\1*N", nfe.replace("−", "-")), {"N": 7}) == solver.calls  # as 2N − 1
    assert {"yes": True, "no": False}[end] == solver.evaluates_end
    assert round(load("memory").held(solvers.build(name, start=0.95, end=0.05, **stepped)), 1) == float(states)


@pytest.mark.slow
def test_errors_on_the_picture_fall_with_calls():
    accuracy = load("accuracy")
    x = torch.randn(16, 2, dtype=torch.float64)
    truth = solvers.build("rk4", steps=1000)(accuracy.mixture().flow(accuracy.interpolants.build("linear")), x)
    for name in ("heun", "ab3", "dopri5"):
        points = accuracy.curve(accuracy.candidates(name, library=False)[-3:], x, truth)
        assert all(earlier[0] < later[0] and earlier[1] > later[1] for earlier, later in pairwise(points))
