"""Train a model: ``python train.py configs/deepflow-digits.yaml [entry=value …] [--resume auto|PATH] [--dry-run]``."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.utilities.rank_zero import rank_zero_only

import pathline
from pathline.core.config import Configuration, check_entries, load
from pathline.core.errors import CheckpointError, ConfigurationError, DivergedError, PathlineError, ProcessError
from pathline.training import Interrupted, Trainer, check_machine, checkpoints, starts
from pathline.training.curves import save_curves
from pathline.training.folder import RunFolder
from pathline.training.log import check_sinks, mean_over_last_steps, read_rows, warn
from pathline.training.parts import build
from pathline.training.report import save_report
from pathline.training.speed import memory_bytes

WRONG, DIVERGED, LOST, UNSAVED, INTERRUPTED, AT_ONCE = 2, 65, 70, 74, 75, 130
EXIT_CODES = f"""exit codes:
  0    done
  {WRONG}    a wrong input, or a machine that cannot do it
  {DIVERGED}   numbers that are not finite, or jumps of the loss, that no roll-back could get past
  {LOST}   another process of the run is gone, or was silent for longer than train.timeout
  {UNSAVED}   stopped or done, but the last checkpoint could not be written; older ones are whole
  {INTERRUPTED}   stopped by SIGINT, SIGTERM, SIGUSR1 or SIGHUP, and saved: go on with --resume auto
  128+n   left at once, on a second signal n or on a first one before the first step"""
SMALLER = "lower train.micro_batch, set train.activation_checkpointing, or cut the network up by train.strategy=fsdp"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, as ``--help`` lists them."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a model that a configuration describes.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("configuration", help="YAML file, as configs/deepflow-digits.yaml")
    parser.add_argument("entries", nargs="*", metavar="entry=value", help="as optim.lr=2e-4 or solver.name=heun")
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="auto: go on from the newest valid checkpoint in train.folder, or start if there is none; "
        "or go on from a checkpoint, or the newest one of a run",
    )
    parser.add_argument(
        "--allow",
        metavar="ENTRY",
        action="append",
        default=[],
        help="let this entry, section or the data differ from those of the checkpoint, as optim.lr; may be repeated",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, take three steps, print the plan; write nothing"
    )
    given = parser.parse_intermixed_args(arguments)
    try:
        configuration = load(given.configuration, given.entries)
        return train(configuration, given.resume, dry_run=given.dry_run, allow=given.allow)
    except KeyboardInterrupt:
        return _say("interrupted outside training: there was nothing to save", AT_ONCE)
    except DivergedError as error:
        return _say(f"error: {error}", DIVERGED)
    except ProcessError as error:
        return _say(f"error: {error}", LOST, everywhere=True)
    except (PathlineError, OSError) as error:
        return _say(f"error: {error}{_where(error)}", WRONG, everywhere=bool(_where(error)))
    except (RuntimeError, MemoryError) as error:  # torch has no type of its own for the host's memory
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        said = str(error).splitlines()[0] if str(error) else "of the host"
        return _say(f"error: out of memory{_where(error)}; {SMALLER} ({said})", WRONG, everywhere=True)


def train(configuration: Configuration, resume: str | None, *, dry_run: bool = False, allow: Sequence[str] = ()) -> int:
    """Train, and print what came out; return the exit code."""
    folder = Path(configuration.train.folder)
    check_machine(configuration.train)
    check_sinks(configuration.log)
    check_entries(configuration, allow)
    if _is_first():
        _check_beginning(configuration, resume)
    trainer = Trainer(configuration, parts=build(configuration))
    if dry_run:
        _rehearse(trainer, resume, allow)
        return 0
    with trainer.claimed():
        _start(trainer, resume, allow)
        wall, cpu, start = time.perf_counter(), time.process_time(), trainer.state.step
        try:
            code = _run(trainer)
        finally:
            seconds = time.perf_counter() - wall, time.process_time() - cpu
            if trainer.fabric.is_global_zero:
                save_curves(folder)
                save_report(folder)
        if trainer.fabric.is_global_zero:
            images = (trainer.state.step - start) * configuration.train.global_batch
            _tell(_summary(folder, trainer.parts.objective.predicts, images, *seconds))
    return code


def _run(trainer: Trainer) -> int:
    """Train; return the exit code.

    Fabric kills the first process soon after one that it started left with another code than 0: where all end alike,
    these leave with 0.
    """
    started = _was_started_by_fabric(trainer.fabric)
    try:
        code = _outcome(trainer)
    except DivergedError:
        if not started:
            raise
        return 0
    return 0 if started else code


def _outcome(trainer: Trainer) -> int:
    """Train; return the code for what became of it."""
    fabric, start = trainer.fabric, trainer.state.step
    try:
        trainer.run()
    except Interrupted as stop:
        return _say(f"\n{stop}\ngo on with --resume auto", INTERRUPTED if stop.saved else UNSAVED)
    except Exception as error:
        if fabric.world_size > 1:
            error.add_note(f"in process {fabric.global_rank} of {fabric.world_size}")
        raise
    last = checkpoints.path_of(trainer.folder / "checkpoints", trainer.state.step)
    if trainer.state.step == start or trainer.agreement.first(last.exists):
        return 0
    return _say(f"error: {last} could not be written, for the reason above", UNSAVED)


def _start(trainer: Trainer, resume: str | None, allow: Sequence[str]) -> None:
    """Resume, or start from weights, and say what is going to be trained."""
    configuration, folder = trainer.configuration, trainer.folder
    checkpoint = trainer.agreement.first(lambda: _checkpoint(folder, resume))
    if checkpoint is not None:
        trainer.resume(checkpoint, allow)
    elif configuration.train.initialize_from is not None:
        trainer.initialize_from(Path(configuration.train.initialize_from))
    if trainer.fabric.is_global_zero:
        (folder / "config.yaml").write_text(configuration.to_yaml())
        weights = None if checkpoint is not None else configuration.train.initialize_from
        starts.write(folder, trainer.fabric, trainer.state.step, checkpoint, weights)
        _tell(f"pathline {pathline.__version__} from {Path(pathline.__file__).parent}\n{configuration.to_yaml()}")
        _tell(_plan(trainer, checkpoint))


def _check_beginning(configuration: Configuration, resume: str | None) -> None:
    """Check, before other processes are started, the folder and what is to be gone on from, or begun with.

    Raises:
        CheckpointError: a new run would overwrite an old one, or nothing can be written, or there is nothing to read.
        ConfigurationError: two sources of weights.
    """
    folder, weights = Path(configuration.train.folder), configuration.train.initialize_from
    if resume is None and _holds_run(folder):
        raise CheckpointError(f"got {folder}, which holds a run; add --resume auto, or name another train.folder")
    if resume not in (None, "auto"):
        if weights is not None:
            raise ConfigurationError(
                f"train.initialize_from: got {weights} beside --resume {resume}, which has weights of its own; leave "
                "one out, as by train.initialize_from=null"
            )
        _checkpoint(folder, resume)
    elif weights is not None and not _holds_run(folder) and not Path(weights).is_file():
        checkpoints.find(Path(weights), lambda line: None)  # warned of when it is read
    RunFolder(folder).check_room(0)


def _holds_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() or any((folder / "checkpoints").glob("step-*"))


def _checkpoint(folder: Path, resume: str | None) -> Path | None:
    """Return the checkpoint to go on from."""
    if resume is None:
        return None
    if resume != "auto":
        path = checkpoints.find(Path(resume), warn)
        if path.resolve().parent.parent != folder.resolve() and _holds_run(folder):
            raise CheckpointError(f"got {path}, and {folder}, which holds another run; name another train.folder")
        return path
    found = checkpoints.latest(folder / "checkpoints", warn)
    if found is None and any((folder / "checkpoints").glob("step-*")):
        raise CheckpointError(f"got {folder} with damaged checkpoints alone; start anew in another train.folder")
    return found


def _rehearse(trainer: Trainer, resume: str | None, allow: Sequence[str]) -> None:
    """Check disk and memory, take a few steps in every process, and print the plan; nothing is written.

    What a resume would go on from is read and checked, also where another process is training in the folder.
    """
    state, train = trainer.state, trainer.configuration.train
    trainer.agreement.first(lambda: RunFolder(trainer.folder).check_room(state.bytes))
    checkpoint = trainer.agreement.first(lambda: _checkpoint(trainer.folder, resume))
    if checkpoint is not None:
        state.restore(checkpoint, allow)
    elif train.initialize_from is not None:
        trainer.initialize_from(Path(train.initialize_from))
    if trainer.configuration.checkpoint.asynchronous:
        _check_host_memory(state.bytes)
    plan, left = _plan(trainer, checkpoint), max(0, _end(trainer) - state.step)
    seconds = trainer.rehearse()
    trainer.agreement.wait()
    if not trainer.fabric.is_global_zero:
        return
    memory = memory_bytes(trainer.fabric.device) / 2**30
    print(trainer.configuration.to_yaml() + plan)
    print(
        f"a step takes {1000 * seconds:.1f} ms and at most {memory:.2f} GiB a device: "
        f"{_duration(seconds * left)} to finish, without pictures and checkpoints"
    )


def _check_host_memory(needed: int) -> None:
    """Raise ConfigurationError unless the host has room for the copy of a checkpoint, where it tells."""
    told = Path("/proc/meminfo")
    lines = told.read_text().splitlines() if told.exists() else []
    free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), needed)
    if free < needed:
        raise ConfigurationError(
            f"checkpoint.asynchronous: got a checkpoint of {needed / 2**30:.1f} GiB to copy to a host with "
            f"{free / 2**30:.1f} GiB of free memory; set it to false"
        )


def _plan(trainer: Trainer, checkpoint: Path | None) -> str:
    train, flops, step = trainer.configuration.train, trainer.parts.forward_flops, trainer.state.step
    parameters = sum(p.numel() for p in trainer.state.network.parameters())
    kept = trainer.configuration.checkpoint.keep
    devices = train.devices * train.num_nodes
    lines = [
        f"{parameters:,} parameters; {train.steps:,} steps of {train.global_batch} images = "
        f"{train.steps * train.global_batch:,} images; {devices} device{'s' * (devices > 1)}; into {train.folder}",
        f"{flops / 1e9:.3g} GFLOP forward an image, three times that with backward; "
        f"{trainer.state.bytes / 2**20:,.1f} MiB a checkpoint, of which {kept + 1} at once",
    ]
    if checkpoint is not None:
        entry = "train.stop_at" if train.stop_at and train.stop_at < train.steps else "train.steps"
        left = "" if step < _end(trainer) else f": nothing is left to train; set {entry} higher to go on"
        lines.append(f"going on from {checkpoint}, after step {step:,}{left}")
    return "\n".join(lines)


def _end(trainer: Trainer) -> int:
    train = trainer.configuration.train
    return min(train.steps, train.stop_at or train.steps)


def _duration(seconds: float) -> str:
    """Return a time in its own unit, as ``40 s``, ``12.5 min`` or ``31.2 h``."""
    return next(
        (f"{seconds / unit:.1f} {name}" for unit, name in ((3600, "h"), (60, "min")) if seconds >= unit),
        f"{seconds:.0f} s",
    )


def _is_first() -> bool:
    """Whether this is the first process, which is known from the environment before any is started."""
    return not getattr(rank_zero_only, "rank", 0)


def _where(error: BaseException) -> str:
    """Return the process of several that an error of training came up in."""
    return "".join(f" ({note})" for note in getattr(error, "__notes__", ()))


def _tell(words: str) -> None:
    """Print to the standard output, if it is still there: a broken pipe is no reason not to train, or to fail."""
    try:
        print(words, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # which what is left over goes to


def _say(words: str, code: int, *, everywhere: bool = False) -> int:
    """Print to the standard error, in the first process alone unless it concerns each; return the code."""
    if everywhere or _is_first():
        with suppress(OSError):  # of a terminal that is gone
            print(words, file=sys.stderr)
    return code


def _was_started_by_fabric(fabric: Fabric) -> bool:
    environment = getattr(fabric.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and fabric.local_rank > 0


def _summary(folder: Path, predicted: str, images: int, wall: float, cpu: float) -> str:
    rows = read_rows(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    lines = [
        f"trained {images:,} images in {wall:.1f} s ({cpu:.1f} CPU s): {images / wall:.0f} images/s; "
        f"peak memory {peak:.0f} MiB"
    ]
    if rows:
        loss, steps = mean_over_last_steps(rows, predicted, 100)
        lines.append(f"{predicted} loss of the final head, mean over the last {steps} steps: {loss:.4f}")
        lines.append(f"steps skipped for numbers that were not finite, or jumps of the loss: {rows[-1]['skipped']:.0f}")
    return "\n".join(lines)


if __name__ == "__main__":  # run again under the package's name, so that no class lives in __main__
    from pathline.train import main as package_main

    sys.exit(package_main())
