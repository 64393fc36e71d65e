"""The benchmarks of training: the bare loop trains as ours does, and the tables say what they claim."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from pathline.training import Trainer

FOLDER = Path(__file__).parent.parent / "benchmarks"
STEPS = ["network", "precision", "images/s", "ms a step", "bare", "own µs", "own share", "row ms", "MiB", "bare MiB"]
PARTS = ["data", "draws", "forward", "backward", "guard", "optimizer", "averages", "log", "rest"]
SAVES = (
    "MB, first stall s, stall s, write s, fsync s, hash s, whole s, alone s, plain s, plain fsync s, ms a step, "
    "while writing"
)


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark, which is no part of the package and finds its neighbours beside it."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def loaded(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    yield loaded
    sys.modules.pop("bare", None)


def tiny(bench, backbone):
    return bench.Case(f"{backbone} tiny", backbone, 12, 2, 8, 4, 5, 3, seconds=-1.0)  # a bar that nothing meets


@pytest.mark.parametrize("backbone", ["sit", "deepflow"])
def test_the_bare_loop_trains_as_ours_bit_for_bit(backbone, load, tmp_path):
    """Neither does more or less than the other: four blocks of three steps each, of weights and averages."""
    bench = load("training")
    c = bench.configured(tiny(bench, backbone), tmp_path, "cpu", "fp32", False)
    trainer = Trainer(c, parts=bench.parts_of(c))
    bare = bench.Bare(c, torch.device("cpu"), 20)
    start = [p.detach().clone() for p in bare.parameters]
    times = bench.alternate(trainer, bare, 3, 2)
    assert trainer.state.step == bare.step == 12 and len(times.ours) == len(times.bare) == 2
    assert all(torch.equal(p, q) for p, q in zip(trainer.state.network.parameters(), bare.parameters, strict=True))
    ours = trainer.state.averages.network().parameters()
    assert all(torch.equal(p, q) for p, q in zip(ours, bare.averaged, strict=True))
    moved = max(float((p - q).abs().max()) for p, q in zip(start, bare.trained, strict=True))
    assert 1e-4 < moved < 12.1e-4  # twelve steps of Adam at 1e-4


def test_the_tables_of_steps(load, monkeypatch, tmp_path, capsys):
    bench = load("training")
    monkeypatch.setattr(bench, "cases", lambda device, sizes: [tiny(bench, "sit"), tiny(bench, "deepflow")])
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "RESULTS.md")
    assert bench.main(["--device", "cpu", "--repetitions", "2", "--record"]) == 1
    printed, recorded = capsys.readouterr().out, (tmp_path / "RESULTS.md").read_text()
    assert recorded.strip() in printed and printed.splitlines()[-1] == "2 bars missed"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in recorded.splitlines() if "|" in line]
    assert rows[0] == [*STEPS, "bars"] and rows[4] == ["network", "precision", *PARTS]
    assert [len(row) for row in rows] == [11] * 8
    for row in rows[2:4]:
        assert row[1] == "fp32" and row[-1] == "own ≤ -1000000 µs: MISSED"
        assert all(float(cell) > 0 for cell in (*row[2:5], *row[7:10]))
    for row in rows[6:]:
        assert all(int(cell.split()[0]) >= 0 for cell in row[2:]) and all(int(row[i].split()[0]) for i in (4, 5, 7))
        assert sum(float(cell.split("(")[1].strip("%)")) for cell in row[2:]) == pytest.approx(100, abs=5)


def test_bars_are_held_to_the_median_of_neighbouring_blocks(load):
    """Own time: 1, 3 and 2 ms above the bare loop, of 31, 13 and 22 ms a step, and 20 ms for a row every 100 steps."""
    bench = load("training")
    times = bench.Times([(0.5, 0.031), (0.5, 0.013), (0.5, 0.022)], [(0.5, 0.030), (0.5, 0.010), (0.5, 0.020)])
    case = tiny(bench, "sit")._replace(share=0.11, seconds=2.1e-3)
    result = bench.Result(case, "fp32", False, times, 1, dict.fromkeys(PARTS, 1.0), 0.02, (106, 100))
    assert result.verdicts() == ["own ≤ 11%: met", "memory ≤ 1.05 ×: MISSED", "own ≤ 2100 µs: MISSED"]
    assert result._replace(memory=(105, 100)).verdicts()[1].endswith("met")
    assert result.cells()["own share"] == "+10.0%" and result.cells()["own µs"] == "+2200"
    on_a_gpu = result._replace(kernels=(7, 5), utilisation=0.25).cells()
    assert list(on_a_gpu) == [*STEPS, "kernels", "bare kernels", "MFU", "bars"] and on_a_gpu["MFU"] == "25.0%"


def test_a_part_is_not_charged_for_the_parts_within_it(load):
    """A clock that goes on by one at each reading."""
    bench, ticks = load("training"), iter(range(100))
    watch = bench.Stopwatch(lambda: (0.0, float(next(ticks))), 1)
    inner = watch.timed("draws", lambda: None)
    outer = watch.timed("forward", lambda: (inner(), inner()))
    outer()
    watch.charge()
    seconds = {part: value for part, value in watch.seconds.items() if value}
    assert seconds == {"rest": 2.0, "forward": 3.0, "draws": 2.0}


def test_what_counts_as_a_kernel(load):
    names = ["Memcpy HtoD (Pinned -> Device)", "ampere_sgemm_128x64_tn", "Memset (Device)", "vectorized_elementwise"]
    assert load("footprint").kernels(names) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells of a process")
def test_peak_memory_is_what_a_call_held_at_once(load):
    """Twice 48 MiB, one after the other, and 40 MiB beside the second: too large to lie in memory freed before."""
    bench = load("footprint")

    def run():
        torch.ones(12 * 2**20)
        first = torch.ones(12 * 2**20)
        second = torch.ones(10 * 2**20)
        return first, second

    # a forked process reads its program's pages anew, which counts as well
    found = bench.peak_memory("cpu", run) - bench.peak_memory("cpu", lambda: torch.ones(2))
    assert abs(found - 88 * 2**20) < 8 * 2**20


def test_the_table_of_saves(load):
    saved = load("saving").saves("cpu", 12, 2)
    assert ", ".join(saved.cells()) == SAVES and all(value > 0 for value in (*saved[:8], *saved[9:]))
    assert saved.whole >= saved.write and saved.bytes > 4 * 4 * 12 * 12 * 12 * 18


def test_latents_are_the_same_in_both_loops(load):
    bare = load("bare")
    with tempfile.TemporaryDirectory() as name:
        c = bare.configured(tiny(bare, "sit"), Path(name), "cpu", "fp32", False)
    one, other = bare.parts_of(c), bare.parts_of(c)
    assert torch.equal(one.dataset.batch([7, 3])["data"], other.dataset.batch([7, 3])["data"])
    assert one.dataset.batch([7])["data"].shape == (1, 4, 8, 8) and one.forward_flops > 0
