"""Averages that are cut up over processes, called again and again while training goes on, as pictures are drawn."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from pathline.core.config import resolve
from pathline.training import Trainer
from pathline.training.step import take_step

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def configuration(folder):
    backbone = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 12, "depth": 2, "num_heads": 3}
    return resolve(
        {
            "data": "digits",
            "backbone": {"name": "deepflow", **backbone, "num_classes": 10, "cuts": [1], "acceleration_width": 7},
            "objective": "deepflow",
            "optim": {"lr": 1e-2},
            "ema": {"decay": 0.5},
            "solver": {"name": "euler", "steps": 1},
            "train": {
                "steps": 5,
                "global_batch": 6,
                "folder": str(folder),
                "accelerator": "cpu",
                "devices": 2,
                "strategy": "fsdp",
                "timeout": 30.0,
            },
        }
    )


def test_each_call_is_with_the_weights_of_its_step(processes, tmp_path):
    """What the averages give at three steps equals what they give once all they gathered is certainly gone."""

    def work():
        state = Trainer(configuration(tmp_path)).state
        network, seen = state.averages.network(), []
        x, t, label = torch.full((3, 1, 8, 8), 0.3), torch.full((3,), 0.7), torch.tensor([1, 4, 9])
        for _ in range(3):
            take_step(state)
            with torch.no_grad():
                first = network(x, t, label=label)
                for module in network.modules():
                    getattr(module, "reshard", lambda: None)()
                seen.append([float(first.norm()), float((first - network(x, t, label=label)).abs().max())])
                network(x, t, label=label)
        return seen

    for seen in processes(2, work, timeout=60).checked():
        norms, differences = zip(*seen, strict=True)
        assert differences == (0, 0, 0) and len(set(norms)) == 3
