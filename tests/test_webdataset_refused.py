"""Shards of WebDataset that are refused, or read from where reading fails: each is named."""

from __future__ import annotations

import importlib.util
import io
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pathline import DataError, InputError, InputTypeError, data

spec = importlib.util.spec_from_file_location("sharding", Path(__file__).with_name("sharding.py"))
sharding = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sharding)
SHAPE = sharding.SHAPE
build = sharding.build
npy = sharding.npy
pack = sharding.pack
pattern = sharding.pattern
pixels = sharding.pixels
png = sharding.png
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


def test_a_truncated_shard_is_named_wherever_it_was_cut(shards, tmp_path):
    file, piped = shards / shard_name(1), tmp_path / "index.json"
    content = file.read_bytes()
    members = tarfile.open(file).getmembers()
    end = members[-1].offset_data + 512 * -(-members[-1].size // 512)
    for kept in (0, 100, 512, 700, members[3].offset, members[3].offset + 300, members[3].offset_data + 1, end):
        file.write_bytes(content[:kept])
        assert f"got {file}, which cannot be read: " in refusal(shards)
    assert "x-000001.tar, which cannot be read in 3 tries: " in refusal("pipe:cat " + pattern(shards), index=str(piped))
    assert not piped.exists() and not (shards / "shardindex.json").exists()
    file.write_bytes(content[: end + 512])  # its end mark is there
    assert len(build(shards)) == 28


def test_a_damaged_shard_is_refused_or_read_and_never_anything_else(shards):
    """Bytes of headers are changed; what tarfile raises, it comes as a DataError."""
    file = shards / shard_name(1)
    content, generator = file.read_bytes(), np.random.default_rng(0)
    headers = [member.offset for member in tarfile.open(file).getmembers()]
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[int(generator.choice(headers)) + int(generator.integers(512))] = int(generator.integers(256))
        file.write_bytes(bytes(damaged))
        try:
            data.build("webdataset", path=str(file), kind="latents", num_classes=11).batch([1])
        except DataError as error:
            refused += 1
            assert str(file) in str(error)
        (shards / "shardindex.json").unlink(missing_ok=True)
    assert refused > 50


def entry(name: str, **changes) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for key, changed in changes.items():
        setattr(made, key, changed)
    return made


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (entry("1.npy", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link, a device"),
        (entry("1.npy", type=tarfile.LNKTYPE, linkname="0.npy"), "a link, a device"),
        (entry("1.npy", type=tarfile.CHRTYPE), "a link, a device"),
        (entry("1.npy", type=tarfile.FIFOTYPE), "a link, a device"),
        (entry("1.npy", size=2**40), "got 1.npy of 1099511627776 bytes"),
        (entry("1.bin", size=2**40), "unexpected end of data"),
        (entry("1.npy", type=tarfile.XHDTYPE, size=2**40), "a header asks for"),
        (entry("1.npy", type=tarfile.GNUTYPE_LONGNAME, size=2**40), "a header asks for"),
        (entry("1.npy", pax_headers={"size": "-4000"}), "got 1.npy of -4000 bytes"),
        (entry("1.npy", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**40)}), "or sparse"),
        (entry("0.npy"), "got 0.npy twice in"),
    ],
)
def test_hostile_members_are_refused(made, said, tmp_path):
    body = npy(value(0))
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(entry("0.npy", size=len(body)), io.BytesIO(body))
        archive.fileobj.write(made.tobuf(tarfile.PAX_FORMAT if made.pax_headers else tarfile.GNU_FORMAT))
        archive.offset = archive.fileobj.tell()
    message = refusal(tmp_path, num_classes=0)
    assert said in message and str(tmp_path / "a.tar") in message


def test_a_stream_without_an_end_is_refused(tmp_path):
    pack(tmp_path / "a.tar", [("0.npy", npy(value(0)))])
    message = refusal(f"pipe:cat {tmp_path}/a.tar /dev/zero", index=str(tmp_path / "i"), num_classes=0)
    assert "goes on after the end of its tar" in message


def test_a_command_that_fails_is_tried_again_and_named(shards, tmp_path):
    index = str(tmp_path / "index.json")
    for command, code in (("exit 4", 4), (f"cat {shards}/x-000000.tar; exit 5", 5), ("none-such-command", 127)):
        message = refusal(f"pipe:echo >> {tmp_path}/tries; {command}", index=index)
        assert f"cannot be read in 3 tries: its command ended with exit code {code}" in message and command in message
    assert (tmp_path / "tries").read_text() == 9 * "\n"
    flag = tmp_path / "flag"
    dataset = build(f"pipe:test -e {flag} && cat {shards}/x-000000.tar || {{ touch {flag}; exit 1; }}", index=index)
    assert dataset.batch([4])["label"].tolist() == [12 % 11]


def test_a_command_that_hangs_after_an_error_is_ended(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("pathline.data.layouts.shards._PATIENCE", 0.1)
    began = time.monotonic()
    message = refusal(f"pipe:head -c 1000 {shards}/x-000000.tar; echo; exec sleep 50 >&-", index=str(tmp_path / "i"))
    assert "unexpected end of data" in message and time.monotonic() - began < 20


def test_an_index_of_a_shard_that_was_emptied(shards):
    build(shards)
    file = shards / shard_name(0)
    file.write_bytes(bytes(file.stat().st_size))
    assert f"got {file} without a sample" in refusal(shards)


def test_a_server_that_is_not_there_is_named(tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    message = refusal("http://127.0.0.1:9/x-{000000..000001}.tar", index=str(tmp_path / "index.json"))
    assert "got http://127.0.0.1:9/x-000000.tar, which cannot be read in 3 tries" in message
    assert "exit code 7, no connection" in message


def test_a_server_is_read_from(shards, tmp_path, monkeypatch):
    import functools
    import http.server

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(shards))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        dataset = build(f"{host}/x-{{000000..000006}}.tar", index=str(tmp_path / "index.json"))
        assert dataset.batch([13])["label"].tolist() == [39 % 11] and len(dataset) == 28
        message = refusal(f"{host}/none.tar", index=str(tmp_path / "other.json"))
        assert "exit code 22, the server refused it" in message
        server.shutdown()


def test_shards_that_are_none(tmp_path):
    assert f"got {tmp_path / 'none.tar'}, which cannot be read" in refusal(tmp_path / "none.tar")
    assert "got 0 shards" in refusal(tmp_path)
    assert "got 2 shards" in refusal(f"{tmp_path}/{{a,a}}.tar")
    assert "which means 10000000 shards" in refusal(f"{tmp_path}/{{0..9999999}}.tar")
    assert "cannot be looked at" in refusal("a" * 5000)
    assert "no gopen handler defined" in refusal("nothing:x.tar", index=str(tmp_path / "i"))
    pack(tmp_path / "empty.tar", [])
    assert "got no samples in" in refusal(tmp_path)
    pack(tmp_path / "empty.tar", [("a.pth", b"x"), ("b", b"y")])
    assert "got no samples in" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("0.cls", b"1")], "with ['cls'], expected npy for the kind latents"),
        ([("0.npy", npy(value(0)))], "no label of 0 in"),
        ([("0.npy", npy(value(0))), ("0.cls", b"x")], "no label of 0 in"),
        ([("0.npy", npy(value(0))), ("0.cls", b"11")], "got the label 11 of 0 in"),
        ([("0.npy", npy(value(0))), ("0.json", b"[")], "no label of 0 in"),
        ([("0.npy", npy(value(0))), ("0.json", b"[" * 10_000)], "no label of 0 in"),
        ([("0.npy", npy(value(0))), ("0.json", b'{"label": 1.5}')], "got a label of type float of 0 in"),
        ([("0.npy", npy(value(0))), ("0.json", b'{"other": 1}')], "no label of 0 in"),
        ([("0.npy", npy(value(0)).replace(b"<f2", b"|O ")), ("0.cls", b"1")], "0 in"),
        ([("0.npy", npy(np.zeros(SHAPE))), ("0.cls", b"1")], "of type float64"),
        ([("0.npy", npy(np.zeros((3, 5), np.float32))), ("0.cls", b"1")], "an array of shape (3, 5)"),
    ],
)
def test_samples_that_are_none(members, said, tmp_path):
    pack(tmp_path / "a.tar", members)
    message = refusal(tmp_path)
    assert said in message and str(tmp_path / "a.tar") in message


def test_a_sample_that_differs_is_named(tmp_path):
    members = [(f"{i}.npy", npy(value(i, (2, 3, 5 + i // 4)))) for i in range(5)]
    pack(tmp_path / "a.tar", members)
    dataset = build(tmp_path, num_classes=0)
    with pytest.raises(DataError, match=r"got 4 in .*a\.tar of shape \(2, 3, 6\).*expected \(2, 3, 5\)"):
        dataset.batch([0, 4])
    pack(tmp_path / "a.tar", [("0.png", png(pixels(0, 9, 9))), ("1.png", png(pixels(1, 9, 9))[:60])])
    (tmp_path / "shardindex.json").unlink()
    with pytest.raises(DataError, match=r"1 in .*a\.tar"):
        build(tmp_path, kind="images", num_classes=0, resolution=4).batch([0, 1])


def test_deviations_that_are_a_logarithm_are_refused(tmp_path):
    array = np.abs(value(0, (6, 2, 5))).astype(np.float32)
    pack(tmp_path / "a.tar", [("0.npy", npy(-array))])
    assert "got 0 in" in refusal(tmp_path, kind="moments", num_classes=0)
    assert "logvar" in refusal(tmp_path, kind="moments", num_classes=0)
    array[:3] *= -1  # means may be negative
    (tmp_path / "shardindex.json").unlink()
    pack(tmp_path / "a.tar", [("0.npy", npy(array))])
    assert len(build(tmp_path, kind="moments", num_classes=0)) == 1


@pytest.mark.parametrize(
    "members", [[("0.cls", b"1_0")], [("0.cls", b"x" * 10**6)], [("0.cls", b"0x1")], [("0.json", b'"' + b"x" * 10**6)]]
)
def test_labels_that_are_no_digits_are_refused_without_being_quoted(members, tmp_path):
    pack(tmp_path / "a.tar", [("0.npy", npy(value(0))), *members])
    message = refusal(tmp_path)
    assert "got no label of 0 in" in message and len(message) < 500


def test_odd_moments_are_refused(tmp_path):
    pack(tmp_path / "a.tar", [("0.npy", npy(value(0, (3, 2, 5))))])
    assert "of shape (3, 2, 5)" in refusal(tmp_path, kind="moments", num_classes=0)


def test_options(shards):
    for options in (
        {"kind": "video"},
        {"window": 0},
        {"lanes": 0},
        {"lane_batch": 0},
        {"scale": 0.0},
        {"flip": True},
        {"resolution": 8},
        {"kind": "images", "scale": 1.0},
        {"kind": "images", "resolution": 0},
        {"num_classes": -1},
        {"workers": 0},
    ):
        with pytest.raises(InputError):
            build(shards, **options)
    for options in (
        {"window": 1.0},
        {"lanes": True},
        {"flip": 1},
        {"scale": "1"},
        {"kind": "images", "resolution": "8"},
    ):
        with pytest.raises(InputTypeError):
            build(shards, **options)
    for path in (3, [], "", "-", ["x.tar", 3]):
        with pytest.raises(InputTypeError):
            data.build("webdataset", path=path)


def test_a_missing_package_is_named(shards, monkeypatch):
    from pathline import MissingPackageError

    monkeypatch.setitem(__import__("sys").modules, "braceexpand", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'pathline\[webdataset\]'"):
        build(shards)
