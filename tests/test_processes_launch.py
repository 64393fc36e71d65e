"""``train.py`` and ``torchrun`` as a user starts them on two devices: signals, a process that dies, going on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from pathline.training import checkpoints
from pathline.training.log import read_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc"),
]

ROOT = Path(__file__).parent.parent
CONFIGURATION = """
data: digits
backbone: {name: deepflow, input_size: 8, patch_size: 4, in_channels: 1, hidden_size: 12, depth: 2, num_heads: 3,
           num_classes: 10, cuts: [1], acceleration_width: 7}
objective: {name: deepflow, times: logit-normal}
solver: {name: euler, steps: 1}
train: {steps: 100000, global_batch: 6, folder: runs/x, accelerator: cpu, devices: 2, timeout: 60}
log: {every: 1, tensorboard: false}
checkpoint: {every: 50}
"""
TRAIN = [sys.executable, str(ROOT / "train.py")]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    str(ROOT / "train.py"),
]


class Run:
    """A command in a process group of its own."""

    def __init__(self, folder, command, *words):
        file = folder / "c.yaml"
        file.write_text(CONFIGURATION)
        self.folder, self.log = folder / "run", folder / "said.txt"
        with self.log.open("a") as said:
            self.process = subprocess.Popen(
                [*command, str(file), f"train.folder={self.folder}", *words],
                cwd=folder,
                stdout=said,
                stderr=said,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def reaches(self, step):
        """Wait until a row of the log is past a step; return the numbers of the training processes."""
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self.process.poll() is None:
            rows = read_rows(self.folder)
            if rows and rows[-1]["step"] >= step:
                return descendants(self.process.pid)
            time.sleep(0.1)
        raise AssertionError(self.said)

    def ends(self, timeout=60):
        """Wait for the end; return the exit code."""
        return self.process.wait(timeout)

    @property
    def said(self):
        return self.log.read_text()

    @property
    def steps_saved(self):
        return [checkpoints.verify(path).step for path in sorted((self.folder / "checkpoints").glob("step-*"))]


@pytest.fixture
def started(tmp_path):
    """Start a command; whatever is left of it is killed."""
    runs = []

    def start(command, *words):
        runs.append(Run(tmp_path, command, *words))
        return runs[-1]

    yield start
    for run in runs:
        try:
            os.killpg(run.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        run.process.wait(10)


def descendants(number):
    """Numbers of the children of a process, and theirs."""
    children = [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
    return [*children, *(other for child in children for other in descendants(child))]


def alive(number):
    """Whether a process runs: one that has ended, and that nobody has asked about, does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def is_gone(number, seconds=10):
    deadline = time.monotonic() + seconds
    while alive(number) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(number)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ctrl_c_reaches_all_processes_and_the_run_goes_on(strategy, started):
    """As a terminal sends it: to the whole group. Then two more steps, by the same command with --resume auto."""
    run = started(TRAIN, f"train.strategy={strategy}")
    children = run.reaches(3)
    assert len(children) == 1
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.ends() == 75, run.said
    assert is_gone(children[0])
    assert "SIGINT after step" in run.said and run.said.count("go on with --resume auto") == 1
    assert "Traceback" not in run.said
    last = run.steps_saved[-1]
    assert f"after step {last} of" in run.said
    again = started(TRAIN, f"train.strategy={strategy}", f"train.steps={last + 2}", "--resume", "auto")
    assert again.ends(180) == 0, again.said
    assert again.steps_saved[-1] == last + 2


def test_sigterm_to_the_main_process_alone_ends_all(started):
    """As a batch system that knows of one process sends it."""
    run = started(TRAIN)
    children = run.reaches(3)
    run.process.send_signal(signal.SIGTERM)
    assert run.ends() == 75, run.said
    assert is_gone(children[0]) and "SIGTERM after step" in run.said
    assert f"after step {run.steps_saved[-1]} of" in run.said


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_to_the_process_that_was_started_by_the_first(kind, started):
    """Killed: the first leaves as after any loss, and leaves nothing behind. Asked to end: both save."""
    run = started(TRAIN)
    (child,) = run.reaches(3)
    os.kill(child, kind)
    code = run.ends()
    assert is_gone(child)
    if kind == signal.SIGTERM:
        assert code == 75 and f"after step {run.steps_saved[-1]} of" in run.said, run.said
    else:
        assert code not in (0, 75), run.said
        assert all(step % 50 == 0 for step in run.steps_saved)


SLOW = """
import sys, time
from pathline import train
from pathline.training import checkpoints

def full(*arguments):
    raise OSError(28, "No space left on device")

train.save_curves = lambda folder: time.sleep(12)
if "checkpoint.every=2" in sys.argv:
    checkpoints.write = full
if __name__ == "__main__":
    sys.exit(train.main())
"""


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            65,
            [
                "optim.lr=1e30",
                "optim.clip=null",
                "guard.rollback_after=2",
                "guard.max_rollbacks=0",
                "checkpoint.every=1",
            ],
        ),
        (74, ["checkpoint.every=2"]),
    ],
)
def test_the_exit_code_is_the_firsts_however_long_it_takes_to_draw_curves(code, words, started, tmp_path):
    """Fabric kills the first process within five seconds of another one's leaving with another code than 0."""
    (tmp_path / "slow.py").write_text(SLOW)
    run = started([sys.executable, str(tmp_path / "slow.py")], "train.steps=4", *words)
    assert run.ends(180) == code, run.said


def test_torchrun_starts_saves_and_goes_on(started):
    """SIGTERM to torchrun, which hands it on: its workers save. Then the same with --resume auto, to the end."""
    run = started(TORCHRUN)
    workers = run.reaches(3)
    assert len(workers) == 2
    run.process.send_signal(signal.SIGTERM)
    assert run.ends() != 0
    assert all(map(is_gone, workers)) and "SIGTERM after step" in run.said
    last = run.steps_saved[-1]
    assert f"after step {last} of" in run.said
    again = started(TORCHRUN, f"train.steps={last + 2}", "--resume", "auto")
    assert again.ends(180) == 0, again.said
    assert again.steps_saved[-1] == last + 2


def test_torchrun_with_another_number_of_processes_is_refused(started):
    """By each of them, before anything is written."""
    run = started(TORCHRUN, "train.devices=3")
    assert run.ends(180) != 0
    assert "error: train.devices: You set" in run.said and "exitcode  : 2" in run.said, run.said
    assert not run.folder.exists()
