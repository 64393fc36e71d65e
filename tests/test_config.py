"""Configuration: every wrong entry is named, all in one error, and what is right survives a round trip."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml

from pathline import objectives
from pathline.core import config, overrides
from pathline.core.config import differences, load, resolve
from pathline.core.errors import ConfigurationError
from pathline.training import check_machine, parts
from pathline.training.loop import make_fabric
from pathline.training.parts import build

RECIPE = Path(__file__).parent.parent / "configs" / "deepflow-digits.yaml"
BASE = {
    "data": {"name": "digits"},
    "backbone": {
        "name": "sit",
        "input_size": 8,
        "patch_size": 4,
        "in_channels": 1,
        "hidden_size": 12,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 10,
    },
    "objective": {"name": "velocity", "times": {"name": "logit-normal"}},
    "solver": {"name": "euler", "steps": 5},
    "train": {"steps": 7, "folder": "runs/x", "global_batch": 6},
}
DEEPFLOW = (
    "{name: deepflow, input_size: 8, patch_size: 4, in_channels: 1, hidden_size: 12, depth: 2, num_heads: 3, "
    "num_classes: 10, cuts: [1], acceleration_width: 7}"
)


def entries(*words: str) -> dict:
    return overrides.apply(deepcopy(BASE), words)


def refusal(*words: str) -> str:
    """The message of the error that the entries raise, wherever it is found before anything starts."""
    with pytest.raises(ConfigurationError) as error:
        build(resolve(entries(*words)))
    return str(error.value)


def test_the_recipe_is_what_it_says():
    c = load(RECIPE)
    assert c.optim.lr == 4e-3 and c.optim.final_lr_fraction == 0.05 and c.optim.warmup_steps == 100
    assert c.ema.decay == 0.998 and c.train.global_batch == 32 and c.train.steps == 3000 and c.train.threads == 1
    backbone = build(c).backbone
    assert sum(p.numel() for p in backbone.parameters()) == 494_988  # as measured for this recipe


def test_defaults_are_the_papers():
    c = resolve({key: value for key, value in BASE.items() if key != "solver"})
    assert c.optim.lr == 1e-4 and c.optim.betas == (0.9, 0.999) and c.optim.weight_decay == 0
    assert c.ema.decay == 0.9999 and c.interpolant == {"name": "linear"}
    assert c.solver["name"] == "euler-maruyama" and c.solver["steps"] == 250


def test_options_of_components_are_filled_in_with_their_defaults():
    c = resolve(entries())
    assert c.objective == {
        "name": "velocity",
        "times": {"name": "logit-normal", "mean": 0.0, "std": 1.0},
        "label_dropout": 0.1,
        "coupling": None,
        "loss": "mse",
        "delta": None,
        "cosine": 0.0,
        "weighting": {"name": "none"},
        "wanted_times": None,
        "interval": None,
    }
    assert c.backbone["mlp_ratio"] == 4.0
    nested = resolve(entries("objective.coupling=sinkhorn", "objective.wanted_times.name=mode"))
    assert nested.objective["coupling"]["regularisation"] == 0.05 and nested.objective["wanted_times"]["scale"] == 1.29


@pytest.mark.parametrize("words", [(), ("guidance.0.scale=2.5", "optim.lr=3e-5"), ("solver=euler-maruyama",)])
def test_the_resolved_configuration_reads_back_the_same(words, tmp_path):
    c = resolve(entries(*words))
    (tmp_path / "c.yaml").write_text(c.to_yaml())
    assert load(tmp_path / "c.yaml") == c
    assert resolve(c.model_dump(mode="json")) == c
    assert resolve(yaml.safe_load(c.to_yaml())) == c


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E3", 2000.0),
        ("-1.5e2", -150.0),
        (".5e1", 5.0),
        ("7", 7),
        ("e4", "e4"),
        ("[1, 2e0]", [1, 2.0]),
    ],
)
def test_numbers_with_an_exponent_are_numbers(text, value):
    parsed = overrides.parse(text)
    assert parsed == value and type(parsed) is type(value)


def test_yaml_cannot_make_objects():
    with pytest.raises(ConfigurationError, match="not YAML"):
        overrides.parse("!!python/object/apply:os.getcwd []")


# --- words -----------------------------------------------------------------------------------------------------------


def test_a_word_sets_one_entry_and_leaves_the_original():
    given = deepcopy(BASE)
    assert overrides.apply(given, ["optim.lr=2e-4"])["optim"] == {"lr": 2e-4}
    assert given == BASE


def test_guidance_by_index_makes_classifier_free_guidance():
    assert entries("guidance.0.scale=1.5")["guidance"] == [{"name": "classifier-free", "scale": 1.5}]
    assert entries("guidance.0=cfg")["guidance"] == ["cfg"]
    assert entries("guidance.0.scale=2", "guidance=[]")["guidance"] == []


def test_another_name_drops_the_other_components_options_whatever_the_order():
    for words in (["solver.name=heun", "solver.steps=3"], ["solver.steps=3", "solver.name=heun"]):
        assert entries(*words)["solver"] == {"name": "heun", "steps": 3}
    assert entries("solver.name=euler")["solver"] == {"name": "euler", "steps": 5}  # the name it has: nothing dropped
    assert "solver.steps: missing, 'heun' needs it" in refusal("solver.name=heun")


def test_a_bare_name_becomes_a_section():
    assert entries("objective.times=uniform", "objective.times.low=1")["objective"]["times"] == {
        "name": "uniform",
        "low": 1,
    }


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optim.lr", "expected entry=value"),
        ("=3", "expected entry=value"),
        ("guidance.x.scale=2", "got guidance.x, expected a number"),
        ("guidance.3.scale=2", "from 0 to 0"),
        ("train.steps.x=3", "got an entry below train.steps, which holds 7"),
        ("optim.lr={", "not YAML"),
    ],
)
def test_words_that_do_not_fit(word, said):
    with pytest.raises(ConfigurationError) as error:
        entries(word)
    assert said in str(error.value)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: digits\ndata: digits\n", "data twice"),
        ("optim: {lr: 1, lr: 2}", "lr twice"),
        ("- 1\n- 2\n", "list in it, expected sections"),
        ("a: [", "not YAML"),
    ],
)
def test_files_that_are_no_configuration(text, said, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigurationError) as error:
        load(tmp_path / "c.yaml")
    assert said in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(ConfigurationError, match="got no file"):
        load(tmp_path / "none.yaml")


# --- files that extend others ---------------------------------------------------------------------------------------


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_what_a_file_gives_replaces_what_it_extends_entry_by_entry(tmp_path):
    write(
        tmp_path,
        base="train: {steps: 7, folder: runs/x}\noptim: {lr: 2e-4, betas: [0.8, 0.95]}\nlog: {every: 3}\n",
        middle="extends: base.yaml\ntrain: {steps: 11}\noptim: {betas: [0.7, 0.9]}\n",
        top="extends: middle.yaml\ntrain: {seed: 5}\nema: {decay: 0.9}\n",
    )
    assert overrides.read(tmp_path / "top.yaml") == {
        "train": {"steps": 11, "folder": "runs/x", "seed": 5},
        "optim": {"lr": 2e-4, "betas": [0.7, 0.9]},
        "log": {"every": 3},
        "ema": {"decay": 0.9},
    }


def test_a_file_is_found_beside_the_one_that_extends_it(tmp_path, monkeypatch):
    write(tmp_path, base="train: {steps: 7}\n")
    write(tmp_path / "deep", first="extends: ../base.yaml\n", second="extends: first.yaml\n")
    for place, name in ((tmp_path.parent, f"{tmp_path.name}/deep/second.yaml"), (tmp_path / "deep", "second.yaml")):
        monkeypatch.chdir(place)
        assert overrides.read(name) == {"train": {"steps": 7}}


@pytest.mark.parametrize(
    ("base", "given", "merged"),
    [
        ("{name: heun, steps: 5}", "{steps: 3}", {"name": "heun", "steps": 3}),
        ("{name: heun, steps: 5}", "{name: heun, end: 0.1}", {"name": "heun", "steps": 5, "end": 0.1}),
        ("{name: heun, steps: 5}", "heun", {"name": "heun", "steps": 5}),
        ("heun", "{steps: 5}", {"name": "heun", "steps": 5}),
        ("{name: heun, steps: 5}", "{name: euler, end: 0.1}", {"name": "euler", "end": 0.1}),
        ("{name: heun, steps: 5}", "euler", {"name": "euler"}),
        ("{steps: 5}", "{name: heun}", {"name": "heun", "steps": 5}),
        ("{steps: 5}", "heun", {"name": "heun", "steps": 5}),
        ("heun", "{name: euler, steps: 3}", {"name": "euler", "steps": 3}),
        (
            "{name: heun, grid: {name: paper, last: 0.02}, steps: 5}",
            "{grid: {name: shifted, shift: 2}}",
            {"name": "heun", "grid": {"name": "shifted", "shift": 2}, "steps": 5},
        ),
        ("{name: heun, steps: 5}", "null", None),
        ("[{name: cfg, scale: 2}, apg]", "[{scale: 3}]", [{"scale": 3}]),
    ],
)
def test_a_component_of_another_name_replaces_the_whole_component(base, given, merged, tmp_path):
    write(tmp_path, base=f"solver: {base}\n", top=f"extends: base.yaml\nsolver: {given}\n")
    found = overrides.read(tmp_path / "top.yaml")["solver"]
    assert ({"name": found} if isinstance(found, str) else found) == merged


def test_a_file_that_extends_another_resolves_and_takes_words(tmp_path):
    write(tmp_path, base=yaml.safe_dump(BASE), top="extends: base.yaml\nsolver: {name: heun, steps: 3}\n")
    c = load(tmp_path / "top.yaml", ["solver.steps=11"])
    assert c == resolve(entries("solver.name=heun", "solver.steps=11"))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"top": "extends: none.yaml"}, "got no file at {0}/top.yaml extends {0}/none.yaml"),
        ({"top": "extends: top.yaml"}, "in a circle: {0}/top.yaml extends {0}/top.yaml"),
        (
            {"top": "extends: b.yaml", "b": "extends: c.yaml", "c": "extends: ../{1}/b.yaml"},
            "in a circle: {0}/top.yaml extends {0}/b.yaml extends {0}/c.yaml extends {0}/../{1}/b.yaml",
        ),
        ({"top": "extends: b.yaml", "b": "- 1"}, "in {0}/top.yaml extends {0}/b.yaml: got {0}/b.yaml with a list"),
        ({"top": "extends: b.yaml", "b": "a: ["}, "in {0}/top.yaml extends {0}/b.yaml: got text that is not YAML"),
        ({"top": "extends: [b.yaml]"}, "got {0}/top.yaml with extends: ['b.yaml'], expected the name of one file"),
        ({"top": "extends: 3"}, "with extends: 3, expected the name"),
        ({"top": "extends:"}, "with extends: None, expected the name"),
    ],
)
def test_what_cannot_be_extended_is_named_with_the_way_to_it(files, said, tmp_path):
    write(tmp_path, **{name: text.replace("{1}", tmp_path.name) for name, text in files.items()})
    with pytest.raises(ConfigurationError) as error:
        load(tmp_path / "top.yaml")
    assert said.format(tmp_path, tmp_path.name) in str(error.value)


# --- entries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("dta.name=digits", "dta: unknown entry; did you mean 'data'?"),
        ("optim.lrr=1", "optim.lrr: unknown entry; did you mean 'lr'?"),
        ("train.step=1", "train.step: unknown entry; did you mean 'steps'?"),
        ("optim.lr=-1", "optim.lr: got -1"),
        ("optim.lr=fast", "optim.lr: got 'fast'"),
        ("optim.lr=.nan", "optim.lr: got nan"),
        ("optim.betas=[0.9]", "optim.betas.1: missing"),
        ("optim.schedule=linear", "optim.schedule: got 'linear'"),
        ("ema.decay=1", "ema.decay: got 1"),
        ("train.steps=0", "train.steps: got 0"),
        ("train.steps=2.5", "train.steps: got 2.5"),
        ("train.steps=true", "train.steps: got True"),
        ("train.precision=fp8", "train.precision: got 'fp8'"),
        ("checkpoint.keep=0", "checkpoint.keep: got 0"),
        ("sample.labels=all", "sample.labels: got 'all'; expected balanced, random, none, a class, or a list"),
        ("sample.labels=[0, -1]", "sample.labels: got [0, -1]; expected balanced"),
        ("data.name=digts", "data.name: unknown data set 'digts'; did you mean 'digits'?"),
        ("data.splt=train", "data.splt: data set 'digits' has no such option; did you mean 'split'?"),
        ("data.split=test", "data.split: got 'test'"),
        ("backbone.name=sitt", "backbone.name: unknown backbone 'sitt'; did you mean 'sit'?"),
        (
            "backbone.hiden_size=8",
            "backbone.hiden_size: backbone 'sit' has no such option; did you mean 'hidden_size'?",
        ),
        ("backbone.depth=two", "backbone.depth: got 'two'"),
        ("objective.times.men=1", "objective.times.men: law of time 'logit-normal' has no such option"),
        ("objective.times.name=beta", "objective.times.name: unknown law of time 'beta'"),
        ("objective.interpolant=linear", "objective.interpolant: objective 'velocity' has no such option"),
        ("solver=3", "solver: got 3, expected a name or {name: …, options}"),
        ("solver.grid.name=papr", "solver.grid.name: unknown grid 'papr'; did you mean 'paper'?"),
        ("guidance.0.scale=high", "guidance.0.scale: got 'high'"),
        ("guidance.0.interval=[0.2]", "guidance.0.interval: got [0.2]"),
        ("guidance=high", "guidance: got 'high'"),
        ("guidance.0.scale=.inf", "guidance.0.scale: got inf"),
        ("objective.times.mean=.nan", "objective.times.mean: got nan"),
        ("objective.coupling=optimal", "objective.coupling.name: unknown coupling 'optimal'"),
        (
            "objective.coupling={name: sinkhorn, reg: 1}",
            "objective.coupling.reg: coupling 'sinkhorn' has no such option",
        ),
        ("objective.wanted_times=beta", "objective.wanted_times.name: unknown law of time 'beta'"),
        (
            "objective.weighting=min_snr",
            "objective.weighting.name: unknown weighting 'min_snr'; did you mean 'min-snr'?",
        ),
        ("objective.label_dropout=.nan", "objective.label_dropout: got nan"),
    ],
)
def test_wrong_entries_are_named_with_the_nearest_valid_one(word, said):
    assert said in refusal(word)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.devices=4"], "train.global_batch: got 6, which 4 devices do not divide"),
        (["train.devices=3", "train.micro_batch=3"], "train.micro_batch: got 3, more than a device's share 2"),
        (["train.stop_at=8"], "train.stop_at: got 8, after the last step 7"),
        (["optim.warmup_steps=9"], "optim.warmup_steps: got 9, more than train.steps 7"),
        (["optim.final_lr_fraction=0.1"], "optim.final_lr_fraction: got 0.1 beside a constant schedule"),
        (["backbone.input_size=12"], "backbone: takes inputs of shape (1, 12, 12), and the data have (1, 8, 8)"),
        (["backbone.in_channels=3"], "backbone: takes inputs of shape (3, 8, 8)"),
        (["backbone.num_classes=7"], "backbone.num_classes: got 7, and the data have 10 classes"),
        (["backbone.patch_size=3"], "backbone: got"),
        (["backbone.num_heads=5"], "backbone: got"),
        (["backbone.name=deepflow", "backbone.size=S", "backbone.input_size=8", "backbone.patch_size=2"], "backbone: "),
        (["guidance.0.scale=2", "backbone.num_classes=0"], "guidance: needs a backbone with classes"),
        (["guidance.0.interval=[0.7, 0.1]"], "guidance.0: got guidance interval"),
        (["objective.label_dropout=1.5"], "objective: got label_dropout 1.5"),
        (["objective.times.std=0"], "objective: got mean 0.0 and std 0"),
        (["objective.name=deepflow"], "objective: got a SiT without branches"),
        (["solver.steps=0"], "solver: got steps 0"),
        (["solver.start=2"], "solver: got start 2"),
        (["guidance=[{name: branch, branch: 1}]"], "guidance: got a SiT"),
        (
            ["objective=mean-flow", "backbone.takes_gap=true", "train.activation_checkpointing=selective"],
            "objective: cannot be differentiated through blocks that compute their activations again",
        ),
        (
            [f"backbone={DEEPFLOW}", "train.devices=2"],
            "objective: gives no gradient to middle_head",
        ),
    ],
)
def test_contradictions_are_found_before_anything_starts(words, said):
    assert said in refusal(*words)


def test_a_backbone_that_draws_at_random_is_refused(monkeypatch):
    make = parts._backbone
    for p in (0.0, 0.3):

        def with_dropout(configuration, p=p):
            backbone = make(configuration)
            backbone.dropout = torch.nn.Dropout(p)
            return backbone

        monkeypatch.setattr(parts, "_backbone", with_dropout)
        if p:
            assert "backbone: draws at random in dropout (Dropout, p = 0.3)" in refusal()
        else:
            build(resolve(entries()))


def test_differences_pass_where_activations_are_computed_again():
    mean_flow = ("objective=mean-flow", "objective.derivative=finite-difference", "backbone.takes_gap=true")
    build(resolve(entries(*mean_flow, "train.activation_checkpointing=1")))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("train.precision=bf16", "train.precision bf16"),
        ("train.precision=fp16", "train.precision fp16"),
        ("train.tf32=true", "train.tf32"),
    ],
)
def test_differences_need_the_precision_that_they_are_taken_in(words, named, monkeypatch):
    """bf16 keeps 8 bits: of outputs that differ by 1e-3 of their size it leaves rounding alone."""
    build(resolve(entries(words)))
    monkeypatch.setattr(objectives.Velocity, "takes_differences", True, raising=False)
    build(resolve(entries()))
    build(resolve(entries(words)), training=False)
    said = refusal(words)
    assert f"objective: divides small differences of the network's outputs, which {named} does not resolve" in said
    assert "its exact derivative (jvp), or use train.precision=fp32 without train.tf32" in said


def test_what_the_machine_lacks(monkeypatch):
    """Training is refused; the configuration itself is not, so that its model can be sampled from elsewhere."""
    for count, words, said in (
        (0, ["train.precision=fp16"], "train.precision: got fp16 without a CUDA device"),
        (4, ["train.precision=fp16", "train.accelerator=cpu"], "train.precision: got fp16 without a CUDA device"),
        (0, ["train.accelerator=cuda"], "train.devices: got 1, of 0 CUDA devices"),
        (1, ["train.devices=2"], "train.devices: got 2, of 1 CUDA devices"),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        train = resolve(entries(*words)).train
        with pytest.raises(ConfigurationError, match=said):
            check_machine(train)
    if not torch.backends.mps.is_available():
        with pytest.raises(ConfigurationError, match="train.accelerator: got mps, of which Fabric says"):
            make_fabric(resolve(entries("train.accelerator=mps")).train)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_machine(resolve(entries("train.devices=2")).train)


def test_all_problems_come_in_one_error():
    words = ["dta=1", "optim.lrr=1", "backbone.depht=2", "solver.name=rk", "objective.times.men=0", "train.seed=-1"]
    said = refusal(*words)
    for path in ("dta", "optim.lrr", "backbone.depht", "solver.name", "objective.times.men", "train.seed"):
        assert f"\n  {path}:" in said
    assert said.startswith("6 wrong configuration entries")


def test_all_refusals_of_the_parts_come_in_one_error():
    said = refusal("backbone.num_heads=5", "solver.steps=0", "objective.label_dropout=2")
    assert said.startswith("3 configuration entries that do not fit")


def test_missing_sections_are_named():
    with pytest.raises(ConfigurationError) as error:
        resolve({"data": "digits", "train": {"steps": 3}})
    for path in ("backbone", "objective", "train.folder"):
        assert f"{path}: missing" in str(error.value)


def test_differences_name_each_entry():
    changed = differences(resolve(entries()), resolve(entries("optim.lr=3e-3", "objective.times.std=2")))
    assert changed == ["objective.times.std: 1.0 -> 2.0", "optim.lr: 0.0001 -> 0.003"]


def test_first_weights_depend_on_the_seed_alone_and_leave_torchs_generator():
    before = torch.get_rng_state()
    first, again = (build(resolve(entries())).backbone.state_dict() for _ in range(2))
    other = build(resolve(entries("train.seed=1"))).backbone.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_every_section_is_documented():
    for name in ("Optim", "Ema", "Train", "Log", "Checkpoint", "Sample"):
        assert getattr(config, name).__doc__
