"""The training loop: next batch, objective, backward, guard, step, EMA, log, checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pathline.core.config import Configuration
from pathline.core.draws import Draws
from pathline.core.errors import ConfigurationError
from pathline.core.sections import Train
from pathline.training import checkpoints, sampling
from pathline.training.guard import guarded_step
from pathline.training.interrupt import Interrupt
from pathline.training.log import Log
from pathline.training.optim import learning_rate
from pathline.training.parts import Parts, build
from pathline.training.state import State, load_weights

__all__ = ["Interrupted", "Trainer", "check_machine", "make_fabric"]

PRECISIONS: dict[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
}


class Interrupted(Exception):  # not an error
    """Ctrl-C ended the run; its state is saved."""


def check_machine(train: Train) -> None:
    """Check that this machine can train as configured; a model can be read and sampled from on any other.

    Raises:
        ConfigurationError: fp16 without a CUDA device (Fabric would silently take bf16), or too few devices.
    """
    cuda = torch.cuda.device_count() if train.accelerator in ("auto", "cuda") else 0
    if train.precision == "fp16" and not cuda:
        raise ConfigurationError("train.precision: got fp16 without a CUDA device, expected fp32 or bf16 there")
    if cuda < train.devices and (train.accelerator == "cuda" or cuda):
        raise ConfigurationError(f"train.devices: got {train.devices}, of {cuda} CUDA devices; set train.devices lower")


def make_fabric(train: Train) -> Fabric:
    """Return Fabric for the configured devices and precision, not launched; raises as ``check_machine``."""
    check_machine(train)
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    try:
        return Fabric(
            accelerator=train.accelerator,
            devices=train.devices,
            num_nodes=train.num_nodes,
            precision=PRECISIONS[train.precision],
        )
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        raise ConfigurationError(
            f"train.accelerator: got {train.accelerator}, of which Fabric says: {error}"
        ) from error


class Trainer:
    """A run: what it is made of, and the loop over it.

    Args:
        configuration: of the run.
        parts: built of it; None builds them.
        fabric: launched; None makes and launches one as configured.

    Attributes:
        state: all that a checkpoint holds.
    """

    def __init__(
        self, configuration: Configuration, *, parts: Parts | None = None, fabric: Fabric | None = None
    ) -> None:
        if fabric is None:
            fabric = make_fabric(configuration.train)
            fabric.launch()
        self.configuration, self.fabric = configuration, fabric
        self.parts = parts or build(configuration)
        self.folder = Path(configuration.train.folder)
        self.state = State(self.parts, fabric)

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint; later ones in the run's folder are renamed ``superseded-…``.

        Raises:
            CheckpointError: it is damaged, or of another configuration; nothing has been changed then.
        """
        self.state.restore(checkpoint)
        self.fabric.barrier()  # every process has read it
        if self.fabric.is_global_zero:
            checkpoints.set_aside_after(self.folder / "checkpoints", self.state.step)

    def initialize_from(self, path: Path) -> None:
        """Start from weights: a safetensors file, a run's folder or a checkpoint.

        Raises:
            CheckpointError: nothing there, damaged, or of another network.
        """
        load_weights(self.state, path)

    def run(self) -> None:
        """Train up to ``train.steps``, or ``train.stop_at``.

        Raises:
            Interrupted: after Ctrl-C, at the next step boundary, with a checkpoint written.
        """
        log = Log(self.folder, self.state.step, self.configuration.train.steps) if self.fabric.is_global_zero else None
        try:
            with Interrupt() as interrupt:
                self._loop(log, interrupt)
        finally:
            if log is not None:
                log.close()

    def _loop(self, log: Log | None, interrupt: Interrupt) -> None:
        c, state = self.configuration, self.state
        end = min(c.train.steps, c.train.stop_at or c.train.steps)
        while state.step < end:
            self._step()
            row_due = state.step % c.log.every == 0 or state.step == end
            if log is not None:
                log.advance()
            if row_due:
                self._write_row(log)
            leave = self._agreed(interrupt.asked, row_due)
            if state.step % c.checkpoint.every == 0 or state.step == end or leave:
                self._save()
            if self._picture_due(end):
                self._picture()
            if leave:
                raise Interrupted(f"stopped after step {state.step} of {c.train.steps}; saved in {self.folder}")

    def _step(self) -> None:
        """Take one optimizer step on the next global batch."""
        c, state = self.configuration, self.state
        share = c.train.global_batch // self.fabric.world_size
        first = state.position + self.fabric.global_rank * share
        micro = c.train.micro_batch or share
        for start in range(first, first + share, micro):
            positions = range(start, min(start + micro, first + share))
            last = positions.stop == first + share
            with self.fabric.no_backward_sync(state.module, enabled=not last):
                self._accumulate(positions, len(positions) / share)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(c.optim, state.step, c.train.steps)
        norm, kept = guarded_step(self.fabric, state.optimizer, c.optim.clip)
        state.optimizer.zero_grad()
        state.average.update(state.step, kept)
        state.window.add_step(norm, kept)
        state.step += 1

    def _accumulate(self, positions: range, share: float) -> None:
        """Add the gradient of the samples at these positions of the training stream."""
        parts, seed = self.parts, self.configuration.train.seed
        batch = parts.dataset.batch(parts.dataset.indices_at(positions, seed))
        data, label = (batch[name].to(self.fabric.device, non_blocking=True) for name in ("data", "label"))
        draws = Draws(seed).at(positions, step=self.state.step)
        loss = parts.objective(self.state.module, data, draws, **parts.conditions(label))
        self.fabric.backward(loss.total * share)
        self.state.window.add_loss(loss, share)

    def _write_row(self, log: Log | None) -> None:
        """Read the window's means, once for all devices, and write them down."""
        c, state = self.configuration, self.state
        row, skipped = state.window.row(self.fabric, c.train.global_batch)
        state.window.clear()
        state.skipped += skipped
        lr = learning_rate(c.optim, state.step - 1, c.train.steps)
        if log is not None:
            log.write({"step": state.step, **row, "lr": lr, "skipped": state.skipped})

    def _agreed(self, asked: bool, row_due: bool) -> bool:
        """Whether to leave now. Several processes look where they wait for one another anyway: at a row."""
        if self.fabric.world_size == 1:
            return asked
        flag: Tensor = torch.tensor(float(asked), device=self.fabric.device)
        return row_due and bool(self.fabric.all_reduce(flag, reduce_op="sum"))

    def _save(self) -> None:
        """Write a checkpoint from the first process; the others wait."""
        with self.state.window.paused():
            snapshot = self.state.snapshot()
            if self.fabric.is_global_zero:
                keep = self.configuration.checkpoint.keep
                checkpoints.write(self.folder / "checkpoints", self.state.step, snapshot, keep)
            self.fabric.barrier()

    def _picture_due(self, end: int) -> bool:
        every, step = self.configuration.log.pictures_every, self.state.step
        drawable = self.parts.dataset.shape[0] in (1, 3)  # latents are not
        return drawable and self.fabric.is_global_zero and (step == end or (every is not None and step % every == 0))

    def _picture(self) -> None:
        with self.state.window.paused():
            sampling.save_picture(self.parts, self.state.average.network, self.folder / "samples.png")
