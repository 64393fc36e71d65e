"""``sample.py`` at scale: shards, processes, kills and resumes, and that none of them changes a sample."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pathline import Draws, data
from pathline.core.sections import Sample
from pathline.metrics.samples import Samples
from pathline.sample import main
from pathline.train import main as train
from pathline.training import drawing, sampling, stored, trained
from pathline.training.pictures import shown

ROOT = Path(__file__).parent.parent
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
    folder = tmp_path_factory.mktemp("scale")
    (folder / "c.yaml").write_text(CONFIGURATION)
    assert train([str(folder / "c.yaml"), f"train.folder={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The file of an unbroken drawing in shards."""
    path = tmp_path_factory.mktemp("whole") / "whole.npz"
    assert main([str(run), *SHARDS, f"sample.output={path}"]) == 0
    return path


def arrays(path):
    with np.load(path, allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


def left(folder):
    return sorted(path.name for path in folder.iterdir())


# --- the same samples ------------------------------------------------------------------------------------------------


def test_shards_give_what_one_call_gives(run, whole, tmp_path):
    """Bit for bit where batches fall alike; 23 samples are 23, labels go round the classes, nothing is left over."""
    assert (
        main([str(run), "sample.count=23", "sample.batch=5", "sample.seed=3", f"sample.output={tmp_path / 'a.npz'}"])
        == 0
    )
    one, many = arrays(tmp_path / "a.npz"), arrays(whole)
    assert many["arr_0"].shape == (23, 8, 8, 1) and many["arr_0"].tobytes() == one["arr_0"].tobytes()
    assert many["arr_1"].tolist() == one["arr_1"].tolist() == [i % 10 for i in range(23)]
    assert left(whole.parent) == ["whole.json", "whole.npz", "whole.png"]
    assert whole.with_suffix(".png").read_bytes() == (tmp_path / "a.png").read_bytes()
    assert whole.read_bytes() == (tmp_path / "a.npz").read_bytes()


@pytest.mark.parametrize("solver", ["heun", "euler-maruyama"])
def test_batches_and_shards_change_rounding_alone(solver, run, tmp_path):
    words = ("sample.count=97", f"solver.name={solver}", "solver.steps=3")
    found = []
    for number, (shard, batch) in enumerate(((97, 97), (30, 7), (13, 250), (50, 1))):
        out = tmp_path / f"{number}.npz"
        assert main([str(run), *words, f"sample.shard={shard}", f"sample.batch={batch}", f"sample.output={out}"]) == 0
        found.append(arrays(out)["arr_0"].astype(int))
    for other in found[1:]:
        difference = np.abs(other - found[0])
        assert difference.max() <= 1 and (difference > 0).any(axis=(1, 2, 3)).sum() <= 2


def test_two_processes_draw_the_same_file(processes, run, whole, tmp_path, monkeypatch):
    words = [str(run), *SHARDS, f"sample.output={tmp_path / 'two.npz'}"]

    def one():
        calls = stop_after(0, monkeypatch)
        assert main(words) == 0
        return len(calls)

    ended = processes(2, one)
    assert ended.checked() == [3, 2]  # batches: two of the first shard and one of the third; two of the second
    assert (tmp_path / "two.npz").read_bytes() == whole.read_bytes()
    assert left(tmp_path) == ["two.json", "two.npz", "two.png"]
    record, alone = (json.loads(path.with_suffix(".json").read_text()) for path in (tmp_path / "two.npz", whole))
    assert record["devices"] == 2 and record["request_sha256"] == alone["request_sha256"]
    assert "wrote" in ended.outputs[0] and "wrote" not in ended.outputs[1]


@pytest.mark.slow
def test_devices_started_by_the_command_itself(run, whole, tmp_path):
    command = [
        sys.executable,
        "sample.py",
        str(run),
        *SHARDS,
        "sample.devices=2",
        f"sample.output={tmp_path / 'a.npz'}",
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "a.npz").read_bytes() == whole.read_bytes()


def test_ranges_of_numbers(run):
    """Samples 7 … 17 drawn alone, by others' batches, are rows 7 … 17 of all; noise is the same bit for bit."""
    configuration, parts = trained.load(trained.find(run, pytest.fail), [])
    labels = sampling.labels_of(configuration.sample, range(20), 10)
    every = sampling.solve(parts, parts.backbone, labels, 20, 3, batch=20)
    pieces = list(sampling.batches(parts, parts.backbone, labels[7:18], range(7, 18), 3, batch=4))
    assert [list(ids) for ids, *_ in pieces] == [[7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17]]
    assert torch.cat([theirs for _, _, theirs, _ in pieces]).tolist() == [i % 10 for i in range(7, 18)]
    levels = (127.5 * every.x[7:18].clamp(-1, 1) + 127.5).round()
    images = torch.cat([x for _, x, _, _ in pieces])
    assert images.dtype == torch.uint8 and (images.float() - levels).abs().max() <= 1
    assert {nfe for *_, nfe in pieces} == {4}
    noise = Draws(3).normal("initial noise", range(20), (1, 8, 8))
    assert torch.equal(Draws(3).normal("initial noise", range(7, 18), (1, 8, 8)), noise[7:18])


@pytest.mark.parametrize("law", ["balanced", "random", "none", 4, [5, 1, 2]])
def test_labels_are_functions_of_number_and_seed(law):
    wanted = Sample(labels=law, seed=5)
    every = sampling.labels_of(wanted, range(50), 7, 7)
    assert torch.equal(sampling.labels_of(wanted, range(13, 31), 7, 7), every[13:31])
    assert every.min() >= 0 and every.max() <= (7 if law == "none" else 6)
    assert sampling.labels_of(wanted, range(50), 0) is None
    other = sampling.labels_of(wanted.model_copy(update={"seed": 6}), range(50), 7, 7)
    assert torch.equal(other, every) == (law != "random")


# --- stopped and begun again -----------------------------------------------------------------------------------------


def drawn_up_to(instant, words):
    """Draw in this process, and kill it at that of the calls that change what is on the disk; return how many came."""
    calls = 0

    def counted(inner):
        def outer(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == instant:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*arguments, **options)

        return outer

    for name in ("replace", "unlink"):
        setattr(Path, name, counted(getattr(Path, name)))
    os.fsync = counted(os.fsync)
    assert main(words) == 0
    return calls


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_drawing_that_is_killed_anywhere_goes_on(every, processes, run, whole, tmp_path):
    """At every fourth call that changes the disk: the next one ends with the same bytes, and leaves nothing else."""

    def words(folder):
        return [str(run), *SHARDS, f"sample.output={folder / 'whole.npz'}"]

    (instants,) = processes(1, drawn_up_to, 0, words(tmp_path / "counted")).checked()
    assert instants > 25, instants
    for instant in range(every, instants + 1, every):
        folder = tmp_path / str(instant)
        assert processes(1, drawn_up_to, instant, words(folder)).codes == [-signal.SIGKILL]
        assert main(words(folder)) == 0
        assert (folder / "whole.npz").read_bytes() == whole.read_bytes(), instant
        assert left(folder) == ["whole.json", "whole.npz", "whole.png"], instant


def stop_after(batches, monkeypatch, number=signal.SIGTERM):
    """Send this process a signal while it draws a batch."""
    inner, calls = sampling.finished, []

    def finished(*arguments):
        calls.append(1)
        if len(calls) == batches:
            os.kill(os.getpid(), number)
        return inner(*arguments)

    monkeypatch.setattr(drawing, "finished", finished)
    return calls


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_is_drawn(number, run, whole, tmp_path, monkeypatch, capsys):
    words = [str(run), *SHARDS, f"sample.output={tmp_path / 'whole.npz'}"]
    with monkeypatch.context() as patched:
        stop_after(3, patched, number)
        assert main(words) == 75
    said = capsys.readouterr().err
    assert f"stopped: 10 of 23 samples are in {tmp_path / 'whole.shards'}; the same command goes on" in said
    calls = stop_after(0, monkeypatch)
    assert main(words) == 0 and len(calls) == 3  # two batches of the second shard, one of the third
    assert (tmp_path / "whole.npz").read_bytes() == whole.read_bytes()
    assert "10 of them were there" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_before_a_drawing_is_finished(run, tmp_path, monkeypatch, capsys):
    stop_after(1, monkeypatch)
    assert main([str(run), "sample.count=5", f"sample.output={tmp_path / 'a.npz'}"]) == 130
    assert "stopped: no drawing was finished" in capsys.readouterr().err and left(tmp_path) == []


def test_a_signal_to_one_process_stops_all(processes, run, whole, tmp_path, monkeypatch):
    words = [str(run), *SHARDS, "sample.batch=1", f"sample.output={tmp_path / 'whole.npz'}"]

    def one():
        if os.environ["RANK"] == "0":
            stop_after(2, monkeypatch)
        else:
            inner = sampling.finished
            monkeypatch.setattr(drawing, "finished", lambda *given: time.sleep(0.2) or inner(*given))
        return main(words)

    ended = processes(2, one)
    assert ended.checked() == [75, 75] and left(tmp_path / "whole.shards") == [".lock", ".stop", "journal.json"]
    assert processes(2, lambda: main(words)).checked() == [0, 0]
    assert np.array_equal(arrays(tmp_path / "whole.npz")["arr_1"], arrays(whole)["arr_1"])


def test_a_process_that_fails_stops_the_others(processes, run, tmp_path, monkeypatch):
    words = [str(run), *SHARDS, "sample.batch=1", f"sample.output={tmp_path / 'a.npz'}"]

    def one():
        if os.environ["RANK"] == "1":
            monkeypatch.setattr(drawing, "finished", lambda *_: (_ for _ in ()).throw(OSError(5, "no device")))
        return main(words)

    ended = processes(2, one)
    assert ended.checked() == [70, 2]
    assert "lost contact with another process" in ended.outputs[0] and "--resume" not in ended.outputs[0]
    assert "no device" in ended.outputs[1]


def test_what_is_finished_is_not_drawn_again(run, whole, tmp_path, monkeypatch, capsys):
    words = [str(run), *SHARDS, f"sample.output={tmp_path / 'a.npz'}"]
    assert main(words) == 0
    calls = stop_after(0, monkeypatch)
    before = (tmp_path / "a.npz").stat().st_mtime_ns
    assert main(words) == 0 and not calls
    assert (tmp_path / "a.npz").stat().st_mtime_ns == before and "23 of them were there" in capsys.readouterr().out
    assert main([*words, "sample.labels=random"]) == 0 and len(calls) == 5  # another one takes its place
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-1])
    assert main([*words, "sample.labels=random"]) == 0 and len(calls) == 10


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(run, tmp_path, monkeypatch):
    """Return the words of a drawing that was stopped after its first shard."""
    words = [str(run), *SHARDS, f"sample.output={tmp_path / 'a.npz'}"]
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        assert main(words) == 75
    return words


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("solver.steps=3", "solver.steps: 2 -> 3"),
        ("sample.seed=4", "seed: 3 -> 4"),
        ("sample.labels=random", "labels: 'balanced' -> 'random'"),
        ("sample.count=24", "count: 23 -> 24"),
        ("sample.shard=11", "shard: 10 -> 11"),
        ("guidance.0.scale=2", "guidance.0.name: None -> 'classifier-free'"),
    ],
)
def test_another_drawing_in_the_same_place(word, said, broken, tmp_path, capsys):
    capsys.readouterr()
    assert main([*broken, word]) == 2
    printed = capsys.readouterr().err
    assert said in printed and "which holds another drawing" in printed and "Traceback" not in printed
    assert main([*broken, "sample.batch=4"]) == 0  # which changes nothing but rounding


def test_two_drawings_at_once(broken, tmp_path, capsys):
    shards = drawing.Shards(tmp_path / "a.shards", 23, 10)
    shards._claim()
    assert main(broken) == 2
    assert f"into which process {os.getpid()} on" in capsys.readouterr().err
    shards.release()
    assert main(broken) == 0


class Trap:
    def __reduce__(self):
        return eval, ("open('/tmp/sprung', 'w')",)


@pytest.mark.parametrize("harm", ["byte", "pickle", "labels"])
def test_a_damaged_shard_is_named_and_drawn_anew(harm, broken, whole, tmp_path, capsys):
    shard = tmp_path / "a.shards" / "shard-00000.npz"
    content = bytearray(shard.read_bytes())
    if harm == "byte":
        content[len(content) // 4] ^= 1
        shard.write_bytes(content)
    elif harm == "pickle":
        np.savez(shard, arr_0=np.array([Trap()] * 10, dtype=object), arr_1=np.arange(10))
    else:
        np.savez(shard, arr_0=arrays(shard)["arr_0"], arr_1=np.arange(10)[::-1].copy())
    told = shard.with_suffix(".json")
    told.write_text(json.dumps({**json.loads(told.read_text()), "bytes": shard.stat().st_size}))
    capsys.readouterr()
    assert main(broken) == 2
    printed = capsys.readouterr().err
    assert f"got {shard}, which is damaged" in printed and "Traceback" not in printed
    assert not (tmp_path / "a.npz").exists() and not Path("/tmp/sprung").exists()
    assert main(broken) == 0
    assert (tmp_path / "a.npz").read_bytes() == whole.read_bytes()


def test_a_shard_cut_short_is_drawn_anew(broken, whole, tmp_path):
    shard = tmp_path / "a.shards" / "shard-00000.npz"
    shard.write_bytes(shard.read_bytes()[:-7])
    assert main(broken) == 0
    assert (tmp_path / "a.npz").read_bytes() == whole.read_bytes()


def test_a_disk_without_room_is_told_of_after_the_first_shard(run, whole, tmp_path, monkeypatch, capsys):
    """A third of the samples is written; what is left and all of them once more need five times as much."""
    words = [str(run), "sample.count=30", *SHARDS[1:], f"sample.output={tmp_path / 'a.npz'}"]

    def free(factor):
        def usage(folder):
            (size,) = (path.stat().st_size for path in Path(folder).glob("shard-00000.npz"))
            return shutil._ntuple_diskusage(0, 0, int(factor * size))

        monkeypatch.setattr(shutil, "disk_usage", usage)

    free(4.9)
    assert main(words) == 2
    assert "MiB for the other samples and for joining them; make room" in capsys.readouterr().err
    free(1.9)
    assert main([*words, "sample.shards=keep"]) == 0  # one shard was there, another is drawn, and one is left
    free(5)
    assert main(words) == 0 and len(arrays(tmp_path / "a.npz")["arr_0"]) == 30


@pytest.mark.parametrize("journal", [b"{", b"[]", b'{"format": 9, "request": {}}', b'{"format": 1}', None])
def test_a_folder_of_something_else(journal, broken, tmp_path, capsys):
    path = tmp_path / "a.shards" / "journal.json"
    path.unlink() if journal is None else path.write_bytes(journal)
    assert main(broken) == 2
    printed = capsys.readouterr().err
    assert str(tmp_path / "a.shards") in printed and "Traceback" not in printed
    assert (tmp_path / "a.shards" / "shard-00000.npz").exists()


def test_more_devices_than_shards(processes, run, tmp_path):
    words = [str(run), "sample.count=5", f"sample.output={tmp_path / 'a.npz'}"]
    ended = processes(2, lambda: main(words))
    assert ended.checked() == [2, 2]
    assert "got 2 for 1 shards of 1000 samples; set sample.shard to 2 or lower" in ended.outputs[0]
    assert processes(2, lambda: main([*words, "sample.shard=3"])).checked() == [0, 0]
    assert arrays(tmp_path / "a.npz")["arr_0"].shape[0] == 5


def test_another_number_of_devices_than_torchrun_started(processes, run, tmp_path):
    ended = processes(
        2, lambda: main([str(run), "sample.devices=3", "sample.shard=10", f"sample.output={tmp_path / 'a.npz'}"])
    )
    assert ended.checked() == [2, 2] and "sample.devices: got 3, and torchrun started 2" in ended.outputs[0]


# --- what is written -------------------------------------------------------------------------------------------------


def test_shards_may_be_kept(run, whole, tmp_path, monkeypatch):
    words = [str(run), *SHARDS, "sample.shards=keep", f"sample.output={tmp_path / 'a.npz'}"]
    assert main(words) == 0
    assert left(tmp_path) == ["a.shards"]
    samples = Samples.of(tmp_path / "a.shards")
    images = torch.cat([x for x, _ in samples.batches(7)])
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), arrays(whole)["arr_0"])
    record = json.loads((tmp_path / "a.shards" / "record.json").read_text())
    joined = json.loads(whole.with_suffix(".json").read_text())
    assert record["samples_sha256"] == joined["samples_sha256"] and record["count"] == samples.count == 23
    assert (tmp_path / "a.shards" / "picture.png").read_bytes() == whole.with_suffix(".png").read_bytes()
    calls = stop_after(0, monkeypatch)
    assert main(words) == 0 and not calls
    assert main([*words, "sample.shards=join"]) == 0 and not calls  # the shards are those of the same drawing
    assert (tmp_path / "a.npz").read_bytes() == whole.read_bytes()


def test_the_record(whole):
    record = json.loads(whole.with_suffix(".json").read_text())
    assert record["samples_sha256"] == hashlib.sha256(arrays(whole)["arr_0"].tobytes()).hexdigest()
    assert record["bytes"] == whole.stat().st_size and record["count"] == 23
    assert record["label_law"] == "balanced" and "(seed, stream" in record["seed_law"]
    assert record["precision"] == "fp32" and record["tf32"] is False and record["autoencoder"] is None
    assert record["device"] == "cpu" and record["devices"] == 1 and record["torch"] == torch.__version__
    assert record["nfe"] == 4 and record["block_evaluations"] == 8
    assert record["images_per_second_and_device"] == pytest.approx(23 / record["seconds"], rel=0.05)
    assert record["checkpoint"]["average"] == "ema" and len(record["request_sha256"]) == 64


def test_no_drawing_replaces_another_by_default(run):
    """Each has a name of its own, and is found under it."""
    others = (["sample.count=5"], ["sample.labels=3"], ["sample.labels=random"], ["train.tf32=true"], [])
    for _ in range(2):
        for words in others:
            assert main([str(run), *SHARDS, *words]) == 0
    assert len(list(run.glob("samples-heun-2-seed-3-????????.npz"))) == len(others)


@pytest.mark.parametrize(("shape", "dtype"), [((3, 5, 7, 1), np.uint8), ((2, 4, 3, 5), np.float32)])
def test_pieces_make_the_archive_that_numpy_makes(shape, dtype, tmp_path):
    count = 4 * shape[0]
    samples = np.arange(count * np.prod(shape[1:])).reshape(count, *shape[1:]).astype(dtype)
    labels = np.arange(count) * 3
    told = stored.write_npz(tmp_path / "a.npz", np.split(samples, 4), count, labels)
    np.savez(tmp_path / "b.npz", arr_0=samples, arr_1=labels)
    ours, theirs = (zipfile.ZipFile(tmp_path / name) for name in ("a.npz", "b.npz"))
    assert ours.namelist() == theirs.namelist() == ["arr_0.npy", "arr_1.npy"]
    for name in ours.namelist():
        assert ours.read(name) == theirs.read(name)
        assert ours.getinfo(name).compress_type == zipfile.ZIP_STORED
    assert told == hashlib.sha256(samples.tobytes()).hexdigest()


def test_joining_holds_one_piece_at_a_time(tmp_path):
    piece = 2**20

    def pieces():
        for number in range(40):
            yield np.full((piece // 64, 8, 8, 1), number, np.uint8)

    labels = torch.arange(40 * piece // 64) % 10
    seen = drawing._Shown(len(labels), labels)
    tracemalloc.start()
    try:
        stored.write_npz(tmp_path / "a.npz", seen.passing(pieces()), len(labels), None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "a.npz").stat().st_size > 40 * piece and peak < 12 * piece  # 5 of them are the labels, twice
    assert [image[0, 0, 0] for image in seen.images] == [0] * 100


def test_a_failed_write_leaves_the_older_file(tmp_path):
    stored.write_text(tmp_path / "a.json", "older")

    def pieces():
        yield np.zeros((2, 3))
        raise OSError(28, "No space left on device")

    for name in ("a.json", "b.npz"):
        with pytest.raises(OSError, match="No space left"):
            stored.write_npz(tmp_path / name, pieces(), 5, None)
    assert left(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "older"


def test_latents_are_decoded_a_few_at_once(run):
    """By the one rounding rule; without a decoder they stay as they are."""
    configuration, parts = trained.load(trained.find(run, pytest.fail), ["sample.decode_batch=3"])
    sizes = []

    class Decoder(torch.nn.Module):
        def decode(self, z):
            sizes.append(len(z))
            return torch.nn.functional.interpolate(z[:, :3], scale_factor=2) / 2

    latents = torch.randn(7, 4, 5, 2)
    decoding = replace(parts, autoencoder=Decoder(), configuration=configuration)
    images = sampling.finished(decoding, latents)
    wanted = np.rint(127.5 * np.clip(np.repeat(np.repeat(latents.numpy()[:, :3], 2, 2), 2, 3) / 2, -1, 1) + 127.5)
    assert sizes == [3, 3, 1] and images.dtype == torch.uint8 and images.shape == (7, 3, 10, 4)
    assert np.abs(images.numpy() - wanted).max() <= 1 and (images.numpy() != wanted).mean() < 0.01
    bare = replace(parts, dataset=data.build("synthetic", shape=(4, 5, 2), num_classes=10))
    assert torch.equal(sampling.finished(bare, latents), latents)


def test_latents_in_shards(parity, tmp_path):
    """Latents that nothing decodes are float32 (N, C, H, W), whichever way they are drawn."""
    torch.save({"ema": parity("sit").state}, tmp_path / "a.pt")
    words = ("weights.family=sit", "backbone.num_heads=4", "solver.name=heun", "solver.steps=2", "sample.count=7")
    for name, size in (("one", 7), ("many", 3)):
        more = [f"sample.shard={size}", "sample.batch=3", f"sample.output={tmp_path / f'{name}.npz'}"]
        assert main([str(tmp_path / "a.pt"), *words, *more]) == 0
    one, many = (arrays(tmp_path / f"{name}.npz") for name in ("one", "many"))
    assert many["arr_0"].dtype == np.float32 and many["arr_0"].shape == (7, 4, 8, 8)
    assert np.array_equal(one["arr_0"], many["arr_0"]) and np.array_equal(one["arr_1"], many["arr_1"])
    record = json.loads((tmp_path / "many.json").read_text())
    assert record["values"] == "latents, float32 (N, C, H, W)" and not (tmp_path / "many.png").exists()


def test_a_picture_of_very_many_classes_shows_the_first(tmp_path):
    rows = shown(5000, torch.arange(5000) % 1000, (256, 256))
    assert len(rows) == 51 and rows[50] == [50, 1050, 2050, 3050, 4050]
    assert len(shown(5000, None, (8, 8))) == 500 and shown(13, None, (8, 8))[1] == [10, 11, 12]


def test_the_picture_is_that_of_all_samples(run, tmp_path):
    words = ("sample.count=130", "solver.steps=1", "sample.batch=10")
    for name, shard in (("a", 130), ("b", 30)):
        assert main([str(run), *words, f"sample.shard={shard}", f"sample.output={tmp_path / f'{name}.npz'}"]) == 0
    a, b = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "ab")
    assert a.shape == (4 * 91, 4 * 91) and np.array_equal(a, b)
