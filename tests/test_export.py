"""Exported weights: a model built of the two files alone is the one that was trained; damaged pairs are refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import pathline
from pathline import backbones
from pathline.core.config import resolve
from pathline.core.errors import CheckpointError, InputError
from pathline.training import checkpoints, export
from pathline.training.checkpoints import Keep, Snapshot
from pathline.training.export import main, make_whole
from pathline.training.exported import load_exported
from pathline.training.sharded import ShardedWriter

AVERAGES = ["ema", "ema-0.050"]


def configuration(folder):
    return resolve(
        {
            "data": "digits",
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
            "objective": "velocity",
            "ema": {"decay": 0.5, "lengths": [0.05]},
            "solver": {"name": "euler", "steps": 3},
            "train": {"steps": 7, "folder": str(folder)},
        }
    )


def network(number):
    """The configured network with weights of its own for every group."""
    torch.manual_seed(number)
    built = backbones.build(configuration("runs/x").backbone)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_()
    return built


def snapshot(folder):
    groups = {name: network(i).state_dict() for i, name in enumerate(["model", *AVERAGES])}
    state = {
        "version": "0.0.7",
        "good": False,
        "configuration": configuration(folder).model_dump(mode="json"),
        "data": {"name": "digits", "count": 1797},
        "statistics": {"mean": 0.25},
        "samples": {"shape": [1, 8, 8], "num_classes": 10, "data_are_images": True, "latents_of": None},
    }
    return Snapshot({**groups, "optim": {"labels.weight.exp_avg": torch.randn(11, 12)}}, state)


@pytest.fixture(params=["whole", "sharded"])
def run(request, tmp_path, processes):
    """A run's folder with one checkpoint, of step 5; the sharded one is of two processes."""
    folder = tmp_path / "run"
    if request.param == "whole":
        checkpoints.write(folder / "checkpoints", 5, snapshot(folder), Keep(1))
    else:
        processes(2, write_sharded, folder).checked()
    return folder


def write_sharded(folder):
    dist.init_process_group("gloo")
    mesh, whole = init_device_mesh("cpu", (2,)), snapshot(folder)
    tensors = {
        group: {k: distribute_tensor(t, mesh, [Shard(0)]) if t.ndim else t for k, t in named.items()}
        for group, named in whole.tensors.items()
    }
    writer = ShardedWriter(folder / "checkpoints", Keep(1), asynchronous=False)
    writer.save(5, Snapshot(tensors, whole.state))
    writer.close()
    dist.destroy_process_group()
    assert writer.saved == 1


def test_the_two_files_suffice_to_build_the_model(run, tmp_path):
    for number, average in enumerate(["model", *AVERAGES]):
        path = export.export(
            run / "checkpoints" / "step-000000005", average, tmp_path / f"shared {average}.safetensors"
        )
        (tmp_path / average).mkdir()
        moved = [file.rename(tmp_path / average / file.name) for file in (path, path.with_suffix(".json"))]
        found, weights = load_exported(moved[0])
        assert found == configuration(run)
        built = backbones.build(found.backbone)
        built.load_state_dict(weights, strict=True)
        x, t, label = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([7, 0, 10])
        with torch.no_grad():
            assert torch.equal(built.eval()(x, t, label=label), network(number).eval()(x, t, label=label))


def test_the_json_file_tells_what_the_weights_are(run):
    path = export.export(run / "checkpoints" / "step-000000005")
    assert path == run / "ema-step-000000005.safetensors"  # the first average
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "version": pathline.__version__,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "average": "ema",
        "step": 5,
        "configuration": configuration(run).model_dump(mode="json"),
        "data": {"name": "digits", "count": 1797},
        "statistics": {"mean": 0.25},
        "samples": {"shape": [1, 8, 8], "num_classes": 10, "data_are_images": True, "latents_of": None},
    }
    assert path.stat().st_mode == path.with_suffix(".json").stat().st_mode
    assert sorted(file.name for file in run.iterdir()) == ["checkpoints", path.with_suffix(".json").name, path.name]


def test_a_whole_checkpoint_of_shards(run):
    old = run / "checkpoints" / "step-000000005"
    path = make_whole(old)
    assert path == run / "whole" / "step-000000005"
    before, after = checkpoints.read(old), checkpoints.read(path)  # which verifies it
    assert after.state == before.state and after.state["good"] is False
    assert sorted(file.name for file in path.iterdir()) == sorted(
        [*(f"{group}.safetensors" for group in ("model", *AVERAGES, "optim")), "manifest.json", "state.json"]
    )
    for group, tensors in snapshot(run).tensors.items():
        stored = load_file(path / f"{group}.safetensors")
        assert stored.keys() == tensors.keys() == before.tensors[group].keys()
        for name, tensor in tensors.items():
            if group != "optim":
                assert torch.equal(stored[name], tensor)
            assert torch.equal(stored[name], before.tensors[group][name])
    with pytest.raises(CheckpointError, match="is there already"):
        make_whole(old)


@pytest.fixture
def whole(tmp_path):
    return checkpoints.write(tmp_path / "run" / "checkpoints", 5, snapshot(tmp_path / "run"), Keep(1))


@pytest.mark.parametrize(
    ("average", "said"),
    [
        ("ema-0.500", "did you mean 'ema-0.050'? Known: ema, ema-0.050, model"),
        ("optim", "Known: ema, ema-0.050, model"),
    ],
)
def test_other_averages_are_refused(average, said, whole):
    with pytest.raises(CheckpointError) as error:
        export.export(whole, average)
    assert said in str(error.value)


def test_other_endings_are_refused(whole, tmp_path):
    with pytest.raises(InputError, match=r"ends in \.safetensors"):
        export.export(whole, output=tmp_path / "model.pt")


def test_a_failed_export_leaves_what_was_there(whole, monkeypatch):
    path = export.export(whole)

    def full(_, file, **__):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        export.export(whole)
    load_exported(path)
    assert sorted(file.suffix for file in path.parent.iterdir()) == ["", ".json", ".safetensors"]
    with pytest.raises(OSError, match="No space"):
        make_whole(whole)
    assert list((whole.parent.parent / "whole").iterdir()) == []


@pytest.mark.parametrize("when", ["in the JSON file", "between both"])
def test_an_export_that_ends_early_leaves_nothing_that_seems_whole(when, whole, tmp_path, monkeypatch):
    """Other weights over earlier ones: both files stay, or are told to be of different ones."""
    path = export.export(whole, "model", tmp_path / "x" / "shared.safetensors")
    before = [file.read_bytes() for file in (path, path.with_suffix(".json"))]
    write, replace = Path.write_text, Path.replace

    def full(file, text, **options):
        if "shared.json" in file.name:
            write(file, text[:20])
            raise OSError(28, "No space left on device")
        return write(file, text, **options)

    def killed(file, target):
        if target.suffix == ".json":
            raise KeyboardInterrupt
        return replace(file, target)

    monkeypatch.setattr(Path, *(("write_text", full) if when == "in the JSON file" else ("replace", killed)))
    with pytest.raises(OSError if when == "in the JSON file" else KeyboardInterrupt):
        export.export(whole, "ema", path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["shared.json", "shared.safetensors"]
    if when == "in the JSON file":
        assert [file.read_bytes() for file in (path, path.with_suffix(".json"))] == before
    else:
        with pytest.raises(CheckpointError, match="other contents than shared.json tells"):
            load_exported(path)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit(path, **changes):
    record = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in {**record, **changes}.items() if value is not None}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path, beside: flip(path), "other contents than ema-step-000000005.json tells"),
        (lambda path, beside: save_file(network(7).state_dict(), path), "other contents"),
        (lambda path, beside: edit(beside, sha256="0" * 64), "other contents"),
        (lambda path, beside: edit(beside, sha256=None), "does not tell of weights"),
        (lambda path, beside: edit(beside, configuration=None), "does not tell of weights"),
        (lambda path, beside: edit(beside, configuration=[]), "does not tell of weights"),
        (lambda path, beside: beside.write_text("[]"), "cannot be read"),
        (lambda path, beside: beside.write_text("{"), "cannot be read"),
        (lambda path, beside: beside.unlink(), "no file .*json"),
        (lambda path, beside: path.unlink(), "no file .*safetensors"),
        (
            lambda path, beside: edit(beside, sha256=hashlib.sha256(b"x" * path.write_bytes(b"x")).hexdigest()),
            "no safetensors file",
        ),
    ],
)
def test_files_that_do_not_belong_together_are_refused(damage, said, whole):
    path = export.export(whole)
    load_exported(path)
    damage(path, path.with_suffix(".json"))
    with pytest.raises(CheckpointError, match=said):
        load_exported(path)


def test_a_damaged_checkpoint_is_refused(whole, capsys):
    flip(whole / "optim.safetensors")
    for work in (export.export, make_whole):
        with pytest.raises(CheckpointError, match="optim.safetensors with other contents"):
            work(whole)
    assert main([str(whole)]) == 2 and "error: got optim.safetensors" in capsys.readouterr().err
    assert main([str(whole.parent.parent)]) == 2 and "no valid checkpoint" in capsys.readouterr().err


def test_the_command(whole, tmp_path, capsys):
    run = whole.parent.parent
    assert main([str(run), "--average", "ema-0.050", "--output", str(tmp_path / "new" / "m.safetensors")]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "new" / f"m.{ending}") for ending in ("safetensors", "json")
    ]
    assert torch.equal(load_exported(tmp_path / "new" / "m.safetensors")[1]["labels.weight"], network(2).labels.weight)
    assert main([str(whole), "--whole"]) == 0
    assert capsys.readouterr().out.split() == [str(run / "whole" / "step-000000005")]
    assert main([str(whole), "--whole", "--output", str(tmp_path / "other")]) == 0
    checkpoints.verify(tmp_path / "other" / "step-000000005")
    with pytest.raises(SystemExit):
        main([str(run), "--whole", "--average", "ema"])


@pytest.mark.slow
def test_the_command_as_a_module(whole):
    command = [sys.executable, "-m", "pathline.training.export", str(whole), "--average", "model"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert load_exported(whole.parent.parent / "model-step-000000005.safetensors")
