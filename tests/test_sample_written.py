"""What a drawing leaves, whenever it is stopped: records that are of the samples beside them, and nothing of others."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import zipfile

import numpy as np
import pytest

from pathline.evaluate import main as evaluate
from pathline.sample import main
from pathline.train import main as train
from pathline.training import drawing

CONFIGURATION = """
data: digits
backbone: {name: sit, input_size: 8, patch_size: 4, in_channels: 1, hidden_size: 12, depth: 2, num_heads: 3,
           num_classes: 10}
objective: velocity
optim: {lr: 1e-2}
ema: {decay: 0.5}
solver: {name: heun, steps: 2}
train: {steps: 6, global_batch: 5, folder: runs/x, accelerator: cpu}
"""
SHARDS = ("sample.count=23", "sample.shard=10", "sample.batch=5", "sample.seed=3")  # of 10, 10 and 3 samples


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    (folder / "c.yaml").write_text(CONFIGURATION)
    assert train([str(folder / "c.yaml"), f"train.folder={folder / 'run'}"]) == 0
    return folder / "run"


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def images(path):
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["arr_0"]


def drew(monkeypatch):
    """Count the batches that are drawn from now on."""
    calls, inner = [], drawing.finished
    monkeypatch.setattr(drawing, "finished", lambda *given: calls.append(1) or inner(*given))
    return calls


# --- stopped at any moment -------------------------------------------------------------------------------------------


def killed_at(moment, words, folder):
    """Run a command in a process that ends, as if killed, before its n-th change in a folder; return whether it did."""
    child = os.fork()
    if not child:
        seen = []

        def watch(event, given):
            changes = event in ("os.rename", "os.remove") or (event == "open" and given[1] and "r" not in given[1])
            if changes and str(given[0]).startswith(str(folder)):
                seen.append(event)
                if len(seen) == moment:
                    os._exit(9)

        sys.addaudithook(watch)
        code = 1
        try:
            code = main(words)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("more", [(), ("sample.shard=10",)])
def test_a_record_is_of_the_samples_beside_it_whenever_a_drawing_is_killed(more, run, tmp_path):
    """Over another drawing that is finished and measured, at each instant; and the same command goes on."""
    older, folder = tmp_path / "older", tmp_path / "new"
    assert main([str(run), "sample.count=23", f"sample.output={older / 'a.npz'}"]) == 0
    assert evaluate([str(older / "a.npz"), "--metrics", "frechet:pixels", "--reference", "digits"]) == 0
    words = [str(run), "sample.count=23", "sample.seed=4", "solver.steps=1", *more, f"sample.output={folder / 'a.npz'}"]
    moment, outcomes = 1, set()
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(older, folder)
        if not killed_at(moment, words, folder):
            break
        told = hashlib.sha256(images(folder / "a.npz").tobytes()).hexdigest()
        if (folder / "a.json").exists():
            record = json.loads((folder / "a.json").read_text())
            assert record["samples_sha256"] == told
            outcomes.add(record["seed"])
        if (folder / "a.metrics.json").exists():
            assert json.loads((folder / "a.metrics.json").read_text())["samples"]["samples_sha256"] == told
        moment += 1
        if moment % 4 == 0:
            assert main(words) == 0 and left(folder) == ["a.json", "a.npz", "a.png"]
            assert json.loads((folder / "a.json").read_text())["seed"] == 4
    assert moment > 8 and 0 in outcomes
    assert left(folder) == ["a.json", "a.npz", "a.png"]


def test_an_interrupted_picture(run, tmp_path, monkeypatch, capsys):
    words = [str(run), "sample.count=23", f"sample.output={tmp_path / 'a.npz'}"]
    assert main(words) == 0
    before = images(tmp_path / "a.npz")
    with monkeypatch.context() as patched:
        patched.setattr(drawing._Shown, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*words, "sample.seed=4"]) == 130
    assert "nothing was written" not in capsys.readouterr().err and left(tmp_path) == ["a.npz"]
    assert main([*words, "sample.shard=10"]) == 0
    assert np.array_equal(images(tmp_path / "a.npz"), before)


def test_a_checkpoint_that_is_pruned_meanwhile(run, tmp_path, monkeypatch, capsys):
    """What it was is known before anything is drawn; a checkpoint that is gone by then is named."""
    shutil.copytree(run, tmp_path / "run")
    checkpoints, inner = tmp_path / "run" / "checkpoints", drawing.finished
    wanted = next(checkpoints.iterdir()).name
    words = [str(tmp_path / "run"), "sample.count=5", f"sample.output={tmp_path / 'a.npz'}"]
    with monkeypatch.context() as patched:
        patched.setattr(drawing, "finished", lambda *given: shutil.rmtree(checkpoints) or inner(*given))
        assert main(words) == 0
    assert json.loads((tmp_path / "a.json").read_text())["checkpoint"]["name"] == wanted
    shutil.copytree(run / "checkpoints", checkpoints)
    with monkeypatch.context() as patched:
        patched.setattr(drawing, "check_devices", lambda *_: shutil.rmtree(checkpoints))
        assert main([*words, "sample.seed=4"]) == 2
    assert str(checkpoints / wanted) in capsys.readouterr().err
    assert json.loads((tmp_path / "a.json").read_text())["seed"] == 0


# --- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["missing", "short", "untold"])
def test_a_kept_folder_is_whole_or_drawn_on(harm, run, tmp_path, monkeypatch, capsys):
    words = [str(run), *SHARDS, "sample.shards=keep", f"sample.output={tmp_path / 'a.npz'}"]
    assert main(words) == 0
    folder = tmp_path / "a.shards"
    record, shard = json.loads((folder / "record.json").read_text()), folder / "shard-00001.npz"
    if harm == "missing":
        shard.unlink()
    elif harm == "short":
        shard.write_bytes(shard.read_bytes()[:-3])
    else:
        shard.with_suffix(".json").unlink()
    calls = drew(monkeypatch)
    assert main(words) == 0 and len(calls) == 2  # batches of the one shard
    assert "13 of them were there" in capsys.readouterr().out
    again = json.loads((folder / "record.json").read_text())
    assert again["samples_sha256"] == record["samples_sha256"] and again["bytes"] == record["bytes"]
    assert main(words) == 0 and len(calls) == 2


@pytest.mark.parametrize("change", [{"samples_sha256": None}, {"nfe": "x"}, {"seconds": None}, {"solver": 3}, None])
def test_a_record_that_is_none_is_not_found(change, run, tmp_path, monkeypatch):
    words = [str(run), *SHARDS, f"sample.output={tmp_path / 'a.npz'}"]
    assert main(words) == 0
    record = json.loads((tmp_path / "a.json").read_text())
    kept = {name: record[name] for name in ("request_sha256", "bytes")}
    (tmp_path / "a.json").write_text(json.dumps({**record, **change} if change else kept))
    calls = drew(monkeypatch)
    assert main(words) == 0 and len(calls) == 5
    assert json.loads((tmp_path / "a.json").read_text())["samples_sha256"] == record["samples_sha256"]


# --- what is not ours ------------------------------------------------------------------------------------------------


def test_a_folder_with_anything_else_in_it_is_refused(run, tmp_path, capsys):
    words = [str(run), *SHARDS, f"sample.output={tmp_path / 'a.npz'}"]
    for name in ("thesis.txt", "shard-1.npz", ".writing-thesis.txt-7"):
        (tmp_path / "a.shards").mkdir()
        (tmp_path / "a.shards" / name).write_text("mine")
        assert main(words) == 2
        assert f"got {tmp_path / 'a.shards'} with {name} in it" in capsys.readouterr().err
        assert left(tmp_path / "a.shards") == [name] and left(tmp_path) == ["a.shards"]
        shutil.rmtree(tmp_path / "a.shards")


def test_what_comes_into_the_folder_meanwhile_stays(run, tmp_path, monkeypatch):
    inner = drawing.finished

    def finished(*given):
        (tmp_path / "a.shards" / "thesis.txt").write_text("mine")
        return inner(*given)

    monkeypatch.setattr(drawing, "finished", finished)
    assert main([str(run), *SHARDS, f"sample.output={tmp_path / 'a.npz'}"]) == 0
    assert left(tmp_path / "a.shards") == ["thesis.txt"] and len(images(tmp_path / "a.npz")) == 23


def test_a_folder_of_shards_may_be_a_link(run, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "a.shards").symlink_to(tmp_path / "scratch")
    for word in ("sample.shards=keep", "sample.shards=join"):
        assert main([str(run), *SHARDS, word, f"sample.output={tmp_path / 'a.npz'}"]) == 0
    assert len(images(tmp_path / "a.npz")) == 23 and left(tmp_path / "scratch") == []


@pytest.mark.parametrize("words", [SHARDS, SHARDS[:1]])
def test_what_was_being_written_is_removed_if_it_is_ours(words, run, tmp_path):
    gone = 2**22 + 1  # no process has such a number
    others = [f".writing-a.2.npz-{gone}", f".writing-a.npz.bak-{gone}", f".writing-b.npz-{gone}", ".writing-a.npz-1"]
    for name in (*others, f".writing-a.npz-{gone}", f".writing-a.png-{gone}", f".writing-a.json-{gone}"):
        (tmp_path / name).write_text("x")
    assert main([str(run), *words, f"sample.output={tmp_path / 'a.npz'}"]) == 0
    assert left(tmp_path) == sorted([*others, "a.json", "a.npz", "a.png"])  # of process 1, which runs


@pytest.mark.parametrize("words", [SHARDS, SHARDS[:1]])
@pytest.mark.parametrize("name", ["a.npz", "a.png", "a.json"])
def test_a_folder_where_a_file_goes_is_told_of_before_anything_is_drawn(
    name, words, run, tmp_path, monkeypatch, capsys
):
    (tmp_path / name).mkdir()
    calls = drew(monkeypatch)
    assert main([str(run), *words, f"sample.output={tmp_path / 'a.npz'}"]) == 2
    assert f"got a folder at {tmp_path / name}" in capsys.readouterr().err
    assert not calls and left(tmp_path) == [name]


def test_a_place_that_cannot_be_is_told_of_before_anything_is_drawn(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("x")
    calls = drew(monkeypatch)
    for output in (tmp_path / "file" / "a.npz", tmp_path / f"{'x' * 245}.npz"):
        assert main([str(run), "sample.count=5", f"sample.output={output}"]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and "Traceback" not in printed
    assert not calls


# --- shards that are none --------------------------------------------------------------------------------------------


def forge_head(path):
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        shape = (10, 10**7, 10**5, 3)
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})


def forge_method(path):
    content = bytearray(path.read_bytes())
    content[content.find(b"PK\x01\x02") + 10] = 99
    path.write_bytes(content)


def forge_shape(path):
    with np.load(path) as arrays:
        np.savez(path, arr_0=arrays["arr_0"][:, :4, :4].repeat(3, 3), arr_1=arrays["arr_1"])


def forge_type(path):
    with np.load(path) as arrays:
        np.savez(path, arr_0=arrays["arr_0"].astype(np.float32), arr_1=arrays["arr_1"])


@pytest.mark.parametrize("forge", [forge_head, forge_method, forge_shape, forge_type])
@pytest.mark.parametrize("number", [0, 1])
def test_forged_shards_are_named_and_drawn_anew(number, forge, run, tmp_path, capsys):
    words = [str(run), *SHARDS, f"sample.output={tmp_path / 'a.npz'}"]
    assert main([*words, "sample.shards=keep"]) == 0
    folder = tmp_path / "a.shards"
    wanted = json.loads((folder / "record.json").read_text())["samples_sha256"]
    shard = folder / f"shard-0000{number}.npz"
    forge(shard)
    told = shard.with_suffix(".json")
    told.write_text(json.dumps({**json.loads(told.read_text()), "bytes": shard.stat().st_size}))
    capsys.readouterr()
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert str(shard) in printed and "Traceback" not in printed and not (tmp_path / "a.npz").exists()
    assert main(words) == 0
    assert hashlib.sha256(images(tmp_path / "a.npz").tobytes()).hexdigest() == wanted


@pytest.mark.parametrize("change", [{"nfe": "x"}, {"seconds": None}, {"bytes": -1}, {"more": 1}, {"seconds": "1"}])
def test_what_a_shard_cost_is_checked(change, run, tmp_path, monkeypatch):
    words = [str(run), *SHARDS, f"sample.output={tmp_path / 'a.npz'}"]
    assert main([*words, "sample.shards=keep"]) == 0
    told = tmp_path / "a.shards" / "shard-00000.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), **change}))
    calls = drew(monkeypatch)
    assert main(words) == 0 and len(calls) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sample.count=1000000000000", "sample.shard=1"), "more than 100,000 shards; set it to 10000000 or more"),
        (
            ("sample.count=3", "sample.devices=5"),
            "got 5 for 1 shards of 1000 samples; set sample.devices to 3 or lower",
        ),
        (
            ("sample.count=5", "sample.shard=2", "sample.devices=4"),
            "got 4 for 3 shards of 2 samples; set sample.shard to 1 or lower",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_processes_start(words, said, run, tmp_path, monkeypatch, capsys):
    import pathline.sample

    if "sample.shard=1" not in words:
        monkeypatch.setattr(pathline.sample, "Workers", lambda *_: pytest.fail("started processes"))
    assert main([str(run), *words, f"sample.output={tmp_path / 'a.npz'}"]) == 2
    assert said in capsys.readouterr().err
