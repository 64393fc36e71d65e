"""Evaluation while training: its figures, its schedule, its file, and that neither training nor its end hang on it."""

from __future__ import annotations

import hashlib
import json
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pathline import Draws, evaluate, metrics, sample, train
from pathline.core.config import resolve
from pathline.core.errors import ConfigurationError
from pathline.metrics import Real, Record, features, reference
from pathline.metrics.base import Metric
from pathline.metrics.evaluation import Evaluation
from pathline.training import Trainer, loop, sampling, template
from pathline.training.log import read_rows
from pathline.training.pictures import levels

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def configuration(folder, evaluation, **sections):
    """A tiny network on the digits, 6 steps of 6 images; 37 samples measured after steps 2, 4 and 6."""
    backbone = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 12, "depth": 2, "num_heads": 3}
    train = {"steps": 6, "global_batch": 6, "seed": 5, "folder": str(folder), "accelerator": "cpu"}
    measured = {"every": 2, "count": 37, "metrics": ["frechet:pca"], "batch": 10, **(evaluation or {})}
    entries = {
        "data": "digits",
        "backbone": {"name": "sit", **backbone, "num_classes": 10},
        "objective": "velocity",
        "optim": {"lr": 3e-3},
        "ema": {"decay": 0.9},
        "solver": {"name": "euler", "steps": 2},
        "train": train,
        "log": {"every": 3, "tensorboard": False},
        "checkpoint": {"every": 2, "keep": 9},
        **({} if evaluation is None else {"evaluation": measured}),
    }
    for name, section in sections.items():
        entries[name] = {**(entries.get(name, {}) if name != "data" else {}), **section}
    return resolve(entries)


def trained(folder, evaluation, **sections):
    trainer = Trainer(configuration(folder, evaluation, **sections))
    trainer.run()
    return trainer


def rows(folder):
    return read_rows(folder, "evaluations.jsonl")


def places(folder):
    return [(row["step"], row["average"], row["metric"]) for row in rows(folder)]


def values(folder):
    return {(row["step"], row["average"], row["metric"], *row["values"].items()) for row in rows(folder)}


class Stub(Metric):
    """Counts samples; subclasses fail at one place."""

    def __init__(self) -> None:
        super().__init__(None)

    def take(self, batch, outputs): ...

    def merge(self, other):
        self.count += other.count

    def state(self):
        return {"count": torch.tensor(self.count)}

    def load(self, state):
        self.count = int(state["count"])

    def compute(self):
        return Record("stub", self.count, {"count": float(self.count), "nothing": float("nan")}, {}, 0)


@pytest.fixture
def stub(monkeypatch):
    """Register a metric for the length of a test."""

    def register(name, metric):
        entries = dict(metrics.registry._entries)
        monkeypatch.setattr(metrics.registry, "_entries", entries)
        metrics.register(name)(metric)

    return register


# --- what is measured ------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_same_samples_measured_by_hand(tmp_path):
    """Weights of the checkpoint, noise and labels by number, rounded to levels."""
    trained(tmp_path, {"metrics": ["frechet:pca", {"name": "memorisation"}], "seed": 3, "labels": "random"})
    found, parts = sampling.load(tmp_path / "checkpoints" / "step-000000004", [])
    labels = sampling.labels_of(found.sample.model_copy(update={"labels": "random", "seed": 3}), range(37), 10)
    x = sampling.solve(parts, parts.backbone, labels, 37, 3, 37).x
    real = Real.of("digits")
    expected = {}
    for name, options in (
        ("frechet", {"features": features.build("pca", training=real.training)}),
        ("memorisation", {}),
    ):
        metric = metrics.build(name, real=real, **options)
        metric.update({"data": levels(x), "label": labels})
        record = metric.compute()
        expected[record.metric] = dict(record.values)
    fourth = [row for row in rows(tmp_path) if row["step"] == 4]
    assert {row["metric"]: row["values"] for row in fourth}.keys() == expected.keys()
    for row in fourth:
        assert row["values"] == pytest.approx(expected[row["metric"]], rel=1e-4)
        assert (row["count"], row["average"], row["nfe"], row["seed"]) == (37, "ema", 2, 3)
        assert (
            row["label_law"] == "random" and row["solver"]["name"] == "euler" and row["reference"]["name"] == "digits"
        )


def test_a_line_tells_how_samples_were_drawn_as_their_own_record_would(tmp_path):
    trained(tmp_path, {"every": 6, "averages": ["ema", "ema-0.100"]}, ema={"decay": 0.9, "lengths": [0.1]})
    output = tmp_path / "drawn.npz"
    words = ["count=37", "batch=10", f"output={output}"]
    assert sample.main([str(tmp_path), *(f"sample.{word}" for word in words)]) == 0
    record = json.loads(output.with_suffix(".json").read_text())
    line, other = rows(tmp_path)
    shared = {"version", "seed", "seed_law", "label_law", "solver", "guidance", "nfe", "device", "devices", "torch"}
    shared |= {"precision", "tf32", "rounding", "autoencoder", "data"}
    assert {key: line[key] for key in shared} == {key: record[key] for key in shared}
    assert line["checkpoint"] == {**record["checkpoint"], "decay": 0.9, "warmup": True}
    assert other["checkpoint"]["length"] == 0.1 and other["checkpoint"]["average"] == "ema-0.100"
    assert other["checkpoint"]["weights_sha256"] != line["checkpoint"]["weights_sha256"]
    stored = json.loads((tmp_path / "checkpoints" / "step-000000006" / "state.json").read_text())["configuration"]
    assert line["configuration_sha256"] == hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()


def test_lines_are_compared_with_results_of_samples(tmp_path, capsys):
    trained(tmp_path / "run", {"every": 6})
    output = tmp_path / "drawn.npz"
    words = ["count=37", "batch=10", f"output={output}"]
    assert sample.main([str(tmp_path / "run"), *(f"sample.{word}" for word in words)]) == 0
    asked = ["--metrics", "frechet:pca", "--reference", "digits"]
    assert evaluate.main([str(output), *asked]) == 0
    capsys.readouterr()
    places = [f"{tmp_path / 'run' / 'evaluations.jsonl'}:6:ema", str(tmp_path / "drawn.metrics.json")]
    assert evaluate.main(["compare", *places]) == 0
    printed = capsys.readouterr()
    first, second = (line.split() for line in printed.out.splitlines()[-2:])
    assert (first[:2], second[0]) == (["run", "6:ema"], "drawn") and first[2:] == second[1:]
    assert [line for line in printed.err.splitlines() if "biased" not in line] == []


def test_the_schedule_holds_several_averages_and_the_end(tmp_path, capsys):
    ema = {"decay": 0.9, "lengths": [0.1, 0.25]}
    averages = ["ema-0.250", "ema"]
    trained(tmp_path, {"every": 4, "averages": averages, "labels": "none"}, ema=ema)
    assert places(tmp_path) == [(step, name, "frechet, pca") for step in (4, 6) for name in averages]
    assert len({row["values"]["distance"] for row in rows(tmp_path)}) == 4
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(said) == 4 and said[0].startswith("step 4, ema-0.250: frechet, pca: distance ")
    assert "(37 samples, " in said[0]


def test_without_a_schedule_nothing_is_built_or_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluation, "__init__", lambda *_, **__: pytest.fail("built metrics"))
    trained(tmp_path, None)
    assert not (tmp_path / "evaluations.jsonl").exists()


def test_values_go_to_tensorboard_and_what_is_not_finite_is_null(tmp_path, stub):
    stub("stub", Stub)
    trained(tmp_path, {"every": 6, "metrics": ["stub", "frechet:pca"]}, log={"tensorboard": True})
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    tags = [tag for tag in read.Tags()["scalars"] if tag.startswith("evaluation/")]
    assert {"evaluation/ema/stub/count", "evaluation/ema/frechet/pca/distance"} <= set(tags)
    (event,) = read.Scalars("evaluation/ema/frechet/pca/distance")
    line = rows(tmp_path)[1]
    assert event.step == 6 and event.value == pytest.approx(line["values"]["distance"], rel=1e-6)
    assert rows(tmp_path)[0]["values"] == {"count": 37, "nothing": None}


# --- processes -------------------------------------------------------------------------------------------------------


@needs_gloo
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_several_processes_find_what_one_does(strategy, processes, tmp_path):
    spread = {"devices": 2, "strategy": strategy, "timeout": 30.0}
    asked = {"every": 3, "metrics": ["frechet:pca", "precision-recall:pca", "memorisation"]}
    trained(tmp_path / "one", asked)

    def work():
        drawn = []
        batches = sampling.batches
        sampling.batches = lambda *given: (drawn.append([given[3].start, given[3].stop]), batches(*given))[1]
        Trainer(configuration(tmp_path / "two", asked, train=spread)).run()
        return drawn

    drawn = processes(2, work, timeout=90).checked()
    shares = {"ddp": ([0, 18], [18, 37]), "fsdp": ([0, 37], [0, 37])}[strategy]
    assert drawn == [[share] * 2 for share in shares]
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == 6 and [row["step"] for row in one] == [row["step"] for row in two]
    for first, second in zip(one, two, strict=True):
        assert first["count"] == second["count"] == 37
        assert first["values"] == pytest.approx(second["values"], rel=1e-3)


@pytest.mark.parametrize("law", ["balanced", "random", "none", 3])
def test_metrics_see_each_sample_once_with_the_label_that_was_asked_for(law, tmp_path, stub):
    seen = []

    class Seeing(Stub):
        def take(self, batch, outputs):
            seen.append({name: value.tolist() for name, value in batch.items() if name != "data"})

    stub("seeing", Seeing)
    trained(tmp_path, {"metrics": ["seeing"], "every": 6, "labels": law, "seed": 3})
    assert [i for batch in seen for i in batch["index"]] == list(range(37))
    labels = [label for batch in seen for label in batch.get("label", ())]
    random = (Draws(3).uniform("labels", range(37)) * 10).long().tolist()
    assert labels == {"balanced": [i % 10 for i in range(37)], "random": random, "none": [], 3: [3] * 37}[law]


@needs_gloo
def test_a_failure_in_one_process_is_one_of_that_evaluation_alone(processes, tmp_path):
    def work():
        batches = sampling.batches

        def failing(parts, network, labels, ids, seed, batch):
            if ids.start and parts.configuration and not failing.done:
                failing.done = True
                raise OSError("no more of that")
            return batches(parts, network, labels, ids, seed, batch)

        failing.done = False
        sampling.batches = failing
        Trainer(configuration(tmp_path, {}, train={"devices": 2, "strategy": "ddp", "timeout": 30.0})).run()

    ended = processes(2, work, timeout=90)
    ended.checked()
    assert "warning: no evaluation at step 2 of ema: no more of that" in ended.outputs[1]
    assert [step for step, *_ in places(tmp_path)] == [4, 6]


# --- training goes on as if there were none --------------------------------------------------------------------------


def test_training_is_the_same_to_the_bit(tmp_path):
    torch.manual_seed(1)
    without = trained(tmp_path / "without", None)
    torch.manual_seed(2)
    solver = {"name": "euler-maruyama", "steps": 3}
    with_them = trained(tmp_path / "with", {"every": 1, "metrics": ["frechet:pixels"]}, solver=solver)
    for group, named in without.state.snapshot().tensors.items():
        for key, value in named.items():
            assert torch.equal(value, with_them.state.snapshot().tensors[group][key])
    assert with_them.state.network.training
    assert len(rows(tmp_path / "with")) == 6


def test_computing_holds_up_no_step(tmp_path, monkeypatch, stub):
    """The metric of step 2 is not computed before step 4 is taken."""
    taken, seen, step = threading.Event(), [], loop.take_step

    class Waiting(Stub):
        def compute(self):
            seen.append(taken.wait(20))
            return super().compute()

    def counted(state):
        step(state)
        if state.step == 4:
            taken.set()

    stub("waiting", Waiting)
    monkeypatch.setattr(loop, "take_step", counted)
    trained(tmp_path, {"metrics": ["waiting"], "every": 2}, train={"steps": 5})
    assert seen == [True] * 3 and [row["step"] for row in rows(tmp_path)] == [2, 4, 5]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("evaluation")]


@pytest.mark.parametrize("place", ["take", "state", "compute"])
def test_a_metric_that_fails_is_warned_of(place, tmp_path, stub, capsys):
    """It fails at step 2 alone."""
    calls = []

    def fail(self, *given):
        calls.append(place)
        if len(calls) == 1:
            raise ArithmeticError("no such number")
        return getattr(Stub, place)(self, *given)

    stub("failing", type("Failing", (Stub,), {place: fail}))
    trainer = trained(tmp_path, {"metrics": ["failing"]})
    said = capsys.readouterr().err
    assert trainer.state.step == 6
    assert "warning: no evaluation at step 2 of ema: ArithmeticError: no such number" in said
    assert [step for step, *_ in places(tmp_path)] == [4, 6]


# --- stops, resumes, roll-backs --------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_results_of_an_unbroken_one(tmp_path):
    trained(tmp_path / "a", {})
    trained(tmp_path / "b", {}, train={"stop_at": 5})
    assert [step for step, *_ in places(tmp_path / "b")] == [2, 4]
    resumed = Trainer(configuration(tmp_path / "b", {}))
    resumed.resume(tmp_path / "b" / "checkpoints" / "step-000000002")
    resumed.run()
    assert values(tmp_path / "a") == values(tmp_path / "b") and len(rows(tmp_path / "b")) == 3
    late = (tmp_path / "b" / "evaluations.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in late] == [4]


def test_what_a_kill_kept_from_being_written_is_made_up_for(tmp_path):
    """The last line is cut short; the checkpoint of its step is there."""
    trained(tmp_path / "a", {})
    file = tmp_path / "a" / "evaluations.jsonl"
    expected, content = values(tmp_path / "a"), file.read_bytes()
    file.write_bytes(content[:-20])
    again = Trainer(configuration(tmp_path / "a", {}))
    again.resume(tmp_path / "a" / "checkpoints" / "step-000000006")
    again.run()
    assert values(tmp_path / "a") == expected and len(rows(tmp_path / "a")) == 3


def test_going_back_sets_results_aside(tmp_path, monkeypatch):
    """Steps 4 to 6 fail once; training goes back to step 2 and measures step 4 anew."""
    trainer = Trainer(configuration(tmp_path, {}, guard={"rollback_after": 3}, train={"steps": 8}, log={"every": 1}))
    batch = trainer.parts.dataset.finish

    def poisoned(loaded, draws):
        made = batch(loaded, draws)
        return {**made, "data": made["data"] * (float("nan") if draws.step in (3, 4, 5) else 1.0)}

    monkeypatch.setattr(trainer.parts.dataset, "finish", poisoned)
    trainer.run()
    late = (tmp_path / "evaluations.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in late] == [4, 6]
    assert [step for step, *_ in places(tmp_path)] == [2, 4, 6, 8]


# --- what is refused before anything starts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        ({"metrics": ["frechett"]}, "unknown metric 'frechett'; did you mean 'frechet'?"),
        ({"metrics": ["frechet"], "reference": "nowhere.npz"}, "evaluation: .*nowhere.npz"),
        ({"metrics": ["frechet:pca"], "features": {"pcaa": {"axes": 3}}}, "unknown feature space 'pcaa'"),
        ({"metrics": ["memorisation:pca"]}, "evaluation: .*no option 'features'"),
        ({"metrics": ["kid:pixels"]}, r"evaluation: got 37 samples.* kid\.size"),
        ({"metrics": ["label-agreement"], "labels": "none"}, "evaluation: got samples without labels"),
        ({"averages": ["ema-0.1"]}, "evaluation.averages: got 'ema-0.1'; did you mean 'ema'"),
        ({"labels": [3, 10]}, r"evaluation.labels: got \[3, 10\], expected classes from 0 to 9"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(evaluation, said, tmp_path):
    with pytest.raises(ConfigurationError, match=said):
        Trainer(configuration(tmp_path / "run", evaluation))
    assert not (tmp_path / "run").exists()


def test_statistics_of_another_feature_space_are_refused_before_training(tmp_path):
    file = tmp_path / "statistics.safetensors"
    assert reference.main(["digits", str(file), "--features", "pixels"]) == 0
    with pytest.raises(ConfigurationError, match=r"evaluation: got .*statistics\.safetensors .* another feature space"):
        Trainer(configuration(tmp_path / "run", {"reference": str(file), "features": {"pca": {"training": "digits"}}}))


def test_a_pass_over_many_images_at_every_start_is_warned_of(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "real.npz", arr_0=np.random.default_rng(0).integers(0, 256, (90, 8, 8, 1), np.uint8))
    told = {"metrics": ["frechet:pixels"], "reference": str(tmp_path / "real.npz")}
    Trainer(configuration(tmp_path / "run", told))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(template, "KEPT", 89)
    Trainer(configuration(tmp_path / "run", told))
    said = capsys.readouterr().err
    assert "warning: evaluation: 90 images of the reference" in said
    assert f"python -m pathline.metrics.reference {tmp_path / 'real.npz'} statistics.safetensors" in said


def test_latents_without_an_autoencoder_are_refused(tmp_path):
    rows = {"latents": torch.randn(7, 4, 8, 8), "labels": torch.arange(7)}
    save_file(rows, tmp_path / "x.safetensors")
    data = {"name": "latents", "path": str(tmp_path / "x.safetensors"), "num_classes": 10}
    with pytest.raises(ConfigurationError, match="without an autoencoder"):
        Trainer(configuration(tmp_path / "run", {}, data=data, backbone={"in_channels": 4}))


def test_the_command_refuses_them_too(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(configuration(tmp_path / "run", {"metrics": ["frechett"]}).to_yaml())
    assert train.main([str(file)]) == 2
    assert "error: evaluation: unknown metric 'frechett'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
