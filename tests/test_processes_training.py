"""One run on one process, on several, cut up over several, and on another number after each stop: the same run."""

from __future__ import annotations

import hashlib
import json
import math
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from pathline.core.config import resolve
from pathline.core.errors import ConfigurationError
from pathline.data import Digits
from pathline.training import Trainer, checkpoints
from pathline.training.log import read_rows
from pathline.training.network import units
from pathline.training.step import take_step

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

STEPS, BATCH, EVERY = 6, 16, 3
TIMED = {"images_per_second", "data_wait_share", "checkpoint_share", "memory_gib"}
GROUPS = {"model", "optim", "ema", "ema-0.100", "ema-0.250"}


class World(NamedTuple):
    """How a run is spread."""

    count: int
    strategy: str = "auto"


WORLDS = {
    "one": World(1),
    "ddp of 2": World(2, "ddp"),
    "ddp of 4": World(4, "ddp"),
    "fsdp of 2": World(2, "fsdp"),
    "fsdp of 4": World(4, "fsdp"),
}


def configuration(folder, world="one", **sections):
    """A tiny branched network on the digits, 6 steps of 16 images, gradients clipped; saved at steps 3 and 6."""
    count, strategy = WORLDS[world]
    backbone = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 12, "depth": 2, "num_heads": 3}
    train = {"steps": STEPS, "global_batch": BATCH, "seed": 5, "folder": str(folder), "accelerator": "cpu"}
    entries = {
        "data": "digits",
        "backbone": {"name": "deepflow", **backbone, "num_classes": 10, "cuts": [1], "acceleration_width": 7},
        "objective": {"name": "deepflow", "times": "logit-normal"},
        # with its usual eps Adam turns a gradient of rounding alone, as where a sum is zero, into a step of either sign
        "optim": {"lr": 3e-3, "warmup_steps": 2, "schedule": "cosine", "clip": 0.5, "eps": 1e-2},
        "ema": {"decay": 0.9, "lengths": [0.1, 0.25]},
        "solver": {"name": "euler", "steps": 1},
        "train": {**train, "devices": count, "strategy": strategy, "timeout": 30.0},
        "log": {"every": 4, "tensorboard": False},
        "checkpoint": {"every": EVERY, "keep": 9},
    }
    for name, section in sections.items():
        entries[name] = section if name in ("backbone", "objective") else {**entries[name], **section}
    return resolve(entries)


def watched(trainer):
    """Note what the objective receives: step, sample id, and a hash of data, noise, label and time of each sample."""
    seen, loss = [], trainer.parts.objective.loss

    def noted(backbone, data, noise, draws, features, conditions):
        result = loss(backbone, data, noise, draws, features, conditions)
        for i, sample in enumerate(draws.ids):
            parts = (data[i], noise[i], conditions["label"][i], result.times[i])
            content = b"".join(part.numpy().tobytes() for part in parts)
            seen.append([draws.step, int(sample), hashlib.sha256(content).hexdigest()])
        return result

    trainer.parts.objective.loss = noted
    return seen


def run(processes, configuration, resume=None, prepare=None):
    """Train in as many processes as configured; return what the objectives received, in order of steps and ids."""

    def work():
        trainer = Trainer(configuration)
        seen = watched(trainer)
        if prepare is not None:
            prepare(trainer)
        if resume is not None:
            trainer.resume(resume)
        trainer.run()
        return seen

    count = configuration.train.devices
    parts = [work()] if count == 1 else processes(count, work, timeout=120).checked()
    return sorted(sample for part in parts for sample in part)


def saved(folder, step=STEPS):
    """The whole tensors of a checkpoint."""
    groups = checkpoints.read(folder / "checkpoints" / f"step-{step:09d}").tensors
    assert groups.keys() == GROUPS
    return {f"{group}.{name}": tensor for group, named in groups.items() for name, tensor in named.items()}


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


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Folder and stream of the unbroken run of each world, made when they are first asked for."""
    root, made = tmp_path_factory.mktemp("unbroken"), {}

    def find(world, processes):
        if world not in made:
            folder = root / world.replace(" ", "-")
            made[world] = folder, run(processes, configuration(folder, world))
        return made[world]

    return find


# --- the same weights and the same stream, however they are spread ----------------------------------------------------


def test_the_stream_is_of_every_sample_once_and_gradients_are_clipped(unbroken, processes):
    """What the others are compared with: ids are consecutive over steps, no two samples see the same noise."""
    folder, stream = unbroken("one", processes)
    assert [(step, sample) for step, sample, _ in stream] == [(i // BATCH, i) for i in range(STEPS * BATCH)]
    assert len({content for *_, content in stream}) == STEPS * BATCH
    assert max(row["gradient_norm"] for row in read_rows(folder)) > 0.5
    assert difference(saved(folder, EVERY), saved(folder)) > 1e-3


MICRO = {2: (None, 4, 2, 5), 4: (None, 2, 1, 3)}  # one micro-batch a step, two, four, and an uneven last one
SPREAD = [(world, micro) for world in WORLDS if world != "one" for micro in MICRO[WORLDS[world].count]]
DEFAULT = {("ddp of 2", 5), ("fsdp of 2", 5)}
DEFAULT_OR_SLOW = [pytest.param(*it, marks=() if it in DEFAULT else pytest.mark.slow) for it in SPREAD]


@pytest.mark.parametrize(("world", "micro"), DEFAULT_OR_SLOW)
def test_several_processes_equal_one(world, micro, unbroken, processes, tmp_path):
    """Weights, moments and all averages, rows of the log, and bit for bit what the objective receives."""
    folder, stream = unbroken("one", processes)
    assert run(processes, configuration(tmp_path, world, train={"micro_batch": micro})) == stream
    for step in (EVERY, STEPS):
        assert difference(saved(folder, step), saved(tmp_path, step)) < 1e-6
    for row, other in zip(untimed(folder), untimed(tmp_path), strict=True):
        assert row == pytest.approx(other, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("micro", [8, 4, 5])
def test_one_process_in_micro_batches_equals_itself(micro, unbroken, processes, tmp_path):
    folder, stream = unbroken("one", processes)
    assert run(processes, configuration(tmp_path, train={"micro_batch": micro})) == stream
    assert difference(saved(folder), saved(tmp_path)) < 1e-6


def test_the_first_process_alone_looks_at_the_data(processes, tmp_path):
    """What may take minutes, at the beginning and at a resume: the others are told."""

    def blind(trainer):
        looked = property(lambda self: pytest.fail("looked at the data"))
        if not trainer.fabric.is_global_zero:
            Digits.manifest = Digits.statistics = looked  # of this process alone

    folder, stored = tmp_path / "x", {"snapshot_every": EVERY}
    run(processes, configuration(folder, "ddp of 2", train={"stop_at": EVERY}, ema=stored), prepare=blind)
    run(
        processes,
        configuration(folder, "ddp of 2", ema=stored),
        folder / "checkpoints" / f"step-{EVERY:09d}",
        prepare=blind,
    )
    for place in ("checkpoints", "averages"):
        state = checkpoints.read_state(folder / place / f"step-{STEPS:09d}")
        assert state["data"] == json.loads(json.dumps(Digits().manifest)) and state["statistics"] == Digits().statistics


@pytest.mark.slow
def test_muon_in_two_processes_equals_muon_in_one(processes, tmp_path, monkeypatch):
    """Orthogonalised in float32 here: in bfloat16, as torch has it, a gradient's last bit moves it by a percent."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    muon = {"name": "muon", "lr": 1e-3}
    run(processes, configuration(tmp_path / "one", optim=muon))
    run(processes, configuration(tmp_path / "two", "ddp of 2", optim=muon))
    assert difference(saved(tmp_path / "one"), saved(tmp_path / "two")) < 1e-6


def test_muon_is_refused_where_weights_are_cut_up(tmp_path):
    with pytest.raises(
        ConfigurationError, match=r"train\.strategy: got fsdp with optim.name muon.*; use ddp, or adamw"
    ):
        configuration(tmp_path, "fsdp of 2", optim={"name": "muon"})


@pytest.mark.parametrize("world", ["ddp of 2", pytest.param("fsdp of 2", marks=pytest.mark.slow)])
def test_an_objective_that_differentiates_forward_trains_in_several_processes(world, processes, tmp_path):
    """Average velocities, whose loss calls the network within ``torch.func.jvp``."""
    backbone = {"name": "sit", "input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 12, "depth": 2}
    sit = {**backbone, "num_heads": 3, "num_classes": 10, "takes_gap": True}
    mean_flow = {"backbone": sit, "objective": {"name": "mean-flow", "share": 0.75}, "optim": {"eps": 1e-2}}
    several = {**mean_flow, "train": {"micro_batch": 5}}
    assert run(processes, configuration(tmp_path / "one", **mean_flow)) == run(
        processes, configuration(tmp_path / "several", world, **several)
    )
    assert difference(saved(tmp_path / "one"), saved(tmp_path / "several")) < 1e-6


# --- what goes between processes --------------------------------------------------------------------------------------


def collectives(configuration):
    """What gloo carries in the third step: (kind, values) one by one; then the network's parameters and units."""
    trainer = Trainer(configuration)
    for _ in range(2):  # DDP looks at the first ones to lay out its buckets
        take_step(trainer.state)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        take_step(trainer.state)
    carried = [
        [event.name.removeprefix("gloo:"), sum(map(math.prod, event.input_shapes))]
        for event in profiled.events()
        if event.name.startswith("gloo:")
    ]
    network = trainer.state.network
    return carried, sum(p.numel() for p in network.parameters()), len(units(network))


@pytest.mark.parametrize("micro", [pytest.param(None, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("world", ["ddp of 2", "fsdp of 2"])
def test_gradients_are_reduced_once_a_step_and_nothing_else_of_size(world, micro, processes, tmp_path):
    """Also where a step has three micro-batches. A barrier would make the host wait for the device."""
    c = configuration(tmp_path, world, train={"micro_batch": micro})
    for carried, parameters, blocks in processes(2, collectives, c).checked():
        reduced = [values for kind, values in carried if kind == "all_reduce"]  # gloo's reduce-scatter is one
        large = [values for values in reduced if values > 100]
        assert len(large) == (1 if "ddp" in world else blocks + 1)
        assert parameters <= sum(large) <= 1.01 * parameters  # shards are padded to one size
        assert len(reduced) - len(large) <= 2
        others = {kind for kind, _ in carried} - {"all_reduce"}
        assert others == (set() if "ddp" in world else {"all_gather"})


# --- stopped, and gone on with on another number of processes ---------------------------------------------------------

CHANGES = [
    ("one", "ddp of 2", None),
    ("ddp of 2", "one", 4),
    ("ddp of 2", "ddp of 4", 1),
    ("ddp of 4", "ddp of 2", 2),
    ("ddp of 2", "fsdp of 2", None),
    ("fsdp of 2", "ddp of 2", 5),
    ("fsdp of 2", "one", None),
    ("one", "fsdp of 2", 2),
    ("fsdp of 2", "fsdp of 4", 1),
    ("fsdp of 4", "fsdp of 2", None),
]
EARLY = {("one", "ddp of 2", None), ("fsdp of 2", "one", None)}


@pytest.mark.parametrize(
    ("before", "after", "micro"), [pytest.param(*it, marks=() if it in EARLY else pytest.mark.slow) for it in CHANGES]
)
def test_a_run_goes_on_with_another_number_of_processes(before, after, micro, unbroken, processes, tmp_path):
    """The same global batch: the same samples, noise, labels and times at each step, and the weights of one process."""
    folder, stream = unbroken("one", processes)
    stopped, _ = unbroken(before, processes)
    c = configuration(tmp_path, after, train={"micro_batch": micro})
    seen = run(processes, c, resume=stopped / "checkpoints" / f"step-{EVERY:09d}")
    assert seen == [sample for sample in stream if sample[0] >= EVERY]
    assert difference(saved(folder), saved(tmp_path)) < 1e-6
    expected = [row for row in untimed(folder) if row["step"] > EVERY]
    for row, other in zip(expected, untimed(tmp_path), strict=True):  # the window that was open goes on
        assert row == pytest.approx(other, rel=1e-4)


def spoilt(trainer):
    """Make a sample's data infinite at steps 2 and 6: before the stop and after."""
    batch, position = trainer.parts.dataset.batch, trainer.parts.dataset.indices_at
    asked = []

    def indices_at(positions, seed):
        asked[:] = positions
        return position(positions, seed)

    def spoil(indices):
        read = batch(indices)
        if asked[-1] in (2 * BATCH - 1, 6 * BATCH - 1):  # the last process has it
            read["data"][-1] = math.inf
        return read

    trainer.parts.dataset.indices_at, trainer.parts.dataset.batch = indices_at, spoil


@pytest.mark.parametrize(
    "world",
    ["fsdp of 2", *(pytest.param(world, marks=pytest.mark.slow) for world in ("ddp of 2", "ddp of 4", "fsdp of 4"))],
)
def test_stopped_and_resumed_on_the_same_processes_is_unbroken_bit_for_bit(world, processes, tmp_path):
    """Weights, moments, averages, rows and incidents; step 5 lies within a window, and two steps are skipped."""
    whole = run(processes, configuration(tmp_path / "a", world), prepare=spoilt)
    first = run(processes, configuration(tmp_path / "b", world, train={"stop_at": 5}), prepare=spoilt)
    path = tmp_path / "b" / "checkpoints" / "step-000000005"
    second = run(processes, configuration(tmp_path / "b", world), resume=path, prepare=spoilt)
    assert first + second == whole
    assert difference(saved(tmp_path / "a"), saved(tmp_path / "b")) == 0
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    incidents = [(tmp_path / name / "incidents.jsonl").read_text() for name in "ab"]
    assert incidents[0] == incidents[1]
    assert [json.loads(line)["step"] for line in incidents[0].splitlines()] == [2, 6]
    states = [json.loads((tmp_path / n / "checkpoints" / "step-000000006" / "state.json").read_text()) for n in "ab"]
    assert states[0]["skipped"] == 2 and states[0]["averages"] == {"updates": 4}
    assert torch.equal(*(torch.tensor(state["guard"]["means"]) for state in states))
