"""Damaged checkpoints: each is refused by the name of what is damaged, and the one before it is gone on from."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest

from pathline.core.config import resolve
from pathline.core.errors import CheckpointError
from pathline.training import Trainer, checkpoints
from pathline.training.state import COUNTERS

spec = importlib.util.spec_from_file_location("faults", Path(__file__).with_name("faults.py"))
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)

TENSORS = [f"{group}.safetensors" for group in ("ema-0.050", "ema-0.200", "ema", "model", "optim")]
FILES = [*TENSORS, "state.json", "manifest.json"]
NEWEST, OLDER = "step-000000008", "step-000000006"
MANIFEST = "manifest"  # said of what is wrong with the manifest itself


class Damage(NamedTuple):
    """What is done to a checkpoint's folder, and the names of which one must be said."""

    kind: str
    named: tuple[str, ...]
    do: Callable[[Path], object]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that has stopped at step 8, amid a window of its log."""
    folder = tmp_path_factory.mktemp("stopped")
    assert faults.forked(lambda: faults.start(folder, "train.stop_at=8")).code == 0
    return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("unbroken")
    assert faults.forked(lambda: faults.start(folder)).code == 0
    return faults.outcome(folder)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Trainer:
    """A run of the same configuration that has taken no step."""
    return Trainer(resolve(faults.entries(train={"folder": str(tmp_path_factory.mktemp("live"))})))


def live(trainer: Trainer) -> str:
    """Return a hash of all that a resume writes to."""
    state, found = trainer.state, hashlib.sha256()
    for group, tensors in state.tensors().items():
        for name, tensor in tensors.items():
            found.update(f"{group}.{name}".encode() + tensor.detach().numpy().tobytes())
    counters = [getattr(state, name) for name in COUNTERS]
    found.update(json.dumps([counters, state.guard.state(), state.averages.state(), state.window.state()]).encode())
    return found.hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """Return what a folder holds, links and folders by name alone."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file() and not path.is_symlink()
        else str(path.lstat().st_mode)
        for path in sorted(folder.rglob("*"))
    }


# --- kinds of damage --------------------------------------------------------------------------------------------------


def flipped(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)


def zeroed(path: Path, place: int) -> None:
    """Zero 256 bytes, moved on to where they are not zero already."""
    content = bytearray(path.read_bytes())
    place %= len(content)
    while not any(content[place : place + 256]):
        place = (place + 256) % len(content)
    content[place : place + 256] = bytes(len(content[place : place + 256]))
    path.write_bytes(content)


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def linked(path: Path) -> None:
    """Put a link in a file's place, to the same content elsewhere."""
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def swapped(first: Path, second: Path) -> None:
    beside = first.parent.parent / "beside"
    first.rename(beside)
    second.rename(first)
    beside.rename(second)


def to_files(draw: random.Random, flips: int) -> Iterator[Damage]:
    """Yield damage to each file."""
    for name in FILES:
        said = (name,) if name != "manifest.json" else (MANIFEST, *FILES)  # an entry of it, as of a file that is whole

        def one(kind: str, do: Callable[[Path], object], name=name, said=said) -> Damage:
            return Damage(f"{kind}", said, lambda folder: do(folder / name))

        for share in (0.0, 1e-9, 0.5, draw.random()):
            yield one("truncated", lambda p, s=share: os.truncate(p, int(s * p.stat().st_size) + (0 < s < 0.01)))
        yield one("truncated", lambda p: os.truncate(p, p.stat().st_size - 1))
        places = [0, 8, -1, *(draw.randrange(10**6) for _ in range(flips))]
        for place in places:
            yield one("flipped bit", lambda p, at=place, bit=place % 7: flipped(p, at, bit))
        for place in (0, -200, places[-1]):
            yield one("zeroed page", lambda p, at=place: zeroed(p, at))
        for more in (b"\0", b"}", bytes(4096), draw.randbytes(7)):
            yield one("trailing garbage", lambda p, more=more: p.open("ab").write(more))
        yield one("missing file", Path.unlink)
        yield one("folder for a file", to_folder)
        yield one("link", linked)
        yield one("link", lambda p: (p.unlink(), p.symlink_to("/dev/zero")))
        yield one("link", lambda p: (p.unlink(), p.symlink_to(f"../{OLDER}/{p.name}")))
        yield one("pipe", lambda p: (p.unlink(), os.mkfifo(p)))
        yield one("of another step", lambda p: shutil.copy(p.parent.parent / OLDER / p.name, p))
    for first, second in combinations(FILES, 2):
        said = tuple(name if name != "manifest.json" else MANIFEST for name in (first, second))
        yield Damage("swapped files", said, lambda folder, a=first, b=second: swapped(folder / a, folder / b))


def to_folders() -> Iterator[Damage]:
    """Yield damage to the folder as a whole."""
    yield Damage("empty folder", (MANIFEST,), lambda folder: (shutil.rmtree(folder), folder.mkdir()))
    yield Damage("of another step", (MANIFEST,), lambda f: (shutil.rmtree(f), shutil.copytree(f.parent / OLDER, f)))
    for name in ("notes.txt", ".metadata", "model/shard.safetensors", "optim.safetensors.tmp", "ema.pt"):
        yield Damage("extra file", (name,), lambda f, at=name: ((f / "model").mkdir(), (f / at).touch()))
    yield Damage("extra file", ("model",), lambda folder: (folder / "model").symlink_to("/etc"))


def to_manifests() -> Iterator[Damage]:
    """Yield forged manifests."""

    def forged(change: Callable[[dict], object]) -> Callable[[Path], None]:
        def do(folder: Path) -> None:
            path = folder / "manifest.json"
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))

        return do

    def one(change: Callable[[dict], object], *named: str) -> Damage:
        return Damage("forged manifest", (MANIFEST, *named), forged(change))

    for step in (0, 6, 9, -8, 8.0, 8.5, "8", None, True, 10**30, [8]):
        yield one(lambda c, step=step: c.update(step=step))
    for version in (0, 1, 3, "2", None, 2.5, -1):
        yield one(lambda c, version=version: c.update(format=version), "format")
    for key, value in (("world_size", 2), ("world", 1), ("author", "me"), ("", 0), ("files ", {})):
        yield one(lambda c, key=key, value=value: c.update({key: value}))
    for key in ("format", "step", "good", "groups", "files"):
        yield one(lambda c, key=key: c.pop(key))
    for value in ([], {}, None, "model", ["model"], [*("ema", "model", "optim") * 2], [1], ["../model"]):
        yield one(lambda c, value=value: c.update(groups=value))
    yield one(lambda c: c.update(good="yes"))
    outside = ("../x", "../../x", "/etc/passwd", "model/../../x", "..", ".", "", "a/b/c", "\\x", "x\0.safetensors", "~")
    for name in outside:
        yield one(lambda c, name=name: c["files"].update({name: c["files"]["state.json"]}))
        yield one(lambda c, name=name: c["files"].update({name: c["files"].pop("model.safetensors")}))
    for name in (*TENSORS, "state.json"):
        yield one(lambda c, name=name: c["files"].pop(name), name)
        for changes in (
            *({"bytes": size} for size in (10**18, 0, -1, 1e3, "9", None)),
            *({"sha256": text} for text in ("0" * 64, "", None)),
            {"path": "/etc/passwd"},
        ):
            yield one(lambda c, name=name, changes=changes: c["files"][name].update(changes), name)


# --- what has to happen -----------------------------------------------------------------------------------------------


def refuse(damage: Damage, stopped: Path, trainer: Trainer, folder: Path, tally) -> None:
    """A damaged newest checkpoint is refused by name, in favour of the one before; nothing else changes."""
    shutil.copytree(stopped / "run" / "checkpoints", folder)
    damage.do(folder / NEWEST)
    tally.count(damage.kind)
    what, before, evidence, warned = f"{damage.kind} {damage.named}", live(trainer), contents(folder / NEWEST), []
    found = checkpoints.latest(folder, warned.append)
    tally.expect(found == folder / OLDER, "silent", f"{what}: latest is {found}")
    named = len(warned) == 1 and NEWEST in warned[0] and any(name in warned[0] for name in damage.named)
    tally.expect(named, "silent", f"{what}: warned {warned}")
    try:
        trainer.resume(folder / NEWEST)
        tally.expect(False, "silent", f"{what}: gone on from")
    except CheckpointError as error:
        tally.expect(any(name in str(error) for name in damage.named), "silent", f"{what}: {error}")
    tally.expect(live(trainer) == before, "lost", f"{what}: live objects changed")
    tally.expect(contents(folder / NEWEST) == evidence, "lost", f"{what}: the evidence changed")
    shutil.rmtree(folder)


def go_on(damage: Damage, stopped: Path, unbroken: dict[str, str], folder: Path, tally) -> None:
    """A run whose newest checkpoint is damaged goes on from the one before, says so, and ends as if nothing was."""
    shutil.copytree(stopped, folder)
    damage.do(folder / "run" / "checkpoints" / NEWEST)
    tally.count("gone on")
    what, evidence = f"{damage.kind} {damage.named}", contents(folder / "run" / "checkpoints" / NEWEST)
    ended = faults.forked(lambda: faults.start(folder, "--resume", "auto"))
    tally.expect(not ended.hung, "hangs", what)
    tally.expect(ended.code == 0, "lost", f"{what}: {ended.said[-1000:]}")
    warning = next((line for line in ended.said.splitlines() if line.startswith("warning:")), "")
    loud = NEWEST in warning and any(name in warning for name in damage.named)
    tally.expect(loud, "silent", f"{what}: {warning}")
    different = faults.differing(unbroken, faults.outcome(folder))
    tally.expect(not different, "lost", f"{what}: {different}")
    kept = [path for path in (folder / "run" / "checkpoints").glob(f"*-{NEWEST}-*") if contents(path) == evidence]
    tally.expect(len(kept) == 1, "lost", f"{what}: no evidence")


def of_each_kind(damages: list[Damage]) -> list[Damage]:
    """Return one damage of each kind, to another file each."""
    kinds = list(dict.fromkeys(damage.kind for damage in damages))
    groups = [[damage for damage in damages if damage.kind == kind] for kind in kinds]
    return [group[(5 * number) % len(group)] for number, group in enumerate(groups)]


def test_some_damage_of_each_kind(stopped, trainer, unbroken, tmp_path):
    tally, draw = faults.Tally(), random.Random(7)
    chosen = of_each_kind([*to_files(draw, 2), *to_folders(), *to_manifests()])
    for damage in chosen:
        refuse(damage, stopped, trainer, tmp_path / "checkpoints", tally)
    for damage in chosen[:2]:
        go_on(damage, stopped, unbroken, tmp_path / f"on-{damage.kind}", tally)
    tally.close(gone_on=2)


@pytest.mark.slow
def test_all_damage(stopped, trainer, unbroken, tmp_path):
    tally, draw = faults.Tally(), random.Random(11)
    damages = [*to_files(draw, 24), *to_folders(), *to_manifests()]
    for damage in damages:
        refuse(damage, stopped, trainer, tmp_path / "checkpoints", tally)
    assert tally.tried.total() >= 400
    for damage in of_each_kind(damages):
        go_on(damage, stopped, unbroken, tmp_path / f"on-{damage.kind}", tally)
    tally.close(truncated=30, flipped_bit=150, zeroed_page=20, swapped_files=20, forged_manifest=80, gone_on=12)


def forge(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the scalars of a checkpoint, and give the manifest their size and hash."""
    state, manifest = folder / "state.json", folder / "manifest.json"
    content = json.loads(state.read_text())
    change(content)
    written = json.dumps(content).encode()
    state.write_bytes(written)
    known = json.loads(manifest.read_text())
    known["files"]["state.json"] = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    manifest.write_text(json.dumps(known))


def test_scalars_that_cannot_be_are_refused_though_their_hash_is_right(stopped, trainer, tmp_path):
    tally, path = faults.Tally(), tmp_path / NEWEST
    state = json.loads((stopped / "run" / "checkpoints" / NEWEST / "state.json").read_text())
    for key in sorted(state.keys() - {"format", "step", "good", "version", "position", "world_size", "statistics"}):
        changes = [lambda c, key=key: c.update({key: "nonsense"}), lambda c, key=key: c.update({key: ["nonsense"]})]
        if key not in ("encoders", "samples"):  # a run goes on from older checkpoints, which do not have them
            changes.append(lambda c, key=key: c.pop(key))
        for change in changes:
            shutil.copytree(stopped / "run" / "checkpoints" / NEWEST, path)
            forge(path, change)
            before = live(trainer)
            tally.count("forged state")
            try:
                trainer.resume(path)
                tally.expect(False, "silent", f"{key}: gone on from")
            except CheckpointError as error:
                tally.expect(NEWEST in str(error), "silent", f"{key}: {error}")
            except Exception as error:
                tally.expect(False, "silent", f"{key}: {error!r}")
            tally.expect(live(trainer) == before, "lost", f"{key}: live objects changed")
            shutil.rmtree(path)
    tally.close(forged_state=10)
