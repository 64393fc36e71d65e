"""Draw samples: ``python sample.py RUN_OR_CHECKPOINT [solver.name=heun] [sample.count=50000] …``.

Weights that other programs released are sampled from their file: ``python sample.py released.pt weights.family=sit …``.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pathline
from pathline.core.errors import PathlineError, ProcessError
from pathline.training import trained
from pathline.training.drawing import Stopped, Written, draw
from pathline.training.names import default_name
from pathline.training.record import Order
from pathline.training.workers import Told, Workers, settle

WRONG, LOST, STOPPED, AT_ONCE = 2, 70, 75, 130
EXIT_CODES = f"""exit codes:
  0    done
  {WRONG}    a wrong input, or a machine that cannot do it
  {LOST}   another process is gone; what is drawn is kept, and the same command goes on
  {STOPPED}   stopped by SIGINT or SIGTERM with samples in shards: the same command goes on
  {AT_ONCE}  stopped with nothing written"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, as ``--help`` lists them."""
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description="Draw samples from a trained model.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a run's folder, a checkpoint, exported weights, or a released file (.pt)")
    parser.add_argument("entries", nargs="*", metavar="entry=value", help="as solver.name=heun or guidance.0.scale=1.5")
    given = parser.parse_intermixed_args(arguments)
    try:
        with _terminated_as_interrupted():
            return sample(Path(given.model), given.entries)
    except KeyboardInterrupt:
        return _say("stopped: nothing was written", AT_ONCE)
    except Told:
        return WRONG
    except ProcessError as error:
        return _say(f"error: {error}", LOST)
    except (PathlineError, OSError) as error:
        return _say(f"error: {error}", WRONG)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Take SIGTERM, which a cluster sends, as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # handlers can be set nowhere else
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def sample(model: Path, entries: Sequence[str]) -> int:
    """Draw, write, and print what it cost; return the exit code."""
    cpu = time.process_time()
    weights = trained.find(model, lambda line: print(f"warning: {line}", file=sys.stderr))
    configuration, parts = trained.load(weights, entries)
    settle(configuration)
    workers = Workers(configuration.sample.devices)
    output = Path(configuration.sample.output or _beside(weights) / default_name(configuration))
    try:
        done = draw(Order(configuration, parts, weights, output, pathline.__version__), workers)
    except Stopped as stop:
        return workers.code(_say(str(stop), STOPPED) if workers.rank == 0 else STOPPED)
    if workers.rank == 0:
        print(f"{_cost(done)} ({time.process_time() - cpu:.1f} CPU s with loading and writing)")
        print(("wrote " if done.drawn else "found ") + ", ".join(map(str, done.paths)))
    return 0


def _beside(weights: Path) -> Path:
    """Return the folder of a file of weights, or of the run that a checkpoint is of."""
    return weights.resolve().parent if weights.is_file() else weights.resolve().parent.parent


def _cost(done: Written) -> str:
    record = done.record
    blocks = "" if record["block_evaluations"] is None else f", {record['block_evaluations']} transformer blocks"
    there = "" if done.drawn == record["count"] else f"; {record['count'] - done.drawn:,} of them were there"
    return (
        f"{record['count']:,} samples by {record['solver']['name']}, NFE {record['nfe']}{blocks} each, in "
        f"{record['seconds']:.1f} s{there}"
    )


def _say(words: str, code: int) -> int:
    """Print to the standard error; return the code."""
    print(words, file=sys.stderr)
    return code


if __name__ == "__main__":  # run again under the package's name, so that no class lives in __main__
    from pathline.sample import main as package_main

    sys.exit(package_main())
