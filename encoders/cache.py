"""Encode a data set once: ``python -m pathline.encoders.cache CONFIG OUTPUT [entry=value …]``.

The file is used by training where the encoder's entry says ``cache: OUTPUT``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pathline import data, encoders
from pathline.core.config import load
from pathline.core.errors import ConfigurationError, PathlineError
from pathline.data import Dataset
from pathline.data.features import check_place, write_features
from pathline.encoders.sources import Computed, hash_of_images

__all__ = ["cache", "main"]

INTERRUPTED = 75  # exit code, that of training


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 2 for a wrong input, or 75 if interrupted."""
    parser = argparse.ArgumentParser(
        prog="pathline.encoders.cache", description="Encode the data set of a configuration once, for training."
    )
    parser.add_argument("configuration", help="YAML file with a section encoders")
    parser.add_argument("output", type=Path, help="file to write, as features.safetensors")
    parser.add_argument("entries", nargs="*", metavar="entry=value", help="as encoders.0.resolution=512")
    parser.add_argument("--encoder", type=int, default=0, help="number of the encoder, from 0 on")
    parser.add_argument("--batch", type=int, default=64, help="images encoded at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_intermixed_args(arguments)
    try:
        check_place(given.output)
        device = _usable(given.device)
        c = load(given.configuration, given.entries)
        if not 0 <= given.encoder < len(c.encoders) or given.batch < 1:
            raise ConfigurationError(
                f"got --encoder {given.encoder} and --batch {given.batch} for {len(c.encoders)} encoders of the "
                "configuration; expected one of them, counted from 0, and 1 or more images"
            )
        component = {key: value for key, value in c.encoders[given.encoder].items() if key != "cache"}
        dataset = data.build(c.data)
        cache(component, dataset, given.output, batch=given.batch, device=device)
    except KeyboardInterrupt:
        print(f"\ninterrupted; nothing was written to {given.output}: give the command again", file=sys.stderr)
        return INTERRUPTED
    except (PathlineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(dataset):,} samples in {given.output}, {given.output.stat().st_size / 2**20:,.1f} MiB")
    return 0


def _usable(name: str) -> torch.device:
    """Return a device by its name.

    Raises:
        ConfigurationError: there is none of that name here, or it holds no numbers.
    """
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # the second: of a torch built without it
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigurationError(
            f"got --device {name}, which cannot be used here ({said}); expected cpu, or cuda, cuda:1, mps where there "
            "is one"
        ) from error
    return device


def cache(component: dict[str, Any], dataset: Dataset, output: Path, *, batch: int, device: torch.device) -> None:
    """Encode every sample of a data set in order and write the features down, with a progress bar.

    Args:
        component: ``{name: …, options}`` of the encoder.
        dataset: whose samples.
        output: file to write; it appears when it is whole.
        batch: images at once.
        device: to encode on.

    Raises:
        DataError: data without images, or features that cannot be stored.
    """
    source = Computed(encoders.build(component), dataset)
    source.to(device)
    shape = (len(dataset), source.grid[0] * source.grid[1], source.dim)
    rows = _encoded(source, dataset, batch, device)
    images = str(hash_of_images(dataset))  # data without images were refused
    write_features(
        output, rows, shape, component=component, encoder=source.manifest, data=dataset.manifest, images=images
    )


def _encoded(source: Computed, dataset: Dataset, size: int, device: torch.device) -> Iterator[Tensor]:
    with tqdm(total=len(dataset), desc="encoding", unit="image") as bar:
        for first in range(0, len(dataset), size):
            indices = range(first, min(first + size, len(dataset)))
            yield source.tokens(dataset.batch(indices), device)
            bar.update(len(indices))


if __name__ == "__main__":
    sys.exit(main())
