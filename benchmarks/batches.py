"""What batch size and processes change in samples: ``python benchmarks/batches.py RUN [solver.steps=25 …]``.

Noise and labels are the same, bit for bit; matrix products round otherwise for other batch sizes, and a pixel near the
middle of two levels may become the other one. A Markdown table tells how many do, beside batches of 250 in one process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SCRIPT = Path(__file__).parent.parent / "sample.py"
BATCHES, PROCESSES = (250, 64, 7, 1), (1, 2)


def drawn(model: str, words: Sequence[str], output: Path) -> NDArray[np.uint8]:
    """Draw by ``sample.py`` and return the images (N, H, W, C)."""
    command = [sys.executable, str(SCRIPT), model, *words, f"sample.output={output}"]
    subprocess.run(command, check=True, capture_output=True)
    with np.load(output, allow_pickle=False) as arrays:
        images: NDArray[np.uint8] = arrays["arr_0"]
    return images


def row(name: str, images: NDArray[np.uint8], others: NDArray[np.uint8]) -> str:
    """Return a line of the table."""
    differences = np.abs(images.astype(np.int16) - others)
    cells = differences.any(axis=(1, 2, 3)), differences > 0
    shares = " | ".join(f"{int(cell.sum())} ({cell.mean():.3%})" for cell in cells)
    return f"| {name} | {shares} | {int(differences.max())} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a run's folder, or a checkpoint, of a model of images")
    parser.add_argument("entries", nargs="*", metavar="entry=value", help="as for sample.py")
    parser.add_argument("--count", type=int, default=1000)
    given = parser.parse_intermixed_args(arguments)
    words = [*given.entries, f"sample.count={given.count}", f"sample.shard={-(-given.count // max(PROCESSES))}"]
    first: NDArray[np.uint8] | None = None
    print("| batch, processes | images that differ | values that differ | largest difference, levels |")
    print("| --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for processes in PROCESSES:
            for batch in BATCHES:
                more = [f"sample.batch={batch}", f"sample.devices={processes}"]
                images = drawn(given.model, [*words, *more], Path(folder) / f"{batch}-{processes}.npz")
                first = images if first is None else first
                print(row(f"{batch}, {processes}", images, first), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
