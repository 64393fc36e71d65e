"""Preparing data: what the shards hold against the networks called by hand, and that nothing else decides on it."""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import json
import os
import resource
import warnings
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from PIL import Image
from safetensors.torch import load_file, save_file

from pathline import ConfigurationError, DataError, Draws, InputError, data, encoders
from pathline.core.config import resolve
from pathline.core.errors import PathlineError
from pathline.data.crop import centre_crop
from pathline.data.prepare import Options, command
from pathline.data.prepare.command import prepare
from pathline.training import Trainer
from pathline.training.log import read_rows


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


preparing, faults = loaded("preparing"), loaded("faults")
Pictures, Coder, Tokens = preparing.Pictures, preparing.Coder, preparing.Tokens

R, ROWS = 10, 17  # three shards: 17, 17 and 3 rows
FULL = Options(R, flip=True, images=True, rows_per_shard=ROWS, licence="none known")
FEATURES = {"tokens": (preparing.TOKENS, Tokens())}


def cropped(source, indices) -> torch.Tensor:
    images = np.stack([centre_crop(source.picture(index), R) for index in indices])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def rows(folder, name) -> torch.Tensor:
    """A column of all shards, read by the safetensors library."""
    return torch.cat([load_file(path)[name] for path in sorted(folder.glob("shard-*"))])


def manifest_of(folder) -> dict:
    return json.loads((folder / "manifest.json").read_text())


# --- what the shards hold


def test_rows_are_what_the_networks_give(tmp_path):
    """Also with networks that are shown one image at a time; the library's own reader is asked."""
    source, coder = Pictures(), Coder()
    prepare(source, tmp_path / "out", FULL, autoencoder=coder, features=FEATURES)
    images = cropped(source, range(37))
    assert torch.equal(rows(tmp_path / "out", "images"), images)
    assert rows(tmp_path / "out", "index").tolist() == list(range(37))
    assert rows(tmp_path / "out", "labels").tolist() == source.labels
    for end, shown in (("", images), ("_flip", images.flip(3))):
        moments = torch.cat([torch.cat(coder.moments(image[None]), 1) for image in shown])
        found = rows(tmp_path / "out", "moments" + end)
        assert found.dtype == torch.float16 and found.shape == (37, 4, 5, 5)
        torch.testing.assert_close(found.float(), moments, rtol=1e-3, atol=1e-5)  # 2^-11 of each, in half precision
        tokens = rows(tmp_path / "out", "features_tokens" + end)
        torch.testing.assert_close(tokens.float(), Tokens()(shown), rtol=1e-3, atol=0)
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", *(f"shard-0000{i}.safetensors" for i in range(3))]


def test_shards_begin_with_the_latents_on_a_boundary(tmp_path):
    prepare(Pictures(), tmp_path, FULL, autoencoder=Coder(), features=FEATURES)
    for path, count in zip(sorted(tmp_path.glob("shard-*")), (17, 17, 3), strict=True):
        told, start = preparing.header(path)
        assert start % 64 == 0
        assert told.pop("__metadata__") == {"format": "pathline packed 1", "moments": "mean, std"}
        names = ["moments", "moments_flip", "features_tokens", "features_tokens_flip", "labels", "index", "images"]
        assert list(told) == names and all(entry["shape"][0] == count for entry in told.values())
        ends = [entry["data_offsets"] for entry in told.values()]
        assert ends[0][0] == 0 and all(end[1] == after[0] for end, after in pairwise(ends))
        assert start + ends[-1][1] == path.stat().st_size


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_latents_of_an_autoencoder_without_a_posterior(dtype, tmp_path):
    source, coder = Pictures(5), Coder(deterministic=True)
    manifest = prepare(source, tmp_path, Options(R, dtype=dtype), autoencoder=coder)
    expected = coder.moments(cropped(source, range(5))).mean.to(getattr(torch, dtype))
    assert torch.equal(rows(tmp_path, "latents"), expected)
    assert (manifest.latent_kind, manifest.moments, manifest.shape) == ("mean", None, [2, 5, 5])


def test_pixels_without_an_autoencoder(tmp_path):
    source = Pictures(7, labelled=False)
    manifest = prepare(source, tmp_path, Options(R, flip=True), features=FEATURES)
    (path,) = tmp_path.glob("shard-*")
    columns = load_file(path)
    assert set(columns) == {"images", "index", "features_tokens", "features_tokens_flip"}
    assert torch.equal(columns["images"], cropped(source, range(7)))
    assert (manifest.latent_kind, manifest.shape, manifest.class_names) == ("images", [3, R, R], [])


def test_the_manifest_tells_all(tmp_path):
    source, coder = Pictures(), Coder()
    prepare(source, tmp_path, FULL, autoencoder=coder, features=FEATURES)
    told = manifest_of(tmp_path)
    assert (told["format"], told["count"], told["latent_kind"]) == ("pathline packed 1", 37, "moments")
    assert (told["shape"], told["request"]["class_names"], told["dropped"]) == ([2, 5, 5], ["ant", "bee", "cat"], [])
    assert [(shard["first_index"], shard["rows"]) for shard in told["shards"]] == [(0, 17), (17, 17), (34, 3)]
    for shard in told["shards"]:
        path = tmp_path / shard["file"]
        assert path.stat().st_size == shard["bytes"]
        assert os.popen(f"sha256sum {path}").read().split()[0] == shard["sha256"]
    request = told["request"]
    assert request["autoencoder"] == coder.manifest and request["source"] == source.manifest
    assert request["crop"] == {"algorithm": "adm-centre-crop", "pillow": PIL.__version__}
    assert request["encoders"] == {"tokens": {"component": preparing.TOKENS, "encoder": Tokens().manifest}}
    assert request["creator"]["torch"] == torch.__version__ and request["licence"] == "none known"
    assert request["flip"] is True and request["seed"] == 0 and request["limit"] is None
    for name in ("moments", "moments_flip"):
        values = rows(tmp_path, name).double().transpose(0, 1).flatten(1)
        figures = told["statistics"][name]
        assert figures["count"] == 37 * 25
        assert figures["mean"] == pytest.approx(values.mean(1).tolist(), rel=1e-12)
        assert figures["std"] == pytest.approx(values.std(1).tolist(), rel=1e-12)
        assert (figures["low"], figures["high"]) == (values.amin(1).tolist(), values.amax(1).tolist())


# --- what does not decide on it


def test_bytes_are_the_same_whatever_is_read_ahead(tmp_path):
    for ahead in (1, 5, 64):
        prepare(Pictures(), tmp_path / str(ahead), FULL, autoencoder=Coder(), features=FEATURES, batch=ahead)
    first, second, third = (preparing.contents(tmp_path / str(ahead)) for ahead in (1, 5, 64))
    assert first == second == third and len(first) == 4


def test_bytes_are_the_same_of_two_processes(processes, tmp_path):
    def work():
        strategy = DDPStrategy(process_group_backend="gloo")
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        source = Pictures()
        prepare(source, tmp_path / "two", FULL, autoencoder=Coder(), features=FEATURES, fabric=fabric)
        return sorted(source.reads)

    reads = processes(2, work).checked()
    assert reads == [[*range(17), 34, 35, 36], list(range(17, 34))]  # every second shard each, and none twice
    prepare(Pictures(), tmp_path / "one", FULL, autoencoder=Coder(), features=FEATURES)
    assert preparing.contents(tmp_path / "two") == preparing.contents(tmp_path / "one")


def test_a_process_that_fails_is_noticed_by_the_others(processes, tmp_path):
    def work(folder, broken):
        fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
        fabric.launch()
        try:
            prepare(Pictures(broken=broken), folder, FULL, autoencoder=Coder(), features=FEATURES, fabric=fabric)
        except PathlineError as error:
            return f"{type(error).__name__}: {error}"

    for broken, names in ((20, ("Stopped", "DataError")), (3, ("DataError", "Stopped"))):
        folder = tmp_path / str(broken)
        words = processes(2, work, folder, [broken]).checked()
        said = {"Stopped": "another process has failed", "DataError": f"got 0{broken:02d}.png, which is truncated"}
        assert [word.partition(":")[0] for word in words] == list(names)
        assert all(word.startswith(f"{name}: {said[name]}") for word, name in zip(words, names, strict=True))
        assert (folder / "journal" / "stopped").read_text() == "failed"
        assert processes(2, work, folder, []).checked() == [None, None]
        assert manifest_of(folder)["count"] == 37 and not (folder / "journal").exists()


def test_processes_that_would_be_idle_are_told_of(processes, tmp_path):
    """Three shards for two processes: each works off two in turn, the second one of them one alone."""

    def work():
        fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
        fabric.launch()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            prepare(Pictures(), tmp_path, Options(R, rows_per_shard=ROWS), fabric=fabric)
        return [str(warning.message) for warning in heard if "--rows-per-shard" in str(warning.message)]

    told = (
        "3 shards keep 2 processes busy for 75% of the time; --rows-per-shard 10 would for all of it, in a new folder"
    )
    assert processes(2, work).checked() == [[told], []]


def test_a_choice_is_made_by_the_seed(tmp_path):
    for seed in (0, 3):
        manifest = prepare(Pictures(), tmp_path / str(seed), Options(R, limit=5, seed=seed))
        assert manifest.count == manifest.request.count == 5
        expected = np.sort(Draws(seed).permutation("prepared images", 37)[:5]).tolist()
        assert rows(tmp_path / str(seed), "index").tolist() == expected
        assert rows(tmp_path / str(seed), "labels").tolist() == [(7 * index) % 3 for index in expected]
    assert not torch.equal(rows(tmp_path / "0", "index"), rows(tmp_path / "3", "index"))
    assert prepare(Pictures(5), tmp_path / "more", Options(R, limit=7)).count == 5


# --- images that cannot be used


def test_an_image_that_cannot_be_read_is_named_and_the_rest_goes_on_once_it_is_replaced(tmp_path):
    with pytest.raises(DataError, match=r"got 021\.png, which is truncated"):
        prepare(Pictures(broken={21, 30}), tmp_path, FULL, autoencoder=Coder(), features=FEATURES)
    assert [path.name for path in tmp_path.glob("*.*")] == ["shard-00000.safetensors"]
    again = Pictures()
    prepare(again, tmp_path, FULL, autoencoder=Coder(), features=FEATURES)
    assert min(again.reads) == 17
    prepare(Pictures(), tmp_path.with_name("whole"), FULL, autoencoder=Coder(), features=FEATURES)
    assert preparing.contents(tmp_path) == preparing.contents(tmp_path.with_name("whole"))


def test_images_that_cannot_be_read_are_dropped_where_asked_for(tmp_path):
    """The rows behind move up, in every column; the log has their names."""
    broken = {0, 3, 16, 30}
    options = Options(R, flip=True, images=True, rows_per_shard=ROWS, on_error="drop")
    source = Pictures(broken=broken)
    manifest = prepare(source, tmp_path, options, autoencoder=Coder(), features=FEATURES)
    kept = [index for index in range(37) if index not in broken]
    images = cropped(source, kept)
    assert rows(tmp_path, "index").tolist() == kept and manifest.count == 33
    assert rows(tmp_path, "labels").tolist() == [source.labels[index] for index in kept]
    assert torch.equal(rows(tmp_path, "images"), images)
    flipped = torch.cat(Coder().moments(images.flip(3)), 1)
    torch.testing.assert_close(rows(tmp_path, "moments_flip").float(), flipped, rtol=1e-3, atol=1e-5)
    assert [(gone.index, gone.key) for gone in manifest.dropped] == [(i, f"{i:03d}.png") for i in sorted(broken)]
    assert manifest.dropped[0].reason == "got 000.png, which is truncated"
    assert [(shard.rows, shard.first_index) for shard in manifest.shards] == [(14, 0), (16, 17), (3, 34)]
    for path in tmp_path.glob("shard-*"):
        told, start = preparing.header(path)
        end = max(entry["data_offsets"][1] for key, entry in told.items() if key != "__metadata__")
        assert start % 64 == 0 and start + end == path.stat().st_size


@pytest.mark.parametrize("broken", [{4, 5}, {0, 1}, {6}, {0, 1, 4, 5, 6}])
def test_a_shard_of_nothing_is_left_out(broken, tmp_path):
    """The first, the last, one between them; the same whether it is made at once or gone on with."""
    options, kept = Options(R, rows_per_shard=2, on_error="drop"), sorted(set(range(7)) - broken)
    manifest = prepare(Pictures(7, broken=broken), tmp_path / "out", options)
    assert rows(tmp_path / "out", "index").tolist() == kept and manifest.count == len(kept)
    assert [gone.index for gone in manifest.dropped] == sorted(broken)
    assert [shard.file for shard in manifest.shards] == [f"shard-0000{i}.safetensors" for i in {i // 2 for i in kept}]
    dataset = data.build("prepared", path=str(tmp_path / "out"))
    images = cropped(Pictures(7), kept) / 127.5 - 1
    assert torch.equal(dataset.batch(range(len(kept)))["data"], images)
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(DataError, match="prepare data in, which holds shard-"):
        prepare(Pictures(7, broken=broken), tmp_path / "out", options)


def test_a_source_of_which_nothing_can_be_stored(tmp_path):
    options = Options(R, rows_per_shard=2, on_error="drop")
    with pytest.raises(DataError, match=r"no image that can be stored among 3 from 000\.png on, of which got 000\.png"):
        prepare(Pictures(3, broken={0, 1, 2}), tmp_path, options)
    assert not (tmp_path / "manifest.json").exists()


def test_what_stopped_at_an_image_goes_on_without_it(tmp_path):
    """From stopping to dropping: what is whole has lost nothing, and stays."""
    broken = {20, 36}
    with pytest.raises(DataError, match=r"got 020\.png, which is truncated"):
        prepare(Pictures(broken=broken), tmp_path / "out", FULL, autoencoder=Coder(), features=FEATURES)
    dropping, again = replace(FULL, on_error="drop", licence=None), Pictures(broken=broken)
    prepare(again, tmp_path / "out", dropping, autoencoder=Coder(), features=FEATURES)
    assert min(again.reads) == 17
    dropping = replace(FULL, on_error="drop")
    whole = prepare(Pictures(broken=broken), tmp_path / "whole", dropping, autoencoder=Coder(), features=FEATURES)
    assert preparing.contents(tmp_path / "out") == preparing.contents(tmp_path / "whole")
    assert whole.request.licence == "none known"
    with pytest.raises(DataError, match=r"another request \(on_error: 'drop' -> 'stop'\)"):
        prepare(Pictures(broken=broken), tmp_path / "out", FULL, autoencoder=Coder(), features=FEATURES)


def test_names_of_files_that_are_not_utf_8_are_noted_by_their_bytes(tmp_path):
    source = Pictures(5, broken={3})
    source.keys[3] = os.fsdecode(b"caf\xe9.png")
    manifest = prepare(source, tmp_path, Options(R, on_error="drop"))
    assert manifest.dropped[0].key == "caf\\xe9.png"
    assert manifest.dropped[0].reason == "got caf\\xe9.png, which is truncated"
    source.class_names[1] = os.fsdecode(b"f\xeate")
    with pytest.raises(DataError, match=r"f\\udceate.*, which is not UTF-8, in a path or the name of a class"):
        prepare(source, tmp_path.with_name("other"), Options(R, on_error="drop"))


@pytest.mark.parametrize("gain", [3e5, float("inf"), float("nan")])
def test_latents_that_half_precision_cannot_hold_are_refused_by_name(gain, tmp_path):
    class Loud(Coder):
        def moments(self, images):
            mean, std = super().moments(images)
            return mean, torch.where(images[:, :1, :1, :1] == level, gain, 1.0) * std

    level = int(cropped(Pictures(), [19])[0, 0, 0, 0])
    assert [i for i in range(37) if int(cropped(Pictures(), [i])[0, 0, 0, 0]) == level] == [19]
    with pytest.raises(DataError, match=r"got 019\.png, which gives moments that float16 cannot hold; store another"):
        prepare(Pictures(), tmp_path / "stop", Options(R, rows_per_shard=ROWS), autoencoder=Loud())
    options = Options(R, rows_per_shard=ROWS, on_error="drop")
    manifest = prepare(Pictures(), tmp_path / "drop", options, autoencoder=Loud())
    assert [gone.key for gone in manifest.dropped] == ["019.png"] and 19 not in rows(tmp_path / "drop", "index")
    assert bool(rows(tmp_path / "drop", "moments").isfinite().all())
    if gain == 3e5:
        assert prepare(Pictures(), tmp_path / "wide", Options(R, dtype="float32"), autoencoder=Loud()).count == 37


def test_the_image_that_a_network_of_half_precision_refuses_is_found(tmp_path):
    level = int(cropped(Pictures(), [19])[0, 0, 0, 0])
    with pytest.raises(DataError, match=r"got 019\.png, which gives got values that float16 cannot hold"):
        prepare(Pictures(), tmp_path / "stop", Options(R), autoencoder=Coder(overflows=level))
    options = Options(R, on_error="drop")
    manifest = prepare(Pictures(), tmp_path / "drop", options, autoencoder=Coder(overflows=level))
    assert [gone.index for gone in manifest.dropped] == [19]


# --- what is refused


def test_a_folder_of_another_request_is_refused_and_says_in_what(tmp_path):
    options = Options(R, rows_per_shard=ROWS)
    with pytest.raises(DataError):
        prepare(Pictures(broken={36}), tmp_path / "begun", options, autoencoder=Coder())
    prepare(Pictures(), tmp_path / "whole", options, autoencoder=Coder())
    other = Coder()
    other.manifest["sha256"] = "beef"
    for name in ("begun", "whole"):
        before = preparing.contents(tmp_path / name)
        for changed, coder, said in (
            (Options(R, rows_per_shard=16), Coder(), "rows_per_shard: 17 -> 16"),
            (Options(12, rows_per_shard=ROWS), Coder(), "resolution: 10 -> 12"),
            (options, other, "autoencoder.sha256: 'c0de' -> 'beef'"),
            (Options(R, rows_per_shard=ROWS, licence="CC0"), Coder(), "licence: None -> 'CC0'"),
            (options, Coder(), "class_names: ['ant', 'bee', 'cat'] -> ['ant', 'bee', 'dog']"),
        ):
            source = Pictures()
            source.class_names[2] = said[-5:-2] if "dog" in said else "cat"
            with pytest.raises(DataError, match="begun with another request") as error:
                prepare(source, tmp_path / name, changed, autoencoder=coder)
            assert f"({said})" in str(error.value)
        assert preparing.contents(tmp_path / name) == before


def test_a_whole_folder_is_left_as_it_is(tmp_path):
    prepare(Pictures(), tmp_path, FULL, autoencoder=Coder(), features=FEATURES)
    before, source = preparing.contents(tmp_path), Pictures()
    assert prepare(source, tmp_path, FULL, autoencoder=Coder(), features=FEATURES).count == 37
    assert preparing.contents(tmp_path) == before and not source.reads
    (tmp_path / "shard-00001.safetensors").unlink()
    with pytest.raises(DataError, match=r"without shard-00001\.safetensors, other than its manifest\.json says"):
        prepare(source, tmp_path, FULL, autoencoder=Coder(), features=FEATURES)


def test_a_shard_that_was_damaged_meanwhile_is_made_again(tmp_path):
    with pytest.raises(DataError):
        prepare(Pictures(broken={36}), tmp_path, FULL, autoencoder=Coder(), features=FEATURES)
    first, second = tmp_path / "shard-00000.safetensors", tmp_path / "shard-00001.safetensors"
    whole = first.read_bytes(), second.read_bytes()
    first.write_bytes(whole[0][:-1] + bytes([whole[0][-1] ^ 1]))
    second.write_bytes(whole[1][:-1])
    prepare(Pictures(), tmp_path, FULL, autoencoder=Coder(), features=FEATURES)
    assert (first.read_bytes(), second.read_bytes()) == whole


def test_places_that_hold_something_else_are_refused(tmp_path):
    (tmp_path / "file").write_text("a")
    with pytest.raises(DataError, match="which is no folder, to prepare data in"):
        prepare(Pictures(), tmp_path / "file", FULL, autoencoder=Coder())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("a")
    with pytest.raises(DataError, match=r"which holds thesis\.tex; name another folder"):
        prepare(Pictures(), tmp_path / "folder", FULL, autoencoder=Coder())
    assert os.listdir(tmp_path / "folder") == ["thesis.tex"]


def test_two_commands_in_one_folder_are_refused(tmp_path):
    (tmp_path / "journal").mkdir()
    with (tmp_path / "journal" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="in which another command is preparing data"):
            prepare(Pictures(), tmp_path, FULL, autoencoder=Coder(), features=FEATURES)
    prepare(Pictures(), tmp_path, FULL, autoencoder=Coder(), features=FEATURES)


def test_a_disk_that_is_too_full_is_refused_before_anything_is_encoded(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=11_000))
    source = Pictures()  # 37 rows of 300 bytes of pixels and two numbers: 11,692 bytes
    with pytest.raises(DataError, match=r"on a disk with 0\.0 GiB free, expected 0\.0 GiB for what is to come"):
        prepare(source, tmp_path, Options(R))
    assert not source.reads
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=11_700))
    prepare(source, tmp_path, Options(R))


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    """By a limit on the size of files: of a shard, and of the plan."""

    def limited(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            prepare(Pictures(), tmp_path, Options(R, rows_per_shard=ROWS))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    for size, name in ((5000, "shard-00000.safetensors"), (100, "journal/plan.json")):
        ended = faults.forked(partial(limited, size))
        said = f"DataError: got {tmp_path / name}, which cannot be written: File too large; make room, and give the"
        assert ended.code == 1 and said in ended.said
        assert [path.name for path in tmp_path.rglob(".writing-*")] == []
    assert prepare(Pictures(), tmp_path, Options(R, rows_per_shard=ROWS)).count == 37


def test_images_that_are_too_large_for_the_memory_are_told_of(tmp_path):
    class Large(Coder):
        def moments(self, images):
            torch.empty(2**60, dtype=torch.uint8)

    with pytest.raises(InputError, match=r"got no memory for images of 10 x 10, 16 at once .*; choose a smaller --res"):
        prepare(Pictures(), tmp_path, Options(R), autoencoder=Large())


def test_an_autoencoder_that_scales_otherwise_than_it_tells_is_refused(tmp_path):
    """Of its scaling the manifest alone is kept."""

    class Doubled(Coder):
        def to_model(self, z):
            return 2 * super().to_model(z)

    with pytest.raises(InputError, match="got the autoencoder coder, whose to_model is not"):
        prepare(Pictures(), tmp_path / "out", Options(R), autoencoder=Doubled())
    assert not (tmp_path / "out").exists()


def test_options_that_cannot_be(tmp_path):
    for options, coder, error, said in (
        (Options(0), None, ConfigurationError, "got --resolution 0, expected 1 or more"),
        (Options(R, rows_per_shard=0), None, ConfigurationError, "got --rows-per-shard 0"),
        (Options(R, limit=0), None, ConfigurationError, "got --limit 0"),
        (Options(R, seed=-1), None, ConfigurationError, "got --seed -1"),
        (Options(R, images=True), None, ConfigurationError, "got --images without an autoencoder"),
        (Options(R, dtype="float32"), None, ConfigurationError, "got --dtype float32 without an autoencoder"),
        (Options(11), Coder(), InputError, "got images of 11 x 11, expected an even side"),
    ):
        with pytest.raises(error, match=said):
            prepare(Pictures(), tmp_path / "out", options, autoencoder=coder)
    with pytest.raises(DataError, match="got a source without images"):
        prepare(Pictures(0), tmp_path / "out", FULL, autoencoder=Coder())
    assert not (tmp_path / "out").exists()


# --- the command


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Five pictures in two class folders."""
    source = Pictures(5)
    for index in range(5):
        folder = tmp_path / "pictures" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        source.picture(index).save(folder / f"{index}.png")
    return tmp_path / "pictures"


def test_the_command_packs_a_folder(pictures, tmp_path, capsys):
    words = [str(pictures), str(tmp_path / "out"), "--resolution", "10", "--rows-per-shard", "3", "--limit", "4"]
    assert command.main(words) == 0
    assert capsys.readouterr().out.startswith(f"4 images: 2 shards in {tmp_path / 'out'}, 0.0 MiB")
    told = manifest_of(tmp_path / "out")
    assert told["request"]["class_names"] == ["a", "b"] and told["request"]["source"]["name"] == "folder"
    assert command.main([*words, "--seed", "1"]) == 2
    assert "begun with another request (seed: 0 -> 1)" in capsys.readouterr().err
    (pictures / "a" / "0.png").write_bytes(b"no image")
    words = [str(pictures), str(tmp_path / "other"), "--resolution", "10", "--kind", "folder,exif=true"]
    assert command.main(words) == 2
    assert f"error: got {pictures / 'a' / '0.png'}" in capsys.readouterr().err
    words[1] = str(tmp_path / "dropped")
    assert command.main([*words, "--on-error", "drop"]) == 0
    assert capsys.readouterr().out.startswith("4 images, 1 left out: 1 shards")
    rules = manifest_of(tmp_path / "dropped")["request"]["source"]["decoding"]
    assert rules["exif orientation"] == "applied"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--autoencoder", "sd-vae,dtype"], "expected name,option=value,option=value"),
        (["--autoencoder", "{name: [}"], "which is not YAML"),
        (["--autoencoder", "{nam: x}"], "expected a name, or {name: …, option: value}"),
        (["--autoencoder", "none-such"], "unknown autoencoder 'none-such'"),
        (["--encoder", "none-such"], "unknown encoder 'none-such'"),
        (["--kind", "none-such"], "unknown image source 'none-such'"),
        (["--batch", "0"], "got --batch 0, expected 1 or more"),
        (["--images"], "got --images without an autoencoder"),
        (["--devices", "0"], "got --devices 0"),
    ],
)
def test_words_that_mean_nothing(words, said, pictures, tmp_path, capsys):
    assert command.main([str(pictures), str(tmp_path / "out"), "--resolution", "10", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_in_that_of_the_images_is_refused_at_once(pictures, capsys):
    for output in (pictures / "out", pictures):
        assert command.main([str(pictures), str(output), "--resolution", "10"]) == 2
        assert f"got {output} to write to, which lies in the folder {pictures} of images" in capsys.readouterr().err
    assert sorted(os.listdir(pictures)) == ["a", "b"]


def test_a_source_that_is_not_there(tmp_path, capsys):
    assert command.main([str(tmp_path / "none"), str(tmp_path / "out"), "--resolution", "10"]) == 2
    assert f"error: got {tmp_path / 'none'}" in capsys.readouterr().err


def test_every_image_is_read_once(tmp_path):
    source = Pictures()
    prepare(source, tmp_path, FULL, autoencoder=Coder(), features=FEATURES, batch=3)
    assert sorted(source.reads) == list(range(37))


@pytest.mark.usefixtures("torchvision_operators")
def test_the_command_with_networks_of_diffusers_and_timm(pictures, tmp_path, capsys):
    """Random weights of small ones; training takes tokens and latents as their manifests say."""
    diffusers, timm = (importlib.import_module(name) for name in ("diffusers", "timm"))
    torch.manual_seed(3)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = diffusers.AutoencoderKL(**blocks, block_out_channels=[4, 8], norm_num_groups=2, latent_channels=5)
    vae.save_pretrained(tmp_path / "vae")
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "vit.safetensors")
    words = [str(pictures), str(tmp_path / "out"), "--resolution", "32", "--flip", "--rows-per-shard", "3"]
    words += ["--autoencoder", f"diffusers,model={tmp_path / 'vae'}"]
    words += ["--encoder", f"{{name: timm, model: test_vit, weights: {tmp_path / 'vit.safetensors'}}}"]
    assert command.main(words) == 0, capsys.readouterr().err
    dataset = data.build("prepared", path=str(tmp_path / "out"))
    images = [centre_crop(Image.open(path), 32) for path in sorted(pictures.rglob("*.png"))]
    shown = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = 0.18215 * vae.eval().encode(shown / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(dataset.batch(range(5))["data"], expected, rtol=1e-3, atol=1e-4)
    entry = {"name": "timm", "model": "test_vit", "weights": str(tmp_path / "vit.safetensors"), "resolution": 32}
    entry |= {"final_norm": True, "resize": False}
    source = encoders.Cached(tmp_path / "out", {**entry, "cache": str(tmp_path / "out")}, dataset)
    tokens = source.tokens(dataset.batch(range(5)), torch.device("cpu"))
    torch.testing.assert_close(tokens, encoders.build(entry)(shown), rtol=1e-3, atol=1e-3)
    network = {"name": "sit", "input_size": 16, "patch_size": 8, "in_channels": 5, "hidden_size": 12, "depth": 2}
    network |= {"num_heads": 3, "num_classes": 2, "align_layer": 1, "align_dims": [64], "align_width": 7}
    entries = {
        "data": {"name": "prepared", "path": str(tmp_path / "out")},
        "backbone": network,
        "objective": {"name": "alignment", "align": 0.7},
        "encoders": [{**entry, "cache": str(tmp_path / "out")}],
        "autoencoder": {"name": "diffusers", "model": str(tmp_path / "vae")},
        "train": {"steps": 2, "global_batch": 3, "folder": str(tmp_path / "run"), "accelerator": "cpu"},
        "log": {"every": 1, "tensorboard": False},
        "solver": {"name": "euler", "steps": 1},
    }
    Trainer(resolve(entries)).run()
    assert [-1 <= row["align"] <= 1 for row in read_rows(tmp_path / "run")] == [True, True]
    with pytest.raises(DataError, match=r"features of another timm \(final_norm True -> False\)"):
        encoders.Cached(tmp_path / "out", {**entry, "final_norm": False}, dataset)
