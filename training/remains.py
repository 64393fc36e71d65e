"""What a run has left in its folder, read for its page: each file by itself, as any may be missing or damaged."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image
from safetensors import safe_open

from pathline.metrics.results import ENDING, Result
from pathline.training import incidents, starts
from pathline.training.checkpoints import STEP
from pathline.training.log import read_rows
from pathline.training.manifest import STATE

__all__ = ["Run", "Sheet"]

EVALUATIONS = "evaluations.jsonl"
SHEETS = 12  # pictures of samples that are shown
BYTES = 2**18  # of a picture that is put into the page as it is
SIDE = 720  # pixels, to which a larger one is reduced
PIXELS = 2**26  # of a picture that is opened at all
LARGEST = 2**27  # bytes of a file of text that is read


class Sheet(NamedTuple):
    """A picture of samples, as it is put into the page.

    Attributes:
        step: after which it was drawn.
        content: of the file.
        kind: ``png`` or ``jpeg``.
        reduced: whether it was larger.
    """

    step: int
    content: bytes
    kind: str
    reduced: bool


class Run:
    """The folder of a run. Each property reads a file; it is empty where there is none, and raises where it is damaged.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def exists(self) -> bool:
        """Whether there is a run."""
        names = ("config.yaml", "metrics.jsonl", "checkpoints")
        return any((self.folder / name).exists() for name in names)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the log."""
        return read_rows(self.folder)

    @cached_property
    def text(self) -> str:
        """The configuration, as it was written down."""
        return _read(self.folder / "config.yaml")

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """The same by entries; that of the newest checkpoint where there is none."""
        found = yaml.safe_load(self.text) if self.text else self.state.get("configuration")
        return found if isinstance(found, dict) else {}

    @cached_property
    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints, the oldest first."""
        found = (self.folder / "checkpoints").glob("step-*")
        return sorted(path for path in found if STEP.fullmatch(path.name) and path.is_dir())

    @cached_property
    def state(self) -> dict[str, Any]:
        """Scalars of the newest checkpoint; its hashes are not verified, since nothing is computed from them."""
        if not self.checkpoints:
            return {}
        found = json.loads(_read(self.checkpoints[-1] / STATE) or "{}")
        return found if isinstance(found, dict) else {}

    @cached_property
    def parameters(self) -> int | None:
        """Number of the network's, from the names and shapes in the newest checkpoint."""
        path = self.checkpoints[-1] / "model.safetensors" if self.checkpoints else None
        if path is None or not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            return sum(int(math.prod(file.get_slice(name).get_shape())) for name in file.keys())

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """When it was started or resumed, from what and with what."""
        return _lines(self.folder / starts.FILE)

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """What was measured in the course of training, one metric of one average a line."""
        return _lines(self.folder / EVALUATIONS)

    @cached_property
    def incidents(self) -> list[dict[str, Any]]:
        """The steps that were skipped."""
        return incidents.read(self.folder)

    @property
    def results(self) -> list[Path]:
        """Files of results of samples in the folder."""
        return sorted(self.folder.glob(f"*{ENDING}"))

    @staticmethod
    def result(path: Path) -> Result:
        """Read one of them."""
        return Result.read(path)

    @property
    def sheets(self) -> list[Path]:
        """Pictures of samples in the order of training: the first, the last, and some spread evenly between."""
        found = [path for path in (self.folder / "pictures").glob("step-*.png") if re.fullmatch(r"step-\d+", path.stem)]
        found.sort(key=step_of)
        last = len(found) - 1
        return (
            [found[number] for number in sorted({round(i * last / (SHEETS - 1)) for i in range(SHEETS)})]
            if found
            else []
        )

    @staticmethod
    def sheet(path: Path) -> Sheet:
        """Read one of them, reduced if it is large.

        Raises:
            OSError, ValueError: it is no picture, or one of more pixels than anybody can look at.
        """
        with Image.open(path) as image:
            if image.format != "PNG" or math.prod(image.size) > PIXELS:
                raise ValueError(f"got a picture of format {image.format} and size {image.size}")
            image.load()
            if path.stat().st_size <= BYTES:
                return Sheet(step_of(path), path.read_bytes(), "png", reduced=False)
            small, written = image.convert("RGB"), io.BytesIO()
            small.thumbnail((SIDE, SIDE))
            small.save(written, "JPEG", quality=85)
        return Sheet(step_of(path), written.getvalue(), "jpeg", reduced=True)


def step_of(path: Path) -> int:
    """Return the step that a file or a folder is named after."""
    return int(path.stem.removeprefix("step-"))


def _read(path: Path) -> str:
    """Return a file's text, empty without a file."""
    if not path.is_file():
        return ""
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes")
    return path.read_text(encoding="utf-8", errors="replace")


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return a file's lines of JSON objects; others, as one cut short by a kill, are left out."""
    found = []
    for line in _read(path).splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, Mapping):
            found.append(dict(entry))
    return found
