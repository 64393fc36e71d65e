"""A run's page: ``python -m pathline.training.report RUN [OUTPUT]`` writes ``report.html``, one self-contained file.

It shows what lies in the run's folder, of a run that is over or in progress: what is missing is left out, and what
cannot be read is said to be so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pathline
from pathline.core.errors import InputError, PathlineError
from pathline.training.chapters import CHAPTERS, model, progress
from pathline.training.log import warn
from pathline.training.page import Section, document, note
from pathline.training.remains import Run

__all__ = ["main", "save_report", "write_report"]

NAME = "report.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, or 2 for a wrong input."""
    parser = argparse.ArgumentParser(prog="pathline.training.report", description="Write a run's page.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("output", type=Path, nargs="?", help=f"file to write; by default {NAME} in the run's folder")
    given = parser.parse_args(arguments)
    try:
        path = write_report(given.run, given.output)
    except (PathlineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}, {path.stat().st_size / 1024:,.0f} KiB")
    return 0


def save_report(folder: Path) -> Path | None:
    """Write a run's page into its folder; what goes wrong is said on stderr, for it is no reason for a run to fail."""
    try:
        return write_report(folder)
    except Exception as error:  # whatever a damaged file raises
        warn(f"no {NAME} ({type(error).__name__}: {error})")
        return None


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write a run's page.

    Args:
        folder: of the run.
        output: file to write, which appears when it is whole; None for ``report.html`` in the folder.

    Raises:
        InputError: no run there, or a folder in the place of the output.
        OSError: it cannot be written.
    """
    run, path = Run(folder), folder / NAME if output is None else output
    if not run.exists:
        raise InputError(f"got {folder}, which holds no run; name the folder that train.folder was set to")
    if path.is_dir():
        raise InputError(f"got the folder {path} as the output, expected a file, as {path / NAME}")
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.write_text(_page(run), encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _page(run: Run) -> str:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    below = " · ".join(_guarded(make, run) for make in (model, progress))
    sections = [Section(title, _guarded(make, run, partial(note, alarm=True))) for title, make in CHAPTERS.items()]
    return document(run.folder.resolve().name, below, sections, f"pathline {pathline.__version__}, {now}")


def _guarded(make: Callable[[Run], str], run: Run, show: Callable[[str], str] = str) -> str:
    try:
        return make(run)
    except Exception as error:  # whatever a damaged file raises
        return show(f"This could not be read: {type(error).__name__}: {error}"[:500])


if __name__ == "__main__":
    sys.exit(main())
