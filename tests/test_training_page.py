"""docs/training.md against the program: exit codes, entries of a row of the log, entries of the configuration."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pathline import train
from pathline.core import sections
from pathline.core.config import resolve
from pathline.training import Trainer
from pathline.training.log import read_rows

PAGE = (Path(__file__).parent.parent / "docs" / "training.md").read_text()


def part(title):
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title):
    table = [line for line in part(title).splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_exit_codes_are_those_of_the_help():
    here = {code: re.sub("[`*]", "", meaning) for code, meaning in rows("Exit codes")}
    there = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in train.EXIT_CODES.splitlines()[1:])
    assert here == there


def test_every_entry_of_a_row_is_explained(tmp_path):
    """Those of a real run of a branched network, and the one that only a GPU's row has."""
    shape = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 12, "depth": 2, "num_heads": 3}
    entries = {
        "data": "digits",
        "backbone": {"name": "deepflow", **shape, "num_classes": 10, "cuts": [1], "acceleration_width": 7},
        "objective": "deepflow",
        "solver": {"name": "euler", "steps": 2},
        "train": {"steps": 2, "global_batch": 5, "folder": str(tmp_path), "accelerator": "cpu"},
    }
    Trainer(resolve(entries)).run()
    written = set(read_rows(tmp_path)[-1])
    explained = set(re.findall(r"`(\w+)`", " ".join(cells[0] for cells in rows("A row of the log"))))
    terms = {"deep", "acceleration", "velocity", "velocity_1"}
    assert written - terms == explained - terms - {"model_flops_utilisation"}


@pytest.mark.parametrize("section", ["Ema", "Guard", "Train", "Checkpoint"])
def test_entries_of_the_configuration_are_told_of(section):
    told = set(re.findall(rf"{section.lower()}\.(\w+)", PAGE)) - {"py"}
    known = set(getattr(sections, section).model_fields)
    assert told <= known
    plain = {"steps", "folder", "seed", "threads", "accelerator", "stop_at", "warmup"}  # told where they are defined
    assert known - told <= plain
