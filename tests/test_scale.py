"""What is done for scale changes no number: recomputed activations, compiled blocks, half precision, a busy device."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import traceback
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import pathline
from pathline import Draws
from pathline.core.config import resolve
from pathline.core.errors import CheckpointError, ConfigurationError
from pathline.training import Trainer, loop
from pathline.training.devices import Agreement, garbage_on_schedule, make_fabric
from pathline.training.guard import Guard
from pathline.training.log import read_rows
from pathline.training.network import checkpoint_activations, compile_units, units
from pathline.training.parts import build
from pathline.training.step import take_step

ROOT = Path(pathline.__file__).parent
BACKBONES = {
    "deepflow": {"name": "deepflow", "cuts": [1], "acceleration_width": 7},
    "sit": {"name": "sit"},
}


def configuration(folder, backbone="deepflow", **sections):
    """A tiny network on the digits, 6 steps of 6 images, gradients clipped."""
    size = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 12, "depth": 2, "num_heads": 3}
    entries = {
        "data": "digits",
        "backbone": {**size, "num_classes": 10, **BACKBONES[backbone]},
        "objective": "deepflow" if backbone == "deepflow" else "velocity",
        "optim": {"lr": 3e-3, "warmup_steps": 2, "clip": 0.5, "eps": 1e-2},
        "ema": {"decay": 0.9, "lengths": [0.1]},
        "solver": {"name": "euler", "steps": 1},
        "train": {"steps": 6, "global_batch": 6, "seed": 5, "folder": str(folder), "accelerator": "cpu"},
        "log": {"every": 2, "tensorboard": False},
        "checkpoint": {"every": 3},
    }
    for name, section in sections.items():
        entries[name] = {**entries.get(name, {}), **section}
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


# --- activations that are computed again -----------------------------------------------------------------------------


def prepared(folder, backbone, kind):
    """A network, and a function that evaluates its loss on 7 samples."""
    parts = build(configuration(folder, backbone))
    network, positions = parts.backbone.train(), range(7)
    with torch.no_grad():  # what starts as zero would hide what is behind it
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    if kind != "none":
        checkpoint_activations(network, kind)
    batch = parts.dataset.batch(parts.dataset.indices_at(positions, 5))
    return network, lambda: parts.objective(network, batch["data"], Draws(5).at(positions), label=batch["label"]).total


def kept_bytes(loss):
    """Memory that the forward pass allocates and does not free: what is kept for the backward pass."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        total = loss()
    kept = sum(event.self_cpu_memory_usage for event in profiled.events())
    return total, kept


def hooked_bytes(loss):
    """Memory that autograd itself keeps for the backward pass, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        total = loss()
    return total, sum(storages.values())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_recomputed_activations_give_the_same_bits_and_take_less_memory(backbone, tmp_path):
    results, allocated, saved = {}, {}, {}
    for kind in ("none", 2, 1, "selective"):
        network, loss = prepared(tmp_path, backbone, kind)
        loss()  # what is made once stays out of the count
        _, allocated[kind] = kept_bytes(loss)
        total, saved[kind] = hooked_bytes(loss)
        total.backward()
        results[kind] = {"loss": total.detach(), **{name: p.grad for name, p in network.named_parameters()}}
    for kind, result in results.items():
        assert result.keys() == results["none"].keys(), kind
        assert all(torch.equal(value, results["none"][name]) for name, value in result.items()), kind
    assert all(bool(value.any()) for name, value in results["none"].items() if "label" not in name)
    assert saved["none"] > saved[2] > saved[1] and allocated["none"] > allocated[2] > allocated[1]
    assert allocated["none"] > allocated["selective"] > allocated[1]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("change", [lambda n: checkpoint_activations(n, "selective"), compile_units])
def test_no_name_changes(change, backbone, tmp_path):
    network = build(configuration(tmp_path, backbone)).backbone
    before = [
        list(network.state_dict()),
        [n for n, _ in network.named_parameters()],
        [n for n, _ in network.named_modules()],
    ]
    change(network)
    after = [
        list(network.state_dict()),
        [n for n, _ in network.named_parameters()],
        [n for n, _ in network.named_modules()],
    ]
    assert before == after and len(units(network)) >= 2


@pytest.mark.parametrize("kind", [pytest.param(2, marks=pytest.mark.slow), "selective"])
def test_a_run_may_change_what_it_computes_again(kind, tmp_path):
    """Bit for bit the same run, with it from the start or from a resume."""
    plain = trained(tmp_path / "plain")
    assert difference(tensors(plain), tensors(trained(tmp_path / "all", train={"activation_checkpointing": kind}))) == 0
    resumed = Trainer(configuration(tmp_path / "half", train={"activation_checkpointing": kind}))
    resumed.resume(tmp_path / "plain" / "checkpoints" / "step-000000003")
    resumed.run()
    assert difference(tensors(plain), tensors(resumed)) == 0


def test_networks_without_blocks_are_refused():
    network = nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 3))
    for entry, change in (
        ("activation_checkpointing", lambda n: checkpoint_activations(n, 1)),
        ("compile", compile_units),
    ):
        with pytest.raises(ConfigurationError, match=rf"train\.{entry}: got a \w+ without blocks .* leave it out"):
            change(network)


# --- compiled blocks -------------------------------------------------------------------------------------------------


def losses(trainer):
    return [row["loss"] for row in read_rows(trainer.folder)]


def graphs(function):
    """Call a function; return how many graphs were compiled meanwhile, by this process alone: it may be forked."""
    torch._dynamo.reset()
    torch._inductor.config.compile_threads = 1
    torch._dynamo.utils.counters.clear()
    function()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", 1])
def test_compiled_blocks_train_as_they_are(kind, tmp_path):
    """Losses and weights, and so the names in a checkpoint, which the plain run goes on from."""
    short = {"steps": 4, "activation_checkpointing": kind}
    plain = trained(tmp_path / "plain", backbone="sit", train=short)
    compiled = Trainer(configuration(tmp_path / "compiled", backbone="sit", train={**short, "compile": True}))
    assert graphs(compiled.run) >= 1
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-6)
    assert difference(tensors(plain), tensors(compiled)) < 1e-6
    again = Trainer(configuration(tmp_path / "again", backbone="sit", train={"steps": 4}))
    again.resume(tmp_path / "compiled" / "checkpoints" / "step-000000003")
    again.run()
    assert difference(tensors(plain), tensors(again)) < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_compiled_sharded_and_recomputed_at_once(processes, tmp_path):
    """Two processes with all of it equal one with none."""
    plain = trained(tmp_path / "plain", backbone="sit", train={"steps": 3})
    scale = {"devices": 2, "strategy": "fsdp", "compile": True, "activation_checkpointing": "selective"}
    c = configuration(tmp_path / "all", backbone="sit", train={"steps": 3, **scale})
    assert min(processes(2, lambda: graphs(Trainer(c).run), timeout=400).checked()) >= 1
    after = Trainer(configuration(tmp_path / "after", backbone="sit", train={"steps": 3}))
    after.resume(tmp_path / "all" / "checkpoints" / "step-000000003")
    assert difference(tensors(plain), tensors(after)) < 1e-6


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_as_configured(tf32, tmp_path):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        make_fabric(configuration(tmp_path, train={"tf32": tf32}).train)
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cudnn.allow_tf32 is tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_bf16_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    bf16 = {"precision": "bf16"}
    unbroken = trained(tmp_path / "a", train=bf16)
    trained(tmp_path / "b", train={**bf16, "stop_at": 3})
    resumed = Trainer(configuration(tmp_path / "b", train=bf16))
    resumed.resume(tmp_path / "b" / "checkpoints" / "step-000000003")
    resumed.run()
    assert difference(tensors(unbroken), tensors(resumed)) == 0
    with pytest.raises(CheckpointError, match="train.precision: 'bf16' -> 'fp32'"):
        Trainer(configuration(tmp_path / "c")).resume(tmp_path / "b" / "checkpoints" / "step-000000003")


@pytest.mark.parametrize("kind", ["none", "selective"])
def test_under_bf16_products_are_half_and_losses_and_gradients_are_not(kind, tmp_path, monkeypatch):
    """Computed again, activations are half as well."""
    trainer = Trainer(configuration(tmp_path, train={"precision": "bf16", "activation_checkpointing": kind}))
    products, results, gradients = set(), [], set()
    block = next(m for m in units(trainer.state.network)[0].modules() if isinstance(m, nn.Linear))
    block.register_forward_hook(lambda module, given, result: products.add(result.dtype))
    loss = trainer.parts.objective.loss
    monkeypatch.setattr(trainer.parts.objective, "loss", lambda *given: results.append(loss(*given)) or results[-1])
    for parameter in trainer.state.network.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: gradients.add(p.grad.dtype))
    take_step(trainer.state)
    (result,) = results
    assert products == {torch.bfloat16} and gradients == {torch.float32}
    given = (result.total, *result.terms.values(), *result.details.values(), result.times)
    assert {value.dtype for value in given} == {torch.float32} and len(given) >= 5


# --- the scale of fp16 -----------------------------------------------------------------------------------------------


def scaled(folder, scaler, *, half=False, **sections):
    """A run with a loss scale on the host; its numbers are float32 unless half, so that a scale of 2^k changes none."""
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    if not half:
        plugin.forward_context, plugin.convert_input = contextlib.nullcontext, lambda data: data
    sections["train"] = {"precision": "fp16", **sections.get("train", {})}
    trainer = Trainer(configuration(folder, **sections), fabric=Fabric(accelerator="cpu", devices=1, plugins=plugin))
    assert trainer.fabric.strategy.precision is plugin
    return trainer


def overflowing(trainer):
    """Let gradients pass through 64 times their value: with a scale of 2^122 or more they leave float32."""
    loss = trainer.parts.objective.loss

    def larger(*given):
        result = loss(*given)
        return result._replace(total=result.total / 64 * 64)

    trainer.parts.objective.loss = larger
    return trainer


def scaler(scale, **options):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000, **options)


def test_gradients_are_unscaled_before_they_are_clipped(tmp_path):
    """A scale of 1024 is no other run than none, to the last bit: the norm in the log and what the clipping leaves."""
    plain = trained(tmp_path / "plain")
    trainer = scaled(tmp_path / "scaled", scaler(2.0**10))
    trainer.run()
    assert difference(tensors(plain), tensors(trainer)) == 0
    norms = [[row["gradient_norm"] for row in read_rows(t.folder)] for t in (plain, trainer)]
    assert norms[0] == norms[1] and max(norms[0]) > 0.5


def test_an_overflow_skips_the_step_and_halves_the_scale(tmp_path, monkeypatch):
    """From 2^123, two steps are lost, and no more."""
    trainer = overflowing(scaled(tmp_path, scaler(2.0**123), log={"every": 1}, checkpoint={"every": 1, "keep": 9}))
    seen, scales, streaks = [], [], []
    step = loop.take_step

    def watched(state):
        seen.append(tensors(trainer))
        step(state)
        scales.append(math.log2(trainer.fabric.strategy.precision.scaler.get_scale()))
        streaks.append(state.streak_now)

    monkeypatch.setattr(loop, "take_step", watched)
    trainer.run()
    seen.append(tensors(trainer))
    taken = [difference(first, second) > 0 for first, second in pairwise(seen)]
    assert taken == [False, False, True, True, True, True]  # moments and averages are among what does not change
    assert scales == [122, 121, 121, 121, 121, 121]
    rows, entries = read_rows(tmp_path), (tmp_path / "incidents.jsonl").read_text().splitlines()
    assert [row["skipped"] for row in rows] == [1, 2, 2, 2, 2, 2]
    assert [json.loads(entry)["reason"] for entry in entries] == ["overflow", "overflow"]
    assert streaks == [0] * 6  # nothing to roll back for
    assert int(trainer.state.averages.state()["updates"]) == 4
    assert all(math.isfinite(row["loss"]) for row in rows[2:])
    assert json.loads((tmp_path / "checkpoints" / "step-000000001" / "manifest.json").read_text())["good"] is True


def test_bad_gradients_count_once_the_scale_cannot_be_their_reason(tmp_path):
    """From a scale below 1 on."""
    trainer = scaled(tmp_path, scaler(2.0), log={"every": 1}, guard={"rollback_after": 9})
    loss = trainer.parts.objective.loss

    def bad(*given):
        result = loss(*given)
        result.total.register_hook(lambda gradient: gradient * math.nan)
        return result

    trainer.parts.objective.loss = bad
    trainer.run()
    entries = [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in entries] == ["overflow"] + ["gradient"] * 5
    assert trainer.state.streak == 5


def test_the_scale_is_saved_and_restored(tmp_path):
    """Grown and shrunk, with the steps since; the resumed run is the unbroken one, to the last bit."""

    def fresh(folder, scale=2.0**123, **train):
        grown = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        return overflowing(scaled(tmp_path / folder, grown, train=train))

    unbroken = fresh("a")
    unbroken.run()
    first = fresh("b", stop_at=4)
    first.run()
    resumed = fresh("b", scale=8.0)
    resumed.resume(tmp_path / "b" / "checkpoints" / "step-000000004")
    states = [t.fabric.strategy.precision.scaler.state_dict() for t in (first, resumed)]
    assert states[0] == states[1] and states[1]["scale"] == 2.0**122  # 123, 122 too large; 121 twice, and grown
    resumed.run()
    ends = [t.fabric.strategy.precision.scaler.state_dict() for t in (unbroken, resumed)]
    assert ends[0] == ends[1] and ends[1]["scale"] == 2.0**121 and ends[1]["_growth_tracker"] == 1
    assert difference(tensors(unbroken), tensors(resumed)) == 0


def test_fp16_trains_as_float32_does(tmp_path):
    """With half numbers indeed: too large a scale first, then steps near those of float32."""
    trainer = scaled(tmp_path / "half", scaler(2.0**24), half=True, log={"every": 1}, train={"steps": 12})
    trainer.run()
    rows = read_rows(tmp_path / "half")
    lost = int(rows[-1]["skipped"])
    assert 1 <= lost < 12 and [row["skipped"] for row in rows] == [min(i, lost) for i in range(1, 13)]
    plain = trained(tmp_path / "plain", log={"every": 1}, train={"steps": 12})
    small = scaled(tmp_path / "small", scaler(2.0**6), half=True, log={"every": 1}, train={"steps": 12, "stop_at": 3})
    small.run()
    for half, row in zip(read_rows(tmp_path / "small"), read_rows(tmp_path / "plain"), strict=False):
        assert half["loss"] == pytest.approx(row["loss"], rel=1e-2)
        assert half["gradient_norm"] == pytest.approx(row["gradient_norm"], rel=2e-2)
    assert half["step"] == 3 and half["loss"] != row["loss"]
    assert {value.dtype for value in tensors(plain).values()} == {value.dtype for value in tensors(trainer).values()}


# --- a device that is not waited for ---------------------------------------------------------------------------------

READS = "item tolist __bool__ __int__ __float__ __index__ __contains__ __array__ cpu numpy is_nonzero nonzero".split()
HOST = {  # functions that look at what is made on the host, or at values only where these lie on the host
    ("core/checks.py", "check_finite"),
    ("core/checks.py", "check_labels"),
    ("core/checks.py", "check_times"),
    ("core/draws.py", "shared_uniform"),
    ("interpolants/base.py", "rate_ends"),
}


class Reads(TorchDispatchMode):
    """Counts, while entered, the reads of tensors' values, by the place in pathline that asks for them."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found, self._on = Counter(), False
        for name in READS:
            monkeypatch.setattr(Tensor, name, self._counted(getattr(Tensor, name)))

    def __enter__(self):
        self._on = True
        return super().__enter__()

    def __exit__(self, *error):
        self._on = False
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if any(word in str(function) for word in ("local_scalar", "nonzero", "aten.equal", "masked_select", "unique")):
            self._note()
        return function(*arguments, **(options or {}))

    def _counted(self, original):
        def counted(tensor, *arguments, **options):
            self._note()
            return original(tensor, *arguments, **options)

        return counted

    def _note(self):
        if not self._on:
            return
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
        places = [(str(Path(frame.filename).relative_to(ROOT)), frame.name) for frame in frames]
        ours = [place for place in places if not place[0].startswith(("tests", ".venv"))]
        if not any(place in HOST for place in ours):
            self.found[ours[-1] if ours else ("elsewhere", "")] += 1


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"train": {"micro_batch": 4}, "backbone": "sit"},
        {"optim": {"name": "muon", "weight_decay": 0.1}},
        {"train": {"precision": "bf16", "activation_checkpointing": 2}, "optim": {"clip": None}},
    ],
)
def test_a_step_reads_no_value(sections, tmp_path, monkeypatch):
    state = Trainer(configuration(tmp_path, **sections)).state
    take_step(state)
    reads = Reads(monkeypatch)
    with reads:
        take_step(state)
    assert not reads.found


def test_reads_are_counted(tmp_path, monkeypatch):
    """The test above fails if the verdict is looked at."""
    state = Trainer(configuration(tmp_path)).state
    verdict = Guard.verdict
    for look in (
        bool,
        float,
        lambda kept: kept.numpy(),
        lambda kept: kept.tolist(),
        lambda kept: torch.equal(kept, kept),
    ):

        def looked(guard, *numbers, look=look):
            result = verdict(guard, *numbers)
            look(result[1])
            return result

        with monkeypatch.context() as patch:
            patch.setattr(Guard, "verdict", looked)
            with (reads := Reads(patch)):
                take_step(state)
        assert reads.found[("training/step.py", "_commit")] >= 1


def test_a_run_reads_values_only_for_rows_and_checkpoints(tmp_path, monkeypatch):
    """Rows at steps 2, 4, 6; checkpoints at 3 and 6."""
    trainer = Trainer(configuration(tmp_path))
    reads, places = Reads(monkeypatch), {}
    step, claimed = loop.take_step, []

    def watched(state):
        if not claimed:
            claimed.append(reads.__enter__())
        places[state.step] = dict(reads.found)  # after so many steps
        step(state)

    monkeypatch.setattr(loop, "take_step", watched)
    try:
        trainer.run()
    finally:
        reads.__exit__(None, None, None)
    places[6] = dict(reads.found)
    readers = {
        after: {name for _, name in places[after] if places[after] != places[after - 1]} for after in range(1, 7)
    }
    assert not places[1] and places[5] == places[4]
    assert all(readers[after] for after in (2, 3, 4, 6))


# --- processes agree, garbage is collected ---------------------------------------------------------------------------


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_what_processes_agree_on(processes, tmp_path):
    """Three of them, each with values of its own; errors are those of the first, with its words."""

    def agree():
        fabric = Fabric(accelerator="cpu", devices=3, strategy="ddp")
        fabric.launch()
        agreement, rank = Agreement(fabric, 30.0), fabric.global_rank
        gathered = agreement.gather(torch.tensor([[rank, 10 * rank]]))

        def fails():
            raise CheckpointError(f"told by {rank}")

        try:
            agreement.first(fails)
        except CheckpointError as error:
            said = str(error)
        numbers = [agreement.largest([7, 11, 5][rank]), agreement.first(lambda: 100 + rank)]
        same = [agreement.same(3), agreement.same(3 + (rank == 2)), agreement.same(-rank)]
        return [numbers, same, gathered.tolist(), said]

    expected = [[11, 100], [True, False, False], [[0, 0], [1, 10], [2, 20]], "told by 0"]
    assert processes(3, agree, timeout=60).checked() == [expected] * 3


def test_one_process_agrees_with_itself():
    agreement = Agreement(Fabric(accelerator="cpu", devices=1), 1.0)
    assert agreement.group is None
    assert (agreement.largest(3), agreement.same(3), agreement.first(lambda: 5)) == (3, True, 5)
    assert agreement.gather(torch.tensor([2, 7])).tolist() == [2, 7]


def test_garbage_is_collected_on_schedule_alone(tmp_path, monkeypatch):
    """Every second step of six; Python's own schedule is back afterwards, also after an error."""
    collected, states = [], []
    trainer = Trainer(configuration(tmp_path, train={"collect_garbage_every": 2}))
    step = loop.take_step
    monkeypatch.setattr(loop, "take_step", lambda state: (states.append(gc.isenabled()), step(state)))
    monkeypatch.setattr(loop.gc, "collect", lambda: collected.append(trainer.state.step))
    trainer.run()
    assert states == [False] * 6 and gc.isenabled()
    assert [step for step in collected if step] == [2, 4, 6]
    with pytest.raises(ZeroDivisionError), garbage_on_schedule():
        assert not gc.isenabled()
        _ = 1 / 0
    assert gc.isenabled()
