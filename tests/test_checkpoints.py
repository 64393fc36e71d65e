"""Checkpoints: whole or refused by the name of the damaged file; no instant of a write endangers an older one."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import signal
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pathline.core.errors import CheckpointError
from pathline.training import checkpoints, manifest
from pathline.training.checkpoints import (
    Keep,
    Snapshot,
    check_tensors,
    find,
    finish,
    hash_of,
    latest,
    path_of,
    read,
    read_group,
    set_aside_after,
    verify,
    write,
)
from pathline.training.folder import RunFolder
from pathline.training.sharded import write_group

FILES = ["ema.safetensors", "model.safetensors", "optim.safetensors", "state.json"]
ALL = Keep(99)


def snapshot(value: float = 1.0, **state) -> Snapshot:
    model = {"weight": torch.full((2, 3), value), "bias": torch.arange(5.0)}
    groups = {"model": model, "ema": {name: tensor + 0.5 for name, tensor in model.items()}}
    return Snapshot({**groups, "optim": {"weight.exp_avg": torch.zeros(2, 3)}}, {"position": 7, **state})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(folder: Path) -> list[int]:
    return [int(name[5:]) for name in names(folder) if name.startswith("step-")]


def value(path: Path) -> float:
    return float(read(path).tensors["model"]["weight"][0, 0])


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- what is written -------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path):
    path = write(tmp_path / "checkpoints" / "deeper", 3000, snapshot(2.5), ALL)
    assert path == tmp_path / "checkpoints" / "deeper" / "step-000003000"
    back = read(path)
    assert back.state == {"format": 2, "step": 3000, "good": True, "position": 7}
    for group, tensors in snapshot(2.5).tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(back.tensors[group][name], tensor)
            assert torch.equal(load_file(path / f"{group}.safetensors")[name], tensor)


def test_tensors_of_every_kind_come_back(tmp_path):
    """Tied weights, views, transposed and empty tensors, scalars, and types that no float32 holds."""
    table = torch.randn(5, 3)
    tensors = {
        "table": table,
        "tied": table,
        "row": table[2],
        "turned": torch.randn(2, 7).T,
        "empty": torch.zeros(0, 3),
        "empty too": torch.zeros(0, 2),
        "count": torch.tensor(2**53 + 1),
        "half": torch.randn(3, dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
        "double": torch.tensor(0.1, dtype=torch.float64),
    }
    back = read(write(tmp_path, 5, Snapshot({"ema-0.050": tensors}, {}), ALL)).tensors["ema-0.050"]
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)


def test_the_manifest_holds_size_and_sha256_of_every_other_file(tmp_path):
    path = write(tmp_path, 5, snapshot(good=False), ALL)
    content = json.loads((path / "manifest.json").read_text())
    assert {key: content[key] for key in content if key != "files"} == {
        "format": 2,
        "step": 5,
        "good": False,
        "groups": ["ema", "model", "optim"],
    }
    assert sorted(content["files"]) == FILES and names(path) == sorted([*FILES, "manifest.json"])
    for name, entry in content["files"].items():
        whole = (path / name).read_bytes()
        assert entry == {"bytes": len(whole), "sha256": sha256(whole)}


def test_all_files_have_the_rights_of_new_ones(tmp_path):
    before = os.umask(0o027)
    try:
        path = write(tmp_path, 5, snapshot(), ALL)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {"0o640"}


# --- every instant of a write ----------------------------------------------------------------------------------------


class Instants:
    """Counts the calls that change the disk, by name, and does something at one of them."""

    def __init__(self, monkeypatch, at=None, then=None) -> None:
        self.names: list[str] = []
        self._at, self._then = at, then
        self._patch, self._depth = monkeypatch, 0
        for owner, name in (
            (Path, "mkdir"),
            (Path, "write_text"),
            (Path, "chmod"),
            (Path, "rename"),
            (checkpoints, "save_file"),
            (os, "fsync"),
            (hashlib, "file_digest"),
            (os, "unlink"),
            (os, "rmdir"),
        ):
            self._wrap(owner, name)

    def _wrap(self, owner, name: str) -> None:
        inner = getattr(owner, name)

        def call(*arguments, **keywords):
            number = len(self.names)
            self.names.append(f"{name} {self._object(arguments)}")
            if number == self._at:
                if name in ("write_text", "save_file"):
                    next(a for a in arguments if isinstance(a, Path)).write_bytes(b"half of")
                self._then()
            return inner(*arguments, **keywords)

        self._patch.setattr(owner, name, call)

    @staticmethod
    def _object(arguments) -> str:
        if isinstance(arguments[0], int):
            return Path(os.readlink(f"/proc/self/fd/{arguments[0]}")).name
        path = next((a for a in arguments if isinstance(a, str | Path)), getattr(arguments[0], "name", ""))
        return Path(path).name


def full():
    raise OSError(28, "No space left on device")


def die():
    os._exit(9)


def in_child(act) -> int:
    """Run something in a forked process; return its exit code."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def record(folder: Path) -> list[str]:
    """Return the instants of writing step 5 where a damaged step 5 lies and step 3 is to be deleted."""
    with pytest.MonkeyPatch.context() as patch:
        instants = Instants(patch)
        write(folder, 5, snapshot(5.0), Keep(1))
    return instants.names


def prepared(folder: Path) -> Path:
    write(folder, 3, snapshot(3.0), ALL)
    (write(folder, 5, snapshot(4.0), ALL) / "state.json").unlink()
    return folder


def test_order_of_writing(tmp_path):
    """Every file reaches the disk before the manifest is written, all before the rename, the parent after it."""
    found = record(prepared(tmp_path / "run"))
    beside = f".writing-000000005-{os.getpid()}"
    assert [name for name in found if not name.startswith(("chmod", "file_digest", "unlink", "rmdir"))] == [
        f"mkdir {beside}",
        *(f"save_file {name}" for name in ("model.safetensors", "ema.safetensors", "optim.safetensors")),
        "write_text state.json",
        *(f"fsync {name}" for name in FILES),
        "write_text manifest.json",
        "fsync manifest.json",
        f"fsync {beside}",
        "rename step-000000005",
        f"rename {beside}",
        "fsync run",
        "rename step-000000003",
    ]
    last_hash = max(i for i, name in enumerate(found) if name.startswith("file_digest"))
    assert last_hash < found.index("write_text manifest.json")


def whole_ones(folder: Path) -> list[int]:
    """Verify all that looks like a checkpoint, but for the damaged one; each holds what was written as its step."""
    found = []
    for path in sorted(folder.glob("step-*")):
        if path.name == "step-000000005" and value_or_none(path) is None:
            continue
        assert value(path) == int(path.name[5:])
        found.append(int(path.name[5:]))
    return found


def value_or_none(path: Path) -> float | None:
    try:
        return value(path)
    except CheckpointError as error:
        assert "no file state.json" in str(error)
        assert float(load_file(path / "model.safetensors")["weight"][0, 0]) == 4  # the one that lay there before
        return None


def test_a_write_that_fails_at_any_instant_leaves_a_whole_checkpoint_and_no_trace(tmp_path):
    total = len(record(prepared(tmp_path / "first")))
    assert total > 20
    for instant in range(total):
        folder = prepared(tmp_path / str(instant))
        with pytest.MonkeyPatch.context() as patch:
            done = Instants(patch, instant, full).names
            with contextlib.suppress(OSError):
                write(folder, 5, snapshot(5.0), Keep(1))
        whole = whole_ones(folder)
        assert whole, done[instant]
        assert not list(folder.glob(".writing-*")), done[instant]
        assert latest(folder, lambda line: None) == folder / f"step-{max(whole):09d}"
        write(folder, 7, snapshot(7.0), Keep(1))
        assert value(folder / "step-000000007") == 7


def test_a_process_killed_at_any_instant_leaves_a_whole_checkpoint_and_traces_that_are_swept(tmp_path):
    total = len(record(prepared(tmp_path / "first")))
    for instant in range(total):
        folder = prepared(tmp_path / str(instant) / "checkpoints")

        def act(folder=folder, instant=instant):
            with pytest.MonkeyPatch.context() as patch:
                Instants(patch, instant, die)
                write(folder, 5, snapshot(5.0), Keep(1))

        assert in_child(act) == 9
        whole = whole_ones(folder)
        assert whole and latest(folder, lambda line: None) == folder / f"step-{max(whole):09d}"
        run = RunFolder(folder.parent)
        run.lock()
        run.sweep()
        run.unlock()
        assert all(name.startswith(("step-", "damaged-")) for name in names(folder))


def test_killed_at_random_no_checkpoint_is_lost(tmp_path):
    """A process that writes one checkpoint after another is killed ten times, wherever it is."""
    for number, wait in enumerate(torch.rand(10).tolist()):
        first = 1000 * number + 1
        child = os.fork()
        if child == 0:
            try:
                for step in count(first):
                    write(tmp_path, step, Snapshot({"model": {"weight": torch.full((200, 300), float(step))}}, {}), ALL)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 20
        while not path_of(tmp_path, first).exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05 * wait)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    found = steps(tmp_path)
    assert {1000 * number + 1 for number in range(10)} <= set(found)
    for step in found:
        assert bool((read(tmp_path / f"step-{step:09d}").tensors["model"]["weight"] == step).all())


def test_what_lies_there_in_another_size_gets_no_name(tmp_path, monkeypatch):
    """A disk that loses bytes after they were hashed."""
    inner = manifest.write_manifest

    def lossy(folder, step, *, good):
        inner(folder, step, good=good)
        truncate(folder / "model.safetensors")

    monkeypatch.setattr(checkpoints, "write_manifest", lossy)
    with pytest.raises(CheckpointError, match=r"model.safetensors of \d+ bytes, expected"):
        write(tmp_path, 5, snapshot(), ALL)
    assert names(tmp_path) == []


def test_a_whole_checkpoint_is_not_written_again_and_a_damaged_one_is(tmp_path):
    path = write(tmp_path, 5, snapshot(1), ALL)
    write(tmp_path, 5, snapshot(2), ALL)
    assert value(path) == 1
    for number in (2, 3):
        (path / "state.json").unlink()
        write(tmp_path, 5, snapshot(number), ALL)
        assert value(path) == number
    assert names(tmp_path) == ["damaged-step-000000005-1", "damaged-step-000000005-2", "step-000000005"]  # evidence


# --- what is refused -------------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def zero_page(path):
    content = path.read_bytes()
    path.write_bytes(bytes(min(4096, len(content))) + content[4096:])


def link(path):
    """The same content, out of the folder."""
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


def to_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "{name} of {short} bytes, expected {whole}"),
        (flip, "{name} with other contents than its hash"),
        (zero_page, "{name} with other contents than its hash"),
        (Path.unlink, "no file {name}"),
        (to_folder, "no file {name}"),
        (link, "{name}, which is neither a file nor a folder"),
    ],
)
def test_a_damaged_file_is_refused_by_name_and_the_one_before_is_found(name, damage, said, tmp_path):
    good, bad = (write(tmp_path, step, snapshot(), ALL) for step in (3, 5))
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


@pytest.mark.parametrize("first", FILES)
def test_swapped_files_are_refused(first, tmp_path):
    path = write(tmp_path, 5, snapshot(), ALL)
    second = FILES[FILES.index(first) - 1]
    os.replace(path / first, tmp_path / "kept")
    os.replace(path / second, path / first)
    os.replace(tmp_path / "kept", path / second)
    with pytest.raises(CheckpointError, match=f"({first}|{second}) (of|with other contents)"):
        read(path)


@pytest.mark.parametrize("extra", ["notes.txt", ".metadata", "model-2.safetensors", "model/shard.safetensors"])
def test_a_file_that_the_manifest_does_not_name_is_refused(extra, tmp_path):
    path = write(tmp_path, 5, snapshot(), ALL)
    (path / extra).parent.mkdir(exist_ok=True)
    (path / extra).write_bytes(b"abc")
    with pytest.raises(CheckpointError, match=f"got {extra}, which manifest.json does not name"):
        read(path)


def test_an_empty_folder_is_refused(tmp_path):
    good = write(tmp_path, 3, snapshot(), ALL)
    (tmp_path / "step-000000005").mkdir()
    with pytest.raises(CheckpointError, match="got no manifest.json in"):
        verify(tmp_path / "step-000000005")
    assert latest(tmp_path, lambda line: None) == good


def edit(**changes):
    def damage(path):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, **changes}))

    return damage


def text(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "no manifest.json"),
        (link, "no manifest.json"),
        (to_folder, "no manifest.json"),
        (truncate, "a manifest.json that cannot be read: .*line"),
        (lambda path: path.write_text(""), "a manifest.json that cannot be read: .*line"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "a manifest.json that cannot be read: .*decode"),
        (lambda path: path.write_text("[]"), "a manifest.json that cannot be read: no object"),
        (lambda path: path.write_text("[" * 10**5), "a manifest.json that cannot be read: .*recursion"),
        (text('"step": 5', '"step": 5, "step": 5'), "a manifest.json that cannot be read: a key that comes twice"),
        (text('"step": 5', f'"step": {"9" * 5000}'), "a manifest.json that cannot be read: .*digits"),
        (edit(format=9), "format 9, of which versions 1 and 2 are known"),
        (edit(step=4), "the manifest of step 4"),
        (edit(files={}), "a manifest.json that names only nothing"),
        (edit(files={name: {} for name in FILES}), "that cannot be read: files.ema.safetensors.bytes: Field required"),
        (edit(groups=["model"]), r"of groups \['model'\] and files"),
        (edit(groups=["model", "ema", "optim", "ema"]), r"of groups \['model', 'ema', 'optim', 'ema'\] and files"),
        (edit(author="me"), "that cannot be read: author: Extra inputs"),
    ],
)
def test_a_damaged_manifest_is_refused(damage, said, tmp_path):
    path = write(tmp_path, 5, snapshot(), ALL)
    damage(path / "manifest.json")
    with pytest.raises(CheckpointError, match=said):
        verify(path)


def places(content, at=()):
    """Yield the place of every value within JSON."""
    yield at
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield from places(content[key], (*at, key))


def replaced(content, at, new):
    if not at:
        return new
    content = copy.deepcopy(content)
    inner = content
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = new
    return content


def test_a_manifest_with_any_value_of_another_type_is_refused(tmp_path):
    path = write(tmp_path, 5, snapshot(), ALL)
    file = path / "manifest.json"
    content = json.loads(file.read_text())
    tried = 0
    for at in list(places(content)):
        for new in (None, True, -1, 1.5, 10**30, "", "model", [], [[]], {}, {"": None}, {"bytes": 3}):
            changed = replaced(content, at, new)
            if changed == content:
                continue
            file.write_text(json.dumps(changed))
            with pytest.raises(CheckpointError):
                verify(path)
            tried += 1
    assert tried > 200
    file.write_text(json.dumps(content))
    verify(path)


def entry(content: bytes) -> dict:
    return {"bytes": len(content), "sha256": sha256(content)}


@pytest.mark.parametrize(
    "name", ["../outside", "model/../../outside", "a/b/c", "/", "", "model.safetensors/", ".hidden", "model/.hidden"]
)
@pytest.mark.parametrize("absolute", [False, True])
def test_no_manifest_can_reach_outside_of_its_folder(name, absolute, tmp_path):
    path = write(tmp_path, 5, snapshot(), ALL)
    (tmp_path / "outside").write_bytes(b"abc")
    content = json.loads((path / "manifest.json").read_text())
    content["files"][str(tmp_path / name) if absolute else name] = entry(b"abc")
    (path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="a manifest.json that names '"):
        verify(path)


def forge(path: Path, name: str, content: bytes) -> None:
    """Give a file other contents, and the manifest their hash."""
    (path / name).write_bytes(content)
    known = json.loads((path / "manifest.json").read_text())
    known["files"][name] = entry(content)
    (path / "manifest.json").write_text(json.dumps(known))


def test_contents_that_cannot_be_are_refused_though_their_hash_is_right(tmp_path):
    path = write(tmp_path, 5, snapshot(), ALL)
    whole = (path / "state.json").read_text()
    for content, said in (
        ("[]", "a state.json that cannot be read"),
        (whole.replace('"step": 5', '"step": 4'), "state.json of another step or format"),
        (whole.replace('"format": 2', '"format": 1'), "state.json of another step or format"),
    ):
        forge(path, "state.json", content.encode())
        with pytest.raises(CheckpointError, match=said):
            read(path)
    forge(path, "state.json", whole.encode())
    forge(path, "model.safetensors", b"\xff" * 99)
    with pytest.raises(CheckpointError, match="model.safetensors in .*, which is no safetensors file"):
        read(path)


def test_a_group_is_a_file_or_a_folder(tmp_path):
    path = write(tmp_path, 5, snapshot(), ALL)
    (path / "model").mkdir()
    forge(path, "model/shard.safetensors", b"abc")
    with pytest.raises(CheckpointError, match="that names only"):
        verify(path)


# --- groups that are folders of shards --------------------------------------------------------------------------------


def sharded_one(folder: Path) -> Path:
    """A checkpoint of step 5 with one group cut up and one whole."""
    temporary = folder / ".writing-000000005"
    write_group(temporary / "model", snapshot(2.5).tensors["model"], None)
    save_file(dict(snapshot(2.5).tensors["ema"]), temporary / "ema.safetensors")
    return finish(temporary, folder / "step-000000005", 5, {"position": 7, "step": 99}, False)


def test_a_group_may_be_a_folder(tmp_path, monkeypatch):
    synced = []
    inner = manifest.sync
    monkeypatch.setattr(manifest, "sync", lambda path: (synced.append(path.name), inner(path)))
    path = sharded_one(tmp_path)
    assert "model" in synced  # the folder's entries too
    content = json.loads((path / "manifest.json").read_text())
    shard = "model/shard-00001-of-00001.safetensors"
    assert content["files"].keys() == {"ema.safetensors", "state.json", shard}
    assert content["files"][shard] == entry((path / shard).read_bytes())
    assert content["groups"] == ["ema", "model"] and content["good"] is False
    back = read(path)
    assert back.state == {"format": 2, "step": 5, "good": False, "position": 7}
    for group in ("model", "ema"):
        assert back.tensors[group].keys() == {"weight", "bias"}
        for name, tensor in snapshot(2.5).tensors[group].items():
            assert torch.equal(back.tensors[group][name], tensor)
    assert hash_of(path, "ema") == sha256((path / "ema.safetensors").read_bytes())
    assert hash_of(path, "model") == sha256(json.dumps({shard: sha256((path / shard).read_bytes())}).encode())
    with pytest.raises(CheckpointError, match=r"got no group 'ema-0.050' in .*; did you mean 'ema'\?"):
        read_group(path, "ema-0.050")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, r"{name} of \d+ bytes, expected"),
        (flip, "{name} with other contents"),
        (Path.unlink, "no file {name}"),
        (link, "{name}, which is neither a file nor a folder"),
        (lambda path: (path.parent / "more").write_bytes(b""), "model/more, which manifest.json does not name"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(damage, said, tmp_path):
    path, name = sharded_one(tmp_path), "model/shard-00001-of-00001.safetensors"
    damage(path / name)
    with pytest.raises(CheckpointError, match=said.format(name=name)):
        read(path)


@pytest.mark.parametrize("name", [".metadata", "model/.metadata", "model/deeper/a.safetensors", "notes.txt"])
def test_nothing_else_can_become_a_checkpoint(name, tmp_path):
    temporary = tmp_path / ".writing-000000005"
    (temporary / name).parent.mkdir(parents=True)
    (temporary / name).write_bytes(b"abc")
    save_file(dict(snapshot().tensors["ema"]), temporary / "ema.safetensors")
    with pytest.raises(CheckpointError, match=f"names '{name}'"):
        finish(temporary, tmp_path / "step-000000005", 5, {}, True)
    assert names(tmp_path) == [".writing-000000005"]


# --- format 1 --------------------------------------------------------------------------------------------------------


def format_1(folder: Path, *, without: str = "") -> Path:
    """A checkpoint as version 0.1 wrote it."""
    path = folder / "step-000000007"
    path.mkdir(parents=True)
    for name, tensors in snapshot(2.5).tensors.items():
        save_file(dict(tensors), path / f"{name}.safetensors")
    window = {"steps": 3, "sums": {"loss": 1.5}, "by_time": [[0.5], [2.0]]}  # not taken over
    state = {"format": 1, "step": 7, "version": "0.1.0", "position": 42, "skipped": 2, "window": window}
    (path / "state.json").write_text(json.dumps(state, indent=1))
    if without:
        (path / without).unlink()
    files = {file.name: entry(file.read_bytes()) for file in sorted(path.iterdir())}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "step": 7, "files": files}, indent=1))
    return path


def test_format_1_is_read_as_todays(tmp_path):
    path = format_1(tmp_path)
    back = read(path)
    assert back.state == {
        "format": 1,
        "step": 7,
        "version": "0.1.0",
        "position": 42,
        "skipped": 2,
        "good": True,
        "passed": 0,
        "streak": 0,
        "rollbacks": 0,
        "rolled_to": 0,
        "averages": {"updates": 5},
        "guard": {},
        "window": {"names": [], "plain": None, "records": []},
    }
    assert torch.equal(back.tensors["ema"]["weight"], torch.full((2, 3), 3.0)) and len(back.tensors) == 3
    assert latest(tmp_path, pytest.fail, good=True) == path
    flip(path / "ema.safetensors")
    with pytest.raises(CheckpointError, match=r"ema.safetensors with other contents"):
        read(path)


@pytest.mark.parametrize("name", FILES)
def test_format_1_needs_its_files(name, tmp_path):
    with pytest.raises(CheckpointError, match=r"a manifest.json (of groups|that names only)"):
        read(format_1(tmp_path, without=name))


# --- which ones stay, and which is found ------------------------------------------------------------------------------


def test_keeps_the_newest(tmp_path):
    for step in (2, 3, 5, 7, 11):
        write(tmp_path, step, snapshot(step), Keep(2))
    assert names(tmp_path) == ["step-000000007", "step-000000011"]
    assert value(tmp_path / "step-000000007") == 7


@pytest.mark.parametrize(
    ("keep", "bad", "left"),
    [
        (Keep(1), (), [1100000000]),
        (Keep(3), (), [900000000, 1000000000, 1100000000]),
        (Keep(1, 500000000), (), [500000000, 1000000000, 1100000000]),
        (Keep(1), (900000000, 1000000000, 1100000000), [800000000, 1100000000]),
        (Keep(2, 400000000), (1000000000, 1100000000), [400000000, 800000000, 900000000, 1000000000, 1100000000]),
        (Keep(2), tuple(range(100000000, 1200000000, 100000000)), [1000000000, 1100000000]),
    ],
)
def test_which_stay(keep, bad, left, tmp_path):
    """The newest, those of round steps, and the newest good one; steps of ten digits come after those of nine."""
    tiny = {"model": {"weight": torch.ones(2)}}
    for step in range(100000000, 1200000000, 100000000):
        write(tmp_path, step, Snapshot(tiny, {"good": step not in bad}), keep)
    assert sorted(steps(tmp_path)) == left and len(names(tmp_path)) == len(left)


def test_damaged_ones_do_not_count_and_stay(tmp_path):
    for step in (2, 3, 5):
        write(tmp_path, step, snapshot(), ALL)
    (tmp_path / "step-000000005" / "manifest.json").unlink()
    write(tmp_path, 7, snapshot(), Keep(2))
    assert steps(tmp_path) == [3, 5, 7]
    for step in (3, 7):
        truncate(tmp_path / f"step-{step:09d}" / "optim.safetensors")
    write(tmp_path, 6, snapshot(), Keep(1))
    assert steps(tmp_path) == [3, 5, 6, 7]


def test_finding(tmp_path, monkeypatch):
    path = write(tmp_path / "checkpoints", 5, snapshot(), ALL)
    assert find(tmp_path) == find(path) == path
    assert latest(tmp_path / "nowhere", pytest.fail) is None
    (tmp_path / "checkpoints" / ".writing-000000009-1").mkdir()
    (tmp_path / "checkpoints" / "step-last").mkdir()
    assert find(tmp_path) == path
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        find(tmp_path / "nowhere")
    (tmp_path / "mine").symlink_to(path)
    monkeypatch.chdir(path)
    assert value(find(tmp_path / "mine")) == value(find(Path())) == 1


def test_finding_a_good_one(tmp_path):
    for step, good in ((3, True), (5, True), (7, False), (11, False)):
        write(tmp_path, step, snapshot(good=good), ALL)
    truncate(tmp_path / "step-000000005" / "state.json")
    assert latest(tmp_path, pytest.fail) == tmp_path / "step-000000011"
    warned = []
    assert latest(tmp_path, warned.append, good=True) == tmp_path / "step-000000003"
    assert len(warned) == 1 and "step-000000005" in warned[0]


def test_later_ones_are_set_aside(tmp_path):
    for step in (3, 5, 7):
        write(tmp_path, step, snapshot(step), ALL)
    set_aside_after(tmp_path, 4)
    assert names(tmp_path) == ["step-000000003", "superseded-step-000000005-1", "superseded-step-000000007-1"]
    write(tmp_path, 5, snapshot(8), ALL)
    set_aside_after(tmp_path, 3)
    assert names(tmp_path)[:3] == ["step-000000003", "superseded-step-000000005-1", "superseded-step-000000005-2"]


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
