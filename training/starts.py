"""When a run was started or resumed, from what, and with what software: ``starts.jsonl`` in its folder, for lineage."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from lightning_fabric import Fabric

import pathline
from pathline.training.log import warn

__all__ = ["FILE", "write"]

FILE = "starts.jsonl"


def write(folder: Path, fabric: Fabric, step: int, checkpoint: Path | None, weights: str | None) -> None:
    """Add an entry; where that is impossible, say so and go on.

    Args:
        folder: of the run.
        fabric: launched.
        step: after which the run goes on, 0 at its beginning.
        checkpoint: which it goes on from, if it does.
        weights: which it began with, if it did with others than random ones.
    """
    cuda = fabric.device.type == "cuda"
    device = torch.cuda.get_device_name(fabric.device) if cuda else fabric.device.type
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "weights": weights,
        "versions": {
            "pathline": pathline.__version__,
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "lightning-fabric": version("lightning-fabric"),
        },
        "devices": f"{fabric.world_size} × {device}",
    }
    try:
        with (folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    except OSError as error:
        warn(f"{FILE} lacks this start: {error}")
