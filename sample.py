"""Draw samples: ``python sample.py RUN_OR_CHECKPOINT [solver.name=heun] [sample.count=50000] …``.

Weights that other programs released are sampled from their file: ``python sample.py released.pt weights.family=sit …``.
``--sweep solver.steps=5,10,25 guidance.0.scale=1,1.5 --metrics frechet`` draws and measures every combination.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pathline
from pathline.core.config import Configuration
from pathline.core.errors import ConfigurationError, PathlineError, ProcessError
from pathline.training import trained
from pathline.training.drawing import Stopped, Written, check_devices, draw
from pathline.training.names import default_name
from pathline.training.record import Order
from pathline.training.sweeps import Judges, Sweep, points
from pathline.training.swept import Found, save, table
from pathline.training.workers import Told, Workers, settle

WRONG, LOST, STOPPED, AT_ONCE = 2, 70, 75, 130
EXIT_CODES = f"""exit codes:
  0    done
  {WRONG}    a wrong input, or a machine that cannot do it
  {LOST}   another process is gone; what is drawn is kept, and the same command goes on
  {STOPPED}   stopped by SIGINT or SIGTERM with samples in shards, or points of a sweep done: the same command goes on
  {AT_ONCE}  stopped before a drawing was finished"""


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
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar="entry=value,value",
        help="draw every combination, as solver.steps=5,10,25 guidance.0.interval=[0,0.5],[0.2,0.7]",
    )
    parser.add_argument("--metrics", metavar="NAME,NAME", help="measure each drawing of a sweep, as evaluate.py does")
    parser.add_argument("--reference", help="what those compare with; else the training data's name")
    parser.add_argument(
        "--option",
        metavar="NAME.OPTION=VALUE",
        action="append",
        help="of a metric or a feature space, as for evaluate.py; may be repeated",
    )
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="of a sweep; else sweep in the run's folder")
    given = parser.parse_intermixed_args(arguments)
    try:
        with _terminated_as_interrupted():
            return sweep(given) if given.sweep else sample(given)
    except KeyboardInterrupt:
        return _say("stopped: no drawing was finished; the same command draws it", AT_ONCE)
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


def sample(given: argparse.Namespace) -> int:
    """Draw, write, and print what it cost; return the exit code."""
    for name in ("metrics", "reference", "option", "into"):
        if getattr(given, name) is not None:
            raise ConfigurationError(f"got --{name} without --sweep, which it is of; measure samples by evaluate.py")
    cpu = time.process_time()
    weights = trained.find(Path(given.model), _warn)
    configuration, parts = trained.load(weights, given.entries)
    check_devices(configuration.sample, configuration.sample.devices)
    settle(configuration)
    workers = Workers(configuration.sample.devices, configuration.train.accelerator)
    order = Order(configuration, parts, weights, Path(configuration.sample.output or "."), pathline.__version__)
    if configuration.sample.output is None:
        order = replace(order, output=_beside(weights) / workers.first(lambda: default_name(order)))
    try:
        done = draw(order, workers)
    except Stopped as stop:
        return _stopped(str(stop), workers)
    if workers.rank == 0:
        print(f"{_cost(done)} ({time.process_time() - cpu:.1f} CPU s with loading and writing)")
        print(("wrote " if done.drawn else "found ") + ", ".join(map(str, done.paths)))
    return 0


def sweep(given: argparse.Namespace) -> int:
    """Draw and measure every combination, print a table, and write it with a plot; return the exit code."""
    weights = trained.find(Path(given.model), _warn)
    plan = Sweep(
        weights, given.entries, points(given.sweep), given.into or _beside(weights) / "sweep", pathline.__version__
    )
    configuration = plan.check()
    settle(configuration)
    workers = Workers(configuration.sample.devices, configuration.train.accelerator)
    judges = _judges(given, plan, configuration, workers)
    found: list[Found] = []
    paths: list[Path] = []
    try:
        for found in plan.run(workers, judges):
            if workers.rank == 0:
                paths = save(found, plan.folder)
    except (Stopped, KeyboardInterrupt) as stop:
        if not found and not isinstance(stop, Stopped):
            raise
        done = f"{len(found)} of {len(plan.points)} points are done"
        return _stopped(f"{stop}; {done}" if str(stop) else f"stopped: {done}; the same command goes on", workers)
    if workers.rank == 0:
        print(f"{table(found)}\nwrote {', '.join(map(str, paths))}")
        for line in dict.fromkeys(line for entry in found for line in entry.warnings):
            _warn(line)
        if judges is not None and paths[-1].suffix != ".png":
            print("no sweep.png without matplotlib: pip install 'pathline[log]'")
    return 0


def _judges(given: argparse.Namespace, plan: Sweep, configuration: Configuration, workers: Workers) -> Judges | None:
    """Return, in the first process, what measures; what is wrong with it is told before anything is drawn."""
    if given.metrics is None:
        return None
    built: list[Judges] = []
    names = [name for name in given.metrics.split(",") if name]
    reference = given.reference or configuration.data["name"]

    def build() -> None:
        built.append(Judges.of(names, reference, workers.device, given.option or ()))
        plan.check(built[0])

    workers.first(build)
    return built[0] if built else None


def _stopped(words: str, workers: Workers) -> int:
    return workers.code(_say(words, STOPPED) if workers.rank == 0 else STOPPED)


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


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def _say(words: str, code: int) -> int:
    """Print to the standard error; return the code."""
    print(words, file=sys.stderr)
    return code


if __name__ == "__main__":  # run again under the package's name, so that no class lives in __main__
    from pathline.sample import main as package_main

    sys.exit(package_main())
