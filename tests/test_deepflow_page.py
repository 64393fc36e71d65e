"""docs/deepflow.md: its program runs, its options exist with the defaults it gives, its commands name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pathline import backbones, objectives, weights
from pathline.core.config import resolve
from pathline.core.overrides import parse
from pathline.plugins.deepflow.presets import PRESETS
from pathline.solvers import guidance

PAGE = (Path(__file__).parent.parent / "docs" / "deepflow.md").read_text()
ENTRIES = {
    "backbone": {**backbones.registry.entry("deepflow").options()},
    "objective": {**objectives.registry.entry("deepflow").options()},
}
DATA = {"data": "digits", "train": {"steps": 1, "global_batch": 2, "folder": "run"}}
CELLS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]


def test_the_program_runs():
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(program, "deepflow.md", "exec"), {"__name__": "page"})


def test_the_ladders_rows_are_options():
    rows = [
        cells
        for cells in CELLS
        if len(cells) == 3 and re.search(r"refiner:|branches:|_width:|max_gap:", "".join(cells))
    ]
    assert len(rows) == 8
    for _, backbone, objective in rows:
        for section, cell in (("backbone", backbone), ("objective", objective)):
            for given in re.findall(r"`([^`]+: [^`]+)`", cell):
                for name in yaml.safe_load(f"{{{given}}}"):
                    assert name in ENTRIES[section], given


def test_open_choices_exist_and_their_first_value_is_the_default():
    named = [(cells[0], cells[1]) for cells in CELLS if cells[0].startswith(("`objective.", "`backbone."))]
    assert len(named) == 10
    for names, values in named:
        first = parse(re.findall(r"`([^`]+)`", values)[0]) if "`" in values else parse(values)
        for section, name in re.findall(r"`(objective|backbone)\.([a-z_]+)`", names):
            option = ENTRIES[section][name]
            assert (option.default if option.default is not None else "normed-query") == first, name


@pytest.mark.parametrize("text", [cells[0] for cells in CELLS if cells[0].startswith("`{name:")])
def test_guidance_of_the_table_can_be_built(text):
    guidance.build(yaml.safe_load(text.strip("`")))


def test_the_configuration_with_encoders_resolves():
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    configuration = resolve({**DATA, **yaml.safe_load(text)})
    assert [item["name"] for item in configuration.encoders] == ["dinov2-b", "clip-l"]


def test_families_and_their_defects_are_all_told():
    told = {cells[0].strip("`") for cells in CELLS if len(cells) == 4} & set(weights.registry.names())
    assert told == set(weights.registry.names())
    for name in weights.registry.names():
        for defect in weights.registry.build(name).defects:
            assert f"{defect}" in PAGE


def test_recipes_that_are_named_exist():
    for name in re.findall(r"configs/deepflow/([a-z0-9.-]+)\.yaml", PAGE):
        assert name in PRESETS
