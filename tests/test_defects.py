"""docs/defects.md names every row of the field's verified defects, and only tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "defects.md").read_text()
COUNTS = {
    "S": 15,
    "F": 12,
    "C": 8,
    "D": 15,
    "L": 7,
    "R": 5,
    "P": 1,
    "T": 4,
    "B": 3,
    "TD": 22,
    "TS": 16,
    "TR": 31,
    "DF": 14,
}


def rows():
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and re.match(r"[A-Z]+\d", cells[0]):
            yield cells


def test_every_row_is_there():
    named = {row for cells in rows() for row in cells[0].split(", ")}
    assert named == {f"{letter}{i}" for letter, count in COUNTS.items() for i in range(1, count + 1)}


def test_every_row_names_a_test_that_exists_or_why_there_is_none():
    for row, _, here in rows():
        found = re.findall(r"`(test_\w+\.py)::(test_\w+)`", here)
        assert found or "no part of this" in here, row
        for file, name in found:
            assert re.search(rf"def {name}\(", (TESTS / file).read_text()), f"{row}: {file}::{name}"
