"""The index of WebDataset's shards: made once, and held against what is there."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pathline import DataError, InputError, data

spec = importlib.util.spec_from_file_location("sharding", Path(__file__).with_name("sharding.py"))
sharding = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sharding)
COUNTS = sharding.COUNTS
build = sharding.build
npy = sharding.npy
pack = sharding.pack
pattern = sharding.pattern
refusal = sharding.refusal
shard_name = sharding.shard_name
value = sharding.value
write = sharding.write


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("pathline.data.layouts.shards._PAUSES", (0.0, 0.0))


@pytest.fixture
def shards(tmp_path):
    write(tmp_path / "shards")
    return tmp_path / "shards"


def test_the_index_is_made_once_and_then_read(shards, monkeypatch):
    build(shards)
    told = json.loads((shards / "shardindex.json").read_text())
    assert told["wids_version"] == 1 and [entry["nsamples"] for entry in told["shardlist"]] == list(COUNTS)
    sizes = [(shards / shard_name(number)).stat().st_size for number in range(len(COUNTS))]
    assert [entry["filesize"] for entry in told["shardlist"]] == sizes
    monkeypatch.setattr("pathline.data.layouts.counts._make", lambda *_: pytest.fail("read all shards again"))
    assert len(build(shards)) == 28
    assert len(build(f"{shards}/x-00000{{1..2}}.tar")) == 9  # some of those that it tells of
    for entry in told["shardlist"]:  # as one made elsewhere may be
        entry["url"] = f"https://host/{shard_name(int(entry['url'][-10:-4]))}"
        del entry["filesize"]
    (shards / "shardindex.json").write_text(json.dumps(told))
    assert len(build(shards)) == 28 and build(shards).held_bytes is None


def test_shards_of_several_folders_need_a_path_of_an_index(shards, tmp_path):
    (tmp_path / "other").mkdir()
    (shards / shard_name(6)).rename(tmp_path / "other" / "last.tar")
    paths = [str(shards), str(tmp_path / "other" / "last.tar")]
    for given in (paths, f"pipe:cat {shards}/x-000000.tar"):
        with pytest.raises(InputError, match="set index to the path of a file"):
            data.build("webdataset", path=given, kind="latents")
    assert len(data.build("webdataset", path=paths, kind="latents", index=str(tmp_path / "index.json"))) == 28
    assert f"got no index {tmp_path}/none/i.json, which cannot be written" in refusal(
        shards, index=f"{tmp_path}/none/i.json"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "[" * 10_000,
        "[]",
        '{"shardlist": 3}',
        '{"shardlist": [3]}',
        '{"shardlist": [{"url": "x"}]}',
        '{"shardlist": [{"url": "x", "nsamples": 0}]}',
        '{"shardlist": [{"url": "x", "nsamples": true}]}',
        '{"shardlist": [{"nsamples": 1}]}',
    ],
)
def test_an_index_that_is_none(text, shards):
    (shards / "shardindex.json").write_text(text)
    message = refusal(shards)
    assert f"got {shards / 'shardindex.json'}, which is no index of shards" in message


def test_an_index_that_does_not_fit(shards):
    build(f"{shards}/x-00000{{0..5}}.tar")
    assert f"without the shards {shards / shard_name(6)}" in refusal(shards)
    (shards / "shardindex.json").write_text(" " * 10**7)
    assert "it is no index of them" in refusal(shards)


def test_a_shard_that_has_changed_is_named(shards, tmp_path):
    dataset = build(shards)
    piped = build("pipe:cat " + pattern(shards), index=str(tmp_path / "index.json"))
    pack(shards / shard_name(2), [("0.npy", npy(value(0))), ("0.cls", b"1")])
    assert f"got {shards / shard_name(2)} of 10240 bytes" in refusal(shards)
    for changed in (dataset, piped):
        with pytest.raises(DataError, match=r"x-000002\.tar with 1 samples, of which .* tells 7"):
            changed.batch([8])
        assert changed.batch([1])["index"].tolist() == [1]


def test_a_shard_missing_and_one_added_are_named(shards):
    build(shards)
    (shards / shard_name(3)).rename(shards / shard_name(9))
    assert f"without the shards {shards / shard_name(9)}" in refusal(shards)
    assert f"got {shards / shard_name(3)}, which cannot be read" in refusal(pattern(shards))


def test_a_shard_of_a_folder_that_only_the_index_tells_of_is_named(shards):
    whole = build(shards)
    (shards / shard_name(3)).rename(shards / "elsewhere")
    assert f"tells of {shard_name(3)}, not there" in refusal(shards)
    assert len(build(f"{shards}/x-00000{{0..2}}.tar")) == 14  # a pattern may mean a part of them
    (shards / "shardindex.json").unlink()
    assert len(build(shards)) == len(whole) - COUNTS[3]


def test_an_index_of_shards_of_one_name_in_several_folders(shards, tmp_path):
    write(tmp_path / "more", counts=(2, 3))
    paths, index = [str(shards), str(tmp_path / "more")], str(tmp_path / "index.json")
    assert len(build_all(paths, index)) == 28 + 5
    (tmp_path / "more" / shard_name(1)).unlink()
    with pytest.raises(DataError, match=f"tells of {shard_name(1)}, not there"):
        build_all(paths, index)


def build_all(paths, index):
    return data.build("webdataset", path=paths, kind="latents", num_classes=11, index=index)


def test_a_path_may_begin_with_the_home_folder(shards, monkeypatch):
    monkeypatch.setenv("HOME", str(shards.parent))
    assert len(build("~/shards", index="~/index.json")) == 28 and (shards.parent / "index.json").exists()
    assert len(build(f"~/shards/{shard_name(1)}")) == 2


@pytest.mark.parametrize(
    ("third", "options", "said"),
    [
        ([("s/2.npy", npy(value(2)))], {}, "no label of s/2 in"),
        ([("s/2.cls", b"1")], {}, "got s/2 in {} with ['cls'], expected npy for the kind latents"),
        ([("s/2.jpg", b""), ("s/2.cls", b"1")], {}, "got s/2 in {} with ['cls', 'jpg'], expected npy"),
        ([("s/2.jpg", b"")], {"num_classes": 0}, "got s/2 in {} with ['jpg'], expected npy"),
        ([("s/2.npy", npy(value(2)))], {"kind": "images"}, "got s/0 in {} with ['cls', 'npy'], expected jpg or"),
        ([("s/0.json", b"")], {}, "got the sample s/0 in two places of {}"),
        ([("s/0.npy", npy(value(2))), ("s/0.cls", b"1")], {}, "got the sample s/0 in two places of {}"),
        ([("s/1.CLS", b"1")], {}, "got s/1.CLS twice in {}"),
    ],
)
def test_a_sample_that_lacks_something_is_named_while_samples_are_counted(third, options, said, tmp_path):
    members = [
        (f"s/{i}.{kind}", content) for i in range(2) for kind, content in (("npy", npy(value(i))), ("cls", b"3"))
    ]
    shard = tmp_path / "a.tar"
    pack(shard, [*members, *third])
    assert said.format(shard) in refusal(tmp_path, **options)
    assert not (tmp_path / "shardindex.json").exists()
    told = {"shardlist": [{"url": str(shard), "nsamples": 3}]}  # as one made elsewhere may be
    (tmp_path / "shardindex.json").write_text(json.dumps(told))
    with pytest.raises(DataError) as error:
        build(tmp_path, **options).batch([1])
    assert said.format(shard) in str(error.value)


def test_of_several_processes_one_makes_the_index(shards, tmp_path, processes):
    """Each shard is a command that tells of its being read: twice by the first pass of each process, were there two."""
    index, log = tmp_path / "index.json", tmp_path / "log"
    urls = [f"pipe:echo {number} >> {log}; sleep 0.1; cat {shards / shard_name(number)}" for number in range(3)]

    def count() -> int:
        return len(build_all(urls, str(index)))

    assert processes(3, count).checked() == [14, 14, 14]
    read = log.read_text().split()
    assert sorted(read) == ["0"] * 4 + ["1", "2"]  # by one pass, and the first sample of each process
    assert not list(tmp_path.glob(".*"))


def test_a_process_that_ends_while_it_makes_the_index_keeps_none_from_it(shards):
    lock = shards / ".shardindex.json.lock"
    lock.write_bytes(b"")  # as it leaves behind
    assert len(build(shards)) == 28 and not lock.exists()


def test_one_signal_ends_a_process_that_counts_the_samples_of_a_command_that_hangs(shards, tmp_path):
    urls = [f"pipe:cat {shards / shard_name(0)}", f"pipe:touch {tmp_path / 'waits'}; exec sleep 60"]
    options = {"path": urls, "kind": "latents", "index": str(tmp_path / "index.json")}
    script = f"from pathline import data; data.build('webdataset', **{options!r})"
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "waits").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == -signal.SIGINT
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # the command too
