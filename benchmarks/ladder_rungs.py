"""The rungs of DeepFlow's ladder, its variants, and the network and objective of each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pathline import backbones, interpolants, objectives
from pathline.metrics import Real
from pathline.objectives import Objective

LINEAR = interpolants.build("linear")
Options = dict[str, dict[str, Any]]

LADDER: dict[str, Options] = {
    "SiT": {"backbone": {"name": "sit"}, "objective": {"name": "velocity"}},
    "+ deep supervision": {"backbone": {"refiner": "none"}, "objective": {"acceleration": 0.0, "max_gap": 0.0}},
    "+ time gap": {"backbone": {"refiner": "gap"}, "objective": {"acceleration": 0.0}},
    "+ acceleration": {"backbone": {"refiner": "acceleration"}, "objective": {}},
    "DeepFlow": {"backbone": {}, "objective": {}},
}
VARIANTS: dict[str, Options] = {
    "addition": {"backbone": {"refiner": "addition"}},
    "scales": {"backbone": {"time_scale": 1000.0, "gap_scale": 1000.0}},
    "time scale": {"backbone": {"time_scale": 1000.0}},
    "velocity residual": {"backbone": {"residual": "velocity", "zero_output": True}},
    "query residual": {"backbone": {"residual": "query"}},
    "separate heads": {"backbone": {"shared_heads": False}},
    "sample sign": {"objective": {"gap_sign": "sample"}},
    "by clock": {"objective": {"acceleration_by_clock": True}},
    "free velocity": {"objective": {"stop_velocity": False}},
    "no acceleration loss": {"objective": {"acceleration": 0.0}},
    "material beside": {"objective": {"material": 0.02}},
    "material instead": {"objective": {"acceleration": 0.0, "material": 0.02}},
}
FULL, PLAIN = "DeepFlow", "SiT"


@dataclass(frozen=True)
class Settings:
    """What a run is, but for its rung and seed; whatever changes its numbers."""

    data: str = "digits"
    width: int = 64
    depth: int = 4
    heads: int = 4
    branches: int = 2
    patch: int = 2
    acceleration_width: int = 64
    batch: int = 32
    lr: float = 4e-3
    warmup: int = 100
    decay: float = 0.998
    steps: int = 1000
    points: int = 12
    samples: int = 1000
    device: str = "cpu"

    def marks(self) -> list[int]:
        """Return the steps after which quality is measured, evenly spread over their logarithm from 1/20 on."""
        first = math.log(self.steps / 20)
        spread = (first + (math.log(self.steps) - first) * i / (self.points - 1) for i in range(self.points))
        return sorted({max(1, round(math.exp(mark))) for mark in spread})


def rung(name: str) -> Options:
    """Return the options of a rung, or of the full DeepFlow with one or several variants, as ``a & b``."""
    if name in LADDER:
        return LADDER[name]
    merged: Options = {"backbone": {}, "objective": {}}
    for part in name.split(" & "):
        for section, options in VARIANTS[part].items():
            merged[section].update(options)
    return merged


def build(name: str, settings: Settings, real: Real, mlp: int | None = None) -> tuple[nn.Module, Objective]:
    """Build a rung's network and objective, the MLPs of its blocks ``mlp`` wide or four times the width."""
    s, options = settings, rung(name)
    shape, classes = real.training.shape, real.training.num_classes
    network: dict[str, Any] = {"name": "deepflow", "hidden_size": s.width, "depth": s.depth, "num_heads": s.heads}
    network |= {"input_size": tuple(shape[1:]), "in_channels": shape[0], "patch_size": s.patch, "num_classes": classes}
    network |= {} if mlp is None else {"mlp_ratio": (mlp + 0.5) / s.width}
    network |= options["backbone"]
    if network["name"] == "deepflow":
        network["branches"] = s.branches
        if network.get("refiner", "vera") not in ("none", "gap"):
            network["acceleration_width"] = s.acceleration_width
    objective = {"name": "deepflow", "times": "logit-normal", **options["objective"]}
    return backbones.build(network), objectives.build(objective, interpolant=LINEAR)


def parameters(name: str, settings: Settings, real: Real, mlp: int | None = None) -> int:
    """Count the trained parameters of a rung."""
    with torch.device("meta"):
        network, _ = build(name, settings, real, mlp)
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def matched(name: str, settings: Settings, real: Real) -> int:
    """Return the width of a rung's MLPs at which its parameters come nearest to the full DeepFlow's."""
    wanted, usual = parameters(FULL, settings, real), 4 * settings.width
    first, second = (parameters(name, settings, real, width) for width in (usual, usual + 1))
    return usual + round((wanted - first) / (second - first))
