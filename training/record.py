"""What is written down about a drawing: what decides its samples, and how they were drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathline.core.config import Configuration
from pathline.training.parts import Parts
from pathline.training.pictures import ROUNDING
from pathline.training.released import ReleasedConfiguration
from pathline.training.sampling import labels_of
from pathline.training.shards import About
from pathline.training.trained import average_of, identity

__all__ = ["Order", "digest"]

SEED_LAW = (
    "noise of sample i: Philox-4x64 of (seed, stream, step, i), Box-Muller in float32; whatever batch and devices"
)
NO_IMAGES = "latents, float32 (N, C, H, W)"


@dataclass(frozen=True)
class Order:
    """A drawing that is asked for.

    Attributes:
        configuration: its section ``sample`` tells how many samples and with which seed and labels.
        parts: of the model, with its weights.
        weights: where those are.
        output: the ``.npz``; shards lie beside it.
        version: of pathline.
    """

    configuration: Configuration
    parts: Parts
    weights: Path
    output: Path
    version: str

    def labels(self, ids: range) -> Tensor | None:
        """Return the labels (N,) of samples by number, as they are asked for."""
        backbone = self.parts.backbone
        return labels_of(self.configuration.sample, ids, self.classes, getattr(backbone, "null_label", None))

    @property
    def classes(self) -> int:
        """Number of the network's classes; 0 for an unconditional one."""
        return int(getattr(self.parts.backbone, "num_classes", 0))

    @property
    def labelled(self) -> bool:
        """Whether labels are written down: the null label is none."""
        return bool(self.classes) and self.configuration.sample.labels != "none"

    @cached_property
    def request(self) -> dict[str, Any]:
        """All that decides the samples, whatever the batch size and the devices; fit for JSON."""
        c = self.configuration.model_dump(mode="json")
        told = {name: c[name] for name in ("interpolant", "backbone", "objective", "solver", "guidance")}
        decoder = self.parts.autoencoder
        return {
            "version": self.version,
            "checkpoint": self._checkpoint(),
            "weak_checkpoints": [
                identity(Path(item["weak"])) for item in self.configuration.guidance if "weak" in item
            ],
            **told,
            "autoencoder": None if decoder is None else dict(decoder.manifest),
            "tf32": self.configuration.train.tf32,
            **{name: c["sample"][name] for name in ("seed", "labels", "count", "shard")},
        }

    def differences(self, older: Mapping[str, Any]) -> list[str]:
        """List the entries in which an older request is another one: ``solver.steps: 5 -> 7``."""
        before, after = (dict(_leaves(json.loads(json.dumps(request)))) for request in (older, self.request))
        return [
            f"{path}: {before.get(path)!r} -> {after.get(path)!r}"
            for path in sorted(before.keys() | after.keys())
            if before.get(path) != after.get(path)
        ]

    def record(self, spent: About, devices: int, device: torch.device) -> dict[str, Any]:
        """Return what is written beside the samples; fit for JSON.

        Args:
            spent: by all devices together.
            devices: number of them.
            device: one of them.
        """
        c, request, count = self.configuration.model_dump(mode="json"), self.request, self.configuration.sample.count
        weak = request["weak_checkpoints"]
        return {
            "version": self.version,
            "checkpoint": request["checkpoint"],
            **({"weak_checkpoints": weak} if weak else {}),
            "count": count,
            "seed": c["sample"]["seed"],
            "seed_law": SEED_LAW,
            "label_law": c["sample"]["labels"] if self.classes else None,
            "solver": c["solver"],
            "guidance": c["guidance"],
            "nfe": spent.nfe,
            "block_evaluations": spent.block_evaluations,
            "seconds": round(spent.seconds, 3),
            "images_per_second_and_device": round(count / max(spent.seconds, 1e-9), 3),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "devices": devices,
            "torch": torch.__version__,
            "precision": "fp32",
            "tf32": request["tf32"],
            **({"rounding": ROUNDING} if self.parts.can_draw else {"values": NO_IMAGES}),
            "autoencoder": request["autoencoder"],
            "request_sha256": digest(request),
            "data": c["data"],
            "configuration": c,
        }

    def _checkpoint(self) -> Any:
        c = self.configuration
        return dict(c.weights) if isinstance(c, ReleasedConfiguration) else identity(self.weights, average_of(c))


def digest(request: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a request."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries of nested sections and lists by their dotted paths."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inner:
        yield path, value
    for key, item in inner:
        yield from _leaves(item, f"{path}.{key}".lstrip("."))
