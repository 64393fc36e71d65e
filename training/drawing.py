"""Samples drawn as the section ``sample`` asks for, and what is written down about them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pathline.core.config import Configuration
from pathline.training.parts import Parts
from pathline.training.pictures import ROUNDING, save_grid, to_uint8
from pathline.training.released import ReleasedConfiguration
from pathline.training.sampling import Drawn, labels_of, moved, solve
from pathline.training.trained import average_of, identity

__all__ = ["draw", "save"]


def draw(configuration: Configuration, parts: Parts, device: torch.device) -> Drawn:
    """Draw the samples that the section ``sample`` asks for; sample i is a function of (seed, i)."""
    wanted, network = configuration.sample, moved(parts, device)
    labels = labels_of(wanted, range(wanted.count), getattr(network, "num_classes", 0))
    drawn = solve(parts, network, labels, wanted.count, wanted.seed, wanted.batch)
    return replace(drawn, labels=None) if wanted.labels == "none" else drawn


def save(drawn: Drawn, configuration: Configuration, checkpoint: Path, output: Path, version: str) -> list[Path]:
    """Write ``output`` (.npz: arr_0, and labels as arr_1), a picture and a record beside it; return their paths.

    Images, of one or three channels, are uint8 NHWC; anything else is latents, float32 NCHW and without a picture.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    images = _are_images(drawn)
    arrays: dict[str, Any] = {"arr_0": to_uint8(drawn.x) if images else drawn.x.float().numpy()}
    if drawn.labels is not None:
        arrays["arr_1"] = drawn.labels.numpy()
    np.savez(output, **arrays)
    picture, record = output.with_suffix(".png"), output.with_suffix(".json")
    if images:
        save_grid(picture, drawn.x, drawn.labels)
    record.write_text(json.dumps(_record(drawn, configuration, checkpoint, version), indent=1))
    return [output, picture, record] if images else [output, record]


def _are_images(drawn: Drawn) -> bool:
    return drawn.x.shape[1] in (1, 3)


def _record(drawn: Drawn, configuration: Configuration, checkpoint: Path, version: str) -> dict[str, Any]:
    c = configuration.model_dump(mode="json")
    values = {"rounding": ROUNDING} if _are_images(drawn) else {"values": "latents, float32 (N, C, H, W)"}
    weak = [identity(Path(item["weak"])) for item in configuration.guidance if "weak" in item]
    return {
        "version": version,
        "checkpoint": c["weights"]
        if isinstance(configuration, ReleasedConfiguration)
        else identity(checkpoint, average_of(configuration)),
        **({"weak_checkpoints": weak} if weak else {}),
        "count": len(drawn.x),
        "seed": c["sample"]["seed"],
        "label_law": c["sample"]["labels"],
        "solver": c["solver"],
        "guidance": c["guidance"],
        "nfe": drawn.nfe,
        "block_evaluations": drawn.block_evaluations,
        "seconds": round(drawn.seconds, 3),
        **values,
        "data": c["data"],
        "configuration": c,
    }
