"""Train a model: ``python train.py configs/deepflow-digits.yaml [entry=value …] [--resume auto|PATH] [--dry-run]``."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.utilities.rank_zero import rank_zero_only

import pathline
from pathline.core.config import Configuration, load
from pathline.core.errors import CheckpointError, ConfigurationError, DivergedError, PathlineError, ProcessError
from pathline.training import Interrupted, Trainer, check_machine, checkpoints
from pathline.training.curves import save_curves
from pathline.training.folder import RunFolder
from pathline.training.log import check_sinks, mean_over_last_steps, read_rows
from pathline.training.parts import build
from pathline.training.speed import memory_bytes

WRONG, DIVERGED, LOST, UNSAVED, INTERRUPTED = 2, 65, 70, 74, 75
EXIT_CODES = f"""exit codes:
  0    done
  {WRONG}    a wrong input, or a machine that cannot do it; nothing was trained
  {DIVERGED}   numbers that are not finite, or jumps of the loss, that no roll-back could get past
  {LOST}   another process of the run is gone, or was silent for longer than train.timeout
  {UNSAVED}   stopped or done, but the last checkpoint could not be written; older ones are whole
  {INTERRUPTED}   stopped by SIGINT, SIGTERM or SIGUSR1, and saved: go on with --resume auto
  128+n   left at once on a second signal n"""


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
        "--resume", metavar="auto|PATH", help="go on from the run's newest valid checkpoint, or from one"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and take a few steps; keep nothing")
    given = parser.parse_intermixed_args(arguments)
    try:
        return train(load(given.configuration, given.entries), given.resume, dry_run=given.dry_run)
    except KeyboardInterrupt:  # before the first step: there is nothing to save
        return 130
    except DivergedError as error:
        return _say(f"error: {error}", DIVERGED)
    except ProcessError as error:
        return _say(f"error: {error}", LOST, everywhere=True)
    except torch.OutOfMemoryError as error:
        advice = "lower train.micro_batch, or set train.activation_checkpointing"
        return _say(f"error: out of memory; {advice}\n{str(error).splitlines()[0]}", WRONG)
    except (PathlineError, OSError) as error:
        return _say(f"error: {error}", WRONG)


def train(configuration: Configuration, resume: str | None, *, dry_run: bool) -> int:
    """Train, and print what came out; return the exit code."""
    folder = Path(configuration.train.folder)
    check_machine(configuration.train)
    check_sinks(configuration.log)
    _check_free(folder, resume)
    trainer = Trainer(configuration, parts=build(configuration))
    if dry_run:
        _rehearse(trainer)
        return 0
    with trainer.claimed():
        _start(trainer, resume)
        wall, cpu, start = time.perf_counter(), time.process_time(), trainer.state.step
        code = _run(trainer)
        if trainer.fabric.is_global_zero:
            images = (trainer.state.step - start) * configuration.train.global_batch
            seconds = time.perf_counter() - wall, time.process_time() - cpu
            print(_summary(folder, trainer.parts.objective.predicts, images, *seconds))
    return code


def _run(trainer: Trainer) -> int:
    """Train; return the exit code."""
    folder = trainer.folder
    try:
        trainer.run()
    except Interrupted as stop:
        _say(f"\n{stop}\ngo on with --resume auto", INTERRUPTED)
        # Fabric kills all processes once one that it started itself leaves with another code than 0
        return 0 if _was_started_by_fabric(trainer.fabric) else INTERRUPTED if stop.saved else UNSAVED
    finally:
        if trainer.fabric.is_global_zero:
            save_curves(folder)
    last = checkpoints.path_of(folder / "checkpoints", trainer.state.step)
    return 0 if last.exists() else _say(f"error: {last} could not be written, for the reason above", UNSAVED)


def _start(trainer: Trainer, resume: str | None) -> None:
    """Resume, or start from weights, and say what is going to be trained."""
    configuration, folder = trainer.configuration, trainer.folder
    checkpoint = trainer.agreement.first(lambda: _checkpoint(folder, resume))
    if checkpoint is not None:
        trainer.resume(checkpoint)
    elif configuration.train.initialize_from is not None:
        trainer.initialize_from(Path(configuration.train.initialize_from))
    if trainer.fabric.is_global_zero:
        (folder / "config.yaml").write_text(configuration.to_yaml())
        print(f"pathline {pathline.__version__} from {Path(pathline.__file__).parent}\n{configuration.to_yaml()}")
        print(_plan(trainer), flush=True)


def _check_free(folder: Path, resume: str | None) -> None:
    """Raise CheckpointError where a new run would overwrite an old one."""
    if resume is None and ((folder / "metrics.jsonl").exists() or any((folder / "checkpoints").glob("step-*"))):
        raise CheckpointError(f"got {folder}, which holds a run; add --resume auto, or name another train.folder")


def _checkpoint(folder: Path, resume: str | None) -> Path | None:
    """Return the checkpoint to go on from."""
    if resume is None:
        return None
    if resume != "auto":
        path = checkpoints.find(Path(resume))
        if path.resolve().parent.parent != folder.resolve() and (folder / "metrics.jsonl").exists():
            raise CheckpointError(f"got {path}, and {folder}, which holds another run; name another train.folder")
        return path
    found = checkpoints.latest(folder / "checkpoints", lambda line: print(f"warning: {line}", file=sys.stderr))
    if found is None and any((folder / "checkpoints").glob("step-*")):
        raise CheckpointError(f"got {folder} with damaged checkpoints alone; start anew in another train.folder")
    return found


def _rehearse(trainer: Trainer) -> None:
    """Check disk and memory, take a few steps in every process, and print the plan; nothing is written."""
    state, train = trainer.state, trainer.configuration.train
    trainer.agreement.first(lambda: RunFolder(trainer.folder).check_room(state.bytes))
    if trainer.configuration.checkpoint.asynchronous:
        _check_host_memory(state.bytes)
    seconds = trainer.rehearse()
    trainer.agreement.wait()
    if not trainer.fabric.is_global_zero:
        return
    hours = seconds * train.steps / 3600
    memory = memory_bytes(trainer.fabric.device) / 2**30
    print(trainer.configuration.to_yaml() + _plan(trainer))
    print(
        f"a step takes {1000 * seconds:.1f} ms and at most {memory:.2f} GiB a device: {hours:.2f} h for all, without "
        "pictures and checkpoints"
    )


def _check_host_memory(needed: int) -> None:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < needed:
        raise ConfigurationError(
            f"checkpoint.asynchronous: got a checkpoint of {needed / 2**30:.1f} GiB to copy to a host with "
            f"{free / 2**30:.1f} GiB of free memory; set it to false"
        )


def _plan(trainer: Trainer) -> str:
    train, flops = trainer.configuration.train, trainer.parts.forward_flops
    parameters = sum(p.numel() for p in trainer.state.network.parameters())
    kept = trainer.configuration.checkpoint.keep
    return (
        f"{parameters:,} parameters; {train.steps:,} steps of {train.global_batch} images = "
        f"{train.steps * train.global_batch:,} images; {train.devices * train.num_nodes} devices; into {train.folder}\n"
        f"{flops / 1e9:.3g} GFLOP forward an image, three times that with backward; "
        f"{trainer.state.bytes / 2**20:,.0f} MiB a checkpoint, of which {kept + 1} at once"
    )


def _say(words: str, code: int, *, everywhere: bool = False) -> int:
    """Print to the standard error, in the first process alone unless it concerns each; return the code."""
    if everywhere or not getattr(rank_zero_only, "rank", 0):
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
