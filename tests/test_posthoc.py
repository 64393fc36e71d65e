"""Averages of other lengths after training, against those kept during it and against integrals."""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pathline.core.config import resolve
from pathline.core.errors import CheckpointError, InputError
from pathline.core.sections import Ema
from pathline.training import checkpoints
from pathline.training.checkpoints import Keep, Snapshot
from pathline.training.ema import Averages, exponent
from pathline.training.exported import load_exported
from pathline.training.posthoc import Profile, main, plan, reconstruct, solve_weights

COUNT = 2048  # updates
STORED, ASKED = (0.05, 0.10), (0.04, 0.07, 0.13, 0.20)
SETTINGS = Ema(decay=0.9, lengths=STORED, snapshot_every=COUNT // 8)


class Walk(nn.Module):
    """A random walk, with buffers that follow it: floating and whole."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(7, 30))
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.generator = torch.Generator().manual_seed(11)

    @torch.no_grad()
    def move(self) -> None:
        self.weight += torch.randn(7, 30, generator=self.generator)
        self.mean += 0.5
        self.seen += 3


def walked() -> tuple[dict[int, dict[str, dict[str, Tensor]]], Tensor]:
    """Averages of all lengths after every 64th update, and the last weights."""
    network, kept = Walk(), torch.ones(())
    averages = Averages(network, Ema(decay=None, lengths=STORED + ASKED))
    states = {}
    for update in range(1, COUNT + 1):
        network.move()
        averages.update(kept)
        if update % (COUNT // 32) == 0:
            states[update] = {
                name: {key: tensor.clone() for key, tensor in tensors.items()}
                for name, tensors in averages.tensors().items()
            }
    return states, network.weight.detach().double()


@pytest.fixture(scope="module")
def walk() -> tuple[dict[int, dict[str, dict[str, Tensor]]], Tensor]:
    return walked()


def configuration(folder: Path, ema: Ema) -> dict:
    entries = {
        "data": "digits",
        "backbone": {"name": "mlp"},
        "objective": "velocity",
        "ema": ema.model_dump(mode="json"),
        "train": {"steps": 3000, "folder": str(folder)},
    }
    return resolve(entries).model_dump(mode="json")


def stored(folder: Path, states, snapshots: int, ema: Ema = SETTINGS) -> Path:
    """A run whose step counts 10 skipped ones before the first update."""
    for update in range(COUNT // snapshots, COUNT + 1, COUNT // snapshots):
        tracks = {name: states[update][name] for name in ema.names if name != "ema"}
        state = {"updates": update, "version": "1.2.3", "configuration": configuration(folder, ema)}
        checkpoints.write(folder / "averages", update + 10, Snapshot(tracks, state), Keep(1, every=1))
    return folder


def path(run: Path, update: int) -> Path:
    return run / "averages" / f"step-{update + 10:09d}"


def error(found: Tensor, kept: Tensor, last: Tensor) -> float:
    """Relative to how far averaging moves the weights."""
    return float((found.double() - kept).norm() / (kept.double() - last).norm())


# --- the least squares -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("snapshots", "bound"), [(4, 0.1), (8, 2.5e-2), (16, 5e-3), (32, 1e-3)])
def test_a_reconstruction_is_the_average_that_was_kept(snapshots, bound, walk):
    """A random walk; bounds from the same experiment with EDM2's own code, for widths from 0.07 to 0.20."""
    states, last = walk
    ends = range(COUNT // snapshots, COUNT + 1, COUNT // snapshots)
    profiles = [Profile(exponent(length), end) for end in ends for length in STORED]
    tensors = [states[end][f"ema-{length:.3f}"]["weight"].double() for end in ends for length in STORED]
    for length in ASKED[1:]:
        weights, residual = solve_weights(profiles, Profile(exponent(length), COUNT))
        found = sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True))
        assert error(found, states[COUNT][f"ema-{length:.3f}"]["weight"], last) < min(bound, residual)
        assert sum(weights) == pytest.approx(1.0, rel=1e-12)


def test_a_length_that_was_stored_is_found_again():
    profiles = [Profile(exponent(length), end) for end in (300, 700, 1000) for length in STORED]
    weights, residual = solve_weights(profiles, profiles[-1])
    assert np.abs(weights - np.eye(6)[5]).max() < 1e-9 and residual < 1e-6


def test_the_residual_is_the_distance_of_the_profiles():
    """By numerical integration over a fine grid."""
    ends = (250, 500, 1000)
    profiles = [Profile(exponent(length), end) for end in ends for length in STORED]
    target = Profile(exponent(0.15), 1000)
    weights, residual = solve_weights(profiles, target)
    t = (np.arange(10**6) + 0.5) / 1000

    def values(profile):
        inside = np.where(t < profile.end, t, 0.0)
        return (profile.gamma + 1) / profile.end * (inside / profile.end) ** profile.gamma

    difference = sum(w * values(p) for w, p in zip(weights, profiles, strict=True)) - values(target)
    assert residual == pytest.approx(np.sqrt((difference**2).mean() / (values(target) ** 2).mean()), rel=1e-3)


# --- a run's snapshots -----------------------------------------------------------------------------------------------


def test_of_a_run(walk, tmp_path):
    """The newest step, and an earlier one; buffers are those of the step."""
    states, last = walk
    run = stored(tmp_path / "run", states, 16)
    for update, step in ((COUNT, None), (COUNT // 2, COUNT // 2 + 10)):
        found = reconstruct(run, 0.07, step)
        kept = states[update]["ema-0.070"]
        assert error(found["weight"], kept["weight"], last) < 5e-3 and found["weight"].dtype == torch.float32
        assert torch.equal(found["mean"], kept["mean"]) and torch.equal(found["seen"], kept["seen"])
        assert int(found["seen"]) == 3 * update and found.keys() == kept.keys()


def test_the_command_writes_weights_and_how_they_came_about(walk, tmp_path, capsys):
    states, last = walk
    run = stored(tmp_path / "run", states, 16)
    assert main([str(run), "--length", "0.13"]) == 0
    file = run / f"ema-0.130-step-{COUNT + 10:09d}.safetensors"
    record = json.loads(file.with_suffix(".json").read_text())
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [str(file), str(file.with_suffix(".json"))] and "from 16 snapshots" in printed[2]
    loaded, weights = load_exported(file)
    assert loaded == resolve(record["configuration"])
    assert error(weights["weight"], states[COUNT]["ema-0.130"]["weight"], last) < 5e-3
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (record["step"], record["updates"], record["length"]) == (COUNT + 10, COUNT, 0.13)
    assert record["configuration"]["ema"]["lengths"] == [0.05, 0.1] and 0 < record["residual"] < 0.02
    assert list(record["snapshots"]) == [f"step-{update + 10:09d}" for update in range(128, COUNT + 1, 128)]
    summed = sum(
        weight * states[int(name[5:]) - 10][track]["weight"].double()
        for name, tracks in record["snapshots"].items()
        for track, weight in tracks.items()
    )
    assert float((weights["weight"] - summed).abs().max()) < 1e-4  # of weights of size 45
    assert sorted(path.name for path in run.iterdir()) == ["averages", file.with_suffix(".json").name, file.name]


def test_as_a_module_with_an_output(walk, tmp_path, monkeypatch):
    run = stored(tmp_path / "run", walk[0], 8)
    output = tmp_path / "new" / "weights.safetensors"
    words = ["posthoc", str(run), "--length", "0.1", "--step", str(COUNT + 10), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.delitem(sys.modules, "pathline.training.posthoc")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("pathline.training.posthoc", run_name="__main__")
    assert ended.value.code == 0 and output.with_suffix(".json").exists()
    assert torch.allclose(load_file(output)["weight"], walk[0][COUNT]["ema-0.100"]["weight"], atol=1e-4)
    assert output.stat().st_mode == output.with_suffix(".json").stat().st_mode


@pytest.mark.parametrize("length", [0.039, 0.281, 0.0, -0.1, float("nan"), float("inf")])
def test_lengths_out_of_range_are_refused(length, tmp_path):
    with pytest.raises(InputError, match=rf"got length {length}, expected 0.04 <= length <= 0.28"):
        plan(tmp_path, length)


def test_what_is_too_little_is_refused(walk, tmp_path, capsys):
    """No snapshot, too few, too few for this length, one track alone, a step without one, a wrong name."""
    run = stored(tmp_path / "run", walk[0], 8)
    with pytest.raises(CheckpointError, match=r"got no snapshot in .*averages; train with two ema\.lengths"):
        plan(tmp_path, 0.13)
    with pytest.raises(CheckpointError, match=r"got 3 snapshots in .*, too few for length 0\.13: residual 0\.\d\d, "):
        plan(run, 0.13, 3 * COUNT // 8 + 10)
    with pytest.raises(CheckpointError, match=r"got 8 snapshots in .*, too few for length 0\.28: residual 0\.3\d, "):
        plan(run, 0.28)
    with pytest.raises(InputError, match=r"got step 300, expected that of a snapshot: 266, 522, "):
        plan(run, 0.13, 300)
    state = {"updates": COUNT, "configuration": {"ema": {"lengths": [0.05]}}}
    tracks = {"ema-0.050": walk[0][COUNT]["ema-0.050"]}
    checkpoints.write(tmp_path / "one" / "averages", 3, Snapshot(tracks, state), Keep(1, every=1))
    with pytest.raises(CheckpointError, match=r"got snapshots in .* without two lengths .*; see ema\.lengths"):
        plan(tmp_path / "one", 0.05)
    assert main([str(run), "--length", "0.13", "--output", "weights.npz"]) == 2
    assert "expected a name that ends in .safetensors" in capsys.readouterr().err


def test_damaged_snapshots_are_refused_by_name(walk, tmp_path, capsys):
    run = stored(tmp_path / "run", walk[0], 8)
    weights = path(run, COUNT // 2) / "ema-0.100.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main([str(run), "--length", "0.13"]) == 2
    assert weights.name in capsys.readouterr().err and [entry.name for entry in run.iterdir()] == ["averages"]
    for state in ({"updates": 5}, {"updates": "many", "configuration": {"ema": {"lengths": [0.05, 0.1]}}}):
        other = tmp_path / str(state["updates"])
        checkpoints.write(other / "averages", 7, Snapshot({"ema-0.050": {"weight": torch.ones(2)}}, state), Keep(1))
        with pytest.raises(CheckpointError, match=r"got .*step-000000007, which tells no lengths or updates"):
            plan(other, 0.13)


def test_snapshots_of_other_lengths_do_not_mix(walk, tmp_path):
    run = stored(tmp_path / "run", walk[0], 8)
    other = Ema(lengths=(0.05, 0.20), snapshot_every=COUNT // 8)
    state = {"updates": COUNT + 5, "configuration": configuration(run, other)}
    tracks = {name: walk[0][COUNT][name] for name in ("ema-0.050", "ema-0.200")}
    checkpoints.write(run / "averages", COUNT + 15, Snapshot(tracks, state), Keep(1, every=1))
    with pytest.raises(CheckpointError, match="without two lengths that are the same in all"):
        plan(run, 0.13)


def test_a_snapshot_before_the_first_update_is_passed_over(walk, tmp_path):
    run = stored(tmp_path / "run", walk[0], 8)
    state = {"updates": 0, "configuration": configuration(run, SETTINGS)}
    tracks = {name: walk[0][COUNT][name] for name in ("ema-0.050", "ema-0.100")}
    checkpoints.write(run / "averages", 5, Snapshot(tracks, state), Keep(1, every=1))
    assert len(plan(run, 0.13).weights) == 8
