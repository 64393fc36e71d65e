"""Checkpoints: whole or refused by the name of the damaged file; the newest whole one is found; old ones go."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pathline.core.errors import CheckpointError
from pathline.training import checkpoints, manifest
from pathline.training.checkpoints import Snapshot, check_tensors, find, latest, read, verify, write

FILES = ["ema.safetensors", "model.safetensors", "optim.safetensors", "state.json"]


def snapshot(value: float = 1.0) -> Snapshot:
    groups = {name: {"weight": torch.full((2, 3), value), "bias": torch.arange(5.0)} for name in ("model", "ema")}
    return Snapshot({**groups, "optim": {"weight.exp_avg": torch.zeros(2, 3)}}, {"position": 7})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read_back(tmp_path):
    path = write(tmp_path, 3000, snapshot(2.5), keep=3)
    assert path == tmp_path / "step-000003000"
    back = read(path)
    assert back.state == {"format": 2, "step": 3000, "good": True, "position": 7}
    for group, tensors in snapshot(2.5).tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(back.tensors[group][name], tensor)
            assert torch.equal(load_file(path / f"{group}.safetensors")[name], tensor)


def test_the_manifest_holds_size_and_sha256_of_every_other_file(tmp_path):
    path = write(tmp_path, 5, snapshot(), keep=3)
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted(manifest["files"]) == FILES and names(path) == sorted([*FILES, "manifest.json"])
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_order_of_writing(tmp_path, monkeypatch):
    """Every file reaches the disk before the manifest is written, all before the rename, the parent after it."""
    events = []
    sync, rename = manifest.sync, Path.rename

    def record_sync(path):
        events.append(path.name if path.is_file() else ("parent" if path == tmp_path else "folder"))
        if path.is_file() and path.name != "manifest.json":
            assert not (path.parent / "manifest.json").exists()
        sync(path)

    for module in (checkpoints, manifest):
        monkeypatch.setattr(module, "sync", record_sync)
    monkeypatch.setattr(Path, "rename", lambda old, new: (events.append("rename"), rename(old, new))[1])
    write(tmp_path, 5, snapshot(), keep=3)
    assert events == [*FILES, "manifest.json", "folder", "rename", "parent"]


def test_keeps_the_newest(tmp_path):
    for step in (2, 3, 5, 7, 11):
        write(tmp_path, step, snapshot(step), keep=2)
    assert names(tmp_path) == ["step-000000007", "step-000000011"]
    assert float(read(tmp_path / "step-000000007").tensors["model"]["weight"][0, 0]) == 7


def test_damaged_ones_do_not_count_and_stay(tmp_path):
    for step in (2, 3, 5):
        write(tmp_path, step, snapshot(), keep=3)
    (tmp_path / "step-000000005" / "manifest.json").unlink()
    write(tmp_path, 7, snapshot(), keep=2)
    assert names(tmp_path) == ["step-000000003", "step-000000005", "step-000000007"]


def test_a_whole_checkpoint_is_not_written_again_and_a_damaged_one_is(tmp_path):
    path = write(tmp_path, 5, snapshot(1), keep=3)
    write(tmp_path, 5, snapshot(2), keep=3)
    assert float(read(path).tensors["model"]["weight"][0, 0]) == 1
    for value in (2, 3):
        (path / "state.json").unlink()
        write(tmp_path, 5, snapshot(value), keep=3)
        assert float(read(path).tensors["model"]["weight"][0, 0]) == value
    assert names(tmp_path) == ["damaged-step-000000005-1", "damaged-step-000000005-2", "step-000000005"]  # evidence


def test_a_failed_write_leaves_the_others_and_no_trace(tmp_path, monkeypatch):
    write(tmp_path, 3, snapshot(), keep=1)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 5, snapshot(), keep=1)
    assert names(tmp_path) == ["step-000000003"]
    verify(tmp_path / "step-000000003")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "{name} of {short} bytes, expected {whole}"),
        (flip, "{name} with other contents than its hash"),
        (Path.unlink, "no file {name}"),
    ],
)
def test_a_damaged_file_is_refused_by_name_and_the_one_before_is_found(name, damage, said, tmp_path):
    good, bad = (write(tmp_path, step, snapshot(), keep=3) for step in (3, 5))
    whole = (bad / name).stat().st_size
    damage(bad / name)
    expected = said.format(name=name, whole=whole, short=whole - 1)
    with pytest.raises(CheckpointError) as error:
        read(bad)
    assert expected in str(error.value) and str(bad) in str(error.value)
    warned = []
    assert latest(tmp_path, warned.append) == good
    assert len(warned) == 1 and expected in warned[0] and str(bad) in warned[0]
    assert bad.exists()


def edit(**changes):
    def damage(path):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps({**manifest, **changes}))

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "no manifest.json"),
        (truncate, "a manifest.json that cannot be read"),
        (lambda path: path.write_text("[]"), "a manifest.json that cannot be read"),
        (edit(format=9), "format 9"),
        (edit(step=4), "the manifest of step 4"),
        (edit(files={}), "a manifest.json that names only"),
        (edit(files={name: {} for name in FILES}), "a manifest.json that cannot be read"),
        (edit(files={**{name: {} for name in FILES}, "../x": {}}), "that cannot be read"),
    ],
)
def test_a_damaged_manifest_is_refused(damage, said, tmp_path):
    path = write(tmp_path, 5, snapshot(), keep=3)
    damage(path / "manifest.json")
    with pytest.raises(CheckpointError, match=said):
        verify(path)


def test_no_manifest_can_reach_outside_of_its_folder(tmp_path):
    path = write(tmp_path, 5, snapshot(), keep=3)
    manifest = json.loads((path / "manifest.json").read_text())
    outside = tmp_path / "outside"
    outside.write_bytes(b"abc")
    manifest["files"]["../outside"] = {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"names '\.\./outside'"):
        verify(path)


def test_swapped_files_are_refused(tmp_path):
    path = write(tmp_path, 5, snapshot(), keep=3)
    os.replace(path / "model.safetensors", path / "kept")
    os.replace(path / "optim.safetensors", path / "model.safetensors")
    os.replace(path / "kept", path / "optim.safetensors")
    with pytest.raises(CheckpointError, match="safetensors of"):
        read(path)


def test_finding(tmp_path):
    path = write(tmp_path / "checkpoints", 5, snapshot(), keep=3)
    assert find(tmp_path) == find(path) == path
    assert latest(tmp_path / "nowhere", pytest.fail) is None
    (tmp_path / "checkpoints" / ".writing-000000009-1").mkdir()
    (tmp_path / "checkpoints" / "step-last").mkdir()
    assert find(tmp_path) == path
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        find(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"weight": torch.zeros(2, 3)}, "missing bias"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(5), "gain": torch.zeros(1)}, "unexpected gain"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(5)}, r"weight is \(3, 2\) torch.float32, expected \(2, 3\)"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(5).half()}, "bias is .* torch.float16, expected"),
    ],
)
def test_tensors_that_do_not_fit(theirs, said):
    with pytest.raises(CheckpointError, match=said):
        check_tensors({"weight": torch.zeros(2, 3), "bias": torch.zeros(5)}, theirs, "weights")
