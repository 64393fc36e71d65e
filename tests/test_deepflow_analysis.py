"""What the branches of a model are worth: against closed forms, by hand on a real network, and by the command."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pathline import Draws, Flow, InputError, backbones, data, interpolants, weights
from pathline.metrics import models
from pathline.plugins.deepflow import Branches, DeepFlow
from pathline.plugins.deepflow.analysis import main, measure
from pathline.train import main as train
from pathline.training import sampling

LINEAR = interpolants.build("linear")
NAMES = ["acceleration-error", "branch-cosine", "branch-losses", "extrapolation-error"]


class Stand(nn.Module):
    """Branches that say what functions of (x, t) say, the last one exact."""

    has_acceleration = True

    def __init__(self, velocities, accelerations):
        super().__init__()
        self.velocities, self.accelerations = velocities, accelerations
        self.branch_count = len(velocities)

    def forward(self, x, t, spoken=None):
        if spoken is None:
            return self.velocities[-1](x, t[:, None])
        said = (
            tuple(functions[i - 1](x, t[:, None]) for i in numbers)
            for functions, numbers in ((self.velocities, spoken.velocities), (self.accelerations, spoken.accelerations))
        )
        return Branches(*said, ())


def record(name, velocities, accelerations=(), *, bins=4, count=40, samples=None, path=LINEAR, dim=6):
    x = torch.zeros(count, dim, dtype=torch.float64) if samples is None else samples
    metric = models.build(name, bins=bins)
    metric.update(Flow(Stand(velocities, accelerations), path), {"data": x}, Draws(5).at(range(len(x))))
    return metric.compute()


def one_point(factor=1.0, offset=0.0):
    """The velocity of data that are zero, x/t = noise, times a factor, plus an offset."""
    return lambda x, t: factor * x / t + offset


def across(x, t):
    """The same velocity with its coordinates turned by a right angle, two by two."""
    first, second = (x / t).unflatten(1, (-1, 2)).unbind(2)
    return torch.stack((-second, first), dim=2).flatten(1)


# --- closed forms -------------------------------------------------------------------------------------------------


def test_losses_of_scaled_branches_in_closed_form():
    """Branch i says s·V: its error is (s − 1)²·‖noise‖², the same noise for all of them."""
    found = record("branch-losses", [one_point(0.5), one_point(3.0), one_point(-1.0), one_point()])
    assert [row.name for row in found.rows] == ["branch 1", "branch 2", "branch 3", "branch 4"]
    first, second, third, last = found.rows
    assert last.mean == pytest.approx(0, abs=1e-20)
    for b, mean in enumerate(first.means):
        noise = Draws(5).normal(f"noise in bin {b}", range(40), (6,)).double()
        assert mean == pytest.approx(0.25 * float(noise.square().mean()), rel=1e-6)
    assert [m / n for m, n in zip(second.means, first.means, strict=True)] == pytest.approx([16.0] * 4)
    assert [m / n for m, n in zip(third.means, first.means, strict=True)] == pytest.approx([16.0] * 4)
    # of 6 values of unit variance a sample, 4 bins: the standard error of a mean of 40 is √(2/6/40)
    assert first.errors == pytest.approx([0.25 * math.sqrt(2 / 6 / 40)] * 4, rel=0.4)


def test_cosines_of_scaled_and_turned_branches():
    found = record("branch-cosine", [one_point(2.5), one_point(-0.1), across, one_point()])
    assert [row.name for row in found.rows] == ["branch 1", "branch 2", "branch 3"]
    for row, cosine in zip(found.rows, (1.0, -1.0, 0.0), strict=True):
        assert row.means == pytest.approx([cosine] * 4, abs=1e-9) and row.error < 1e-9


def test_a_velocity_off_by_a_constant_and_the_acceleration_that_mends_it():
    """x_t − t·(V + e) + ½·a·t² misses data by −t·e + ½·a·t²: nothing with a = 2e/t, and 2t·e with a = −2e/t."""
    off = one_point(offset=0.5)
    mending, worsening = (lambda x, t, sign=sign: sign * torch.ones_like(x) / t for sign in (1, -1))
    found = record("extrapolation-error", [off, off, one_point()], [mending, worsening], bins=3)
    names = ["branch 1, first order", "branch 1, second order", "branch 2, first order", "branch 2, second order"]
    assert [row.name for row in found.rows] == names
    plain, mended, again, worse = found.rows
    assert plain.means == again.means and max(mended.means) < 1e-20
    for b, mean in enumerate(plain.means):
        t = (b + Draws(5).uniform(f"time in bin {b}", range(40)).double()) / 3
        assert mean == pytest.approx(0.25 * float(t.square().mean()), rel=1e-6)
    assert worse.means == pytest.approx([4 * mean for mean in plain.means])


def test_the_extrapolation_of_an_exact_gaussian_flow_in_closed_form(gaussian):
    """The best velocity reaches E[data | x_t], off by Var[data | x_t] = s²t²/V; an acceleration c adds (½c·t²)²."""
    exact = gaussian("linear", mean=2.0, std=0.5)

    def velocity(x, t):
        return exact.velocity(x, t[:, 0])

    samples = 2.0 + 0.5 * torch.randn(600, 5, dtype=torch.float64)
    found = record("extrapolation-error", [velocity] * 2, [lambda x, t: 3 + 0 * x], samples=samples)
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    left = 0.25 * t**2 / (0.25 * (1 - t) ** 2 + t**2)
    for row, values in zip(found.rows, (left, left + 9 / 4 * t**4), strict=True):
        for mean, error, value in zip(row.means, row.errors, values.reshape(4, 1000).mean(1).tolist(), strict=True):
            assert abs(mean - value) < 4 * error < 0.5 * value


def test_accelerations_against_the_material_one_in_closed_form(gaussian):
    """Along the flow of a Gaussian x = (1−t)·m + √V·z, z kept, so that x'' = (√V)''·z, V = (1−t)²s² + t²."""
    exact = gaussian("linear", mean=2.0, std=0.5)

    def rate(t):  # (√V)''
        variance, slope = 0.25 * (1 - t) ** 2 + t**2, 2 * t - 0.5 * (1 - t)
        return (2 * variance * 2.5 - slope**2) / (4 * variance**1.5)

    def acceleration(x, t):
        return rate(t) * (x - 2 * (1 - t)) / (0.25 * (1 - t) ** 2 + t**2).sqrt()

    wrong, right = (lambda x, t: acceleration(x, t) + 0.5), acceleration
    samples = 2.0 + 0.5 * torch.randn(600, 5, dtype=torch.float64)
    velocity = [lambda x, t: exact.velocity(x, t[:, 0])] * 3
    found = record("acceleration-error", velocity, [wrong, right], samples=samples)
    zero, half, none = found.rows
    assert [row.name for row in found.rows] == ["zero", "branch 1", "branch 2"]
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    for mean, error, value in zip(
        zero.means, zero.errors, (rate(t) ** 2).reshape(4, 1000).mean(1).tolist(), strict=True
    ):
        assert abs(mean - value) < 4 * error < 0.5 * value
    assert max(none.means) < 1e-6 * min(zero.means)
    assert half.means == pytest.approx([0.25] * 4, abs=2e-3)


def test_material_accelerations_are_asked_for_within_the_training_interval():
    class Narrow(type(LINEAR)):
        """Velocities that exist at t from 0.25 to 0.75 alone."""

        def training_interval(self, kind):
            return 0.25, 0.75

    asked = []

    def velocity(x, t):
        asked.extend(t.flatten().tolist())
        return x / t

    samples = torch.zeros(600, 6, dtype=torch.float64)
    path = Narrow()
    found = record("acceleration-error", [velocity] * 2, [lambda x, t: 0 * x], bins=3, samples=samples, path=path)
    assert found.times == pytest.approx([0.25 + (b + 0.5) / 6 for b in range(3)])
    assert 0.25 <= min(asked) < 0.255 and 0.745 < max(asked) <= 0.75  # differences reach over 0.005


# --- a real network -----------------------------------------------------------------------------------------------


OPTIONS = dict(input_size=4, patch_size=2, in_channels=3, hidden_size=24, num_heads=2, depth=5, num_classes=7)


def deepflow(**changes):
    backbone = backbones.build("deepflow", **OPTIONS, **{"cuts": (1, 3), "acceleration_width": 9, **changes})
    for p in backbone.parameters():
        p.data.normal_(std=0.2)
    return Flow(backbone.eval(), LINEAR)


def batch(ids):
    return {"data": Draws(1).normal("data", ids, (3, 4, 4)), "label": torch.tensor([i % 8 for i in ids])}


def over(flow, name, batches):
    metric = models.build(name, bins=2)
    for ids in batches:
        metric.update(flow, batch(ids), Draws(3).at(ids))
    return metric


def figures(metric):
    return [x for row in metric.compute().rows for x in (row.mean, row.error, *row.means, *row.errors)]


def test_figures_of_a_network_by_hand():
    flow, ids = deepflow(), range(4, 9)
    given = batch(ids)
    found = {name: over(flow, name, [ids]).compute() for name in NAMES}
    for b in range(2):
        t = (b + Draws(3).uniform(f"time in bin {b}", ids)) / 2
        noise = Draws(3).normal(f"noise in bin {b}", ids, (3, 4, 4))
        at = t[:, None, None, None]
        x = (1 - at) * given["data"] + at * noise
        with torch.no_grad():
            out = flow.backbone(x, t, branch_times=(t, t), label=given["label"])
        for i, v in enumerate(out.velocities, start=1):
            error = float((v - (noise - given["data"])).square().mean())
            assert found["branch-losses"].row(f"branch {i}").means[b] == pytest.approx(error, rel=1e-5)
        for i, (v, a) in enumerate(zip(out.velocities[:2], out.accelerations, strict=True), start=1):
            dots = [float((p * q).sum() / p.norm() / q.norm()) for p, q in zip(v, out.velocities[2], strict=True)]
            assert found["branch-cosine"].row(f"branch {i}").means[b] == pytest.approx(sum(dots) / 5, abs=1e-5)
            for order, reached in (("first", x - at * v), ("second", x - at * v + at**2 * a / 2)):
                error = float((reached - given["data"]).square().mean())
                row = found["extrapolation-error"].row(f"branch {i}, {order} order")
                assert row.means[b] == pytest.approx(error, rel=1e-5)
    assert [row.name for row in found["acceleration-error"].rows] == ["zero", "branch 1", "branch 2"]


def test_the_last_branch_is_what_loss_by_time_measures():
    flow = deepflow()
    last = over(flow, "branch-losses", [range(6)]).compute().row("branch 3")
    assert over(flow, "loss-by-time", [range(6)]).compute().row("velocity").means == pytest.approx(last.means, rel=1e-6)


def test_refiners_have_rows_of_their_own():
    solver = {"name": "euler", "steps": 3}
    for refiner, names in (
        ("vera", ["layer 0", "layer 1", "into layer 2", "layer 2", "layer 3", "into layer 4", "layer 4"]),
        ("none", ["layer 0", "layer 1", "layer 2", "layer 3", "layer 4"]),
    ):
        options = {} if refiner == "vera" else {"acceleration_width": 2048}
        metric = models.build("feature-distance", solver=solver)
        metric.update(deepflow(refiner=refiner, **options), batch(range(3)), Draws(0).at(range(3)))
        assert [row.name for row in metric.compute().rows] == names


@pytest.mark.parametrize("name", NAMES)
def test_batches_and_halves_change_nothing_but_rounding(name):
    flow = deepflow()
    whole, pieces = over(flow, name, [range(7)]), over(flow, name, [range(5, 7), range(2), range(2, 5)])
    half, other = over(flow, name, [range(3)]), over(flow, name, [range(3, 7)])
    half.merge(other)
    assert figures(whole) == figures(over(flow, name, [range(7)]))  # bit for bit
    tolerance = 2e-3 if name == "acceleration-error" else 1e-4  # differences over 0.005 enlarge rounding
    assert figures(pieces) == pytest.approx(figures(whole), rel=tolerance)
    assert figures(half) == pytest.approx(figures(whole), rel=tolerance)


def test_bound_conditions_are_kept():
    flow, ids = deepflow(), range(2, 5)
    label = torch.tensor([3, 6, 1])
    metric, plain = (models.build("branch-losses", bins=2) for _ in range(2))
    metric.update(flow.given(label=label), {"data": batch(ids)["data"]}, Draws(3).at(ids))
    plain.update(flow, {**batch(ids), "label": label}, Draws(3).at(ids))
    assert figures(metric) == figures(plain)


@pytest.mark.parametrize("name", NAMES)
def test_backbones_that_do_not_fit(name):
    for backbone in (backbones.build("sit", **OPTIONS), deepflow(cuts=(), acceleration_width=2048).backbone):
        with pytest.raises(InputError, match=r"of one branch, expected a DeepFlow backbone of two or more; 'feature-"):
            over(Flow(backbone, LINEAR), name, [range(2)])
    with pytest.raises(InputError, match="got a flow that predicts noise, expected velocities"):
        over(Flow(deepflow().backbone, LINEAR, "noise"), name, [range(2)])
    without = deepflow(refiner="none", acceleration_width=2048)
    if name in ("branch-losses", "branch-cosine"):
        assert over(without, name, [range(2)]).count == 2
        return
    with pytest.raises(InputError, match="whose refiner has no acceleration, expected the refiner 'vera'"):
        over(without, name, [range(2)])


def test_curved_paths_have_no_extrapolation():
    curved = Flow(deepflow().backbone, interpolants.build("trigonometric"))
    with pytest.raises(InputError, match="got the Trigonometric path, expected a straight one as 'linear'"):
        over(curved, "extrapolation-error", [range(2)])
    assert over(curved, "acceleration-error", [range(2)]).count == 2


# --- the command --------------------------------------------------------------------------------------------------


CONFIGURATION = """
data: digits
backbone: {name: NAME, input_size: 8, patch_size: 4, in_channels: 1, hidden_size: 12, depth: 2, num_heads: 3,
           num_classes: 10}
objective: OBJECTIVE
solver: {name: euler, steps: 3}
train: {steps: 2, global_batch: 5, folder: runs/x, accelerator: cpu}
ema: {decay: 0.5, lengths: [0.2]}
checkpoint: {every: 2}
"""


def trained(folder, name, objective):
    (folder / "c.yaml").write_text(CONFIGURATION.replace("NAME", name).replace("OBJECTIVE", objective))
    assert train([str(folder / "c.yaml"), f"train.folder={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("analysis"), "deepflow", "deepflow")


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain"), "sit", "velocity")


def test_the_command_writes_what_the_library_measures(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    words = ["--count", "5", "--steps", "3", "--bins", "2", "--seed", "4", "--batch", "2", "--distance", "cosine"]
    assert main([str(run), *words, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    written = json.loads((out / "analysis.json").read_text())
    names = sorted([*NAMES, "feature-distance", "loss-by-time"])
    assert sorted(path.name for path in out.iterdir()) == sorted(["analysis.json", *(f"{name}.png" for name in names)])
    assert written["data"] == {"name": "digits", "split": "held-out"} and written["seed"] == 4
    averaged = run / "checkpoints" / "step-000000002" / "ema.safetensors"
    digest = hashlib.sha256(averaged.read_bytes()).hexdigest()
    assert written["weights"] == {"checkpoint": "step-000000002", "average": "ema", "sha256": digest}
    assert written["entries"] == []
    _, parts = sampling.load(sampling.find(run, pytest.fail), [])
    assert isinstance(parts.backbone, DeepFlow)
    flow, held_out = Flow(parts.backbone, LINEAR), data.build("digits", split="held-out")
    for name, entry in zip(names, written["metrics"], strict=True):
        feature = {"solver": {"name": "euler-maruyama", "steps": 3}, "distance": "cosine"}
        metric = models.build(name, **(feature if name == "feature-distance" else {"bins": 2}))
        expected = measure(metric, flow, held_out, 5, seed=4, batch=2)
        assert entry == json.loads(json.dumps(expected.to_json())) and entry["count"] == 5
        assert models.table(expected) in printed
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_plain_run_has_the_metrics_of_the_core(plain_run, capsys):
    pytest.importorskip("matplotlib")
    assert main([str(plain_run), "--count", "3", "--steps", "2", "data.split=train", "--bins", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("left out ") == 4 and "left out branch-losses: got a SiT of one branch" in printed
    out = plain_run / "analysis-step-000000002"  # beside the checkpoints
    written = json.loads((out / "analysis.json").read_text())
    assert {path.stem for path in out.glob("*.png")} == {"feature-distance", "loss-by-time"}
    assert [entry["metric"].split(",")[0] for entry in written["metrics"]] == ["feature-distance", "loss-by-time"]
    assert written["data"]["split"] == "train" and written["entries"] == ["data.split=train"]


def test_an_average_is_chosen_by_name_and_has_a_folder_of_its_own(run):
    pytest.importorskip("matplotlib")
    errors = []
    for average in ("ema", "ema-0.200"):
        words = [f"sample.average={average}", "--metrics", "loss-by-time", "--count", "3", "--bins", "1"]
        assert main([str(run), *words]) == 0
        written = json.loads((run / f"analysis-step-000000002-{average}" / "analysis.json").read_text())
        assert written["weights"]["average"] == average
        errors.append(written["metrics"][0]["rows"][0]["mean"])
    assert errors[0] != errors[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metrics", "brunch-losses"], "unknown metric of a model 'brunch-losses'; did you mean 'branch-losses'"),
        (["--metrics", "branch-losses"], "metric branch-losses: got a SiT of one branch"),
        (["--count", "900"], "got count 900 and batch 64, expected 2 to 899 samples"),
        (["--count", "1"], "got count 1 and batch 64"),
        (["--batch", "0"], "got count 128 and batch 0"),
        (["--steps", "0"], "got steps 0"),
        (["--bins", "0"], "got bins 0"),
        (["--distance", "far"], "got distance 'far', expected one of euclidean, normalised, cosine"),
        (["data.split=test"], "data.split: got 'test'"),
        (["sample.average=nonesuch"], "sample.average: got 'nonesuch'; Known: ema, ema-0.200"),
        (["--seed", "-1"], "got seed -1"),
        (["optim.lr=1"], "got 'optim.lr=1' for a trained model"),
        (["guidance.0.scale=7"], "got 'guidance.0.scale=7', which an analysis does not read; leave it out"),
        (["solver.steps=7"], "got 'solver.steps=7', which an analysis does not read; feature-distance samples by"),
        (["solver=heun"], "got 'solver=heun', which an analysis does not read"),
        (["sample.count=3"], "got 'sample.count=3', which an analysis does not read; use --count"),
        (["sample.seed=3"], "use --seed"),
        (["sample.batch=3"], "use --batch"),
        (["sample.output=x"], "use --output"),
        (["sample.labels=random"], "give sample.average alone: samples have the data's labels"),
        (["train.threads=2"], "use --threads"),
        (["--threads", "0"], "got threads 0, expected 1 to 1024"),
        (["--threads", str(10**20)], "expected 1 to 1024"),
    ],
)
def test_wrong_input(words, message, plain_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([str(plain_run), *words, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said
    assert not list(tmp_path.glob("out/*"))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The same weights twice in a file of another program, and labelled data of their shape."""
    folder, flow = tmp_path_factory.mktemp("released"), deepflow()
    theirs = weights.convert(flow.backbone.state_dict(), to="deepflow")
    torch.save({"ema": theirs, "model": theirs}, folder / "theirs.pt")
    rows = batch(range(11))
    save_file({"latents": rows["data"], "labels": rows["label"] % 7}, folder / "rows.safetensors")
    return folder


GIVEN = ["backbone.num_heads=2", "backbone.cuts=[1,3]", "backbone.clamp_gap=false"]


def test_of_a_released_file_without_data_only_distances_are_measured(released, capsys):
    pytest.importorskip("matplotlib")
    options = ["--count", "3", "--steps", "2", "--bins", "2"]
    assert main([str(released / "theirs.pt"), *options, *GIVEN]) == 0
    reason = ": got a file of another program, which brings no data; give some by data.name=…"
    printed = capsys.readouterr().out
    assert [name for name in [*NAMES, "loss-by-time"] if f"left out {name}{reason}" in printed] == [
        *NAMES,
        "loss-by-time",
    ]
    out = released / "analysis-theirs.pt"
    written = json.loads((out / "analysis.json").read_text())
    assert [entry["metric"].split(",")[0] for entry in written["metrics"]] == ["feature-distance"]
    assert {path.name for path in out.iterdir()} == {"analysis.json", "feature-distance.png"}
    told = written["weights"]
    digest = hashlib.sha256((released / "theirs.pt").read_bytes()).hexdigest()
    assert (told["family"], told["key"], told["file"], told["sha256"]) == ("deepflow", "ema", "theirs.pt", digest)
    assert written["entries"] == GIVEN
    assert main([str(released / "theirs.pt"), *GIVEN, *options, "--metrics", "branch-losses"]) == 2
    assert f"error: metric branch-losses{reason}" in capsys.readouterr().err


def test_of_a_released_file_with_data_all_is_measured(released, tmp_path):
    pytest.importorskip("matplotlib")
    entries = [*GIVEN, "data.name=latents", f"data.path={released}", "data.num_classes=7", "data.scale=1"]
    options = ["--count", "3", "--steps", "2", "--bins", "2", "--output", str(tmp_path)]
    assert main([str(released / "theirs.pt"), *entries, "weights.key=model", *options]) == 0
    written = json.loads((tmp_path / "analysis.json").read_text())
    assert len(written["metrics"]) == 6 and written["weights"]["key"] == "model"
    assert written["entries"] == [*entries, "weights.key=model"]


def test_nothing_there(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: got ")


def test_without_matplotlib_nothing_is_measured(plain_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(plain_run), "--output", str(tmp_path / "out")]) == 2
    assert "got no package 'matplotlib'" in (said := capsys.readouterr().err) and "pathline[log]" in said
    assert not (tmp_path / "out").exists()


def test_the_module_starts_without_warnings():
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "pathline.plugins.deepflow.analysis", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert "usage: pathline.plugins.deepflow.analysis" in done.stdout and not done.stderr
