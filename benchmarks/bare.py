"""What the benchmarks of training share: the bare loop, what it trains, and our loop stopped where one likes."""

from __future__ import annotations

import contextlib
import io
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from pathline import backbones, interpolants, objectives, solvers
from pathline.core.config import Configuration, resolve
from pathline.core.draws import Draws
from pathline.data import Dataset
from pathline.data.base import Batch, Indices, as_indices
from pathline.training import loop
from pathline.training.network import compile_units
from pathline.training.parts import Parts
from pathline.training.speed import forward_flops

RESULTS = Path(__file__).with_name("RESULTS.md")


class Case(NamedTuple):
    """A network, its batch, and the bar that our own cost is held to: a share of a step, or seconds."""

    name: str
    backbone: str
    width: int
    depth: int
    side: int
    patch: int
    batch: int
    block: int
    share: float | None = None
    seconds: float | None = None


class Latents(Dataset):
    """Random latents (4, side, side) of ten classes, in memory: as quick to read as data can be."""

    num_classes = 10
    in_memory = True

    def __init__(self, side: int, count: int = 512) -> None:
        self.shape = (4, side, side)
        generator = torch.Generator().manual_seed(0)
        self.values = torch.randn(count, *self.shape, generator=generator)
        self.labels = torch.randint(10, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, indices: Indices) -> Batch:
        index = as_indices(indices, len(self))
        return {"data": self.values[index], "label": self.labels[index], "index": index}

    @property
    def statistics(self) -> dict[str, Any]:
        return {"mean": [0.0] * 4, "std": [1.0] * 4, "range": [-5.0, 5.0]}

    @property
    def manifest(self) -> dict[str, Any]:
        return {"name": "random latents", "shape": list(self.shape), "count": len(self)}


def configured(case: Case, folder: Path, device: str, precision: str, compiled: bool) -> Configuration:
    """Return the configuration of a run that is never over, and saves nothing by itself."""
    network = {"input_size": case.side, "patch_size": case.patch, "in_channels": 4, "num_classes": 10}
    network["num_heads"] = case.width // 64 or 3
    if case.backbone == "deepflow" and case.width < 64:
        network["acceleration_width"] = 7  # 2048 are for real networks
    train = {"steps": 10**6, "global_batch": case.batch, "folder": str(folder), "accelerator": device}
    mode = {"precision": "fp32" if precision == "tf32" else precision, "tf32": precision == "tf32", "compile": compiled}
    return resolve(
        {
            "data": "digits",  # in whose place latents are put
            "backbone": {"name": case.backbone, "hidden_size": case.width, "depth": case.depth, **network},
            "objective": "velocity" if case.backbone == "sit" else case.backbone,
            "solver": {"name": "euler", "steps": 1},
            "train": {**train, **mode},
            "checkpoint": {"every": 10**6},
        }
    )


def parts_of(c: Configuration) -> Parts:
    """Build what is trained, on latents; alike for the same configuration."""
    torch.manual_seed(c.train.seed)
    interpolant, backbone = interpolants.build(c.interpolant), backbones.build(c.backbone)
    objective = objectives.build(c.objective, interpolant=interpolant)
    dataset = Latents(backbone.input_shape[1])
    parts = Parts(c, dataset, interpolant, backbone, objective, solvers.build(c.solver), ())
    batch = dataset.batch([0, 1])
    draws = Draws(0).at(range(2))
    flops = forward_flops(lambda: objective(backbone, batch["data"], draws, label=batch["label"])) // 2
    return replace(parts, forward_flops=flops)


class Bare:
    """The loop that one would write for one device and one run.

    Args:
        configuration: as of our run.
        device: where it trains.
        steps: how many batches to have ready.
    """

    def __init__(self, configuration: Configuration, device: torch.device, steps: int) -> None:
        c, parts = configuration, parts_of(configuration)
        self.device, self.batch, self.seed, self.clip = device, c.train.global_batch, c.train.seed, c.optim.clip
        self.decay = c.ema.decay or 0.0
        self.network = parts.backbone.to(device).train()
        self.objective, self.parameters = parts.objective, list(self.network.parameters())
        self.averaged = [p.detach().clone() for p in self.parameters]
        self.trained = [p.detach() for p in self.parameters]
        if c.train.compile:
            compile_units(self.network)
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(c.train.precision)
        self.module = self.network if kind is None else Autocast(self.network, device.type, kind)
        self.scaler = torch.amp.GradScaler(device.type) if c.train.precision == "fp16" else None
        o = c.optim
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True
        )
        dataset: Any = parts.dataset
        self.values, self.labels = dataset.values, dataset.labels
        self.order = torch.from_numpy(dataset.indices_at(range(steps * self.batch), self.seed))
        self.step = 0

    def steps(self, count: int) -> None:
        """Train on."""
        for _ in range(count):
            self.one_step()

    def one_step(self) -> None:
        """Train on one batch."""
        positions = range(self.step * self.batch, (self.step + 1) * self.batch)
        index = self.order[positions.start : positions.stop]
        data, label = self.sent(self.values[index]), self.sent(self.labels[index])
        loss = self.objective(self.module, data, Draws(self.seed).at(positions, step=self.step), label=label).total
        if self.scaler is None:
            loss.backward()
            clip_grad_norm_(self.parameters, self.clip)
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.parameters, self.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.average()

    def sent(self, values: Tensor) -> Tensor:
        """Return values on the device."""
        return values.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else values

    @torch.no_grad()
    def average(self) -> None:
        """Move the average in one kernel: p ← p + w·(trained − p), w = max(1 − decay, 9/(n + 9))."""
        weight = max(1 - self.decay, 9 / (self.step + 9))
        torch._fused_sgd_(
            self.averaged,
            self.trained,
            [],
            weight_decay=1.0,
            momentum=0.0,
            lr=weight,
            dampening=0.0,
            nesterov=False,
            maximize=True,
            is_first_step=False,
        )


class Autocast(nn.Module):
    """A network in lower precision."""

    def __init__(self, module: nn.Module, device: str, kind: torch.dtype) -> None:
        super().__init__()
        self.module, self.device, self.kind = module, device, kind

    def forward(self, *inputs: Any, **conditions: Any) -> Any:
        with torch.autocast(self.device, self.kind):
            return self.module(*inputs, **conditions)


class Enough(Exception):
    """Ends a run of ours."""


@contextmanager
def driven(before: Callable[[int], None]) -> Iterator[None]:
    """Call a function with the step before each of our steps; it may raise ``Enough``."""
    take_step = loop.take_step

    def driven_step(state: Any) -> None:
        before(state.step)
        take_step(state)

    with patch.object(loop, "take_step", driven_step), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(Enough):
            yield


def table(rows: Sequence[dict[str, str]]) -> str:
    """Return a table in Markdown."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def device_name(device: str) -> str:
    """Return the name of the GPU, or of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
