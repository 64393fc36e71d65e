"""Shards of 1, 2, 3 or 4 processes against the whole network made in one, and against torch's own writer and reader."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pathline.core.errors import CheckpointError, ProcessError
from pathline.training import checkpoints
from pathline.training.checkpoints import Keep, Snapshot
from pathline.training.sharded import ShardedWriter, is_sharded, read_full, read_into, shapes, write_group

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


class Network(nn.Module):
    """Sizes that neither 2 nor 3 divide, one that is smaller than both, none at all, and types beside float32."""

    def __init__(self, seed=3):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([nn.Linear(7, 5), nn.Linear(5, 1)])
        self.gain = nn.Parameter(torch.randn(11))
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("count", torch.tensor(2**40 + seed))
        self.register_buffer("table", torch.randn(2, 3).bfloat16())
        self.register_buffer("flags", torch.tensor([True, False, True, seed == 3]))


def tensors_of(network):
    """What a checkpoint would hold: names with dots, and a number beside."""
    return {**network.state_dict(), "blocks.0.weight.step": torch.tensor(2.5)}


def whole(seed=3):
    return tensors_of(Network(seed))


def distributed(seed=3, mesh=None):
    """The same tensors over all processes."""
    network = Network(seed)
    for module in (*network.blocks, network):
        fully_shard(module, mesh=mesh)
    return tensors_of(network)


def grouped(work):
    """A function that does the work in a group of gloo."""

    def function(*arguments):
        dist.init_process_group("gloo")
        try:
            return work(*arguments)
        finally:
            dist.destroy_process_group()

    return function


def hashes(tensors):
    """SHA-256 of every whole tensor's type, shape and bytes."""
    full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in sorted(tensors.items())}
    return {
        name: f"{t.dtype} {tuple(t.shape)} "
        + hashlib.sha256(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in full.items()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders by number of processes that wrote them, filled when they are first asked for."""
    root, made = tmp_path_factory.mktemp("written"), {}

    def folder(count, processes):
        if count not in made:
            made[count] = root / str(count)
            processes(count, grouped(lambda: write_group(made[count], distributed(), None))).checked()
        return made[count]

    return folder


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_process_reads_whole_tensors_from_the_shards_of_any_number(count, written, processes):
    folder = written(count, processes)
    assert hashes(read_full(folder)) == hashes(whole())
    assert shapes(folder) == {name: (tensor.shape, tensor.dtype) for name, tensor in whole().items()}
    assert sorted(path.name for path in folder.iterdir()) == [
        f"shard-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
    ]
    values = sum(tensor.numel() for path in folder.iterdir() for tensor in load_file(path).values())
    assert values == sum(tensor.numel() for tensor in whole().values())  # nothing twice


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_processes_reads_the_shards_of_any_number(count, written, processes):
    folders = [written(other, processes) for other in (1, 2, 3)]

    def read():
        templates = distributed(seed=5)
        before = hashes(templates)
        found = [read_into(folder, templates, None) for folder in folders]
        placed = all(
            type(tensors[name]) is type(template)
            and getattr(template, "placements", 0) == getattr(tensors[name], "placements", 0)
            for tensors in found
            for name, template in templates.items()
        )
        return [hashes(tensors) for tensors in found], placed, hashes(templates) == before, is_sharded(templates)

    for found, placed, untouched, cut in processes(count, grouped(read)).checked():
        assert found == [hashes(whole())] * 3
        assert placed and untouched and cut


def test_torch_reads_the_shards_and_finds_what_each_process_has(written, processes):
    folder = written(3, processes)
    found = {name: torch.zeros_like(tensor) for name, tensor in whole(5).items()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(found, storage_reader=HuggingFaceStorageReader(str(folder)))
    assert hashes(found) == hashes(whole())
    files = [load_file(folder / f"shard-0000{number}-of-00003.safetensors") for number in (1, 2, 3)]
    assert torch.equal(files[1]["blocks.0.weight"], whole()["blocks.0.weight"][2:4])  # 5 rows are 2 + 2 + 1
    assert [len(file["gain"]) for file in files] == [4, 4, 3]
    assert len(files[0]["blocks.1.weight"]) == 1  # 1 row is 1 + 0 + 0


@pytest.mark.parametrize("readers", [0, 2])
def test_shards_written_by_torch_are_read(readers, tmp_path, processes):
    def write():
        writer = HuggingFaceStorageWriter(str(tmp_path / "torch"), save_distributed=True)
        dcp.save(distributed(), storage_writer=writer)

    processes(3, grouped(write)).checked()
    if readers:
        read = grouped(lambda: hashes(read_into(tmp_path / "torch", distributed(seed=5), None)))
        assert processes(readers, read).checked() == [hashes(whole())] * readers
    else:
        assert hashes(read_full(tmp_path / "torch")) == hashes(whole())


def test_a_plain_file_is_read_into_distributed_tensors(tmp_path, processes):
    path = tmp_path / "model.safetensors"
    save_file(whole(), path)
    assert shapes(path) == {name: (tensor.shape, tensor.dtype) for name, tensor in whole().items()}
    assert hashes(read_full(path)) == hashes(read_full(tmp_path / "model")) == hashes(whole())
    read = grouped(lambda: hashes(read_into(tmp_path / "model", distributed(seed=5), None)))
    assert processes(3, read).checked() == [hashes(whole())] * 3


def test_copies_on_several_processes_are_written_once(tmp_path, processes):
    def write():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
        write_group(tmp_path / "model", distributed(mesh=mesh), None)

    processes(4, grouped(write)).checked()
    assert hashes(read_full(tmp_path / "model")) == hashes(whole())
    files = [load_file(tmp_path / "model" / f"shard-0000{number}-of-00004.safetensors") for number in (1, 2, 3, 4)]
    values = sum(tensor.numel() for file in files for tensor in file.values())
    assert values == sum(tensor.numel() for tensor in whole().values())
    assert all(files)  # each writes something


def test_without_a_group_one_process_writes_all_and_shares_no_storage(tmp_path):
    tied = torch.randn(3, 2)
    tensors = {"first": tied, "second": tied, "turned": tied.T, "number": torch.tensor(7)}
    assert not is_sharded(tensors)
    write_group(tmp_path / "model", tensors, None)
    assert hashes(read_full(tmp_path / "model")) == hashes(tensors)
    assert hashes(read_into(tmp_path / "model", whole_like(tensors), None)) == hashes(tensors)


def test_a_write_holds_no_second_copy(tmp_path, processes):
    def peak():
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 2**10

    def write():
        tensors = {"weight": torch.ones(2**24), "bias": torch.ones(2**21)}
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        except OSError:
            return None
        before = peak()
        write_group(tmp_path / "model", tensors, None)
        return peak() - before

    (rise,) = processes(1, write).checked()
    if rise is None:
        pytest.skip("needs Linux, and its leave to measure memory")
    assert rise < 4 * 2**24 / 2


def whole_like(tensors):
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("gain"), "unexpected gain"),
        (lambda t: t.update(bias=torch.zeros(2)), "missing bias"),
        (lambda t: t.update(gain=torch.zeros(13)), r"gain is \(11,\) torch.float32, expected \(13,\)"),
        (lambda t: t.update(table=torch.zeros(2, 3)), r"table is \(2, 3\) torch.bfloat16, expected .* torch.float32"),
    ],
)
def test_other_names_shapes_and_types_are_refused_before_any_value_is_read(
    change, said, written, processes, monkeypatch
):
    folder, templates = written(2, processes), whole(5)
    change(templates)
    monkeypatch.setattr(HuggingFaceStorageReader, "read_data", lambda *_: pytest.fail("values were read"))
    with pytest.raises(CheckpointError, match=said):
        read_into(folder, templates, None)


def test_what_one_process_finds_wrong_all_refuse(written, processes):
    folder = written(3, processes)

    def read():
        templates = distributed(seed=5)
        if dist.get_rank() == 1:
            del templates["gain"]
        with pytest.raises(CheckpointError, match=r"unexpected gain \(process 1\)"):
            read_into(folder, templates, None)

    processes(2, grouped(read)).checked()


def broken(*_):
    raise OSError(5, "Input/output error")


def test_where_one_process_cannot_read_all_are_told(written, processes):
    folder = written(3, processes)

    def read():
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == 1:
                patch.setattr(HuggingFaceStorageReader, "read_data", broken)
            with pytest.raises(CheckpointError, match=r"^\[Errno 5\] Input/output error \(process 1\)$"):
                read_into(folder, distributed(seed=5), None)
        return hashes(read_into(folder, distributed(seed=5), None))

    assert processes(2, grouped(read)).checked() == [hashes(whole())] * 2


@pytest.mark.filterwarnings("error")
def test_one_process_alone_is_told_its_own_error_and_warned_of_nothing(tmp_path, monkeypatch):
    tensors = {"number": torch.tensor(7)}
    write_group(tmp_path / "model", tensors, None)
    assert (
        hashes(read_full(tmp_path / "model")) == hashes(read_into(tmp_path / "model", tensors, None)) == hashes(tensors)
    )
    monkeypatch.setattr(HuggingFaceStorageReader, "read_data", broken)
    with pytest.raises(OSError, match="Input/output error"):
        read_full(tmp_path / "model")
    with pytest.raises(OSError, match="Input/output error"):
        read_into(tmp_path / "model", tensors, None)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        write_group(tmp_path / "file" / "model", tensors, None)


def rewrite(path, change):
    """Change what a file's header says of its pieces."""
    with safe_open(path, framework="pt") as file:
        layout = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    change(layout)
    save_file(load_file(path), path, metadata={"DCP_SHARDING_INFO": json.dumps(layout)})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder, path: path.unlink(), "pieces .* that do not make up gain"),
        (lambda folder, path: path.write_bytes(path.read_bytes()[:-1]), "shard-00001.* no file of tensors"),
        (lambda folder, path: path.write_bytes(b""), "no file of tensors"),
        (lambda folder, path: [file.unlink() for file in folder.iterdir()], "holds no .safetensors file"),
        (lambda folder, path: rewrite(path, lambda layout: layout.pop("gain")), "no file of tensors .*gain"),
        (lambda folder, path: rewrite(path, lambda layout: layout["gain"].update(saved_offsets=[-1])), "gain lies at"),
        (lambda folder, path: rewrite(path, lambda layout: layout["gain"].update(saved_offsets=[0, 0])), "gain lies"),
        (lambda folder, path: rewrite(path, lambda layout: layout["gain"].update(saved_offsets=["0"])), "no file of"),
        (lambda folder, path: rewrite(path, lambda layout: layout["gain"].update(saved_offsets=[2**50])), "make up"),
        (lambda folder, path: rewrite(path, lambda layout: layout["gain"].update(saved_offsets=[2**70])), "make up"),
        (lambda folder, path: save_file({"gain": torch.zeros(1)}, folder / "more.safetensors"), "not make up gain"),
        (lambda folder, path: save_file({"gain": torch.zeros(1).half()}, folder / "x.safetensors"), "different types"),
        (lambda folder, path: save_file({"gain": torch.zeros(1, 1)}, folder / "x.safetensors"), "different types"),
    ],
)  # fmt: skip
def test_damaged_shards_are_refused(damage, said, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for number, values in enumerate(torch.arange(11.0).split(6)):
        layout = {"gain": {"saved_offsets": [6 * number]}}
        path = folder / f"shard-0000{number + 1}-of-00002.safetensors"
        save_file({"gain": values.clone()}, path, metadata={"DCP_SHARDING_INFO": json.dumps(layout)})
    assert torch.equal(read_full(folder)["gain"], torch.arange(11.0))
    damage(folder, folder / "shard-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=said):
        read_full(folder)
    with pytest.raises(CheckpointError, match=said):
        read_into(folder, {"gain": torch.zeros(11)}, None)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no"):
        shapes(tmp_path / "model")


# --- checkpoints -----------------------------------------------------------------------------------------------------


def snapshot(seed=3):
    """Two groups, the second of distributed tensors alone."""
    tensors = distributed(seed)
    return Snapshot({"model": tensors, "optim": {"gain.exp_avg": tensors["gain"] * 2}}, {"position": 7 * seed})


def check(path, seed=3):
    back = checkpoints.read(path)  # which verifies it
    assert hashes(back.tensors["model"]) == hashes(whole(seed))
    assert torch.equal(back.tensors["optim"]["gain.exp_avg"], whole(seed)["gain"] * 2)
    assert back.state["position"] == 7 * seed
    for file in (file for file in path.rglob("*") if file.is_file()):
        content = file.read_bytes()  # tensors after the length of their header, or JSON: nothing is pickled
        assert content[8 if file.suffix == ".safetensors" else 0 :].startswith(b"{") and b"pickle" not in content


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_is_of_the_moment_of_its_save(asynchronous, tmp_path, processes):
    def save():
        writer = ShardedWriter(tmp_path / "checkpoints", Keep(2), asynchronous=asynchronous)
        for step, seed in ((2, 3), (3, 5), (5, 11)):
            taken = snapshot(seed)
            writer.save(step, taken)
            for tensors in taken.tensors.values():
                for tensor in tensors.values():
                    tensor.detach().zero_()  # at once
        writer.close()
        return writer.saved, writer.failures, writer.poll()

    assert processes(3, grouped(save)).checked() == [[3, [], None]] * 3
    assert names(tmp_path / "checkpoints") == ["step-000000003", "step-000000005"]
    check(tmp_path / "checkpoints" / "step-000000003", 5)
    check(tmp_path / "checkpoints" / "step-000000005", 11)


def test_a_whole_checkpoint_is_not_written_again_and_a_damaged_one_is(tmp_path, processes):
    def save():
        writer = ShardedWriter(tmp_path, Keep(2), asynchronous=True)
        writer.save(2, snapshot(3))
        writer.save(2, snapshot(5))
        writer.wait()
        if dist.get_rank() == 0:
            check(tmp_path / "step-000000002", 3)
            (tmp_path / "step-000000002" / "optim" / "shard-00002-of-00002.safetensors").unlink()
        writer.save(2, snapshot(5))
        writer.close()
        return writer.failures

    assert processes(2, grouped(save)).checked() == [[], []]
    check(tmp_path / "step-000000002", 5)
    assert names(tmp_path) == ["damaged-step-000000002-1", "step-000000002"]


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def no_memory(*_, **__):
    raise MemoryError


@pytest.mark.parametrize(
    ("asynchronous", "rank", "name", "fails", "said"),
    [
        (True, 1, "save_file", full_disk, "No space left on device (process 1)"),
        (False, 1, "save_file", full_disk, "No space left on device (process 1)"),
        (True, 0, "save_file", full_disk, "No space left on device (process 0)"),
        (True, 0, "finish", full_disk, "No space left on device (process 0)"),
        (False, 0, "finish", full_disk, "No space left on device (process 0)"),
        (True, 1, "save_file", lambda *_, **__: None, "shard-00002-of-00002.safetensors' (process 1)"),
        (True, 1, "sync", lambda path: path.unlink(), "got not all shards in"),
        (True, 1, "torch.empty", no_memory, "MemoryError (process 1)"),
    ],
)
def test_where_one_process_cannot_write_the_save_fails_on_all_and_the_next_one_succeeds(
    asynchronous, rank, name, fails, said, tmp_path, processes
):
    def save():
        writer = ShardedWriter(tmp_path, Keep(1), asynchronous=asynchronous)
        writer.save(2, snapshot(3))
        writer.wait()
        taken = snapshot(5)
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == rank:
                writer.close()  # gives the copies back
                patch.setattr(f"pathline.training.sharded.{name}", fails)
            writer.save(3, taken)
            writer.wait()
        dist.barrier()
        left, told = names(tmp_path), [writer.poll(), writer.poll()]
        dist.barrier()
        writer.save(5, snapshot(5))
        writer.close()
        return left, told, writer.saved

    for left, told, saved in processes(2, grouped(save), timeout=20).checked():
        assert left == ["step-000000002"]  # nor a partial one
        assert said in told[0] and "checkpoint of step 3" in told[0] and told[1] is None
        assert saved == 2
    check(tmp_path / "step-000000005", 5)
    assert names(tmp_path) == ["step-000000005"]


@pytest.mark.parametrize("kill", [True, False])
def test_a_process_that_is_lost_or_stalled_ends_the_wait_of_the_others(kill, tmp_path, processes):
    done = tmp_path / "done"

    def save():
        writer = ShardedWriter(tmp_path / "run", Keep(1), asynchronous=True, timeout=1.0)
        writer.save(2, snapshot(3))
        writer.wait()
        if dist.get_rank() == 1:
            while not done.exists():
                if kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(0.01)
            os._exit(9)
        writer.save(3, snapshot(5))
        with pytest.raises(ProcessError, match="no word from another process"):
            writer.close()
        done.touch()
        assert writer.saved == 1
        os._exit(7)

    ended = processes(2, grouped(save), timeout=20)
    assert ended.codes == [7, -9 if kill else 9], ended.outputs
    assert names(tmp_path / "run") == ["step-000000002"]
    check(tmp_path / "run" / "step-000000002", 3)
