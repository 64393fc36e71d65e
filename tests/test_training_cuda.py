"""What only a CUDA device can show of training: no step waits for it, half precision, saves from pinned copies."""

from __future__ import annotations

import math

import pytest
import torch

from pathline.core.config import resolve
from pathline.training import Trainer
from pathline.training.log import read_rows
from pathline.training.step import take_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPE = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 48, "depth": 2, "num_heads": 3}


def configuration(folder, **train):
    entries = {
        "data": "digits",
        "backbone": {"name": "deepflow", **SHAPE, "num_classes": 10, "cuts": [1], "acceleration_width": 40},
        "objective": "deepflow",
        "optim": {"lr": 1e-3},
        "ema": {"lengths": [0.05, 0.1]},
        "solver": {"name": "euler", "steps": 2},
        "train": {"steps": 9, "global_batch": 12, "folder": str(folder), "accelerator": "cuda", **train},
        "log": {"every": 4},
        "checkpoint": {"every": 3},
    }
    return resolve(entries)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("micro", [None, 5])
def test_no_step_waits_for_the_device(precision, micro, tmp_path):
    trainer = Trainer(configuration(tmp_path, precision=precision, micro_batch=micro))
    take_step(trainer.state)  # the first one may, for memory and kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            take_step(trainer.state)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stopped_and_resumed_is_unbroken(precision, tmp_path):
    unbroken = Trainer(configuration(tmp_path / "a", precision=precision))
    unbroken.run()
    Trainer(configuration(tmp_path / "b", precision=precision, stop_at=6)).run()
    resumed = Trainer(configuration(tmp_path / "b", precision=precision))
    resumed.resume(tmp_path / "b" / "checkpoints" / "step-000000006")
    resumed.run()
    for group, tensors in unbroken.state.tensors().items():
        for name, tensor in tensors.items():
            assert torch.allclose(tensor, resumed.state.tensors()[group][name], rtol=1e-4, atol=1e-6), (group, name)
    rows = read_rows(tmp_path / "b")
    assert [row["step"] for row in rows] == [4, 8, 9] and all(math.isfinite(row["loss"]) for row in rows)
    assert rows[-1]["memory_gib"] > 0
