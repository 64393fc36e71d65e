"""Train a model: ``python train.py configs/deepflow-digits.yaml [entry=value …] [--resume auto|PATH] [--dry-run]``."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch import nn

import pathline
from pathline.core.config import Configuration, load
from pathline.core.errors import CheckpointError, PathlineError
from pathline.training import Interrupted, Trainer, check_machine, checkpoints
from pathline.training.log import mean_over_last_steps, read_rows
from pathline.training.parts import build


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 2 for a wrong input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train a model that a configuration describes.")
    parser.add_argument("configuration", help="YAML file, as configs/deepflow-digits.yaml")
    parser.add_argument("entries", nargs="*", metavar="entry=value", help="as optim.lr=2e-4 or solver.name=heun")
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="go on from the run's newest valid checkpoint, or from one"
    )
    parser.add_argument("--dry-run", action="store_true", help="check and build everything, train nothing")
    given = parser.parse_intermixed_args(arguments)
    try:
        return train(load(given.configuration, given.entries), given.resume, dry_run=given.dry_run)
    except Interrupted as stop:
        print(f"\n{stop}\ngo on with --resume auto", file=sys.stderr)
        return 130
    except KeyboardInterrupt:  # before the first step or a second time: nothing more is saved
        return 130
    except (PathlineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def train(configuration: Configuration, resume: str | None, *, dry_run: bool) -> int:
    """Train, and print what came out."""
    folder = Path(configuration.train.folder)
    checkpoint = _checkpoint(folder, resume)
    check_machine(configuration.train)
    parts = build(configuration)
    if dry_run:
        print(configuration.to_yaml() + _plan(configuration, parts.backbone))
        return 0
    trainer = Trainer(configuration, parts=parts)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    elif configuration.train.initialize_from is not None:
        trainer.initialize_from(Path(configuration.train.initialize_from))
    first = trainer.fabric.is_global_zero
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(configuration.to_yaml())
        print(f"pathline {pathline.__version__} from {Path(pathline.__file__).parent}\n{configuration.to_yaml()}")
        print(_plan(configuration, parts.backbone), flush=True)
    wall, cpu, start = time.perf_counter(), time.process_time(), trainer.state.step
    trainer.run()
    if first:
        images = (trainer.state.step - start) * configuration.train.global_batch
        print(_summary(folder, parts.objective.predicts, images, time.perf_counter() - wall, time.process_time() - cpu))
    return 0


def _checkpoint(folder: Path, resume: str | None) -> Path | None:
    """Return the checkpoint to go on from; raise CheckpointError where a new run would overwrite an old one."""
    if resume not in (None, "auto"):
        path = checkpoints.find(Path(str(resume)))
        if path.resolve().parent.parent != folder.resolve() and (folder / "metrics.jsonl").exists():
            raise CheckpointError(f"got {path}, and {folder}, which holds another run; name another train.folder")
        return path
    found = checkpoints.latest(folder / "checkpoints", lambda line: print(f"warning: {line}", file=sys.stderr))
    if resume == "auto":
        if found is None and any((folder / "checkpoints").glob("step-*")):
            raise CheckpointError(f"got {folder} with damaged checkpoints alone; start anew in another train.folder")
        return found
    if (folder / "metrics.jsonl").exists() or found is not None:
        raise CheckpointError(f"got {folder}, which holds a run; add --resume auto, or name another train.folder")
    return None


def _plan(configuration: Configuration, backbone: nn.Module) -> str:
    train = configuration.train
    parameters = sum(p.numel() for p in backbone.parameters())
    return (
        f"{parameters:,} parameters; {train.steps:,} steps of {train.global_batch} images = "
        f"{train.steps * train.global_batch:,} images; {train.devices * train.num_nodes} devices; into {train.folder}"
    )


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
        lines.append(f"steps skipped for gradients that were not finite: {rows[-1]['skipped']:.0f}")
    return "\n".join(lines)


if __name__ == "__main__":  # run again under the package's name, so that no class lives in __main__
    from pathline.train import main as package_main

    sys.exit(package_main())
