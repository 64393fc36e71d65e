"""What goes wrong on one process of several: numbers, signals, disks, and processes that die or fall silent."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from pathline import train
from pathline.core.config import resolve
from pathline.training import Trainer, checkpoints, sharded
from pathline.training.folder import RunFolder
from pathline.training.log import read_rows
from pathline.training.network import local

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

BATCH, SHARE, STEPS = 6, 3, 6
LOST, INTERRUPTED, UNSAVED, DIVERGED = 70, 75, 74, 65
TIMEOUT = 10.0  # seconds of silence


def configuration(folder, strategy="ddp", count=2, **sections):
    """A tiny branched network on the digits, 6 steps of 6 images on two processes; saved at each."""
    backbone = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 12, "depth": 2, "num_heads": 3}
    base = {"steps": STEPS, "global_batch": BATCH, "seed": 5, "folder": str(folder), "accelerator": "cpu"}
    strategy = strategy if count > 1 else "auto"
    entries = {
        "data": "digits",
        "backbone": {"name": "deepflow", **backbone, "num_classes": 10, "cuts": [1], "acceleration_width": 7},
        "objective": {"name": "deepflow", "times": "logit-normal"},
        "optim": {"lr": 3e-3, "warmup_steps": 2, "clip": 0.5, "eps": 1e-2},
        "ema": {"decay": 0.9},
        "solver": {"name": "euler", "steps": 1},
        "train": {**base, "devices": count, "strategy": strategy, "timeout": TIMEOUT},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 1, "keep": 99},
    }
    for name, section in sections.items():
        entries[name] = {**entries.get(name, {}), **section}
    return resolve(entries)


def during(parts, step, act):
    """Call a function in the middle of a step, counted from 1, the first time that it is taken."""
    indices_at, done = parts.dataset.indices_at, []

    def acting(positions, seed):
        if len(positions) > 1 and positions[0] // BATCH == step - 1 and not done:  # one alone is for an incident
            done.append(step)
            act()
        return indices_at(positions, seed)

    parts.dataset.indices_at = acting


def spoilt(parts, factors):
    """Multiply the data at positions of the training stream."""
    dataset, asked = parts.dataset, []
    batch, indices_at = dataset.batch, dataset.indices_at

    def noted(positions, seed):
        asked[:] = positions
        return indices_at(positions, seed)

    def spoil(indices):
        read = batch(indices)
        for row, position in enumerate(asked):
            read["data"][row] *= factors.get(position, 1.0)
        return read

    dataset.indices_at, dataset.batch = noted, spoil


def bad_gradient(parts, step):
    """Let the gradient of a step be NaN in this process, its data and loss as they are."""
    loss = parts.objective.loss

    def hooked(backbone, data, noise, draws, features, conditions):
        result = loss(backbone, data, noise, draws, features, conditions)
        if draws.step == step - 1:
            result.total.register_hook(lambda gradient: gradient * math.nan)
        return result

    parts.objective.loss = hooked


def trained(processes, configuration, fault=lambda rank, parts: None):
    """Train in as many processes as configured; return a hash of all tensors that each ends with."""

    def work():
        trainer = Trainer(configuration)
        fault(trainer.fabric.global_rank, trainer.parts)
        trainer.run()
        tensors = [t for group in trainer.state.snapshot().tensors.values() for t in group.values()]
        return hashlib.sha256(b"".join(local(t).numpy().tobytes() for t in tensors)).hexdigest()

    count = configuration.train.devices
    return processes(count, work, timeout=120).checked() if count > 1 else [work()]


def commanded(processes, configuration, *words, fault=lambda rank, parts: None, count=2, endless=()):
    """Call ``train.py`` in each process; ``fault`` breaks something in one before it starts."""
    file, build = configuration.train.folder + ".yaml", train.build

    def work():
        def broken(configuration):
            parts = build(configuration)
            fault(int(os.environ["RANK"]), parts)
            return parts

        train.build, train.save_curves = broken, lambda folder: None  # in this process, which ends after that
        sys.exit(train.main([file, *words]))

    with open(file, "w") as opened:
        opened.write(configuration.to_yaml())
    return processes(count, work, timeout=120, endless=endless)


def tensors(folder, step):
    groups = checkpoints.read(folder / "checkpoints" / f"step-{step:09d}").tensors
    return {f"{group}.{name}": tensor for group, named in groups.items() for name, tensor in named.items()}


def difference(first, second):
    assert first.keys() == second.keys() and len(first) > 50
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)


def incidents(folder):
    return [json.loads(line) for line in (folder / "incidents.jsonl").read_text().splitlines()]


def steps_saved(folder):
    """Steps of the checkpoints, each verified by its hashes."""
    paths = sorted((folder / "checkpoints").glob("step-*"))
    return [checkpoints.verify(path).step for path in paths]


def leftovers(folder):
    return list((folder / "checkpoints").glob(".*"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Folder of the unbroken run of two processes by strategy, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("unbroken"), {}

    def find(strategy, processes):
        if strategy not in made:
            made[strategy] = root / strategy
            trained(processes, configuration(made[strategy], strategy))
        return made[strategy]

    return find


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_bad_numbers_of_one_process_make_all_skip_the_step(strategy, processes, tmp_path):
    """Step 2: a NaN in the data of the second; 4: its gradient alone; 5: a sample of the first whose loss overflows."""
    nan, huge = BATCH + SHARE + 1, 4 * BATCH + 2

    def fault(rank, parts):
        spoilt(parts, {nan: math.nan, huge: 1e30})
        if rank == 1:
            bad_gradient(parts, 4)

    c = configuration(tmp_path, strategy)
    hashes = trained(processes, c, fault)
    assert strategy == "fsdp" or hashes[0] == hashes[1]
    taken = [difference(tensors(tmp_path, step), tensors(tmp_path, step + 1)) > 0 for step in range(1, STEPS)]
    assert taken == [False, True, False, False, True]
    found = incidents(tmp_path)
    assert [(entry["step"], entry["reason"]) for entry in found] == [(2, "data"), (4, "gradient"), (5, "loss")]
    assert [found[0]["positions"], found[2]["positions"]] == [[nan], [huge]]
    assert found[1]["positions"] == list(range(3 * BATCH, 4 * BATCH))  # no sample is to blame more than another
    order = Trainer(configuration(tmp_path / "one", count=1)).parts.dataset.indices_at(range(STEPS * BATCH), 5)
    assert [entry["samples"] for entry in found] == [[int(order[p]) for p in entry["positions"]] for entry in found]
    assert [row["skipped"] for row in read_rows(tmp_path)] == [0, 1, 1, 2, 3, 3]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_roll_back_as_one_does(strategy, processes, tmp_path):
    """Steps 3 and 4 are bad, in another process each: back to step 2, and on with the samples of steps 5 to 8."""
    bad = {2 * BATCH: math.nan, 4 * BATCH - 1: math.inf}
    guard = {"rollback_after": 2}

    def fault(rank, parts):
        spoilt(parts, bad)

    two = configuration(tmp_path / "two", strategy, guard=guard)
    trained(processes, two, fault)
    trained(processes, configuration(tmp_path / "one", count=1, guard=guard), fault)
    states = [checkpoints.read_state(tmp_path / name / "checkpoints" / f"step-{STEPS:09d}") for name in ("one", "two")]
    assert [(state["step"], state["passed"], state["skipped"]) for state in states] == [(STEPS, 2, 0)] * 2
    assert difference(tensors(tmp_path / "one", STEPS), tensors(tmp_path / "two", STEPS)) < 1e-6
    assert len(list((tmp_path / "two" / "checkpoints").glob("superseded-*"))) == 2
    assert [row["step"] for row in read_rows(tmp_path / "two")] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_run_that_no_roll_back_helps_ends_on_all_processes(processes, tmp_path):
    bad = {position: math.nan for position in range(3 * BATCH + SHARE, 99 * BATCH)}
    c = configuration(tmp_path / "run", guard={"rollback_after": 2, "max_rollbacks": 1})
    ended = commanded(processes, c, fault=lambda rank, parts: spoilt(parts, bad))
    assert ended.codes == [DIVERGED, DIVERGED], ended.outputs
    assert "going back 1 times did not help" in ended.outputs[0] and not ended.outputs[1]
    (dump,) = (tmp_path / "run").glob("diverged-step-*.json")
    assert json.loads(dump.read_text())["rollbacks"] == 1


def test_weights_that_differ_between_processes_are_found_at_the_next_save(processes, unbroken, tmp_path):
    """A bit of one weight of the second process, at step 4 of checkpoints every third."""

    def fault(rank, parts):
        def flip():
            next(parts.backbone.parameters()).data.view(torch.int32).view(-1)[3] ^= 1

        if rank == 1:
            during(parts, 4, flip)

    c = configuration(tmp_path / "run", checkpoint={"every": 3})
    ended = commanded(processes, c, fault=fault)
    assert ended.codes == [LOST, LOST], ended.outputs
    assert all("weights that differ between processes" in output for output in ended.outputs)
    assert steps_saved(tmp_path / "run") == [3]
    assert commanded(processes, c, "--resume", "auto").codes == [0, 0]
    assert difference(tensors(unbroken("ddp", processes), STEPS), tensors(tmp_path / "run", STEPS)) == 0


# --- signals ---------------------------------------------------------------------------------------------------------

SIGNALS = [
    (kind, rank, strategy)
    for kind in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for rank in (0, 1)
    for strategy in ("ddp", "fsdp")
]
FEW = {(signal.SIGTERM, 1, "ddp")}


@pytest.mark.parametrize(
    ("kind", "rank", "strategy"), [pytest.param(*it, marks=() if it in FEW else pytest.mark.slow) for it in SIGNALS]
)
def test_a_signal_to_one_process_saves_and_ends_all(kind, rank, strategy, processes, unbroken, tmp_path):
    """In the middle of step 4, whose end is no time for a checkpoint."""

    def fault(own, parts):
        if own == rank:
            during(parts, 4, lambda: os.kill(os.getpid(), kind))

    c = configuration(tmp_path / "run", strategy, checkpoint={"every": 5})
    ended = commanded(processes, c, fault=fault)
    assert ended.codes == [INTERRUPTED, INTERRUPTED], ended.outputs
    assert f"{kind.name} after step 4 of 6; saved in" in ended.outputs[0]
    assert steps_saved(tmp_path / "run") == [4] and not leftovers(tmp_path / "run")
    assert commanded(processes, c, "--resume", "auto").codes == [0, 0]
    assert difference(tensors(unbroken(strategy, processes), STEPS), tensors(tmp_path / "run", STEPS)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_second_signal_leaves_at_once(rank, strategy, processes, tmp_path):
    """The process that hears it with 128 + its number, the other as after any loss."""

    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    def fault(own, parts):
        if own == rank:
            during(parts, 4, twice)

    c = configuration(tmp_path / "run", strategy, checkpoint={"every": 1})
    ended = commanded(processes, c, fault=fault)
    assert ended.codes[rank] == 128 + signal.SIGINT and ended.codes[1 - rank] == LOST, ended.outputs
    assert "a second signal" in ended.outputs[rank] and max(ended.seconds) < 60
    assert steps_saved(tmp_path / "run") in ([1, 2], [1, 2, 3])  # the last was being written meanwhile
    assert commanded(processes, c, "--resume", "auto").codes == [0, 0]


# --- processes that die or fall silent -------------------------------------------------------------------------------


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def raised():
    raise ArithmeticError("an error of this process alone")


def stalled():
    os.kill(os.getpid(), signal.SIGSTOP)


def within_a_save(strategy, rank, act):
    """Let a process do something while the checkpoint of step 4 is being written."""

    def fault(own, parts):
        function = "_write" if strategy == "fsdp" else "finish"
        module = sharded if strategy == "fsdp" else checkpoints
        original = getattr(module, function)

        def acting(folder, *arguments):
            if "000000004" in str(folder):
                if own == rank:
                    act()
                time.sleep(0.5)
            return original(folder, *arguments)

        if own == rank or strategy == "fsdp" or own == 0:
            setattr(module, function, acting)
        if strategy == "ddp" and rank == own == 1:  # which writes nothing, while the first does
            during(parts, 5, act)

    return fault


def within_a_step(strategy, rank, act):
    def fault(own, parts):
        if own == rank:
            during(parts, 5, act)

    return fault


LOSSES = [
    (act, when, strategy, rank)
    for act in (killed, raised, stalled)
    for when in (within_a_step, within_a_save)
    for strategy in ("ddp", "fsdp")
    for rank in (0, 1)
    if (act, when, strategy) != (raised, within_a_save, "fsdp")  # which fails the save alone, see below
]
FEW_LOSSES = {(killed, within_a_step, "ddp", 1)}


@pytest.mark.parametrize(
    ("act", "when", "strategy", "rank"),
    [pytest.param(*it, marks=() if it in FEW_LOSSES else pytest.mark.slow) for it in LOSSES],
)
def test_when_a_process_is_lost_the_others_leave(act, when, strategy, rank, processes, unbroken, tmp_path):
    """Killed, raising or stopped, at step 5 or while step 4 is being saved; what is saved is whole."""
    c = configuration(tmp_path / "run", strategy, checkpoint={"every": 2})
    endless = {rank} if act is stalled else ()
    ended = commanded(processes, c, fault=when(strategy, rank, act), endless=endless)
    other = 1 - rank
    assert ended.codes[other] == LOST, ended.outputs
    assert ended.codes[rank] == {killed: -9, raised: 1, stalled: -9}[act], ended.outputs
    assert ended.seconds[other] < 60
    assert "another process" in ended.outputs[other] and "Traceback" not in ended.outputs[other]
    assert steps_saved(tmp_path / "run") in ([2], [2, 4])  # that of step 4 was being written meanwhile
    again = commanded(processes, c, "--resume", "auto")
    assert again.codes == [0, 0], again.outputs
    assert difference(tensors(unbroken(strategy, processes), STEPS), tensors(tmp_path / "run", STEPS)) == 0
    assert not leftovers(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_stall_longer_than_the_timeout_ends_the_run_within_a_minute(strategy, processes, tmp_path):
    """With a timeout as one would set it."""
    c = configuration(tmp_path / "run", strategy, train={"timeout": 50.0})
    ended = commanded(processes, c, fault=within_a_step(strategy, 1, stalled), endless={1})
    assert ended.codes[0] == LOST, ended.outputs
    assert 50 < ended.seconds[0] < 60 + 15  # from the start


# --- disks and folders -----------------------------------------------------------------------------------------------


def full_disk(steps, error=None):
    """Let the disk of the second process be full at the saves of these steps, or another error come."""

    def fault(rank, parts):
        write = sharded._write

        def full(folder, *arguments):
            if any(f"{step:09d}" in str(folder) for step in steps):
                raise error or OSError(errno.ENOSPC, "No space left on device", str(folder))
            write(folder, *arguments)

        if rank == 1:
            sharded._write = full

    return fault


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (None, "No space left on device"),
        pytest.param(ArithmeticError("of this process alone"), "of this process alone", marks=pytest.mark.slow),
    ],
)
def test_what_fails_one_process_in_a_save_fails_that_save_of_all(error, words, processes, unbroken, tmp_path):
    """Training goes on, and the next save is whole."""
    c = configuration(tmp_path / "run", "fsdp", checkpoint={"every": 2})
    ended = commanded(processes, c, fault=full_disk([2], error))
    assert ended.codes == [0, 0], ended.outputs
    warning = "the checkpoint of step 2 was not written"
    assert ended.outputs[0].count(warning) == 1 and words in ended.outputs[0]
    assert warning not in ended.outputs[1]
    assert steps_saved(tmp_path / "run") == [4, 6] and not leftovers(tmp_path / "run")
    assert read_rows(tmp_path / "run")[-1]["failed_saves"] == 1
    assert difference(tensors(unbroken("fsdp", processes), STEPS), tensors(tmp_path / "run", STEPS)) == 0


@pytest.mark.slow
def test_a_disk_that_fails_the_last_save_is_told_by_the_exit_code(processes, tmp_path):
    """Of a run that is done, and of one that a signal ended."""
    c = configuration(tmp_path / "run", "fsdp", checkpoint={"every": 4})
    ended = commanded(processes, c, fault=full_disk([6]))
    assert ended.codes == [UNSAVED, UNSAVED] and "could not be written" in ended.outputs[0], ended.outputs
    assert steps_saved(tmp_path / "run") == [4]

    def fault(rank, parts):
        full_disk([5])(rank, parts)
        if rank == 0:
            during(parts, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))

    ended = commanded(processes, c, "--resume", "auto", fault=fault)
    assert ended.codes == [UNSAVED, UNSAVED] and "NOT saved" in ended.outputs[0], ended.outputs
    assert steps_saved(tmp_path / "run") == [4]


def test_a_folder_in_use_is_refused_by_all_processes(processes, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    try:
        ended = commanded(processes, configuration(tmp_path / "run"))
    finally:
        folder.unlock()
    assert ended.codes == [2, 2]
    assert f"in which process {os.getpid()}" in ended.outputs[0] and not ended.outputs[1]


# --- wrong numbers of processes --------------------------------------------------------------------------------------


def test_another_number_of_processes_than_devices_is_refused(processes, tmp_path):
    ended = commanded(processes, configuration(tmp_path / "run"), count=3)
    assert ended.codes == [2, 2, 2]
    assert "train.devices" in ended.outputs[0] and "Traceback" not in "".join(ended.outputs)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_devices_cannot_divide_is_refused_before_they_start(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(configuration(tmp_path / "run", count=1).to_yaml())
    assert train.main([str(file), "train.devices=4"]) == 2
    assert "train.global_batch: got 6, which 4 devices do not divide" in capsys.readouterr().err
