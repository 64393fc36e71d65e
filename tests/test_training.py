"""The loop against the same steps written out by hand, and against itself under every split of the work."""

from __future__ import annotations

import json
import math
import os
import signal
import warnings
from itertools import pairwise

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from PIL import Image

from pathline import Draws
from pathline.core.config import resolve
from pathline.core.errors import CheckpointError
from pathline.core.sections import Optim
from pathline.training import Interrupted, Trainer, checkpoints, loop, sampling
from pathline.training.export import export
from pathline.training.log import mean_over_last_steps, read_rows
from pathline.training.optim import learning_rate
from pathline.training.pictures import grid, to_uint8

TIMED = {"images_per_second", "data_wait_share", "checkpoint_share", "memory_gib"}
# with its usual eps Adam turns a gradient of rounding alone, as where a sum is zero, into a step of either sign
SMOOTH = {"eps": 1e-2}


def configuration(folder, **sections):
    """A tiny branched network on the digits, 10 steps of 6 images."""
    entries = {
        "data": "digits",
        "backbone": {
            "name": "deepflow",
            "input_size": 8,
            "patch_size": 4,
            "in_channels": 1,
            "hidden_size": 12,
            "depth": 2,
            "num_heads": 3,
            "num_classes": 10,
            "cuts": [1],
            "acceleration_width": 7,
        },
        "objective": {"name": "deepflow", "times": "logit-normal"},
        "optim": {"lr": 3e-3, "warmup_steps": 4, "schedule": "cosine", "clip": 0.5},
        "ema": {"decay": 0.9},
        "solver": {"name": "euler", "steps": 2},
        "train": {"steps": 10, "global_batch": 6, "seed": 5, "folder": str(folder), "accelerator": "cpu"},
        "log": {"every": 3},
        "checkpoint": {"every": 5, "keep": 9},
    }
    for name, section in sections.items():
        entries[name] = {**entries.get(name, {}), **section} if isinstance(section, dict) else section
    return resolve(entries)


def trained(folder, **sections):
    trainer = Trainer(configuration(folder, **sections))
    trainer.run()
    return trainer


def tensors(trainer):
    return {
        f"{group}.{key}": value.clone()
        for group, named in trainer.state.snapshot().tensors.items()
        for key, value in named.items()
    }


def difference(first, second):
    assert first.keys() == second.keys() and len(first) > 50
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)


def untimed(folder):
    """Rows without speeds; the bins of a loss one by one, without the empty ones."""
    rows = []
    for row in read_rows(folder):
        bins = {f"bin {i}": value for i, value in enumerate(row.pop("loss_by_time")) if value is not None}
        rows.append({key: value for key, value in {**row, **bins}.items() if key not in TIMED})
    return rows


# --- against the same written by hand --------------------------------------------------------------------------------


def test_three_steps_are_those_written_out_by_hand(tmp_path):
    """Plain loop: unfused AdamW, clipping by hand, averages by hand, on the same draws and order of data."""
    trainer = trained(tmp_path, optim=SMOOTH, train={"stop_at": 3})
    fresh = Trainer(configuration(tmp_path / "other"))
    parts, network = fresh.parts, fresh.parts.backbone
    average = {key: value.clone() for key, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1.0, eps=1e-2, weight_decay=0.0, fused=False)
    for step in range(3):
        positions = range(6 * step, 6 * step + 6)
        batch = parts.dataset.batch(parts.dataset.indices_at(positions, 5))
        draws = Draws(5).at(positions, step=step)
        optimizer.zero_grad()
        parts.objective(network, batch["data"], draws, label=batch["label"]).total.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in network.parameters()))
        for p in network.parameters():
            p.grad *= min(1.0, 0.5 / norm)
        optimizer.param_groups[0]["lr"] = 3e-3 * (step + 1) / 4
        optimizer.step()
        decay = min(0.9, (1 + step) / (10 + step))
        average = {key: decay * average[key] + (1 - decay) * value for key, value in network.state_dict().items()}
    ours = trainer.state.network.state_dict()
    assert max(float((ours[key] - value).abs().max()) for key, value in network.state_dict().items()) < 1e-6
    averaged = trainer.state.averages.network().state_dict()
    assert max(float((averaged[key] - value).abs().max()) for key, value in average.items()) < 1e-6


def test_rows_hold_means_over_their_window(tmp_path):
    """Rows every 3 steps equal the means of rows at every step."""
    trained(tmp_path / "coarse", log={"every": 3})
    trained(tmp_path / "fine", log={"every": 1})
    coarse, fine = read_rows(tmp_path / "coarse"), read_rows(tmp_path / "fine")
    assert [row["step"] for row in coarse] == [3, 6, 9, 10] and [row["window"] for row in coarse] == [3, 3, 3, 1]
    for name in ("loss", "deep", "acceleration", "velocity", "velocity_1", "gradient_norm"):
        expected = sum(row[name] for row in fine[3:6]) / 3
        assert coarse[1][name] == pytest.approx(expected, rel=1e-6)
    assert coarse[0]["lr"] == pytest.approx(3e-3 * 3 / 4)
    assert coarse[0]["loss"] == pytest.approx(coarse[0]["deep"] + coarse[0]["acceleration"], rel=1e-6)
    assert coarse[0]["images_per_second"] > 0
    mean, covered = mean_over_last_steps(coarse, "velocity", 4)
    assert covered == 4
    assert mean == pytest.approx(sum(row["velocity"] for row in fine[-4:]) / 4, rel=1e-6)


def test_learning_rate_is_warm_up_then_half_a_cosine():
    settings = Optim(lr=2.0, warmup_steps=4, schedule="cosine", final_lr_fraction=0.25)
    assert [learning_rate(settings, step, 12) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate(settings, 8, 12) == pytest.approx(2.0 * (1 + 0.25) / 2)  # half way: the mean of both ends
    assert learning_rate(settings, 12, 12) == pytest.approx(0.5)
    constant = Optim(lr=2.0, warmup_steps=2)
    assert [learning_rate(constant, step, 9) for step in (0, 1, 2, 8)] == [1.0, 2.0, 2.0, 2.0]


# --- the same weights whatever the split -----------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 4, 5])
def test_accumulation_equals_the_whole_batch(micro, tmp_path):
    """Also where the last micro-batch is smaller: 4 + 2, 5 + 1."""
    whole = trained(tmp_path / "whole", optim=SMOOTH)
    split = trained(tmp_path / "split", optim=SMOOTH, train={"micro_batch": micro})
    assert difference(tensors(whole), tensors(split)) < 1e-6
    for row, other in zip(untimed(tmp_path / "whole"), untimed(tmp_path / "split"), strict=True):
        assert row == pytest.approx(other, rel=1e-4)


def _rank(fabric, configuration):
    Trainer(configuration, fabric=fabric).run()


def two_processes(configuration):
    fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(start_method="fork"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric.launch(_rank, configuration)


@pytest.mark.parametrize("micro", [None, 2])
def test_two_processes_equal_one(micro, tmp_path):
    """Gloo, half of each batch in each process; also with accumulation 2 + 1."""
    one = trained(tmp_path / "one", optim=SMOOTH)
    two = configuration(tmp_path / "two", optim=SMOOTH, train={"devices": 2, "micro_batch": micro})
    two_processes(two)
    after = Trainer(two, fabric=Fabric(accelerator="cpu", devices=1))
    after.resume(tmp_path / "two" / "checkpoints" / "step-000000010")
    assert difference(tensors(one), tensors(after)) < 1e-6
    for row, other in zip(untimed(tmp_path / "one"), untimed(tmp_path / "two"), strict=True):
        assert row == pytest.approx(other, rel=1e-4)


# --- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [5, 7])
def test_resumed_equals_unbroken_bit_for_bit(stop, tmp_path):
    """Weights, averages, optimizer and rows; step 5 and 7 lie within a window of the log."""
    unbroken = trained(tmp_path / "a", log={"every": 4}, checkpoint={"every": 100})
    trained(tmp_path / "b", log={"every": 4}, checkpoint={"every": stop}, train={"stop_at": 9})
    resumed = Trainer(configuration(tmp_path / "b", log={"every": 4}, checkpoint={"every": 100}))
    resumed.resume(tmp_path / "b" / "checkpoints" / f"step-{stop:09d}")
    assert resumed.state.step == stop and resumed.state.position == 6 * stop
    resumed.run()
    assert difference(tensors(unbroken), tensors(resumed)) == 0
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    late = (tmp_path / "b" / "metrics.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in late] == [8]


def test_a_row_cut_short_by_a_kill_is_set_aside(tmp_path):
    trained(tmp_path, train={"stop_at": 5})
    assert [row["step"] for row in read_rows(tmp_path)] == [3]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    resumed = Trainer(configuration(tmp_path))
    resumed.resume(tmp_path / "checkpoints" / "step-000000005")
    resumed.run()
    assert [row["step"] for row in read_rows(tmp_path)] == [3, 6, 9, 10]


def test_a_failed_resume_changes_nothing(tmp_path):
    trained(tmp_path, train={"stop_at": 5})
    path = tmp_path / "checkpoints" / "step-000000005"
    other = Trainer(configuration(tmp_path / "other", optim={"lr": 7e-3}, train={"seed": 6}))
    before = tensors(other)
    with pytest.raises(CheckpointError) as error:
        other.resume(path)
    for line in ("optim.lr: 0.003 -> 0.007", "train.seed: 5 -> 6"):
        assert line in str(error.value)
    assert "train.folder: " not in str(error.value)
    assert difference(before, tensors(other)) == 0 and other.state.step == 0


@pytest.mark.parametrize("entry", ["window", "guard", "averages"])
def test_scalars_that_cannot_be_change_nothing(entry, tmp_path):
    """A state of right form and hash, whose inner parts are missing."""
    trained(tmp_path, train={"stop_at": 5})
    path = tmp_path / "checkpoints" / "step-000000005"
    saved = checkpoints.read(path)
    forged = {**saved.state, entry: {"other": 1}}
    path = checkpoints.write(tmp_path / "forged", 5, checkpoints.Snapshot(saved.tensors, forged), checkpoints.Keep(1))
    other = Trainer(configuration(tmp_path))
    before = tensors(other)
    with pytest.raises(CheckpointError, match="with scalars that cannot be"):
        other.resume(path)
    assert difference(before, tensors(other)) == 0 and other.state.step == 0 and not other.state.window.records


def test_what_does_not_move_a_weight_may_change(tmp_path):
    """All free entries but the device count, which has a test of its own; the weights are those of the first run."""
    unbroken = trained(tmp_path, optim=SMOOTH)
    changed = configuration(
        tmp_path / "other",
        optim=SMOOTH,
        train={"micro_batch": 2, "threads": None, "stop_at": 9},
        log={"every": 1, "pictures_every": 6},
        checkpoint={"keep": 1},
        solver={"steps": 3},
        guidance=[{"name": "cfg", "scale": 2}],
    )
    resumed = Trainer(changed)
    resumed.resume(tmp_path / "checkpoints" / "step-000000005")
    resumed.run()
    again = Trainer(configuration(tmp_path / "other", optim=SMOOTH))
    again.resume(tmp_path / "other" / "checkpoints" / "step-000000009")
    again.run()
    assert again.state.step == 10 and difference(tensors(unbroken), tensors(again)) < 1e-6


def test_a_longer_run_goes_on_only_where_the_schedule_is_constant(tmp_path):
    """Half a cosine over 12 steps is another learning rate from the first step than over 10."""
    trained(tmp_path / "cosine", train={"stop_at": 5})
    longer = Trainer(configuration(tmp_path / "cosine", train={"steps": 12}))
    with pytest.raises(CheckpointError, match=r"train.steps: 10 -> 12"):
        longer.resume(tmp_path / "cosine" / "checkpoints" / "step-000000005")
    constant = {"schedule": "constant"}
    unbroken = trained(tmp_path / "long", optim=constant, train={"steps": 12})
    trained(tmp_path / "short", optim=constant)
    resumed = Trainer(configuration(tmp_path / "short", optim=constant, train={"steps": 12}))
    resumed.resume(tmp_path / "short" / "checkpoints" / "step-000000010")
    resumed.run()
    assert difference(tensors(unbroken), tensors(resumed)) == 0


def test_going_back_to_an_older_checkpoint_leaves_the_later_ones_under_another_name(tmp_path):
    """The steps are trained again and saved: what the folder calls step 10 then is this history's."""
    trained(tmp_path)
    path = tmp_path / "checkpoints" / "step-000000010" / "model.safetensors"
    path.write_bytes(b"another history")
    again = Trainer(configuration(tmp_path))
    again.resume(tmp_path / "checkpoints" / "step-000000005")
    aside = tmp_path / "checkpoints" / "superseded-step-000000010-1"
    assert not path.exists() and (aside / "model.safetensors").read_bytes() == b"another history"
    again.run()
    third = Trainer(configuration(tmp_path))
    third.resume(tmp_path / "checkpoints" / "step-000000010")  # verified, so whole
    assert difference(tensors(again), tensors(third)) == 0 and aside.exists()


def test_what_a_run_without_a_checkpoint_left_is_no_part_of_the_next_one(tmp_path, monkeypatch):
    """Killed before its first checkpoint, with averages stored; the next one in the folder is of another rate."""

    def killed(self, *, last):
        raise KeyboardInterrupt

    averages = {"ema": {"lengths": [0.1, 0.25], "snapshot_every": 2}}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path, **averages)
    assert (tmp_path / "averages" / "step-000000002").exists()
    second = Trainer(configuration(tmp_path, optim={"lr": 1e-5}, **averages))
    second.run()
    stored = checkpoints.read_state(tmp_path / "averages" / "step-000000002")
    assert stored["configuration"]["optim"]["lr"] == 1e-5
    assert (tmp_path / "averages" / "superseded-step-000000002-1").exists()


@pytest.mark.parametrize(
    ("objective", "refused"), [({}, False), ({"coupling": "exact"}, True), ({"coupling": "independent"}, False)]
)
def test_the_split_of_a_batch_may_change_unless_the_objective_mixes_samples(objective, refused, tmp_path):
    trained(tmp_path, objective=objective, train={"stop_at": 5})
    path = tmp_path / "checkpoints" / "step-000000005"
    Trainer(configuration(tmp_path, objective=objective, train={"micro_batch": 6})).resume(path)  # which is all
    other = Trainer(configuration(tmp_path, objective=objective, train={"micro_batch": 3}))
    if not refused:
        return other.resume(path)
    with pytest.raises(CheckpointError, match=r"  train.micro_batch: None on 1 devices -> 3 on 1, and the objective"):
        other.resume(path)
    other.resume(path, ("train.micro_batch",))


def test_every_save_that_failed_is_told_also_the_last(tmp_path, monkeypatch, capsys):
    """Nothing can be written beside training: neither two checkpoints in a row, nor averages after the last of them."""

    def full(self, step, snapshot):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop.Writer, "_store", full)
    averages = {"lengths": [0.1, 0.25], "snapshot_every": 10}
    trained(tmp_path, ema=averages, checkpoint={"every": 5, "asynchronous": True})
    said = capsys.readouterr().err
    for step, folder in ((5, "checkpoints"), (10, "checkpoints"), (10, "averages")):
        assert said.count(f"the checkpoint of step {step} was not written to {tmp_path / folder}") == 1


def test_starting_from_weights(tmp_path):
    first = trained(tmp_path, train={"stop_at": 5})
    for source in (tmp_path, tmp_path / "checkpoints" / "step-000000005" / "ema.safetensors"):
        second = Trainer(configuration(tmp_path / "second", train={"seed": 9}))
        second.initialize_from(source)
        assert second.state.step == 0
        for network in (second.state.network, second.state.averages.network()):
            for key, value in first.state.averages.network().state_dict().items():
                assert torch.equal(network.state_dict()[key], value)
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        second.initialize_from(tmp_path / "nowhere")
    (tmp_path / "other.safetensors").write_bytes(b"no such thing")
    with pytest.raises(CheckpointError, match="other.safetensors, which is no safetensors file"):
        second.initialize_from(tmp_path / "other.safetensors")
    exported = export(tmp_path / "checkpoints" / "step-000000005")
    second.initialize_from(exported)
    content = bytearray(exported.read_bytes())
    content[-3] ^= 64
    exported.write_bytes(content)
    with pytest.raises(CheckpointError, match="with other contents than ema-step-000000005.json tells"):
        second.initialize_from(exported)
    narrow = Trainer(configuration(tmp_path / "narrow", backbone={"acceleration_width": 5}))
    with pytest.raises(CheckpointError, match=r"do not fit the network: refiners.*expected \(5"):
        narrow.initialize_from(tmp_path)


# --- interruptions and bad gradients ---------------------------------------------------------------------------------


def test_ctrl_c_saves_at_the_step_boundary(tmp_path, monkeypatch):
    unbroken = trained(tmp_path / "a")
    trainer = Trainer(configuration(tmp_path / "b"))
    indices_at = trainer.parts.dataset.indices_at

    def press(positions, seed):
        if positions.start == 6 * 3:  # in the middle of the fourth step
            os.kill(os.getpid(), signal.SIGINT)
        return indices_at(positions, seed)

    monkeypatch.setattr(trainer.parts.dataset, "indices_at", press)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="SIGINT after step 4 of 10; saved"):
        trainer.run()
    assert signal.getsignal(signal.SIGINT) == before
    resumed = Trainer(configuration(tmp_path / "b"))
    resumed.resume(tmp_path / "b" / "checkpoints" / "step-000000004")
    resumed.run()
    assert difference(tensors(unbroken), tensors(resumed)) == 0
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, monkeypatch):
    trainer = Trainer(configuration(tmp_path, log={"every": 2}))
    batch, calls, seen = trainer.parts.dataset.batch, [], []

    def poisoned(indices):
        calls.append(len(indices))
        return {**batch(indices), "data": batch(indices)["data"] * (1e30 if len(calls) == 4 else 1.0)}

    step = loop.take_step
    monkeypatch.setattr(trainer.parts.dataset, "batch", poisoned)
    monkeypatch.setattr(loop, "take_step", lambda state: (seen.append(tensors(trainer)), step(state)))
    trainer.run()
    seen.append(tensors(trainer))
    changes = [difference(first, second) for first, second in pairwise(seen)]
    assert changes[3] == 0 and min(changes[:3] + changes[4:]) > 0
    rows = read_rows(tmp_path)
    assert [row["skipped"] for row in rows] == [0, 1, 1, 1, 1]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"]) for row in rows)


# --- pictures and precision ------------------------------------------------------------------------------------------


def test_pictures_do_not_disturb_training(tmp_path):
    torch.manual_seed(1)
    without = trained(tmp_path / "without")
    torch.manual_seed(2)
    with_them = trained(tmp_path / "with", log={"pictures_every": 1}, solver={"name": "euler-maruyama", "steps": 3})
    assert difference(tensors(without), tensors(with_them)) == 0
    assert with_them.state.network.training


def test_picture_has_a_row_a_class_and_is_large_enough(tmp_path):
    trained(tmp_path, guidance=[{"name": "cfg", "scale": 2.0}], train={"stop_at": 1})
    width, height = Image.open(tmp_path / "samples.png").size
    assert width == height == 4 * (10 * (8 + 1) + 1)


def test_grid_puts_each_image_where_its_class_is():
    images = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 3, 2, 7)
    sheet = grid(to_uint8(images), torch.tensor([4, 1, 4, 1, 1]), columns=2)
    assert sheet.shape == (2 * 3 + 1, 2 * 8 + 1, 3)
    corners = [[int(sheet[1 + 3 * i, 1 + 8 * j, 0]) for j in range(2)] for i in range(2)]
    levels = [round(127.5 * float(x) + 127.5) for x in torch.linspace(-1, 1, 5)]
    assert corners == [[levels[1], levels[3]], [levels[0], levels[2]]]
    assert (sheet[0] == 255).all() and (sheet[3] == 255).all()


def test_bf16_trains_with_float32_weights_and_loss(tmp_path):
    trainer = trained(tmp_path, train={"precision": "bf16", "stop_at": 3}, log={"every": 1})
    assert {value.dtype for key, value in tensors(trainer).items()} == {torch.float32}
    reference = trained(tmp_path / "fp32", train={"stop_at": 3}, log={"every": 1})
    start = tensors(Trainer(configuration(tmp_path / "start")))
    change, moved = difference(tensors(trainer), tensors(reference)), difference(tensors(reference), start)
    assert 0 < change < 0.5 * moved  # half precision changes the way, and does not lose it
    rows, others = read_rows(tmp_path), read_rows(tmp_path / "fp32")
    assert rows[0]["loss"] == pytest.approx(others[0]["loss"], rel=2e-2)


def test_unconditional_networks_train_and_are_drawn(tmp_path):
    sections = dict(backbone={"num_classes": 0}, objective={"label_dropout": 0.0})
    trainer = trained(tmp_path, **sections, train={"stop_at": 2}, log={"every": 1})
    assert not any("label" in name for name in tensors(trainer))
    assert all(math.isfinite(row["loss"]) for row in read_rows(tmp_path))
    assert Image.open(tmp_path / "samples.png").size == (4 * 91, 4 * 91)
    parts = trainer.parts
    drawn = sampling.solve(parts, trainer.state.averages.network(), None, count=100, seed=0, batch=100)
    noise = Draws(0).normal("initial noise", range(100), (1, 8, 8))
    x, network = noise, trainer.state.averages.network()
    for t in (1.0, 0.5):  # two Euler steps by hand
        x = x - 0.5 * network(x, torch.full((100,), t)).detach()
    assert torch.allclose(drawn.x, x, atol=1e-5)
