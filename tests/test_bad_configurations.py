"""Wrong configurations, as a user gives them to ``train.py``: the entry is named before anything starts."""

from __future__ import annotations

import re

import pytest
import torch
import yaml

from pathline import train
from pathline.backbones import Backbone, registry
from pathline.core.config import Configuration
from pathline.core.sections import Section

ENTRIES = {
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
    "solver": {"name": "euler", "steps": 2},
    "train": {"steps": 7, "global_batch": 6, "accelerator": "cpu"},
}
# words, the entry that is named, and what is said of it
SECTIONS = [
    # --- optimizer
    ("optim=adamw", "optim", "got 'adamw'"),
    ("optim.beta=0.9", "optim.beta", "did you mean 'betas'?"),
    ("optim.name=sgd", "optim.name", "'adamw' or 'muon'"),
    ("optim.lr=0", "optim.lr", "greater than 0"),
    ("optim.lr=true", "optim.lr", "got True"),
    ("optim.lr='1e-3'", "optim.lr", "got '1e-3'"),
    ("optim.lr=.inf", "optim.lr", "finite"),
    ("optim.betas=[0.9, 1.0]", "optim.betas.1", "less than 1"),
    ("optim.betas=[0.9, 0.99, 0.999]", "optim.betas", "at most 2"),
    ("optim.betas=0.9", "optim.betas", "tuple"),
    ("optim.eps=0", "optim.eps", "greater than 0"),
    ("optim.weight_decay=-0.1", "optim.weight_decay", "greater than or equal to 0"),
    ("optim.weight_decay=yes", "optim.weight_decay", "got True"),
    ("optim.decay=none", "optim.decay", "'matrices' or 'all'"),
    ("optim.muon_momentum=1 optim.name=muon", "optim.muon_momentum", "less than 1"),
    ("optim.muon_momentum=0.9", "optim.muon_momentum", "got 0.9 for adamw"),
    ("optim.warmup_steps=-1", "optim.warmup_steps", "greater than or equal to 0"),
    ("optim.warmup_steps=8", "optim.warmup_steps", "more than train.steps 7"),
    ("optim.schedule=linear", "optim.schedule", "'constant' or 'cosine'"),
    ("optim.final_lr_fraction=1.5 optim.schedule=cosine", "optim.final_lr_fraction", "less than or equal to 1"),
    ("optim.final_lr_fraction=0.1", "optim.final_lr_fraction", "beside a constant schedule"),
    ("optim.clip=0", "optim.clip", "greater than 0"),
    ("optim.clip=on", "optim.clip", "got True"),
    # --- averages
    ("ema.decay=1", "ema.decay", "less than 1"),
    ("ema.decay=false", "ema.decay", "got False"),
    ("ema.decay=null", "ema.decay", "give one of them"),
    ("ema.warmup=100", "ema.warmup", "boolean"),
    ("ema.warmup=false ema.decay=null ema.lengths=[0.05]", "ema.warmup", "without ema.decay"),
    ("ema.lengths=0.05", "ema.lengths", "tuple"),
    ("ema.lengths=[0.05, 0.3]", "ema.lengths.1", "less than or equal to 0.28"),
    ("ema.lengths=[0.05, 0.0504]", "ema.lengths", "equal to three decimals"),
    ("ema.snapshot_every=0", "ema.snapshot_every", "greater than or equal to 1"),
    ("ema.snapshot_every=2", "ema.snapshot_every", "with 0 ema.lengths"),
    ("ema.snapshot_every=8 ema.lengths=[0.05, 0.1]", "ema.snapshot_every", "more than train.steps 7"),
    # --- guard
    ("guard=off", "guard", "got False"),
    ("guard.spike=0", "guard.spike", "greater than 0"),
    ("guard.spike=1e7", "guard.spike", "less than or equal to 1000000"),
    ("guard.rollback_after=2.5", "guard.rollback_after", "got 2.5"),
    ("guard.rollback_after=0", "guard.rollback_after", "greater than or equal to 1"),
    ("guard.max_rollbacks=-1", "guard.max_rollbacks", "greater than or equal to 0"),
    # --- training
    ("train=7", "train", "got 7"),
    ("train.step=7", "train.step", "did you mean 'steps'?"),
    ("train.steps=7e0", "train.steps", "got 7.0"),
    ("train.folder=''", "train.folder", "at least 1 character"),
    ("train.folder=7", "train.folder", "string"),
    ("train.stop_at=8", "train.stop_at", "after the last step 7"),
    ("train.stop_at=0", "train.stop_at", "greater than or equal to 1"),
    ("train.seed=-1", "train.seed", "greater than or equal to 0"),
    ("train.seed=18446744073709551616", "train.seed", "less than 18446744073709551616"),
    ("train.global_batch=0", "train.global_batch", "greater than or equal to 1"),
    ("train.global_batch=7 train.devices=2", "train.global_batch", "which 2 devices do not divide"),
    ("train.global_batch=10 train.devices=2 train.num_nodes=3", "train.global_batch", "which 6 devices"),
    ("train.micro_batch=0", "train.micro_batch", "greater than or equal to 1"),
    ("train.micro_batch=4 train.devices=2", "train.micro_batch", "more than a device's share 3"),
    ("train.threads=0", "train.threads", "greater than or equal to 1"),
    ("train.threads=9999999999", "train.threads", "less than or equal to 1024"),
    ("train.precision=fp64", "train.precision", "'fp32', 'bf16' or 'fp16'"),
    ("train.precision=fp16", "train.precision", "without a CUDA device"),
    ("train.tf32=high", "train.tf32", "boolean"),
    ("train.accelerator=gpu", "train.accelerator", "'auto', 'cpu', 'cuda' or 'mps'"),
    ("train.devices=auto", "train.devices", "integer"),
    ("train.accelerator=cuda", "train.devices", "of 0 CUDA devices"),
    ("train.num_nodes=0", "train.num_nodes", "greater than or equal to 1"),
    ("train.strategy=zero train.devices=2", "train.strategy", "'auto', 'ddp' or 'fsdp'"),
    ("train.strategy=fsdp", "train.strategy", "for one device"),
    ("train.strategy=fsdp train.devices=2 train.precision=fp16", "train.strategy", "use bf16, or ddp"),
    ("train.activation_checkpointing=true", "train.activation_checkpointing", "expected none, selective, or a"),
    ("train.activation_checkpointing=0", "train.activation_checkpointing", "expected none, selective, or a"),
    ("train.compile=max-autotune", "train.compile", "boolean"),
    ("train.timeout=0.5", "train.timeout", "greater than or equal to 1"),
    ("train.timeout=1e15", "train.timeout", "less than or equal to 1000000"),
    ("train.collect_garbage_every=0", "train.collect_garbage_every", "greater than or equal to 1"),
    ("train.initialize_from=''", "train.initialize_from", "at least 1 character"),
    ("train.initialize_from=[a, b]", "train.initialize_from", "string"),
    # --- log, checkpoints, samples
    ("log.every=0", "log.every", "greater than or equal to 1"),
    ("log.pictures_every=0.5", "log.pictures_every", "got 0.5"),
    ("log.time_bins=-1", "log.time_bins", "greater than or equal to 0"),
    ("log.time_bins=100000000", "log.time_bins", "less than or equal to 1000"),
    ("log.tensorboard=runs", "log.tensorboard", "boolean"),
    ("log.wandb=''", "log.wandb", "at least 1 character"),
    ("log.wandb=true", "log.wandb", "string"),
    ("checkpoint.every=0", "checkpoint.every", "greater than or equal to 1"),
    ("checkpoint.keep=0", "checkpoint.keep", "greater than or equal to 1"),
    ("checkpoint.keep_every=5 checkpoint.every=2", "checkpoint.keep_every", "a multiple of checkpoint.every 2"),
    ("checkpoint.asynchronous=later", "checkpoint.asynchronous", "boolean"),
    ("sample.count=0", "sample.count", "greater than or equal to 1"),
    ("sample.labels=all", "sample.labels", "expected balanced, random, none"),
    ("sample.labels=[]", "sample.labels", "expected balanced, random, none"),
    ("sample.labels=[3, 12]", "sample.labels", "expected classes from 0 to 9"),
    ("sample.seed=-3", "sample.seed", "greater than or equal to 0"),
    ("sample.batch=none", "sample.batch", "integer"),
    ("sample.output=x.png", "sample.output", "ends in .npz"),
    ("sample.average=ema-0.05 ema.lengths=[0.05]", "sample.average", "did you mean 'ema-0.050'?"),
    ("sample.average=''", "sample.average", "at least 1 character"),
    ("sample.decode_batch=0", "sample.decode_batch", "greater than or equal to 1"),
    ("sample.devices=0", "sample.devices", "greater than or equal to 1"),
    ("sample.shard=0", "sample.shard", "greater than or equal to 1"),
    ("sample.shards=drop", "sample.shards", "'join' or 'keep'"),
    # --- autoencoder
    ("autoencoder=[diffusers]", "autoencoder", "expected a name or {name: …, options}"),
    ("autoencoder=diffuser", "autoencoder.name", "did you mean 'diffusers'?"),
    # --- evaluation in training
    ("evaluation=10", "evaluation", "got 10"),
    ("evaluation.every=0", "evaluation.every", "greater than or equal to 1"),
    ("evaluation.count=1", "evaluation.count", "greater than or equal to 2"),
    ("evaluation.metrics=[]", "evaluation.metrics", "name one or more"),
    ("evaluation.metrics=[3]", "evaluation.metrics.0", "expected a name, as fid"),
    ("evaluation.reference=''", "evaluation.reference", "at least 1 character"),
    ("evaluation.features=[inception]", "evaluation.features", "dictionary"),
    ("evaluation.averages=[ema-0.1]", "evaluation.averages", "did you mean 'ema'?"),
    ("evaluation.labels=all", "evaluation.labels", "expected balanced, random, none"),
    ("evaluation.seed=-1", "evaluation.seed", "greater than or equal to 0"),
    ("evaluation.batch=0", "evaluation.batch", "greater than or equal to 1"),
]
COMPONENTS = [
    ("bakbone=sit", "bakbone", "did you mean 'backbone'?"),
    ("data=null", "data", "expected a name or {name: …, options}"),
    ("data=digts", "data.name", "did you mean 'digits'?"),
    ("data.split=test", "data.split", "'train', 'held-out' or 'all'"),
    ("interpolant=[linear]", "interpolant", "expected a name or"),
    ("interpolant=cubic", "interpolant.name", "unknown interpolant"),
    ("backbone={}", "backbone", "expected a name or"),
    ("backbone.dept=3", "backbone.dept", "did you mean 'depth'?"),
    ("backbone.depth=true", "backbone.depth", "got True"),
    ("backbone.cuts=[2]", "backbone", "got cuts (2,)"),
    ("backbone.mlp_ratio=-1", "backbone", "got mlp_ratio -1"),
    ("backbone.input_size=12", "backbone", "the data have (1, 8, 8)"),
    ("backbone.num_classes=7", "backbone.num_classes", "the data have 10 classes"),
    ("objective.name=velocty", "objective.name", "did you mean 'velocity'?"),
    ("objective.times=null", "objective.times", "got None"),
    ("objective.times.std=true", "objective.times.std", "got True"),
    ("objective.times.name=logitnormal", "objective.times.name", "did you mean 'logit-normal'?"),
    ("objective.branch_weights=[0.2, true]", "objective.branch_weights", "got [0.2, True]"),
    ("objective.label_dropout=2", "objective", "got label_dropout 2"),
    (
        "objective.name=velocity objective.coupling.name=sinkhorn objective.coupling.reg=1",
        "objective.coupling.reg",
        "no",
    ),
    ("objective.name=velocity objective.loss=l1", "objective.loss", "'mse' or 'huber'"),
    ("solver.name=heun solver.grid.name=papr solver.steps=2", "solver.grid.name", "did you mean 'paper'?"),
    ("encoders=dinov2-b", "encoders", "got 'dinov2-b', expected a list; write encoders: [dinov2-b]"),
    ("encoders={name: timm, resolution: 32}", "encoders", "expected a list; write encoders: [{name: …}]"),
    ("encoders=3", "encoders", "got 3; Input should be a valid list"),
    ("encoders=[null]", "encoders.0", "expected a name or"),
    ("encoders=[dinov2-x]", "encoders.0.name", "did you mean 'dinov2-"),
    ("encoders=[{name: dinov2-b, resolutoin: 256}]", "encoders.0.resolutoin", "did you mean 'resolution'?"),
    ("encoders=[{name: dinov2-b, final_norm: 2}]", "encoders.0.final_norm", "got 2"),
    ("encoders=[{name: dinov2-b, cache: 3}]", "encoders.0.cache", "got 3"),
    ("encoders=[timm]", "encoders.0.model", "missing, 'timm' needs it"),
    ("encoders=[{name: dinov2-b, resolution: 100}]", "encoders.0", "got resolution 100, expected multiples of 16"),
    ("encoders=[{name: dinov2-b, cache: none.safetensors}]", "encoders.0", "got no features at none.safetensors"),
    ("objective.align=0.5", "encoders", "got none for the objective 'deepflow', which aligns to some"),
    ("solver.name=heun", "solver.steps", "missing, 'heun' needs it"),
    ("solver.steps=yes", "solver.steps", "got True"),
    ("solver.start=2", "solver", "got start 2"),
    ("guidance=cfg", "guidance", "got 'cfg', expected a list; write guidance: [cfg]"),
    ("guidance=[null]", "guidance.0", "expected a name or"),
    ("guidance.0.scale=high", "guidance.0.scale", "got 'high'"),
    ("guidance.0.scale=2 guidance.1.sacle=2", "guidance.1.sacle", "did you mean 'scale'?"),
    ("guidance.0.name=autoguidance guidance.0.scale=2", "guidance.0.weak", "missing"),
    (
        "guidance.0.scale=2 backbone.num_classes=0 objective.label_dropout=0",
        "guidance",
        "needs a backbone with classes",
    ),
    ("objective.name=velocity train.devices=2", "objective", "gives no gradient to middle_head"),
]
CASES = SECTIONS + COMPONENTS


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Call the command with words; returns what it said, after checks that it started and wrote nothing."""
    monkeypatch.setattr(train, "Trainer", lambda *_, **__: pytest.fail("the run was started"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    file = tmp_path / "c.yaml"

    def call(*words, text=None):
        folder = f"train.folder={tmp_path / 'run'}"
        given = () if text is not None or any(w.startswith(("train.folder=", "train=")) for w in words) else (folder,)
        file.write_text(yaml.safe_dump(ENTRIES) if text is None else text)
        before = torch.random.get_rng_state()
        assert train.main([str(file), *given, *words]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("error: ") and "Traceback" not in said.err
        assert list(tmp_path.iterdir()) == [file] and torch.equal(torch.random.get_rng_state(), before)
        return said.err

    return call


def split(words):
    """Cut a line at the blanks before ``entry=``; values may hold blanks."""
    parts = []
    for part in words.split(" "):
        if "=" in part:
            parts.append(part)
        else:
            parts[-1] += f" {part}"
    return parts


@pytest.mark.parametrize(("words", "entry", "said"), CASES, ids=[words for words, _, _ in CASES])
def test_the_entry_is_named_and_nothing_is_started(words, entry, said, refused):
    lines = refused(*split(words)).splitlines()
    named = [line.removeprefix("error: ").strip() for line in lines]
    about = [line for line in named if line.startswith(f"{entry}: ")]
    assert len(about) == 1 and said in about[0]
    assert len(lines) == 1 or lines[0] in (
        "error: 1 wrong configuration entry:",
        "error: 1 configuration entry that does not fit:",
    )


def test_every_entry_of_every_section_is_refused_once():
    sections = {name: field.annotation for name, field in Configuration.model_fields.items()}
    entries = {
        f"{name}.{entry}"
        for name, section in sections.items()
        if isinstance(section, type) and issubclass(section, Section)
        for entry in section.model_fields
    }
    named = {entry.removesuffix(".0").removesuffix(".1") for _, entry, _ in CASES}
    assert not entries - named and len(entries) > 45
    assert {entry.partition(".")[0] for entry in named} >= set(sections)
    assert len(CASES) >= 120 and len({words for words, _, _ in CASES}) == len(CASES)


def test_all_of_them_at_once_are_one_error(refused):
    """One case an entry, of those that are wrong by themselves."""
    alone = "greater than|less than|boolean|integer|string|expected balanced|expected none|' or '"
    chosen = {
        entry: words
        for words, entry, said in SECTIONS
        if words.startswith(f"{entry}=") and " " not in words and re.search(alone, said)
    }
    lines = refused(*chosen.values()).splitlines()
    assert len(chosen) >= 40 and lines[0] == f"error: {len(chosen)} wrong configuration entries:"
    assert [line.strip().partition(":")[0] for line in lines[1:]] == sorted(chosen)


def test_contradictions_come_together(refused):
    words = ("train.stop_at=9", "train.micro_batch=8", "optim.warmup_steps=8", "optim.final_lr_fraction=1e-2")
    words += ("optim.muon_momentum=0.5", "train.strategy=ddp", "ema.snapshot_every=3", "sample.average=average")
    words += ("checkpoint.keep_every=3", "checkpoint.every=2", "sample.output=samples")
    lines = refused(*words).splitlines()
    assert lines[0] == "error: 10 wrong configuration entries:" and len(lines) == 11
    wanted = {word.partition("=")[0] for word in words} - {"checkpoint.every"}
    assert {line.strip().partition(":")[0] for line in lines[1:]} == wanted


class _Plain(Backbone):
    """A backbone without blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape, self.num_classes = (1, 8, 8), 0
        self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.layer(x)


@pytest.mark.parametrize(
    ("words", "entry", "said"),
    [
        ("train.compile=true", "train.compile", "got True for a _Plain without blocks"),
        ("train.activation_checkpointing=selective", "train.activation_checkpointing", "got selective for a _Plain"),
        ("train.activation_checkpointing=3", "train.activation_checkpointing", "got 3 for a _Plain without blocks"),
        ("optim.name=muon", "optim.name", "got muon for a _Plain"),
    ],
)
def test_what_is_done_to_blocks_needs_some(words, entry, said, refused, monkeypatch):
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    registry.register("plain")(_Plain)
    plain = ("backbone=plain", "objective={name: velocity, label_dropout: 0}", "guidance=[]")
    lines = refused(*plain, words).splitlines()
    assert lines[0] == "error: 1 configuration entry that does not fit:" and lines[1].startswith(f"  {entry}: {said}")


# --- words and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optim.lr", "got 'optim.lr', expected entry=value"),
        ("=3", "expected entry=value"),
        ("optim.lr=[", "not YAML"),
        ("optim.lr=!!python/name:os.system", "not YAML"),
        ("optim.lr=2024-13-45", "not YAML: month must be in 1..12"),
        ("optim.lr=!!int seven", "not YAML"),
        ("optim.lr=" + 999 * "[", "not YAML"),
        ("optim.lr=" + 5000 * "9", "not YAML"),
        ("train.steps.x=3", "got an entry below train.steps, which holds 7; set train.steps itself"),
        ("backbone.cuts.x=3", "got backbone.cuts.x, expected a number from 0 to 1"),
        ("guidance.2.scale=3", "got guidance.2, expected a number from 0 to 0"),
        ("optim={lr: 1, lr: 2}", "got the entry lr twice"),
    ],
)
def test_words_that_do_not_fit(word, said, refused):
    assert said in refused(word)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a NoneType in it, expected sections"),
        ("- data\n", "a list in it, expected sections"),
        ("just words\n", "a str in it, expected sections"),
        ("data: [digits\n", "not YAML"),
        ("data: digits\n\ttrain: 3\n", "not YAML"),
        ("data: digits\n---\ndata: digits\n", "not YAML"),
        ("data: &a [*b]\n", "not YAML"),
        ("data: digits\ntrain: {steps: 3}\ndata: digits\n", "got the entry data twice"),
        ("data: digits\ntrain: {steps: 3, steps: 4}\n", "got the entry steps twice"),
        ("data: digits\ntrain: {{steps: 3}: 4}\n", "not YAML"),
        ("train: !!python/object/apply:os.system [echo]\n", "not YAML"),
        ("train: {steps: 3}\n7: 3\n", "7: "),
        ("train: {steps: 3, 7: 3}\n", "train.7: "),
        ("train: {steps: &a [*a]}\n", "train.steps: got [[...]]"),
        ("data: digits\n", "backbone: missing"),
        ("data: digits\n", "train: missing"),
        ("train: {}\n", "train.folder: missing"),
    ],
)
def test_files_that_are_no_configuration(text, said, refused):
    assert said in refused(text=text)


def test_files_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "binary.yaml").write_bytes(b"\x80\xff data: digits")
    (tmp_path / "wide.yaml").write_bytes("data: digits".encode("utf-16"))
    for name, said in (
        ("binary.yaml", "which is no text in UTF-8"),
        ("wide.yaml", "which is no text in UTF-8"),
        ("missing.yaml", "got no file at"),
        ("", "got no file at"),
    ):
        assert train.main([str(tmp_path / name)]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and said in printed and printed.count("\n") == 1
