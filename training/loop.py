"""The training loop: next batch, objective, backward, guard, step, averages, log, checkpoint."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from lightning_fabric import Fabric

from pathline import __version__
from pathline.core.config import Configuration
from pathline.core.errors import DivergedError, ProcessError
from pathline.training import incidents
from pathline.training.checkpoints import Keep, Snapshot, path_of
from pathline.training.devices import Agreement, garbage_on_schedule, launch, losses_named, make_fabric
from pathline.training.evaluation import Evaluations, draw_picture, is_picture_due
from pathline.training.folder import RunFolder
from pathline.training.log import Log, warn
from pathline.training.optim import learning_rate
from pathline.training.parts import Parts, build
from pathline.training.rollback import dump, leave_history_after, newest_good
from pathline.training.sharded import ShardedWriter
from pathline.training.signals import Signals
from pathline.training.speed import peak_flops, row_entries
from pathline.training.state import State, load_weights
from pathline.training.step import take_step
from pathline.training.writing import Writer

__all__ = ["Interrupted", "Trainer"]

AnyWriter = Writer | ShardedWriter
ALL = 10**9  # more checkpoints than any run writes


class Interrupted(Exception):  # not an error
    """A signal ended the run; its state is saved.

    Attributes:
        saved: whether it is; a full disk may have kept it from being.
    """

    def __init__(self, message: str, *, saved: bool) -> None:
        super().__init__(message)
        self.saved = saved


class Trainer:
    """A run: what it is made of, and the loop over it.

    Args:
        configuration: of the run.
        parts: built of it; None builds them.
        fabric: launched; None makes and launches one as configured.

    Attributes:
        state: all that a checkpoint holds.
        agreement: of the processes.
    """

    def __init__(
        self, configuration: Configuration, *, parts: Parts | None = None, fabric: Fabric | None = None
    ) -> None:
        if fabric is None:
            fabric = make_fabric(configuration.train)
            launch(fabric)
        self.configuration, self.fabric = configuration, fabric
        self.agreement = Agreement(fabric, configuration.train.timeout)
        self.parts = parts or build(configuration)
        self.folder = Path(configuration.train.folder)
        self.state = State(self.parts, fabric, self.agreement)
        self._evaluations = Evaluations(self.state)
        self._claimed = False
        self._log: Log | None = None
        self._writer: AnyWriter | None = None
        self._averages_writer: AnyWriter | None = None

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from training in the folder; what killed ones left half written is removed.

        Raises:
            CheckpointError: another one trains in it, or nothing or too little can be written there.
        """
        if self._claimed:
            yield
            return
        folder, needed = RunFolder(self.folder), self.state.bytes
        self.agreement.first(lambda: _claim(folder, needed))
        self._claimed = True
        try:
            yield
        finally:
            self._claimed = False
            folder.unlock()

    def resume(self, checkpoint: Path, allow: Sequence[str] = ()) -> None:
        """Go on from a checkpoint; later ones in the run's folder are renamed ``superseded-…``.

        Args:
            checkpoint: its folder.
            allow: see ``State.restore``.

        Raises:
            CheckpointError: it is damaged, or of another configuration; nothing has been changed then.
        """
        self.state.restore(checkpoint, allow)
        self.agreement.first(lambda: leave_history_after(self.folder, self.state.step))

    def initialize_from(self, path: Path) -> None:
        """Start from weights: a safetensors file, a run's folder or a checkpoint.

        Raises:
            CheckpointError: nothing there, damaged, or of another network.
        """
        load_weights(self.state, path)

    def rehearse(self, steps: int = 3) -> float:
        """Take steps that nobody keeps; return the seconds of the fastest. The state is spoilt."""
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            take_step(self.state)
            self.state.window.read()  # waits for the device
            times.append(time.perf_counter() - began)
        return min(times)

    def run(self) -> None:
        """Train up to ``train.steps``, or ``train.stop_at``.

        Raises:
            Interrupted: after a signal, at the next step boundary, with a checkpoint written.
            CheckpointError: the folder is in use, or cannot be written to.
            DivergedError: roll-backs did not help.
            ProcessError: another process is gone.
        """
        loading = closing(self.state.loader)
        with self.claimed(), garbage_on_schedule(), Signals() as signals, losses_named(), loading, self._writing():
            with self.state.window.spending("other"):
                self.state.describe()  # at the first checkpoint it would hold up training
            self._loop(signals)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Open the log and the writers; a process that has none of them has None."""
        c = self.configuration
        keep, all_of_them = Keep(c.checkpoint.keep, c.checkpoint.keep_every), Keep(ALL)
        try:
            self.agreement.first(self._open_history)
            self._writer = self._new_writer("checkpoints", keep)
            self._averages_writer = self._new_writer("averages", all_of_them) if c.ema.snapshot_every else None
            yield
        finally:
            self._close()

    def _close(self) -> None:
        """Close writers and log, each whatever the others raise."""
        log, writers = self._log, (self._averages_writer, self._writer)
        with ExitStack() as closing:  # from the last to the first
            if log is not None:
                closing.callback(log.close)
            closing.callback(self._evaluations.close)
            closing.callback(self._tell_failures)
            for writer in writers:
                if writer is not None:
                    closing.callback(writer.close)
        self._log = self._writer = self._averages_writer = None

    def _open_history(self) -> None:
        """Set aside what another history of the folder has of later steps, and open the log; in the first process."""
        c, state = self.configuration, self.state
        leave_history_after(self.folder, state.step)
        incidents.cut(self.folder, state.step + state.passed)
        self._log = Log(self.folder, state.step, c.train.steps, c.log, c.model_dump(mode="json"))
        self._evaluations.open(self.folder, self._log)

    def _new_writer(self, name: str, keep: Keep) -> AnyWriter | None:
        train, asynchronous = self.configuration.train, self.configuration.checkpoint.asynchronous
        if train.strategy == "fsdp":
            return ShardedWriter(self.folder / name, keep, asynchronous=asynchronous, timeout=train.timeout)
        return Writer(self.folder / name, keep, asynchronous=asynchronous) if self.fabric.is_global_zero else None

    def _loop(self, signals: Signals) -> None:
        c, state = self.configuration, self.state
        end = min(c.train.steps, c.train.stop_at or c.train.steps)
        if state.step:  # what ended the run before may have come between its checkpoint and these
            self._store_averages()
            self._show(end)
        while state.step < end or state.streak >= c.guard.rollback_after:
            if state.streak >= c.guard.rollback_after:
                self._roll_back()
            take_step(state)
            if self._log is not None:
                self._log.advance()
            self._evaluations.poll()
            if state.step % c.log.every == 0 or state.step == c.train.steps:
                self._write_row()
            if state.step % c.train.collect_garbage_every == 0:
                gc.collect()
            leave = self.agreement.largest(signals.caught)
            if state.step % c.checkpoint.every == 0 or state.step == end or leave:
                self._save(last=bool(leave) or state.step == end)
            self._store_averages()
            if leave:
                self._leave(leave)
            self._show(end)

    def _write_row(self) -> None:
        """Read the window's means, once for all devices, and write them down."""
        c, state = self.configuration, self.state
        self._read_window()
        row = {"step": state.step, **state.window.row(c.train.global_batch)}
        state.close_window()
        row |= {
            "lr": learning_rate(c.optim, state.step - 1, c.train.steps),
            "skipped": state.skipped,
            "passed": state.passed,
            **self._speed(c.train.global_batch / row["images_per_second"]),
        }
        self._tell_failures()
        if self._log is not None and self._writer is not None:
            self._log.write({**row, "failed_saves": len(self._writer.failures)})

    def _speed(self, seconds: float) -> dict[str, float]:
        """Return memory and, where the device's peak is known, the model FLOPs utilisation at this time of a step."""
        train, device = self.configuration.train, self.fabric.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        counted = self.parts.objective.differentiates_all
        peak = peak_flops(name, train.precision, train.tf32) if counted else None
        flops = 3 * self.parts.forward_flops * train.global_batch
        return row_entries(device, flops, seconds, self.fabric.world_size, peak)

    def _read_window(self) -> None:
        """Bring the window's numbers to the host, and write down what its skipped steps were about."""
        dataset, seed = self.parts.dataset, self.configuration.train.seed

        def indices(positions: Sequence[int]) -> list[int]:
            return [int(dataset.indices_at(range(p, p + 1), seed)[0]) for p in positions]

        for skipped in self.state.window.read():
            batch = skipped.step + self.state.passed
            entry = incidents.describe(skipped, batch, self.agreement.gather, indices)
            if self.fabric.is_global_zero:
                incidents.write(self.folder, entry)

    def _save(self, *, last: bool) -> None:
        """Hand a checkpoint to the writer; the last one of a run is waited for."""
        state = self.state
        with state.window.spending("checkpoint"):
            sharded = isinstance(self._writer, ShardedWriter)
            if self.fabric.world_size > 1 and not sharded and not self.agreement.same(state.fingerprint()):
                raise ProcessError("got weights that differ between processes; resume from the newest checkpoint")
            self._read_window()
            if self._averages_writer is not None:
                self._averages_writer.wait()  # a resumed run stores those of this step again, none before
            snapshot = state.snapshot()
            if self._writer is not None:
                self._writer.save(state.step, snapshot)
            if last:
                self._wait()
        self._tell_failures()

    def _store_averages(self) -> None:
        """Store the power-function averages, if that is due, of which others can be made after training."""
        state, writer, every = self.state, self._averages_writer, self.configuration.ema.snapshot_every
        if not every or state.step % every:
            return
        with state.window.spending("checkpoint"):
            tensors = {name: group for name, group in state.averages.tensors().items() if name != "ema"}
            scalars = {
                "version": __version__,
                **state.averages.state(),
                "configuration": self.configuration.model_dump(mode="json"),
                **state.describe(),
            }
            if writer is not None:
                writer.save(state.step, Snapshot(tensors, scalars))

    def _wait(self) -> None:
        """Wait for what is being written, in all processes."""
        for writer in (self._writer, self._averages_writer):
            if writer is not None:
                writer.wait()
        self.agreement.wait()

    def _tell_failures(self) -> None:
        for writer in (self._writer, self._averages_writer):
            while writer is not None and (failure := writer.poll()) is not None:
                if self.fabric.is_global_zero:
                    warn(failure)

    def _leave(self, number: int) -> NoReturn:
        step, total = self.state.step, self.configuration.train.steps
        saved = self.agreement.first(lambda: path_of(self.folder / "checkpoints", step).exists())
        words = f"saved in {self.folder}" if saved else "NOT saved, for the reason above"
        raise Interrupted(f"{signal.Signals(number).name} after step {step} of {total}; {words}", saved=saved)

    def _roll_back(self) -> None:
        """Go back to the newest checkpoint before the streak of skipped steps, and on with the samples after it.

        Raises:
            DivergedError: there is none, or it has been gone back to too often.
        """
        state, limit = self.state, self.configuration.guard.max_rollbacks
        tried, streak = state.step + state.passed, state.streak
        self._wait()
        path = self.agreement.first(lambda: newest_good(self.folder))
        again = path is not None and path == path_of(self.folder / "checkpoints", state.rolled_to)
        count = state.rollbacks + 1 if again else 1
        why = f"{streak} steps in a row up to step {state.step} were skipped"
        if path is None or count > limit:
            dumped = self.agreement.first(lambda: dump(self.folder, state))
            where = "no checkpoint was written before" if path is None else f"going back {limit} times did not help"
            raise DivergedError(f"{why}, and {where}; look at their samples and times in {dumped}")
        self.resume(path, allow=tuple(Configuration.model_fields))  # its own history, whatever was changed since
        state.passed, state.rollbacks, state.rolled_to = tried - state.step, count, state.step
        if self._log is not None:
            self._log.rewind(state.step)
            self._evaluations.rewind(state.step)
            warn(f"{why}; going on from {path.name} with the samples after them")

    def _show(self, end: int) -> None:
        """Draw a picture, and evaluate, if these are due; in all processes alike."""
        if is_picture_due(self.parts, self.state.step, end):
            draw_picture(self.state, self.folder)
        if self._evaluations.is_due(self.configuration.train.steps):
            self._evaluations.run(self.folder)


def _claim(folder: RunFolder, needed: int) -> None:
    """Lock a run's folder, clean it and check it."""
    folder.check_room(0)
    folder.lock()
    try:
        folder.sweep()
        folder.check_room(needed)
    except BaseException:
        folder.unlock()
        raise
