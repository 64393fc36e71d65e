"""Loading ahead: the same batches as in place, errors where they belong, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from pathline import data
from pathline.core.config import resolve
from pathline.core.draws import Draws, send
from pathline.core.errors import DataError
from pathline.data.base import Batch, Dataset, Indices, as_indices
from pathline.data.digits.dataset import Digits
from pathline.training import Interrupted, Trainer
from pathline.training.loading import AHEAD, Loader, Stream, Visit
from pathline.training.log import read_rows

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


class Moments(Dataset):
    """Means and deviations of 13 latents, drawn and flipped anew at each visit; tells who loaded what."""

    data_are_images, shape, num_classes = False, (3, 2, 5), 7

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.mean, self.std = torch.randn(2, 13, *self.shape, generator=generator).half()
        self.loaded: list[tuple[str, list[int]]] = []
        self.broken: set[int] = set()
        self.hold = threading.Event()
        self.hold.set()

    def __len__(self) -> int:
        return 13

    def batch(self, indices: Indices) -> Batch:
        index = as_indices(indices, 13)
        return {"data": self.mean[index].float(), "label": index % 7, "index": index}

    def load(self, indices: Indices, draws: Any) -> Batch:
        assert self.hold.wait(10)
        index = as_indices(indices, 13)
        self.loaded.append((threading.current_thread().name, index.tolist()))
        if self.broken & set(index.tolist()):
            raise DataError(f"got sample {index.tolist()}")
        flipped = draws.uniform("flip") < 0.5
        return {
            "mean": self.mean[index],
            "std": self.std[index],
            "flipped": flipped,
            "label": index % 7,
            "index": index,
        }

    def finish(self, loaded: Batch, draws: Any) -> Batch:
        noise = send(draws.normal("posterior noise", self.shape), loaded["mean"].device)
        drawn = loaded["mean"].float() + loaded["std"].float() * noise
        flipped = loaded["flipped"].view(-1, 1, 1, 1)
        return {"data": torch.where(flipped, drawn.flip(3), drawn), "label": loaded["label"], "index": loaded["index"]}

    @property
    def statistics(self) -> dict[str, Any]:
        return {}

    @property
    def manifest(self) -> dict[str, Any]:
        return {"name": "moments of a test"}


def expected(dataset: Moments, positions: range, seed: int) -> torch.Tensor:
    """One sample at a time, from the definition."""
    rows = []
    for position in positions:
        epoch, place = divmod(position, 13)
        index = int(Draws(seed).permutation("data order", 13, counter=epoch)[place])
        noise = Draws(seed).normal("posterior noise", (position,), dataset.shape)[0]
        row = dataset.mean[index].float() + dataset.std[index].float() * noise
        flip = float(Draws(seed).uniform("flip", (position,))[0]) < 0.5
        rows.append(row.flip(2) if flip else row)
    return torch.stack(rows)


def loader(dataset: Dataset, **changes) -> Loader:
    """Five samples a step, two and then one at once for each of two devices, but for what is changed."""
    values = {"seed": 11, "batch": 6, "share": 3, "micro": 2, "rank": 1, **changes}
    return Loader(dataset, Stream(**values), CPU)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loading")]


# --- which visits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "micro"), [(1, 6), (1, 4), (2, 3), (2, 2), (3, 1)])
def test_visits_of_all_devices_are_the_stream_once(devices, micro):
    seen = []
    for rank in range(devices):
        stream = Stream(0, 6, 6 // devices, micro, rank)
        for step in (0, 1, 2):
            visits = stream.visits(step)
            assert all(visit.step == step and len(visit.positions) <= micro for visit in visits)
            assert all(6 * step <= p < 6 * (step + 1) for visit in visits for p in visit.positions)
            seen += [p for visit in visits for p in visit.positions]
    assert sorted(seen) == list(range(18))


def test_visits_from_one_on_go_over_the_ends_of_steps():
    stream = Stream(0, 6, 3, 2, 1)
    upcoming = stream.visits_from(Visit(4, range(29, 30)))
    assert [next(upcoming) for _ in range(3)] == [
        Visit(4, range(29, 30)),
        Visit(5, range(33, 35)),
        Visit(5, range(35, 36)),
    ]


# --- what is handed out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [False, True])
def test_batches_are_those_of_the_definition(in_memory):
    """Over three epochs of 13, with flips and draws of each visit; the same in place and ahead, and by ``batches``."""
    dataset = Moments()
    dataset.in_memory = in_memory
    ours = loader(dataset, batch=5, share=5, micro=3, rank=0)
    whole = list(dataset.batches(5, 7, 11))
    for step in range(7):
        taken = [ours.take(visit) for visit in ours.stream.visits(step)]
        found = {name: torch.cat([batch[name] for batch in taken]) for name in taken[0]}
        assert [len(batch["data"]) for batch in taken] == [3, 2]
        assert torch.equal(found["data"], expected(dataset, range(5 * step, 5 * step + 5), 11))
        assert all(torch.equal(found[name], whole[step][name]) for name in ("data", "label", "index"))
    ours.close()


def test_the_next_two_visits_are_loaded_meanwhile_and_no_more():
    dataset = Moments()
    ours = loader(dataset)
    visits = [visit for step in range(3) for visit in ours.stream.visits(step)]
    ours.take(visits[0])
    deadline = time.monotonic() + 10
    while len(dataset.loaded) < 1 + AHEAD and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)  # for more, were there any
    wanted = [dataset.indices_at(visit.positions, 11).tolist() for visit in visits[: 1 + AHEAD]]
    assert [indices for _, indices in dataset.loaded] == wanted
    assert {name for name, _ in dataset.loaded} == {"loading"}
    ours.close()


def test_data_in_memory_start_no_thread():
    dataset = Moments()
    dataset.in_memory = True
    ours = loader(dataset)
    ours.take(Visit(0, range(3, 5)))
    assert threads() == [] and [name for name, _ in dataset.loaded] == [threading.main_thread().name]
    assert data.build("digits").in_memory


def test_what_was_loaded_ahead_is_dropped_where_training_goes_elsewhere():
    """As after a roll-back, which leaves batches out, or a resume, which goes back."""
    dataset = Moments()
    ours = loader(dataset)
    for step in (0, 1, 5, 6, 2, 2):
        for visit in ours.stream.visits(step):
            assert torch.equal(ours.take(visit)["data"], expected(dataset, visit.positions, 11))
    ours.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("in_memory", [False, True])
def test_batches_come_to_a_device_from_pinned_memory_without_a_wait(in_memory):
    dataset = Moments()
    dataset.in_memory = in_memory
    stream = Stream(11, 5, 5, 3, 0)
    ours, there = Loader(dataset, stream, CPU), Loader(dataset, stream, torch.device("cuda", 0))
    visits = [visit for step in range(6) for visit in stream.visits(step)]
    for visit in visits:
        wanted = ours.take(visit)
        torch.cuda.set_sync_debug_mode("error" if visit.step else "default")
        try:
            found = there.take(visit)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert found["data"].is_cuda and found["label"].is_cuda and not found["index"].is_cuda
        assert all(torch.allclose(found[name].cpu(), wanted[name], atol=1e-6) for name in wanted)
    assert all(values.is_pinned() for name, values in there._load(visits[0]).items() if name != "index")
    ours.close()
    there.close()


# --- errors and ends -------------------------------------------------------------------------------------------------


def test_an_error_is_raised_by_the_visit_that_it_concerns_with_its_own_type():
    dataset = Moments()
    ours = loader(dataset, batch=3, share=3, micro=3, rank=0)
    dataset.broken = {int(dataset.indices_at(range(6, 7), 11)[0])}
    for step in (0, 1):  # while that of step 2 is being loaded
        ours.take(ours.stream.visits(step)[0])
    for _ in range(2):
        with pytest.raises(DataError, match="got sample"):
            ours.take(ours.stream.visits(2)[0])
    dataset.broken = set()
    assert torch.equal(ours.take(ours.stream.visits(2)[0])["data"], expected(dataset, range(6, 9), 11))
    ours.close()


def test_closing_ends_the_thread_and_another_visit_starts_one():
    dataset = Moments()
    ours = loader(dataset)
    ours.close()
    for _ in range(2):
        assert threads() == []
        ours.take(Visit(0, range(3, 5)))
        assert threads() == ["loading"]
        ours.close()
        ours.close()
    assert threads() == []


def test_closing_waits_for_one_load_at_most():
    dataset = Moments()
    ours = loader(dataset)
    ours.take(Visit(0, range(3, 5)))
    while len(dataset.loaded) < 1 + AHEAD:
        time.sleep(0.005)
    dataset.hold.clear()
    ours.take(Visit(0, range(5, 6)))  # loaded already; another one is begun, and waits
    threading.Timer(0.1, dataset.hold.set).start()
    ours.close()
    assert threads() == [] and len(dataset.loaded) <= 2 + AHEAD


def test_closing_leaves_a_load_behind_that_does_not_end(monkeypatch):
    monkeypatch.setattr("pathline.training.loading._PATIENCE", 0.1)
    dataset = Moments()
    ours = loader(dataset)
    ours.take(Visit(0, range(3, 5)))
    while len(dataset.loaded) < 1 + AHEAD:
        time.sleep(0.005)
    dataset.hold.clear()
    ours.take(Visit(0, range(5, 6)))
    while not ours._queue[-1][1].running():
        time.sleep(0.005)
    left, began = ours._thread, time.monotonic()
    ours.close()
    assert time.monotonic() - began < 5 and left.is_alive() and left.daemon
    dataset.hold.set()
    left.join(10)
    assert threads() == []


def test_one_signal_ends_a_process_that_waits_for_data():
    script = (
        "import threading, torch\n"
        "from pathline import data\n"
        "from pathline.data.digits.dataset import Digits\n"
        "from pathline.training import loading\n"
        "loading._PATIENCE = 0.1\n"
        "Digits.in_memory, Digits.load = False, lambda *_: print('waits', flush=True) or threading.Event().wait()\n"
        "ours = loading.Loader(data.build('digits'), loading.Stream(0, 6, 6, 6, 0), torch.device('cpu'))\n"
        "try:\n"
        "    ours.take(ours.stream.visits(0)[0])\n"
        "finally:\n"
        "    ours.close()\n"
    )
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **given) as process:
        try:
            assert process.stdout.readline() == "waits\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == -signal.SIGINT
        finally:
            process.kill()


def test_orders_may_be_asked_for_by_several_threads():
    """Epochs in turns: only two are kept, so that each thread drops what the others use."""
    dataset = data.build("digits")
    wanted = {epoch: Draws(4).permutation("data order", 898, counter=epoch) for epoch in range(5)}
    wrong = []

    def ask(first: int) -> None:
        try:
            for number in range(200):
                epoch = (first + number) % 5
                found = dataset.indices_at(range(898 * epoch, 898 * (epoch + 1)), 4)
                if not np.array_equal(found, wanted[epoch]):
                    wrong.append(epoch)
        except BaseException as error:
            wrong.append(error)

    asking = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert wrong == [] and len(dataset.__dict__["_orders"]) <= 2


# --- training --------------------------------------------------------------------------------------------------------

SIZES = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 12, "depth": 2, "num_heads": 3}


def configuration(folder, **train):
    entries = {
        "data": "digits",
        "backbone": {"name": "sit", **SIZES, "num_classes": 10},
        "objective": "velocity",
        "optim": {"lr": 3e-3, "eps": 1e-2},
        "solver": {"name": "euler", "steps": 2},
        "train": {"steps": 7, "global_batch": 6, "seed": 5, "folder": str(folder), "accelerator": "cpu", **train},
        "log": {"every": 3, "tensorboard": False},
        "checkpoint": {"every": 4, "keep": 9},
    }
    return resolve(entries)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.state.network.state_dict().items()}


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def trained(folder, **train):
    trainer = Trainer(configuration(folder, **train))
    trainer.run()
    return weights(trainer)


@pytest.fixture
def ahead(monkeypatch):
    """Load the digits as if they did not lie in memory."""
    monkeypatch.setattr(Digits, "in_memory", False)


def test_training_ahead_equals_training_in_place(tmp_path, monkeypatch):
    """Whole, in micro-batches, and stopped and resumed: bit for bit; and no thread is left."""
    place = {micro: trained(tmp_path / f"place-{micro}", micro_batch=micro) for micro in (None, 4)}
    monkeypatch.setattr(Digits, "in_memory", False)
    for micro, expected_weights in place.items():
        assert same(trained(tmp_path / f"ahead-{micro}", micro_batch=micro), expected_weights)
    trained(tmp_path / "resumed", stop_at=4)
    assert threads() == []
    resumed = Trainer(configuration(tmp_path / "resumed"))
    resumed.resume(tmp_path / "resumed" / "checkpoints" / "step-000000004")
    resumed.run()
    assert same(weights(resumed), place[None]) and threads() == []


def _rank(fabric, given):
    trainer = Trainer(given, fabric=fabric)
    trainer.run()
    assert threads() == []


def test_two_processes_that_load_ahead_equal_one(tmp_path, ahead):
    one = trained(tmp_path / "one")
    two = configuration(tmp_path / "two", devices=2, micro_batch=2)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(start_method="fork"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric.launch(_rank, two)
    after = Trainer(two, fabric=Fabric(accelerator="cpu", devices=1))
    after.resume(tmp_path / "two" / "checkpoints" / "step-000000007")
    assert all(torch.allclose(value, one[name], atol=1e-6) for name, value in weights(after).items())


def test_a_signal_while_training_waits_for_data_saves_at_the_end_of_the_step(tmp_path, ahead, monkeypatch):
    unbroken = trained(tmp_path / "a")
    trainer = Trainer(configuration(tmp_path / "b"))
    load = trainer.parts.dataset.load

    def slow(indices, draws):
        if draws.ids.start == 6 * 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        return load(indices, draws)

    monkeypatch.setattr(trainer.parts.dataset, "load", slow)
    with pytest.raises(Interrupted, match="SIGTERM after step"):
        trainer.run()
    assert threads() == []
    resumed = Trainer(configuration(tmp_path / "b"))
    resumed.resume(max((tmp_path / "b" / "checkpoints").glob("step-*")))
    resumed.run()
    assert same(weights(resumed), unbroken)


def test_data_that_fail_in_the_thread_fail_training_where_they_are_needed(tmp_path, ahead, monkeypatch):
    trainer = Trainer(configuration(tmp_path))
    load = trainer.parts.dataset.load

    def failing(indices, draws):
        if draws.ids.start == 6 * 5:
            raise DataError("got a truncated image, say")
        return load(indices, draws)

    monkeypatch.setattr(trainer.parts.dataset, "load", failing)
    with pytest.raises(DataError, match="truncated image"):
        trainer.run()
    assert trainer.state.step == 5 and threads() == []


def test_the_wait_for_data_is_told(tmp_path, ahead, monkeypatch):
    """Loading takes longer than training by far: most of the time is waited for."""
    trainer = Trainer(configuration(tmp_path))
    load = trainer.parts.dataset.load
    monkeypatch.setattr(trainer.parts.dataset, "load", lambda *given: (time.sleep(0.15), load(*given))[1])
    trainer.run()
    assert min(row["data_wait_share"] for row in read_rows(tmp_path)) > 0.3


@pytest.mark.slow
def test_the_benchmark_prints_its_tables(tmp_path):
    """On a few samples: whether bars are met is another matter."""
    command = [sys.executable, "benchmarks/data.py", "--samples=600", "--files=300", "--turns=1", "--steps=5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0].removeprefix("| ") for row in rows if "ms" not in row[0]][2:4] == [
        "`np.memmap` gather, bare",
        "`prepared`, load",
    ]
    kinds = [row for row in rows if row[0].removeprefix("| ").startswith(("latents", "means", "moments", "pixels"))]
    assert len(kinds) == 7 and all(row[2].endswith("%") and "< 1%" in row[6] for row in kinds)
